"""Config of the PPO stage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf.config.base import AdamWConfig, Fraction, ModelConfig, Paths, StageConfig, Strict
from rlhf.core.table import Pick
from rlhf.models.tuning import TUNING
from rlhf.ppo.advantages import ADVANTAGES
from rlhf.ppo.kl import KL_CONTROLLERS, KL_ESTIMATORS, MISSING_EOS
from rlhf.reward.sources import REWARDS
from rlhf.rollout.samplers import SAMPLERS, unsupported_options


class PPOModelConfig(ModelConfig):
    sharing: Literal["separate", "shared"] = "separate"
    """`shared`: one frozen base with an adapter for each role serves as policy, critic, reward model and reference,
    in one engine. Needs `lora` or `qlora` for all that is trained; see docs/shared-base.md."""


class PPODataConfig(Strict):
    prompts: Paths
    """Datasets whose prompts are answered (of any kind; rankings and demonstrations give their prompts)."""
    eval: Paths = []
    """Held-out datasets; when left out, the `eval` split of `prompts`."""
    ptx: Paths = []
    """Demonstrations for the PPO-ptx term (InstructGPT eq. 2); needs `loss.ptx_coef`."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts keep their end: the oldest tokens are cut, and counted."""


class CriticConfig(Strict):
    init: Literal["reward", "policy"] = "reward"
    """Start from the trained reward model, or from the policy with a new value head."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """What is trained besides the value head."""
    warmup_updates: NonNegativeInt = 0
    """Updates at the start in which only the critic learns."""


class RolloutConfig(Strict):
    sampler: Annotated[Pick, SAMPLERS] = SAMPLERS.pick("hf")
    """A row of the table of samplers."""
    prompts_per_update: PositiveInt = 64
    """Prompts per update over all processes."""
    samples_per_prompt: PositiveInt = 1
    """Answers to each prompt; an update has prompts_per_update x samples_per_prompt episodes."""
    max_new_tokens: PositiveInt = 128
    """An answer is cut off after so many tokens."""
    min_new_tokens: NonNegativeInt = 0
    """The end-of-answer tokens are barred until an answer has so many tokens."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it, when sampling and in every log-prob of the update."""
    top_k: NonNegativeInt = 0
    """Sample among the k likeliest tokens; 0 is off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    stop: list[str] = []
    """An answer also ends after any of these strings."""
    batch_size: PositiveInt = 64
    """Sequences that are generated together on one process."""
    merge_adapters: bool = False
    """Merge the policy's adapter into its weights while it samples: as fast as without an adapter, for a second copy of
    the adapted weights. What is in 4 bits stays so."""
    max_importance_weight: Annotated[float, Field(ge=1)] | None = 2.0
    """Where a sampler reports its own log-probs (`transformers`, `vllm`), each token's policy loss is multiplied by
    exp(trainer's - sampler's log-prob), cut at this (truncated importance sampling, Yao et al. 2025); `null` is off.
    Unused by the `hf` sampler, whose log-probs equal the trainer's."""

    @model_validator(mode="after")
    def _parts_fit(self) -> RolloutConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        sampler = self.sampler.name
        if cannot := unsupported_options(sampler, self):
            raise ValueError(f"sampler {sampler!r} cannot do {' or '.join(cannot)}; leave it out, or use hf")
        weighted = self.sampler.row.traits.get("logprobs", False) and self.max_importance_weight is not None
        if weighted and (self.top_k or self.top_p < 1 or self.min_new_tokens):
            raise ValueError(
                f"sampler {sampler!r}: importance weights compare whole distributions, and top_k, top_p and"
                " min_new_tokens narrow what is sampled; leave these out, or set max_importance_weight: null"
            )
        return self


class KLConfig(Strict):
    estimator: Annotated[Pick, KL_ESTIMATORS] = KL_ESTIMATORS.pick("k1")
    """Of the per-token KL penalty."""
    controller: Annotated[Pick, KL_CONTROLLERS] = KL_CONTROLLERS.pick({"name": "fixed", "coef": 0.05})
    """`fixed` or `adaptive` (Ziegler 2019)."""


class ShapingConfig(Strict):
    clip_score: PositiveFloat | None = None
    """Scores are clipped to +- this."""
    normalize_scores: bool = False
    """Scale scores by their running mean and standard deviation (saved in checkpoints)."""
    missing_eos: Annotated[Pick, MISSING_EOS] = MISSING_EOS.pick("keep")
    """What happens to the score of an answer that was cut off before its end: a row of that table."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation; the mean stays."""


class PPOLossConfig(Strict):
    clip_low: PositiveFloat = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on ratio x |advantage| where the advantage is negative (Ye et al. 2020)."""
    value_clip: PositiveFloat | None = 0.2
    """New values stay within this of the rollout's; `null` is off."""
    value_coef: NonNegativeFloat = 0.5
    """Weight of the value loss in the sum."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the instruction-tuning loss (gamma in InstructGPT eq. 2)."""
    ptx_batch_size: PositiveInt = 8
    """Demonstrations per optimizer step in the ptx term, over all processes."""
    target_kl: PositiveFloat | None = None
    """Stop the epochs of an update once the KL (k3) between the new policy and the rollout's exceeds this."""


