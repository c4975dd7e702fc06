"""`rlhf data propose`: which prompts, whose answers, distinct and shuffled, where judges disagree, refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
from rows import jsonl, tree, write

from data_tools.annotate.candidates import disagreement, too_similar
from data_tools.annotate.propose import OpenProposal, missing_answers
from data_tools.curate.lineage import lineage
from rlhf.core.errors import UserError
from rlhf.data.schema import Candidate, Demonstration, Message, Prompt, Proposal, Ranking
from rlhf.data.store import open_dataset
from stages.propose import choose, command, judge_scores

# ---- pure parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Boil it.", "  boil\nIT. ", True),
        ("ﬁne ①", "fine 1", True),
        ("one two three four", "one two three five", False),  # 2 * 3 / 8 = 0.75
        ("a b c d e f g h i j", "a b c d e f g h i x", True),  # 2 * 9 / 20 = 0.9
        ("a b c d e f g h i j", "j i h g f e d c b a", False),  # the same words in another order
        ("dog bites man", "dog bites man!", True),
        ("👍", "👎", False),
        ("👍", "👍", True),
        ("👍", "yes", False),
    ],
)
def test_answers_are_too_similar_when_equal_but_for_case_and_space_or_when_most_words_match(one, other, same):
    assert too_similar(one, other, 0.9) is same


def test_with_a_threshold_of_one_only_the_same_words_are_too_similar():
    assert not too_similar("a b c d e f g h i j k l m n o p", "a b c d e f g h i j k l m n o q", 1.0)
    assert too_similar("A, b!", "a b", 1.0)


def test_disagreement_is_the_variance_of_the_preference_averaged_over_pairs():
    # sigmoid(-ln 3) = 1/4 and sigmoid(ln 3) = 3/4: mean 1/2, variance 1/16
    assert disagreement([[0, math.log(3)], [math.log(3), 0]]) == pytest.approx(1 / 16)
    # of three answers the pairs (1, 2) and (1, 3) are disputed so, (2, 3) is not
    assert disagreement([[0, math.log(3), math.log(3)], [math.log(3), 0, 0]]) == pytest.approx(2 / 3 / 16)
    assert disagreement([[5, 1, 2], [6, 2, 3]]) == 0, "a shift of all scores says nothing"
    assert disagreement([[1000, -1000], [-1000, 1000]]) == pytest.approx(0.25)


def test_the_places_go_to_the_models_in_turn_beginning_with_the_next_one_at_the_next_prompt():
    asked = Prompt((Message("user", "?"),))
    bare, answered = OpenProposal(asked, 1, []), OpenProposal(asked, 1, [Candidate("x", "", "person")])

    def due(one: OpenProposal, index: int) -> list[int]:
        """Candidates that the prompt at `index` should have once one, two and three models have answered."""
        opened = [bare] * index + [one]
        return [list(missing_answers(opened, 4, 3, model))[index][1] + len(one.candidates) for model in range(3)]

    assert due(bare, 0) == [2, 3, 4], "a b c a"
    assert due(bare, 1) == [1, 3, 4], "b c a b"
    assert due(answered, 0) == [2, 3, 4], "person a b c"


def prompt(number: int) -> tuple[Message, ...]:
    return (Message("user", f"Question {number}?"),)


def test_a_persons_answer_is_a_demonstration_or_the_best_ranked_candidate_that_a_person_wrote(tmp_path):
    demos = write(tmp_path / "d", [Demonstration(prompt(0), answer=text, author="ines") for text in ("One", "Two")])
    (asked,) = choose(demos, [], None, None, 0, human=True)
    assert asked.candidates == [Candidate("One", "ines", "person")] and asked.number == 1
    assert choose(demos, [], None, None, 0, human=False)[0].candidates == []
    candidates = (Candidate("A", "p", "person"), Candidate("B", "m", "model"), Candidate("C", "q", "person"))
    ranked = [Ranking(prompt(i), candidates=candidates, ranks=ranks) for i, ranks in enumerate([(2, 1, 1), (2, 1, 3)])]
    found = {a.prompt.messages: a.candidates for a in choose(write(tmp_path / "r", ranked), [], None, None, 0, True)}
    assert found == {prompt(0): [candidates[2]], prompt(1): []}


def test_prompts_are_drawn_by_seed_and_do_not_depend_on_what_else_is_there(tmp_path):
    many = write(tmp_path / "many", [Prompt(prompt(i)) for i in range(50)])
    few = write(tmp_path / "few", [Prompt(prompt(i)) for i in reversed(range(25))])
    first = [a.prompt for a in choose(many, [], None, 10, 1, True)]
    assert [a.prompt for a in choose(many, [], None, 20, 1, True)][:10] == first
    assert [a.prompt for a in choose(many, [], None, 10, 2, True)] != first
    among = {a.prompt for a in choose(many, [], None, None, 1, True)} & {Prompt(prompt(i)) for i in range(25)}
    order = [a.prompt for a in choose(many, [], None, None, 1, True) if a.prompt in among]
    assert [a.prompt for a in choose(few, [], None, None, 1, True)] == order


def test_skipped_prompts_are_left_out_and_a_split_is_kept_to(tmp_path):
    data = write(tmp_path / "p", [Prompt(prompt(i), split="train" if i < 6 else "eval") for i in range(8)])
    skip = write(tmp_path / "s", [Prompt(prompt(i)) for i in range(4)])
    assert {a.prompt.messages for a in choose(data, [skip], "train", None, 0, True)} == {prompt(4), prompt(5)}
    assert len(choose(data, [skip], None, None, 0, True)) == 4
    with pytest.raises(UserError, match="no prompt is left"):
        choose(data, [data], None, None, 0, True)
    with pytest.raises(UserError, match="no records in the split 'test'"):
        choose(data, [], "test", None, 0, True)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("propose")
    sft = finished.sft(folder / "sft")
    reward = finished.reward(folder / "reward", sft)
    finished.reward(folder / "reward-2", sft, seed=9, scale=(0.0, 5.0))
    finished.ppo(folder / "ppo", sft, reward)
    tiny.write_demonstrations(folder / "demos", 16, 4)
    return folder


def propose(place: Path, out: Path, *words: Any, models: tuple[str, ...] = ("sft", "ppo")) -> dict[str, Any]:
    names = [place / model for model in models]
    given = ("--prompts", place / "demos", "--out", out, "--max-new-tokens", 10, "--overwrite", "--json", *words)
    said, _ = finished.invoke(command, *names, *given, program="rlhf data propose")
    return finished.last_json(said)


def proposals(path: Path) -> list[Proposal]:
    return list(open_dataset(path, "proposal").records())


def test_each_prompt_gets_k_distinct_answers_of_a_person_and_of_all_models(place, tmp_path):
    summary = propose(place, tmp_path / "c", "--count", 12, "--min-new-tokens", 10)  # long enough to differ
    found = proposals(tmp_path / "c")
    assert len(found) == summary["written"] == 12 and summary["rejected"] == 0
    for proposal in found:
        assert len(proposal.candidates) == 4
        assert not any(
            too_similar(a.text, b.text, 0.9) for a in proposal.candidates for b in proposal.candidates if a != b
        )
        assert [c.author_kind for c in proposal.candidates].count("person") == 1
    by = Counter(c.author for p in found for c in p.candidates if c.author_kind == "model")
    assert by == {str(place / "sft"): 18, str(place / "ppo"): 18}
    assert {p.split for p in found} <= {"train", "eval"} and all(p.split for p in found)


def test_the_order_to_show_is_shuffled(place, tmp_path):
    propose(place, tmp_path / "c")
    places = Counter([c.author_kind for c in p.candidates].index("person") for p in proposals(tmp_path / "c"))
    assert len(places) == 4, places


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_answers(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = []
    for seed in (3, 3, 4):
        propose(place, Path("c"), "--count", 2, "--seed", seed)
        shards.append(tree(tmp_path / "c"))
    assert shards[0] == shards[1] and shards[0] != shards[2]


def test_without_people_all_answers_are_the_models(place, tmp_path):
    propose(place, tmp_path / "c", "--count", 4, "--k", 2, "--no-human", models=("sft",))
    kinds = [c.author_kind for p in proposals(tmp_path / "c") for c in p.candidates]
    assert kinds == ["model"] * 8


def test_the_manifest_names_the_parents_with_fingerprints_and_the_command(place, tmp_path):
    propose(place, tmp_path / "one", "--count", 2)
    propose(place, tmp_path / "two", "--count", 2, "--skip", tmp_path / "one", "--stop", "a b")
    origin = json.loads((tmp_path / "two" / "manifest.json").read_text())["origin"]
    paths = [parent["path"] for parent in origin["parents"]]
    assert paths == [str(p) for p in (place / "demos", tmp_path / "one", place / "sft", place / "ppo")]
    assert all(len(parent["fingerprint"]) == 64 for parent in origin["parents"])
    assert origin["command"].startswith("rlhf data propose ") and "--stop 'a b'" in origin["command"]
    assert origin["sampling"][str(place / "sft")]["max_new_tokens"] == 10
    one, two = ({p.prompt_id for p in proposals(tmp_path / name)} for name in ("one", "two"))
    assert not one & two


def test_the_lineage_goes_on_through_the_runs_that_answered(place, tmp_path):
    propose(place, tmp_path / "c", "--count", 2, models=("sft",))
    prompts, sft = lineage(tmp_path / "c")["parents"]
    assert (prompts["kind"], prompts["state"]) == ("demonstration", "ok")
    assert (sft["model"], sft["state"], [p["path"] for p in sft["parents"]]) == (
        "sft run",
        "ok",
        [tiny.llama(), "demos"],
    )
    copy = tmp_path / "sft"
    shutil.copytree(place / "sft", copy)
    words = ("--prompts", place / "demos", "--out", tmp_path / "d", "--max-new-tokens", 10, "--count", 2)
    finished.invoke(command, copy, *words)
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(info | {"model_fingerprint": "another"}))
    assert lineage(tmp_path / "d")["parents"][1]["state"] == "changed"
    shutil.rmtree(copy)
    assert lineage(tmp_path / "d")["parents"][1]["state"] == "missing"


def test_a_prompt_with_fewer_distinct_answers_gets_those_and_one_with_less_than_two_is_set_aside(place, tmp_path):
    rows = [
        {"prompt": "One?", "candidates": [{"text": "By ines.", "author_kind": "person"}, "B"], "ranks": [1, 2]},
        {"prompt": "Two?", "candidates": ["A", "B"], "ranks": [1, 2]},
        {"prompt": "Three?", "candidates": ["A"], "ranks": [1]},
    ]
    jsonl(tmp_path / "r.jsonl", rows)
    words = ("--temperature", 0, "--min-new-tokens", 3, "--prompts", tmp_path / "r.jsonl")
    summary = propose(place, tmp_path / "c", *words, models=("sft",))
    (proposal,) = proposals(tmp_path / "c")
    assert sorted(c.author_kind for c in proposal.candidates) == ["model", "person"]
    assert summary["drawn"] == 2, "greedy answers are not drawn again"
    rejected = [json.loads(line) for line in (tmp_path / "c" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (3, "candidates: fewer than two answers"),
        (2, "fewer than two distinct answers"),
    ]
    assert json.loads(rejected[1]["raw"])["messages"][0]["content"] == "Two?"
    with pytest.raises(UserError, match="no prompt got two distinct answers"):
        propose(place, tmp_path / "none", *words, "--no-human", models=("sft",))
    assert not (tmp_path / "none").exists()


def test_what_one_model_cannot_give_falls_to_the_next(place, tmp_path):
    words = ("--no-human", "--temperature", 0, "--min-new-tokens", 3, "--k", 3, "--count", 6)
    propose(place, tmp_path / "c", *words)
    assert all(len(p.candidates) == 2 for p in proposals(tmp_path / "c")), "each greedy model has one answer"


def test_disagreement_keeps_the_prompts_that_the_judges_dispute_most_those_first(place, tmp_path):
    judges = [str(place / "reward"), str(place / "reward-2")]
    words = [word for judge in judges for word in ("--judge", judge)]
    propose(place, tmp_path / "all", "--count", 12)
    propose(place, tmp_path / "c", "--select", "disagreement", "--count", 3, "--pool", 12, *words)
    pool = proposals(tmp_path / "all")
    asked = [OpenProposal(Prompt(p.messages), 1, list(p.candidates)) for p in pool]
    by_judge = [judge_scores(judge, asked) for judge in judges]
    value = {p.id: disagreement([judged[i] for judged in by_judge]) for i, p in enumerate(pool)}
    assert [p.id for p in proposals(tmp_path / "c")] == sorted(value, key=lambda name: -value[name])[:3]
    told = json.loads((tmp_path / "c" / "manifest.json").read_text())["origin"]
    assert told["disagreement"]["kept"] > told["disagreement"]["pool"] and told["disagreement"]["prompts"] == 12
    assert [parent["path"] for parent in told["parents"]][-2:] == judges


def test_judges_score_on_the_scale_that_they_were_trained_on(place):
    one = OpenProposal(Prompt(prompt(0)), 1, [Candidate("Yes, it does."), Candidate("No.")])
    (raw,) = judge_scores(str(place / "reward-2"), [one])
    from rlhf.config.base import ModelConfig
    from rlhf.data.chat_tokenizer import load_tokenizer

    chat = load_tokenizer(ModelConfig(path=str(place / "reward-2")), str(place / "reward-2" / "model"))
    texts = [chat.whole(one.prompt.chat, candidate.text) for candidate in one.candidates]
    assert raw == pytest.approx(finished.reward_logits(str(place / "reward-2"), texts).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "models", "fault"),
    [
        (["--select", "disagreement", "--count", 2], ("sft",), "needs at least two judges, got 0"),
        (["--judge", "x"], ("sft",), "are for --select disagreement"),
        (["--pool", 5], ("sft",), "are for --select disagreement"),
        (["--select", "disagreement", "--judge", "{reward}", "--judge", "{reward}"], ("sft",), "--count"),
        (["--select", "disagreement", "--judge", "{sft}", "--judge", "{reward}", "--count", 2], ("sft",), "not of rew"),
        ([], ("reward",), "is a run of the reward stage"),
        ([], ("nowhere/at/all",), "no such run, model or file"),
        (["--split", "test"], ("sft",), "no records in the split"),
        (["--temperature", -1], ("sft",), "--temperature -1"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_model_answers(place, tmp_path, words, models, fault, monkeypatch):
    monkeypatch.setattr("rlhf.inference.policy.open_policy", lambda *_: pytest.fail("a model was loaded"))
    words = [str(w).format(reward=place / "reward", sft=place / "sft") for w in words]
    with pytest.raises(UserError, match=fault):
        propose(place, tmp_path / "c", *words, models=models)
    assert not (tmp_path / "c").exists()
