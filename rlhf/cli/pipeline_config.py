"""The config of a pipeline: the stages in a row, and rounds of new rankings. Read as those of `rlhf.config`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf.config.base import Strict


class RoundsConfig(Strict):
    count: PositiveInt
    """Rounds after the first training: propose answers, wait until people have ranked them, train again."""
    folder: str
    """Where a round lies, with `{round}` for its number: `datasets/mine/round-{round}`. Its proposals are in
    `candidates`; rankings are awaited in `rankings*`, datasets or `.jsonl` files."""
    prompts: str
    """Dataset whose prompts are answered, each in one round only."""
    size: PositiveInt = 200
    """Prompts in a round."""
    k: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt, a person's included where `prompts` has one."""
    min_rankings: PositiveInt | None = None
    """A round goes on once so many rankings have come; one for each proposal when left out."""
    temperature: PositiveFloat | None = None
    """Of the proposed answers; as the policy sampled in PPO, else 1, when left out."""
    max_new_tokens: PositiveInt | None = None
    """Longest proposed answer; as the policy sampled in PPO, else 128, when left out."""

    @model_validator(mode="after")
    def _rounds_apart(self) -> RoundsConfig:
        if "{round}" not in self.folder:
            raise ValueError(f"folder: every round needs its own; put {{round}} into {self.folder!r}")
        return self


class PipelineConfig(Strict):
    name: str
    """What the pipeline's output calls it."""
    sft: str | None = None
    """Config file of the instruction-tuning stage; a stage that is left out is skipped."""
    reward: str | None = None
    """Config file of the reward-model stage."""
    ppo: str | None = None
    """Config file of the PPO stage."""
    export: str | None = None
    """Folder for the policy in Hugging Face format: PPO's, or SFT's where there is no PPO."""
    rounds: RoundsConfig | None = None
    """Further rounds with new rankings of the policy's own answers; see docs/rounds.md."""

    @model_validator(mode="after")
    def _something_to_do(self) -> PipelineConfig:
        if not (self.sft or self.reward or self.ppo):
            raise ValueError("name the config file of at least one of sft, reward, ppo")
        if self.export and not (self.sft or self.ppo):
            raise ValueError("export: there is no policy to export without sft or ppo")
        if self.rounds and not (self.reward and (self.sft or self.ppo)):
            raise ValueError("rounds: needs a reward stage, which learns from the rankings, and a policy: sft or ppo")
        return self
