"""The sizes that `benchmarks/gpu.py` measures, the work that they require, and the tables of what was found."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

PHASES = ("rollout", "score", "learn")
PROMPTS = 131_900
PUBLISHED = "DeepSpeed-Chat published 11.7 h on one A100-80G"


@dataclass(frozen=True)
class Shape:
    """A decoder's size."""

    layers: int
    width: int
    heads: int
    inner: int
    vocab: int

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices: query, key, value, output and the two of the feed-forward part."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of the language model's head."""
        return self.vocab * self.width

    def forward_flops(self, tokens: int, length: int, head_tokens: int) -> float:
        """Operations of a forward pass over sequences of `length`; the head works on `head_tokens` of the tokens."""
        attention = 2 * tokens * length * self.width * self.layers
        return 2.0 * tokens * self.linear + 2.0 * head_tokens * self.head + attention


@dataclass(frozen=True)
class Setting:
    """Models and sizes of one measurement."""

    policy: Shape
    critic: Shape
    prompt_tokens: int
    new_tokens: int
    episodes: int
    trl_episodes: int
    """Episodes per step for TRL: fewer, because it keeps the logits of a whole rollout."""
    batch_size: int
    micro_batch_tokens: int
    seconds: int
    """Time limit of our updates, including loading; TRL gets three quarters of it."""
    step: str = "eager"
    compile: bool = False
    gradient_checkpointing: bool = False

    def update_flops(self, episodes: int) -> dict[str, float]:
        """Operations that scoring and learning require in one update, and those that learning repeats."""
        length, answers = self.prompt_tokens + self.new_tokens, episodes * self.new_tokens
        tokens = episodes * length
        policy = self.policy.forward_flops(tokens, length, answers)
        critic = self.critic.forward_flops(tokens, length, 0)
        twice = policy + critic if self.gradient_checkpointing else 2.0 * answers * self.policy.head
        return {"score": 2 * policy + 2 * critic, "learn": 3 * (policy + critic), "twice": twice}

    def decode_bytes(self, steps: int, columns: int, element: int) -> float:
        """Bytes that decoding must read: the weights at every step, and the keys and values of all row-columns."""
        weights = self.policy.linear + self.policy.head
        return float(element) * (steps * weights + 2 * columns * self.policy.layers * self.policy.width)


