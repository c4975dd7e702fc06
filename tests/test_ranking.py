"""rlhf.reward.losses against numbers worked by hand, loops over pairs, and the contract of every row."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlhf.reward.losses import RANKING_LOSSES, RankingBatch, RankingLoss, centering_penalty

# Every row with its defaults, and the options that change the formula.
SPECS: list[dict[str, Any]] = [
    *({"name": row.name} for row in RANKING_LOSSES),
    {"name": "bradley-terry", "label_smoothing": 0.1},
    {"name": "bradley-terry", "margin": "rank", "margin_scale": 0.5},
    {"name": "bradley-terry", "margin": "rating", "margin_scale": 0.5},
    {"name": "hinge", "margin": 2.5},
    {"name": "rao-kupper", "tie_threshold": 1.5},
    {"name": "davidson", "tie_prevalence": 2.0},
]


def over(specs: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: "-".join(map(str, spec.values())))


every_spec = over(SPECS)


def flat(*rankings: tuple[list[float], list[int]], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """(scores, ranks) of each ranking -> the flat tensors that a loss takes."""
    scores = torch.tensor([s for ranking in rankings for s in ranking[0]], dtype=dtype)
    ranks = torch.tensor([r for ranking in rankings for r in ranking[1]])
    return scores, ranks, torch.tensor([b for b, ranking in enumerate(rankings) for _ in ranking[0]])


def run(spec: Any, scores: torch.Tensor, *judged: torch.Tensor, **more: torch.Tensor) -> RankingLoss:
    """The loss of flat scores; the rest are the fields of a `RankingBatch`."""
    return RANKING_LOSSES.pick(spec)(scores, RankingBatch(*judged, **more))


def loss_of(spec: Any, scores: list[float], ranks: list[int], **inputs: Any) -> float:
    """The loss of one ranking."""
    result = run(spec, *flat((scores, ranks)), **inputs)
    assert result.counted.tolist() == [True]
    return result.loss.item()


def random_batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Five rankings of 2 to 6 candidates with ties (each with at least one strict pair), and ratings, some unknown."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [2, 6, 3, 4, 3]
    ranks = [torch.randint(1, 4, (k,), generator=draw).unique(return_inverse=True)[1] + 1 for k in sizes]
    for of_one in ranks:
        of_one[0], of_one[1:] = 1, of_one[1:] + (of_one[1:] == 1).all()
    ratings = torch.randn(sum(sizes), generator=draw, dtype=dtype)
    ratings[3] = math.nan
    scores = torch.randn(sum(sizes), generator=draw, dtype=dtype)
    return scores, torch.cat(ranks), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), ratings


# ---- numbers worked by hand --------------------------------------------------------------------------------------


def test_bradley_terry_of_three_is_the_mean_of_its_three_pairs():
    # -log sigmoid of 1, 3, 2: 0.313262, 0.048587, 0.126928
    assert loss_of("bradley-terry", [2.0, 1.0, -1.0], [1, 2, 3]) == pytest.approx(0.162926, abs=1e-6)


def test_hinge_counts_what_a_pair_lacks_to_the_margin():
    # gaps 0.25 and 2: (0.75 + 0) / 2; the tied pair is left out
    assert loss_of("hinge", [0.25, 2.0, 0.0], [1, 1, 2]) == pytest.approx(0.375)


def test_bradley_terry_leaves_the_tied_pair_out():
    # only 1 over 3 (gap 1) and 2 over 3 (gap 2): (0.313262 + 0.126928) / 2
    assert loss_of("bradley-terry", [0.0, 1.0, -1.0], [1, 1, 2]) == pytest.approx(0.220095, abs=1e-6)


def test_label_smoothing_mixes_in_the_flipped_pair():
    # 0.9 * 0.313262 + 0.1 * 1.313262
    spec = {"name": "bradley-terry", "label_smoothing": 0.1}
    assert loss_of(spec, [1.0, 0.0], [1, 2]) == pytest.approx(0.413262, abs=1e-6)


def test_a_rank_margin_spares_neighbours_and_grows_with_distance():
    spec = {"name": "bradley-terry", "margin": "rank", "margin_scale": 0.5}
    assert loss_of(spec, [1.0, 0.0], [1, 2]) == pytest.approx(0.313262, abs=1e-6)
    # gaps 1, 1, and 2 - 0.5 for the pair two ranks apart: (0.313262 * 2 + 0.201413) / 3
    assert loss_of(spec, [1.0, 0.0, -1.0], [1, 2, 3]) == pytest.approx(0.275979, abs=1e-6)


def test_a_rating_margin_is_zero_where_unknown_or_contradicting_the_ranks():
    spec = {"name": "bradley-terry", "margin": "rating", "margin_scale": 0.5}
    # pairs 1-2: gap 1 - 0.5 * 2 = 0; 1-3 and 2-3: rating of 3 unknown, gaps 2 and 1
    ratings = torch.tensor([5.0, 3.0, math.nan])
    expected = (math.log(2) + 0.126928 + 0.313262) / 3
    assert loss_of(spec, [1.0, 0.0, -1.0], [1, 2, 3], ratings=ratings) == pytest.approx(expected, abs=1e-6)
    assert loss_of(spec, [1.0, 0.0], [1, 2], ratings=torch.tensor([1.0, 9.0])) == pytest.approx(0.313262, abs=1e-6)


def test_a_rating_margin_without_ratings_is_refused():
    with pytest.raises(ValueError, match="needs the candidates' ratings"):
        loss_of({"name": "bradley-terry", "margin": "rating"}, [1.0, 0.0], [1, 2])


def test_rao_kupper_by_its_published_form():
    theta, (a, b) = 2.0, (math.exp(1.0), math.exp(-0.5))
    spec = {"name": "rao-kupper", "tie_threshold": math.log(theta)}
    above = a / (a + theta * b)
    tie = (theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b))
    assert loss_of(spec, [1.0, -0.5], [1, 2]) == pytest.approx(-math.log(above), abs=1e-12)
    assert loss_of(spec, [1.0, -0.5], [1, 1]) == pytest.approx(-math.log(tie), abs=1e-12)
    assert loss_of(spec, [0.0, 0.0], [1, 1]) == pytest.approx(math.log(3), abs=1e-12)  # tanh(log(2) / 2) = 1/3


def test_davidson_by_its_published_form():
    nu, (a, b) = 0.7, (math.exp(1.0), math.exp(-0.5))
    spec, z = {"name": "davidson", "tie_prevalence": nu}, a + b + nu * math.sqrt(a * b)
    assert loss_of(spec, [1.0, -0.5], [1, 2]) == pytest.approx(-math.log(a / z), abs=1e-12)
    assert loss_of(spec, [1.0, -0.5], [1, 1]) == pytest.approx(-math.log(nu * math.sqrt(a * b) / z), abs=1e-12)
    assert loss_of("davidson", [3.0, 3.0], [1, 1]) == pytest.approx(math.log(5), abs=1e-12)  # 0.5 / 2.5 = 1/5


def test_plackett_luce_of_three_multiplies_two_choices():
    # equal scores: 1/3 then 1/2, over two choices
    assert loss_of("plackett-luce", [0.0, 0.0, 0.0], [1, 2, 3]) == pytest.approx(math.log(6) / 2, abs=1e-12)
    # weights 4, 2, 1: 4/7 then 2/3
    scores = [math.log(w) for w in (4, 2, 1)]
    assert loss_of("plackett-luce", scores, [1, 2, 3]) == pytest.approx(-math.log(4 / 7 * 2 / 3) / 2, abs=1e-12)


def test_plackett_luce_takes_efrons_denominators_and_the_orders_of_a_tie():
    # weights 4, 2, 1, the first two tied: 2! * 4/7 * 2/(7 - 6/2), then the last is certain
    scores = [math.log(w) for w in (4, 2, 1)]
    assert loss_of("plackett-luce", scores, [1, 1, 2]) == pytest.approx(-math.log(2 * 4 / 7 * 2 / 4) / 2, abs=1e-12)
    # two tied candidates of weights 3 and 1: 2! * 3/4 * 1/(4/2)
    assert loss_of("plackett-luce", [math.log(3), 0.0], [1, 1]) == pytest.approx(-math.log(0.75), abs=1e-12)


# ---- against slower and other forms ------------------------------------------------------------------------------


def pair_loss(spec: dict[str, Any], gap: float, distance: int, rating_gap: float) -> float | None:
    """The loss of a pair (i, j) with rank_j - rank_i = distance >= 0, from the models' definitions."""
    if spec["name"] == "bradley-terry":
        if distance == 0:
            return None
        scale, kind = spec.get("margin_scale", 1.0), spec.get("margin", "none")
        known = 0.0 if math.isnan(rating_gap) else max(rating_gap, 0.0)
        gap -= {"none": 0.0, "rank": scale * (distance - 1), "rating": scale * known}[kind]
        flip = spec.get("label_smoothing", 0.0)
        return (1 - flip) * math.log1p(math.exp(-gap)) + flip * math.log1p(math.exp(gap))
    if spec["name"] == "hinge":
        return max(0.0, spec.get("margin", 1.0) - gap) if distance else None
    if spec["name"] == "rao-kupper":
        theta, a = math.exp(spec.get("tie_threshold", 0.5)), math.exp(gap)
        tie = (theta**2 - 1) * a / ((a + theta) * (theta * a + 1))
        return -math.log(a / (a + theta) if distance else tie)
    nu, a = spec.get("tie_prevalence", 0.5), math.exp(gap)
    return -math.log((a if distance else nu * math.sqrt(a)) / (a + 1 + nu * math.sqrt(a)))


