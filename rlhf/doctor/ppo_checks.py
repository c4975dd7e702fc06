"""What can be wrong with a PPO run, by its metrics."""

from __future__ import annotations

from rlhf.doctor.evidence import WINDOW, Evidence
from rlhf.doctor.findings import check, number

PPO = ("ppo",)


# ---- invariants: broken only by a fault ----------------------------------------------------------------------------


@check(
    "first-ratio", "error", PPO,
    "Scoring and learning compute different log-probs for the same weights: dropout, other kernels or precision, or a "
    "module that changes between the two.",
    "Turn dropout off in the model's config, set precision=float32 and compile=false, and try again; if it stays, "
    "report it with this run's config.",
)  # fmt: skip
def first_ratio(run: Evidence) -> str | None:
    """The ratio in the first minibatch is 1, because nothing has been learned yet."""
    loose = run.low_precision or run.option("compile") or run.option("score.policy") == "sampler"
    tolerance = 0.05 if loose else 1e-3
    gaps = [abs(value - 1) for side in ("min", "max") for value in run[f"policy/first_ratio_{side}"].values]
    if not gaps or max(gaps) <= tolerance:
        return None
    return f"the first ratio of an update is off by up to {number(max(gaps))}; {tolerance} is rounding"


@check(
    "sampler-gap", "error", PPO,
    "Sampler and trainer use different weights, temperatures or tokenizers, or the weights were not renewed.",
    "Use the sampler `hf`, whose gap is rounding; if the rewards then rise, the other sampler's setup is at fault.",
)  # fmt: skip
def sampler_gap(run: Evidence) -> str | None:
    """The sampler's log-probs are nearly the trainer's."""
    if run.option("rollout.sampler.name", run.option("rollout.sampler")) == "hf":  # it has the trainer's log-probs
        return None
    gap, most = run["rollout/sampler_gap_mean"], 0.5 if run.option("rollout.ahead") else 0.05
    if not len(gap) or gap.last <= most:
        return None
    return f"log-probs of sampler and trainer differ by {number(gap.last)} nats per token (at most {most} is usual)"


@check(
    "starts-away-from-the-reference", "error", PPO,
    "The reference is not the policy that the run started from: another checkpoint, another adapter, or dropout.",
    "Check model.path; a run that continues an adapter keeps that adapter in its reference.",
)  # fmt: skip
def starts_at_reference(run: Evidence) -> str | None:
    """Before the first update, policy and reference are the same."""
    kl, length = run["objective/kl_k3"], run["rollout/response_length"]
    if not len(kl) or kl.steps[0] != 1 or run.option("rollout.ahead"):
        return None
    per_token = kl.values[0] / max(length.logged[0], 1)
    if per_token <= (0.01 if run.low_precision else 1e-4):
        return None
    return f"the KL to the reference is {number(per_token)} nats per token before anything was learned"


@check(
    "negative-kl", "warning", PPO,
    "The completions do not come from the distribution whose log-probs are compared: top_k, top_p, min_new_tokens or a "
    "stale sampler make likely tokens more likely than the policy says.",
    "Leave out rollout.top_k, top_p and min_new_tokens; with a served sampler look at rollout/sampler_gap_mean.",
)  # fmt: skip
def negative_kl(run: Evidence) -> str | None:
    """k1 estimates a KL, whose expectation is never negative."""
    mean, error = run["objective/kl"].after(0.5).at_least().mean_and_error
    return f"the estimated KL is {number(mean)} nats on average" if mean < -max(3 * error, 0.3) else None


@check(
    "kl-estimators-disagree", "warning", PPO,
    "A few tokens have become nearly impossible for the policy or the reference, so the average says little; or the "
    "completions are sampled from a truncated distribution.",
    "Look at samples.jsonl for tokens that the reference would not write; raise kl.controller.coef.",
)  # fmt: skip
def estimators_disagree(run: Evidence) -> str | None:
    """k1 and k3 estimate the same KL."""
    k3, k1 = run["objective/kl_k3"], run["objective/kl"].at_least()
    if max(k1.last, k3.last) < 5:
        return None
    ratio = max(k3.last, 1e-9) / max(k1.last, 1e-9)
    if 0.1 <= ratio <= 10:
        return None
    return f"the KL is {number(k1.last)} nats per completion by k1 and {number(k3.last)} by k3"


