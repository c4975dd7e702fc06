"""Few-shot against zero-shot, before and after tuning on instructions, in the demo's world (Wei 2022, Min 2022).

    rlhf demo
    python benchmarks/findings.py runs/demo --out runs/findings

Three models answer the same held-out requests: the demo's base; an SFT policy of the demonstrations; and an SFT policy
of the same demonstrations, three quarters of which have one to three solved requests of the same person before them, as
the mixtures of instruction tuning do. The examples that are shown are those of the person whose answers earn most
points, so there is something to learn from them. Controls: the same questions with answers drawn from other examples,
and examples of another domain. Values are points by the hidden rule, over records and draws of examples.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.demo_world.rules import SENTENCES, judge
from rlhf import train_sft
from rlhf.cli.compare_config import CompareConfig
from rlhf.config.load import check_config
from rlhf.data.schema import Demonstration, Message
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from stages.compare import compare

MOST_SHOTS = 3
"""More do not fit the base's 192 positions."""
FEW_SHOT: dict[str, Any] = {"name": "few-shot", "layout": "turns", "redraw": True}


def with_examples(records: Sequence[Demonstration]) -> list[Demonstration]:
    """The records with none to three others of the same author before them, as earlier turns."""
    draw = random.Random(0)
    of_author = defaultdict(list)
    for record in records:
        of_author[record.author].append(record)
    made = []
    for record in records:
        others = [other for other in of_author[record.author] if other is not record]
        shown = draw.sample(others, draw.randint(0, MOST_SHOTS))
        made.append(Demonstration((*turns(shown), *record.messages), split=record.split, answer=record.answer))
    return made


def turns(records: Sequence[Demonstration]) -> tuple[Message, ...]:
    """Questions and answers as turns of one conversation."""
    return tuple(m for record in records for m in (*record.messages, Message("assistant", record.answer)))


def write(path: Path, records: Sequence[Demonstration]) -> str:
    with DatasetWriter(path, "demonstration", overwrite=True) as writer:
        for record in records:
            writer.write(record)
    return str(path)


def other_domain() -> list[Demonstration]:
    """Sentences of the world's language that are no requests, with others in reply."""
    draw = random.Random(1)
    sentences = [*SENTENCES["off_topic"], *SENTENCES["rude"]]
    pairs = [draw.sample(sentences, 2) for _ in range(40)]
    return [Demonstration((Message("user", one),), split="train", answer=other) for one, other in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="The folder of a finished demo.")
    parser.add_argument("--out", type=Path, default=Path("runs/findings"))
    parser.add_argument("--updates", type=int, default=250, help="Steps of 32 demonstrations of each SFT run.")
    parser.add_argument("--seeds", type=int, default=3, help="Draws of examples.")
    args = parser.parse_args()
    records = [r for r in open_dataset(args.demo / "data" / "demonstrations").records() if isinstance(r, Demonstration)]
    train, held_out = ([r for r in records if r.split == split] for split in ("train", "eval"))
    points = defaultdict(list)
    for record in train:
        points[record.author].append(judge(record, record.answer).points)
    means = {author: statistics.fmean(found) for author, found in points.items()}
    best = max(means, key=lambda author: means[author])
    print({author: round(mean, 2) for author, mean in means.items()})
    shown = write(args.out / "data" / "shown", [r for r in train if r.author == best] + held_out)
    other = write(args.out / "data" / "other", other_domain())
    models = {"base": str(args.demo / "base")}
    for name, data in (("instructions", records), ("instructions-with-examples", with_examples(records))):
        run = args.out / name
        if not (run / "model").is_dir():
            settings = {"run": str(run), "model": {"path": models["base"]}, "optimizer": {"lr": 2e-3}}
            train_sft(settings | {"batch": {"max_steps": args.updates}, "eval": {"samples": 0, "every": 100}}, data)
        models[name] = str(run)
    ways: dict[str, Any] = {"zero-shot": {}}
    ways |= {f"{shots}-shot": {"prompting": FEW_SHOT | {"shots": shots}} for shots in range(1, MOST_SHOTS + 1)}
    ways["shuffled-answers"] = {"prompting": FEW_SHOT | {"shots": MOST_SHOTS, "random_labels": True}}
    ways["other-domain"] = {"prompting": FEW_SHOT | {"shots": MOST_SHOTS, "examples_from": other}}
    task = {
        "dataset": shown,
        "metrics": ["score"],
        "reward": "data_tools.demo_world.rules:points",
        "max_new_tokens": 48,
    }
    for name, path in models.items():
        values = {"run": str(args.out / f"compare-{name}"), "model": {"path": path}, "tasks": {"demo": task}}
        values |= {"ways": ways, "budget": {"updates": 1}, "seeds": list(range(args.seeds))}
        print(f"\n== {name}")
        compare(check_config(CompareConfig, values, "findings"))


if __name__ == "__main__":
    main()