class PPOBatchConfig(Strict):
    epochs: PositiveInt = 4
    """Passes over the episodes of one update."""
    minibatches: PositiveInt = 4
    """Optimizer steps per epoch."""
    micro_batch_tokens: PositiveInt = 2048
    """Most tokens, padding included, in one forward pass of one process; longer sequences go alone."""
    packing: bool | None = None
    """Put the sequences of a micro-batch into one row, without padding. When left out: on with an attention of
    variable lengths (`flash_attention_2`, ...), and with `sdpa` on a CPU, where it is called for each sequence. `eager`
    can pack too, but its mask costs more than padding of similar lengths does."""


class PPOOptimizerConfig(AdamWConfig):
    policy_lr: PositiveFloat = 1e-6
    """The policy's peak learning rate."""
    critic_lr: PositiveFloat = 5e-6
    """The critic's peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How both learning rates fall to zero over the updates (`constant` stays)."""
    warmup: Fraction = 0.0
    """Fraction of the updates over which the learning rates climb to their peak."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's two decay rates."""
    eps: PositiveFloat = 1e-5
    """AdamW's epsilon (1e-5 in OpenAI's implementation)."""


class PPOEvalConfig(Strict):
    every: PositiveInt = 10
    """Updates between evaluations on held-out prompts."""
    prompts: NonNegativeInt = 32
    """How many held-out prompts are answered and scored; the answers go to samples.jsonl."""


class PPOConfig(StageConfig):
    model: PPOModelConfig
    """The policy to start from; a frozen copy is the reference."""
    data: PPODataConfig
    reward: Annotated[Pick, REWARDS]
    """Where scores come from: a row of the table of reward sources with its options."""
    updates: PositiveInt = 100
    """Rollout-and-learn rounds."""
    tuning: Annotated[Pick, TUNING] = TUNING.pick("full")
    """What of the policy is trained. With an adapter, the policy without it is the reference."""
    critic: CriticConfig = CriticConfig()
    rollout: RolloutConfig = RolloutConfig()
    kl: KLConfig = KLConfig()
    shaping: ShapingConfig = ShapingConfig()
    advantage: Annotated[Pick, ADVANTAGES] = ADVANTAGES.pick("gae")
    """A row of the table of advantage estimators with its options; those without a critic allocate none."""
    loss: PPOLossConfig = PPOLossConfig()
    batch: PPOBatchConfig = PPOBatchConfig()
    optimizer: PPOOptimizerConfig = PPOOptimizerConfig()
    eval: PPOEvalConfig = PPOEvalConfig()
    compile: bool = False
    """Compile the layers of policy and critic (torch.compile, one graph for all lengths): up to a minute at the start,
    then faster passes. The first ratio may then be 1 to rounding only. Not under ZeRO stage 3."""

    renamed_keys: ClassVar[dict[str, str]] = {
        "update.epochs": "batch.epochs",
        "update.minibatches": "batch.minibatches",
        "update.micro_batch_tokens": "batch.micro_batch_tokens",
        "update.packing": "batch.packing",
        "update.target_kl": "loss.target_kl",
        "update.compile": "compile",
        "update.critic_warmup": "critic.warmup_updates",
        "update.gradient_checkpointing": "gradient_checkpointing",
    }

    @model_validator(mode="after")
    def _parts_fit(self) -> PPOConfig:
        faults = []
        episodes = self.rollout.prompts_per_update * self.rollout.samples_per_prompt
        if self.batch.minibatches > episodes:
            faults.append(f"batch.minibatches {self.batch.minibatches} is above the {episodes} episodes")
        least = self.advantage.row.traits["min_group"]
        if self.rollout.samples_per_prompt < least:
            faults.append(f"advantage {self.advantage.name!r} needs rollout.samples_per_prompt >= {least}")
        if self.needs_critic and self.critic.init == "reward" and self.reward_model is None:
            faults.append("critic.init: `reward` needs a reward of kind `model`; set `critic.init: policy`")
        if (self.loss.ptx_coef > 0) != bool(self.data.ptx):
            faults.append("loss.ptx_coef and data.ptx: set both or neither")
        for key, pick in (("tuning", self.tuning), ("critic.tuning", self.critic.tuning)):
            if pick.row.traits["prompt_learning"]:
                faults.append(f"{key}: {pick.name!r} is for SFT alone: log-probs and values do not see virtual tokens")
            if pick.options.get("dropout"):
                faults.append(
                    f"{key}.dropout: PPO's ratio needs the same numbers in scoring and learning; leave it out"
                )
        if self.rollout.merge_adapters and not self.tuning.row.traits["adapter"]:
            faults.append(f"rollout.merge_adapters: tuning {self.tuning.name!r} has no adapter")
        if self.model.sharing == "shared":
            faults += self._sharing_faults()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _sharing_faults(self) -> list[str]:
        """What one base for several roles rules out."""
        faults = []
        picks = {"tuning": self.tuning} | ({"critic.tuning": self.critic.tuning} if self.needs_critic else {})
        for key, pick in picks.items():
            if not pick.row.traits["roles"]:
                faults.append(f"{key}: {pick.name!r} with model.sharing `shared`, which needs `lora` or `qlora`")
            elif pick.name != self.tuning.name:
                faults.append(f"{key}: {pick.name!r} beside tuning {self.tuning.name!r}: they lie over one base")
        if self.compile:
            faults.append("compile: not with model.sharing `shared`, whose layers change their adapters")
        return faults

    @property
    def needs_critic(self) -> bool:
        return bool(self.advantage.row.traits["needs_critic"])

    @property
    def reward_model(self) -> str | None:
        """The path of the reward model, where the reward is one (or a sum with one)."""
        if self.reward.name == "sum":
            return next((t["path"] for t in self.reward.options["terms"] if t["name"] == "model"), None)
        return self.reward.options.get("path")
