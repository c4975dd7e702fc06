"""The loop of the SFT stage against TRL's SFTTrainer used plainly: time and peak memory, to show that we add no cost.

    python benchmarks/sft.py

Both train stories260K on the same token rows (stories: the first eight words are the prompt, the rest is the answer) in
the same order, all weights, float32, with the same AdamW, schedule, clipping, batch and micro-batch; recomputation of
activations is on or off on both sides. Ours also counts tokens over ranks, checks each loss and gradient, and writes
metrics.jsonl and a checkpoint for exact resume; TRL writes its own checkpoint. "Whole" is the time from creating the
trainer to the saved model. The program stops if the losses of a step differ. Each run is a separate process; the sides
alternate, so that a busy machine slows both. Peak memory is above the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models" / "stories260K"
LEARNING_RATE, SEED, PROMPT_WORDS = 3e-4, 0, 8
SAME = 1e-3
"""Largest allowed difference of the two losses of a step, nats: they are summed in a different order."""


def token_rows(count: int, batch: int) -> list[dict[str, Any]]:
    """Demonstrations as our stage encodes them, in its training order."""
    import transformers

    from rlhf.config.base import ModelConfig
    from rlhf.data.chat_tokenizer import load_tokenizer
    from rlhf.data.encode_records import EncodingCounts, encode_demonstration
    from rlhf.data.schema import Demonstration, Message
    from rlhf.training.epoch_order import epoch_order

    transformers.utils.logging.set_verbosity_error()  # stories longer than the model's limit are cut, as in the stage
    chat = load_tokenizer(ModelConfig(path=str(MODEL), chat_template="plain"), str(MODEL))
    stories = (SHARED / "data" / "text" / "tinystories_1000.jsonl").read_text("utf-8").splitlines()
    rows = []
    for words in (json.loads(line)["text"].split() for line in stories):
        if len(words) < 2 * PROMPT_WORDS:
            continue
        prompt, answer = (Message("user", " ".join(words[:PROMPT_WORDS])),), " " + " ".join(words[PROMPT_WORDS:])
        row = encode_demonstration(Demonstration(prompt, answer=answer), chat, 512, EncodingCounts())
        rows += [row] if row else []
    rows = rows[:count]
    if len(rows) < count:
        raise SystemExit(f"{count} rows are needed, but there are only {len(rows)}: lower --steps or --batch")
    return [rows[i] for i in epoch_order(SEED, 0, count, batch, None)]


# ---- one run, in a process of its own ------------------------------------------------------------------------------


class Timed:
    """Wall-clock and processor seconds of each step."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, float]] = []
        self.ended: list[tuple[float, float]] = []

    def begin(self) -> None:
        self.begun.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        self.ended.append((time.perf_counter(), time.process_time()))

    def wrap(self, step: Callable[[], T]) -> Callable[[], T]:
        """The same function, timed."""

        def timed() -> T:
            self.begin()
            found = step()
            self.end()
            return found

        return timed

    def medians(self) -> tuple[float, float]:
        """Of all steps except the first."""
        steps = list(zip(self.begun, self.ended))[1:]
        seconds, cpu = (statistics.median(end[i] - begin[i] for begin, end in steps) for i in (0, 1))
        return seconds, cpu


