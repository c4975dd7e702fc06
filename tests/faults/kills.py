"""Kills commands with SIGKILL at random moments, gives them again, and compares the results.

    python tests/faults/kills.py --kills 100 --seed 1 --record kills.jsonl

Each kind of command first runs undisturbed; the moments of the kills are drawn from the time that this took. The kinds
take turns. Each folder is killed up to three times, then the command may end, and the result must be that of the
undisturbed run: metrics and fingerprint of a model, records, files, rankings. With `--record` each folder is a line
of a file, and the same command goes on after these lines. pytest does not collect this file; `tests/test_kills.py`
runs it in a small form.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import finished  # noqa: E402
import tiny  # noqa: E402
import yaml  # noqa: E402
from rows import jsonl, write  # noqa: E402

from rlhf.data.schema import Candidate, Message, Proposal  # noqa: E402
from rlhf.data.store import open_dataset  # noqa: E402

MOST_KILLS = 3
"""How often one folder is killed before its command may end."""
PATIENCE = 900
"""Seconds that an undisturbed command may take."""
ORPHANS = 30
"""Seconds after which no process of a killed command may be left."""
ROWS = 20_000
"""Rows of an import."""


@dataclass(frozen=True)
class Kind:
    """A command to kill, in a folder of its own."""

    words: tuple[str, ...]
    result: Callable[[Path], Any]
    """What must be equal in the end, read from the folder."""
    check: Callable[[Path], None] = lambda place: None
    """Raises an exception where a kill left something that looks whole and is not."""
    stdin: str = ""
    run: str = ""
    """The run folder; once a run is there, the command continues with --resume."""

    def next_words(self, place: Path) -> list[str]:
        there = self.run and (place / self.run / "run.json").exists()
        return [*self.words, *(["--resume"] if there else [])]


@dataclass
class Tally:
    """What came of one kind."""

    seconds: float = 0.0
    """Time of the undisturbed command."""
    kills: int = 0
    early: int = 0
    """Commands that ended before their moment came."""
    folders: int = 0
    same: int = 0
    """Folders with the result of the undisturbed command."""
    faults: list[str] = field(default_factory=list)

    def end_of_folder(self, fault: str) -> None:
        self.folders += 1
        self.same += not fault
        self.faults += [fault] if fault else []


# ---- the kinds -------------------------------------------------------------------------------------------------------


def of_runs(*names: str) -> Callable[[Path], Any]:
    def result(place: Path) -> Any:
        found = [json.loads((place / "runs" / name / "run.json").read_text("utf-8")) for name in names]
        return [(run["status"], run["metrics"], run["model_fingerprint"]) for run in found]

    return result


def of_import(place: Path) -> Any:
    return open_dataset(place / "imported", verify=True).fingerprint


def nothing_or_all(place: Path) -> None:
    if (place / "imported").exists():
        assert open_dataset(place / "imported", verify=True).manifest["count"] == ROWS, "half of an import"


def of_export(place: Path) -> Any:
    files = sorted(file for file in (place / "out").rglob("*") if file.is_file())
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


def of_rankings(place: Path) -> Any:
    return {r.messages[0].content: r.ranks for r in open_dataset(place / "rankings.jsonl", "ranking").records()}


def whole_rankings(place: Path) -> None:
    file = place / "rankings.jsonl"
    if file.exists() and b"\n" in file.read_bytes():
        assert all(sorted(ranks) == [1, 2, 3] for ranks in of_rankings(place).values()), "a damaged ranking"


def prepare(place: Path) -> dict[str, Kind]:
    """Make datasets, a model and configs in a folder; gives the commands that use them."""
    tiny.write_demonstrations(place / "demos", 24, 4)
    tiny.write_rankings(place / "ranked", 24, 4)
    shutil.copytree(tiny.llama(), place / "base")
    finished.sft(place / "finished")
    jsonl(place / "rows.jsonl", [{"prompt": f"Question {i}?", "answer": f"Answer {i}."} for i in range(ROWS)])
    answers = tuple(Candidate(text) for text in ("Yes.", "No.", "Perhaps."))
    write(place / "candidates", [Proposal((Message("user", f"Question {i}?"),), candidates=answers) for i in range(12)])
    batch = {"batch_size": 8, "micro_batch_size": 4, "epochs": 2}
    stages: dict[str, dict[str, Any]] = {
        "sft": {"data": {"train": "demos"}, "batch": batch, "eval": {"samples": 1}},
        "reward": {"data": {"train": "ranked"}, "batch": batch},
        "ppo": {
            "data": {"prompts": "demos", "max_prompt_tokens": 64}, "updates": 4,
            "reward": {"name": "function", "function": "ppo_rewards:letters"},
            "rollout": {"prompts_per_update": 8, "max_new_tokens": 8}, "batch": {"epochs": 1, "minibatches": 1},
            "critic": {"init": "policy"}, "eval": {"prompts": 2},
        },
    }  # fmt: skip
    for stage, values in stages.items():
        common = {"run": f"runs/{stage}", "model": {"path": "base"}, "checkpoints": {"every": 2}}
        (place / f"{stage}.yaml").write_text(yaml.safe_dump(common | values), "utf-8")
    pipeline = {"name": "kills", "sft": "sft.yaml", "reward": "reward.yaml", "ppo": "ppo.yaml", "export": "out"}
    (place / "all.yaml").write_text(yaml.safe_dump(pipeline), "utf-8")
    trained, rank = of_runs(*stages), ("data", "rank", "candidates", "--annotator", "anna", "--out", "rankings.jsonl")
    importing = ("data", "import", "jsonl", "rows.jsonl", "--out", "imported", "--overwrite")
    return {
        "import": Kind(importing, of_import, nothing_or_all),
        "rank": Kind(rank, of_rankings, whole_rankings, "123\n" * 12),
        "export": Kind(("export", "finished", "--out", "out", "--overwrite"), of_export),
        **{s: Kind((s, "--config", f"{s}.yaml"), of_runs(s), run=f"runs/{s}") for s in stages},
        "pipeline": Kind(("pipeline", "--config", "all.yaml"), lambda place: (trained(place), of_export(place))),
    }


# ---- starting and killing --------------------------------------------------------------------------------------------


def start(place: Path, words: Sequence[str], stdin: str) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own; its output is added to `output` in the folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    (place / "typed").write_text(stdin, "utf-8")
    with (place / "typed").open("rb") as typed, (place / "output").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.cli", *words], cwd=place, env={**environment, "HF_HUB_OFFLINE": "1"},
            stdin=typed, stdout=output, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the command alone; the processes that it started must end by themselves."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    limit = time.monotonic() + ORPHANS
    while left := members(process.pid):
        if time.monotonic() > limit:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"processes {left} were left for {ORPHANS} s")
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """The live processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, its_group = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def check_status(status: int, place: Path) -> None:
    said = (place / "output").read_text("utf-8", "replace")[-800:]
    assert status == 0, f"exit status {status}: {said}"


