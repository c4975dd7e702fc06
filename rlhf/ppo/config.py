"""Config of the PPO stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import AdamWConfig, Fraction, LogConfig, ModelConfig, Paths, StageConfig, Strict
from rlhf.core.table import Pick
from rlhf.guard.config import GoldConfig, GuardConfig
from rlhf.ppo.advantages import ADVANTAGES
from rlhf.ppo.kl import KL_CONTROLLERS, KL_ESTIMATORS, MISSING_EOS
from rlhf.reward.sources import REWARDS, model_terms
from rlhf.rollout.samplers import SAMPLERS, unsupported_options
from rlhf.tuning.methods import TUNING


class PPOModelConfig(ModelConfig):
    sharing: Literal["separate", "shared"] = "separate"
    """`separate`: policy, critic, reward model and reference are separate models. `shared`: they are adapters on one
    frozen base model, in one engine. `shared` needs `lora`, `qlora` or `bottleneck` for every trained role; see
    docs/shared-base.md."""


class PPODataConfig(Strict):
    prompts: Paths
    """Datasets of any kind. Only the prompts of their records are used."""
    eval: Paths = []
    """Held-out datasets. The default is the `eval` split of `prompts`."""
    ptx: Paths = []
    """Datasets of demonstrations for the PPO-ptx term (InstructGPT eq. 2). Set `loss.ptx_coef` too."""
    max_prompt_tokens: PositiveInt = 256
    """Longest prompt. Longer prompts lose their oldest tokens; how many were cut is printed."""


class CriticConfig(Strict):
    init: Literal["reward", "policy"] = "reward"
    """What to start from: `reward` is the trained reward model (the first one, if there are several), `policy` is the
    policy with a new value head."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """Which weights of the critic to train besides the value head: a row of the tuning table with its options."""
    warmup_updates: NonNegativeInt = 0
    """Number of updates at the start in which only the critic is trained."""


class RolloutConfig(Strict):
    sampler: Annotated[Pick, SAMPLERS] = SAMPLERS.pick("hf")
    """What generates completions: a row of the table of samplers with its options."""
    prompts_per_update: PositiveInt = 64
    """Prompts per update, summed over all processes."""
    samples_per_prompt: PositiveInt = 1
    """Completions per prompt. An update has prompts_per_update x samples_per_prompt episodes."""
    max_new_tokens: PositiveInt = 128
    """Longest completion, in tokens. Longer ones are cut off."""
    min_new_tokens: NonNegativeInt = 0
    """Shortest completion, in tokens. Until then the end tokens have probability zero."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. Logits are divided by it, both in sampling and in all log-probs of the update."""
    top_k: NonNegativeInt = 0
    """Sample among the k most likely tokens only; 0 is off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the most likely tokens whose probabilities sum to this (nucleus sampling); 1 is off."""
    stop: list[str] = []
    """Strings that also end a completion."""
    batch_size: PositiveInt = 64
    """Sequences to decode at the same time on one process."""
    merge_adapters: bool = False
    """Merge the policy's adapter into its weights during rollouts. Sampling is then as fast as without an adapter, at
    the cost of a second copy of the adapted weights. Weights in 4 bits are not merged. The samplers `vllm` and
    `vllm-server` get merged weights instead of only the adapter; `process` always does."""
    ahead: Literal[0, 1] = 0
    """1: the completions of the next update are sampled while the trainer learns, with the weights from before this
    update; needs a sampler with a process of its own (`process`, `vllm-server`). Importance weights correct for the
    older weights."""
    max_importance_weight: Annotated[float, Field(ge=1)] | None = 2.0
    """Truncated importance sampling (Yao et al. 2025) for samplers that report their own log-probs (`process`,
    `transformers`, `vllm`, `vllm-server`): each token's policy loss is multiplied by exp(trainer's log-prob - sampler's
    log-prob), at most by this. `null` is off. Unused by the `hf` sampler, whose log-probs equal the trainer's."""

    def faults(self) -> Iterator[str]:
        if self.min_new_tokens > self.max_new_tokens:
            yield f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
        sampler = self.sampler.name
        if cannot := unsupported_options(sampler, self):
            yield f"sampler {sampler!r} does not support {' or '.join(cannot)}; leave it out, or use hf"
        if self.ahead and "start" not in self.sampler.row.traits:
            able = " or ".join(row.name for row in SAMPLERS if "start" in row.traits)
            yield f"ahead: {sampler!r} does not sample while the trainer learns; use sampler {able}"
        if self.ahead and self.max_importance_weight is None:
            yield "ahead: needs max_importance_weight, because completions come from older weights"
        weighted = self.sampler.row.traits.get("logprobs", False) and self.max_importance_weight is not None
        if weighted and (self.top_k or self.top_p < 1 or self.min_new_tokens):
            yield (
                f"sampler {sampler!r}: importance weights need the whole distribution, but top_k, top_p and"
                " min_new_tokens truncate it; leave these out, or set max_importance_weight: null"
            )


