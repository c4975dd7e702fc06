"""Run folders: taken ones are refused with what to do, resumed ones rewound, parents of other tokens turned away."""

from __future__ import annotations

import json

import pytest
import tiny

from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.runs.run import check_same_text, fingerprint, finish, open_run, parent_facts, read_run, resolve_model_path
from rlhf.sft.config import SFTConfig


def config(folder, **more):
    return check_config(SFTConfig, {"run": str(folder), "model": {"path": "m"}, "data": {"train": "d"}, **more}, "test")


def opened(folder, resume=False, overwrite=False, facts=None, **more):
    return open_run(config(folder, **more), "sft", resume, overwrite, facts or {})


def finished(folder, facts=None):
    run = opened(folder, facts=facts)
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    (run.model / "model.safetensors").write_bytes(b"weights")
    finish(run, metrics={"eval/loss": 1.0})
    return run


def test_a_run_notes_config_stage_versions_and_commit(tmp_path):
    opened(tmp_path / "run", facts={"parents": [{"path": "m"}]})
    info = read_run(tmp_path / "run")
    assert (info["stage"], info["status"], info["parents"]) == ("sft", "running", [{"path": "m"}])
    assert "torch" in info["packages"] and len(info["git"]) >= 40
    assert "path: m" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_taken_folder_is_refused_with_the_ways_out(tmp_path):
    opened(tmp_path / "run")
    with pytest.raises(UserError, match=r"(?s)already holds a run.*--resume.*--overwrite"):
        opened(tmp_path / "run")


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "final.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run"):
        opened(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "final.tex").is_file()


def test_overwrite_starts_from_an_empty_folder(tmp_path):
    run = opened(tmp_path / "run")
    run.log("metrics.jsonl", [{"step": 1}])
    opened(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_resuming_with_another_config_names_the_lines_that_differ(tmp_path):
    opened(tmp_path / "run")
    opened(tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"(?s)a different config.*seed: 3"):
        opened(tmp_path / "run", resume=True, seed=3)


def test_rewinding_drops_later_lines_and_half_lines(tmp_path):
    run = opened(tmp_path / "run")
    run.log("metrics.jsonl", [{"step": 1}, {"step": 2}, {"step": 3}])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run.rewind(2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_only_a_finished_run_has_a_result(tmp_path):
    opened(tmp_path / "half")
    with pytest.raises(UserError, match="not finished"):
        resolve_model_path(tmp_path / "half")
    finished(tmp_path / "whole")
    assert resolve_model_path(tmp_path / "whole") == str(tmp_path / "whole" / "model")
    assert parent_facts(tmp_path / "whole")["fingerprint"] == fingerprint(tmp_path / "whole" / "model")


def test_a_wrong_local_path_is_told_from_a_hub_name(tmp_path):
    assert resolve_model_path("org/name") == "org/name"
    assert resolve_model_path(tiny.llama()) == tiny.llama()
    with pytest.raises(UserError, match="no model there"):
        resolve_model_path(tmp_path / "nothing" / "here")


def test_the_fingerprint_follows_the_weights(tmp_path):
    run = finished(tmp_path / "run")
    before = fingerprint(run.model)
    (run.model / "model.safetensors").write_bytes(b"other")
    assert fingerprint(run.model) != before


def test_a_parent_with_another_tokenizer_or_template_is_refused(tmp_path):
    mine = {"tokenizer": "a", "chat_template": "b"}
    finished(tmp_path / "same", facts=mine)
    check_same_text("the policy", mine, tmp_path / "same")
    check_same_text("the policy", mine, "org/name")
    for key in mine:
        finished(tmp_path / key, facts={**mine, key: "other"})
        with pytest.raises(UserError, match=rf"(?s){key.replace('_', ' ')}.*retokenize"):
            check_same_text("the policy", mine, tmp_path / key)


def test_a_damaged_run_file_is_named(tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: damaged"):
        read_run(tmp_path / "run")
