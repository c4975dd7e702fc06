"""`rlhf evaluate --lm-eval`: the harness's own scores on a local task, paired differences, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import finished
import pytest
import yaml

from rlhf.core.errors import UserError
from rlhf.policy_evaluation.harness import compared, read_harness, score_rows
from stages.evaluate import command

QUESTIONS = [("Once upon a", [" time", " xylophone"], 0), ("Tom and his", [" gnocchi", " mom"], 1)] * 5


def write_tasks(folder: Path) -> str:
    """Two tasks with a dataset on this disk: a multiple choice, and one whose answer is generated."""
    rows = [{"question": question, "choices": choices, "answer": right} for question, choices, right in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 1.0},
    }  # fmt: skip
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    choice["metric_list"] = [{"metric": "acc"}]
    text = {"output_type": "generate_until", "doc_to_target": "{{choices[answer]}}", "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    text["generation_kwargs"] = {"until": ["."], "max_gen_toks": 3}
    (folder / "tasks").mkdir()
    for name, own in (("choice", choice), ("text", text)):
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"mine_{name}", **common, **own}))
    return str(folder / "tasks")


@pytest.mark.slow
def test_a_policy_gets_the_scores_that_the_harness_gives_its_exported_folder(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tasks = write_tasks(tmp_path)
    run, other = finished.sft(tmp_path / "run"), finished.sft(tmp_path / "other", seed=9)
    spec = f"{{tasks: [mine_choice, mine_text], include_path: {tasks}}}"
    said, _ = finished.invoke(command, run, "--lm-eval", spec, "--against", other, "--json")
    found = finished.last_json(said)
    rows = {(row["task"], row["metric"]): row for row in found["scores"]}
    expected = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": f"{run}/model", "device": "cpu", "dtype": "float32"},
        tasks=["mine_choice", "mine_text"], task_manager=lm_eval.tasks.TaskManager(include_path=tasks),
        bootstrap_iters=0,
    )["results"]  # fmt: skip
    assert rows["mine_choice", "acc"]["value"] == expected["mine_choice"]["acc,none"]
    assert rows["mine_text", "exact_match"]["value"] == expected["mine_text"]["exact_match,none"]
    assert rows["mine_choice", "acc"]["questions"] == 10 and "mine_choice" in said
    gap = rows["mine_choice", "acc"]["difference"]
    assert gap["value"] == pytest.approx(rows["mine_choice", "acc"]["value"] - rows["mine_choice", "acc"]["against"])
    with pytest.raises(UserError, match="there is no task 'mine_choise'") as fault:
        finished.invoke(command, run, "--lm-eval", f"{{tasks: [mine_choise], include_path: {tasks}}}")
    assert "mine_choice" in str(fault.value)


def scores(values: list[float]) -> dict[str, Any]:
    row = {"task": "t", "metric": "acc", "filter": "none", "value": sum(values) / 4, "stderr": 0.1, "questions": 4}
    return {"scores": [row], "samples": {("t", "acc", "none"): values}}


def test_the_difference_of_two_policies_is_paired_by_question() -> None:
    (row,) = compared(scores([1, 1, 0, 1]), scores([1, 0, 0, 0]))
    # differences 0, 1, 0, 1: mean 0.5, standard error sqrt(1/3 / 4), t with 3 degrees of freedom 3.182446
    assert row["difference"]["value"] == 0.5 and row["against"] == 0.25
    assert row["difference"]["high"] == pytest.approx(0.5 + 3.182446 * (1 / 12) ** 0.5, abs=1e-5)
    assert score_rows([row], True)[0][:5] == ("t", "acc", 4, "0.75 +- 0.1", "0.25")
    (row,) = compared(scores([1, 1, 0, 1]), {"scores": [], "samples": {}})
    assert row["difference"] is None and row["against"] is None


def test_tasks_are_names_a_mapping_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text("tasks: [arc_easy]\nnum_fewshot: 5\n")
    assert read_harness("arc_easy, hellaswag").tasks == ["arc_easy", "hellaswag"]
    assert read_harness(str(tmp_path / "tasks.yaml")).num_fewshot == 5
    assert read_harness("{tasks: [arc_easy], limit: 3}").limit == 3


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--lm-eval", ","), "names no task"),
        (("--lm-eval", "{task: arc_easy}"), "task"),
        (("--lm-eval", "{tasks: [a], include_path: /nowhere}"), "is no folder"),
        (("--lm-eval", "arc_easy", "--judge", "rankings"), "--judge: is not for --lm-eval"),
    ],
)
def test_what_names_no_tasks_is_refused_before_anything_is_loaded(words: tuple[str, ...], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        finished.invoke(command, "no/such/run", *words)
