"""The agreement ceiling: hand-worked numbers, and what lands in the manifest."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from check_rows import panel, ranking
from rows import jsonl, write

from data_tools.statistics import accumulator
from data_tools.statistics.accumulator import accumulated
from data_tools.statistics.agreement import AgreementObserver, agreement_of, ceiling
from rlhf.core.errors import UserError
from rlhf.data.jsonl import to_dict
from rlhf.data.manifest import file_hash
from rlhf.data.schema import Candidate, Demonstration, Message, Proposal
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter


def agreement(tmp_path, rows):
    return agreement_of(accumulated(write(tmp_path / "d", rows)))


def votes(prompt, ways):
    """Rankings of one pair by annotators a, b, ...: '>' the first is better, '<' the second, '=' a tie."""
    ranks = {">": (1, 2), "<": (2, 1), "=": (1, 1)}
    return [ranking(prompt, ["x", "y"], ranks[way], name) for way, name in zip(ways, "abcdefgh")]


def test_the_ceiling_of_equally_hard_pairs_is_the_fraction_that_prefers_the_better_answer():
    share = np.array([0.5, 0.6, 0.9, 1.0])
    assert ceiling(share**2 + (1 - share) ** 2) == pytest.approx(share)


def test_the_ceiling_bounds_from_above_where_some_pairs_are_harder():
    share = np.array([0.55, 0.95])  # the best model is right on 0.75 of the choices
    assert ceiling((share**2 + (1 - share) ** 2).mean()) == pytest.approx(0.8202, abs=1e-4)


def test_the_ceiling_of_annotators_who_agree_no_more_than_chance_is_chance():
    assert ceiling(np.array([0.5, 0.3])).tolist() == [0.5, 0.5]


def test_agreement_is_worked_out_by_hand(tmp_path):
    # Two of three agree: a vote meets its like with probability (2·1 + 0) / (3·2) = 1/3, weight 3. Both of two agree:
    # 1, weight 2. Five of five: 1, weight 5. A = (3/3 + 2 + 5) / 10.
    found = agreement(tmp_path, votes("p", ">><") + votes("q", "<<") + votes("r", ">>>>>"))
    assert found["agreement"] == 0.8
    assert found["ceiling"] == pytest.approx((1 + 0.6**0.5) / 2, abs=1e-6)
    assert (found["pairs"], found["annotators"]) == (3, 5)
    assert found["interval"][0] < found["ceiling"] < found["interval"][1]


def test_ties_are_left_out(tmp_path):
    found = agreement(tmp_path, votes("p", ">>=") + votes("q", ">=") + votes("r", "<>"))
    assert (found["agreement"], found["pairs"], found["annotators"]) == (0.5, 2, 2)


def test_the_order_of_the_answers_does_not_matter(tmp_path):
    rows = [ranking("p", ["x", "y"], (1, 2), "a"), ranking("p", ["y", "x"], (2, 1), "b")]
    assert agreement(tmp_path, rows)["agreement"] == 1


def test_rankings_of_different_answers_are_compared_where_they_overlap(tmp_path):
    rows = [ranking("p", ["x", "y", "z"], (1, 2, 3), "a"), ranking("p", ["w", "z", "y"], (1, 2, 3), "b")]
    found = agreement(tmp_path, rows)
    assert (found["agreement"], found["pairs"]) == (0, 1)


def test_one_person_cannot_agree_with_themselves(tmp_path):
    assert agreement(tmp_path, [ranking("p", ["x", "y"], (1, 2), "a", time=f"202{i}-01-01") for i in range(2)]) is None


def test_someone_who_judged_a_pair_again_has_the_vote_they_gave_most_often(tmp_path):
    times = iter(f"202{i}-01-01" for i in range(9))
    again = [ranking("p", ["x", "y"], ranks, "a", time=next(times)) for ranks in ((1, 2), (2, 1), (1, 2))]
    assert agreement(tmp_path, [*again, ranking("p", ["x", "y"], (1, 2), "b")])["agreement"] == 1


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([ranking("p", ["x", "y"], (1, 2)), ranking("p", ["y", "x"], (1, 2))], id="nobody is named"),
        pytest.param(
            [ranking("p", ["x", "y"], (1, 2), n, merged=("i", "j")) for n in "ab"], id="aggregated from others"
        ),
        pytest.param([ranking(p, ["x", "y"], (1, 2), n) for p, n in ("pa", "qb")], id="no prompt twice"),
        pytest.param([ranking("p", [n, n + "!"], (1, 2), n) for n in "ab"], id="no pair twice"),
        pytest.param(votes("p", ">=="), id="ties"),
    ],
)
def test_there_is_none_if_no_two_annotators_ordered_a_pair(tmp_path, rows):
    assert agreement(tmp_path, rows) is None


def test_the_ceiling_of_simulated_annotators_is_their_accuracy(tmp_path):
    found = agreement(tmp_path, panel(400, dict.fromkeys("abcdef", 0.85), each=3))
    low, high = found["interval"]
    assert low < 0.85 < high
    assert high - low < 0.06


def observed(folder, records, origin=None):
    """A dataset whose agreement was recorded while it was written."""
    with DatasetWriter(folder, None, origin, AgreementObserver(accumulator.Accumulator(brief=False))) as writer:
        for record in records:
            writer.write(record)
    return open_dataset(folder)


def test_the_manifest_gets_the_agreement_and_nothing_else_changes(tmp_path):
    rows = panel(20, dict.fromkeys("abc", 0.9))
    data = write(tmp_path / "d", rows, origin={"from": "here"})
    found = observed(tmp_path / "n", rows, {"from": "here"}).manifest
    assert found == data.manifest | {"agreement": agreement_of(accumulated(data))}


@pytest.mark.parametrize("prompts", [3, 6000])
def test_what_is_gathered_for_the_agreement_alone_gives_the_same_agreement(tmp_path, prompts):
    rows = panel(prompts, dict.fromkeys("abcdef", 0.8), k=3, each=2)
    rows += [ranking(f"Question {i}?", ["x", "y"], (1, 2), merged=("i", "j")) for i in range(9)]
    rows += [ranking(f"Question {i}?", [f"answer 0 to {i}", f"answer 1 to {i}"], (1, 2)) for i in range(9)]
    data = observed(tmp_path / "n", rows)
    assert data.manifest["agreement"] is not None
    assert data.manifest["agreement"] == agreement_of(accumulated(data))


def test_the_manifest_says_null_where_nobody_agreed_or_disagreed(tmp_path):
    assert observed(tmp_path / "d", votes("p", ">")).manifest["agreement"] is None


def test_other_kinds_have_no_agreement(tmp_path):
    turn, two = (Message("user", "Hm?"),), (Candidate("x"), Candidate("y"))
    for record in (Demonstration(turn, answer="x"), Proposal(turn, candidates=two)):
        assert "agreement" not in observed(tmp_path / record.kind, [record]).manifest


def test_a_file_agrees_as_its_folder_does(tmp_path):
    rows = panel(30, dict.fromkeys("abc", 0.8), k=4)
    file = jsonl(tmp_path / "d.jsonl", [to_dict(row) for row in rows])
    assert agreement_of(accumulated(open_dataset(file))) == agreement(tmp_path, rows)


def test_a_dataset_of_the_first_schema_version_is_read(tmp_path):
    data = write(tmp_path / "d", panel(30, dict.fromkeys("abc", 0.9)))
    shard = data.path / "shard-00000.parquet"
    pq.write_table(pq.read_table(shard).drop_columns(["seconds", "shown", "weight", "merged"]), shard)
    shards = [data.manifest["shards"][0] | {"sha256": file_hash(shard)}]
    (data.path / "manifest.json").write_text(json.dumps(data.manifest | {"schema_version": 1, "shards": shards}))
    assert agreement_of(accumulated(open_dataset(data.path)))["pairs"] == 30


def test_a_damaged_shard_is_an_error(tmp_path):
    data = write(tmp_path / "d", panel(30, dict.fromkeys("abc", 0.9)))
    shard = data.path / "shard-00000.parquet"
    whole = shard.read_bytes()
    for damaged in (whole[:500], whole[:200] + bytes(2000) + whole[2200:]):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"shard-00000.parquet: damaged"):
            accumulated(data)


def test_of_more_prompts_than_fit_some_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(accumulator, "MOST_PROMPTS", 10)
    found = agreement(tmp_path, [*panel(50, dict.fromkeys("abc", 0.9)), ranking("once", ["x", "y"], (1, 2), "a")])
    assert found["pairs"] == 10
