"""Run folders: taken ones are refused with what to do, resumed ones rewound, parents of other tokens turned away."""

from __future__ import annotations

import json

import pytest
import tiny
from run_folders import finished, opened

from rlhf.core.errors import UserError
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.runs.model_folder import fingerprint
from rlhf.runs.parents import check_same_text, parent_facts, resolve_model_path
from rlhf.runs.run import is_run, read_run


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
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_resuming_with_another_config_names_the_keys_that_differ(tmp_path):
    opened(tmp_path / "run")
    opened(tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"(?s)a different config.*seed: was 0, now 3"):
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
    with pytest.raises(UserError, match="no such run, model or file"):
        resolve_model_path(tmp_path / "nothing" / "here")
    with pytest.raises(UserError, match="no such run, model or file"):
        resolve_model_path("reward.yaml")
    finished(tmp_path / "runs" / "sft")
    with pytest.raises(UserError, match=r"no model there.*\n.*Name a run in it: .*runs/sft"):
        resolve_model_path(tmp_path / "runs")
    (tmp_path / "prompts.jsonl").touch()
    with pytest.raises(UserError, match="a file, not a run or a model folder"):
        resolve_model_path(tmp_path / "prompts.jsonl")


def test_the_fingerprint_follows_the_weights(tmp_path):
    run = finished(tmp_path / "run")
    before = fingerprint(run.model)
    (run.model / "model.safetensors").write_bytes(b"other")
    assert fingerprint(run.model) != before


def test_a_result_with_a_flipped_bit_is_refused_as_a_parent_and_not_exported(tmp_path):
    run = finished(tmp_path / "run")
    assert parent_facts(run.path)["fingerprint"] == fingerprint(run.model)
    weights = run.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for use in (parent_facts, lambda path: export(path, tmp_path / "out", EXPORTERS.pick({"name": "hf"}))):
        with pytest.raises(UserError, match=r"not those that the run wrote(.|\n)*from a copy"):
            use(run.path)
    assert not (tmp_path / "out").exists()


def test_a_parent_with_another_tokenizer_or_template_is_refused(tmp_path):
    mine = {"tokenizer": "a", "chat_template": "b"}
    finished(tmp_path / "same", facts=mine)
    check_same_text(mine, tmp_path / "same")
    check_same_text(mine, "org/name")
    for key in mine:
        finished(tmp_path / key, facts={**mine, key: "other"})
        with pytest.raises(UserError, match=rf"(?s){key.replace('_', ' ')}.*retokenize"):
            check_same_text(mine, tmp_path / key)


OTHER_TYPES = ["{", "[]", "3", "null", '"run"', "{}", '{"stage": 3, "status": "running"}', "[" * 5000]
OTHER_TYPES += ['{"stage": "sft", "status": "complete", "parents": ["m"]}']


@pytest.mark.parametrize("content", OTHER_TYPES)
def test_a_damaged_run_file_is_named_and_can_be_overwritten(content, tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    for _ in range(2):
        with pytest.raises(UserError, match=r"run\.json: damaged"):
            opened(tmp_path / "run", resume=True)
    opened(tmp_path / "run", overwrite=True)
    assert read_run(tmp_path / "run")["status"] == "running"


def test_the_fingerprint_ignores_how_and_where_a_model_was_saved(tmp_path):
    run = finished(tmp_path / "run")
    (run.model / "tokenizer_config.json").write_text('{"eos_token": "</s>", "local_files_only": true}')
    before = fingerprint(run.model)
    (run.model / "tokenizer_config.json").write_text('{"eos_token": "</s>", "transformers_version": "5.0"}')
    assert fingerprint(run.model) == before
    (run.model / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert fingerprint(run.model) != before


# ---- folders that are no run, links --------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [["config.yaml"], [".run.json.partial"], [".lock"], [".lock", "checkpoints", "model"]])
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_what_a_killed_start_or_deletion_left_is_started_again(left, how, tmp_path):
    for name in left:
        (tmp_path / "run" / name / "inner" if name in ("checkpoints", "model") else tmp_path / "run").mkdir(
            parents=True, exist_ok=True
        )
        if name not in ("checkpoints", "model"):
            (tmp_path / "run" / name).write_text("")
    opened(tmp_path / "run", **how)
    assert read_run(tmp_path / "run")["status"] == "running"
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("moment", ["write_text", "write_json", "git_commit"])
def test_a_start_killed_before_any_of_its_files_is_repeated(moment, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"rlhf.runs.run.{moment}", killed)
        opened(tmp_path / "run")
    opened(tmp_path / "run", resume=is_run(tmp_path / "run"))
    assert read_run(tmp_path / "run")["status"] == "running" and (tmp_path / "run" / "config.yaml").is_file()


def test_files_of_others_next_to_a_killed_start_are_kept(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", "thesis.tex"):
        (tmp_path / "run" / name).write_text("")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="exists and is not a run"):
            opened(tmp_path / "run", **how)
    assert (tmp_path / "run" / "thesis.tex").is_file()


@pytest.mark.parametrize("made", [False, True])
def test_resuming_where_no_run_is_refuses_and_makes_nothing(made, tmp_path):
    if made:
        (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"there is no run in .*run to continue"):
        opened(tmp_path / "run", resume=True)
    assert not made or not any((tmp_path / "run").iterdir())


def test_overwriting_through_a_link_empties_the_folder_behind_it(tmp_path):
    opened(tmp_path / "disk")
    (tmp_path / "disk" / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    opened(tmp_path / "run", overwrite=True, seed=9)
    assert not (tmp_path / "disk" / "checkpoints").exists()
    assert "seed: 9" in (tmp_path / "disk" / "config.yaml").read_text() and (tmp_path / "run").is_symlink()


def test_a_link_within_the_run_is_removed_and_what_it_leads_to_is_kept(tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "scratch" / "step-00000003").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    opened(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "checkpoints").exists() and (tmp_path / "scratch" / "step-00000003").is_dir()


def test_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is a link to .*gone, which does not exist"):
        opened(tmp_path / "run")


def test_a_run_that_cannot_be_deleted_is_refused_and_named(tmp_path, monkeypatch):
    opened(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()

    def refuse(path, *rest, **more):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("shutil.rmtree", refuse)  # root may delete everything, so the refusal is made here
    with pytest.raises(UserError, match="checkpoints cannot be deleted: Operation not permitted"):
        opened(tmp_path / "run", overwrite=True)


# ---- logged lines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"{}\n", b"\x00\x00\n", b'{"step": null}\n'])
def test_a_damaged_line_is_refused_before_the_step_and_dropped_after_it(damage, tmp_path):
    run = opened(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n' + damage)
    run.rewind(2)
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    file.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        run.rewind(2)
    run.rewind(1)
    assert file.read_bytes() == b'{"step": 1}\n'


def test_a_deleted_metrics_file_or_config_is_named(tmp_path):
    opened(tmp_path / "run")
    for name in ("metrics.jsonl", "config.yaml"):
        content = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).unlink()
        with pytest.raises(UserError, match=name):
            opened(tmp_path / "run", resume=True)
        (tmp_path / "run" / name).write_bytes(content)
    opened(tmp_path / "run", resume=True)


@pytest.mark.parametrize("content", [b"\xff", b"- a\n", b"a: [\n"])
def test_a_damaged_config_is_named(content, tmp_path):
    opened(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        opened(tmp_path / "run", resume=True)