class KLConfig(Strict):
    estimator: Annotated[Pick, KL_ESTIMATORS] = KL_ESTIMATORS.pick("k1")
    """Estimator of the per-token KL penalty: a row of that table."""
    controller: Annotated[Pick, KL_CONTROLLERS] = KL_CONTROLLERS.pick({"name": "fixed", "coef": 0.05})
    """Coefficient of the KL penalty: a row of that table. `fixed` keeps `coef`; `adaptive` steers the KL to a target
    (Ziegler et al. 2019)."""


class ShapingConfig(Strict):
    clip_score: PositiveFloat | None = None
    """Clip scores to [-clip_score, clip_score]. The default is no clipping."""
    normalize_scores: bool = False
    """Normalise scores by their running mean and standard deviation, which checkpoints save."""
    missing_eos: Annotated[Pick, MISSING_EOS] = MISSING_EOS.pick("keep")
    """Score of a completion that was cut off before an end token: a row of that table."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation, without shifting their mean."""


class PPOLossConfig(Strict):
    clip_low: PositiveFloat = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the ratio for negative advantages (dual-clip PPO, Ye et al. 2020). The default is no bound."""
    value_clip: PositiveFloat | None = 0.2
    """Clip the change of a value since the rollout to this; `null` is off."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the value loss in the total loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus in the total loss."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the loss on demonstrations (gamma in InstructGPT eq. 2)."""
    ptx_batch_size: PositiveInt = 8
    """Demonstrations per optimizer step for the ptx term, summed over all processes."""
    target_kl: PositiveFloat | None = None
    """End an update early if the KL between the rollout's policy and the new one (k3 estimate) exceeds this.
    The default never ends it early."""


class PPOBatchConfig(Strict):
    epochs: PositiveInt = 4
    """Passes over the episodes of an update."""
    minibatches: PositiveInt = 4
    """Optimizer steps per epoch."""
    micro_batch_tokens: PositiveInt = 2048
    """Most tokens per forward pass of one process, padding included. A longer sequence is a micro-batch of its own."""
    packing: bool | None = None
    """Concatenate the sequences of a micro-batch into one row without padding. By default this is on for attention
    implementations with variable lengths (`flash_attention_2`, ...), and for `sdpa` on a CPU, which is then called once
    per sequence. `eager` also supports it, but its attention mask costs more than padding does."""


class PPOOptimizerConfig(AdamWConfig):
    policy_lr: PositiveFloat = 1e-6
    """Peak learning rate of the policy."""
    critic_lr: PositiveFloat = 5e-6
    """Peak learning rate of the critic."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How both learning rates fall from their peak to zero over the updates; `constant` keeps the peak."""
    warmup: Fraction = 0.0
    """Fraction of the updates in which the learning rates rise linearly to their peak."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's two decay rates."""
    eps: PositiveFloat = 1e-5
    """AdamW's epsilon. OpenAI's implementation also uses 1e-5."""


