"""Random streams: seeds that differ from one another, and orders that follow from their seeds alone."""

from __future__ import annotations

from rlhf.rollout.streams import endless, permutation, stream_seed


def test_seeds_are_spread_and_fixed():
    seeds = {stream_seed(0, purpose, update, i) for purpose in range(3) for update in range(20) for i in range(50)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(1, 2, 3) == stream_seed(1, 2, 3) != stream_seed(3, 2, 1)
    assert len({stream_seed(1), stream_seed(1, 0), stream_seed(1, 0, 0), stream_seed(2**63 + 1, 0)}) == 4


def test_a_permutation_follows_from_its_seed():
    assert permutation(20, 1, 2) == permutation(20, 1, 2) != permutation(20, 2, 1)
    assert sorted(permutation(20, 1, 2)) == list(range(20))


def test_endless_passes_take_every_row_once_a_pass_and_may_be_entered_anywhere():
    whole = endless(5, 0, 20, 7)
    assert [sorted(whole[i : i + 5]) for i in range(0, 20, 5)] == [list(range(5))] * 4
    assert whole[:5] != whole[5:10]
    assert [endless(5, start, 3, 7) for start in (0, 3, 4, 12)] == [whole[start : start + 3] for start in (0, 3, 4, 12)]
    assert endless(2, 1, 7, 7) == endless(2, 0, 9, 7)[1:8]
