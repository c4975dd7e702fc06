"""Make any number of HH-style pairs by varying the real ones.

    python benchmarks/hh_rows.py --rows 1000000 --out /tmp/hh-1m.jsonl

Each row is a real pair in which randomly chosen words (by the seed) are replaced by words of similar length from other
rows. So lengths, turns and bytes are those of the real data, and prompts need not repeat.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from functools import partial
from pathlib import Path

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "preferences" / "hh_harmless_base_test.jsonl.gz"


def _swap(swaps: dict[str, str], match: re.Match[str]) -> str:
    return swaps[match.group()]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        real = [json.loads(line) for line in file]
    words = sorted({word for row in real for word in re.findall(r"\b[a-z]{4,9}\b", row["chosen"])})
    draw = random.Random(args.seed)
    with open(args.out, "w", encoding="utf-8") as out:
        for index in range(args.rows):
            row = real[index % len(real)]
            swaps = dict(zip(draw.sample(words, 8), draw.sample(words, 8)))
            swaps |= {word: draw.choice(words) for word in re.findall(r"\b[a-z]{4,9}\b", row["chosen"][:200])[:2]}
            pattern = re.compile(r"\b(?:" + "|".join(swaps) + r")\b")
            replaced = partial(_swap, swaps)
            varied = {name: pattern.sub(replaced, row[name]) for name in ("chosen", "rejected")}
            out.write(json.dumps(varied, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
