"""Whether a run learns from its numbers: advantages, clipping, the critic, the rate."""

from __future__ import annotations

from rlhf.doctor.evidence import WINDOW, Evidence, Series
from rlhf.doctor.findings import ALL, check, number
from rlhf.doctor.run_checks import planned_steps

PPO = ("ppo",)
HALF_STEP = 2.0**-9
"""Relative change of a weight that bfloat16, with 8 bits of precision, may round away."""
USUAL_WEIGHT = 0.02
"""A usual size of a weight of a language model: most are initialised with this standard deviation."""


@check(
    "advantage-moments", "error", PPO,
    "Whitened advantages without mean 0 and std 1 mean that hardly any reward differs, or that something between "
    "the estimator and the loss changes them; others far from 0 mean a baseline that does not fit.",
    "Look at objective/scores_std: if it is near 0, all answers get the same score; with `rloo` or `grpo` raise "
    "rollout.samples_per_prompt; report it with this run's config if the scores differ.",
)  # fmt: skip
def advantage_moments(run: Evidence) -> str | None:
    """Advantages are centred, and whitened ones have std 1."""
    std, mean = run["objective/advantages_std"], run["objective/advantages_mean"].at_least()
    whitened = run.option("advantage.name") == "reinforce++" or bool(run.option("advantage.whiten"))
    centred = abs(mean.last) <= (0.05 if whitened else max(std.last, 1e-6))
    if centred and (std.last > 1e-6 if not whitened else 0.9 <= std.last <= 1.1):
        return None
    usual = "0 and 1" if whitened else "within one deviation of 0"
    return f"advantages have mean {number(mean.last)} and deviation {number(std.last)}; {usual} is right"


@check(
    "clipping-dead", "note", PPO,
    "Updates are far smaller than the clip allows, so the run learns more slowly than it could: a low rate, few "
    "epochs, or a gradient that is clipped to nothing.",
    "Raise optimizer.policy_lr or batch.epochs; compare optimizer/grad_norm with optimizer.max_grad_norm.",
)  # fmt: skip
def clipping_dead(run: Evidence) -> str | None:
    """Ratios come near the clip now and then."""
    low, high, warmup = run["policy/ratio_min"], run["policy/ratio_max"], run.option("critic.warmup_updates", 0)
    far = [max(1 - a, b - 1) for step, a, b in zip(high.steps, low.values, high.values) if step > warmup]
    bound = 0.1 * float(run.option("loss.clip_high", 0.2))
    if len(far) < 2 * WINDOW or max(far) >= bound:
        return None
    return f"no ratio was further than {number(max(far))} from 1, a tenth of what the clip allows"


@check(
    "critic-stale", "warning", PPO,
    "The critic was useful and no longer is: the policy or the scores change faster than it learns, its loss is "
    "clipped, or its rate has fallen.",
    "Raise optimizer.critic_lr or loss.value_clip, lower optimizer.policy_lr, normalise the scores "
    "(shaping.normalize_scores=true).",
)  # fmt: skip
def critic_stale(run: Evidence) -> str | None:
    """A critic that explained the returns goes on to do so."""
    explained = run["val/explained_variance"].at_least(2 * WINDOW)
    best = max(sorted(explained.values[i : i + WINDOW])[WINDOW // 2] for i in range(len(explained) - WINDOW + 1))
    if best < 0.3 or explained.last > 0.5 * best - 0.1:
        return None
    return f"the explained variance fell from {number(best)} to {number(explained.last)}"


@check(
    "rate-below-bfloat16", "warning", ALL,
    "All steps together move a weight by less than bfloat16 can tell, so the model that samples, or that is exported "
    "in bfloat16, is the one that the run started from.",
    "Raise the learning rate or train for more steps; adapters (tuning=lora) take larger rates.",
)  # fmt: skip
def rate_below_bfloat16(run: Evidence) -> str | None:
    """All steps of a run together can move a weight by more than bfloat16 rounds away."""
    rate = run["optimizer/lr"].at_least(2 * WINDOW)
    if not run.low_precision or run.option("tuning.name", run.option("tuning")) != "full":
        return None
    updates = run["optimizer/steps"] if run.stage == "ppo" else Series()
    if run.stage == "ppo" and not len(updates):
        return None
    taken = dict(zip(updates.steps, updates.values))
    before = 0
    path = 0.0  # the most that Adam moves a weight: the sum of the rates of all steps
    for step, value in zip(rate.steps, rate.values):
        path += value * taken.get(step, 1.0) * (step - before)
        before = step
    path *= max(1.0, (planned_steps(run) or run.steps) / max(1, run.steps))
    if path >= HALF_STEP * USUAL_WEIGHT:
        return None
    lost = number(HALF_STEP * USUAL_WEIGHT)
    return f"all steps together move a weight by at most {number(path)}; bfloat16 rounds {lost} of {USUAL_WEIGHT} away"
