"""Log-probs, values and scores of a recorded update by the models, as they were before that update."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.guard.observers import Observers
from rlhf.ppo.batching import Minibatches
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.models import Models, load_separate
from rlhf.ppo.scoring import Scorer
from rlhf.ppo.shared_base import load_shared
from rlhf.replay.record import UpdateRecord
from rlhf.reward.sources import RewardContext, own_chats
from rlhf.runs.checkpoint import SEAL, damage
from rlhf.runs.parents import resolve_model_path, template_time
from rlhf.runs.random_state import seed_everything
from rlhf.runs.run import read_run


def checkpoint_before(run: Path, step: int) -> Path | None:
    """The checkpoint with the weights that sampled an update; None if the update was the first.

    Raises:
        UserError: It is gone or damaged.
    """
    if step == 1:
        return None
    place = run / "checkpoints" / f"step-{step - 1:08d}"
    if not (place / SEAL).is_file():
        raise UserError(
            f"{place}: not there, so the models cannot recompute update {step:,}",
            remedy="With checkpoints.every=log.record_every the newest record has its checkpoint.",
        )
    fault = damage(place)
    if fault is not None:
        raise UserError(f"{place}: {fault}")
    return place


@torch.no_grad()
def by_models(config: PPOConfig, run: Path, record: UpdateRecord) -> dict[str, Tensor]:
    """What the models compute for a record's tokens: `logprobs`, `ref_logprobs`, `values` [N, T], `scores` [N].

    They are loaded on this process's device without DeepSpeed, whatever the run used; checkpoints fit any number of
    processes. Log-probs of a run with `score.policy: sampler` are left out: the sampler computed them.

    Raises:
        UserError: The checkpoint before the update, or a parent of the run, is gone or damaged.
    """
    checkpoint = checkpoint_before(run, record.step)
    config = config.model_copy(update={"deepspeed": None, "run": str(run)})
    seed_everything(config.seed)  # a new value head is drawn as the run drew it
    path = resolve_model_path(config.model.path)
    time = template_time(config, resume=True)
    chat = load_tokenizer(config.model, path, time)
    own = own_chats(config.reward, config.model, time)
    models: Models = (load_shared if config.model.sharing == "shared" else load_separate)(config, chat)
    context = RewardContext(config.model, chat, models.engine.freeze, models.scorers, own)
    source = config.reward(context)
    if checkpoint is not None:
        models.engine.load(checkpoint, optimizer=False)
    rollout = record.experience.rollout
    order = range(len(rollout.completions))
    whole = Minibatches.of_rollout(rollout, chat.pad_id, False, [order], 1, config.batch.micro_batch_tokens)
    scorer = Scorer(config, chat, models, source, Observers({}, context))
    made = scorer.score(rollout, whole.epochs[0])
    found = {"ref_logprobs": made.ref_logprobs, "scores": made.scores}
    if config.score.policy == "recompute":
        found["logprobs"] = made.logprobs
    return found if made.values is None else found | {"values": made.values}


def allowed_difference(config: PPOConfig, run: Path) -> float:
    """Largest difference between two passes of the same models that is rounding, in nats (or units of the score).

    Other batches, kernels and processors round differently: 1e-3 in float32, 0.25 where the run computed in bfloat16.
    """
    low = config.precision != "float32" and read_run(run).get("device", "cpu") != "cpu"
    return 0.25 if low or config.precision == "bfloat16" else 1e-3