def complete(kind: Kind, place: Path) -> None:
    check_status(start(place, kind.next_words(place), kind.stdin).wait(timeout=PATIENCE), place)


def disturb(kind: Kind, place: Path, kills: int, seconds: float, draw: random.Random, tally: Tally) -> None:
    """Kill a folder's command up to `kills` times, then let it end."""
    for _ in range(kills):
        process = start(place, kind.next_words(place), kind.stdin)
        try:
            process.wait(timeout=draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            tally.kills += 1
            kill(process)
            kind.check(place)
        else:
            tally.early += 1
            check_status(process.returncode, place)
            break
    if process.returncode != 0:
        complete(kind, place)


def faults(kills: int, seed: int, names: Sequence[str] = (), record: Path | None = None) -> dict[str, Tally]:
    """Kill commands until there were `kills` kills.

    Args:
        kills: Number of kills in all.
        seed: Of the moments and of the number of kills of each folder.
        names: The kinds; by default all.
        record: One JSON line for each folder. What it holds already is counted and not repeated.
    """
    tallies = recorded(record) if record else {}
    undisturbed: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        template = Path(name) / "template"
        template.mkdir()
        kinds = {name: kind for name, kind in prepare(template).items() if not names or name in names}
        while (done := sum(tally.kills for tally in tallies.values())) < kills:
            turn = min(kinds, key=lambda name: tallies[name].kills + tallies[name].early if name in tallies else -1)
            kind, place, tally = kinds[turn], Path(name) / "place", tallies.setdefault(turn, Tally())
            if turn not in undisturbed:
                shutil.copytree(template, place)
                began = time.monotonic()
                complete(kind, place)
                tally.seconds, undisturbed[turn] = time.monotonic() - began, kind.result(place)
                shutil.rmtree(place)
            shutil.copytree(template, place)
            # A draw of its own for each folder, so that a continued series draws what an uninterrupted one does.
            draw = random.Random(f"{seed} {turn} {tally.folders}")
            count, before = min(draw.randint(1, MOST_KILLS), kills - done), (tally.kills, tally.early)
            fault = ""
            try:
                disturb(kind, place, count, tally.seconds, draw, tally)
                assert kind.result(place) == undisturbed[turn], "another result than the undisturbed command's"
            except Exception as found:
                fault = f"{turn}, folder {tally.folders + 1}: {type(found).__name__}: {found}"
            shutil.rmtree(place)
            tally.end_of_folder(fault)
            if record:
                line = {"kind": turn, "seconds": tally.seconds, "kills": tally.kills - before[0]}
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, "early": tally.early - before[1], "fault": fault}) + "\n")
            so_far = f"{tally.kills} kills so far, {tally.same} of {tally.folders} folders with the same result"
            print(f"{turn}: {so_far}", *filter(None, [fault]), sep="\n", file=sys.stderr, flush=True)
    return tallies


def recorded(record: Path) -> dict[str, Tally]:
    """What the lines of a record add up to."""
    tallies: dict[str, Tally] = {}
    for line in record.read_text("utf-8").splitlines() if record.exists() else []:
        values = json.loads(line)
        tally = tallies.setdefault(values["kind"], Tally())
        tally.seconds = values["seconds"]
        tally.kills += values["kills"]
        tally.early += values["early"]
        tally.end_of_folder(values["fault"])
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], help="such as import sft; by default all")
    parser.add_argument(
        "--record", type=Path, help="a file with a line for each folder; the same command goes on after them"
    )
    words = parser.parse_args()
    found = faults(words.kills, words.seed, words.kinds, words.record)
    print("| command | undisturbed | kills | ended before its moment | folders | same result |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, tally in found.items():
        facts = (f"{tally.seconds:.1f} s", tally.kills, tally.early, tally.folders, tally.same)
        print(f"| {name} | {' | '.join(map(str, facts))} |")
    for tally in found.values():
        print(*tally.faults, sep="\n", end="\n" if tally.faults else "")
    sys.exit(any(tally.faults for tally in found.values()))


if __name__ == "__main__":
    main()
