"""Whole PPO updates on disk: prompts, completions and every per-token number, so that an update can be replayed.

RUN/updates/step-00000001/
  numbers.safetensors   token ids, log-probs, values, KL, rewards, advantages, returns; see `UpdateRecord.tensors`
  update.json           step, messages, KL coefficient, statistics of the scores, checksum of the numbers
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.core.console import is_main
from rlhf.core.errors import UserError
from rlhf.core.files import whole_folder
from rlhf.core.limits import read_json_object
from rlhf.ppo.advantages import Advantages
from rlhf.ppo.config import PPOLogConfig
from rlhf.ppo.masked import unflatten
from rlhf.ppo.types import Experience, Prompts, Rollout
from rlhf.rollout.types import Completion
from rlhf.runs.checkpoint import checksum
from rlhf.runs.lock import check_kept

FOLDER = "updates"
NUMBERS, FACTS = "numbers.safetensors", "update.json"
PER_TOKEN = ("logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns", "sampler_logprobs")
"""Numbers of response tokens, float32 [n], one episode after the other. Some runs have no values or returns."""
OBSERVED = "observed."
"""Prefix of the observers' scores, float32 [N]."""


@dataclass(frozen=True)
class UpdateRecord:
    """One update as it was recorded, or is to be.

    Args:
        step: The update, counted from 1, as in metrics.jsonl.
        experience: The rollout with log-probs, values and raw scores.
        shaped_scores: float32 [N], normalised and clipped, with the rule for missing ends.
        kl: float32 [N, T], the estimate per token.
        rewards: float32 [N, T].
        advantages: As the update used them.
        kl_coef: Coefficient of the KL penalty.
        score_mean, score_std: What scores were normalised by; 0 and 1 without normalisation.
    """

    step: int
    experience: Experience
    shaped_scores: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Advantages
    kl_coef: float
    score_mean: float = 0.0
    score_std: float = 1.0

    @property
    def columns(self) -> dict[str, Tensor]:
        """Name of `PER_TOKEN` -> float32 [N, T]; those that the run has."""
        found = {
            "logprobs": self.experience.logprobs, "ref_logprobs": self.experience.ref_logprobs,
            "values": self.experience.values, "kl": self.kl, "rewards": self.rewards,
            "advantages": self.advantages.advantages, "returns": self.advantages.returns,
            "sampler_logprobs": self.experience.rollout.sampler_logprobs,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}

    def tensors(self) -> dict[str, Tensor]:
        """What numbers.safetensors holds: `PER_TOKEN`; the episodes' scores, shaped scores and, of an ensemble,
        disagreement (float32 [N]); token ids (int32), lengths (int32), groups (int64) and ends (uint8)."""
        rollout = self.experience.rollout
        mask = rollout.response_mask
        found = {name: value.float()[mask].contiguous() for name, value in self.columns.items()}
        found |= {"scores": self.experience.scores.float(), "shaped_scores": self.shaped_scores.float()}
        found |= {OBSERVED + name: value.float() for name, value in self.experience.observed.items()}
        if self.experience.disagreement is not None:
            found["disagreement"] = self.experience.disagreement.float()
        found |= {
            "prompt_ids": _int32([token for ids in rollout.prompts.ids for token in ids]),
            "prompt_lengths": _int32([len(ids) for ids in rollout.prompts.ids]),
            "response_ids": _int32([token for completion in rollout.completions for token in completion.ids]),
            "lengths": rollout.lengths.to(torch.int32),
            "groups": rollout.prompts.groups.clone(),
            "ended": rollout.ended.to(torch.uint8),
        }
        return {name: value.contiguous() for name, value in found.items()}


def note(run: Path, log: PPOLogConfig, record: UpdateRecord) -> None:
    """Write a record if the config says so of this update. Every rank calls it."""
    if log.record_every and (record.step - 1) % log.record_every == 0:
        write(run, record, log.record_keep)