@over([spec for spec in SPECS if spec["name"] != "plackett-luce"])
def test_pairwise_losses_equal_a_loop_over_pairs(spec: dict[str, Any]):
    for seed in range(5):
        scores, ranks, ranking, ratings = random_batch(seed)
        loss, counted = run(spec, scores, ranks, ranking, ratings)
        for b in range(int(ranking.max()) + 1):
            s, r, q = (values[ranking == b].tolist() for values in (scores, ranks, ratings))
            pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if r[i] < r[j] or (r[i] == r[j] and i < j)]
            losses = [pair_loss(spec, s[i] - s[j], r[j] - r[i], q[i] - q[j]) for i, j in pairs]
            losses = [value for value in losses if value is not None]
            assert counted[b]
            assert loss[b].item() == pytest.approx(sum(losses) / len(losses), abs=1e-10)


def test_plackett_luce_equals_a_loop_over_stages():
    for seed in range(5):
        scores, ranks, ranking, _ = random_batch(seed)
        loss = run("plackett-luce", scores, ranks, ranking).loss
        for b in range(int(ranking.max()) + 1):
            weight, r = scores[ranking == b].exp().tolist(), ranks[ranking == b].tolist()
            chance = 1.0
            for level in sorted(set(r)):
                tied = [w for w, rank in zip(weight, r) if rank == level]
                rest = sum(w for w, rank in zip(weight, r) if rank >= level)
                for placed, w in enumerate(tied):
                    chance *= (placed + 1) * w / (rest - placed / len(tied) * sum(tied))
            assert loss[b].item() == pytest.approx(-math.log(chance) / (len(r) - 1), abs=1e-10)


