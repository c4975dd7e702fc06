"""The command line: help and early errors without heavy imports, messages, exit statuses, the dry run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from light_commands import REPOSITORY, rlhf


def light(done: subprocess.CompletedProcess[str]) -> str:
    """What was said on standard error by a command that had to do without heavy imports."""
    errors, _, heavy = done.stderr.rpartition("HEAVY ")
    assert heavy == "", f"imported {heavy}"
    assert "Traceback" not in errors
    return errors


@pytest.fixture
def place(tmp_path):
    """A working folder with datasets, a model folder, and a config for each stage."""
    tiny.write_demonstrations(tmp_path / "demos", 8, 2)
    tiny.write_rankings(tmp_path / "rankings", 8, 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}", "utf-8")
    (tmp_path / "sft.yaml").write_text("run: runs/sft\nmodel: {path: base}\ndata: {train: demos}\n", "utf-8")
    (tmp_path / "reward.yaml").write_text("run: runs/rm\nmodel: {path: base}\ndata: {train: rankings}\n", "utf-8")
    ppo = "run: runs/ppo\nmodel: {path: base}\ndata: {prompts: rankings}\nreward: {name: model, path: runs/rm}\n"
    (tmp_path / "ppo.yaml").write_text(ppo, "utf-8")
    return tmp_path


def pretend(folder: Path, stage: str, status: str, **values: str) -> None:
    """A run of another day."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}", "utf-8")
    info = {"stage": stage, "status": status, "schema_version": 1, "tokenizer": "t", "chat_template": "c", **values}
    (folder / "run.json").write_text(json.dumps(info), "utf-8")


# ---- help --------------------------------------------------------------------------------------------------------

COMMANDS = (
    "sft", "reward", "dpo", "ppo", "specialist", "pipeline", "sample", "evaluate", "export", "chat",
    "check-model", "serve-sampler", "demo", "data",
)  # fmt: skip


