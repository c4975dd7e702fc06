"""`rlhf demo`: all three stages, end to end, in a miniature world that is made on the spot.

base model -> people's demonstrations -> SFT -> answers ranked by annotators -> reward model -> PPO -> export ->
evaluation on prompts that no stage has read. The world's hidden rule (`data_tools.demo_world.rules`) ranks, through
annotators' noise, and evaluates; the stages are given demonstrations, rankings and prompts alone. They run with the
configs under configs/demo, as a user would run them.

Every step leaves its result whole or not at all, so an interrupted demo continues after the last whole one.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_tools.demo_world.base_model import make_base_model
from data_tools.demo_world.report import show, write_markdown
from data_tools.demo_world.rules import ANNOTATORS, POINTS, Verdict, agreement, judge, rank
from data_tools.demo_world.text import demonstrate, documents, prompts
from rlhf.cli import entry
from rlhf.cli.errors import exit_on_error
from rlhf.config.base import ModelConfig
from rlhf.core.console import say
from rlhf.core.errors import UserError
from rlhf.core.files import whole_folder, write_json
from rlhf.core.lazy import lazy
from rlhf.data.chat import load_tokenizer
from rlhf.data.encode import Counts, encode_ranking
from rlhf.data.schema import Candidate, Prompt, Ranking, dense_ranks
from rlhf.data.store import DatasetWriter, open_dataset
from rlhf.export.formats import EXPORTERS, export
from rlhf.inference.policy import Policy, open_policy, quiet, sampling_for
from rlhf.inference.sampling import Sampled, sample
from rlhf.inference.scorer import open_scorer
from rlhf.reward.metrics import ScoredRanking, accuracy_interval, reward_metrics
from rlhf.runs.run import is_run, read_run, resolve_model_path

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = lazy("numpy"), lazy("torch")

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
OVERRIDES = {
    "sft": {"run": "sft", "model.path": "base", "data.train": "data/demonstrations"},
    "reward": {"run": "reward", "model.path": "sft", "data.train": "data/rankings"},
    "ppo": {"run": "ppo", "model.path": "sft", "data.prompts": "data/prompts", "reward.path": "reward"},
}
"""Stage -> config keys that name a folder of the demo."""

K = 4
"""Candidates to rank for each prompt."""
DRAWN = 6
"""Answers that are drawn for them, since some are alike."""
BY_PEOPLE = 0.3
"""Share of prompts where a person wrote one of the candidates."""
SAMPLED_TOGETHER = 192
"""Answers in a batch."""
THREADS = 1
"""CPU threads; more of them barely help models this small, and wait for each other where the machine is busy."""


@dataclass(frozen=True)
class Size:
    """How much of everything the demo makes."""

    documents: int = 20_000
    base_steps: int = 1500
    demonstrated: int = 1000
    """Training prompts that a person answers."""
    ranked: int = 4000
    """Other training prompts whose answers are ranked. PPO answers both."""
    held_out: int = 100
    """Prompts of the split eval, on which the stages watch themselves."""
    tested: int = 400
    """Prompts of the split test, which the stages never read."""
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Stage -> further overrides of its config."""


def command(
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, deleting an earlier demo.")] = False,
) -> None:
    """Run all three stages in a miniature world, in minutes on a CPU, and measure what they gained."""
    again = ["rlhf", "demo", "--out", str(out), "--seed", str(seed)]
    with exit_on_error(f"Continue with: {shlex.join(again)}"):
        Demo(out, seed).run(overwrite)


