"""Evaluation of reward models: numbers by hand, rewards that the battery must find out, benchmarks by their papers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import finished
import numpy as np
import pytest
import tiny
from scipy import stats

from data_tools.commands.imports import import_command
from rlhf.data.schema import Candidate, Message, Ranking
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from rlhf.evaluation import tables
from rlhf.evaluation.baselines import BagOfWords, baselines
from rlhf.evaluation.battery import battery, verdict
from rlhf.evaluation.benchmarks import STYLES, benchmark_of, levels, score_benchmark, ties_score
from rlhf.evaluation.calibration import calibration, fit_temperature, reliability
from rlhf.evaluation.card import dataset_card
from rlhf.evaluation.estimates import clustered_mean, fraction, holm, p_value
from rlhf.evaluation.listwise import best_of_curve, listwise
from rlhf.evaluation.scored import AnswerScorer, ScoredRecord, function_scorer, pairs_of
from rlhf.evaluation.slices import slices
from rlhf.reward.metrics import kendall_tau_b
from rlhf.reward.perturbations import PERTURBATIONS, AnswerToChange, Variant, perturbed
from stages.evaluate import command


def ranking(texts: Sequence[str], ranks: Sequence[int], prompt: str = "Hello?", **more: Any) -> Ranking:
    ratings = more.pop("ratings", [None] * len(texts))
    candidates = tuple(Candidate(text, score=rating) for text, rating in zip(texts, ratings))
    return Ranking((Message("user", prompt),), candidates=candidates, ranks=tuple(ranks), **more)


def scored(ranks: Sequence[int], scores: Sequence[float | None], **more: Any) -> ScoredRecord:
    return ScoredRecord(ranking([f"answer {i}" for i in range(len(ranks))], ranks, **more), tuple(scores))


def letters(messages: list[dict[str, str]], answer: str) -> float:
    """A reward function that a command names."""
    return float(len(answer))


def scorer(function: Callable[[str], float]) -> AnswerScorer:
    return function_scorer("a:test", lambda messages, answer: function(answer))


# ---- estimates ---------------------------------------------------------------------------------------------------


def test_a_clustered_mean_by_hand() -> None:
    values, clusters = np.array([1.0, 2.0, 6.0]), np.array([7, 7, 3])
    mean = clustered_mean(values, clusters)
    # sums 6 and 3 of 1 and 2 values, mean 3: deviations 3 and -3, variance 18 * 2/1 / 9
    assert (mean["value"], mean["prompts"], mean["count"]) == (3.0, 2, 3)
    assert mean["high"] == pytest.approx(3 + 12.7062 * 2, abs=1e-3), "error 2, Student's t with one degree of freedom"
    assert mean["low"] == pytest.approx(3 - 12.7062 * 2, abs=1e-3)
    assert p_value(values, clusters) == pytest.approx(2 * stats.t.sf(1.5, 1))


def test_the_spread_over_prompts_is_not_known_from_one_prompt() -> None:
    right = np.array([1.0, 1.0, 0.0, 1.0])
    one = fraction(right, np.zeros(4, dtype=int))
    assert (one["value"], one["low"], one["high"], one["count"], one["prompts"]) == (0.75, None, None, 4, 1)
    assert tables.between(one) == "-"
    two = fraction(right, np.array([0, 0, 1, 1]))
    assert two["low"] < 0.75 < two["high"]


def test_with_clusters_of_one_value_the_mean_has_the_usual_t_test() -> None:
    values = np.array([0.3, -0.2, 0.9, 0.4, 0.1])
    mean, peer = clustered_mean(values, np.arange(5)), stats.ttest_1samp(values, 0)
    assert p_value(values, np.arange(5)) == pytest.approx(peer.pvalue)
    assert (mean["low"], mean["high"]) == pytest.approx(tuple(peer.confidence_interval()))


def test_holm_by_hand_and_without_undefined_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    found = holm([0.02, math.nan, 0.5])
    assert found[0] == 0.04 and math.isnan(found[1]) and found[2] == 0.5


# ---- pairs and parts ---------------------------------------------------------------------------------------------


def test_pairs_leave_out_ties_and_candidates_without_a_score() -> None:
    one = ScoredRecord(ranking(["a", "bbb", "cc", "d"], [1, 2, 2, 3], shown=True), (0.5, 1.5, None, 0.5))
    pairs = pairs_of([one])
    assert pairs.gap.tolist() == [-1.0, 0.0, 1.0]
    assert pairs.distance.tolist() == [1, 2, 1]
    assert pairs.lengths.tolist() == [[1, 3], [1, 1], [3, 1]]
    assert pairs.first.tolist() == [1, 1, 1] and pairs.correct.tolist() == [0, 0.5, 1]


def test_rankings_of_one_prompt_are_one_cluster() -> None:
    rows = [scored([1, 2], [1, 0], annotator=name) for name in ("ann", "bob")] + [scored([1, 2], [1, 0], prompt="Yes?")]
    assert pairs_of(rows).prompt.tolist() == [0, 0, 1]


def test_parts_by_length_turns_and_annotator() -> None:
    rows = [
        ScoredRecord(ranking(["a" * 100, "b" * 10], [1, 2], "one", annotator="ann"), (1, 0)),
        ScoredRecord(ranking(["a" * 10, "b" * 10], [1, 2], "two", annotator="bob"), (0, 1)),
    ]
    found = slices(pairs_of(rows), rows)
    lengths = {part["label"]: part["value"] for part in found["length of the better answer"]}
    assert lengths == {"about as long (within 10%)": 0.0, "more than twice as long": 1.0}
    assert {part["label"]: part["value"] for part in found["annotator"]} == {"ann": 1.0, "bob": 0.0}
    assert found["annotator"][0]["longer"] == 1.0 and "turns" not in found, "all have one turn"


# ---- calibration -------------------------------------------------------------------------------------------------


def gaps_of_temperature(temperature: float, count: int = 2000) -> np.ndarray:
    """Score gaps whose sigmoid(gap / temperature) is the probability that the better one is ahead."""
    generator = np.random.default_rng(0)
    gap = generator.normal(0, 2, count)
    right = generator.random(count) < 1 / (1 + np.exp(-np.abs(gap) / temperature))
    return np.where(right, np.abs(gap), -np.abs(gap))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_again(temperature: float) -> None:
    gap = gaps_of_temperature(temperature)
    rows = [scored([1, 2], [value, 0.0], prompt=f"p{index}") for index, value in enumerate(gap.tolist())]
    refit = calibration(pairs_of(rows), seed=1)["refit"]
    assert refit["low"] <= temperature <= refit["high"] and refit["high"] / refit["low"] < 1.6
    assert refit["pairs"] + refit["fitted_on"] == len(gap)
    assert refit["log_loss_after"] <= refit["log_loss_before"] + 1e-3
    if temperature != 1:
        assert refit["error_after"] < refit["error_before"] and refit["log_loss_after"] < refit["log_loss_before"]


def test_the_temperature_of_three_right_and_one_wrong_pair() -> None:
    # sigmoid(1/T) = 3/4 at the optimum, so T = 1 / log 3
    assert fit_temperature(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(1 / math.log(3), rel=1e-3)


def test_reliability_by_hand() -> None:
    rows = [scored([1, 2], [gap, 0], prompt=str(gap)) for gap in (0.1, -0.1, 5.0)]
    low, high = reliability(pairs_of(rows))
    assert (low["from"], low["to"], low["count"], low["value"]) == (0.5, 0.55, 2, 0.5)
    assert (high["count"], high["value"]) == (1, 1.0) and high["confidence"] == pytest.approx(1 / (1 + math.exp(-5)))


# ---- baselines ---------------------------------------------------------------------------------------------------


def word_rankings(count: int, good: str, start: int = 0) -> list[Ranking]:
    """Rankings in which the answer with the word `good` is the better one, of the same length as the other."""
    rows = []
    for index in range(start, start + count):
        words = random.Random(index).sample(["red", "cat", "sun", "box", "ten", "map", "bus"], 4)
        rows.append(ranking([" ".join([good, *words]), " ".join(["xxx", *words[::-1]])], [1, 2], f"prompt {index}"))
    return rows


def test_the_bag_of_words_learns_words_and_the_length_rule_does_not() -> None:
    held_out = word_rankings(30, "yes", start=100)
    rows = [ScoredRecord(record, (0.0, 1.0)) for record in held_out]
    length, words = baselines(pairs_of(rows), rows, word_rankings(40, "yes"))
    assert (length["name"], length["value"], length["ahead"]["value"]) == ("longer answer", 0.5, -0.5)
    assert (words["name"], words["value"], words["trained_on"]) == ("bag of words", 1.0, 40)
    assert words["ahead"]["value"] == -1.0, "the model is wrong on every pair"


def test_the_bag_of_words_is_no_help_where_words_say_nothing() -> None:
    train = [ranking([f"a{i}", f"b{i}"], [1, 2], f"p{i}") for i in range(20)]
    assert BagOfWords(train).score(train[:1]) == [[0.0, 0.0]]


def test_position_is_a_baseline_only_where_the_order_is_known() -> None:
    shown = [ScoredRecord(ranking(["a", "b"], [1, 2], f"p{i}", shown=True), (1, 0)) for i in range(3)]
    found = {one["name"]: one["value"] for one in baselines(pairs_of(shown), shown, [])}
    assert found == {"longer answer": 0.5, "shown first": 1.0}
    unknown = [*shown, ScoredRecord(ranking(["a", "b"], [1, 2], "p9"), (1, 0))]
    assert [one["name"] for one in baselines(pairs_of(unknown), unknown, [])] == ["longer answer"]


# ---- whole rankings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_tau_b_is_scipys(seed: int) -> None:
    draw = random.Random(seed)
    ranks, scores = [1, 2, *(draw.randint(1, 3) for _ in range(5))], [draw.randint(0, 4) for _ in range(7)]
    peer = stats.kendalltau([-rank for rank in ranks], scores).statistic
    assert kendall_tau_b([ranks], [scores]) == pytest.approx(peer)


def test_the_best_of_k_and_its_regret_by_hand() -> None:
    # the choice has rank 2 of 1..3 (utility 1/2); then both best ones share the top score with a worse one
    rows = [
        scored([1, 2, 3], [0, 2, 1], ratings=[5, 3, 1]),
        scored([1, 1, 3], [1, 1, 1], prompt="x", ratings=[4, 4, 1]),
    ]
    found = listwise(rows)
    assert found is not None
    assert found["best_of_k"]["value"] == pytest.approx((0 + 2 / 3) / 2)
    assert found["best_of_k_chance"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert found["regret"]["value"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["rating_regret"]["value"] == pytest.approx((2 + 1) / 2)
    assert found["beats_all"]["value"] == 0 and found["kendall_tau_b"]["value"] == pytest.approx((-1 / 3 + 0) / 2)
    assert listwise([scored([1, 1], [0, 1])]) is None, "a ranking of ties only"


def test_the_best_of_n_curve_counts_all_choices() -> None:
    rows = [[(1, 0.0), (2, 2.0), (3, 1.0), (3, 1.0)]]
    curve = {one["n"]: one for one in best_of_curve(rows)}
    # n = 2: of the six pairs the model takes utility 1/2 three times, 0 three times (once of equal scores)
    assert curve[2]["chosen"] == pytest.approx(3 * 0.5 / 6)
    assert curve[2]["best"] == pytest.approx((3 * 1 + 2 * 0.5) / 6)
    assert curve[1]["chosen"] == curve[1]["best"] == curve[1]["random"] == pytest.approx(1.5 / 4)
    assert curve[4]["chosen"] == 0.5 and curve[4]["best"] == 1.0


# ---- benchmarks --------------------------------------------------------------------------------------------------


def benchmark_row(good: Sequence[float], bad: Sequence[float], source: str, group: str, number: int) -> ScoredRecord:
    record = ranking(
        [f"right {i}" for i in range(len(good))] + [f"wrong {i}" for i in range(len(bad))],
        [1] * len(good) + [2] * len(bad), f"prompt {number}", source=source, group=group,
    )  # fmt: skip
    return ScoredRecord(record, (*good, *bad))


def test_the_ties_score_by_hand() -> None:
    # m = 2 and s = 1; its reference 0.5: right, right, m > s, min(2, 0.5) < 1
    found = ties_score([([3, 4], [1, 0])], [([1.5], [1])])
    assert [found[name] for name in ("tied_accuracy", "reference_accuracy", "margin_preferred")] == [1, 1, 1]
    assert found["margin_preferred_hard"] == 0 and found["margin_score"] == pytest.approx(math.tanh(-0.5))
    assert found["value"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * math.tanh(-0.5))


def test_equal_right_answers_and_no_margin_give_no_tie_break() -> None:
    assert ties_score([([1, 1], [1])], [([1], [1])])["value"] == 0, "0/0 counts as 0, as in the published code"
    assert ties_score([([2, 2], [1])], [([2], [1])])["value"] == pytest.approx(1.01), "tanh of infinity is 1"


def test_reward_bench_2_is_the_mean_of_its_subsets() -> None:
    rows = [
        benchmark_row([2], [1, 0, 1], "reward-bench-2", "Math", 0),
        benchmark_row([2], [2, 0, 1], "reward-bench-2", "Math", 1),  # shares the top with another: a half
        benchmark_row([0], [2, 0, 1], "reward-bench-2", "Math", 2),
        benchmark_row([9], [2, 0, 1], "reward-bench-2", "Safety", 3),
        benchmark_row([3, 4], [1, 0], "reward-bench-2/tied:1", "Ties", 4),
        benchmark_row([1.5], [1, 0], "reward-bench-2/ref:1", "Ties", 5),
        benchmark_row([1.5], [1, 0], "reward-bench-2/ref:2", "Ties", 6),
    ]
    found = score_benchmark("reward-bench-2", rows)
    ties = 0.8 + 0.01 * math.tanh(-0.5)
    assert found["parts"]["Math"]["value"] == 0.5 and found["parts"]["Ties"]["value"] == pytest.approx(ties)
    assert found["score"] == pytest.approx((0.5 + 1 + ties) / 3)
    assert found["low"] <= found["score"] <= found["high"]
    assert "1 rows without the other" in found["parts"]["Ties"]["note"]
    assert [benchmark_of(row.record.source) for row in rows[3:5]] == ["reward-bench-2"] * 2
    assert benchmark_of("webgpt") is None


def test_ties_without_ids_are_said_not_to_be_scored() -> None:
    rows = [
        benchmark_row([2], [1], "reward-bench-2", "Math", 0),
        benchmark_row([2, 2], [1], "reward-bench-2", "Ties", 1),
    ]
    found = score_benchmark("reward-bench-2", rows)
    assert found["parts"]["Ties"]["value"] is None and found["score"] == 1.0
    assert any("Ties: not scored" in line for line in tables.notes(found))


def test_rm_bench_by_hand() -> None:
    # right answers score 1, 2, 3 by style, wrong ones 0, 2, 9: equal scores are wrong
    matrix = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=float)
    assert levels(matrix) == (1.0, pytest.approx(1 / 3), 0.0)
    rows = [
        benchmark_row([1, 2, 3], [0, 2, 9], "rm-bench", "alpacaeval", 0),  # as the files of single domains call it
        benchmark_row([9, 9, 9], [1, 1, 1], "rm-bench", "safety-refuse", 1),
        benchmark_row([0, 0, 0], [1, 1, 1], "rm-bench", "safety-response", 2),
        benchmark_row([1], [0], "rm-bench", "math", 3),
    ]
    found = score_benchmark("rm-bench", rows)
    assert found["parts"]["chat"]["matrix"] == matrix.tolist()
    assert found["parts"]["chat"]["value"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found["parts"]["safety"]["value"] == 0.5 and set(found["parts"]) == {"chat", "safety"}
    assert found["score"] == pytest.approx((4 / 9 + 0.5) / 2) and found["hard"] == pytest.approx((0 + 0.5) / 2)
    assert found["left_out"] == {"not three right and three wrong answers": 1} and len(STYLES) == 3


def test_a_row_with_an_answer_that_does_not_fit_is_left_out_and_counted() -> None:
    rows = [benchmark_row([2], [1], "reward-bench-2", "Math", 0)]
    rows.append(ScoredRecord(rows[0].record, (1.0, None)))
    assert score_benchmark("reward-bench-2", rows)["left_out"] == {"an answer does not fit": 1}


def test_published_rows_are_imported_and_scored_in_one_go(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "prompt": "2+2?", "chosen": ["It is 4, surely."], "rejected": ["5", "6", "7"], "subset": "Math"},
        {"id": "ref:3", "prompt": "Colour of grass?", "chosen": ["Green grass"], "rejected": ["Red"], "subset": "Ties"},
        {"id": "tied:3", "prompt": "Name one.", "chosen": ["Red 1", "Sea 1"], "rejected": ["Car"], "subset": "Ties"},
    ]  # fmt: skip
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished.invoke(import_command, "auto", tmp_path / "bench.jsonl", "--out", tmp_path / "bench")
    said, _ = finished.invoke(command, "test_evaluation:letters", tmp_path / "bench", "--json")
    (card,) = finished.last_json(said)["datasets"]
    (found,) = card["benchmarks"]
    assert card["pairs"] is None, "rows of a benchmark are scored by its rules only"
    assert found["score"] == pytest.approx((1 + 1.01) / 2), "equal lengths of right answers: no spread"


# ---- perturbations -----------------------------------------------------------------------------------------------

TEXT = "Tom can swim. He likes the sea and the sun."


def change(name: str, text: str = TEXT, best: bool = True) -> Variant | None:
    prompt = ranking(["x", "y"], [1, 2], "Where does Tom go with Anna?")
    others = [ranking(["Cows eat grass.", "No."], [1, 2], "What do cows eat?")]
    return perturbed(name, AnswerToChange(prompt, text, best, others), random.Random(0))


def test_what_each_perturbation_does_to_a_text() -> None:
    found = {row.name: change(row.name) for row in PERTURBATIONS}
    texts = {name: variant.text for name, variant in found.items() if variant is not None}
    assert texts["white space"] == "\n\nTom can swim.  He likes the sea and the sun.\n\n"
    assert texts["markdown"] == "**Answer**\n\n- Tom can swim.\n- He likes the sea and the sun."
    assert texts["repetition"].endswith("sun. He likes the sea and the sun. He likes the sea and the sun.")
    assert texts["truncation"] == "Tom can swim. He likes"
    assert texts["negation"] == "Tom can not swim. It is not true that he likes the sea and the sun."
    assert texts["another prompt's answer"] == "Cows eat grass."
    assert sorted(texts["shuffled words"].split()) == sorted(TEXT.split()) and texts["shuffled words"] != TEXT
    assert all(TEXT in texts[name] for name in ("self-praise", "boilerplate", "filler"))


def test_names_are_swapped_in_prompt_and_answer_together() -> None:
    variant = change("swapped names")
    assert variant is not None and "Tom" not in variant.text + variant.prompt.messages[0].content
    name = variant.text.split()[0]
    assert name in variant.prompt.messages[0].content and "Anna" not in variant.prompt.messages[0].content


def test_perturbations_that_do_not_apply_say_so() -> None:
    assert change("swapped names", "A cat swims.") is None
    assert change("truncation", "Yes it is.") is None and change("shuffled words", "Yes it is.") is None
    assert change("another prompt's answer", best=False) is None


def test_negation_is_undone_where_it_is() -> None:
    variant = change("negation", "It isn't red. Cats are not dogs.")
    assert variant is not None and variant.text == "It is red. Cats are dogs."


@pytest.mark.parametrize("name", [row.name for row in PERTURBATIONS])
def test_every_perturbation_has_a_line_and_is_the_same_again(name: str) -> None:
    assert PERTURBATIONS[name].summary.endswith(".") and PERTURBATIONS[name].traits["expected"] in ("same", "lower")
    assert change(name) == change(name)


# ---- the battery -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Ranking]:
    path = tiny.write_rankings(tmp_path_factory.mktemp("data") / "rankings", 0, held_out=30)
    return list(open_dataset(path).records())


def verdicts(function: Callable[[str], float], records: list[Ranking]) -> dict[str, str]:
    found = battery(scorer(function), records, 100, seed=0)
    return {row["name"]: row["verdict"] for row in found["perturbations"] if row["answers"]}


def test_a_reward_that_likes_length_is_found(records: list[Ranking]) -> None:
    found = verdicts(lambda answer: float(len(answer)), records)
    longer = ("markdown", "self-praise", "boilerplate", "repetition", "filler")
    assert [found[name] for name in longer] == ["exploitable"] * len(longer)
    assert found["shuffled words"] == "exploitable" and found["truncation"] == "robust"
    assert found["white space"] == "robust" and "swapped names" not in found


def test_a_reward_that_likes_praise_is_found_by_that_alone(records: list[Ranking]) -> None:
    words = ("tree", "river", "house", "garden")
    found = verdicts(lambda answer: 3.0 * ("correct" in answer) + len(set(words) & set(answer.split())), records)
    same = [row.name for row in PERTURBATIONS if row.traits["expected"] == "same" and row.name in found]
    assert [name for name in same if found[name] == "exploitable"] == ["self-praise"]


def test_a_reward_that_dislikes_markdown_is_sensitive(records: list[Ranking]) -> None:
    found = verdicts(lambda answer: len(set(answer.split())) % 3 - 4.0 * ("**" in answer), records)
    assert found["markdown"] == "sensitive"


def test_a_reward_of_the_text_before_the_changes_is_invariant(records: list[Ranking]) -> None:
    hidden = {one.text: float(rank) for record in records for one, rank in zip(record.candidates, record.ranks)}

    def reward(answer: str) -> float:
        """Knows each answer, whatever stands around it; everything else is bad."""
        plain = " ".join(answer.replace("**Answer**", "").replace("- ", "").split())
        return next((-rank for text, rank in sorted(hidden.items(), key=lambda t: -len(t[0])) if text in plain), -9.0)

    found = battery(scorer(reward), records, 100, seed=0)
    for row in found["perturbations"]:
        if row["expected"] == "same" and row["answers"]:
            assert (row["verdict"], row["effect"]["value"], row["flips"]["value"]) == ("robust", 0.0, 0.0), row["name"]
        elif row["name"] in ("negation", "shuffled words"):
            assert row["verdict"] == "robust" and row["rises"]["value"] == 0, row["name"]


def test_the_battery_repeats_with_its_seed_and_shows_the_worst_first(records: list[Ranking]) -> None:
    length = scorer(lambda answer: float(len(answer)))
    one, again = battery(length, records, 10, seed=3), battery(length, records, 10, seed=3)
    assert one == again and one["rankings"] == 10
    assert one != battery(length, records, 10, seed=4)
    row = next(row for row in one["perturbations"] if row["name"] == "repetition")
    rises = [example["after"] - example["before"] for example in row["examples"]]
    assert len(rises) == 3 and rises == sorted(rises, reverse=True)
    assert row["examples"][0]["changed"].startswith(row["examples"][0]["answer"])


@pytest.mark.parametrize(
    ("expected", "value", "error", "flips", "word"),
    [
        ("same", 0.3, 0.05, 0.0, "exploitable"), ("same", -0.3, 0.05, 0.0, "sensitive"),
        ("same", 0.05, 0.01, 0.0, "robust"), ("same", 0.05, 0.01, 0.2, "sensitive"),
        ("same", 0.3, 0.5, 0.0, "unclear"), ("lower", -0.5, 0.05, 0.0, "robust"),
        ("lower", 0.1, 0.05, 0.0, "exploitable"), ("lower", -0.2, 0.2, 0.0, "unclear"),
        ("same", 0.0, math.nan, 0.0, "unclear"), ("lower", -1.0, math.nan, 0.0, "unclear"),
    ],
)  # fmt: skip
def test_verdicts(expected: str, value: float, error: float, flips: float, word: str) -> None:
    known = not math.isnan(error)  # of 50 prompts
    reach = stats.t.ppf(0.975, 49) * error
    effect = {"value": value, "low": value - reach if known else None, "high": value + reach if known else None}
    assert verdict(expected, effect, 2 * stats.t.sf(abs(value / error), 49), flips) == word


# ---- the whole -----------------------------------------------------------------------------------------------------


def test_tables_and_page_show_hostile_texts_as_texts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rlhf.evaluation.page import render

    bad = "<script>alert(1)</script>\x1b[31m good words here now"
    rows = [ranking([f"{bad} {i}", "no"], [1, 2], f"p {i}", source=bad if i % 2 else "b") for i in range(6)]
    with DatasetWriter(tmp_path / "data", "ranking") as writer:
        for row in rows:
            writer.write(row)
    data, by_length = open_dataset(tmp_path / "data"), scorer(lambda answer: float(len(answer)))
    card = dataset_card(by_length, data, rows, None, None, 0)
    card["perturbations"] = battery(by_length, rows, 10, 0)
    matrices = [benchmark_row([1, 2, 3], [0, 2, 9], "rm-bench", name, 0) for name in ("chat", "math", "code")]
    card["benchmarks"] = [score_benchmark("rm-bench", matrices)]
    page = render({"model": bad, "split": None, "seed": 0, "datasets": [card]})
    assert "<script>" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert any(part[0] == "By source" for part in tables.card_tables(card))
    assert tables.headlines(card)[0].startswith("rm-bench: 44.4%")
    assert tables.headlines(card)[1].startswith("Right on 100.0% of 6 pairs of 6 prompts")


def test_a_temperature_that_does_not_help_on_the_other_half_is_no_verdict_on_confidence():
    refit = {"temperature": 0.44, "low": 0.3, "high": 0.69, "log_loss_before": 0.686, "log_loss_after": 1.144}
    [line] = tables._calibration_lines({"error": 0.05, "refit": refit})
    assert line.startswith("It is not measurably over- or underconfident")
    [line] = tables._calibration_lines({"error": 0.05, "refit": refit | {"log_loss_after": 0.6}})
    assert line.startswith("It is underconfident")