def setting_for(gpu_bytes: int, flops: float) -> Setting:
    """The large setting, reduced to the GPU's memory and, by smaller steps, to its speed; a small one without a GPU."""
    if not gpu_bytes:
        tiny = Shape(layers=2, width=64, heads=4, inner=256, vocab=512)
        return Setting(tiny, tiny, 16, 16, 8, 8, batch_size=8, micro_batch_tokens=128, seconds=1)
    policy = Shape(layers=24, width=2048, heads=32, inner=8192, vocab=50272)
    critic = Shape(layers=24, width=1024, heads=16, inner=4096, vocab=50272)
    free = max(4e9, gpu_bytes - 45e9)  # weights, gradients and AdamW's moments of both take about 30 GB
    rows = _power_of_two(free / (1.15 * 512 * 4 * policy.layers * policy.width))  # keys and values of 512 tokens
    tokens = _power_of_two(free / 4e6)  # activations: about 3 MB a token of policy and critic together
    episodes = min(1024, max(64, _power_of_two(1024 * flops / 500e12)))  # at most the 1,024 of DeepSpeed-Chat
    batch, micro_batch = min(episodes, rows), min(32768, max(1024, tokens))
    return Setting(policy, critic, 256, 256, episodes, episodes // 4, batch, micro_batch, seconds=160)


def _power_of_two(most: float) -> int:
    return 1 << max(0, int(most).bit_length() - 1)


# ---- tables ----------------------------------------------------------------------------------------------------------


def measurements(found: dict[str, Any], setting: Setting, limits: dict[str, float], element: int) -> dict[str, Any]:
    """The table's values for a side: medians over its updates, without the first if there are more."""
    updates = found["updates"][1:] or found["updates"]
    episodes, medians = found["episodes"], {p: statistics.median(u["phases"][p] for u in updates) for p in PHASES}
    seconds = statistics.median(update["seconds"] for update in updates)
    tokens = episodes * (setting.prompt_tokens + setting.new_tokens)
    work = setting.update_flops(episodes)
    shown = {
        "prompts an update": episodes,
        "updates measured": len(updates),
        "seconds an update": seconds,
        "hours for 131,900 prompts": seconds / episodes * PROMPTS / 3600,
        **{f"seconds in {phase}": medians[phase] for phase in PHASES},
        "answer tokens/s in rollout": episodes * setting.new_tokens / medians["rollout"],
        **{f"tokens/s in {phase}": tokens / medians[phase] for phase in ("score", "learn")},
        "fraction of the matrix rate in score": work["score"] / medians["score"] / limits["flops"],
        "fraction of the matrix rate in learn": work["learn"] / medians["learn"] / limits["flops"],
        "the same, with what is computed twice": None,
        "the same, of the data sheet's matrix rate": None,
        "fraction of the bandwidth limit in decoding": None,
        "the same, of the data sheet's bandwidth": None,
        "peak GB, loaded": found["loaded_gb"],
        **{f"peak GB in {phase}": max(u["peak_gb"][phase] for u in updates) for phase in PHASES},
    }
    if "decode_steps" in updates[-1]:  # ours
        both = work["learn"] + work["twice"]
        shown["the same, with what is computed twice"] = both / medians["learn"] / limits["flops"]
        fractions = []
        for u in updates:
            moved = setting.decode_bytes(u["decode_steps"], u["decode_columns"], element)
            fractions.append(moved / (u["phases"]["rollout"] - u["prefill_seconds"]) / limits["bytes"])
        shown["fraction of the bandwidth limit in decoding"] = statistics.median(fractions)
    for ours, theirs, limit, sheet in (
        ("fraction of the matrix rate in learn", "the same, of the data sheet's matrix rate", "flops", "sheet_flops"),
        (
            "fraction of the bandwidth limit in decoding",
            "the same, of the data sheet's bandwidth",
            "bytes",
            "sheet_bytes",
        ),
    ):
        if shown[ours] is not None and sheet in limits:
            shown[theirs] = shown[ours] * limits[limit] / limits[sheet]
    return shown


def step_table(found: dict[str, Any], setting: Setting, limits: dict[str, float], element: int) -> str:
    """Markdown table of the decoding steps, over one batch of completions after a warm-up batch."""
    lines = [
        "| decoding step | ms | fraction of the bandwidth limit | first batch, s | second, s |",
        f"|{' --- |' * 5}",
    ]
    for update in found["updates"]:
        seconds = update["took"][1] - update["prefill_seconds"]
        fraction = setting.decode_bytes(update["decode_steps"], update["decode_columns"], element) / seconds
        first, second = update["took"]
        ms = 1000 * seconds / update["decode_steps"]
        lines.append(f"| {update['step']} | {ms:.2f} | {fraction / limits['bytes']:.1%} | {first:.2f} | {second:.2f} |")
    return "\n".join(lines)


def table(sides: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(sides)} |", f"|{' --- |' * (len(sides) + 1)}"]
    for name in next(iter(sides.values())):
        cells = [_cell(name, side[name]) for side in sides.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.startswith(("fraction", "the same")):
        return f"{value:.1%}"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:,.2f}"


def works(found: dict[str, Any]) -> str:
    """What the check with tiny models showed, in a line."""
    updates = [update for update in found["updates"] if "phases" in update]
    if not updates:
        return "CHECK FAILED: no PPO update was finished"
    ratios = [ratio for update in updates for ratio in update["ratio"]]
    same = next((update["same_tokens"] for update in found["updates"] if "same_tokens" in update), {})
    words = [f"PPO update in {updates[-1]['seconds']:.2f} s", f"first ratio {min(ratios):.4f} to {max(ratios):.4f}"]
    words += [f"{step}: greedy tokens {'equal' if ok else 'DIFFER from'} eager's" for step, ok in same.items()][1:]
    return f"Check: {'; '.join(words)}{'; THE REST FAILED' if found['failed'] else ''}"