class Demo:
    """The demo of one seed in one folder."""

    def __init__(self, out: Path, seed: int, size: Size | None = None) -> None:
        self.out, self.seed, self.size = out, seed, size or Size()

    def run(self, overwrite: bool = False) -> None:
        """Do the steps that are not done yet, then show the summary.

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
        quiet()
        torch.set_num_threads(THREADS)
        steps: list[tuple[str, str, Callable[[], None]]] = [
            ("base", "A base model learns the language of the world", self.make_base),
            ("data/prompts", "Prompts", self.write_prompts),
            ("data/demonstrations", "People answer some of them", self.write_demonstrations),
            ("sft", "Stage 1: instruction tuning", lambda: self.run_stage("sft")),
            ("data/rankings", "Annotators rank answers", self.write_rankings),
            ("reward", "Stage 2: the reward model", lambda: self.run_stage("reward")),
            ("ppo", "Stage 3: PPO", lambda: self.run_stage("ppo")),
            ("export", "Export", self.export),
            ("summary.json", "Evaluation on prompts that no stage has read", self.evaluate),
        ]
        new = not (self.out / "summary.json").is_file()
        for number, (name, title, do) in enumerate(steps, 1):
            if _is_whole(self.out / name):
                continue
            say(f"\n[{number}/{len(steps)}] {title}", style="bold")
            begun = time.monotonic()
            do()
            self._note_seconds(name, time.monotonic() - begun)
        summary = json.loads((self.out / "summary.json").read_text("utf-8"))
        write_markdown(summary, self.out / "summary.md")
        if not new:
            say(f"{self.out} holds this demo, complete; start anew with --overwrite. Its summary:")
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
                remedy="Start anew with --overwrite, or name another folder.",
            )
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, {"seed": self.seed, "seconds": {}})

    def _note_seconds(self, step: str, seconds: float) -> None:
        state = json.loads((self.out / "demo.json").read_text("utf-8"))
        state["seconds"][step] = state["seconds"].get(step, 0.0) + seconds
        write_json(self.out / "demo.json", state)

    def _random(self, purpose: str) -> random.Random:
        """A random stream of its own for each purpose, so that an interrupted demo goes on with the same numbers."""
        return random.Random(f"{self.seed} {purpose}")

    # ---- the world ---------------------------------------------------------------------------------------------------

    def make_base(self) -> None:
        """Train the base model."""
        text = list(documents(self.size.documents, self._random("documents")))
        with whole_folder(self.out / "base") as folder:
            facts = make_base_model(folder, text, self.size.base_steps, self.seed)
            write_json(folder / "facts.json", facts)
        say(f"{facts['parameters']:,} parameters, {facts['loss']:.3f} nats a token. It has read {text[0]!r} and so on.")

    def write_prompts(self) -> None:
        """All prompts, of the splits train, eval and test."""
        size = self.size
        counts = {"train": size.demonstrated + size.ranked, "eval": size.held_out, "test": size.tested}
        self._write("prompts", "prompt", prompts(counts, self._random("prompts")))

    def _write(self, name: str, kind: str, records: Sequence[Any]) -> None:
        with DatasetWriter(self.out / "data" / name, kind, {"made_by": "rlhf demo", "seed": self.seed}) as writer:
            for record in records:
                writer.write(record)
        say(f"{len(records):,} {name}, the first: {records[0].messages[-1].content!r}")

    def _prompts(self, split: str) -> list[Prompt]:
        return list(open_dataset(self.out / "data" / "prompts", "prompt").records(split))

    def write_demonstrations(self) -> None:
        """People answer the first training prompts and the eval prompts."""
        rng = self._random("demonstrations")
        asked = self._prompts("train")[: self.size.demonstrated] + self._prompts("eval")
        self._write("demonstrations", "demonstration", [demonstrate(prompt, rng) for prompt in asked])

    def write_rankings(self) -> None:
        """Annotators rank answers of the SFT policy, now and then one of a person among them.

        One annotator for each training prompt; two for each held-out prompt, which shows how far they agree.
        """
        rng = self._random("rankings")
        asked = self._prompts("train")[self.size.demonstrated :] + self._prompts("eval") + self._prompts("test")
        policy = open_policy(self.out / "sft")
        sampling = replace(sampling_for(self.out / "sft", max_new_tokens=64), batch_size=SAMPLED_TOGETHER)
        rankings: list[Ranking] = []
        for answers in sample(policy, asked, sampling, self.seed, DRAWN):
            prompt = answers[0].prompt
            found = _candidates(prompt, [answer.text for answer in answers], rng)
            if len(found) > 1:
                several = rng.sample(ANNOTATORS, 1 if prompt.split == "train" else 2)
                rankings += [rank(annotator, prompt, found, rng) for annotator in several]
        self._write("rankings", "ranking", rankings)

    # ---- stages and export -------------------------------------------------------------------------------------------

    def run_stage(self, stage: str) -> None:
        """Run a stage as `rlhf STAGE --config ...` does, in this process: three starts of torch are saved."""
        if (self.out / stage).is_dir() and not is_run(self.out / stage):
            shutil.rmtree(self.out / stage)  # killed before it became a run
        values = {key: (self.out / folder).as_posix() for key, folder in OVERRIDES[stage].items()}
        overrides = [f"{key}={json.dumps(value) if ' ' in value else value}" for key, value in values.items()]
        overrides += [f"seed={self.seed}", *self.size.overrides.get(stage, ())]
        file, resume = CONFIGS / f"{stage}.yaml", is_run(self.out / stage)
        words = ["rlhf", stage, "--config", os.path.relpath(file), *overrides, *(["--resume"] if resume else [])]
        say(f"$ {shlex.join(words)}", style="cyan")
        config = entry.prepare(stage, file, overrides, resume)
        if config is None:  # killed between the end of the run and our note of it
            return
        entry.run(importlib.import_module(f"stages.{stage}").run, config, resume, overwrite=False)

    def export(self) -> None:
        """The policy for plain transformers."""
        run, out = self.out / "ppo", self.out / "export"
        say(f"$ {shlex.join(['rlhf', 'export', str(run), '--out', str(out)])}", style="cyan")
        export(run, out, EXPORTERS.pick("hf"))

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Compare the exported policy with the SFT policy, and the reward model with annotators and rule."""
        asked = self._prompts("test")
        sampling = replace(sampling_for(self.out / "ppo"), batch_size=SAMPLED_TOGETHER)
        policies = {"sft": open_policy(self.out / "sft"), "ppo": open_policy(self.out / "export")}
        answers = {
            name: [found[0] for found in sample(policy, asked, sampling, self.seed)]
            for name, policy in policies.items()
        }
        scorer = open_scorer(str(self.out / "reward"), policies["sft"])
        verdicts = {name: [judge(a.prompt, a.text) for a in found] for name, found in answers.items()}
        summary = {
            "seed": self.seed,
            "base": json.loads((self.out / "base" / "facts.json").read_text("utf-8")),
            "records": {
                name: open_dataset(self.out / "data" / name).splits()
                for name in ("prompts", "demonstrations", "rankings")
            },
            "reward_model": self._judge_reward_model(),
            "policies": {name: _figures(answers[name], verdicts[name], scorer(answers[name])) for name in policies},
            "comparison": _compare(verdicts["ppo"], verdicts["sft"]),
            "kl": _divergence(answers["ppo"], policies["ppo"], policies["sft"]),
            "temperature": sampling.temperature,
            "samples": _samples(answers, verdicts),
            "export": str(self.out / "export"),
            "seconds": json.loads((self.out / "demo.json").read_text("utf-8"))["seconds"],
        }
        write_json(self.out / "summary.json", summary)

    def _judge_reward_model(self) -> dict[str, Any]:
        """The reward model on the rankings of test prompts, beside what the annotators' noise allows."""
        rankings = list(open_dataset(self.out / "data" / "rankings").records("test"))
        by_model = _score(self.out / "reward", rankings)
        points = [tuple(judge(r, c.text).points for c in r.candidates) for r in rankings]
        by_rule = [replace(item, scores=seen) for item, seen in zip(by_model, points)]
        true = [replace(item, ranks=dense_ranks(-p for p in seen)) for item, seen in zip(by_model, points)]
        model, rule = reward_metrics(by_model), reward_metrics(by_rule)
        agreed, pairs = (np.array(column) for column in zip(*agreement(rankings)))
        return {
            "accuracy": model["accuracy"],
            "accuracy_interval": model["accuracy_interval"],
            "pairs": model["pairs"],
            "longer_accuracy": model["longer_accuracy"],
            "agreement": float(agreed.sum() / pairs.sum()),
            "agreement_interval": accuracy_interval(agreed, pairs),
            # Of two annotators who are each right with probability q, both or neither are, so they agree with
            # q^2 + (1-q)^2. Solved for the mean q over pairs of any difficulty this is a bound (Jensen).
            "ceiling": 0.5 + math.sqrt(max(0.0, float(agreed.sum() / pairs.sum()) - 0.5) / 2),
            "rule_accuracy": rule["accuracy"],
            "accuracy_by_rule": reward_metrics(true)["accuracy"],
            "tied_share": model["tied_pairs"] / (model["tied_pairs"] + model["pairs"]),
        }


