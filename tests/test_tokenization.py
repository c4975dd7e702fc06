"""Chat template, masks and truncation, on the tiny byte-level tokenizer and on stories260K's SentencePiece-like one."""

from __future__ import annotations

import shlex
import shutil

import pytest
import tiny
from transformers import AutoTokenizer

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.encode_records import EncodingCounts, encode_demonstration, encode_prompt, encode_ranking
from rlhf.data.schema import Candidate, Demonstration, Message, Ranking

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUE = [
    Message("system", "Be brief."),
    Message("user", "Hello there"),
    Message("assistant", "Hi."),
    Message("user", "Who are you?"),
]


def model_paths():
    return [tiny.llama(), *([str(tiny.STORIES)] if tiny.STORIES.is_dir() else [])]


@pytest.fixture(params=["tiny", "stories260K"])
def path(request):
    if request.param == "tiny":
        return tiny.llama()
    if not tiny.STORIES.is_dir():
        pytest.skip("../shared is absent")
    return str(tiny.STORIES)


@pytest.fixture(params=["default", "plain", "chatml"])
def chat(request, path, tmp_path):
    template = request.param
    if template == "chatml":
        (tmp_path / "chatml.jinja").write_text(CHATML)
        template = str(tmp_path / "chatml.jinja")
    return load_tokenizer(ModelConfig(path=path, chat_template=template), path)


def test_the_prompt_is_the_beginning_of_every_conversation_that_continues_it(chat):
    for answer in ("I am a test.", " starts with a space", "Zwei\nZeilen, 日本"):
        ids, mine = chat.conversation([*DIALOGUE, Message("assistant", answer)])
        prompt, tail = chat.prompt(DIALOGUE), chat.response(answer)
        assert ids == prompt + tail
        assert mine[len(prompt) :] == [True] * len(tail)


def test_an_answer_survives_encoding_and_decoding(chat):
    for answer in ("I am a test.", "Zwei\nZeilen, 日本", "a"):
        assert chat.decode(chat.response(answer)) == answer


def test_every_answer_ends_with_the_end_token_and_only_there(chat):
    ids = chat.response("I am a test.")
    assert ids[-1] == chat.end_id
    assert chat.end_id not in ids[:-1]


def test_loss_is_on_the_assistants_tokens_of_all_turns_and_on_no_other():
    chat = load_tokenizer(ModelConfig(path=tiny.llama(), chat_template="default"), tiny.llama())
    ids, mine = chat.conversation([*DIALOGUE, Message("assistant", "A test.")])
    said = chat.tokenizer.decode([token for token, flag in zip(ids, mine) if flag])
    rest = chat.tokenizer.decode([token for token, flag in zip(ids, mine) if not flag])
    assert said == " Hi.</s> A test.</s>"
    assert rest == "<s>Be brief.\n\nUser: Hello there\nAssistant:\nUser: Who are you?\nAssistant:"


def test_a_templates_own_end_of_turn_ends_answers():
    tokenizer = tiny.tokenizer().__class__.from_pretrained(tiny.llama())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    chat = ChatTokenizer(tokenizer)
    assert chat.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, mine = chat.conversation([*DIALOGUE, Message("assistant", "A test.")])
    assert tokenizer.decode([t for t, flag in zip(ids, mine) if flag]) == "Hi.<|im_end|>A test.<|im_end|>"
    assert tokenizer.decode(ids).endswith("A test.<|im_end|>")


def test_a_template_that_rewrites_earlier_turns_trains_on_the_last_answer_alone(tmp_path):
    rewriting = (
        "{% for m in messages %}{{ m.role if loop.last or m.role == 'user' else 'old' }}: {{ m.content }}\n{% endfor %}"
    )
    rewriting += "{% if add_generation_prompt %}assistant: {% endif %}"
    file = tmp_path / "t.jinja"
    file.write_text(rewriting)
    chat = load_tokenizer(ModelConfig(path=tiny.llama(), chat_template=str(file)), tiny.llama())
    ids, mine = chat.conversation([*DIALOGUE, Message("assistant", "A test.")])
    assert chat.tokenizer.decode([t for t, flag in zip(ids, mine) if flag]) == "A test.</s>"
    assert ids[: mine.index(True)] == chat.prompt(DIALOGUE)


def reference(chat, messages):
    """The tokens of a prompt in plain transformers."""
    rows = [{"role": m.role, "content": m.content} for m in messages]
    return chat.tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)


def test_prompts_of_every_number_of_turns_are_the_tokens_of_plain_transformers(chat):
    for turns in (2, 4):
        assert chat.prompt(DIALOGUE[:turns]) == reference(chat, DIALOGUE[:turns])
    ids, mine = chat.conversation([*DIALOGUE, Message("assistant", "A test.")])
    assert ids == reference(chat, DIALOGUE) + chat.response("A test.")
    said = chat.tokenizer.decode([token for token, flag in zip(ids, mine) if flag])
    assert "Hi." in said and "Hello" not in said and "User" not in said and "Who" not in said