# ---- the policy ----------------------------------------------------------------------------------------------------


@check(
    "policy-runs-away", "error", PPO,
    "The penalty is too weak for this reward or rate: the policy exploits the reward or degenerates.",
    "Raise kl.controller.coef (or use `adaptive` with a target), lower optimizer.policy_lr; take an earlier checkpoint "
    "and read samples.jsonl.",
)  # fmt: skip
def runs_away(run: Evidence) -> str | None:
    """KL per token stays far below the entropy of language."""
    length, kl = run["rollout/response_length"], run["objective/kl_k3"].at_least()
    per_token = kl.last / max(length.last, 1)
    if per_token < 1:
        return None
    return f"the policy is {number(per_token)} nats per token away from the reference ({number(kl.last)} in all)"


@check(
    "policy-does-not-move", "warning", PPO,
    "The learning rate is too small to change what the policy does, all advantages are 0, or only the critic learns.",
    "Raise optimizer.policy_lr tenfold; check that objective/scores_std is above 0 and critic.warmup_updates are over.",
)  # fmt: skip
def does_not_move(run: Evidence) -> str | None:
    """Each update changes the policy measurably."""
    moved = run["policy/approx_kl"]
    warmup = run.option("critic.warmup_updates", 0)
    learning = [value for step, value in zip(moved.steps, moved.values) if step > warmup]
    if len(learning) < WINDOW or max(learning) >= 1e-7:
        return None
    return f"no update moved the policy by more than {number(max(learning))} nats per token"


@check(
    "clipping-saturated", "warning", PPO,
    "Updates are too large: most of the gradient is thrown away by the clip.",
    "Lower optimizer.policy_lr or batch.epochs, or set loss.target_kl=0.05.",
)  # fmt: skip
def saturated(run: Evidence) -> str | None:
    """Few tokens are clipped."""
    clipped = run["policy/clipfrac"].at_least()
    if clipped.last < 0.3:
        return None
    return f"{clipped.last:.0%} of the tokens are clipped; 1% to 10% is healthy"


@check(
    "entropy-collapsed", "warning", PPO,
    "The policy writes the same completion whatever it is asked: the penalty or the bonus on entropy is too weak.",
    "Raise kl.controller.coef or set loss.entropy_coef=0.01, lower optimizer.policy_lr, and start from an earlier "
    "checkpoint.",
)  # fmt: skip
def entropy_collapsed(run: Evidence) -> str | None:
    """Entropy falls, but not to nothing."""
    entropy = run["objective/entropy"].at_least()
    if entropy.last >= 0.02 or entropy.last > 0.2 * entropy.first:
        return None
    return f"entropy fell from {number(entropy.first)} to {number(entropy.last)} nats per token"


@check(
    "entropy-explodes", "warning", PPO,
    "The policy turns into noise: the rate is too high, the entropy bonus too large, or the rewards are noise.",
    "Lower optimizer.policy_lr, set loss.entropy_coef=0, and check the reward on a few samples with `rlhf score`.",
)  # fmt: skip
def entropy_explodes(run: Evidence) -> str | None:
    """Entropy does not rise much."""
    entropy = run["objective/entropy"].at_least()
    if entropy.last < max(2 * entropy.first, entropy.first + 0.7):
        return None
    return f"entropy rose from {number(entropy.first)} to {number(entropy.last)} nats per token"


# ---- the completions -----------------------------------------------------------------------------------------------


@check(
    "never-ends", "warning", PPO,
    "Completions are cut off: max_new_tokens is too small, the policy never learned its end token (SFT with another "
    "template), or the reward favours length.",
    "Look at samples.jsonl; raise rollout.max_new_tokens, or set shaping.missing_eos={name: score, value: -1}.",
)  # fmt: skip
def never_ends(run: Evidence) -> str | None:
    """Completions end by themselves."""
    ended = run["rollout/eos_rate"].at_least()
    fixed = run.option("rollout.min_new_tokens", 0) >= run.option("rollout.max_new_tokens", 1)
    if fixed or ended.last >= 0.1:
        return None
    return f"{ended.last:.0%} of the completions end by themselves"


