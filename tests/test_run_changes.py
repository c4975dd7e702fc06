"""Continuing a run: only where it runs may have changed, and a finished run may be made longer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import config, finished, opened

from rlhf.core.errors import UserError
from rlhf.runs.run import is_complete, read_run

FACTS: dict[str, Any] = {
    "data": [{"path": "datasets/a", "kind": "demonstration", "fingerprint": "1"}],
    "parents": [{"path": "runs/sft", "stage": "sft", "fingerprint": "2"}],
    "tokenizer": "3",
    "chat_template": "4",
}


@pytest.mark.parametrize("key", FACTS)
def test_a_run_whose_inputs_changed_is_refused_by_name(key: str, tmp_path: Path) -> None:
    opened(tmp_path / "run", facts=FACTS)
    opened(tmp_path / "run", resume=True, facts=FACTS)
    changed = [{**FACTS[key][0], "fingerprint": "other"}] if isinstance(FACTS[key], list) else "other"
    with pytest.raises(UserError) as error:
        opened(tmp_path / "run", resume=True, facts={**FACTS, key: changed})
    named = {"data": "the dataset datasets/a", "parents": "the model runs/sft"}
    assert named.get(key, key.replace("_", " ")) in str(error.value) and "--overwrite" in str(error.value)
    assert read_run(tmp_path / "run")[key] == FACTS[key]


def test_inputs_without_a_fingerprint_are_not_compared(tmp_path: Path) -> None:
    hub = {"parents": [{"path": "org/model"}]}
    opened(tmp_path / "run", facts=hub)
    opened(tmp_path / "run", resume=True, facts=hub)


LONGER = [{"batch": {"epochs": 2.0}}, {"batch": {"max_steps": 8}}]


@pytest.mark.parametrize("longer", LONGER)
def test_a_finished_run_is_made_longer_with_a_note(longer: Any, tmp_path: Path) -> None:
    (key,) = longer["batch"]
    shorter = {"batch": {key: longer["batch"][key] / 2 if key == "epochs" else 4}}
    finished(tmp_path / "run", **shorter)
    assert is_complete(config(tmp_path / "run", **shorter))
    assert not is_complete(config(tmp_path / "run", **longer))
    opened(tmp_path / "run", resume=True, **longer)
    info = read_run(tmp_path / "run")
    note = {f"batch.{key}": {"from": shorter["batch"][key], "to": longer["batch"][key]}}
    assert (info["status"], info["extended"]) == ("running", [note])
    opened(tmp_path / "run", resume=True, **longer)  # after a kill
    assert read_run(tmp_path / "run")["extended"] == [note]


def test_a_run_killed_between_its_two_files_is_still_made_longer(tmp_path: Path) -> None:
    finished(tmp_path / "run", batch={"max_steps": 4})
    before = (tmp_path / "run" / "config.yaml").read_text()
    opened(tmp_path / "run", resume=True, batch={"max_steps": 8})
    (tmp_path / "run" / "config.yaml").write_text(before)
    opened(tmp_path / "run", resume=True, batch={"max_steps": 8})
    assert len(read_run(tmp_path / "run")["extended"]) == 1


@pytest.mark.parametrize(
    ("start", "then", "said"),
    [
        ({"batch": {"max_steps": 4}}, {"batch": {"max_steps": 3}}, "batch.max_steps: was 4, now 3"),
        ({"batch": {"max_steps": 4}}, {"batch": {"max_steps": 8}, "seed": 1}, "seed: was 0, now 1"),
        ({}, {"batch": {"max_steps": 8}}, "batch.max_steps: was None, now 8"),
    ],
)
def test_a_finished_run_is_changed_in_nothing_else(start: Any, then: Any, said: str, tmp_path: Path) -> None:
    finished(tmp_path / "run", **start)
    with pytest.raises(UserError, match=r"a different config") as error:
        opened(tmp_path / "run", resume=True, **then)
    assert said in str(error.value)


def test_an_unfinished_run_is_finished_before_it_is_made_longer(tmp_path: Path) -> None:
    opened(tmp_path / "run", batch={"max_steps": 4})
    with pytest.raises(UserError, match="Finish it first"):
        opened(tmp_path / "run", resume=True, batch={"max_steps": 8})


def test_a_run_goes_on_elsewhere_with_a_note(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    opened(tmp_path / "run")
    opened(tmp_path / "run", resume=True, deepspeed=str(file), batch={"micro_batch_size": 2})
    notes = [
        {
            "batch.micro_batch_size": {"from": 8, "to": 2},
            "deepspeed": {"from": None, "to": str(file)},
            "zero_stage": {"from": 0, "to": 2},
        }
    ]
    assert read_run(tmp_path / "run")["moved"] == notes
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))  # another stage under the same path
    opened(tmp_path / "run", resume=True, deepspeed=str(file), batch={"micro_batch_size": 2})
    opened(tmp_path / "run", resume=True, deepspeed=str(file), batch={"micro_batch_size": 2})
    assert read_run(tmp_path / "run")["moved"] == [*notes, {"zero_stage": {"from": 2, "to": 3}}]


def test_a_finished_run_stays_complete_elsewhere(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    assert is_complete(config(tmp_path / "run", batch={"micro_batch_size": 1}, timeout_seconds=5))
