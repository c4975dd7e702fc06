"""What `reward.py` and `dpo.py` share: a loop on rankings of shared prompts against a trainer of TRL on their pairs.

Both train the same random Llama (4 layers, 3.5M parameters) on the same rankings of K answers without ties, in float32,
without recomputation, with one optimizer step per 4 rankings. TRL sees a ranking as K (K - 1) / 2 pairs, 8 in a forward
pass; ours takes as many rankings as have no more tokens than that. The learning rate is almost 0, so both must have the
same mean of a checked number. Each run is a separate process; the sides alternate, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sft import Timed

RANKINGS = 4
"""Rankings per optimizer step."""
PAIRS = 8
"""Pairs per forward pass of TRL, its default."""
VOCABULARY = 320
LEARNING_RATE = 1e-12
Rows = list[dict[str, Any]]


def rankings(candidates: int, prompt: int, answer: int, steps: int) -> Rows:
    """Tokenised rankings, best candidate first; lengths are uniform between half and one and a half times the mean."""
    draw = random.Random(0)

    def text(mean: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(mean // 2, mean * 3 // 2))]

    return [
        {"prompt": text(prompt), "candidates": [text(answer) for _ in range(candidates)]}
        for _ in range(RANKINGS * steps)
    ]


def save_model(place: str, kind: str) -> None:
    """A random Llama of a class of transformers, and a tokenizer of that many words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=4096, num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(place)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(place)


# ---- what both sides' trainers are given ---------------------------------------------------------------------------


def our_values(place: str, micro: int) -> dict[str, Any]:
    """Config values of our stage."""
    batch = {"batch_size": RANKINGS, "micro_batch_size": micro}
    values = {"run": f"{place}/run", "model": {"path": place}, "data": {"train": "unused"}, "precision": "float32"}
    return values | {
        "batch": batch, "optimizer": {"lr": LEARNING_RATE, "schedule": "constant"}, "log": {"every": 1},
    }  # fmt: skip


def our_table(rows: Rows) -> Any:
    """The rankings as our stages keep them."""
    import datasets

    return datasets.Dataset.from_list([
        {
            **row,
            "ranks": list(range(1, len(row["candidates"]) + 1)),
            "ratings": [None] * len(row["candidates"]),
            "weight": 1.0,
            "length": len(row["prompt"]) + max(map(len, row["candidates"])),
        }
        for row in rows
    ])  # fmt: skip


def logged(folder: Any, name: str) -> float:
    """The mean of a metric over all steps of our run."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return statistics.fmean(json.loads(line)[name] for line in lines)


def their_values(place: str, pairs: int, rows: int) -> dict[str, Any]:
    """Arguments of TRL's trainer for that many pairs of that many rankings."""
    in_step = pairs * RANKINGS // rows
    micro = min(PAIRS, in_step)
    return {
        "output_dir": f"{place}/trl", "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": in_step // micro, "num_train_epochs": 1, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "logging_steps": 1, "max_length": None, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def clock(timed: Timed) -> Any:
    """A callback that times TRL's steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *words: Any, **more: Any) -> None:
            timed.begin()

        def on_step_end(self, *words: Any, **more: Any) -> None:
            timed.end()

    return Clock()


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One of the two benchmarks."""

    file: str
    model: str
    """The class of the model in transformers."""
    ours: Callable[[str, Rows, int, Timed], Callable[[], float]]
    """(folder, rankings, rankings in a forward pass, timer) -> a function that trains and gives the checked number."""
    theirs: Callable[[str, Rows, Timed], Callable[[], float]]
    """The same for TRL's trainer on all pairs."""
    same: Callable[[float, float], bool]
    """Whether the numbers of the two sides agree."""

    def run(self, side: str, place: str, candidates: int, prompt: int, answer: int, steps: int) -> dict[str, float]:
        """Train and measure, in this process.

        Returns:
            `seconds` (wall clock) and `cpu` (processor) per ranking, medians over all steps except the first; `mb`, the
            peak memory above that before training; `checked`, the checked number.
        """
        import torch

        save_model(place, self.model)
        rows = rankings(candidates, prompt, answer, steps)
        tokens = 2 * PAIRS * (prompt + answer)
        micro = max(n for n in (1, 2, 4) if n == 1 or n * (prompt + candidates * answer) <= tokens)
        timed = Timed()
        train = self.ours(place, rows, micro, timed) if side == "ours" else self.theirs(place, rows, timed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        torch.manual_seed(0)
        checked = train()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        seconds, cpu = timed.medians()
        return {"seconds": seconds / RANKINGS, "cpu": cpu / RANKINGS, "mb": peak / 1024, "checked": checked}

    def measure(self, side: str, *sizes: int) -> dict[str, float]:
        """`run` in a new process with one thread, unless OMP_NUM_THREADS says otherwise."""
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, self.file, "--one", side, place, *map(str, sizes)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def main(self, description: str | None) -> None:
        """Print a table: medians over the repeats, and the median of the ratios of neighbouring runs."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--repeats", type=int, default=3)
        parser.add_argument("--candidates", type=int, nargs="+", default=[2, 4, 9])
        parser.add_argument(
            "--prompts",
            type=int,
            nargs="+",
            default=[1, 2, 4],
            help="Prompt lengths as multiples of the answer length.",
        )
        parser.add_argument("--answer", type=int, default=32, help="Mean tokens per answer.")
        parser.add_argument("--steps", type=int, default=4, help="Optimizer steps; the first is not measured.")
        parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
        args = parser.parse_args()
        if args.one:
            side, place, *sizes = args.one
            print(json.dumps(self.run(side, place, *map(int, sizes))))
            return
        print("| K | prompt / answer | ours, ms | TRL, ms | ratio (range) | of CPU time | ours, MB | TRL, MB | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for candidates, factor in itertools.product(args.candidates, args.prompts):
            sizes = (candidates, factor * args.answer, args.answer, args.steps)
            pairs = [(self.measure("ours", *sizes), self.measure("trl", *sizes)) for _ in range(args.repeats)]
            if not all(self.same(a["checked"], b["checked"]) for a, b in pairs):
                raise SystemExit(f"the checked numbers differ, so this was not the same work: {pairs}")
            ratios, cpu = ([b[name] / a[name] for a, b in pairs] for name in ("seconds", "cpu"))
            middle = [
                [statistics.median(pair[i][name] for pair in pairs) for i in (0, 1)] for name in ("seconds", "mb")
            ]
            (ours, trl), (our_mb, trl_mb) = middle
            ratio = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
            print(
                f"| {candidates} | {factor} | {1000 * ours:.0f} | {1000 * trl:.0f} | {ratio} "
                f"| {statistics.median(cpu):.1f}x | {our_mb:.0f} | {trl_mb:.0f} | {trl_mb / our_mb:.1f}x |",
                flush=True,
            )