@check(
    "ends-at-once", "warning", PPO,
    "The policy answers with its end token: the reward punishes every answer, or the prompt already ends the turn.",
    "Read samples.jsonl; set rollout.min_new_tokens, and check the reward of short answers with `rlhf score`.",
)  # fmt: skip
def ends_at_once(run: Evidence) -> str | None:
    """Completions have more than an end token."""
    length = run["rollout/response_length"].at_least()
    if length.last >= 2:
        return None
    return f"completions have {number(length.last)} tokens on average"


@check(
    "length-drifts", "note", PPO,
    "The reward may prefer long answers, as many reward models do.",
    "Compare the reward model's accuracy with that of 'the longer answer wins' (reward_metrics.json); add a length "
    "penalty to the reward (`sum`).",
)  # fmt: skip
def length_drifts(run: Evidence) -> str | None:
    """The score does not rise by length alone."""
    scores, length = run["objective/scores"], run["rollout/response_length"].at_least(2 * WINDOW)
    if length.last < 2 * length.first or scores.last <= scores.first:
        return None
    return f"completions grew from {number(length.first)} to {number(length.last)} tokens while the score rose"


# ---- the reward ----------------------------------------------------------------------------------------------------


@check(
    "reward-constant", "error", PPO,
    "The reward does not depend on the completion: a function that always gives one value, a clip that cuts "
    "everything, or a reward model that fails.",
    "Score two different answers with `rlhf score` or your function; check shaping.clip_score.",
)  # fmt: skip
def reward_constant(run: Evidence) -> str | None:
    """Scores differ between completions."""
    spread = run["objective/scores_std"].at_least(3)
    if spread.last > 1e-6:
        return None
    return f"all completions of an update have the same score, {number(run['objective/scores'].last)}"


@check(
    "reward-explodes", "warning", PPO,
    "The policy left the range on which the reward model was trained, or the reward function has no bound.",
    "Set shaping.clip_score, raise kl.controller.coef, and look at the completions with the highest scores.",
)  # fmt: skip
def reward_explodes(run: Evidence) -> str | None:
    """Scores stay within the range that they start in."""
    spread, scores = run["objective/scores_std"], run["objective/scores"].at_least()
    unit = spread.first
    if unit < 1e-6 or (spread.last < 20 * unit and abs(scores.last - scores.first) < 50 * unit):
        return None
    return (
        f"scores went from {number(scores.first)} with a spread of {number(spread.first)} to"
        f" {number(scores.last)} with {number(spread.last)}"
    )


@check(
    "reward-falls", "warning", PPO,
    "The update does not follow the reward: the rate is too high, the KL penalty dominates, or the critic misleads.",
    "Lower optimizer.policy_lr; compare objective/rlhf_reward with objective/scores; set critic.warmup_updates=5.",
)  # fmt: skip
def reward_falls(run: Evidence) -> str | None:
    """Scores do not end clearly below their start."""
    spread, scores = run["objective/scores_std"], run["objective/scores"].at_least(2 * WINDOW)
    if scores.last > scores.first - max(spread.first, 1e-6):
        return None
    return f"the mean score fell from {number(scores.first)} to {number(scores.last)}"


# ---- the critic ----------------------------------------------------------------------------------------------------


@check(
    "critic-useless", "warning", PPO,
    "The critic predicts the returns worse than a constant: too low a rate, no warm-up, or values clipped.",
    "Raise optimizer.critic_lr or critic.warmup_updates, set loss.value_clip=null, or use an advantage without a "
    "critic (`rloo`, `grpo`).",
)  # fmt: skip
def critic_useless(run: Evidence) -> str | None:
    """After the first updates the critic explains some of the returns."""
    explained = run["val/explained_variance"].at_least(2 * WINDOW)
    if explained.after(0.5).median >= 0:
        return None
    return f"the critic's explained variance is {number(explained.last)}; a constant has 0"


@check(
    "value-clipping-saturated", "note", PPO,
    "Values change more in an update than loss.value_clip allows, so the critic learns slowly.",
    "Raise loss.value_clip or set it to null; normalise the scores (shaping.normalize_scores=true).",
)  # fmt: skip
def value_clipping(run: Evidence) -> str | None:
    """Few values are clipped."""
    clipped = run["val/clipfrac"].at_least(2 * WINDOW)
    if clipped.last < 0.5:
        return None
    return f"{clipped.last:.0%} of the value losses are clipped"
