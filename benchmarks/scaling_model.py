"""What PPO sends between GPUs and how long its phases take, calculated from first principles for docs/scaling.md.

`sent` counts bytes; `benchmarks/scaling.py` checks it against what two processes send. `update` turns bytes, floating
point operations and memory traffic into seconds on an assumed machine. Nothing here has been timed on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PHASES = ("rollout", "score", "learn")


@dataclass(frozen=True)
class Model:
    """A decoder with gated feed-forward layers and grouped keys and values, as Llama is."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def body(self) -> int:
        """Parameters of the layers."""
        width = self.hidden // self.heads * self.kv_heads
        return self.layers * (2 * self.hidden * (self.hidden + width) + 3 * self.hidden * self.ffn + 2 * self.hidden)

    @property
    def policy(self) -> int:
        """Parameters including input embedding and head, which are not tied."""
        return self.body + self.hidden + 2 * self.vocab * self.hidden

    @property
    def scalar(self) -> int:
        """Parameters of a critic or reward model: no head over the vocabulary, one number instead."""
        return self.body + 2 * self.hidden + self.vocab * self.hidden

    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values, 2 bytes per number."""
        return 2 * 2 * self.layers * self.hidden // self.heads * self.kv_heads

    def forward(self, sequences: float, length: int) -> float:
        """Floating-point operations of a forward pass of the layers; attention is the term with length squared."""
        return sequences * length * (2 * self.body + 2 * self.layers * self.hidden * length)

    def head(self, tokens: float) -> float:
        """Floating-point operations of the head over the vocabulary."""
        return tokens * 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Machine:
    """Hosts of 8 GPUs. Bytes, bytes/s and operations/s of one GPU, in one direction, from the data sheet."""

    name: str
    memory: float
    hbm: float
    matrix: float = 989e12
    nvlink: float = 450e9
    network: float = 50e9
    per_host: int = 8


@dataclass(frozen=True)
class Job:
    """One update. The defaults are those of configs/8b-full/ppo.yaml, with completions as long as prompts."""

    episodes: int
    prompt: int = 512
    answer: int = 512
    epochs: int = 1
    minibatches: int = 8
    micro_batch_tokens: int = 8192


MODELS = {
    "8B": Model("8B", 32, 4096, 14336, 32, 8, 128256),
    "70B": Model("70B", 80, 8192, 28672, 64, 8, 128256),
}
MACHINES = {"h100": Machine("H100", 80e9, 3.35e12), "h200": Machine("H200", 141e9, 4.8e12)}
"""SXM. Matrix rate: bfloat16 without sparsity. https://www.nvidia.com/en-us/data-center/h100/ and .../h200/ (NVLink's
900 GB/s are both directions), one 400 Gb/s adapter per GPU: https://docs.nvidia.com/dgx/dgxh100-user-guide/"""
REACHED = {"matrix": 0.4, "hbm": 0.4, "link": 0.8}
"""Assumed fractions of the data-sheet values that a well-tuned program reaches."""
HELD = 18
"""Bytes per parameter of policy and critic under ZeRO-3, summed over all GPUs: weight and gradient in bfloat16, a
float32 copy and AdamW's two moments; plus 2 for the same parameter in the frozen reference or reward model."""


# ---- bytes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Bytes of each model's weights as they are sent; 0 if there is no such model."""

    policy: float
    critic: float
    reference: float
    reward: float

    @property
    def trained(self) -> float:
        """Bytes of policy and critic together."""
        return self.policy + self.critic


def sent(stage: int, ranks: int, weights: Weights, passes: int, steps: int, epochs: int = 1) -> dict[str, float]:
    """Bytes that each rank sends in one update, by phase, over rings: (N - 1) / N of a tensor to gather or reduce it.

    In stages 0 to 2 DeepSpeed sums gradients with an all-reduce (two rings): at the end of a minibatch in 0 and 1,
    after every micro-batch in 2; then 1 and 2 gather the new weights. Stage 3 gathers the weights of each model for
    each forward pass, once more for the backward pass, and reduce-scatters gradients after every micro-batch. The
    rollout's tokens, log-probs and scores, a few dozen bytes per token, are not counted.

    Args:
        stage: ZeRO stage.
        ranks: Number of ranks.
        weights: Bytes of the models' weights.
        passes: Micro-batches of each rank in one epoch; scoring makes as many.
        steps: Optimizer steps (minibatches) per epoch.
        epochs: Epochs of learning.
    """
    ring = (ranks - 1) / ranks
    if stage == 3:
        score = ring * (weights.trained + weights.reference + weights.reward) * passes
        return {"rollout": ring * weights.policy, "score": score, "learn": epochs * ring * 3 * weights.trained * passes}
    sums = passes if stage == 2 else steps
    gathers = 0 if stage == 0 else steps
    return {"rollout": 0.0, "score": 0.0, "learn": epochs * ring * weights.trained * (2 * sums + gathers)}


