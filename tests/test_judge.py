"""Judges: prompts, verdicts, both orders, agreement with rankings, the command, and the reward source of PPO."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
from chat_servers import Response, chat_server, completion, fault
from logged import updates
from ppo_runs import config

from rlhf.core.errors import UserError
from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.judging.agreement import Pair, agreement_metrics, pairs_of
from rlhf.judging.config import JudgeConfig, RewardJudgeConfig, read_judge
from rlhf.judging.judge import Judge, PairVerdicts
from rlhf.judging.prompt import conversation, read_prompt, read_rating, read_verdict
from rlhf.judging.source import rating_source
from rlhf.reward.sources import REWARDS, RewardInputs
from stages import evaluate, judge
from stages.ppo import run

PROMPT = [{"role": "user", "content": "What is {answer_b}?"}]
PARTS = re.compile(r"\[answer A\]\n(.*)\n\[end of answer A\].*\[answer B\]\n(.*)\n\[end of answer B\]", re.S)
ANSWER = re.compile(r"\[answer\]\n(.*)\n\[end of answer\]", re.S)


def asked(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"]


def shorter_wins(body: dict[str, Any], number: int = 0) -> Response:
    """A deterministic judge that prefers the shorter answer, and rates 10 minus a point for each 20 characters."""
    if (pair := PARTS.search(asked(body))) is not None:
        a, b = map(len, pair.groups())
        return completion(f"Short.\n[[{'A' if a < b else 'B' if b < a else 'C'}]]")
    found = ANSWER.search(asked(body))
    assert found is not None
    return completion(f"[[{max(1, 10 - len(found[1]) // 20)}]]")


def first_wins(body: dict[str, Any], number: int = 0) -> Response:
    return completion("[[A]]")


def a_judge(url: str, tmp_path: Path, kind: Any = "pairwise", **values: Any) -> Judge:
    return Judge(JudgeConfig(url=url, cache=str(tmp_path / "replies"), **values), kind)


# ---- prompts and verdicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Because.\n[[A]]", "A"), ("[[B]] is better. [[B]]", "B"), ("[[C]]", "C"), ("A is better", None),
        ("[[A]] or [[B]]", None), ("[[D]]", None), ("[[a]]", None), ("", None),
    ],
)  # fmt: skip
def test_a_verdict_is_the_only_one_in_the_reply(reply: str, verdict: str | None) -> None:
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("[[7]]", 7.0), ("[[7.5]]\n[[7.5]]", 7.5), ("[[11]]", None), ("[[0]]", None), ("7", None), ("[[3]] [[4]]", None)],
)
def test_a_rating_is_the_only_one_on_the_scale(reply: str, rating: float | None) -> None:
    assert read_rating(reply) == rating


def test_braces_in_prompts_and_answers_stay_as_they_are() -> None:
    text = read_prompt("pairwise").render(prompt=conversation(PROMPT), answer_a="{answer_b}", answer_b="{prompt} {x}")
    assert "user: What is {answer_b}?" in text
    assert "[answer A]\n{answer_b}\n" in text and "[answer B]\n{prompt} {x}\n" in text


@pytest.mark.parametrize(
    ("content", "fault_"),
    [
        ("{prompt} {answer}", "first line is not `# version: NAME`"),
        ("# version: a\n{prompt}", "{answer}"),
        ("# version: a\n{prompt} {answer} {answer}", "{answer}"),
    ],
)
def test_a_prompt_file_needs_a_version_and_each_place_once(tmp_path: Path, content: str, fault_: str) -> None:
    (tmp_path / "prompt.txt").write_text(content)
    with pytest.raises(UserError) as error:
        read_prompt("rating", str(tmp_path / "prompt.txt"))
    assert fault_ in str(error.value)


def test_both_prompts_that_come_with_the_project_name_their_version() -> None:
    assert [read_prompt(kind).version for kind in ("pairwise", "rating")] == ["pairwise-1", "rating-1"]


@pytest.mark.parametrize(
    ("first", "second", "credit", "shown"),
    [
        ("A", "A", 1.0, [True, False]), ("B", "B", 0.0, [False, True]), ("A", "B", 0.5, [True, True]),
        ("C", "C", 0.5, []), ("A", "C", 0.5, [True]), (None, "A", None, [False]),
    ],
)  # fmt: skip
def test_an_answer_wins_if_it_wins_in_both_orders(first: Any, second: Any, credit: Any, shown: list[bool]) -> None:
    assert PairVerdicts(first, second).credit == credit
    assert PairVerdicts(first, second).shown_first == shown


@pytest.mark.parametrize(
    "spec",
    ["no-such-file.yaml", "{url: ftp://x}", "{url: 'http://x', server: {concurrency: 0}}", "{url: http://x, colour: 1}",
     "{url: 'http://x', server: {model: m}}", "{url: 'http://user:secret@x/v1'}"],
)  # fmt: skip
def test_a_wrong_judge_is_refused(spec: str) -> None:
    with pytest.raises(UserError) as error:
        read_judge(spec)
    assert "secret" not in str(error.value).replace(spec, "")


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_each_pair_is_asked_in_both_orders_once_and_kept(tmp_path: Path) -> None:
    with chat_server(shorter_wins) as server:
        for _ in range(2):
            with a_judge(server.url, tmp_path) as found:
                verdicts = list(found.compare([(PROMPT, "Yes.", "Yes, it is."), (PROMPT, "ab", "cd")]))
                assert verdicts == [PairVerdicts("A", "A"), PairVerdicts("C", "C")]
        assert len(server.asked) == 4
        shown = [PARTS.search(asked(body)) for body in server.asked]
        assert {pair.groups() for pair in shown if pair} == {
            ("Yes.", "Yes, it is."), ("Yes, it is.", "Yes."), ("ab", "cd"), ("cd", "ab")
        }  # fmt: skip
        assert all(body["temperature"] == 0.0 and body["max_tokens"] == 512 for body in server.asked)


def test_the_key_comes_from_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    with chat_server(first_wins) as server, a_judge(server.url, tmp_path, key_env="JUDGE_KEY") as found:
        assert list(found.compare([(PROMPT, "a", "b")])) == [PairVerdicts("A", "B")]
        assert server.headers[0]["authorization"] == "Bearer secret-key"
        assert "secret" not in json.dumps(found.facts())
    assert not any("secret" in file.read_text() for file in (tmp_path / "replies").rglob("*.json"))


def test_unreadable_replies_and_failed_requests_are_counted(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Response:
        return fault(400, "too long") if "LONG" in asked(body) else completion("I cannot say.")

    with chat_server(answer) as server, a_judge(server.url, tmp_path, "rating") as found:
        assert list(found.rate([(PROMPT, "a"), (PROMPT, "LONG")])) == [None, None]
        assert found.unreadable == 2 and sum(found.failures.values()) == 1


# ---- agreement -------------------------------------------------------------------------------------------------------


def ranking(ranks: tuple[int, ...], number: int = 0) -> Ranking:
    answers = tuple(Candidate("x" * (10 * rank), "w") for rank in range(1, len(ranks) + 1))
    return Ranking((Message("user", f"Q{number}"),), candidates=answers, ranks=ranks, annotator="ann")


def test_agreement_ties_and_position_bias_are_as_counted_by_hand() -> None:
    pairs = [Pair(ranking((1, 2), i), 0, 1) for i in range(4)] + [Pair(ranking((1, 1), 4), 0, 1)] * 2
    verdicts = [
        PairVerdicts("A", "A"),  # right
        PairVerdicts("B", "B"),  # wrong
        PairVerdicts("A", "B"),  # inconsistent: a tie
        PairVerdicts(None, "A"),  # unreadable
        PairVerdicts("C", "C"),  # ties with the annotator
        PairVerdicts("A", "A"),
    ]
    found = agreement_metrics(pairs, verdicts)
    assert (found["pairs"], found["strict_pairs"], found["unreadable"]) == (6, 3, 1)
    assert found["agreement"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["judge_ties"] == pytest.approx(1 / 3) and found["agreement_without_ties"] == 0.5
    assert (found["human_ties"], found["tie_agreement"]) == (2, 0.5)
    assert found["consistent"] == pytest.approx(4 / 5)
    # shown first wins: A,A -> yes, no; B,B -> no, yes; A,B -> yes, yes; A,A -> yes, no
    assert found["first_position"] == pytest.approx(5 / 8)
    low, high = found["interval"]
    assert 0 < low < 0.5 < high < 1


def test_pairs_are_shown_in_random_order_and_at_most_as_many_as_wanted() -> None:
    rankings = [ranking((1, 2, 3), i) for i in range(40)]
    pairs = list(pairs_of(rankings, 2))
    assert len(pairs) == 80 and pairs == list(pairs_of(rankings, 2))
    assert 0.3 < sum(pair.human for pair in pairs) / 80 < 0.7
    assert {pair.human for pair in pairs_of([ranking((1, 1))], 3)} == {0.5}


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_rankings(tmp_path_factory.mktemp("judged") / "rankings", 1, held_out=12)


def measure(url: str, data: str, tmp_path: Path, *words: str) -> dict[str, Any]:
    spec = json.dumps({"url": url, "cache": str(tmp_path / "replies")})
    said, _ = finished.invoke(judge.command, spec, data, "--json", *words)
    return finished.last_json(said)


def test_the_command_prints_agreement_with_its_interval_before_a_judge_is_used(rankings: str, tmp_path: Path) -> None:
    with chat_server(shorter_wins) as server:
        found = measure(server.url, rankings, tmp_path)
    metrics = found["metrics"]
    assert metrics["agreement"] == 1.0 and metrics["interval"][0] > 0.6  # the tiny rankings prefer shorter answers
    assert metrics["first_position"] == 0.5 and metrics["consistent"] == 1.0
    assert found["judge"]["model"] == "m" and found["judge"]["prompt"] == "pairwise-1"
    with chat_server(first_wins) as server:
        biased = measure(server.url, rankings, tmp_path)["metrics"]
    assert (biased["agreement"], biased["judge_ties"], biased["first_position"]) == (0.5, 1.0, 1.0)


def test_the_command_says_when_a_judge_may_be_no_better_than_chance(rankings: str, tmp_path: Path) -> None:
    with chat_server(first_wins) as server:
        spec = json.dumps({"url": server.url, "cache": str(tmp_path / "replies")})
        said, _ = finished.invoke(judge.command, spec, rankings)
    assert "no better than chance" in said and "verdicts for the answer shown first" in said


def test_a_judge_without_one_readable_verdict_is_refused_with_a_reply_and_nothing_is_written(
    rankings: str, tmp_path: Path
) -> None:
    with chat_server(lambda *_: completion("I cannot say.")) as server, pytest.raises(UserError) as error:
        measure(server.url, rankings, tmp_path, "--out", str(tmp_path / "out.json"))
    assert "pairs has a readable verdict" in str(error.value) and "a reply: 'I cannot say.'" in str(error.value)
    assert not (tmp_path / "out.json").exists()


def test_the_judge_needs_rankings(prompts: str) -> None:
    with pytest.raises(UserError, match="measured on rankings"):
        finished.invoke(judge.command, "http://127.0.0.1:9/v1", prompts)


# ---- PPO -------------------------------------------------------------------------------------------------------------


def test_ppo_refuses_a_judge_whose_agreement_was_not_measured_with_it(
    tmp_path: Path, rankings: str, prompts: str
) -> None:
    with chat_server(shorter_wins) as server:
        measure(server.url, rankings, tmp_path, "--kind", "rating", "--out", str(tmp_path / "rating.json"))
        measure(server.url, rankings, tmp_path, "--out", str(tmp_path / "pairwise.json"))
        base = {"name": "judge", "url": server.url, "cache": str(tmp_path / "replies")}
        cases = [({}, "was not measured"), ({"agreement": "none.json"}, "there is no file")]
        cases += [({"agreement": str(tmp_path / "pairwise.json")}, 'kind: "pairwise", now "rating"')]
        cases += [({"agreement": str(tmp_path / "rating.json"), "temperature": 1.0}, "temperature: 0.0, now 1.0")]
        for more, why in cases:
            with pytest.raises(UserError) as error:
                REWARDS.pick(base | more)(None)
            assert why in str(error.value)
        good = base | {"agreement": str(tmp_path / "rating.json")}
        run(config(tmp_path / "run", prompts, reward=good, updates=1, eval__prompts=0))
    assert 1.0 <= updates(tmp_path / "run")[0]["objective/scores"] <= 10.0


def test_a_judge_that_gives_no_readable_ratings_ends_the_run(tmp_path: Path) -> None:
    with chat_server(first_wins) as server:
        options = {"name": "judge", "url": server.url, "unmeasured": True, "cache": str(tmp_path / "replies")}
        source = REWARDS.pick(options)(None)
        messages = [[{"role": "user", "content": str(i)}] for i in range(8)]
        nothing = torch.zeros(8, 1, dtype=torch.int64)
        with pytest.raises(UserError, match="8 of 8 ratings cannot be read"):
            source(RewardInputs(messages, ["x"] * 8, nothing, nothing))
        singly = REWARDS.pick(options)(None)  # as `rlhf evaluate` asks: the answers to one prompt at a time
        with pytest.raises(UserError, match="8 of 8 ratings cannot be read"):
            for one in messages:
                singly(RewardInputs([one], ["x"], nothing[:1], nothing[:1]))


def test_unreadable_ratings_are_counted_in_a_few_warnings_not_one_for_each_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server(lambda body, number: completion("[[7]]" if "readable" in asked(body) else "Hm.")) as server:
        rate = rating_source(RewardJudgeConfig(url=server.url, cache=str(tmp_path / "replies"), unmeasured=True))
        for number in range(10):
            answers = [f"readable {number}", f"readable too {number}", "Hm." * (number + 1)]
            assert rate([PROMPT] * 3, answers) == [7, 7, 1]
    said = [line.split(" cannot")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"warning: judge: {n} of {3 * n} ratings so far" for n in (1, 2, 4, 8)]


def test_a_policys_answers_are_scored_by_a_judge_on_the_command_line(tmp_path: Path, rankings: str) -> None:
    sft = finished.sft(tmp_path / "sft")
    with chat_server(shorter_wins) as server:
        spec = json.dumps({"name": "judge", "url": server.url, "unmeasured": True, "cache": str(tmp_path / "replies")})
        words = ("--reward", spec, "--max-new-tokens", 8, "--limit", 4, "--json")
        said, _ = finished.invoke(evaluate.command, sft, rankings, *words)
    assert 1.0 <= finished.last_json(said)["policy"]["score"] <= 10.0
