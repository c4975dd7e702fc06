"""`rlhf data stats` of proposals, of weights and of the time that rankings took."""

from __future__ import annotations

from rows import RANKING, dataset, run

from data_tools.curate.stats import stats


def test_proposals_are_counted_by_k_and_their_answers_measured(tmp_path):
    two = {"prompt": "a?", "candidates": ["yes", {"text": "no", "author": "m", "author_kind": "model"}]}
    parent = dataset(tmp_path / "d", [two, {"prompt": "b?", "candidates": ["a", "b", "c"]}])
    found = stats([parent])
    assert found["k"] == {2: 1, 3: 1} and found["kind"] == {"proposal": 2}
    assert found["author_kind"] == {"unknown": 4, "model": 1}
    assert found["lengths"]["answer"] == {"mean": 8 / 5, "p50": 1, "p95": 3, "max": 3}
    assert found["ties"]["pairs"] == 0 and found["ties"]["tied_share"] is None
    assert found["seconds"] is found["weights"] is None
    printed = run("stats", parent).output
    assert "│ K │" in printed.replace("┃", "│") and "ties:" not in printed


def test_weights_and_seconds_of_rankings_are_summed_up(tmp_path):
    rows = [{**RANKING, "annotator": str(i), "seconds": s, "weight": w} for i, (s, w) in enumerate([(2, 1), (6, 0.5)])]
    parent = dataset(tmp_path / "d", [*rows, RANKING])
    found = stats([parent])
    assert found["seconds"] == {"mean": 4, "p50": 2, "p95": 6, "max": 6}
    assert found["weights"] == {"mean": 2.5 / 3, "p50": 1, "p95": 1, "max": 1}
    printed = run("stats", parent).output
    assert "seconds a ranking took" in printed and "weights of the rankings" in printed
    assert "weights of" not in run("stats", dataset(tmp_path / "even", [RANKING])).output