def micro_batches(job: Job, ranks: int) -> tuple[int, int]:
    """Per epoch: episodes of the fullest rank, and micro-batches, the same number on every rank."""
    mine = math.ceil(job.episodes / job.minibatches / ranks)
    rows = max(1, job.micro_batch_tokens // (job.prompt + job.answer))
    return job.minibatches * mine, job.minibatches * math.ceil(mine / rows)


# ---- seconds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """One phase on one GPU: bytes sent, seconds on the links, seconds of computation, and the limit of each."""

    sent: float
    link: str
    link_seconds: float
    work: str
    work_seconds: float

    @property
    def seconds(self) -> float:
        """Lower bound: communication and computation overlap completely."""
        return max(self.link_seconds, self.work_seconds)

    @property
    def limit(self) -> str:
        """The limit that takes longer."""
        return self.link if self.link_seconds > self.work_seconds else self.work


def links(sent_bytes: float, ranks: int, machine: Machine) -> tuple[str, float]:
    """The slower kind of link, and its seconds for what each rank sends over rings.

    NVLink carries all of it. The fraction of a tensor that other hosts hold, (H - 1) / H, enters each host once,
    through all of its network adapters together.
    """
    hosts = math.ceil(ranks / machine.per_host)
    whole = sent_bytes * ranks / (ranks - 1)
    inside = sent_bytes / machine.nvlink / REACHED["link"]
    between = whole * (hosts - 1) / hosts / (machine.network * machine.per_host) / REACHED["link"]
    return max(("NVLink", inside), ("network", between), key=lambda found: found[1])


def decoding(model: Model, machine: Machine, job: Job, ranks: int, split: int) -> tuple[str, float] | None:
    """The limit of sampling, and its seconds: one prefill, then each token reads the weights and the cache.

    Args:
        split: GPUs over which the model is partitioned, and with it a sequence's cache and work.

    Returns:
        None if training state, policy and the cache of one sequence exceed 90% of the memory.
    """
    weights, length = 2 * model.policy / split, job.prompt + job.answer
    room = 0.9 * machine.memory - HELD * (model.policy + model.scalar) / ranks - weights
    cache = model.kv_bytes() / split
    mine = math.ceil(job.episodes * split / ranks)
    if room < cache * length:
        return None
    waves = math.ceil(mine / min(mine, int(room / (cache * length))))
    read = job.answer * (waves * weights + mine * cache * (job.prompt + job.answer / 2))
    work = (model.forward(mine, length) + model.head(mine * job.answer)) / split
    found = ("memory bandwidth", read / machine.hbm / REACHED["hbm"]), ("matrix rate", matrix_seconds(work, machine))
    return max(found, key=lambda one: one[1])


def matrix_seconds(operations: float, machine: Machine) -> float:
    """Seconds for this many floating-point operations."""
    return operations / machine.matrix / REACHED["matrix"]


def update(model: Model, machine: Machine, job: Job, ranks: int, split: int = 1) -> dict[str, Cost | None]:
    """The phases of one update under ZeRO-3 with recomputed activations; None if a phase does not fit.

    `split` is 1 for our samplers; n for a sampler that partitions the model over n GPUs.
    """
    episodes, passes = micro_batches(job, ranks)
    length, answers = job.prompt + job.answer, episodes * job.answer
    weights = Weights(*(2.0 * n for n in (model.policy, model.scalar, model.policy, model.scalar)))
    bytes_ = sent(3, ranks, weights, passes, job.minibatches, job.epochs)
    score = 4 * model.forward(episodes, length) + 2 * model.head(answers)
    # forward, forward again, and a backward pass of two
    learn = 4 * job.epochs * (2 * model.forward(episodes, length) + model.head(answers))
    fits = HELD * (model.policy + model.scalar) / ranks < 0.9 * machine.memory
    work = {
        "rollout": decoding(model, machine, job, ranks, split),
        "score": ("matrix rate", matrix_seconds(score, machine)) if fits else None,
        "learn": ("matrix rate", matrix_seconds(learn, machine)) if fits else None,
    }
    return {
        phase: None if found is None else Cost(bytes_[phase], *links(bytes_[phase], ranks, machine), *found)
        for phase, found in work.items()
    }


# ---- the table -----------------------------------------------------------------------------------------------------

COLUMNS = ("model", "GPUs", "episodes", "busy", *PHASES, "update, s", "longest phase: its limit")


def table(machine: Machine) -> str:
    """The table of docs/scaling.md, in markdown: for each phase GB sent / seconds on links / seconds of computation."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    rows = [("8B", 1, ranks) for ranks in (8, 64, 512)] + [("70B", 1, ranks) for ranks in (8, 64, 512)]
    for name, split, ranks in [*rows, ("70B", machine.per_host, 64), ("70B", machine.per_host, 512)]:
        for episodes in (1024, 4096):
            lines.append(_row(name, machine, Job(episodes), ranks, split))
    return "\n".join(lines)


def _row(name: str, machine: Machine, job: Job, ranks: int, split: int) -> str:
    costs = update(MODELS[name], machine, job, ranks, split)
    busy = job.episodes / ranks / micro_batches(job, ranks)[0]
    cells = [name + (", served" if split > 1 else ""), f"{ranks}", f"{job.episodes:,}", f"{busy:.0%}"]
    for cost in costs.values():
        parts = cost and f"{cost.sent / 1e9:,.0f} GB / {cost.link_seconds:.1f} / {cost.work_seconds:.1f}"
        cells.append(parts or "does not fit")
    known = {phase: cost for phase, cost in costs.items() if cost is not None}
    if len(known) < len(costs):
        return "| " + " | ".join([*cells, "-", "memory"]) + " |"
    longest = max(known, key=lambda phase: known[phase].seconds)
    total = sum(cost.seconds for cost in known.values())
    return "| " + " | ".join([*cells, f"{total:.0f}", f"{longest}: {known[longest].limit}"]) + " |"
