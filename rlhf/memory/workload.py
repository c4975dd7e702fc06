"""The models of a config and the shapes of its largest batches, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.base import ModelConfig, StageConfig
from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.dpo.config import DPOConfig
from rlhf.models.adapters import adapter_base, is_adapter
from rlhf.models.load import load_hf_config, sequence_limit
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.reward.sources import model_terms
from rlhf.runs.parents import resolve_model_path
from rlhf.sft.config import SFTConfig
from rlhf.specialist.config import SpecialistConfig

# ---- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """A model of a run."""

    name: str
    path: str
    scalar: bool
    """Whether it has a scalar head instead of the language model's head."""
    tuning: Pick | None
    """How it is trained; None for a frozen model, which is kept outside the engine in the compute dtype."""
    shares: bool = False
    """Whether it shares the policy's weights and has only an adapter and a head of its own."""

    @property
    def whole(self) -> bool:
        """Whether each process holds all of it under every ZeRO stage."""
        return self.name == "teacher"


def roles(config: StageConfig) -> list[Role]:
    """The models that a stage holds at the same time, trained models first."""
    path = config.model.path
    if isinstance(config, SpecialistConfig):  # a head with a score for each label is as small as that of one score
        return [Role("specialist", path, True, config.tuning)]
    if isinstance(config, RewardConfig):
        return [Role("reward model", path, True, config.tuning)]
    assert isinstance(config, SFTConfig | DPOConfig | PPOConfig)
    found = [Role("policy", path, False, config.tuning)]
    if isinstance(config, SFTConfig) and config.distillation is not None and config.distillation.logits is not None:
        found.append(Role("teacher", config.distillation.logits.teacher, False, None))
    if not isinstance(config, PPOConfig):
        return found
    shared = config.model.sharing == "shared"
    if config.needs_critic:
        start = str(config.reward_model) if config.critic.init == "reward" else path
        found.append(Role("critic", start, True, config.critic.tuning, shared))
    if not config.tuning.row.traits["adapter"] or (not shared and _goes_on_with_an_adapter(path)):
        found.append(Role("reference", path, False, None))
    paths = [term["path"] for term in model_terms(config.reward)]
    found += [Role("reward model", p, True, None, shared and p == config.reward_model) for p in paths]
    onlookers = [term["path"] for pick in config.onlookers.values() for term in model_terms(pick)]
    return found + [Role("onlooker", p, True, None) for p in onlookers if not (shared and p == config.reward_model)]


def _goes_on_with_an_adapter(path: str) -> bool:
    try:
        return is_adapter(resolve_model_path(path))
    except UserError:  # a run that does not exist yet
        return False


def architecture(config: ModelConfig, path: str, base: str | None = None) -> Any:
    """The Hugging Face config of a model on this disk; that of `base` if `path` is a run that does not exist yet.

    Raises:
        UserError: No config.json there. Nothing is downloaded for a prediction.
    """
    for place in (path, base):
        try:
            folder = Path(resolve_model_path(place)) if place else None
        except UserError:  # a run of an earlier stage that does not exist or is not finished
            folder = None
        if folder is not None and is_adapter(folder):
            folder = Path(str(adapter_base(folder)))
        if folder is not None and (folder / "config.json").is_file():
            found = load_hf_config(config, str(folder))
            if found.is_encoder_decoder:
                raise UserError(
                    f"{place}: memory is not predicted for encoder-decoders ({found.model_type})",
                    "The prediction does not trace an encoder and a decoder that read different tokens.",
                    "Start the run: its last line says what a process took at most.",
                )
            return found
    where = path if base is None else f"{path}, and --base {base} too,"
    raise UserError(
        f"{where} is neither a folder with a config.json nor a finished run",
        "The prediction needs the model's shapes; it downloads nothing.",
        "Name a local folder, such as `hf download NAME config.json --local-dir FOLDER` makes, with --base FOLDER.",
    )


# ---- batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchShape:
    """The largest batches of one process within the limits of the config. Lengths are in tokens."""

    rows: int
    """Sequences in a micro-batch."""
    width: int
    """Length of the longest sequence."""
    selected: int
    """Tokens in a micro-batch whose log-probs are computed."""
    micro_batches: int
    """Micro-batches in an optimizer step."""
    sequences: int = 0
    """Sequences that are decoded together in a rollout."""
    prompt: int = 0
    """Length of the longest prompt."""
    joins: bool = False
    """Whether more prompts enter while others are decoded."""


def batch_shape(
    config: StageConfig, limit: int, processes: int, longest: int | None = None, answers: int = 2
) -> BatchShape:
    """The largest batches of a config.

    Args:
        config: A stage's config.
        limit: The longest sequence of the model.
        processes: Number of processes.
        longest: Tokens of the longest prompt (PPO) or row (other stages), if known.
        answers: Candidates of a ranking (reward model and DPO).
    """
    if isinstance(config, PPOConfig):
        new = config.rollout.max_new_tokens
        prompt = max(1, min(longest or config.data.max_prompt_tokens, limit - new))
        episodes = config.rollout.prompts_per_update * config.rollout.samples_per_prompt
        share = math.ceil(math.ceil(episodes / config.batch.minibatches) / processes)
        rows = min(share, max(1, config.batch.micro_batch_tokens // (prompt + new)))
        mine = math.ceil(episodes / processes)
        return BatchShape(
            rows, prompt + new, rows * new, math.ceil(share / rows), min(mine, config.rollout.batch_size), prompt,
            mine > config.rollout.batch_size,
        )  # fmt: skip
    assert isinstance(config, SFTConfig | RewardConfig | DPOConfig | SpecialistConfig)
    share = max(1, config.batch.batch_size // processes)
    micro, width = min(config.batch.micro_batch_size, share), min(longest or limit, limit)
    rows = micro * answers if isinstance(config, RewardConfig | DPOConfig) else micro
    selected = rows if isinstance(config, RewardConfig | SpecialistConfig) else rows * (width - 1)
    return BatchShape(rows, width, selected, math.ceil(share / micro))


def limit_of(config: StageConfig, base: str | None = None) -> int:
    """The longest sequence of a config's first model."""
    return sequence_limit(config.model, architecture(config.model, config.model.path, base))
