"""Three real tasks for `rlhf compare`, from `../shared/data`: convincing arguments, yes/no questions, mathematics.

    python benchmarks/compare_data.py ../shared/data --out datasets/compare
    rlhf compare --config configs/compare/choices.yaml

`ukp`: which of two arguments on a topic people found more convincing (UKPConvArg1), A or B in a random place. `creak`:
whether a claim is true (FLAN's chain-of-thought data, answers without rationales). `gsm8k`: a problem and its solution.
Splits are by prompt: one tenth test, one tenth eval.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.data.schema import Demonstration, Message
from rlhf.data.writer import DatasetWriter

MOST_CHARACTERS = 400
"""Longer prompts make a comparison on a CPU long."""


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def ukp(data: Path) -> Iterator[tuple[str, str]]:
    draw = random.Random(0)
    for row in rows(data / "preferences" / "ukpconvarg1_strict_pairs.jsonl.gz"):
        answer = draw.choice("AB")
        first, second = (row["chosen"], row["rejected"]) if answer == "A" else (row["rejected"], row["chosen"])
        yield f"{row['prompt']}\nA: {first}\nB: {second}\nThe more convincing argument is", answer


def creak(data: Path) -> Iterator[tuple[str, str]]:
    for row in rows(data / "instructions" / "flan_cot.jsonl.gz"):
        answer = row["output"].rpartition("The answer is ")[2].strip(" .")
        if row["task"] == "creak" and answer in ("yes", "no"):
            yield row["instruction"].partition("\nOptions:")[0] + "\nAnswer:", answer


def gsm8k(data: Path) -> Iterator[tuple[str, str]]:
    for row in rows(data / "instructions" / "gsm8k_train.jsonl.gz"):
        yield row["instruction"], row["output"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="The folder `shared/data`.")
    parser.add_argument("--out", type=Path, default=Path("datasets/compare"))
    args = parser.parse_args()
    for task in (ukp, creak, gsm8k):
        pairs = [pair for pair in task(args.data) if sum(map(len, pair)) <= MOST_CHARACTERS]
        pairs = list(dict(pairs).items())  # one answer a prompt
        random.Random(1).shuffle(pairs)
        tenth = min(400, len(pairs) // 10)
        with DatasetWriter(args.out / task.__name__, "demonstration", overwrite=True) as writer:
            for number, (prompt, answer) in enumerate(pairs):
                split = "test" if number < tenth else "eval" if number < 2 * tenth else "train"
                writer.write(Demonstration((Message("user", prompt),), split=split, answer=answer))
        print(f"{args.out / task.__name__}: {len(pairs):,} demonstrations")


if __name__ == "__main__":
    main()
