"""What passes between PPO's phases: shares, micro-batches, and the way between flat and padded."""

from __future__ import annotations

import pytest
import tiny
import torch

from rlhf import distributed
from rlhf.models.forward import head_chunks
from rlhf.ppo.batching import PASS_TOKENS, Minibatches, TokenRows, divide
from rlhf.ppo.masked import unflatten
from rlhf.ppo.types import Prompts, Rollout, gather_completions, gather_parts
from rlhf.rollout.streams import permutation
from rlhf.rollout.types import Completion

TOTALS = [10, 3, 7, 7, 2, 9, 4, 1, 30, 5]


@pytest.fixture(params=[1, 2, 3])
def world(request, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(request.param))
    return request.param


def test_every_episode_is_in_exactly_one_micro_batch_of_one_rank(world):
    plan = divide(TOTALS, permutation(10, 1), 3, budget=20)
    found = [episode for share in plan for rank in share for batch in rank for episode in batch]
    assert sorted(found) == list(range(10))


def test_every_rank_has_the_same_number_of_micro_batches(world):
    for share in divide(TOTALS, permutation(10, 1), 3, budget=20):
        assert len(share) == world
        assert len({len(rank) for rank in share}) == 1


def test_minibatches_hold_the_same_episodes_for_any_number_of_ranks(monkeypatch):
    def episodes(size):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        plan = divide(TOTALS, permutation(10, 1), 3, budget=20)
        return [sorted(e for rank in share for batch in rank for e in batch) for share in plan]

    assert episodes(1) == episodes(2) == episodes(4)


def test_no_micro_batch_passes_the_budget_unless_one_episode_does(world):
    for share in divide(TOTALS, permutation(10, 1), 2, budget=20):
        for batch in (batch for rank in share for batch in rank if batch):
            longest = max(TOTALS[e] for e in batch)
            assert len(batch) * longest <= 20 or len(batch) == 1


def test_micro_batches_cost_least_of_all_ways_to_cut():
    totals = [int(t) for t in torch.randint(20, 600, (9,), generator=torch.Generator().manual_seed(2))]
    (share,) = divide(totals, range(9), 1, budget=1200)  # with a pass of 32 or 512 tokens it would be cut otherwise
    order = sorted(range(9), key=lambda e: (-totals[e], e))

    def cost(batches):
        return sum(PASS_TOKENS["cpu"] + len(batch) * max(totals[e] for e in batch) for batch in batches)

    def ways(episodes):
        if not episodes:
            yield []
        for size in range(1, len(episodes) + 1):
            if size * totals[episodes[0]] <= 1200:
                for rest in ways(episodes[size:]):
                    yield [episodes[:size], *rest]

    assert len(share[0]) > 1
    assert cost(share[0]) == min(map(cost, ways(order)))


def test_packed_micro_batches_are_filled_by_tokens_without_padding(world):
    (share,) = divide(TOTALS, permutation(10, 1), 1, budget=20, packed=True)
    batches = [batch for rank in share for batch in rank if batch]
    assert sorted(e for batch in batches for e in batch) == list(range(10))
    assert all(sum(TOTALS[e] for e in batch) <= 20 or len(batch) == 1 for batch in batches)
    padded = [b for rank in divide(TOTALS, permutation(10, 1), 1, 20)[0] for b in rank if b]
    assert len(batches) <= len(padded)