def _is_whole(path: Path) -> bool:
    """Whether a step's result is there. Runs say it themselves; all else appears under its name only when whole."""
    return read_run(path).get("status") == "complete" if is_run(path) else path.exists()


def _candidates(prompt: Prompt, drawn: Sequence[str], rng: random.Random) -> list[Candidate]:
    """Up to K distinct answers of the SFT policy, in one prompt of some a person's in place of the last."""
    texts = [text for text in dict.fromkeys(drawn) if text.strip()][:K]
    found = [Candidate(text, "sft", "model") for text in texts]
    if rng.random() < BY_PEOPLE:
        written = demonstrate(prompt, rng)
        if written.answer not in texts:
            found = [*found[: K - 1], Candidate(written.answer, written.author, "person")]
    rng.shuffle(found)
    return found


def _score(path: Path, rankings: Sequence[Ranking]) -> list[ScoredRanking]:
    """The rankings with a reward model's scores."""
    from rlhf.models.load import load_hf_config, sequence_limit
    from rlhf.models.scalar import load_scalar
    from rlhf.reward.scoring import score_rankings

    config, folder = ModelConfig(path=str(path)), resolve_model_path(path)
    chat, limit = load_tokenizer(config, folder), sequence_limit(config, load_hf_config(config, folder))
    rows = [encode_ranking(ranking, chat, limit, Counts()) for ranking in rankings]
    return score_rankings(load_scalar(config, folder), chat, [row for row in rows if row is not None], 16384)


