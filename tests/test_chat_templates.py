"""Every text template that TRL ships: prompts are plain transformers' tokens, responses continue them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import tiny
from trl_templates import FOLDER, chat_with

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_templates import freeze_clock
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.schema import Message
from rlhf.runs.parents import template_time
from rlhf.runs.run import read_run
from rlhf.sft.config import SFTConfig
from stages import sft

PICTURES = ("idefics3", "llava_next", "smolvlm")
"""Templates that take lists of text and pictures only: text content is lost or an error."""
TEMPLATES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.startswith(PICTURES))
DIALOGUE = [
    Message("user", "Hello there"),
    Message("assistant", "Hi."),
    Message("user", "Who are you?"),
    Message("assistant", "  A test\nof two lines. "),
    Message("user", "Really?"),
]


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request: pytest.FixtureRequest) -> ChatTokenizer:
    return chat_with((FOLDER / f"{request.param}.jinja").read_text("utf-8"))


def plain(chat: ChatTokenizer, messages: list[Message], **options: bool) -> list[int]:
    rows = [{"role": m.role, "content": m.content} for m in messages]
    return chat.tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False, **options)


def test_prompts_of_every_length_are_the_tokens_of_plain_transformers(chat: ChatTokenizer) -> None:
    for turns in (1, 3, 5):
        assert chat.prompt(DIALOGUE[:turns]) == plain(chat, DIALOGUE[:turns])


def test_a_conversation_is_the_prompt_and_the_response(chat: ChatTokenizer) -> None:
    for turns in (1, 3, 5):
        ids, mine = chat.conversation([*DIALOGUE[:turns], Message("assistant", "Yes.")])
        prompt, response = chat.prompt(DIALOGUE[:turns]), chat.response("Yes.")
        assert ids == prompt + response
        assert mine[len(prompt) :] == [True] * len(response)
        said = chat.tokenizer.decode([t for t, flag in zip(ids[: len(prompt)], mine) if flag])
        assert "Hello" not in said and "Who" not in said and "Really" not in said


def test_a_response_survives_encoding_and_decoding(chat: ChatTokenizer) -> None:
    for text in ("Yes.", "two\nlines", "Is 2 < 3? Yes."):
        assert chat.decode(chat.response(text)) == text
        assert chat.response(text).count(chat.end_id) == 1


def test_control_tokens_in_text_are_encoded_as_text(chat: ChatTokenizer) -> None:
    token = chat.tokenizer.convert_ids_to_tokens(chat.end_id)
    control = chat.tokenizer.convert_tokens_to_ids(sorted(chat.renderer.control))
    clean, spelled = [Message("user", "Say  now")], [Message("user", f"Say {token} now")]
    count = lambda ids: sum(ids.count(one) for one in control)  # noqa: E731
    assert count(chat.prompt(spelled)) == count(chat.prompt(clean))
    assert count(chat.response(f"Say {token} now")) == count(chat.response("Say  now"))
    assert chat.decode(chat.response(f"Say {token} now")) == f"Say {token} now"


# ---- the clock -----------------------------------------------------------------------------------------------------

DATED = (
    '{{ bos_token }}Today: {{ strftime_now("%d %b %Y") }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}'
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_date_that_the_template_takes_from_the_clock_is_frozen(tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    config = ModelConfig(path=tiny.llama(), chat_template=str(tmp_path / "dated.jinja"))
    chat = load_tokenizer(config, tiny.llama(), "2024-02-29T12:00:00")
    assert "Today: 29 Feb 2024" in chat.tokenizer.decode(chat.prompt(DIALOGUE[:1]))
    assert chat.facts()["template_time"] == "2024-02-29T12:00:00"
    chat.tokenizer.save_pretrained(tmp_path / "model")
    again = load_tokenizer(ModelConfig(path=str(tmp_path / "model")), str(tmp_path / "model"))
    assert again.prompt(DIALOGUE[:1]) == plain(again, DIALOGUE[:1]) == chat.prompt(DIALOGUE[:1])
    assert again.fingerprints() == chat.fingerprints() and "template_time" not in again.facts()


def test_a_format_that_is_not_written_in_the_template_is_refused() -> None:
    with pytest.raises(UserError, match="strftime_now"):
        freeze_clock("{% set f = '%Y' %}{{ strftime_now(f) }}", datetime(2024, 2, 29))
    assert freeze_clock("{{ strftime_now('%Y') }}", datetime(2024, 2, 29)) == '{{ "2024" }}'


def test_a_run_keeps_the_time_of_its_template_on_resume_and_hands_it_on(tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    tiny.write_demonstrations(tmp_path / "demos", 8)
    model = {"path": tiny.llama(), "chat_template": str(tmp_path / "dated.jinja")}
    values = {"run": str(tmp_path / "sft"), "model": model, "data": {"train": str(tmp_path / "demos")}}
    config = SFTConfig.model_validate(values | {"batch": {"max_steps": 1, "batch_size": 2, "micro_batch_size": 2}})
    sft.run(config)
    kept = read_run(tmp_path / "sft")["template_time"]
    template = (tmp_path / "sft" / "model" / "chat_template.jinja").read_text()
    assert template == freeze_clock(DATED, datetime.fromisoformat(kept))
    later = config.model_copy(
        update={"run": str(tmp_path / "next"), "model": ModelConfig(**model | {"path": values["run"]})}
    )
    assert template_time(config, resume=True) == template_time(later, resume=False) == kept
    assert template_time(config, resume=False) >= kept


@pytest.mark.slow
def test_ranks_with_different_clocks_freeze_the_template_at_the_time_of_rank_0(tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    words = (str(tmp_path / "sft"), tiny.llama(), str(tmp_path / "dated.jinja"))
    done = tiny.launch(2, CLOCKS, *words)
    assert done.returncode == 0, done.stdout
    times = [tmp_path / f"time-{rank}" for rank in (0, 1)]
    assert {file.read_text() for file in times} == {"2024-01-30T10:00:00 " + "30 Jan 2024"}


CLOCKS = """
import sys
from datetime import datetime
from pathlib import Path

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.schema import Message
from rlhf.runs import parents
from rlhf.sft.config import SFTConfig

class Clock(datetime):
    @classmethod
    def now(cls):
        return cls(2024, 1, 30 + distributed.rank(), 10)

parents.datetime = Clock
folder, model, template = sys.argv[1:]
config = SFTConfig.model_validate(
    {"run": folder, "model": {"path": model, "chat_template": template}, "data": {"train": "rows"}}
)
distributed.start(60)
chat = load_tokenizer(config.model, model, parents.template_time(config, resume=False))
text = chat.tokenizer.decode(chat.prompt([Message("user", "Hello.")]))
date = next(day for day in ("30 Jan 2024", "31 Jan 2024") if day in text)
(Path(folder).parent / f"time-{distributed.rank()}").write_text(f"{chat.frozen_at} {date}")
distributed.stop()
"""