def test_plackett_luce_is_exact_for_ties_of_equal_scores():
    scores, ranks = [0.4, 0.4, 0.4, -1.0], [1, 1, 1, 2]
    exact = sum(
        math.exp(-3 * loss_of("plackett-luce", [*(scores[i] for i in order), -1.0], [1, 2, 3, 4]))
        for order in itertools.permutations(range(3))
    )
    assert loss_of("plackett-luce", scores, ranks) == pytest.approx(-math.log(exact) / 3, abs=1e-12)


def test_plackett_luce_tie_is_rao_kuppers_at_a_vanishing_threshold():
    narrow = {"name": "rao-kupper", "tie_threshold": 1e-9}
    gaps = (0.0, 0.5, 3.0)
    ours = [loss_of("plackett-luce", [gap, 0.0], [1, 1]) for gap in gaps]
    theirs = [loss_of(narrow, [gap, 0.0], [1, 1]) for gap in gaps]
    assert [x - ours[0] for x in ours] == pytest.approx([x - theirs[0] for x in theirs], abs=1e-6)


@pytest.mark.parametrize("name", ["bradley-terry", "plackett-luce"])
def test_binary_comparisons_have_trls_reward_loss(name: str):
    chosen, rejected = torch.randn(8), torch.randn(8)
    ranks, ranking = torch.tensor([1, 2]).repeat(8), torch.arange(8).repeat_interleave(2)
    loss, counted = run(name, torch.stack((chosen, rejected), 1).flatten(), ranks, ranking)
    torch.testing.assert_close(loss.sum() / counted.sum(), -F.logsigmoid(chosen - rejected).mean())


def test_centering_penalty_of_binary_comparisons_is_trls():
    chosen, rejected = torch.randn(8), torch.randn(8)
    penalty = centering_penalty(torch.stack((chosen, rejected), 1).flatten(), torch.arange(8).repeat_interleave(2))
    torch.testing.assert_close(penalty.mean(), torch.mean((chosen + rejected) ** 2))