def _figures(answers: Sequence[Sampled], verdicts: Sequence[Verdict], scores: Sequence[float]) -> dict[str, float]:
    """Means over answers: points, what the rule found, the reward model's score, tokens."""
    rows = [{"points": v.points, **{name: float(getattr(v, name)) for name in POINTS}} for v in verdicts]
    for row, answer, score in zip(rows, answers, scores):
        row |= {"score": score, "tokens": float(len(answer.answer.ids)), "ended": float(answer.answer.ended)}
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _compare(after: Sequence[Verdict], before: Sequence[Verdict]) -> dict[str, Any]:
    """How often the first policy's answer has more points than the other's to the same prompt."""
    gaps = np.array([a.points - b.points for a, b in zip(after, before)])
    decided = gaps[gaps != 0]
    return {
        "wins": int((decided > 0).sum()),
        "losses": int((decided < 0).sum()),
        "ties": int((gaps == 0).sum()),
        "win_rate": float((decided > 0).mean()) if len(decided) else None,
        "interval": accuracy_interval(decided > 0, np.ones(len(decided), dtype=int)),
        "mean_difference": float(gaps.mean()),
    }


def _divergence(answers: Sequence[Sampled], policy: Policy, reference: Policy) -> float:
    """KL divergence of the policy from the reference in nats an answer, estimated on the policy's answers (k1)."""
    from rlhf.models.logprobs import token_logprobs

    ids, mask = policy.chat.pad([a.prompt_ids + a.answer.ids for a in answers])
    start = torch.tensor([[len(a.prompt_ids)] for a in answers])
    said = mask.bool() & (torch.arange(ids.shape[1]) >= start)
    with torch.no_grad():
        mine, theirs = (token_logprobs(p.model, ids, mask, said, temperature=1.0)[0] for p in (policy, reference))
    return float((mine - theirs).sum()) / len(answers)


def _samples(
    answers: Mapping[str, Sequence[Sampled]], verdicts: Mapping[str, Sequence[Verdict]]
) -> list[dict[str, Any]]:
    """The first prompt of each kind of request, with both answers and their points."""
    first: dict[str | None, int] = {}
    for index, answer in enumerate(answers["sft"]):
        first.setdefault(answer.prompt.group, index)
    return [
        {
            "prompt": answers["sft"][i].prompt.messages[-1].content,
            **{name: {"answer": found[i].text, "points": verdicts[name][i].points} for name, found in answers.items()},
        }
        for i in first.values()
    ]