def test_text_that_spells_control_tokens_is_never_encoded_as_them(chat):
    tokenizer = chat.tokenizer
    special = set(tokenizer.all_special_ids)
    text = "Write <s>old</s> and it is struck out."
    response = chat.response(text)
    assert not special.intersection(response[:-1])
    assert chat.decode(response) == text
    for turns in (2, 4):
        clean = [m._replace(content=m.content.replace("Hi.", "Hi!")) for m in DIALOGUE[:turns]]
        spelled = [m._replace(content=f"{m.content} {text}") for m in clean]
        counts = [sum(chat.prompt(messages).count(token) for token in special) for messages in (clean, spelled)]
        assert counts[0] == counts[1]
        rows = [{"role": m.role, "content": m.content} for m in spelled]
        same = tokenizer.apply_chat_template(
            rows, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        assert chat.prompt(spelled) == same


def test_the_earlier_answers_of_a_conversation_with_control_tokens_are_trained_on(tiny_chat):
    ids, mine = tiny_chat.conversation(
        [DIALOGUE[1], Message("assistant", "Say </s>."), DIALOGUE[3], Message("assistant", "Yes.")]
    )
    said = tiny_chat.tokenizer.decode([token for token, flag in zip(ids, mine) if flag])
    assert said == " Say </s>.</s> Yes.</s>"


def test_records_that_spell_control_tokens_can_be_rejected_and_counted():
    config = ModelConfig(path=tiny.llama(), chat_template="default", control_tokens_in_text="reject")
    chat, counts = load_tokenizer(config, tiny.llama()), EncodingCounts()
    record = Demonstration((Message("user", "Ok?"),), answer="No </s> yes")
    assert encode_demonstration(record, chat, 40, counts) is None
    (row,) = counts.refused
    assert row["prompt_id"] == record.prompt_id and "</s>" in row["fault"]
    assert sum(counts.skipped.values()) == 1


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


def test_a_record_that_the_template_refuses_is_rejected_with_its_place(tmp_path, capsys):
    (tmp_path / "t.jinja").write_text(REFUSING)
    config = ModelConfig(path=tiny.llama(), chat_template=str(tmp_path / "t.jinja"))
    chat, counts = load_tokenizer(config, tiny.llama()), EncodingCounts()
    messages = (Message("system", "Be brief."), Message("user", "Ok?"))
    candidates = (Candidate("a"), Candidate("b"))
    demonstration = Demonstration(messages, answer="Yes.", source="file.jsonl")
    ranking = Ranking(messages, candidates=candidates, ranks=(1, 2))
    assert encode_demonstration(demonstration, chat, 100, counts) is None
    assert encode_ranking(ranking, chat, 100, counts) is None
    assert encode_prompt(ranking, chat, 100, counts) is None
    assert encode_demonstration(Demonstration(messages[1:], answer="Yes."), chat, 100, counts) is not None
    assert [row["prompt_id"] for row in counts.refused] == [ranking.prompt_id] * 3
    counts.report("demonstrations")
    said = capsys.readouterr().err
    assert "3 demonstrations rejected" in said and ranking.prompt_id in said and "System role not supported" in said


def test_a_tokenizer_without_an_end_token_is_refused_with_the_command_that_names_one(tmp_path):
    shutil.copytree(tiny.llama(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "model"))
    with pytest.raises(UserError, match="has no EOS token, and the chat template writes no end of turn") as caught:
        load_tokenizer(config, config.path)
    command = caught.value.remedy.partition("name the token once: ")[2].partition(". Or set")[0]
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    exec(code, {"__name__": "__main__"})  # in this process: a new one imports for seconds
    assert load_tokenizer(config, config.path).end_id == tokenizer.convert_tokens_to_ids("</s>")


def test_what_a_template_says_of_a_row_is_printed_without_control_characters(tmp_path, capsys):
    (tmp_path / "t.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception(messages[0].content) }}{% endif %}" + CHATML
    )
    chat = load_tokenizer(ModelConfig(path=tiny.llama(), chat_template=str(tmp_path / "t.jinja")), tiny.llama())
    counts = EncodingCounts()
    messages = (Message("system", "\x1b[31mred"), Message("user", "Ok?"))
    assert encode_demonstration(Demonstration(messages, source="a\x1b[2J", answer="Yes."), chat, 100, counts) is None
    counts.report("demonstrations")
    captured = capsys.readouterr()
    assert "red" in captured.err and "\x1b" not in captured.err + captured.out


def test_a_template_that_loops_ends_at_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.data.chat_rendering.RENDER_SECONDS", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "t.jinja").write_text("{% if messages[0].content == 'loop' %}" + loop + "{% endif %}" + CHATML)
    chat = load_tokenizer(ModelConfig(path=tiny.llama(), chat_template=str(tmp_path / "t.jinja")), tiny.llama())
    counts = EncodingCounts()
    record = Demonstration((Message("user", "loop"),), answer="Yes.")
    assert encode_demonstration(record, chat, 100, counts) is None
    assert "takes longer" in counts.refused[0]["fault"]


def test_a_conversation_is_rendered_twice_however_many_turns_it_has(tiny_chat, monkeypatch):
    calls, apply = [], tiny_chat.tokenizer.apply_chat_template

    def counted(*args, **options):
        calls.append(args)
        return apply(*args, **options)

    monkeypatch.setattr(tiny_chat.tokenizer, "apply_chat_template", counted)
    turns = [Message(("user", "assistant")[i % 2], f"turn {i}") for i in range(10_002)]
    ids, mine = tiny_chat.conversation(turns)
    assert len(calls) == 2
    assert sum(mine) == sum(len(tiny_chat.response(m.content)) for m in turns[1::2])
    assert len(ids) == len(mine)


def test_a_reasoning_block_that_the_generation_prompt_opens_is_ended_once(tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    chat = load_tokenizer(ModelConfig(path=tiny.llama(), chat_template=str(tmp_path / "t.jinja")), tiny.llama())
    decode = chat.tokenizer.decode
    assert decode(chat.prompt(DIALOGUE[1:2])).endswith("<|im_start|>assistant\n<think>\n")
    assert decode(chat.response("Yes.")[:-1]) == "\n</think>\n\nYes."
    assert decode(chat.response("<think>\nHm.\n</think>\n\nYes.")[:-1]) == "Hm.\n</think>\n\nYes."
    assert decode(chat.response("Hm.\n</think>\n\nYes.")[:-1]) == "Hm.\n</think>\n\nYes."
    assert chat.decode(chat.response("Yes.")) == "Yes."


def test_a_template_whose_answer_does_not_follow_its_prompt_is_refused(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="chat_template"):
        load_tokenizer(ModelConfig(path=tiny.llama(), chat_template=str(file)), tiny.llama())


def test_an_unknown_template_and_a_missing_tokenizer_are_named(tmp_path):
    with pytest.raises(UserError, match="nope"):
        load_tokenizer(ModelConfig(path=tiny.llama(), chat_template="nope"), tiny.llama())
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path)), str(tmp_path))