def test_help_lists_every_command_without_heavy_imports(tmp_path):
    done = rlhf(tmp_path, "--help")
    assert done.returncode == 0 and light(done) == ""
    listed = [line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert set(COMMANDS) <= set(listed)


@pytest.mark.parametrize("command", [*COMMANDS, "data import", "data propose", "data rank"])
def test_help_of_every_command_comes_without_heavy_imports(tmp_path, command):
    done = rlhf(tmp_path, *command.split(), "--help")
    assert done.returncode == 0 and light(done) == ""
    assert done.stdout.startswith(f"Usage: rlhf {command} ")


def test_the_version_is_printed(tmp_path):
    from rlhf import __version__

    assert rlhf(tmp_path, "--version").stdout.strip() == f"rlhf {__version__}"


def test_an_unknown_command_or_option_is_refused_with_the_nearest(tmp_path):
    done = rlhf(tmp_path, "stf")
    assert done.returncode == 2 and "Did you mean 'sft'?" in light(done)
    done = rlhf(tmp_path, "sft", "--confg", "x")
    assert done.returncode == 2 and "--config" in light(done)


# ---- errors that need no model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--config", "nope.yaml"], "nope.yaml: no such config file"),
        (["sft", "--config", "sft.yaml", "batch.bach_size=3"], "did you mean 'batch_size'?"),
        (["sft", "--config", "sft.yaml", "data.train=nowhere"], "data.train: nowhere: there is no dataset"),
        (
            ["reward", "--config", "reward.yaml", "run=runs/new", "data.train=demos"],
            "contains demonstrations, but rankings are needed",
        ),
        (["sft", "--config", "sft.yaml", "run=runs/taken"], "already holds a run"),
        (["sft", "--config", "sft.yaml", "model.path=runs/half"], "not finished"),
        (["ppo", "--config", "ppo.yaml", "model.path=runs/taken"], "its tokenizer differs from that of the policy"),
        (["sft", "--config", "sft.yaml", "--num-processes", "3"], "does not divide by 3 processes"),
        (["sft", "--config", "sft.yaml", "--hostfile", "nope"], "--hostfile: no file nope"),
        (["sft", "--config", "sft.yaml", "--resume", "--overwrite"], "Choose one."),
        (["sft", "--config", "sft.yaml", "deepspeed=nope.json"], "nope.json"),
        (["pipeline", "--config", "sft.yaml"], "is a config of sft, reward or dpo, not of pipeline"),
        (["export", "runs/half", "--out", "out"], "not finished"),
        (["data", "stats", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_found_before_loading_come_without_heavy_imports(place, words, message):
    pretend(place / "runs" / "taken", "sft", "complete")
    pretend(place / "runs" / "half", "sft", "running")
    pretend(place / "runs" / "rm", "reward", "complete", tokenizer="another")
    done = rlhf(place, *words)
    assert done.returncode == 2
    errors = light(done)
    assert errors.startswith("error: ") and message in errors


def test_what_why_and_remedy_stand_on_lines_of_their_own(place):
    pretend(place / "runs" / "rm", "reward", "complete", tokenizer="another")
    pretend(place / "runs" / "one", "sft", "complete")
    lines = light(rlhf(place, "ppo", "--config", "ppo.yaml", "model.path=runs/one")).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "fix"]


def test_a_rank_other_than_0_says_which_one_it_is(place):
    done = rlhf(place, "sft", "--config", "nope.yaml", RANK="3", WORLD_SIZE="4")
    assert done.returncode == 2
    assert all(line.startswith("[rank 3] ") for line in light(done).splitlines())


def test_processes_are_not_started_from_inside_a_launcher(place):
    done = rlhf(place, "sft", "--config", "sft.yaml", "--num-processes", "2", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2 and "started by a launcher already" in light(done)


# ---- dry run -----------------------------------------------------------------------------------------------------


def test_the_dry_run_prints_config_and_plan_and_leaves_nothing_behind(place):
    done = rlhf(place, "sft", "--config", "sft.yaml", "batch.batch_size=4", "--dry-run", "--num-processes", "2")
    assert done.returncode == 0 and light(done) == ""
    assert "batch_size: 4" in done.stdout and "8 train, 2 eval" in done.stdout and "ZeRO stage 0" in done.stdout
    assert not (place / "runs").exists()


SETS = sorted(
    {file.parent for name in ("sft", "reward", "ppo") for file in (REPOSITORY / "configs").rglob(f"{name}.yaml")}
)
PROCESSES = {"8b-lora": "4", "8b-full": "8"}


@pytest.mark.parametrize(
    "folder",
    [pytest.param(folder, marks=[pytest.mark.slow] * (folder.name in PROCESSES), id=folder.name) for folder in SETS],
)
def test_every_config_set_passes_its_dry_run_once_the_datasets_are_there(tmp_path, folder):
    """The datasets are the user's to make, so the test makes small ones; names on the hub are not looked up."""
    work = tmp_path / "work"
    shutil.copytree(REPOSITORY / "configs", work / "configs")
    files = {stage: folder / f"{stage}.yaml" for stage in ("sft", "reward", "ppo")}
    configs = {stage: yaml.safe_load(file.read_text("utf-8")) for stage, file in files.items() if file.is_file()}
    for values in configs.values():
        tiny.write_rankings(work / (values["data"].get("train") or values["data"]["prompts"]), 8, 2)
    base = next(iter(configs.values()))["model"]["path"]
    if base.startswith((".", "runs/")):
        (work / base).mkdir(parents=True)
        (work / base / "config.json").write_text('{"max_position_embeddings": 512}', "utf-8")
    name = folder.relative_to(REPOSITORY)
    if not (folder / "pipeline.yaml").is_file():  # the demo runs the stages by itself
        lines = "".join(f"{stage}: {name}/{stage}.yaml\n" for stage in configs)
        (work / name / "pipeline.yaml").write_text(f"name: {folder.name}\n{lines}", "utf-8")
    words = ("pipeline", "--config", f"{name}/pipeline.yaml", "--dry-run")
    processes = PROCESSES.get(folder.name, "1")
    done = rlhf(work, *words, "--num-processes", processes)
    assert done.returncode == 0, done.stderr
    if processes == "1":  # the shares of several are divided by PPO's own code, which needs torch
        assert light(done) == ""
    assert all(f"Preflight: {stage}" in done.stdout for stage in configs)


# ---- how a run ends ----------------------------------------------------------------------------------------------

SLEEPER = """
import sys, time
from rlhf.cli.entry import main

def run(config, resume=False, overwrite=False):
    if config.seed:
        raise ZeroDivisionError("a fault of ours")
    print("running", __name__, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main("sft")
"""


def stage_module(place: Path, *words: str) -> list[str]:
    (place / "sleeper.py").write_text(SLEEPER, "utf-8")
    return [sys.executable, "-m", "sleeper", "--config", "sft.yaml", *words]


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue_and_exits_with_130(place):
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = stage_module(place, "--local_rank=0")  # as the deepspeed launcher calls it
    with subprocess.Popen(command, cwd=place, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("running sleeper") for line in process.stdout)  # imported under its own name
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors.strip() == "Interrupted. Continue with the same command and --resume."


@pytest.mark.slow
def test_a_fault_of_ours_keeps_its_traceback(place):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(stage_module(place, "seed=1"), cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.strip().endswith("ZeroDivisionError: a fault of ours")
