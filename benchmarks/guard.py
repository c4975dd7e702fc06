"""Does the guard see over-optimisation in time, and how many rankings does a reward model need? In the demo's world.

    rlhf demo --out runs/demo                           # a base model, an SFT policy, prompts
    python benchmarks/guard.py run --kind weak --seeds 0 1 2 3 4 --json guard.jsonl
    python benchmarks/guard.py run --kind good --seeds 0 1 2 3 4 --json guard.jsonl
    python benchmarks/guard.py perturbed --kind weak --seeds 0 1 2 3 4 --json perturbed.jsonl
    python benchmarks/guard.py stories --seeds 0 1 2 3 4 --json guard.jsonl
    python benchmarks/guard.py sizes --seeds 0 1 2 --json guard.jsonl
    python benchmarks/guard.py report guard.jsonl --out docs/images

`weak`: PPO against a reward model from 100 rankings with two to three times the annotators' usual noise. `good`: the
same against the demo's, from 4,000 rankings. Both at a fifth of the demo's KL coefficient, so that little but the
reward model keeps the policy honest; gold is the world's hidden rule. `stories`: stories260K and a programmatic reward,
which is its own gold. `sizes`: the accuracy that 100 to 30,000 rankings buy, and the gold reward of the best of 16
answers; each seed draws its rankings from the same 32,000. Steps that are complete are not repeated. 20 to 40 processor
seconds a run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy import stats

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs" / "demo"
BEST_OF = 16
SAMPLED, SAMPLED_TOGETHER = 6, 192
"""Answers that are sampled for each prompt to rank, and in a batch, as in `rlhf demo`."""
SIZES = (100, 200, 400, 1000, 2000, 4000, 10_000, 30_000)
KINDS = ("weak", "good")
GOLD = "data_tools.demo_world.rules:points"
PPO = (
    "updates=40", "rollout.prompts_per_update=48", "kl.controller.coef=0.02", "optimizer.schedule=constant",
    "eval.every=10", "eval.prompts=100", "checkpoints.every=1000", "checkpoints.keep=1", "guard.perturb={every: 5}",
)  # fmt: skip


# ---- rankings ------------------------------------------------------------------------------------------------------


def write_rankings(
    demo: Path, folder: Path, count: int, noise: float | None, seed: int, part: tuple[int, int] | None = None,
    source: Path | None = None,
) -> None:  # fmt: skip
    """`count` of the demo's training rankings (or those of `source`) and its held-out ones; the former ranked again
    where `noise` is given. With `part`, the number of a part and how many of the `count` rankings are in it, those
    alone."""
    from data_tools.demo_world.rules import Annotator, rank
    from rlhf.data.store import open_dataset
    from rlhf.data.writer import DatasetWriter

    if (folder / "manifest.json").is_file():
        return
    rng, rankings = random.Random(f"{seed} {count}"), open_dataset(demo / "data" / "rankings", "ranking")
    pool = open_dataset(source, "ranking") if source else rankings
    chosen = rng.sample(list(pool.records("train")), count)
    if noise is not None:
        chosen = [rank(Annotator("noisy", noise), ranking, ranking.candidates, rng) for ranking in chosen]
    if part is not None:
        chosen = random.Random(f"{seed} part {part[0]}").sample(chosen, part[1])
    with DatasetWriter(folder, "ranking", {"made_by": "benchmarks/guard.py"}, overwrite=True) as writer:
        for ranking in (*chosen, *rankings.records("eval")):
            writer.write(ranking)


def more_rankings(demo: Path, folder: Path) -> Path:
    """A dataset of at least as many rankings as the largest of `SIZES`: the demo's annotators rank its SFT policy's
    answers to its 4,000 training requests, other answers in each pass over them."""
    from data_tools.demo_world.datasets import Size, WorldDatasets
    from rlhf.inference.policy import open_policy
    from rlhf.inference.sampling import sample
    from rlhf.inference.sampling_params import sampling_params

    world, made = WorldDatasets(demo / "data", 0, Size()), WorldDatasets(folder, 0, Size())
    if not (folder / "rankings" / "manifest.json").is_file():
        prompts = world.prompts("train")[world.size.demonstrated :]
        params = replace(sampling_params(demo / "sft", max_new_tokens=64), batch_size=SAMPLED_TOGETHER)
        passes = max(SIZES) // len(prompts) + 1
        policy = open_policy(demo / "sft")
        answers = (one for i in range(passes) for one in sample(policy, prompts, params, i, SAMPLED))
        made.write_rankings((samples[0].prompt, [one.text for one in samples]) for samples in answers)
    return folder / "rankings"


# ---- runs ----------------------------------------------------------------------------------------------------------


def run_stage(stage: str, file: Path, overrides: Sequence[str]) -> Path:
    """A stage with a config and overrides, unless its run is complete."""
    from rlhf.cli import entry
    from rlhf.runs.run import is_run, read_run

    run = Path(next(word for word in overrides if word.startswith("run="))[4:])
    if not (is_run(run) and read_run(run)["status"] == "complete"):
        config = entry.prepare(stage, file, overrides, overwrite=is_run(run))
        entry.run(importlib.import_module(f"stages.{stage}").run, config, False, overwrite=is_run(run))
    return run


def reward_model(demo: Path, out: Path, rankings: Path, count: int, seed: int) -> Path:
    """A reward model from the SFT policy: 8 epochs of at most 400 rankings, 2 of up to 10,000, 1 of more."""
    epochs = 8 if count <= 400 else 2 if count <= 10_000 else 1
    return run_stage("reward", CONFIGS / "reward.yaml", [
        f"run={out}", f"model.path={demo / 'sft'}", f"data.train={rankings}", f"seed={seed}", "loss=bradley-terry",
        f"batch.epochs={epochs}", "eval.every=10000", "checkpoints.every=10000",
    ])  # fmt: skip


def policy_run(demo: Path, out: Path, models: Sequence[Path], seed: int) -> Path:
    """PPO against the first reward model, with the hidden rule as gold; an ensemble of all looks on."""
    watch = f"guard.watch={{name: ensemble, models: [{', '.join(map(str, models))}]}}"
    gold = f"gold={{reward: {{name: function, function: '{GOLD}'}}}}"
    return run_stage("ppo", CONFIGS / "ppo.yaml", [
        f"run={out}", f"model.path={demo / 'sft'}", f"data.prompts={demo / 'data/prompts'}",
        f"reward.path={models[0]}", f"seed={seed}", gold, watch, *PPO,
    ])  # fmt: skip


def reward_models(args: argparse.Namespace, kind: str, seed: int) -> list[Path]:
    """The reward model that trains the policy, and two from random 3/8 of its rankings each, which look on with it."""
    if kind == "good":
        first, count, folder, noise = args.demo / "reward", 4000, args.out / "good-rewards", None
    else:
        first, count, folder, noise = args.out / f"weak-{seed}" / "reward-0", 100, args.out / f"weak-{seed}", 3.0
        write_rankings(args.demo, folder / "rankings", count, noise, seed)
        reward_model(args.demo, first, folder / "rankings", count, 10 * seed)
    found = [first]
    for number in (1, 2):
        rankings = folder / f"rankings-{number}"
        write_rankings(args.demo, rankings, count, noise, seed if kind == "weak" else 0, part=(number, 3 * count // 8))
        found.append(reward_model(args.demo, folder / f"reward-{number}", rankings, 3 * count // 8, 10 * seed + number))
    return found


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs of a kind: what was logged, for `report`."""
    for seed in args.seeds:
        models = reward_models(args, args.kind, seed)
        yield _row(args.kind, seed, policy_run(args.demo, args.out / f"{args.kind}-{seed}" / "ppo", models, seed))