def test_a_packed_micro_batch_holds_the_tokens_of_the_padded_one():
    rows = [([5, 6, 7], [False, False, True]), ([8, 9], [False, True]), ([4] * 5, [False] + [True] * 4)]
    (packed,) = TokenRows(rows, 0, packed=True).micro_batches([[[2, 0, 1]]])
    (padded,) = TokenRows(rows, 0).micro_batches([[[2, 0, 1]]])
    assert packed.input_ids.tolist() == [[4, 4, 4, 4, 4, 5, 6, 7, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert packed.attention_mask is None and padded.position_ids is None
    assert packed.lengths.tolist() == padded.lengths.tolist() == padded.response_mask.sum(1).tolist() == [4, 1, 1]
    assert torch.equal(packed.input_ids[packed.response_mask], padded.input_ids[padded.response_mask])


def test_ranks_get_about_the_same_number_of_tokens(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    totals = [int(t) for t in torch.randint(1, 100, (64,), generator=torch.Generator().manual_seed(0))]
    (share,) = divide(totals, range(64), 1, budget=10**6)
    loads = [sum(totals[e] for batch in rank for e in batch) for rank in share]
    assert abs(loads[0] - loads[1]) <= max(totals)


def rollout():
    prompts = Prompts([[5, 6], [7], [8, 9, 10]], [[]] * 3, torch.arange(3), [0, 1, 2])
    return Rollout(prompts, [Completion([11, 12, 2], True), Completion([13], False), Completion([14, 2], True)])


def test_a_rollout_describes_its_answers():
    r = rollout()
    assert r.lengths.tolist() == [3, 1, 2]
    assert r.ended.tolist() == [True, False, True]
    assert r.response_mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


def test_a_rollout_pads_the_log_probs_of_a_sampler_that_tells_them_for_all_answers():
    told = Rollout(rollout().prompts, [Completion([11, 2], True, [-1.0, -2.0]), Completion([13], False, [-3.0])])
    assert told.sampler_logprobs.tolist() == [[-1, -2], [-3, 0]]
    assert rollout().sampler_logprobs is None


def rows():
    return Minibatches.of_rollout(rollout(), 0, False, [range(3)], 1, 100).rows


def test_a_micro_batch_marks_the_answers_tokens_and_pads_on_the_right():
    batch = rows().micro_batches([[[0, 1]]])[0]
    assert batch.input_ids.tolist() == [[5, 6, 11, 12, 2], [7, 13, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.response_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.episodes == [0, 1]


def test_a_filler_asks_for_no_token():
    batch = rows().micro_batches([[[]]])[0]
    assert batch.episodes == []
    assert not batch.response_mask.any()
    assert batch.input_ids.shape == (1, 2)  # the shortest episode


def test_every_rank_knows_the_most_tokens_that_a_rank_has(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = [([1] * n, [False] + [True] * (n - 1)) for n in (1001, 11)]
    parts = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(TokenRows(rows, 0).micro_batches([[[0]], [[1]]])[0].most_tokens)
    assert parts == [1000, 1000]
    assert head_chunks(1000, 2**16) == 4  # 62.5 Mi logits, 16 Mi at a time


def test_unflatten_pads_each_row_with_zeros_and_keeps_gradients():
    flat = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    padded = unflatten(flat, torch.tensor([3, 0, 1]))
    assert padded.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    (padded * torch.tensor([[1.0, 10, 100], [7, 7, 7], [1000, 7, 7]])).sum().backward()
    assert flat.grad.tolist() == [1, 10, 100, 1000]


def test_gathered_figures_come_in_the_order_of_the_episodes():
    columns = torch.tensor([[30.0, 3], [31, 3], [10, 1], [20, 2], [21, 2], [22, 2]])
    scores = torch.tensor([[0.3], [0.1], [0.2]])
    (first, second), (score,) = gather_parts([2, 0, 1], columns, scores, torch.tensor([1, 3, 2]))
    assert score.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert first.tolist() == [[10, 0, 0], [20, 21, 22], [30, 31, 0]]
    assert second.tolist() == [[1, 0, 0], [2, 2, 2], [3, 3, 0]]


def test_answers_of_one_process_are_gathered_as_they_are():
    assert distributed.world_size() == 1
    assert gather_completions(rollout().completions, 0) == rollout().completions


RANKS = """
from rlhf import distributed
from rlhf.ppo.types import gather_completions
from test_experience import COMPLETIONS

distributed.start(60)
mine, first = (COMPLETIONS[:3], 0) if distributed.rank() == 1 else (COMPLETIONS[3:], 3)
assert gather_completions(mine, first) == COMPLETIONS
print("EQUAL")
distributed.stop()
"""
COMPLETIONS = [
    Completion([5, 6], True, [-0.5, -0.25]), Completion([7], False), Completion([8, 9, 10], True, [-1.0, -2.0, -3.0]),
    Completion([11], True, [-4.0]), Completion([12, 13], False, [-5.0, -6.0]),
]  # fmt: skip


@pytest.mark.slow
def test_completions_of_several_ranks_are_gathered_in_the_order_of_their_episodes():
    done = tiny.launch(2, RANKS)
    assert done.returncode == 0 and done.stdout.count("EQUAL") == 2, done.stdout