# ---- truncation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_chat():
    return load_tokenizer(ModelConfig(path=tiny.llama(), chat_template="default"), tiny.llama())


def test_a_long_prompt_keeps_bos_and_its_end(tiny_chat):
    counts = EncodingCounts()
    record = Demonstration((Message("user", "word " * 50),), answer="Yes.")
    row = encode_demonstration(record, tiny_chat, 40, counts)
    whole, _ = tiny_chat.conversation([*record.messages, Message("assistant", "Yes.")])
    assert len(row["input_ids"]) == 40
    assert row["input_ids"][0] == tiny_chat.tokenizer.bos_token_id
    assert row["input_ids"][1:] == whole[-39:]
    assert [t for t in row["labels"] if t != -100] == tiny_chat.response("Yes.")
    assert counts.truncated_prompts == 1


def test_an_answer_that_does_not_fit_is_set_aside_and_counted(tiny_chat):
    counts = EncodingCounts()
    record = Demonstration((Message("user", "Count."),), answer="one two three " * 20)
    assert encode_demonstration(record, tiny_chat, 40, counts) is None
    assert sum(counts.skipped.values()) == 1


def test_a_ranking_keeps_the_candidates_that_fit_with_their_order(tiny_chat):
    counts = EncodingCounts()
    candidates = (Candidate("Yes."), Candidate("long " * 60), Candidate("No."))
    row = encode_ranking(
        Ranking((Message("user", "Ok?"),), candidates=candidates, ranks=(3, 2, 1)), tiny_chat, 40, counts
    )
    assert row["candidates"] == [tiny_chat.response("Yes."), tiny_chat.response("No.")]
    assert row["ranks"] == [2, 1]
    assert sum(counts.skipped.values()) == 1


def test_a_ranking_gives_its_best_answer_as_demonstration(tiny_chat):
    ranking = Ranking((Message("user", "Ok?"),), candidates=(Candidate("No."), Candidate("Yes.")), ranks=(2, 1))
    row = encode_demonstration(ranking, tiny_chat, 40, EncodingCounts())
    assert [t for t in row["labels"] if t != -100] == tiny_chat.response("Yes.")


def test_a_prompt_row_holds_the_end_of_a_long_prompt(tiny_chat):
    counts = EncodingCounts()
    messages = (Message("user", "word " * 50),)
    row = encode_prompt(
        Ranking(messages, candidates=(Candidate("a"), Candidate("b")), ranks=(1, 2)), tiny_chat, 16, counts
    )
    assert len(row["prompt"]) == 16
    assert row["prompt"][1:] == tiny_chat.prompt(messages)[-15:]
    assert counts.truncated_prompts == 1


def test_fingerprints_tell_tokenizers_and_templates_apart():
    prints = [
        load_tokenizer(ModelConfig(path=p, chat_template=t), p).fingerprints()
        for p in model_paths()
        for t in ("default", "plain")
    ]
    assert prints[0]["tokenizer"] == prints[1]["tokenizer"]
    assert prints[0]["chat_template"] != prints[1]["chat_template"]
    if len(prints) > 2:
        assert prints[0]["tokenizer"] != prints[2]["tokenizer"]
