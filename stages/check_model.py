"""`rlhf check-model`: which stages work with a model, tested on it or on a tiny copy of its architecture.

model -> prompt tokens -> sft -> reward -> dpo -> ppo -> export -> plain transformers, with all weights and with LoRA
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import typer

from rlhf.cli import options
from rlhf.cli.preflight import check
from rlhf.cli.stage_configs import STAGES
from rlhf.config.base import ModelConfig
from rlhf.config.load import check_config
from rlhf.core.console import print_json, say, table
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.data.schema import Candidate, Demonstration, Message, Ranking
from rlhf.data.writer import DatasetWriter
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.runs.metrics import read_metrics
from rlhf.runs.parents import resolve_model_path

Result = Literal["works", "no", "refused", "failed"]
"""`no`: not possible with this model, and not needed. `refused`: an error that says why. `failed`: a bug, here or in
the model's code."""
MAX_LENGTH = 512
ANSWERS = (
    "It sleeps.",
    "It goes to the house and sleeps there.",
    "It goes to the river, then to the garden, and sleeps.",
)


@dataclass(frozen=True)
class CheckStep:
    """One row of the table."""

    step: str
    result: Result
    detail: str
    """What was found, or what is wrong."""
    remedy: str = ""
    """Why that is so, and what to do about it."""


