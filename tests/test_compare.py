"""`rlhf compare`: cells and budgets, data that is kept from the ways, what is shown, whole comparisons."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import finished
import pytest
import tiny
from chat_servers import chat_server, completion

from rlhf.cli.compare_config import CompareConfig
from rlhf.cli.teacher_options import distill_words
from rlhf.comparison.cells import cells, merged, stage_runs
from rlhf.comparison.data import open_task, training_data
from rlhf.comparison.measure import stored
from rlhf.comparison.page import label_heights, render
from rlhf.comparison.results import read_result
from rlhf.comparison.show import TaskResult, WayRow, amount, markdown, seconds
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.data.schema import Demonstration, Message
from rlhf.data.store import open_dataset
from rlhf.data.writer import DatasetWriter
from stages.compare import compare, step_seconds

# ---- cells and budgets -----------------------------------------------------------------------------------------------


def config(**changes) -> CompareConfig:
    values = {
        "run": "runs/c",
        "model": {"path": tiny.llama()},
        "tasks": {"t": {"dataset": "d", "rankings": "r"}},
        "ways": {
            "zero-shot": {},
            "few-shot": {"prompting": {"name": "few-shot", "shots": 2}},
            "lora": {"sft": {"tuning": "lora"}},
            "ppo": {"sft": {"tuning": "lora"}, "reward": {}, "ppo": {"rollout": {"prompts_per_update": 8}}},
        },
        "budget": {"updates": 30},
        "examples": [16],
    }
    return check_config(CompareConfig, merged(values, changes), "test")


def test_ways_without_training_data_have_no_curve():
    names = [cell.name for cell in cells(config())]
    assert names[:4] == ["t--zero-shot--all--0", "t--few-shot--all--0", "t--lora--all--0", "t--ppo--all--0"]
    assert "t--zero-shot--16--0" not in names and "t--few-shot--16--0" in names and len(names) == 7


def test_a_way_that_no_seed_changes_is_measured_once():
    names = [cell.name for cell in cells(config(seeds=[0, 1, 2], examples=[]))]
    assert [name for name in names if "zero-shot" in name] == ["t--zero-shot--all--0"]
    assert [name for name in names if "few-shot" in name] == [f"t--few-shot--all--{seed}" for seed in (0, 1, 2)]
    votes = {"ways": {"votes": {"prompting": {"name": "chain-of-thought", "samples": 5}}}}
    assert sum(cell.way == "votes" for cell in cells(config(seeds=[0, 1, 2], **votes))) == 3


def stages_of(way: str, **changes):
    whole = config(**changes)
    cell = next(one for one in cells(whole) if one.way == way)
    return stage_runs(whole, cell, {"train": "d/train", "rankings": "d/rankings"})


def test_a_way_divides_its_budget_among_its_stages():
    sft, reward, ppo = stages_of("ppo")
    assert (sft.values["batch"]["max_steps"], reward.values["batch"]["max_steps"], ppo.values["updates"]) == (
        10,
        10,
        10,
    )
    assert [stage.values["batch"]["max_steps"] for stage in stages_of("lora")] == [30]


def test_a_budget_of_examples_follows_the_batch_size():
    sft, _, ppo = stages_of("ppo", budget={"updates": None, "examples": 960})
    assert sft.values["batch"]["max_steps"] == 10  # 320 examples in batches of 32
    assert ppo.values["updates"] == 40  # 320 completions, 8 an update


def test_each_stage_starts_from_the_one_before():
    sft, reward, ppo = stages_of("ppo")
    assert sft.values["model"]["path"] == tiny.llama()
    assert reward.values["model"]["path"] == ppo.values["model"]["path"] == sft.folder
    assert ppo.values["reward"] == {"name": "model", "path": reward.folder}
    assert (sft.values["data"], reward.values["data"]) == ({"train": ["d/train"]}, {"train": ["d/rankings"]})


def test_ways_with_the_same_first_stage_share_its_run():
    both = {"ways": {"a": {"sft": {"tuning": "lora"}}, "b": {"sft": {"tuning": "lora"}}, "c": {"sft": {}}}}
    a, b, c = (stages_of(way, **both)[0].folder for way in "abc")
    assert a == b != c


def test_keys_that_the_comparison_sets_are_refused():
    for keys in ({"seed": 1}, {"data": {"train": "x"}}, {"batch": {"max_steps": 3}}):
        with pytest.raises(UserError, match="The comparison sets this"):
            stages_of("own", ways={"own": {"sft": keys}})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"budget": {"updates": 3, "seconds": 2}}, "exactly one of updates, examples, seconds"),
        ({"ways": {"w": {"reward": {}}}}, "a reward model that nothing uses"),
        ({"ways": {"w": {"ppo": {}}}}, "nothing to learn from"),
        ({"ways": {"w/x": {}}}, "names of tasks and ways"),
        ({"ways": {"w": {"distill": {"teacher": "m"}}}}, "nothing learns from the teacher's answers"),
        ({"ways": {"w": {"distill": {"n": 2}, "sft": {}}}}, "distill.teacher: name a run"),
        ({"ways": {"w": {"distill": {"teacher": "m", "temprature": 1}, "sft": {}}}}, "did you mean 'temperature'"),
        ({"ways": {"w": {"distill": {"teacher": "m", "n": "many"}, "sft": {}}}}, "distill.n: "),
        ({"tasks": {"t": {"rankings": []}}}, "learns from rankings; name datasets"),
        ({"tasks": {"t": {"metrics": ["win_rate"]}}}, "reward: name it exactly if"),
        ({"ways": {"w": {"prompting": "tree"}}}, "unknown way of prompting 'tree'"),
    ],
)
def test_a_faulty_comparison_is_refused(changes, fault):
    with pytest.raises(UserError, match=fault):
        config(**changes)


def test_options_of_a_teacher_become_words_of_the_command():
    values = {"teacher": "m", "n": 2, "rationales": True, "check": False, "stop": ["A", "B"], "send_seed": False}
    words = ["--teacher", "m", "--n=2", "--rationales", "--stop=A", "--stop=B", "--no-send-seed"]
    assert distill_words(values) == words


def test_ways_that_learn_from_a_teacher_say_so():
    ways = {
        "answers": {"distill": {"teacher": "m"}, "sft": {"tuning": "lora"}},
        "logits": {"sft": {"distillation": {"logits": {"teacher": "m"}}}},
    }
    found = config(ways=ways).ways
    assert (found["answers"].about, found["logits"].about) == (
        "a teacher's answers, then sft (lora)",
        "sft (a teacher's logits)",
    )


def test_a_teacher_that_does_not_exist_is_refused_before_anything_is_trained(tmp_path):
    ways = {"taught": {"distill": {"teacher": "nowhere/at/all"}, "sft": {}}}
    with pytest.raises(UserError, match=r"ways\.taught\.distill\.teacher: "):
        compare(prompting_only(tmp_path, ways=ways))
    assert not (tmp_path / "run").exists()


def test_a_way_may_be_a_file(tmp_path):
    (tmp_path / "winner.yaml").write_text('name: few-shot\nshots: 3\ninstruction: "Answer briefly."\n')
    found = config(ways={"w": {"prompting": str(tmp_path / "winner.yaml")}}).ways["w"].prompting()
    assert (found.count, found.wording.instruction) == (3, "Answer briefly.")
    with pytest.raises(UserError, match="no such config file"):
        config(ways={"w": {"prompting": "nowhere.yaml"}})


# ---- data ----------------------------------------------------------------------------------------------------------


def write_task(path: Path, test: int = 12, train: int = 40) -> str:
    """Questions about animals whose answer is one of two words."""
    with DatasetWriter(path, "demonstration", overwrite=True) as writer:
        for number in range(test + train):
            split = "test" if number < test else "eval" if number < test + 6 else "train"
            answer = "wild" if "fox" in tiny.question(number) or "owl" in tiny.question(number) else "tame"
            writer.write(Demonstration((Message("user", tiny.question(number)),), split=split, answer=answer))
        copied = Demonstration((Message("user", tiny.question(0)),), split="train", answer="tame")
        writer.write(copied)  # a prompt that is measured
    return str(path)


def test_measured_prompts_are_never_learned_from(tmp_path):
    whole = config(tasks={"t": {"dataset": write_task(tmp_path / "d"), "labels": ["wild", "tame"]}})
    task = open_task(whole.tasks["t"])
    measured = {record.prompt_id for record in task.records}
    assert {record.split for record in task.records} == {"test"} and len(measured) == 12
    paths = training_data(whole.tasks["t"], task, tmp_path / "data", False, None, 0)
    learned = list(open_dataset(paths["train"]).records())
    assert not measured & {record.prompt_id for record in learned}
    assert sorted({record.split for record in learned}) == ["eval", "train"] and len(learned) == 40


def test_a_smaller_set_is_drawn_by_prompt_with_the_seed(tmp_path):
    whole = config(tasks={"t": {"dataset": write_task(tmp_path / "d")}})
    task = open_task(whole.tasks["t"])
    sets = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        paths = training_data(whole.tasks["t"], task, tmp_path / name, False, 5, seed)
        sets.append({r.prompt_id for r in open_dataset(paths["train"]).records() if r.split == "train"})
    assert len(sets[0]) == 5 and sets[0] == sets[1] != sets[2]


def test_data_without_a_held_out_part_is_refused(tmp_path):
    with DatasetWriter(tmp_path / "d", "demonstration") as writer:
        writer.write(Demonstration((Message("user", "Q?"),), answer="A."))
    with pytest.raises(UserError, match="nothing is held out"):
        open_task(config(tasks={"t": {"dataset": str(tmp_path / "d")}}).tasks["t"])


# ---- what is shown ---------------------------------------------------------------------------------------------------


def result(name: str = "a <b>task</b>") -> TaskResult:
    rows = [
        WayRow("zero-shot", "zero-shot", 0.5, 0.4, 0.6, (0.5,), 50, 0, 0, 0, None, 20, 0.01),
        WayRow("lora", "sft (lora)", 0.8, 0.7, 0.9, (0.78, 0.8, 0.82), 50, 14_200, 62_000, 6, 5e7, 20, 0.02),
    ]
    return TaskResult(name, "accuracy", rows, {"lora": [(16, 0.6, 0.5, 0.7), (64, 0.8, 0.7, 0.9)]}, None)


def test_amounts_and_times_are_short():
    assert [amount(value) for value in (0, 950, 12_345, 4.56e6, 1.2e9)] == ["0", "950", "12.3k", "4.56M", "1.2G"]
    assert [seconds(value) for value in (0.0123, 3.4, 306)] == ["12 ms", "3.4 s", "5 min 06 s"]


def test_the_page_is_self_contained_and_escapes_names():
    page = render("Comparison <script>", "facts", [result()])
    assert "<script" not in page and "&lt;b&gt;task" in page
    assert page.count('class="plot wide"') == page.count('class="plot narrow"') == 2 and not re.findall(
        r"(?:src|href)=.(?!#)", page
    )
    assert page == render("Comparison <script>", "facts", [result()])


def test_labels_of_ways_with_as_many_parameters_do_not_overlap():
    rows = [WayRow(way, "", value, 0.0, 1.0, (), 50, size, 0, 0, None, 20, 0.01) for way, value, size in (
        ("a", 0.5, 100), ("b", 0.51, 100), ("c", 0.5, 10**6), ("d", 0.9, 100))]  # fmt: skip
    found = label_heights(rows)
    assert found["b"] - found["a"] >= 0.0649 and found["c"] == 0.5 and found["d"] > 0.8


def test_the_markdown_table_has_a_line_for_each_way():
    text = markdown("Comparison", "facts", [result("task")])
    assert "| lora | 0.800 | 0.700 to 0.900 | 3, ±0.020 | 14.2k | 62kB | 6.0 s | 50MB | 20 | 20 ms |" in text
    assert "Not complete yet." in text


def test_step_times_are_those_of_training_alone(tmp_path):
    rows = [{"step": 1, "time/step": 0.5}, {"step": 1, "eval/loss": 3.0}, {"step": 2, "time/step": 0.25}]
    rows.append({"step": 3, "time/rollout": 1.0, "time/score": 2.0, "time/learn": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text('{"stage": "ppo", "status": "complete"}')
    assert step_seconds(tmp_path) == [0.5, 0.25, 6.0]


def test_an_adapter_on_an_earlier_result_is_not_all_that_must_be_stored(tmp_path):
    base = tiny.llama()
    first = finished.sft(tmp_path / "first", {"name": "lora", "rank": 2})
    parameters, size = stored(first, base)
    adapter = tmp_path / "first" / "adapter" / "adapter_model.safetensors"
    assert size == adapter.stat().st_size and 0 < parameters < 10_000
    second = finished.sft(tmp_path / "second", {"name": "lora", "rank": 2}, model=first, seed=2)
    merged = sum(file.stat().st_size for file in (tmp_path / "second" / "model").glob("*.safetensors"))
    changed, kept = stored(second, base)
    assert kept == merged > 2 * size and changed > parameters
    tuned = finished.sft(tmp_path / "tuned", {"name": "prompt-tuning", "tokens": 3}, model=first)
    assert stored(tuned, base)[0] == parameters + 3 * 32


# ---- whole comparisons -----------------------------------------------------------------------------------------------


def prompting_only(tmp_path: Path, **changes) -> CompareConfig:
    values = {
        "run": str(tmp_path / "run"),
        "model": {"path": tiny.llama()},
        "tasks": {"t": {"dataset": write_task(tmp_path / "d"), "labels": ["wild", "tame"], "max_new_tokens": 4}},
        "ways": {"zero-shot": {}, "cloze": {"prompting": "cloze"}},
        "budget": {"updates": 2},
    }
    return check_config(CompareConfig, merged(values, changes), "test")


def test_ways_without_training_are_measured_and_kept(tmp_path):
    (found,) = compare(prompting_only(tmp_path))
    assert [row.way for row in found.rows] == ["zero-shot", "cloze"] and found.recommendation is not None
    stored = read_result(tmp_path / "run" / "results" / "t--cloze--all--0.json")
    assert len(stored.outcomes) == 12 and set(stored.outcomes.predictions) <= {"wild", "tame"}
    assert (tmp_path / "run" / "compare.html").is_file() and (tmp_path / "run" / "table.md").is_file()
    file = tmp_path / "run" / "results" / "t--cloze--all--0.json"
    before = file.stat().st_mtime_ns
    (again,) = compare(prompting_only(tmp_path, ways={"few-shot": {"prompting": {"name": "few-shot", "shots": 2}}}))
    assert file.stat().st_mtime_ns == before  # measured once
    assert [row.way for row in again.rows] == ["zero-shot", "cloze", "few-shot"]
    assert again.rows[2].prompt_tokens > again.rows[0].prompt_tokens


def test_a_changed_way_under_an_old_name_is_refused(tmp_path):
    compare(prompting_only(tmp_path))
    with pytest.raises(UserError, match=r"a different ways\.cloze"):
        compare(prompting_only(tmp_path, ways={"cloze": {"prompting": {"name": "cloze", "calibrate": True}}}))
    with pytest.raises(UserError, match="another budget"):
        compare(prompting_only(tmp_path, budget={"updates": 3}))


def test_a_dry_run_and_a_faulty_way_leave_nothing_behind(tmp_path):
    assert compare(prompting_only(tmp_path), dry_run=True) == []
    with pytest.raises(UserError, match=r"ways\.bad: "):
        compare(prompting_only(tmp_path, ways={"bad": {"sft": {"optimiser": {}}}}))
    assert not (tmp_path / "run").exists()


def test_answers_are_scored_and_compared_with_the_baselines(tmp_path):
    changes = {"t": {"metrics": ["win_rate"], "labels": [], "reward": "ppo_rewards:letters"}}
    shots = {"few-shot": {"prompting": {"name": "few-shot", "shots": 2}}}
    whole = prompting_only(tmp_path, tasks=changes)
    ways = {"zero-shot": whole.ways["zero-shot"], **prompting_only(tmp_path, ways=shots).ways}
    del ways["cloze"]
    (found,) = compare(whole.model_copy(update={"ways": ways}))
    assert found.rows[0].value == 0.5  # the baseline against itself
    assert 0 <= found.rows[1].value <= 1


@pytest.mark.slow
def test_trained_ways_are_compared_and_a_deleted_cell_alone_runs_again(tmp_path):
    ways = {
        "zero-shot": {},
        "prompt-tuning": {"sft": {"tuning": {"name": "prompt-tuning", "tokens": 3}}},
        "full": {"sft": {}},
    }
    whole = prompting_only(tmp_path).model_copy(update={"ways": config(ways=ways).ways})
    whole = whole.model_copy(update={"ways": {name: whole.ways[name] for name in ways}})
    (found,) = compare(whole)
    by = {row.way: row for row in found.rows}
    assert by["prompt-tuning"].trained_parameters == 3 * 32
    assert by["full"].trained_parameters > 10_000 and by["full"].stored_bytes > 4 * by["full"].trained_parameters
    assert by["full"].training_seconds > 0 and by["prompt-tuning"].prompt_tokens > by["full"].prompt_tokens
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "runs").glob("*/run.json")}
    assert len(runs) == 2
    (tmp_path / "run" / "results" / "t--full--all--0.json").unlink()
    compare(whole)
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_a_student_learns_what_a_teacher_answers_to_the_training_prompts(tmp_path):
    with chat_server(lambda request, _: completion("tame or wild")) as server:
        ways = {"taught": {"distill": {"teacher": server.url, "retries": 0}, "sft": {}}}
        whole = prompting_only(tmp_path)
        whole = whole.model_copy(update={"ways": config(ways=ways).ways})
        whole = whole.model_copy(update={"ways": {"taught": whole.ways["taught"]}})
        (found,) = compare(whole)
        assert len(server.asked) == 34  # each training prompt once
    (row,) = found.rows
    assert row.about == "a teacher's answers, then sft"
    (taught,) = (tmp_path / "run" / "data" / "t").glob("train-all-*")
    records = list(open_dataset(taught).records())
    assert {record.answer for record in records} == {"tame or wild"} and len(records) == 34
    (run,) = (tmp_path / "run" / "runs").glob("*/run.json")
    assert "eval/loss" in json.loads(run.read_text())["metrics"]  # of the data's own answers


@pytest.mark.slow
def test_a_budget_in_seconds_is_timed_once_and_continues_after_a_stop(tmp_path):
    whole = prompting_only(tmp_path, budget={"updates": None, "seconds": 3.0})
    whole = whole.model_copy(update={"ways": {**config(ways={"full": {"sft": {}}}).ways}})
    whole = whole.model_copy(update={"ways": {name: whole.ways[name] for name in ("zero-shot", "full")}})
    compare(whole)
    steps = json.loads((tmp_path / "run" / "steps.json").read_text())
    (run,) = (tmp_path / "run" / "runs").glob("*/metrics.jsonl")
    assert list(steps.values()) == [len(step_seconds(run.parent))] and not (tmp_path / "run" / "probes").exists()
    (tmp_path / "run" / "results" / "t--full--all--0.json").unlink()
    compare(whole)
    assert json.loads((tmp_path / "run" / "steps.json").read_text()) == steps