def perturbed(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What perturbations do to the scores of the held-out answers of finished runs, at each of their evaluations, in
    standard deviations of the scores at the start."""
    from types import SimpleNamespace

    from rlhf.data.schema import Message
    from rlhf.guard.config import PerturbConfig
    from rlhf.guard.perturbed import Perturber
    from rlhf.inference.policy import open_policy
    from rlhf.inference.scorer import open_scorer

    policy = open_policy(args.demo / "sft")
    for seed in args.seeds:
        run = args.out / f"{args.kind}-{seed}" / "ppo"
        scorer = open_scorer(str(reward_models(args, args.kind, seed)[0]), policy)
        perturber = Perturber(PerturbConfig(answers=1000), scorer.source, policy.chat, scorer.limit or 10_000, 16_384)
        spreads = [line["objective/scores_std"] for line in _lines(run / "metrics.jsonl") if "objective/scores" in line]
        unit = sum(spreads[:5]) / len(spreads[:5])
        samples = _lines(run / "samples.jsonl")
        for step in sorted({row["step"] for row in samples}):
            rows = [row for row in samples if row["step"] == step]
            found = perturber(
                0,
                [policy.chat.prompt([Message(**one) for one in row["messages"]]) for row in rows],
                [row["messages"] for row in rows],
                [SimpleNamespace(ids=policy.chat.response(row["answer"])) for row in rows],
            )
            effects = {name: value / unit for name, value in found.items()}
            yield {"kind": "perturbed", "of": args.kind, "seed": seed, "step": step, **effects}


def stories(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Story runs with a programmatic reward: nothing is wrong with them."""
    import stages.ppo
    from rlhf.config.load import check_config
    from rlhf.ppo.config import PPOConfig
    from rlhf.runs.run import is_run, read_run

    sys.path.insert(0, str(REPOSITORY / "tests"))
    from test_real_stories import story_config

    for seed in args.seeds:
        folder = args.out / f"stories-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        values = story_config(args.shared, folder, updates=20, rate=3e-4).model_dump(mode="json")
        values |= {
            "seed": seed,
            "guard": {"perturb": {"every": 2}},
            "rollout": values["rollout"] | {"prompts_per_update": 32, "max_new_tokens": 48},
        }
        config = check_config(PPOConfig, values, "stories")
        run = Path(config.run)
        if not (is_run(run) and read_run(run)["status"] == "complete"):
            stages.ppo.run(config, overwrite=is_run(run))
        yield _row("stories", seed, run)


def sizes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy, and the gold reward of the best of 16 answers of the SFT policy, by the number of rankings."""
    import numpy as np

    from data_tools.demo_world.rules import points
    from rlhf.data.store import open_dataset
    from rlhf.inference.policy import open_policy
    from rlhf.inference.sampling import sample
    from rlhf.inference.sampling_params import sampling_params
    from rlhf.inference.scorer import open_scorer
    from rlhf.runs.run import read_run

    policy = open_policy(args.demo / "sft")
    prompts = list(open_dataset(args.demo / "data" / "prompts", "prompt").records("test"))[:200]
    answers = list(sample(policy, prompts, sampling_params(args.demo / "sft", max_new_tokens=64), 0, BEST_OF))
    gold = np.array([[points(one.prompt.chat, one.text) for one in samples] for samples in answers])
    yield {"kind": "sizes", "seed": 0, "rankings": 0, "accuracy": 0.5, "gold": float(gold.mean())}
    yield {"kind": "sizes", "seed": 0, "rankings": None, "accuracy": 1.0, "gold": float(gold.max(1).mean())}
    source = more_rankings(args.demo, args.out / "pool")
    for seed in args.seeds:
        for count in args.sizes:
            folder = args.out / f"size-{count}-{seed}"
            write_rankings(args.demo, folder / "rankings", count, None, seed, source=source)
            run = reward_model(args.demo, folder / "reward", folder / "rankings", count, seed)
            scorer = open_scorer(str(run), policy)
            chosen = np.array([scorer(samples) for samples in answers]).argmax(1)
            yield {
                "kind": "sizes", "seed": seed, "rankings": count, "accuracy": read_run(run)["metrics"]["accuracy"],
                "gold": float(gold[np.arange(len(gold)), chosen].mean()),
            }  # fmt: skip


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _row(kind: str, seed: int, run: Path) -> dict[str, Any]:
    updates = [line for line in _lines(run / "metrics.jsonl") if "objective/scores" in line]
    kept = ("step", "objective/", "guard/", "rollout/response_length")
    return {
        "kind": kind, "seed": seed,
        "updates": [{k: v for k, v in u.items() if k.startswith(kept)} for u in updates],
    }  # fmt: skip


# ---- what came of it -----------------------------------------------------------------------------------------------


def replay(updates: Iterable[dict[str, float]], values: dict[str, Any]) -> list[Any]:
    """The alarms that a guard config gives for logged updates, without the rule that reads the gold reward."""
    from rlhf.guard.config import GuardConfig
    from rlhf.guard.guard import Guard

    config = GuardConfig.model_validate(values)
    guard = Guard(config.model_copy(update={"rules": tuple(r for r in config.rules if r.name != "gold-falls")}))
    return [alarm for update in updates for alarm in guard.observe(int(update["step"]), update)]


def half_lost(gold: Sequence[float]) -> tuple[int, int | None]:
    """Index of the highest smoothed gold reward, and the first one after it at which half of what is lost by the end
    is lost; None where less than half a point is lost."""
    import numpy as np

    from rlhf.guard.curve import smooth

    values = smooth(np.array(gold))
    best = int(values.argmax())
    loss = values[best] - values[-1]
    after = np.nonzero(values[best:] <= values[best] - loss / 2)[0]
    return best, best + int(after[0]) if loss >= 0.5 else None


def judge(row: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What the guard said of a run, when, and when half of the gold loss had happened."""
    import numpy as np

    from rlhf.guard.curve import smooth

    alarms = replay(row["updates"], values)
    gold = [u["objective/gold_reward"] for u in row["updates"] if "objective/gold_reward" in u]
    best, half = half_lost(gold) if gold else (0, None)
    seen = smooth(np.array(gold)) if gold else None
    first: dict[str, int] = {}
    for alarm in alarms:
        first.setdefault(alarm.rule, alarm.step)
    steps = [int(u["step"]) for u in row["updates"]]
    return {
        "kind": row["kind"], "seed": row["seed"], "first": min(first.values(), default=None), "rules": first,
        "best": steps[best], "half": None if half is None else steps[half],
        "gold": None if seen is None else [float(seen[0]), float(seen[best]), float(seen[-1])],
    }  # fmt: skip


def report(args: argparse.Namespace) -> None:
    """Print the tables and draw the plots."""
    from rlhf.core.intervals import wilson

    rows = {}
    for file in args.rows:
        for row in _lines(file):
            rows[row["kind"], row["seed"], row.get("rankings")] = row
    found = [judge(row, {}) for key, row in sorted(rows.items(), key=str) if key[0] != "sizes"]
    found = [one for one in found if args.seeds is None or one["seed"] in args.seeds]
    print("| run | seed | gold: start, best, end | best at | half of the loss by | the guard fires | rules (update) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for one in found:
        rules = ", ".join(f"{name} ({step})" for name, step in sorted(one["rules"].items(), key=lambda item: item[1]))
        gold = ", ".join(f"{value:.2f}" for value in one["gold"] or ())
        cells = [one["kind"], one["seed"], gold, one["best"], one["half"], one["first"], rules]
        print("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    weak = [one for one in found if one["kind"] == "weak" and one["half"] is not None]
    healthy = [one for one in found if one["kind"] != "weak"]
    hits = sum(one["first"] is not None and one["first"] < one["half"] for one in weak)
    false = sum(one["first"] is not None for one in healthy)
    for name, count, total in (("hit rate", hits, len(weak)), ("false-alarm rate", false, len(healthy))):
        if total:
            low, high = wilson(count / total, total)
            print(f"{name}: {count} of {total} ({low:.0%} to {high:.0%})")
    sizes_table([row for row in rows.values() if row["kind"] == "sizes"])
    if args.out:
        draw(list(rows.values()), found, args.out)


def sizes_table(rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy and gold reward by the number of rankings, with 95% t intervals over seeds."""
    if not rows:
        return

    def cell(values: list[float], digits: int) -> str:
        mean = statistics.fmean(values)
        if len(values) < 2:
            return f"{mean:.{digits}f}"
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        return f"{mean:.{digits}f} ({mean - half:.{digits}f} to {mean + half:.{digits}f})"

    print(f"\n| rankings | seeds | accuracy | gold of the best of {BEST_OF} |\n| --- | --- | --- | --- |")
    for count in sorted({row["rankings"] for row in rows}, key=lambda count: (count is None, count)):
        of = [row for row in rows if row["rankings"] == count]
        name = "chosen by gold" if count is None else f"{count:,}"
        accuracy, gold = cell([row["accuracy"] for row in of], 3), cell([row["gold"] for row in of], 2)
        print(f"| {name} | {len(of)} | {accuracy} | {gold} |")


BLUE, ORANGE, GREY, RED = "#2f6fb3", "#d9822b", "#777777", "#d64545"


def draw(rows: list[dict[str, Any]], found: list[dict[str, Any]], out: Path) -> None:
    """guard.svg: gold by sqrt(KL) of weak and good runs with the alarms. annotation-curve.svg: gold and accuracy."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    from rlhf.guard.curve import smooth

    style = {"svg.hashsalt": "guard", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**style, "legend.frameon": False, "savefig.facecolor": "white"}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind, title in zip(panels, ("weak", "good"), ("100 noisy rankings", "4,000 rankings")):
            for row in (row for row in rows if row["kind"] == kind):
                one = next((o for o in found if (o["kind"], o["seed"]) == (kind, row["seed"])), None)
                if one is None:
                    continue
                gold = smooth(np.array([u["objective/gold_reward"] for u in row["updates"]]))
                distance = smooth(np.sqrt([max(0.0, u["objective/kl"]) for u in row["updates"]]))
                axes.plot(distance, gold, color=ORANGE, linewidth=1)
                for step, colour, marker, label in (
                    (one["first"], RED, "o", "the guard fires"), (one["half"], GREY, "x", "half of the loss"),
                ):  # fmt: skip
                    if step is not None:
                        axes.plot(distance[step - 1], gold[step - 1], marker, color=colour, label=label)
            axes.set(title=title, xlabel="sqrt(KL), nats per completion")
        panels[0].set_ylabel("gold reward (hidden rule)")
        handles, labels = panels[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles))
        panels[0].legend(unique.values(), unique.keys(), loc="lower left")
        figure.savefig(out / "guard.svg", metadata={"Date": None})
        table = [row for row in rows if row["kind"] == "sizes" and row["rankings"]]
        if table:
            counts = sorted({row["rankings"] for row in table})
            figure = Figure(figsize=(7.2, 3.0), layout="constrained")
            for axes, key, label in zip(
                figure.subplots(1, 2),
                ("accuracy", "gold"),
                ("accuracy on held-out pairs", f"gold reward, best of {BEST_OF}"),
            ):
                means = [np.mean([row[key] for row in table if row["rankings"] == count]) for count in counts]
                axes.plot([row["rankings"] for row in table], [row[key] for row in table], ".", color=GREY)
                axes.plot(counts, means, "-", color=BLUE)
                axes.set(xscale="log", xlabel="rankings", ylabel=label)
            figure.savefig(out / "annotation-curve.svg", metadata={"Date": None})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "perturbed", "stories", "sizes"):
        command = commands.add_parser(name)
        command.add_argument("--demo", type=Path, default=Path("runs/demo"), help="A finished demo.")
        command.add_argument("--out", type=Path, default=Path("runs/guard"), help="Where runs go.")
        command.add_argument("--seeds", type=int, nargs="+", default=[0])
        command.add_argument("--json", type=Path, required=True, help="A file that rows are appended to.")
        if name in ("run", "perturbed"):
            command.add_argument("--kind", choices=KINDS, required=True)
        if name == "stories":
            command.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
        if name == "sizes":
            command.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    command = commands.add_parser("report")
    command.add_argument("rows", type=Path, nargs="+")
    command.add_argument("--seeds", type=int, nargs="+", help="Only these.")
    command.add_argument("--out", type=Path, help="Folder of the plots.")
    args = parser.parse_args()
    if args.command == "report":
        report(args)
        return
    import torch

    torch.set_num_threads(1)
    work = {"run": measure, "perturbed": perturbed, "stories": stories, "sizes": sizes}
    for row in work[args.command](args):
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
