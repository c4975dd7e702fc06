"""Which models a config brings together, and how large its largest batches are, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.base import ModelConfig, StageConfig
from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.models.load import load_hf_config, sequence_limit
from rlhf.ppo.config import PPOConfig
from rlhf.reward.config import RewardConfig
from rlhf.runs.run import resolve_model_path
from rlhf.sft.config import SFTConfig

# ---- who is there ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """A model of a run."""

    name: str
    path: str
    scalar: bool
    """It has a scalar head in place of the language model's."""
    tuning: Pick | None
    """What of it is trained; None for a frozen one, which stands beside the engine in the computation's dtype."""
    shares: bool = False
    """Its weights are the policy's, but for an adapter and a head of its own."""


def roles(config: StageConfig) -> list[Role]:
    """The models that a stage holds at the same time. Those that are trained come first."""
    if isinstance(config, SFTConfig):
        return [Role("policy", config.model.path, False, config.tuning)]
    if isinstance(config, RewardConfig):
        return [Role("reward model", config.model.path, True, config.tuning)]
    assert isinstance(config, PPOConfig)
    path, found = config.model.path, [Role("policy", config.model.path, False, config.tuning)]
    shared = config.model.sharing == "shared"
    if config.needs_critic:
        start = str(config.reward_model) if config.critic.init == "reward" else path
        found.append(Role("critic", start, True, config.critic.tuning, shared))
    if not config.tuning.row.traits["adapter"]:
        found.append(Role("reference", path, False, None))
    terms = config.reward.options["terms"] if config.reward.name == "sum" else [config.reward.options]
    paths = [term["path"] for term in terms if "path" in term]
    return found + [Role("reward model", p, True, None, shared and p == config.reward_model) for p in paths]


def architecture(config: ModelConfig, path: str, base: str | None = None) -> Any:
    """The Hugging Face config of a model on this disk; of `base` where `path` is a run that is still to come.

    Raises:
        UserError: No config.json there. Nothing is downloaded for a prediction.
    """
    for place in (path, base):
        try:
            folder = Path(resolve_model_path(place)) if place else None
        except UserError:  # a run of an earlier stage, not made or not finished yet
            folder = None
        if folder is not None and (folder / "config.json").is_file():
            return load_hf_config(config, str(folder))
    where = path if base is None else f"{path}, and --base {base} too,"
    raise UserError(
        f"{where} is neither a folder with a config.json nor a finished run",
        "The prediction needs the model's shapes; it downloads nothing.",
        "Name a local folder, such as `hf download NAME config.json --local-dir FOLDER` makes, with --base FOLDER.",
    )


# ---- how much work -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchShape:
    """The largest batches of one process, as far as the config bounds them. Lengths are in tokens."""

    rows: int
    """Sequences of a micro-batch."""
    width: int
    """Of the longest sequence."""
    wanted: int
    """Tokens of a micro-batch whose log-probs are asked for."""
    passes: int
    """Micro-batches of an optimizer step."""
    sequences: int = 0
    """Decoded together in a rollout."""
    prompt: int = 0
    """Longest prompt."""
    joins: bool = False
    """Whether further prompts enter while others are decoded."""


def batch_shape(
    config: StageConfig, limit: int, processes: int, longest: int | None = None, answers: int = 2
) -> BatchShape:
    """The work of a config.

    Args:
        config: A stage's config.
        limit: Longest sequence that the model takes.
        processes: How many share the work.
        longest: Tokens of the longest prompt (PPO) or row (other stages), where the data are known.
        answers: Candidates of a ranking (reward model).
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
    assert isinstance(config, SFTConfig | RewardConfig)
    share = max(1, config.batch.batch_size // processes)
    micro, width = min(config.batch.micro_batch_size, share), min(longest or limit, limit)
    rows = micro * answers if isinstance(config, RewardConfig) else micro
    wanted = rows if isinstance(config, RewardConfig) else rows * (width - 1)
    return BatchShape(rows, width, wanted, math.ceil(share / micro))


def limit_of(config: StageConfig, passes_base: str | None = None) -> int:
    """The longest sequence of a config's first model."""
    return sequence_limit(config.model, architecture(config.model, config.model.path, passes_base))