@dataclass
class ModelCheck:
    """The steps of one model, in one folder.

    Args:
        model: A model folder, a run, or a hub name.
        folder: Where data, runs and exports are written.
        tunings: Rows of the tuning table to try, in order.
        trust_remote_code: Run Python code that comes with the model.
    """

    model: str
    folder: Path
    tunings: tuple[str, ...] = ("full", "lora")
    trust_remote_code: bool = False
    steps: list[CheckStep] = field(default_factory=list)

    def run(self) -> list[CheckStep]:
        """Try all steps; one that fails is a row of the result, and steps that need it are left out."""
        from rlhf.inference import model_checks

        def prompt_tokens() -> str:
            chat = load_tokenizer(self._model_config(self.model), resolve_model_path(self.model))
            return model_checks.prompt_tokens(chat)

        if self._attempt("prompt tokens", prompt_tokens):
            self._write_data()
            for tuning in self.tunings:
                self._try(tuning)
        return self.steps

    def _try(self, tuning: str) -> None:
        """The stages and exports with one tuning method; with the first, also how rows are shared."""
        from rlhf.inference import model_checks

        trust, suffix = self.trust_remote_code, "" if tuning == "full" else f", {tuning}"
        sft, reward, dpo, ppo = (str(self.folder / f"{stage}-{tuning}") for stage in STAGES)
        if not self._attempt(f"sft{suffix}", self._stage, "sft", self.model, sft, tuning):
            return
        rewarded = self._attempt(f"reward{suffix}", self._stage, "reward", sft, reward, tuning)
        self._attempt(f"dpo{suffix}", self._stage, "dpo", sft, dpo, tuning)
        if rewarded:
            self._attempt(f"ppo{suffix}", self._stage, "ppo", sft, ppo, tuning, reward)
        policy = ppo if Path(ppo, "model").is_dir() else sft
        self._attempt(f"exported policy{suffix}", self._exported, policy, model_checks.policy_logits)
        if rewarded:
            self._attempt(f"exported reward{suffix}", self._exported, reward, model_checks.reward_scores)
        if tuning == self.tunings[0]:
            critic = reward if rewarded else None
            self._attempt("packing", model_checks.packing, policy, critic, trust, needed=False)
            if rewarded:
                self._attempt("shared prompts", model_checks.shared_prompts, reward, trust, needed=False)

    def _attempt(self, step: str, do: Callable[..., str], *arguments: Any, needed: bool = True) -> bool:
        """Run one step and record its result. What stages print goes to `log.txt`."""
        file = open(self.folder / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 (closed below)
        try:
            with file as log, redirect_stdout(log), redirect_stderr(log):
                found = CheckStep(step, "works", do(*arguments))
        except UserError as error:
            result: Result = "refused" if needed else "no"
            found = CheckStep(step, result, error.what, f"{error.why} {error.remedy}".strip())
        except Exception as error:  # the table shows a bug in any family as a row
            found = CheckStep(step, "failed", f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"[:300])
        self.steps.append(found)
        return found.result == "works"

    def _model_config(self, path: str) -> ModelConfig:
        return ModelConfig(path=path, trust_remote_code=self.trust_remote_code)

    def _write_data(self) -> None:
        candidates = tuple(Candidate(answer, f"writer {k}") for k, answer in enumerate(ANSWERS))
        with (
            DatasetWriter(self.folder / "demonstrations", "demonstration") as demonstrations,
            DatasetWriter(self.folder / "rankings", "ranking") as rankings,
        ):
            for number, animal in enumerate(("cat", "dog", "owl", "fox", "hen", "cow", "bee", "ant")):
                prompt = (Message("user", f"What does the {animal} do?"),)
                split = "eval" if number >= 6 else "train"
                demonstrations.write(Demonstration(prompt, split=split, answer=ANSWERS[number % 3]))
                rankings.write(Ranking(prompt, split=split, candidates=candidates, ranks=(1, 2, 3)))

    def _stage(self, stage: str, model: str, run: str, tuning: str, reward: str | None = None) -> str:
        """Run a stage for two steps; returns its first and last loss, or PPO's first ratio."""
        from rlhf.models.load import load_hf_config, sequence_limit

        path = self._model_config(model)
        limit = sequence_limit(path, load_hf_config(path, resolve_model_path(model)))
        settings: dict[str, Any] = {"path": model, "max_length": min(limit, MAX_LENGTH)}
        settings["trust_remote_code"] = self.trust_remote_code
        values: dict[str, Any] = {"run": run, "model": settings, "tuning": tuning}
        if stage == "ppo":
            values |= {"data": {"prompts": str(self.folder / "demonstrations")}, "updates": 2}
            values |= {"reward": {"name": "model", "path": reward}, "critic": {"tuning": tuning}}
            values["rollout"] = {"prompts_per_update": 4, "max_new_tokens": 16}
            values |= {"batch": {"epochs": 2, "minibatches": 2}, "eval": {"every": 2, "prompts": 2}}
        else:
            kind = "demonstrations" if stage == "sft" else "rankings"
            values["data"] = {"train": str(self.folder / kind)}
            values["batch"] = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 2}
        config = check_config(STAGES[stage], values, f"check-model, {stage}")
        check(stage, config, resume=False, overwrite=False)
        importlib.import_module(f"stages.{stage}").run(config)
        metrics = read_metrics(run)
        if stage == "ppo":
            return _ratio(metrics)
        losses = metrics["train/loss"].dropna()
        return f"loss {losses.iloc[0]:.4g}, then {losses.iloc[-1]:.4g}"

    def _exported(self, run: str, compare: Callable[[str, Path, bool], str]) -> str:
        """Export a run, and compare the export with it."""
        out = Path(f"{run}-exported")
        export(run, out, EXPORTERS.pick("hf"), trust_remote_code=self.trust_remote_code)
        return compare(run, out, self.trust_remote_code)


def _ratio(metrics: Any) -> str:
    from rlhf.inference.model_checks import Different

    low, high = metrics["policy/first_ratio_min"].min(), metrics["policy/first_ratio_max"].max()
    off = max(high - 1, 1 - low)
    if off > 1e-4:
        raise Different(f"the first ratio of an update is {low:.6g} to {high:.6g}, not 1")
    return f"the first ratio is 1 within {off:.1g}" if off else "the first ratio is 1"


def passed(steps: list[CheckStep]) -> bool:
    """Whether everything that a run needs works."""
    return all(step.result in ("works", "no") for step in steps)


def make_tiny_copy(model: str, folder: Path, trust_remote_code: bool = False) -> str:
    """Write a small, randomly initialised model of the architecture of `model`, and its tokenizer; returns a
    description.

    Raises:
        UserError: The model's config cannot be read or made small.
    """
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    from rlhf.models.load import load_hf_config, quiet, refuse_encoder_decoder
    from rlhf.models.tiny_copy import random_model, tiny_config

    quiet()
    path = resolve_model_path(model)
    config = load_hf_config(ModelConfig(path=model, trust_remote_code=trust_remote_code), path)
    refuse_encoder_decoder(config, model, "`rlhf check-model` does")
    try:
        made = random_model(tiny_config(config))
    except Exception as error:  # the rules do not fit every family
        raise UserError(
            f"{model}: no tiny copy can be made of this {config.model_type} ({type(error).__name__}: {error})",
            remedy="Check the model itself with --whole.",
        ) from error
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code).save_pretrained(folder)
    own = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if own is not None:
        shutil.copyfile(own, folder / "generation_config.json")
    return f"{type(made).__name__}, a random copy of {made.num_parameters():,} parameters"


def command(
    model: options.Model,
    *,
    whole: bool = False,
    keep: Path | None = None,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Try all stages and the export on a model for two steps, by default on a tiny random copy of its architecture.

    Args:
        whole: Train the model itself, which needs the memory of its PPO run.
        keep: A new folder for runs, exports and log.txt; otherwise they are deleted.
    """
    if keep is not None and keep.exists():
        raise UserError(f"--keep {keep}: exists", remedy="Name a new folder.")
    folder = Path(tempfile.mkdtemp(prefix="check-model-")) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    try:
        what, path = f"{model} itself", model
        if not whole:
            path = str(folder / "model")
            what = make_tiny_copy(model, Path(path), trust_remote_code)
        steps = ModelCheck(path, folder.resolve(), trust_remote_code=trust_remote_code).run()
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    table(
        f"{model}: {what}",
        ["step", "result", "detail"],
        [(s.step, s.result, f"{s.detail}\n{s.remedy}".strip()) for s in steps],
    )
    say("Everything that a run needs works." if passed(steps) else "Not everything works; see the table.")
    if as_json:
        print_json({"model": model, "checked": what, "works": passed(steps), "steps": [asdict(s) for s in steps]})
    raise typer.Exit(0 if passed(steps) else 1)