def test_centering_penalty_is_the_mean_over_pairs():
    # pairs of (1, 2, -4): 3^2, (-3)^2, (-2)^2; one candidate alone: nothing; (0.5, -0.5): 0
    scores, ranking = torch.tensor([1.0, 2.0, -4.0, 7.0, 0.5, -0.5]), torch.tensor([0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(centering_penalty(scores, ranking), torch.tensor([22 / 3, 0.0, 0.0]))
    scores = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: centering_penalty(s, ranking), scores)


# ---- the models are probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [-3.0, 0.0, 0.4, 5.0])
@over([s for s in SPECS if "label_smoothing" not in s and s["name"] != "hinge"])  # a smoothed label is no outcome
def test_a_pairs_outcomes_sum_to_one(spec: dict[str, Any], gap: float):
    inputs = {"ratings": torch.zeros(2)} if spec.get("margin") == "rating" else {}
    outcomes = [[1, 2], [2, 1]]
    if spec["name"] in ("rao-kupper", "davidson"):  # a tie is an outcome of its own
        outcomes.append([1, 1])
    chances = [math.exp(-loss_of(spec, [gap, 0.0], ranks, **inputs)) for ranks in outcomes]
    assert sum(chances) == pytest.approx(1.0, abs=1e-12)


def test_plackett_luce_over_all_orders_of_four_sums_to_one():
    scores = [0.3, -1.0, 2.0, 0.0]
    chances = [math.exp(-3 * loss_of("plackett-luce", scores, list(o))) for o in itertools.permutations((1, 2, 3, 4))]
    assert sum(chances) == pytest.approx(1.0, abs=1e-12)


# ---- the contract of every row -----------------------------------------------------------------------------------


@every_spec
def test_shapes_dtypes_and_signs(spec: dict[str, Any]):
    loss, counted = run(spec, *random_batch(0, torch.float32))
    assert loss.shape == counted.shape == (5,)
    assert (loss.dtype, counted.dtype) == (torch.float32, torch.bool)
    assert counted.all() and loss.isfinite().all() and (loss > 0).all()


@every_spec
def test_half_precision_scores_are_raised_to_float32(spec: dict[str, Any]):
    scores, ranks, ranking, ratings = random_batch(0)  # ratings of float64 raise nothing
    low, rest = scores.bfloat16(), (ranks, ranking, ratings)
    torch.testing.assert_close(run(spec, low, *rest), run(spec, low.float(), *rest), rtol=0, atol=0)
    assert run(spec, low, *rest).loss.dtype == torch.float32


@every_spec
def test_the_gradient_is_that_of_the_formula(spec: dict[str, Any]):
    scores, *rest = random_batch(1)
    assert torch.autograd.gradcheck(lambda s: run(spec, s, *rest).loss, scores.requires_grad_())


@every_spec
def test_extreme_scores_have_finite_losses_and_gradients(spec: dict[str, Any]):
    scores, *rest = random_batch(2, torch.float32)
    for sign in (1, -1):
        extreme = (sign * 1e4 * scores.sign()).requires_grad_()
        loss, _ = run(spec, extreme, *rest)
        loss.sum().backward()
        assert loss.isfinite().all() and extreme.grad.isfinite().all()
        assert extreme.grad.abs().max() <= 5


@every_spec
def test_the_loss_falls_as_the_best_answers_score_rises(spec: dict[str, Any]):
    draw = torch.linspace(-2, 2, 9)
    scores = torch.stack((draw, torch.zeros(9), torch.full((9,), -0.5)), 1).flatten()
    ranks, ranking = torch.tensor([1, 2, 3]).repeat(9), torch.arange(9).repeat_interleave(3)
    loss, _ = run(spec, scores, ranks, ranking, torch.zeros(27))
    assert (loss.diff() < 0).all() or (spec["name"] == "hinge" and (loss.diff() <= 0).all() and loss[0] > loss[-1])


@every_spec
def test_a_ranking_does_not_feel_the_others_of_its_batch(spec: dict[str, Any]):
    scores, ranks, ranking, ratings = random_batch(3)
    together = run(spec, scores.requires_grad_(), ranks, ranking, ratings).loss
    (gradient,) = torch.autograd.grad(together[1], scores)
    assert (gradient[ranking != 1] == 0).all()
    for b in range(5):
        own = ranking == b
        alone = run(spec, scores[own], ranks[own], torch.zeros_like(ranking[own]), ratings[own]).loss
        torch.testing.assert_close(alone[0], together[b])


@every_spec
def test_a_constant_added_to_a_rankings_scores_changes_nothing(spec: dict[str, Any]):
    scores, ranks, ranking, ratings = random_batch(4)
    shift = torch.tensor([5.0, -3.0, 0.0, 1000.0, -1000.0], dtype=scores.dtype)[ranking]
    torch.testing.assert_close(
        run(spec, scores + shift, ranks, ranking, ratings), run(spec, scores, ranks, ranking, ratings)
    )


@every_spec
def test_the_order_in_which_candidates_are_listed_changes_nothing(spec: dict[str, Any]):
    scores, ranks, ranking, ratings = random_batch(5)
    shuffled = torch.argsort(ranking + torch.rand(len(ranking)) * 0.9)
    torch.testing.assert_close(
        run(spec, scores[shuffled], ranks[shuffled], ranking[shuffled], ratings[shuffled]),
        run(spec, scores, ranks, ranking, ratings),
    )


@every_spec
def test_all_ties_count_only_where_the_row_uses_ties_and_one_candidate_never(spec: dict[str, Any]):
    row = RANKING_LOSSES[spec["name"]]
    scores, ranks, ranking = flat(([0.0, 1.0], [1, 2]), ([0.5, 2.0, 1.0], [1, 1, 1]), ([3.0], [1]))
    loss, counted = run(spec, scores.requires_grad_(), ranks, ranking, torch.zeros(6))
    assert counted.tolist() == [True, row.traits["uses_ties"], False]
    assert (loss[~counted] == 0).all() and (loss[counted] > 0).all()
    loss.sum().backward()
    assert (scores.grad[~counted[ranking]] == 0).all()


@over([spec for spec in SPECS if RANKING_LOSSES[spec["name"]].traits["uses_ties"]])
def test_a_tie_draws_scores_together_where_ties_are_used(spec: dict[str, Any]):
    scores, ranks, ranking = flat(([1.0, -1.0], [1, 1]))
    run(spec, scores.requires_grad_(), ranks, ranking).loss.sum().backward()
    assert scores.grad[0] > 0 > scores.grad[1]
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-12)


