"""Import of HH-style pairs on one core: ours against `datasets` with the same mapping, and the check after it.

    python benchmarks/hh_rows.py --rows 1000000 --out /tmp/hh-1m.jsonl
    python benchmarks/data_import.py /tmp/hh-1m.jsonl --repeats 3

Each measurement is a separate process bound to one core. It reports wall-clock seconds from the first row to the last
byte (without module imports), and peak resident memory. `datasets` reads the same file with `load_dataset("json")` and
maps it, batched, to messages, candidates, ranks and ids with the same functions for splitting transcripts and hashing.
It checks no record, compresses nothing and records no rejected rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
from data_tools.importers.run import import_dataset
import pyarrow.parquet
def work(): return import_dataset("hh-rlhf", [source], out, overwrite=True).read
"""
THEIRS = """
import datasets
from data_tools.importers.pairs import _transcript
from rlhf.data.schema import BadRecord, content_hash
datasets.disable_progress_bars()
def convert(batch):
    made = {"id": [], "prompt_id": [], "messages": [], "candidates": [], "ranks": []}
    for chosen, rejected in zip(batch["chosen"], batch["rejected"]):
        try:
            prompt, best = _transcript(chosen, "")
            _, other = _transcript(rejected, "")
        except BadRecord:
            continue
        made["prompt_id"].append(content_hash([[m.role, m.content] for m in prompt]))
        made["id"].append(content_hash(made["prompt_id"][-1], [best, other], (1, 2), "", None))
        made["messages"].append([{"role": m.role, "content": m.content} for m in prompt])
        made["candidates"].append([{"text": best}, {"text": other}])
        made["ranks"].append([1, 2])
    return made
def work():
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=out)
    rows.map(convert, batched=True, remove_columns=["chosen", "rejected"])
    return len(rows)
"""
CHECK = """
from data_tools.commands.cli import app
def work():
    app(["check", source, "--no-near", "--json"], standalone_mode=False)
    return 0
"""
RUN = """
import json, resource, sys, time
start = time.perf_counter()
rows = work()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"rows": rows, "seconds": seconds, "peak_mb": peak}))
"""


def measure(code: str, source: Path, out: Path, one_core: bool = True) -> dict[str, float]:
    """Run the code in a new process, bound to one core by default."""
    shutil.rmtree(out, ignore_errors=True)
    core = str(min(os.sched_getaffinity(0)))
    program = f"source, out = {str(source)!r}, {str(out)!r}\n{code}\n{RUN}"
    command = [*(["taskset", "-c", core] if one_core else []), sys.executable, "-c", program]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours-only", action="store_true", help="Skip `datasets`.")
    args = parser.parse_args()
    jobs = {"ours": OURS} | ({} if args.ours_only else {"datasets": THEIRS})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory(dir=args.source.parent) as place:
        for _ in range(args.repeats):
            for name, code in jobs.items():  # alternate the sides, so that a busy machine slows both
                found[name].append(measure(code, args.source, Path(place) / name))
        print(f"{args.source}: {time.strftime('%Y-%m-%d %H:%M')}, median of {args.repeats}")
        for name, runs in found.items():
            seconds = statistics.median(run["seconds"] for run in runs)
            peak = statistics.median(run["peak_mb"] for run in runs)
            print(f"{name:<10} {runs[0]['rows'] / seconds:>10,.0f} rows/s {seconds:>8.1f} s {peak:>7.0f} MB peak")
        if not args.ours_only:
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(found["ours"], found["datasets"])]
            print(f"ratio      {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        checked = measure(CHECK, Path(place) / "ours", Path(place) / "unused")
        print(f"check --no-near {checked['seconds']:.1f} s, {checked['peak_mb']:.0f} MB peak")


if __name__ == "__main__":
    main()
