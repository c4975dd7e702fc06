"""Metrics of labelled tasks against hand-worked numbers, scikit-learn, rouge-score and sacrebleu; answers in texts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as sklearn_metrics

from rlhf.core.errors import UserError
from rlhf.core.intervals import wilson
from rlhf.tasks import text_overlap
from rlhf.tasks.answers import PATTERNS, AnswerPattern, answer_pattern, normalised
from rlhf.tasks.config import TaskConfig
from rlhf.tasks.metrics import METRICS, Outcomes, measure
from rlhf.tasks.task import load_task

LABELS = ("bad", "mixed", "good")


def outcomes(count: int = 200, seed: int = 0) -> Outcomes:
    draw = random.Random(seed)
    gold = [draw.choice(LABELS[:2] + LABELS) for _ in range(count)]
    given = [right if draw.random() < 0.6 else draw.choice([*LABELS, "no label", None]) for right in gold]
    return Outcomes(gold, given, LABELS)


def value(name: str, found: Outcomes, **options: object) -> float:
    return measure(METRICS.pick({"name": name, **options}), found).value


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_exact_match_is_a_fraction_with_wilsons_interval():
    found = measure(METRICS.pick("exact_match"), Outcomes(["Paris", "4", "no", "x"], ["paris.", "4", "yes", None]))
    assert (found.value, found.n) == (0.5, 4)
    assert (found.low, found.high) == wilson(0.5, 4)
    assert value("exact_match", Outcomes(["Paris"], ["paris"]), normalise="none") == 0


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_accuracy_and_f1_are_scikit_learns(average):
    found = outcomes()
    given = [p if p in LABELS else "none" for p in found.predictions]
    expected = sklearn_metrics.f1_score(found.references, given, labels=LABELS, average=average, zero_division=0)
    assert value("f1", found, average=average) == pytest.approx(expected)
    assert value("accuracy", found) == pytest.approx(sklearn_metrics.accuracy_score(found.references, given))


def test_macro_f1_by_hand():
    # a: 1 hit, 2 gold, 1 given -> 2/3; b: 1 hit, 1 gold, 2 given -> 2/3; c: nothing right -> 0
    found = Outcomes(["a", "a", "b"], ["a", "b", "b"], ("a", "b", "c"))
    assert value("f1", found) == pytest.approx(4 / 9)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
@pytest.mark.parametrize("stem", [False, True])
def test_rouge_is_the_mean_of_rouge_scores_f_measures(name, stem):
    pairs = [("the cat sat on the mat", "the cats sat"), ("a b c d", "a c d b"), ("nothing here", "else")]
    scorer = RougeScorer([name], use_stemmer=stem)
    expected = np.mean([scorer.score(right, given)[name].fmeasure for right, given in pairs])
    found = Outcomes([right for right, _ in pairs], [given for _, given in pairs])
    assert value(name, found, stem=stem) == pytest.approx(expected)


def test_rouge_l_by_hand_and_in_another_alphabet():
    # the longest common subsequence of "a b c d" and "a c d b" is "a c d": precision and recall 3/4
    assert value("rougeL", Outcomes(["a b c d"], ["a c d b"])) == pytest.approx(0.75)
    russian = Outcomes(["кошка сидит дома"], ["кошка дома"])
    assert value("rougeL", russian) == 0, "rouge-score's own words are a to z"
    assert value("rougeL", russian, words="unicode") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_bleu_is_sacrebleus_of_the_corpus():
    right = ["the cat sat on the mat today", "it rains in the north of the country", "a b c d e"]
    given = ["the cat sat on a mat today", "it rains in the south of the country", "a b c d"]
    expected = sacrebleu.corpus_bleu(given, [right]).score
    assert value("bleu", Outcomes(right, given)) == pytest.approx(expected)


def test_log_likelihood_by_hand():
    found = Outcomes(["a", "b"], logprobs=[-1.0, -5.0], tokens=[1, 3])
    assert value("log_likelihood", found) == -3.0
    assert value("log_likelihood", found, per="token") == -1.5


def test_bootstrap_intervals_are_seeded_cover_the_truth_and_need_ten_records():
    covered = 0
    metric = METRICS.pick("f1")
    truth = value("f1", outcomes(20_000, seed=99))
    for seed in range(40):
        found = measure(metric, outcomes(150, seed), seed)
        assert found.low is not None and found.high is not None and found.low <= found.value <= found.high
        covered += found.low <= truth <= found.high
    assert covered >= 34
    assert measure(metric, outcomes(150, 1), 3) == measure(metric, outcomes(150, 1), 3)
    few = measure(metric, outcomes(9))
    assert few.low is None and few.high is None


@pytest.mark.parametrize("row", list(METRICS), ids=lambda row: row.name)
def test_every_metric_has_a_summary_and_refuses_what_it_cannot_measure(row):
    assert row.summary.endswith(".")
    with pytest.raises(UserError, match="no record"):
        measure(METRICS.pick(row.name), Outcomes([]))
    with pytest.raises(UserError, match=f"metric {row.name}: needs"):
        measure(METRICS.pick(row.name), Outcomes(["a"]))


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(UserError, match=r"nowhere-score, which is not installed\nInstall it: pip install"):
        text_overlap.package("nowhere_score", "nowhere-score")


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        ("gsm8k", "48 + 24 = 72\n#### 72", "72"),
        ("the-answer-is", "So. The answer is no. Really, the answer is: 3.5.", "3.5"),
        ("the-answer-is", "I do not know", None),
        ("number", "from 3 to $1,200.50 a day", "$1,200.50"),
        ("letter", "It is (B).", "B"),
        ("boxed", r"thus \boxed{x+1}", "x+1"),
        ("last-line", "a\nb \n\n", "b"),
        (r"(?P<answer>\w+) (is|was) it", "that was it", "that"),
        (r"a+", "aa b aaa", "aaa"),
    ],
)
def test_answers_are_found_by_patterns(pattern, text, answer):
    found = answer_pattern(pattern)
    assert found is not None and found(text) == answer


def test_the_first_or_the_last_match_counts():
    assert AnswerPattern(r"\d+", "first")("1 2 3") == "1"
    assert AnswerPattern(r"\d+", "last")("1 2 3") == "3"


@pytest.mark.parametrize(("pattern", "message"), [("(a", "not a regular expression"), ("(a)(b)", "has 2 groups")])
def test_a_pattern_that_is_none_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        answer_pattern(pattern)
    assert "gsm8k" in PATTERNS


def test_a_pattern_of_exponential_time_is_interrupted(monkeypatch):
    monkeypatch.setattr("rlhf.tasks.answers.SECONDS", 0.2)
    with pytest.raises(UserError, match="takes longer than"):
        AnswerPattern(r"(a|a)+$")("a" * 60 + "b")


@pytest.mark.parametrize(
    ("one", "other", "how", "same"),
    [
        ("Yes.", "yes", "text", True),
        ("(B)", "b", "text", True),
        (".5", "5", "text", False),
        ("the cat's  hat", "Cats hat", "squad", True),
        ("the cat", "cat", "text", False),
        ("$1,000.0", "1000", "number", True),
        ("72 apples", "72", "number", False),
        ("-0", "0.00", "number", True),
        ("1" + "0" * 40 + "1", "1" + "0" * 41, "number", False),
        ("1e999999999", "1E999999999", "number", True),
        ("Yes", "yes", "none", False),
    ],
)
def test_which_answers_are_the_same(one, other, how, same):
    assert (normalised(one, how) == normalised(other, how)) == same


# ---- tasks ---------------------------------------------------------------------------------------------------------


def write(path: Path, answers: list[str], split: str | None = None) -> str:
    rows = [{"prompt": f"Question {i}?", "answer": answer, "split": split} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_task_has_the_labels_of_its_data(tmp_path):
    data = write(tmp_path / "data.jsonl", ["good", "bad", "good."])
    task = load_task(TaskConfig(dataset=data, metrics=["accuracy", "f1"]))
    assert [task.rules.label(label) for label in ("Good", "bad", "ugly")] == ["good.", "bad", None]
    found = task.measure(Outcomes(task.references, ["good", "good", "good"], task.rules.labels))
    assert [(one.metric, one.value) for one in found] == [
        ("accuracy", pytest.approx(2 / 3)),
        ("f1", pytest.approx(0.4)),
    ]


def test_the_pattern_is_applied_to_the_data_and_records_without_an_answer_are_counted(tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", ["1 + 1\n#### 2", "so\n#### 3", "I do not know"])
    task = load_task(TaskConfig(dataset=data, pattern="gsm8k"))
    assert task.references == ["2", "3"] and task.rules.answer("2 + 2\n#### 4") == "4"
    assert task.rejected == {"no answer in it by the pattern": 1}
    assert "1 records rejected: no answer in it by the pattern; the first is prompt" in capsys.readouterr().err


def test_answers_that_no_pattern_matches_are_right_answers_as_a_whole(tmp_path):
    task = load_task(TaskConfig(dataset=write(tmp_path / "data.jsonl", ["72", "3"]), pattern="the-answer-is"))
    assert task.references == ["72", "3"] and not task.facts()["pattern_in_data"]
    assert task.rules.answer("It is 70 + 2. The answer is 72.") == "72"


def test_the_sentence_of_an_answer_is_shown_without_its_reasoning():
    pattern = answer_pattern("the-answer-is")
    assert pattern is not None
    assert pattern.sentence("70 + 2 = 72. The answer is 72.") == "The answer is 72."
    assert pattern.sentence("70 + 2 = 72.\nThe answer is 72.", "no") == "The answer is no."
    assert pattern.sentence("72") is None


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        (["good", "bad"], {"labels": ["good", "baad"]}, "no record of .* has the answer 'baad'\ndid you mean 'bad'"),
        (["good", "bad"], {"labels": ["good"]}, "nothing to choose from"),
        (["good", "bad"], {"labels": ["good", "Good."]}, "there twice"),
        (["one", "one"], {"metrics": ["accuracy"]}, "1 different answers"),
        (["#### 1", "two"], {"pattern": "gsm8k", "split": "test"}, "no records in the split 'test'"),
        (["one", "two"], {"pattern": "(one"}, "not a regular expression"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused(answers, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_task(TaskConfig(dataset=write(tmp_path / "data.jsonl", answers), **options))


def test_a_task_needs_demonstrations(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "One?"}\n')
    with pytest.raises(UserError, match="contains prompts; a task needs demonstrations"):
        load_task(TaskConfig(dataset=str(tmp_path / "data.jsonl")))
