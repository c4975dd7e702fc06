"""The config of a pipeline: the stages in order, and rounds of new rankings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf.config.base import Strict


class RoundsConfig(Strict):
    count: PositiveInt
    """Number of rounds after the first training: propose answers, wait until people have ranked them, train again."""
    folder: str
    """Folder of a round, with `{round}` for its number: `datasets/mine/round-{round}`. The proposals are written to
    `candidates` in it; rankings are read from `rankings*`, datasets or `.jsonl` files."""
    prompts: str
    """Dataset of prompts. Each is answered in one round only."""
    size: PositiveInt = 200
    """Number of prompts in a round."""
    k: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt, including a person's if `prompts` has one."""
    min_rankings: PositiveInt | None = None
    """Number of rankings after which a round continues; by default one for each proposal."""
    temperature: PositiveFloat | None = None
    """Sampling temperature of the proposed answers; by default that of the PPO run, else 1."""
    max_new_tokens: PositiveInt | None = None
    """Longest proposed answer in tokens; by default that of the PPO run, else 128."""

    def faults(self) -> Iterator[str]:
        if "{round}" not in self.folder:
            yield f"folder: every round needs its own; put {{round}} into {self.folder!r}"


class PipelineConfig(Strict):
    name: str
    """Name of the pipeline in its output."""
    sft: str | None = None
    """Config file of the instruction-tuning stage; a stage that is left out is skipped."""
    reward: str | None = None
    """Config file of the reward-model stage."""
    dpo: str | None = None
    """Config file of the DPO stage, which needs no reward model and no PPO."""
    ppo: str | None = None
    """Config file of the PPO stage."""
    export: str | None = None
    """Folder for the policy in Hugging Face format: that of the last stage that trains one: PPO, DPO or SFT."""
    rounds: RoundsConfig | None = None
    """Further rounds with new rankings of the policy's own answers; see docs/rounds.md."""

    def faults(self) -> Iterator[str]:
        if not (self.sft or self.reward or self.dpo or self.ppo):
            yield "name the config file of at least one of sft, reward, dpo, ppo"
        if self.export and not (self.sft or self.dpo or self.ppo):
            yield "export: there is no policy to export without sft, dpo or ppo"
        if self.rounds and self.dpo:
            yield "rounds: a round trains a reward model and PPO on its rankings; leave out dpo"
        if self.rounds and not (self.reward and (self.sft or self.ppo)):
            yield "rounds: needs a reward stage, which learns from the rankings, and a policy: sft or ppo"