def write(run: Path, record: UpdateRecord, keep: int) -> None:
    """Write a record into a run folder; of older ones the first and the newest stay, `keep` in all. Rank 0 writes."""
    if not is_main():
        return
    check_kept(run)
    place = folder(run, record.step)
    place.parent.mkdir(exist_ok=True)
    rollout = record.experience.rollout
    with whole_folder(place) as partial:
        save_file(record.tensors(), partial / NUMBERS)
        facts = {
            "step": record.step, "kl_coef": record.kl_coef, "score_mean": record.score_mean,
            "score_std": record.score_std, "entropy": record.experience.entropy,
            "messages": rollout.prompts.messages, "numbers_xxh3_128": checksum(partial / NUMBERS),
        }  # fmt: skip
        (partial / FACTS).write_text(json.dumps(facts, ensure_ascii=False), "utf-8")
    steps = recorded(run)
    for step in steps[1 : max(1, len(steps) - keep + 1)]:
        shutil.rmtree(folder(run, step))


def folder(run: Path, step: int) -> Path:
    """Where an update's record lies."""
    return run / FOLDER / f"step-{step:08d}"


def recorded(run: Path) -> list[int]:
    """The updates that a run has recorded, in order."""
    names = [path.name for path in (run / FOLDER).glob("step-*")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def forget_after(run: Path, step: int) -> None:
    """Delete the records of updates after `step`: a resumed run does these again. Rank 0 deletes."""
    for later in recorded(run) if is_main() else []:
        if later > step:
            shutil.rmtree(folder(run, later))


def read(run: Path, step: int) -> tuple[UpdateRecord, bool]:
    """A record, and whether its numbers have the checksum that was written with them.

    Raises:
        UserError: It was not recorded, or it is damaged beyond reading.
    """
    place, steps = folder(run, step), recorded(run)
    if step not in steps:
        have = ", ".join(f"{one:,}" for one in steps) or "none"
        raise UserError(
            f"{run}: update {step:,} was not recorded",
            f"Recorded are: {have}. log.record_every says which updates are.",
            "Name one of these with --step." if steps else "Start a run with log.record_every above 0.",
        )
    try:
        facts, tensors = read_json_object(place / FACTS), load_file(place / NUMBERS)
        record = _record(facts, tensors)
        return record, facts.get("numbers_xxh3_128") == checksum(place / NUMBERS)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{place}: damaged: {error}",
            f"This record cannot be read ({type(error).__name__}).",
            "Open another update; without --step, `rlhf replay RUN` lists them.",
        ) from None


def _record(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UpdateRecord:
    lengths, prompt_lengths = tensors["lengths"].long(), tensors["prompt_lengths"].long()
    prompts = Prompts(
        _split(tensors["prompt_ids"], prompt_lengths), list(facts["messages"]), tensors["groups"], [0] * len(lengths)
    )
    sampled = _split(tensors["sampler_logprobs"], lengths) if "sampler_logprobs" in tensors else [None] * len(lengths)
    parts = zip(_split(tensors["response_ids"], lengths), tensors["ended"].bool().tolist(), sampled)
    rollout = Rollout(prompts, [Completion(ids, ended, logprobs) for ids, ended, logprobs in parts])
    if not len(prompts.ids) == len(prompts.messages) == len(lengths) == len(prompts.groups) == len(tensors["scores"]):
        raise ValueError("its parts have different lengths")
    padded = {name: unflatten(tensors[name], lengths) for name in PER_TOKEN if name in tensors}
    experience = Experience(
        rollout,
        logprobs=padded["logprobs"],
        ref_logprobs=padded["ref_logprobs"],
        values=padded.get("values"),
        scores=tensors["scores"],
        disagreement=tensors.get("disagreement"),
        entropy=float(facts["entropy"]),
        observed={n.removeprefix(OBSERVED): value for n, value in tensors.items() if n.startswith(OBSERVED)},
    )
    return UpdateRecord(
        int(facts["step"]), experience, tensors["shaped_scores"], padded["kl"], padded["rewards"],
        Advantages(padded["advantages"], padded.get("returns")), float(facts["kl_coef"]), float(facts["score_mean"]),
        float(facts["score_std"]),
    )  # fmt: skip


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _split(values: Tensor, lengths: Tensor) -> list[list[Any]]:
    """Consecutive values, cut into lists of these lengths."""
    if len(values) != int(lengths.sum()):
        raise ValueError(f"{len(values)} values, but the lengths add up to {int(lengths.sum())}")
    return [part.tolist() for part in values.split(lengths.tolist())]