@every_spec
def test_weights_scale_the_losses_of_their_rankings(spec: dict[str, Any]):
    batch, weights = random_batch(6), torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    plain, weighted = run(spec, *batch), run(spec, *batch, weights)
    torch.testing.assert_close(weighted.loss, plain.loss * weights)
    assert weighted.counted.equal(plain.counted)


@every_spec
def test_an_empty_batch_gives_an_empty_loss_with_a_graph(spec: dict[str, Any]):
    scores, none = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss, counted = run(spec, scores, none, none, torch.zeros(0))
    assert loss.shape == counted.shape == (0,)
    loss.sum().backward()
    assert scores.grad.shape == (0,)


@every_spec
def test_a_nan_score_shows_in_its_own_ranking_only(spec: dict[str, Any]):
    scores, ranks, ranking = flat(([math.nan, 1.0], [1, 2]), ([1.0, 0.0], [1, 2]))
    assert run(spec, scores, ranks, ranking, torch.zeros(4)).loss.isnan().tolist() == [True, False]


# ---- refusals ----------------------------------------------------------------------------------------------------


@every_spec
def test_bad_layouts_are_refused(spec: dict[str, Any]):
    scores, ranks, rated = torch.zeros(3), torch.tensor([1, 2, 3]), torch.zeros(3)
    with pytest.raises(ValueError, match=r"ranks \[2\]"):
        run(spec, scores, ranks[:2], torch.zeros(3, dtype=torch.int64), rated)
    with pytest.raises(ValueError, match="ascend"):
        run(spec, scores, ranks, torch.tensor([0, 1, 0]), rated)
    with pytest.raises(ValueError, match="ascend"):
        run(spec, scores, ranks, torch.tensor([-1, 0, 0]), rated)
    with pytest.raises(ValueError, match="names ranking 1, but there are weights for 1"):
        run(spec, scores, ranks, torch.tensor([0, 0, 1]), rated, torch.ones(1))
    with pytest.raises(ValueError, match="differ in shape"):
        centering_penalty(scores, ranks[:2])


def test_options_out_of_range_are_refused():
    bad = {"bradley-terry": {"label_smoothing": 0.5}, "rao-kupper": {"tie_threshold": 0}}
    for name, options in (bad | {"davidson": {"tie_prevalence": -1}}).items():
        with pytest.raises(ValueError, match=next(iter(options))):
            RANKING_LOSSES.pick({"name": name, **options})


def test_choosing_a_loss_does_not_import_torch():
    code = (
        "import sys; from rlhf.reward.losses import RANKING_LOSSES as t; [row.options for row in t]; "
        "t.pick('davidson'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
