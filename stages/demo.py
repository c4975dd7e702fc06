"""`rlhf demo`: all three stages, end to end, in a generated miniature world.

base model -> people's demonstrations -> SFT -> answers ranked by annotators -> reward model -> PPO -> export ->
evaluation on prompts that no stage has read. The world's hidden rule (`data_tools.demo_world.rules`) is known only to
the annotators, who rank with noise, and to the evaluation. The stages get only demonstrations, rankings and prompts,
and run with the configs under configs/demo, as a user would run them.

The result of a step appears only when it is complete, so an interrupted demo continues after the last complete step.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_tools.demo_world.datasets import Size, WorldDatasets
from data_tools.demo_world.report import show, write_markdown
from data_tools.demo_world.text import documents
from rlhf.cli import entry, options
from rlhf.cli.errors import exit_on_error
from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.core.files import whole_folder, write_json
from rlhf.inference.sampling_params import sampling_params
from rlhf.runs.run import is_finished, is_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
OVERRIDES = {
    "sft": {"run": "sft", "model.path": "base", "data.train": "data/demonstrations"},
    "reward": {"run": "reward", "model.path": "sft", "data.train": "data/rankings"},
    "ppo": {"run": "ppo", "model.path": "sft", "data.prompts": "data/prompts", "reward.path": "reward"},
}
"""Stage -> config keys that name a folder of the demo."""
SAMPLED = 6
"""Answers that are sampled for each prompt to rank; some are duplicates."""
SAMPLED_TOGETHER = 192
"""Answers in a batch."""
THREADS = 1
"""CPU threads. More barely speed up models this small, and slow them down on a busy machine."""


def command(
    *,
    out: Path = Path("runs/demo"),
    seed: options.NotNegative = 0,
    overwrite: bool = False,
) -> None:
    """Run all three stages in a miniature world, in minutes on a CPU, and measure the improvement.

    Args:
        out: Output folder.
        seed: Random seed.
        overwrite: Delete an earlier demo and start again.
    """
    again = ["rlhf", "demo", "--out", str(out), "--seed", str(seed)]
    with exit_on_error(f"Continue with: {shlex.join(again)}"):
        Demo(out, seed).run(overwrite)


class Demo:
    """The demo of one seed in one folder."""

    def __init__(self, out: Path, seed: int, size: Size | None = None) -> None:
        self.out, self.seed, self.size = out, seed, size or Size()
        self.data = WorldDatasets(out / "data", seed, self.size)

    def run(self, overwrite: bool = False) -> None:
        """Run the steps that are not complete yet, then print the summary.

        Raises:
            UserError: The folder holds something else, or a demo of another seed.
        """
        if not CONFIGS.is_dir():
            raise UserError(
                f"the demo's configs are not at {CONFIGS}",
                "They come with the repository.",
                "Run it from a clone: make demo.",
            )
        self._open(overwrite)
        import torch  # slow, so after the checks

        from rlhf.models.load import quiet

        quiet()
        torch.set_num_threads(THREADS)
        steps: list[tuple[str, str, Callable[[], None]]] = [
            ("base", "A base model learns the language of the world", self.make_base),
            ("data/prompts", "Prompts", self.data.write_prompts),
            ("data/demonstrations", "People answer some of them", self.data.write_demonstrations),
            ("sft", "Stage 1: instruction tuning", lambda: self.run_stage("sft")),
            ("data/rankings", "Annotators rank answers", self.write_rankings),
            ("reward", "Stage 2: the reward model", lambda: self.run_stage("reward")),
            ("ppo", "Stage 3: PPO", lambda: self.run_stage("ppo")),
            ("export", "Export", self.export),
            ("summary.json", "Evaluation on prompts that no stage has read", self.evaluate),
        ]
        new = not (self.out / "summary.json").is_file()
        for number, (name, title, do) in enumerate(steps, 1):
            if _is_complete(self.out / name):
                continue
            say(f"\n[{number}/{len(steps)}] {title}", style="bold")
            begun = time.monotonic()
            do()
            self._note_seconds(name, time.monotonic() - begun)
        summary = json.loads((self.out / "summary.json").read_text("utf-8"))
        write_markdown(summary, self.out / "summary.md")
        if not new:
            say(f"{self.out} holds this demo, complete; start again with --overwrite. Its summary:")
        show(summary)

    def _open(self, overwrite: bool) -> None:
        file = self.out / "demo.json"
        if self.out.exists() and not file.is_file() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"--out {self.out}: exists and is not a demo", remedy="Name another folder.")
        if overwrite and file.is_file():
            shutil.rmtree(self.out)
        if file.is_file() and (found := json.loads(file.read_text("utf-8"))["seed"]) != self.seed:
            raise UserError(
                f"--out {self.out}: holds a demo of seed {found}, not {self.seed}",
                remedy="Start again with --overwrite, or name another folder.",
            )
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, {"seed": self.seed, "seconds": {}})

    def _note_seconds(self, step: str, seconds: float) -> None:
        state = json.loads((self.out / "demo.json").read_text("utf-8"))
        state["seconds"][step] = state["seconds"].get(step, 0.0) + seconds
        write_json(self.out / "demo.json", state)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def make_base(self) -> None:
        """Train the base model."""
        from data_tools.demo_world.base_model import make_base_model  # imports torch

        text = list(documents(self.size.documents, self.data.random("documents")))
        with whole_folder(self.out / "base") as folder:
            facts = make_base_model(folder, text, self.size.base_steps, self.seed)
            write_json(folder / "facts.json", facts)
        say(f"{facts['parameters']:,} parameters, {facts['loss']:.3f} nats a token. It has read {text[0]!r} and so on.")

    def write_rankings(self) -> None:
        """Sample answers of the SFT policy and have them ranked."""
        from rlhf.inference.policy import open_policy  # imports torch
        from rlhf.inference.sampling import sample

        params = replace(sampling_params(self.out / "sft", max_new_tokens=64), batch_size=SAMPLED_TOGETHER)
        found = sample(open_policy(self.out / "sft"), self.data.prompts_to_rank(), params, self.seed, SAMPLED)
        self.data.write_rankings((samples[0].prompt, [one.text for one in samples]) for samples in found)

    def run_stage(self, stage: str) -> None:
        """Run a stage as `rlhf STAGE --config ...` does, but in this process, which saves an import of torch."""
        if (self.out / stage).is_dir() and not is_run(self.out / stage):
            shutil.rmtree(self.out / stage)  # left by a process that was killed before it had made a run
        values = {key: (self.out / folder).as_posix() for key, folder in OVERRIDES[stage].items()}
        overrides = [f"{key}={json.dumps(value) if ' ' in value else value}" for key, value in values.items()]
        overrides += [f"seed={self.seed}", *self.size.overrides.get(stage, ())]
        file, resume = CONFIGS / f"{stage}.yaml", is_run(self.out / stage)
        words = ["rlhf", stage, "--config", os.path.relpath(file), *overrides, *(["--resume"] if resume else [])]
        say(f"$ {shlex.join(words)}", style="cyan")
        config = entry.prepare(stage, file, overrides, resume)
        if config is not None:  # None if a killed demo had completed the run
            entry.run(importlib.import_module(f"stages.{stage}").run, config, resume, overwrite=False)

    def export(self) -> None:
        """Export the policy for plain transformers."""
        from rlhf.export.export import export
        from rlhf.export.formats import EXPORTERS

        run, out = self.out / "ppo", self.out / "export"
        say(f"$ {shlex.join(['rlhf', 'export', str(run), '--out', str(out)])}", style="cyan")
        export(run, out, EXPORTERS.pick("hf"))

    def evaluate(self) -> None:
        """Compare the exported policy with the SFT policy, and the reward model with annotators and rule."""
        from stages.demo_evaluation import evaluate  # imports torch

        params = replace(sampling_params(self.out / "ppo"), batch_size=SAMPLED_TOGETHER)
        state = json.loads((self.out / "demo.json").read_text("utf-8"))
        summary = evaluate(self.out, self.data, params) | {"seconds": state["seconds"]}
        write_json(self.out / "summary.json", summary)


def _is_complete(path: Path) -> bool:
    """Whether a step's result exists. A run records its status; anything else gets its name only when complete."""
    return is_finished(path) if is_run(path) else path.exists()
