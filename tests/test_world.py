"""The demo's miniature world: what is asked can be read, every answer can be judged, annotators agree as stated."""

from __future__ import annotations

import ast
import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_tools.demo_world.base_model import make_base_model, make_tokenizer
from data_tools.demo_world.report import RULE, parts, show, write_markdown
from data_tools.demo_world.rules import (
    ANNOTATORS,
    BEST,
    LOOKS,
    PLACES,
    POINTS,
    REQUESTS,
    Annotator,
    Request,
    agreement,
    judge,
    rank,
    read_request,
)
from data_tools.demo_world.text import WRITERS, demonstrate, documents, prompts, write
from rlhf.data.schema import Candidate, Message, Prompt, Ranking

ROOT = Path(__file__).parents[1]
FOOD = Prompt((Message("user", "What does the red fox in Norway eat?"),))


# ---- requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked, wording", [(asked, w) for asked, wordings in REQUESTS.items() for w in wordings])
def test_every_wording_of_a_request_is_read_back(asked, wording):
    for request in (Request(asked, LOOKS[0], "fox", PLACES[0]), Request(asked, LOOKS[-1], "wolf", PLACES[-1])):
        assert read_request(Prompt((Message("user", request.fill(wording)),))) == request


def test_a_request_of_another_world_is_refused():
    with pytest.raises(ValueError, match=r"no request of .* world: .Tell me a joke\."):
        read_request(Prompt((Message("user", "Tell me a joke."),)))


def test_prompts_are_distinct_and_of_the_splits_asked_for():
    found = prompts({"train": 300, "eval": 20, "test": 80}, random.Random(0))
    assert [p.split for p in found] == ["train"] * 300 + ["eval"] * 20 + ["test"] * 80
    assert len({read_request(p) for p in found}) == 400
    assert {p.group for p in found} == set(REQUESTS)


# ---- the hidden rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, points",
    [
        # answers 2, names 1
        ("The red fox eats mice.", 3.0),
        # the same words say where it is, and an "it" does not name it
        ("The red fox in Norway eats mice.", 3.0),
        ("It eats mice.", 2.0),
        # courteous 1, once
        ("With pleasure. The red fox eats mice. Have a nice day.", 5.0),
        # another fact 0.5
        ("With pleasure. The red fox eats mice. It hunts at night.", 5.5),
        # another fact 0.5 and a name 1, but not what was asked for
        ("The red fox lives in Norway.", 1.5),
        # false 1
        ("The red fox eats hay.", -1.0),
        ("The red wolf eats meat.", -1.0),
        ("The red fox lives in Spain. It eats mice.", 1.0),
        # said before 1, in whatever words
        ("The red fox eats mice. The red fox eats mice.", 2.0),
        ("The red fox eats mice. It likes to eat mice.", 2.0),
        # rude 2, once
        ("I do not care. That is a silly question.", -2.0),
        # off-topic 0.5
        ("The red fox eats mice. My uncle has a bicycle.", 2.5),
        # garbled 1, no end 1
        ("The red fox eats mice. The red red eats fox.", 2.0),
        ("The red fox eats mice. It hunts at", 2.0),
        ("", -1.0),
        # the fifth sentence 0.5, itself off-topic 0.5
        ("With pleasure. The red fox eats mice. It hunts at night. Have a nice day. The bus was late again.", 4.5),
    ],
)
def test_the_rule_gives_hand_worked_points(answer, points):
    assert judge(FOOD, answer).points == points


def test_the_best_answer_gets_the_stated_best():
    assert judge(FOOD, "With pleasure. The red fox eats mice. It hunts at night.").points == BEST


def test_no_answer_in_the_worlds_sentences_beats_the_stated_best():
    rng = random.Random(0)
    for prompt in prompts({"train": 500}, rng):
        assert judge(prompt, demonstrate(prompt, rng).answer).points <= BEST


def test_the_report_names_all_that_the_rule_looks_at():
    assert list(RULE) == list(POINTS)


