"""Several annotators' rankings into one: hand-worked cases for every method, whose votes count, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rows import dataset, jsonl, last_line, run, tree
from scipy.optimize import brentq
from scipy.special import expit, ndtr
from simulated_annotators import simulated

from data_tools.aggregate.dataset import aggregate_dataset, agreement_with_others
from data_tools.aggregate.methods import AGGREGATORS, by_score, schulze
from data_tools.aggregate.votes import collect
from rlhf.core.errors import UserError
from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter

METHODS = [row.name for row in AGGREGATORS]
QUALITY = [row.name for row in AGGREGATORS if row.traits["quality"]]


def ranked(order: str, annotator: str = "ann", prompt: str = "Which letter?", **more) -> Ranking:
    """`B>A=C` as a ranking of answers A, B and C, in alphabetical order."""
    groups = [group.split("=") for group in order.split(">")]
    rank = {text: place for place, group in enumerate(groups, 1) for text in group}
    candidates = tuple(Candidate(text) for text in sorted(rank))
    ranks = tuple(rank[c.text] for c in candidates)
    return Ranking((Message("user", prompt),), candidates=candidates, ranks=ranks, annotator=annotator, **more)


def order(ranking: Ranking) -> str:
    """The inverse of `ranked`."""
    groups: dict[int, list[str]] = {}
    for candidate, rank in sorted(zip(ranking.candidates, ranking.ranks), key=lambda pair: pair[0].text):
        groups.setdefault(rank, []).append(candidate.text)
    return ">".join("=".join(groups[rank]) for rank in sorted(groups))


def write(path: Path, rankings: list[Ranking]) -> Path:
    with DatasetWriter(path, "ranking", overwrite=True) as writer:
        for item in rankings:
            writer.write(item)
    return path


def aggregate(tmp_path: Path, rankings: list[Ranking], method: str, **options) -> list[Ranking]:
    aggregate_dataset(write(tmp_path / "given", rankings), tmp_path / method, method, options, overwrite=True)
    return list(open_dataset(tmp_path / method, "ranking").records())


def crowd(*orders: str) -> list[Ranking]:
    """The orders of annotators a, b, c, ..."""
    return [ranked(one, annotator) for one, annotator in zip(orders, "abcdefghij")]


# ---- every row of the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        (["A>B", "A>B", "B>A"], "A>B"),
        (["A>B", "B>A"], "A=B"),
        (["A=B", "A=B"], "A=B"),
        (["A>B>C", "A>B>C", "C>B>A"], "A>B>C"),
        (["A>B>C", "B>C>A", "C>A>B"], "A=B=C"),
        (["C>A=B", "C>A=B", "C>A=B"], "C>A=B"),
        (["B>A=C", "B>A=C", "B>C>A", "B>C>A"], "B>C>A"),
        (["A>B>C>D>E>F>G>H"] * 3, "A>B>C>D>E>F>G>H"),
    ],
)
def test_two_of_three_decide_and_even_votes_and_even_cycles_are_ties(
    method: str, orders: list[str], expected: str, tmp_path: Path
) -> None:
    """Orders given from both ends of the alphabet, since the names and the order of answers must not matter."""
    (found,) = aggregate(tmp_path, crowd(*orders), method)
    assert order(found) == expected
    turned = str.maketrans("ABCDEFGH", "HGFEDCBA")
    (found,) = aggregate(tmp_path, crowd(*(one.translate(turned) for one in orders)), method)
    assert set(order(found).split(">")) == {
        "=".join(sorted(g.split("="))) for g in expected.translate(turned).split(">")
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", ["A>B", "B>A", "A=B>C", "C>A=B=D", "A=B", "E>B>G>A>D>C>F"])
def test_one_persons_ranking_keeps_its_order(method: str, given: str, tmp_path: Path) -> None:
    (found,) = aggregate(tmp_path, [ranked(given)], method)
    assert order(found) == given
    assert 0.5 <= found.weight < 1


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_confidences_and_rise_with_agreement(method: str, tmp_path: Path) -> None:
    weights = []
    for number, orders in enumerate((["A>B", "A>B", "B>A"], ["A>B", "A>B"], ["A>B"] * 3, ["A>B"] * 9)):
        weights += [found.weight for found in aggregate(tmp_path / str(number), crowd(*orders), method)]
    assert weights[0] > 0.5 and weights[-1] <= 1
    assert weights == sorted(set(weights))


@pytest.mark.parametrize("method", METHODS)
def test_the_new_ranking_says_who_made_it_and_of_what(method: str, tmp_path: Path) -> None:
    rankings = [
        replace(item, time="2026-01-01", seconds=3.0, shown=True, source="web", group="g")
        for item in crowd("A>B", "A>B")
    ]
    other = ranked("C>D", "a", "Another?", source="lab")
    (first, second) = aggregate(tmp_path, [rankings[0], other, rankings[1]], method)
    assert (first.annotator, first.time, first.seconds, first.shown) == (f"aggregate:{method}", None, None, False)
    assert first.merged == (rankings[0].id, rankings[1].id) and second.merged == (other.id,)
    assert (first.source, first.group, second.source, second.group) == ("web", "g", "lab", None)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_votes_give_the_same_bytes_and_the_order_of_rows_no_other_ranks(method: str, tmp_path: Path) -> None:
    rankings, _ = simulated(1, prompts=12)
    given = write(tmp_path / "given", rankings)
    for name in ("one", "two"):
        aggregate_dataset(given, tmp_path / name, method)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    back = {found.prompt_id: order(found) for found in aggregate(tmp_path / "back", rankings[::-1], method)}
    assert back == {found.prompt_id: order(found) for found in open_dataset(tmp_path / "one").records()}


@pytest.mark.parametrize("method", METHODS)
def test_answers_in_another_order_are_the_same_answers(method: str, tmp_path: Path) -> None:
    turned = ranked("A>B>C", "b")
    turned = replace(turned, candidates=turned.candidates[::-1], ranks=turned.ranks[::-1])
    (found,) = aggregate(tmp_path, [ranked("A>B>C", "a"), turned], method)
    assert order(found) == "A>B>C" and [c.text for c in found.candidates] == ["A", "B", "C"]


@pytest.mark.parametrize("method", METHODS)
def test_overlapping_rankings_become_one_and_unconnected_ones_stay_separate(method: str, tmp_path: Path) -> None:
    rankings = [ranked("A>B", "a"), ranked("X>Y", "a"), ranked("B>C", "b"), ranked("C>D", "c"), ranked("A>C", "d")]
    found = aggregate(tmp_path, rankings, method)
    assert [order(one) for one in found] == ["X>Y", "A>B>C>D"]
    assert found[1].merged == tuple(rankings[i].id for i in (0, 2, 3, 4))


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_that_is_twice_in_a_ranking_is_once_in_the_new_one(method: str, tmp_path: Path) -> None:
    twice = Ranking((Message("user", "?"),), candidates=tuple(map(Candidate, "ABA")), ranks=(1, 2, 1), annotator="a")
    (found,) = aggregate(tmp_path, [twice, ranked("A>B", "b", "?")], method)
    assert [c.text for c in found.candidates] == ["A", "B"] and order(found) == "A>B"


# ---- numbers by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orders", "weight"),
    [
        (["A>B"], 3 / 4),  # Beta(2, 1) above 1/2: 1 - 1/4
        (["A>B", "A>B", "B>A"], 11 / 16),  # Beta(3, 2): 6 C(4,2)/2^4 ... = P(Bin(4, 1/2) <= 2) = 11/16
        (["A>B"] * 3, 15 / 16),
        (["A>B", "B>A"], 1 / 2),
        (["A>B>C"], 3 / 4),
        (["A>B=C"], (3 / 4 + 3 / 4 + 1 / 2) / 3),
        (["A>B>C", "B>C>A", "C>A>B"], 1 / 2),
    ],
)
def test_the_majoritys_confidence_is_the_beta_posterior_of_each_pair(
    orders: list[str], weight: float, tmp_path: Path
) -> None:
    assert aggregate(tmp_path, crowd(*orders), "majority")[0].weight == pytest.approx(weight, rel=1e-12)


def test_the_majority_cuts_a_cycle_at_its_weakest_link(tmp_path: Path) -> None:
    """A over B by 3, B over C by 2, C over A by 1: Beta(4, 1), Beta(3, 1), and Beta(1, 2) against its own votes."""
    votes = ["A>B"] * 3 + ["B>C"] * 2 + ["C>A"]
    (found,) = aggregate(tmp_path, [ranked(one, str(i)) for i, one in enumerate(votes)], "majority")
    assert order(found) == "A>B>C"
    assert found.weight == pytest.approx((15 / 16 + 7 / 8 + 1 / 4) / 3)


def test_schulze_gives_the_published_example() -> None:
    """Schulze 2011, section 3.1 (45 voters, 5 candidates): E > A > C > B > D."""
    ballots = {"ACBED": 5, "ADECB": 5, "BEDAC": 8, "CABED": 3, "CAEBD": 7, "CBADE": 2, "DCEBA": 7, "EBADC": 8}
    wins = np.zeros((1, 5, 5))
    for ballot, voters in ballots.items():
        for place, above in enumerate(ballot):
            for below in ballot[place + 1 :]:
                wins[0, "ABCDE".index(above), "ABCDE".index(below)] += voters
    assert schulze(wins - wins.swapaxes(1, 2)).tolist() == [[2, 4, 3, 5, 1]]


def test_bradley_terry_balances_votes_and_prior(tmp_path: Path) -> None:
    """Two for, one against: with gap d, 2 sigmoid(-d) - sigmoid(d) = d / 2, as either score is d / 2 from 0."""
    (found,) = aggregate(tmp_path, crowd("A>B", "A>B", "B>A"), "bradley-terry")
    gap = brentq(lambda d: 2 * expit(-d) - expit(d) - d / 2, 0, 2)
    information = 3 * expit(gap) * expit(-gap)
    assert found.weight == pytest.approx(ndtr(gap / np.sqrt(2 / (1 + 2 * information))), rel=1e-4)
    (wide,) = aggregate(tmp_path / "wide", crowd("A>B", "A>B", "B>A"), "bradley-terry", prior=3)
    assert wide.weight > found.weight


def test_scores_with_an_uncertain_order_are_a_tie_by_the_option(tmp_path: Path) -> None:
    votes = crowd("A>B", "A>B", "B>A")  # 0.67 by bradley-terry
    assert order(aggregate(tmp_path / "a", votes, "bradley-terry", tie_below=0.66)[0]) == "A>B"
    (tied,) = aggregate(tmp_path / "b", votes, "bradley-terry", tie_below=0.68)
    assert order(tied) == "A=B" and tied.weight == 0.5


def test_a_chain_of_small_steps_does_not_tie_its_ends() -> None:
    scores = np.array([[0.0, 0.3, 0.2, 0.1]])
    better = 0.5 + (scores[:, :, None] - scores[:, None, :]) / 2
    assert by_score(scores, better, 0.61).tolist() == [[2, 1, 1, 1]]
    assert by_score(scores, better, 0.56).tolist() == [[2, 1, 1, 2]]
    assert by_score(scores, better, 0.51).tolist() == [[4, 1, 2, 3]]


def test_dawid_skene_trusts_those_who_agree_with_others(tmp_path: Path) -> None:
    """c contradicts a and b on eight prompts; on the ninth, b and c are against a whom nobody else contradicts."""
    rankings = [ranked("A>B", who, f"{i}?") for i in range(8) for who in "ab"]
    rankings += [ranked("B>A", "c", f"{i}?") for i in range(8)]
    rankings += [ranked("A>B", "a", "last?"), ranked("B>A", "c", "last?")]
    found = aggregate(tmp_path, rankings, "dawid-skene")
    assert [order(one) for one in found] == ["A>B"] * 9 and all(one.weight > 0.8 for one in found)
    noted = json.loads((tmp_path / "dawid-skene" / "annotators.json").read_text())["annotators"]
    assert noted[0]["annotator"] == "c" and noted[0]["quality"] < 0.25 < 0.75 < noted[1]["quality"]


def test_agreement_with_others_leaves_ones_own_vote_out() -> None:
    """Of three a is alone with B>A; C is even but for a, who makes it even in turn; d has nobody to agree with."""
    rankings = [*crowd("B>A", "A>B", "A>B"), ranked("X>Y", "a", "2?"), ranked("X>Y", "b", "2?")]
    rankings += [ranked("X>Y", "d", "3?"), ranked("X=Y", "c", "2?")]
    votes = collect(iter(rankings)).votes
    found = dict(zip(votes.annotators, agreement_with_others(votes)))
    # a: wrong, right; b: on the first the others are even (a against c), right on the second; c: even; its tie no vote
    assert found["a"] == 0.5 and found["b"] == 1 and np.isnan(found["c"]) and np.isnan(found["d"])


# ---- whose votes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_named_annotator_has_one_vote_on_a_pair_their_last(method: str, tmp_path: Path) -> None:
    rankings = [ranked("B>A", "a"), ranked("B>A", "a"), ranked("A>B", "a"), ranked("A>B", "b"), ranked("A>B", "c")]
    (found,) = aggregate(tmp_path / "named", rankings, method)
    (clean,) = aggregate(tmp_path / "clean", rankings[2:], method)
    assert order(found) == "A>B" and found.weight == clean.weight
    assert len(found.merged) == 4  # the first two are the same ranking


def test_everyone_who_is_not_named_counts(tmp_path: Path) -> None:
    rankings = [ranked("B>A", ""), ranked("B>A", ""), ranked("A>B", "a")]
    for method in METHODS:
        assert order(aggregate(tmp_path / method, rankings, method)[0]) == "B>A"


@pytest.mark.parametrize("method", QUALITY)
def test_a_method_that_weighs_annotators_refuses_rankings_that_name_none(method: str, tmp_path: Path) -> None:
    given = write(tmp_path / "given", [ranked("B>A", ""), ranked("A>B", "")])
    result = run("aggregate", given, "--out", tmp_path / "new", "--method", method)
    assert isinstance(result.exception, UserError)
    for words in (f"--method {method}: no ranking names its annotator", "who made which ranking", "--method majority"):
        assert words in str(result.exception)
    assert not (tmp_path / "new").exists()


# ---- what is kept of the rankings ------------------------------------------------------------------------------------


def test_authors_are_kept_and_ratings_are_averaged(tmp_path: Path) -> None:
    def rated(annotator: str, *scores: float | None) -> Ranking:
        authors = (("gpt", "model"), ("Ann", "person"), ("", "unknown"))
        answers = tuple(Candidate(t, *author, s) for t, author, s in zip("ABC", authors, scores))
        return Ranking((Message("user", "?"),), candidates=answers, ranks=(1, 2, 3), annotator=annotator)

    (found,) = aggregate(tmp_path, [rated("a", 5, 3, None), rated("b", 4, None, None)], "majority")
    assert found.candidates == (
        Candidate("A", "gpt", "model", 4.5), Candidate("B", "Ann", "person", 3.0), Candidate("C", "", "unknown", None)
    )  # fmt: skip


def test_a_prompt_in_several_splits_goes_to_the_one_held_out_furthest(tmp_path: Path) -> None:
    rankings = [
        ranked("A>B", "a", "1?", split="train"), ranked("A>B", "b", "1?", split="test"),
        ranked("A>B", "a", "2?", split="train"), ranked("A>B", "b", "2?", split="eval"),
        ranked("C>D", "b", "2?"), ranked("A>B", "a", "3?", split="train"), ranked("A>B", "a", "4?"),
    ]  # fmt: skip
    summary = aggregate_dataset(write(tmp_path / "given", rankings), tmp_path / "new", "majority")
    found = [(r.messages[0].content, order(r), r.split) for r in open_dataset(tmp_path / "new").records()]
    assert sorted(found) == [
        ("1?", "A>B", "test"), ("2?", "A>B", "eval"), ("2?", "C>D", "eval"), ("3?", "A>B", "train"), ("4?", "A>B", None)
    ]  # fmt: skip
    assert summary["conflicting_splits"] == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_annotators_and_keeps_them_in_the_dataset(tmp_path: Path) -> None:
    rankings = simulated(0, prompts=60)[0]
    given, new = write(tmp_path / "given", rankings), tmp_path / "new"
    result = run("aggregate", given, "--out", new, "--method", "crowd-bradley-terry", "--option", "prior=2", "--json")
    assert result.exit_code == 0, result.output
    summary = last_line(result)
    assert (summary["read"], summary["written"], summary["rejected"], summary["merged"]) == (300, 60, 0, 300)
    assert summary["options"] == {"prior": 2.0, "tie_below": 0.55}
    noted = json.loads((new / "annotators.json").read_text())
    assert noted == {"method": "crowd-bradley-terry", "annotators": summary["annotators"]}
    assert {row["annotator"] for row in noted["annotators"][:2]} == {"00", "01"}
    assert sum(row["rankings"] for row in noted["annotators"]) == 300
    assert sum(row["votes"] for row in noted["annotators"]) == 1800
    assert "annotators, the worst first" in result.stdout and "0.5 is chance" in result.stdout
    origin = open_dataset(new).manifest["origin"]
    assert origin["command"] == f"rlhf data aggregate {given} --method crowd-bradley-terry --option prior=2"
    assert origin["parents"] == [{"path": str(given), "fingerprint": open_dataset(given).fingerprint}]
    assert (origin["method"], origin["written"]) == ("crowd-bradley-terry", 60)


def test_bad_rows_of_a_jsonl_file_are_rejected_and_counted(tmp_path: Path) -> None:
    good = {"prompt": "?", "candidates": ["A", "B"], "ranks": [1, 2], "annotator": "a"}
    given = jsonl(tmp_path / "given.jsonl", [good, {**good, "ranks": [1]}, {**good, "annotator": "b"}])
    summary = aggregate_dataset(given, tmp_path / "new", "majority")
    assert (summary["read"], summary["rankings"], summary["rejected"], summary["written"]) == (3, 2, 1, 1)
    (row,) = (json.loads(line) for line in (tmp_path / "new" / "rejected.jsonl").read_text().splitlines())
    assert row["line"] == 2 and row["reason"] in summary["reasons"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "bradly-terry"], "did you mean 'bradley-terry'"),
        (["--method", "majority", "--option", "prior=1"], "'majority' has no option 'prior'"),
        (["--method", "bradley-terry", "--option", "prior=0"], "prior: Input should be greater than 0"),
        (["--method", "bradley-terry", "--option", "tie_below=high"], "tie_below: Input should be a valid number"),
        (["--method", "bradley-terry", "--option", "prior"], "not NAME=VALUE"),
    ],
)
def test_a_method_or_option_that_is_not_there_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    result = run("aggregate", write(tmp_path / "given", [ranked("A>B")]), "--out", tmp_path / "new", *words)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "new").exists()


def test_only_rankings_can_be_aggregated(tmp_path: Path) -> None:
    given = dataset(tmp_path / "given", [{"prompt": "?", "answer": "A"}])
    result = run("aggregate", given, "--out", tmp_path / "new", "--method", "majority")
    assert isinstance(result.exception, UserError) and "contains demonstrations, but rankings are needed" in str(
        result.exception
    )


def test_a_dataset_without_rankings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ranking to aggregate"):
        aggregate_dataset(write(tmp_path / "given", []), tmp_path / "new", "majority")


def test_a_dataset_is_not_written_over_itself(tmp_path: Path) -> None:
    given = write(tmp_path / "given", [ranked("A>B")])
    result = run("aggregate", given, "--out", given, "--method", "majority", "--overwrite")
    assert isinstance(result.exception, UserError) and "is the parent dataset itself" in str(result.exception)
    assert open_dataset(given).manifest["count"] == 1