def ours(spec: dict[str, Any], rows: Any, timed: Timed) -> tuple[Any, Any, Any]:
    """Functions that train with our loop, save its result, and give the losses of the steps."""
    from rlhf.config.load import check_config
    from rlhf.data.chat_tokenizer import load_tokenizer
    from rlhf.models.load import load_policy
    from rlhf.runs.run import open_run
    from rlhf.sft.config import SFTConfig
    from rlhf.training.epoch_order import StepRows
    from rlhf.training.loop import Loop, supervised_engine
    from rlhf.tuning.save import save_result
    from stages.sft import SFTObjective, TokenPredictor

    batch = {"batch_size": spec["batch"], "micro_batch_size": spec["micro"], "group_by_length": False}
    values = {
        "run": f"{spec['place']}/run",
        "seed": SEED,
        "model": {"path": str(MODEL), "chat_template": "plain"},
        "data": {"train": "rows of the benchmark"},
        "precision": "float32",
        "batch": batch,
        "gradient_checkpointing": spec["checkpointing"],
        "optimizer": {"lr": LEARNING_RATE, "schedule": "linear", "warmup": 0.0},
    }
    config = check_config(SFTConfig, values, "benchmark")
    chat, run = load_tokenizer(config.model, str(MODEL)), open_run(config, "sft", False, False, {})

    class InOrder(StepRows):
        def __getitem__(self, step: int) -> list[int]:
            return list(range(step * self.batch, (step + 1) * self.batch))

    model = load_policy(config.model, str(MODEL))
    engine = supervised_engine(config, TokenPredictor(model))
    loop = Loop(config, run, engine, SFTObjective(config, chat, model, None), rows, held_out=False)
    loop.rows = InOrder(SEED, len(rows), spec["batch"], None)
    loop._train_step = timed.wrap(loop._train_step)  # type: ignore[method-assign]

    def losses() -> list[float]:
        lines = (run.path / "metrics.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["train/loss"] for line in lines]

    return lambda: loop.fit(False), lambda: save_result(run.path, model, chat, config.tuning), losses


def trl(spec: dict[str, Any], rows: Any, timed: Timed) -> tuple[Any, Any, Any]:
    """The same functions for TRL's trainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=f"{spec['place']}/trl", seed=SEED, per_device_train_batch_size=spec["micro"],
        gradient_accumulation_steps=spec["batch"] // spec["micro"], num_train_epochs=1, learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear", optim="adamw_torch", max_grad_norm=1.0, logging_steps=1, max_length=None,
        bf16=False, use_cpu=True, gradient_checkpointing=spec["checkpointing"], report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *words: Any, **more: Any) -> None:
            timed.begin()

        def on_step_end(self, *words: Any, **more: Any) -> None:
            timed.end()

        def on_log(self, *words: Any, logs: Any = None, **more: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()])
    return trainer.train, lambda: trainer.save_model(f"{spec['place']}/model"), lambda: losses


def run(side: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Train and measure: wall-clock and processor seconds per step (without the first), whole, MB, losses."""
    import datasets
    import deepspeed  # noqa: F401  both sides import these libraries; memory is counted above them
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import_module("trl.trainer.sft_trainer")
    from ppo_sides import resident

    import stages.sft  # noqa: F401

    rows = datasets.Dataset.from_list(json.loads(Path(spec["rows"]).read_text("utf-8")))
    base, start = resident("VmRSS"), time.perf_counter()
    timed = Timed()
    train, save, losses = {"ours": ours, "trl": trl}[side](spec, rows, timed)
    train()
    save()
    whole = time.perf_counter() - start
    seconds, cpu = timed.medians()
    return {"seconds": seconds, "cpu": cpu, "whole": whole, "mb": resident("VmHWM") - base, "losses": losses()}


# ---- all runs ---------------------------------------------------------------------------------------------------


def measure(side: str, spec: dict[str, Any]) -> dict[str, Any]:
    """`run` in a new process with one thread, unless OMP_NUM_THREADS says otherwise."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--one", side, json.dumps(spec | {"place": place})]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(spec: dict[str, Any], repeats: int) -> None:
    """Print the rows of one setting: ours, TRL, and the median of the ratios of neighbouring runs."""
    pairs = [(measure("ours", spec), measure("trl", spec)) for _ in range(repeats)]
    apart = max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine["losses"], theirs["losses"], strict=True))
    if apart > SAME:
        raise SystemExit(f"the losses of a step differ by {apart:.5f}, so the two did not do the same work")
    name = "recomputed" if spec["checkpointing"] else "kept"
    columns = (("seconds", 1000), ("cpu", 1000), ("whole", 1), ("mb", 1))
    for i, side in enumerate(("ours", "TRL")):
        first, *_, last = pairs[0][i]["losses"]
        cells = [f"{scale * statistics.median(pair[i][key] for pair in pairs):,.4g}" for key, scale in columns]
        print(f"| {name} | {side} | {' | '.join(cells)} | {first:.4f} -> {last:.4f} |")
    cells = []
    for key, _ in columns:
        ratios = [mine[key] / theirs[key] for mine, theirs in pairs]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"| {name} | ours / TRL | {' | '.join(cells)} | differ by at most {apart:.1e} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="Optimizer steps; the first is not measured.")
    parser.add_argument("--batch", type=int, default=16, help="Demonstrations per optimizer step.")
    parser.add_argument("--micro", type=int, default=8, help="Demonstrations per forward pass.")
    parser.add_argument("--activations", nargs="+", choices=("kept", "recomputed"), default=("kept", "recomputed"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one[0], json.loads(args.one[1]))))
        return
    sys.path.insert(0, str(ROOT))
    print("| activations | | ms per step | processor ms | whole, s | peak MB | loss, first -> last step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(token_rows(args.steps * args.batch, args.batch), file)
        file.flush()
        for activations in args.activations:
            spec = {"rows": file.name, "batch": args.batch, "micro": args.micro}
            compare(spec | {"checkpointing": activations == "recomputed"}, args.repeats)


if __name__ == "__main__":
    main()