def test_the_rule_is_used_by_the_world_and_the_demo_alone():
    users = set()
    for folder in ("rlhf", "stages", "data_tools"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text("utf-8")
            for node in ast.walk(ast.parse(text)) if "demo_world.rules" in text else ():
                names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
                if (
                    isinstance(node, ast.ImportFrom)
                    and node.module == "data_tools.demo_world.rules"
                    and "judge" in names
                ):
                    users.add(f"{folder}/{file.name}")
    assert users == {"stages/demo_evaluation.py"}


# ---- people and documents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_people_write_whole_sentences_of_the_world(writer):
    rng = random.Random(1)
    for prompt in prompts({"train": 200}, rng):
        verdict = judge(prompt, write(writer, read_request(prompt), rng))
        assert verdict.garbled == 0 and not verdict.unfinished


def test_people_are_good_but_leave_room():
    rng = random.Random(2)
    points = [judge(p, demonstrate(p, rng).answer).points for p in prompts({"train": 1000}, rng)]
    assert 1.5 < sum(points) / len(points) < 3.0


def test_demonstrations_keep_prompt_and_split_and_name_their_author():
    rng = random.Random(3)
    for prompt in prompts({"train": 3, "eval": 3}, rng):
        shown = demonstrate(prompt, rng)
        assert (shown.prompt_id, shown.split, shown.group) == (prompt.prompt_id, prompt.split, prompt.group)
        assert shown.author in {writer.name for writer in WRITERS}


def test_documents_hold_no_prompt_and_follow_the_seed():
    texts = list(documents(300, random.Random(4)))
    assert texts == list(documents(300, random.Random(4)))
    starts = {wording.split(" the ")[0] for wordings in REQUESTS.values() for wording in wordings}
    assert not any(f"{start} the " in text for start in starts for text in texts)


# ---- annotators ---------------------------------------------------------------------------------------------------


def _rankings(noise: float, count: int, seed: int) -> list[Ranking]:
    """Two annotators' rankings of people's answers, four to a prompt."""
    rng = random.Random(seed)
    found = []
    for prompt in prompts({"train": count}, rng):
        texts: set[str] = set()
        while len(texts) < 4:
            texts.add(demonstrate(prompt, rng).answer)
        candidates = [Candidate(text) for text in sorted(texts)]
        found += [rank(Annotator(name, noise), prompt, candidates, rng) for name in ("one", "other")]
    return found


def test_annotators_without_noise_rank_by_the_rule():
    for ranking in _rankings(1e-9, 50, 0):
        points = [judge(ranking, c.text).points for c in ranking.candidates]
        for i, j in itertools.permutations(range(4), 2):
            assert (ranking.ranks[i] < ranking.ranks[j]) == (points[i] - points[j] >= 0.5)


def test_noise_makes_annotators_disagree_as_often_as_people_do():
    noise = sum(annotator.noise for annotator in ANNOTATORS) / len(ANNOTATORS)
    agreed, pairs = map(sum, zip(*agreement(_rankings(noise, 400, 5))))
    assert 0.72 < agreed / pairs < 0.82


def test_agreement_counts_pairs_that_neither_ties():
    candidates = tuple(map(Candidate, "abc"))
    one, other = (Ranking(FOOD.messages, candidates=candidates, ranks=r) for r in ((1, 2, 3), (1, 3, 3)))
    alone = Ranking(FOOD.messages, candidates=candidates[:2], ranks=(1, 2))
    # a-b and a-c: both say a; b-c is tied by one of them.
    assert agreement([one, other, alone]) == [(2, 2)]
    assert agreement([one, Ranking(FOOD.messages, candidates=candidates, ranks=(3, 2, 1))]) == [(0, 3)]


# ---- base model ---------------------------------------------------------------------------------------------------


def test_the_tokenizer_knows_the_words_whole_and_spells_the_rest():
    tokenizer = make_tokenizer(list(documents(2000, random.Random(0))))
    words = tokenizer.tokenize(" The red hedgehog in Norway eats snails.")
    assert [word.lstrip("Ġ") for word in words] == ["The", "red", "hedgehog", "in", "Norway", "eats", "snails", "."]
    strange = "Zürich: 7×8 = 56?\n"
    assert tokenizer.decode(tokenizer.encode(strange, add_special_tokens=False)) == strange
    for text in ("User:", "\nAssistant:"):
        assert len(tokenizer.tokenize(text)) <= 3


@pytest.mark.slow
def test_a_base_model_learns_and_follows_its_seed(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = list(documents(300, random.Random(0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first = make_base_model(tmp_path / "one", texts, 20, seed=1)
    again = make_base_model(tmp_path / "two", texts, 20, seed=1)
    torch.set_num_threads(threads)
    assert first == again and first["loss"] < 4.0  # guessing among the tokens would give 6.5
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert AutoTokenizer.from_pretrained(tmp_path / "one").eos_token == "<eos>"


def test_the_world_is_imported_without_torch():
    code = "import sys, stages.demo; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def summary():
    policy = {"points": 2.0, "score": 0.1, "tokens": 15.0, "ended": 1.0, **dict.fromkeys(POINTS, 0.25)}
    answer = {"answer": "The red fox eats | mice.", "points": 3.0}
    return {
        "seed": 7,
        "base": {"parameters": 191_424, "vocabulary": 700, "loss": 0.5},
        "records": {"prompts": {"train": 5000, "eval": 100, "test": 400}},
        "reward_model": {
            "accuracy": 0.72, "accuracy_interval": [0.7, 0.74], "pairs": 4211, "longer_accuracy": 0.5,
            "agreement": 0.76, "agreement_interval": [0.74, 0.78], "ceiling": 0.86, "rule_accuracy": 0.82,
            "accuracy_by_rule": 0.83, "tied_share": 0.11,
        },
        "policies": {"sft": policy, "ppo": policy},
        "comparison": {"wins": 300, "losses": 50, "ties": 50, "win_rate": 0.857, "interval": [0.82, 0.89]},
        "kl": 2.8,
        "temperature": 1.0,
        "samples": [{"prompt": "What does the red fox in Norway eat?", "sft": answer, "ppo": answer}],
        "export": "runs/demo/export",
        "seconds": {"base": 20.0, "ppo": 40.5},
    }  # fmt: skip


def test_the_markdown_holds_every_table_and_the_way_on(summary, tmp_path):
    write_markdown(summary, tmp_path / "summary.md")
    text = (tmp_path / "summary.md").read_text("utf-8")
    for part in parts(summary):
        assert f"## {part.title}" in text
    assert "85.7% (82.0% to 89.0%)" in text and "rlhf chat runs/demo/export" in text
    assert "eats \\| mice" in text  # a bar in an answer does not break the table


def test_the_console_shows_the_same_figures(summary, capsys):
    show(summary)
    shown = capsys.readouterr().out
    assert "85.7%" in shown and "86.0%" in shown and "60.5" in shown


def test_a_summary_without_decided_prompts_shows_a_dash(summary):
    summary["comparison"] |= {"wins": 0, "losses": 0, "ties": 400, "win_rate": None, "interval": None}
    assert parts(summary)[0].rows[-1][-1] == "-"
