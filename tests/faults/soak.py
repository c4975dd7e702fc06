"""Trains PPO for thousands of updates and watches its process from outside: nothing may grow but the logs.

    python tests/faults/soak.py --updates 2000

Resident memory, open files, threads, the run folder without its logs, and processor time per update are printed as a
table. The exit status is 1 if one of them grew from the first tenth of the run to its end by more than `ALLOWED`.
pytest does not collect this file; `tests/test_soak.py` is its small form.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ppo_processes  # noqa: E402
import psutil  # noqa: E402
import tiny  # noqa: E402
import yaml  # noqa: E402

LOGS = ("metrics.jsonl", "samples.jsonl", "events.jsonl")
"""Files of a run that grow by design: a line for each logged step."""
ALLOWED = {"memory": 1.05, "files": 1.0, "threads": 1.0, "folder": 1.05, "seconds": 1.2}
"""Largest value at the end as a multiple of that after the first tenth."""
ROWS = 10
"""Rows of the table."""


@dataclass(frozen=True)
class State:
    """A process and its run folder after some updates."""

    updates: int
    memory: float
    """Resident memory, 10^6 bytes."""
    files: int
    threads: int
    folder: float
    """Size of the run folder without `LOGS`, 10^3 bytes, at its largest since the row before."""
    logs: float
    """Size of `LOGS`, 10^3 bytes."""
    seconds: float
    """Processor time of an update, mean since the row before."""


def config(folder: Path, updates: int) -> Path:
    """PPO of the tiny Llama on four prompts an update, with checkpoints, evaluations and recorded updates."""
    return ppo_processes.write_config(
        folder, tiny.write_demonstrations(folder / "demos", 24, 4), "", updates=updates,
        reward={"name": "function", "function": "ppo_rewards:letters"}, critic={"init": "policy"},
        rollout={"prompts_per_update": 4, "max_new_tokens": 8}, batch={"epochs": 1, "minibatches": 1},
        checkpoints={"every": 20, "keep": 2}, eval={"every": 50, "prompts": 2}, log={"record_every": 50},
    )  # fmt: skip


def size(folder: Path, logs: bool) -> int:
    """Bytes of a folder's files, of `LOGS` or of all others; files may vanish meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() and (file.name in LOGS) == logs else 0
        except FileNotFoundError:
            continue
    return total


def watch(file: Path, updates: int) -> list[State]:
    """Run the stage to its end; gives its states after each `1 / ROWS` of the updates."""
    run = Path(yaml.safe_load(file.read_text("utf-8"))["run"])
    states: list[State] = []
    with (file.parent / "output").open("wb") as output:
        process = psutil.Popen(
            ppo_processes.command(1, file), cwd=ROOT, env=ppo_processes.environment(), stdout=output, stderr=output
        )
        largest, before, spent = 0.0, 0, 0.0
        while process.poll() is None:
            time.sleep(1.0)
            log = run / "metrics.jsonl"
            done = log.read_bytes().count(b'"time/learn"') if log.is_file() else 0
            largest = max(largest, size(run, logs=False) / 1e3)
            if done < (len(states) + 1) * updates / ROWS:
                continue
            try:
                with process.oneshot():
                    used = sum(process.cpu_times()[:2])
                    facts = (process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                break
            states.append(State(done, *facts, largest, size(run, logs=True) / 1e3, (used - spent) / (done - before)))
            print(astuple(states[-1]), file=sys.stderr, flush=True)
            largest, before, spent = 0.0, done, used
    assert process.returncode == 0, (file.parent / "output").read_text("utf-8")[-4000:]
    return states


def grown(states: list[State]) -> dict[str, tuple[float, float]]:
    """What grew by more than `ALLOWED` after the first tenth: name -> (then, at the end)."""
    # The first row's processor time includes the start of the process.
    pairs = {name: (getattr(states[name == "seconds"], name), getattr(states[-1], name)) for name in ALLOWED}
    return {name: pair for name, pair in pairs.items() if pair[1] > ALLOWED[name] * pair[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--updates", type=int, default=2000)
    updates = parser.parse_args().updates
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        states = watch(config(Path(name), updates), updates)
    print("| " + " | ".join(field.name for field in fields(State)) + " |")
    print("| " + " | ".join("---" for _ in fields(State)) + " |")
    for state in states:
        print("| " + " | ".join(f"{value:.4g}" for value in astuple(state)) + " |")
    found = grown(states)
    for name, (then, now) in found.items():
        print(f"{name} grew from {then:.4g} to {now:.4g}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