class PPOScoreConfig(Strict):
    policy: Literal["recompute", "sampler"] = "recompute"
    """Where the policy's log-probs before the update come from. `recompute`: a pass over prompts and completions with
    the trainer's own operations, so that the first ratio is exactly 1. `sampler`: what the sampler computed for each
    token, which saves that pass; the first ratio then differs from 1 by rounding (see `policy/first_ratio_max`), and
    `objective/entropy` is estimated from the sampled tokens."""


class PPOEvalConfig(Strict):
    every: PositiveInt = 10
    """Updates between evaluations on held-out prompts."""
    prompts: NonNegativeInt = 32
    """How many held-out prompts to complete and score. The completions go to samples.jsonl."""


class PPOLogConfig(LogConfig):
    record_every: NonNegativeInt = 50
    """Record the first update and then every N-th in the run's `updates/`: tokens, log-probs, values, rewards,
    advantages, about 36 bytes per response token. `rlhf replay` shows and recomputes them. 0 records none."""
    record_keep: PositiveInt = 10
    """How many recorded updates to keep on disk: the first and the newest."""
    token_samples: NonNegativeInt = 16
    """Completions per evaluation for which samples.jsonl has each token's log-probs, value, reward and advantage.
    `rlhf report` shows them."""


class PPOConfig(StageConfig):
    model: PPOModelConfig
    """The policy to start from. A frozen copy of it is the reference."""
    data: PPODataConfig
    reward: Annotated[Pick, REWARDS]
    """What scores completions: a row of the table of reward sources with its options."""
    updates: PositiveInt = 100
    """Number of updates; each is a rollout followed by several optimizer steps."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """Which weights of the policy to train: a row of the tuning table with its options. With an adapter, the policy
    without its adapter is the reference."""
    critic: CriticConfig = CriticConfig()
    rollout: RolloutConfig = RolloutConfig()
    kl: KLConfig = KLConfig()
    shaping: ShapingConfig = ShapingConfig()
    advantage: Annotated[Pick, ADVANTAGES] = ADVANTAGES.pick("gae")
    """The advantage estimator: a row of that table with its options. No critic is loaded for estimators without one."""
    loss: PPOLossConfig = PPOLossConfig()
    batch: PPOBatchConfig = PPOBatchConfig()
    optimizer: PPOOptimizerConfig = PPOOptimizerConfig()
    score: PPOScoreConfig = PPOScoreConfig()
    eval: PPOEvalConfig = PPOEvalConfig()
    gold: GoldConfig | None = None
    """A reward that is not trained on, to tell real improvement from reward hacking; see docs/guard.md."""
    guard: GuardConfig = GuardConfig()
    """Rules that detect over-optimisation of the reward, and what to do when one fires; see docs/guard.md."""
    log: PPOLogConfig = PPOLogConfig()
    compile: bool = False
    """Compile the layers of policy and critic with torch.compile (one graph for all lengths). This takes up to a minute
    at the start and makes later passes faster. The first ratio then equals 1 only up to rounding. Not supported under
    ZeRO stage 3."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        episodes = self.rollout.prompts_per_update * self.rollout.samples_per_prompt
        if self.batch.minibatches > episodes:
            yield f"batch.minibatches {self.batch.minibatches} is more than the {episodes} episodes"
        least = self.advantage.row.traits["min_group"]
        if self.rollout.samples_per_prompt < least:
            yield f"advantage {self.advantage.name!r} needs rollout.samples_per_prompt >= {least}"
        if self.needs_critic and self.critic.init == "reward" and self.reward_model is None:
            yield "critic.init: `reward` needs a reward model in the reward source; set `critic.init: policy`"
        if (self.loss.ptx_coef > 0) != bool(self.data.ptx):
            yield "loss.ptx_coef and data.ptx: set both or neither"
        for key, pick in (("tuning", self.tuning), ("critic.tuning", self.critic.tuning)):
            if pick.row.traits["prompt_learning"] and self.batch.packing:
                yield (
                    f"batch.packing: only the first sequence of a row would see the virtual tokens of {key}; leave it"
                    " out"
                )
            if pick.options.get("dropout"):
                yield (f"{key}.dropout: PPO's ratio needs the same log-probs in scoring and learning; leave it out")
        traits = self.tuning.row.traits
        if self.rollout.merge_adapters and not (traits["adapter"] and traits["merges"]):
            yield f"rollout.merge_adapters: tuning {self.tuning.name!r} has no adapter that can be merged"
        sampler = self.rollout.sampler
        if sampler.row.traits.get("merged") and not traits["merges"]:
            unmerged = f"merged weights, and {self.tuning.name!r} cannot be merged"
            yield f"rollout.sampler: `{sampler.name}` gets {unmerged}"
        rollout = self.rollout
        if traits["prompt_learning"] and not rollout.sampler.row.traits.get("virtual_tokens", True):
            yield f"rollout.sampler: {rollout.sampler.name!r} does not support virtual tokens; use `hf`"
        if self.gradient_checkpointing and self.needs_critic and self.critic.tuning.name == "prefix-tuning":
            yield "gradient_checkpointing: does not work with critic.tuning `prefix-tuning`"
        truncated = rollout.top_k or rollout.top_p < 1 or rollout.min_new_tokens
        if self.score.policy == "sampler" and rollout.sampler.name != "hf" and truncated:
            yield (
                f"score.policy: with top_k, top_p or min_new_tokens the sampler {rollout.sampler.name!r} reports no"
                " log-probs; use `recompute`"
            )
        if self.model.sharing == "shared":
            yield from self._sharing_faults()
        if self.rollout.ahead and self.score.policy == "sampler":
            yield "score.policy: with rollout.ahead the sampler has older weights; use `recompute`"
        yield from self._guard_faults()

    def _guard_faults(self) -> Iterator[str]:
        """Settings of the guard that would have no effect."""
        guard = self.guard
        rules = [rule.name for rule in guard.rules]
        yield from (f"guard.rules: {name!r} is named twice" for name in dict.fromkeys(rules) if rules.count(name) > 1)
        yield from (f"guard.actions: {name!r} is not in guard.rules" for name in guard.actions if name not in rules)
        raises = "raise-kl" in [action.name for action in (guard.action, *guard.actions.values())]
        if raises and self.kl.controller.options.get("coef") == 0:
            yield "guard: `raise-kl` multiplies kl.controller.coef, which is 0; set it above 0"

    def _sharing_faults(self) -> Iterator[str]:
        """Settings that do not work with one base model for several roles."""
        picks = {"tuning": self.tuning} | ({"critic.tuning": self.critic.tuning} if self.needs_critic else {})
        for key, pick in picks.items():
            if not pick.row.traits["roles"]:
                yield f"{key}: model.sharing `shared` needs `lora`, `qlora` or `bottleneck`, got {pick.name!r}"
            elif pick.name != self.tuning.name:
                yield f"{key}: model.sharing `shared` needs the same method as tuning, {self.tuning.name!r}"
        if self.compile:
            yield "compile: not supported with model.sharing `shared`, whose layers switch adapters"

    @property
    def needs_critic(self) -> bool:
        return bool(self.advantage.row.traits["needs_critic"])

    @property
    def reward_model(self) -> str | None:
        """Path of the first reward model in the reward source: the model itself, a member of an ensemble, or a term of
        a sum; None without one."""
        return next((str(term["path"]) for term in model_terms(self.reward)), None)

    @property
    def onlookers(self) -> dict[str, Pick]:
        """The reward sources that score completions but do not train the policy, by their key in the config."""
        found = {"gold.reward": self.gold.reward if self.gold else None, "guard.watch": self.guard.watch}
        return {key: pick for key, pick in found.items() if pick is not None}
