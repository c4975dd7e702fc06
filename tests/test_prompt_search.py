"""`rlhf prompt-search`: parts of the data, instructions in texts, resuming, the winner's file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import finished
import pytest
import tiny
import torch
import transformers
from chat_servers import Response, chat_server, completion

from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset
from rlhf.inference.policy import open_policy
from rlhf.prompting.proposals import from_examples, instruction_in, local_proposer, reword
from rlhf.prompting.search import SearchPlan, split_parts
from rlhf.servers.cache import ReplyCache
from rlhf.tasks.config import TaskConfig
from rlhf.tasks.task import load_task
from stages.evaluate import command as evaluate_command
from stages.prompt_search import command
from stages.sample import command as sample_command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama whose context holds a request for an instruction."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {**tiny.SMALL, "max_position_embeddings": 512}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"prompt": f"{tiny.COLOURS[i % 6]} {i}", "answer": "warm" if i % 6 < 3 else "cold",
             "split": "train" if i < 24 else "eval"} for i in range(36)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(model: str, colours: str, out: Path) -> list[Any]:
    options = ["--candidates", 3, "--rounds", 1, "--keep", 2, "--records", 8, "--instruction-tokens", 12]
    return [model, "--dataset", colours, "--out", out, "--prompting", "{name: cloze, calibrate: true}", *options]


@pytest.fixture(scope="module")
def complete(model: str, colours: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("searches") / "complete"
    finished.invoke(command, *words(model, colours, out))
    return out


def content(folder: Path) -> dict[str, str]:
    files = {file.name: file.read_text() for file in sorted(folder.iterdir()) if file.is_file()}
    return {name: text.replace(str(folder), "OUT") for name, text in files.items()}


# ---- parts and proposals -------------------------------------------------------------------------------------------


def test_no_part_of_the_data_has_a_question_of_another(colours):
    task = load_task(TaskConfig(dataset=colours))
    train = list(open_dataset(colours).records())  # the reported records among them
    parts = split_parts(task, train, SearchPlan(3, 1, 2, 8, seed=0))
    ids = [{record.prompt_id for record in records}
           for records in (parts.shown, parts.scored.records, parts.reported.records)]  # fmt: skip
    assert [len(part) for part in ids] == [12, 8, 12]
    assert not (ids[0] & ids[1] or ids[1] & ids[2] or ids[0] & ids[2])
    assert parts.scored.references == [record.answer for record in parts.scored.records]


def test_a_search_needs_training_records(model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "answer": "yes" if i % 2 else "no"}) + "\n" for i in range(4))
    )
    with pytest.raises(UserError, match="0 training records that are not reported on"):
        finished.invoke(command, model, "--dataset", path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        (' "Say the colour\nof it."\n\nMore text', "Say the colour of it."),
        ("The instruction was: Add them.", "Add them."),
        ("\n\nInstruction: Sort.", "Sort."),
        ("...", None),
        ("word " * 200, None),
    ],
)
def test_the_instruction_is_the_first_paragraph(text, instruction):
    assert instruction_in(text) == instruction


def test_a_request_shows_as_many_examples_as_fit():
    pairs = [("red {x}", "warm"), ("blue", "cold")]
    assert "Input: red {x}\nOutput: warm\n\nInput: blue\nOutput: cold" in from_examples(pairs, lambda text: True)
    assert "blue" not in from_examples(pairs, lambda text: "blue" not in text)
    with pytest.raises(UserError, match="not even one example fits"):
        from_examples(pairs, lambda text: False)
    assert "Instruction: Use {braces}." in reword("Use {braces}.")


def test_proposals_are_seeded(model, tmp_path):
    policy = open_policy(model)

    def proposed(seed: int, replies: str) -> list[list[str]]:
        return local_proposer(policy, 0.9, 8, seed, ReplyCache(tmp_path / replies)).write(["Say.", "Do."], 3)

    first = proposed(1, "a")
    assert [len(several) for several in first] == [3, 3] and len(set(first[0])) > 1
    assert first == proposed(1, "a") == proposed(1, "b") != proposed(2, "a")


# ---- a search ------------------------------------------------------------------------------------------------------


def test_every_instruction_is_kept_with_its_score_and_the_best_wins(complete):
    rows = [json.loads(line) for line in (complete / "candidates.jsonl").read_text().splitlines()]
    result = json.loads((complete / "result.json").read_text())
    assert rows[0]["instruction"] == "" and {row["round"] for row in rows} == {-1, 0, 1}
    proposed = [row for n in (0, 1) for row in json.loads((complete / f"round-{n}.json").read_text())]
    assert {row["instruction"] for row in rows[1:]} <= {row["instruction"] for row in proposed}
    assert result["winner"] == max(rows, key=lambda row: row["score"])
    assert result["report"]["records"] == 12 and all(row["records"] == 8 for row in rows)
    reworded = {row["from"] for row in proposed if row["round"] == 1}
    best = sorted((row for row in rows if row["round"] < 1), key=lambda row: -row["score"])[:2]
    assert reworded == {row["instruction"] for row in best} - {""}


def test_evaluate_and_sample_take_the_winners_file(complete, model, colours):
    said, _ = finished.invoke(
        evaluate_command, model, "--dataset", colours, "--prompting", complete / "winner.yaml", "--json"
    )
    (cell,) = finished.last_json(said)["prompting"]
    result = json.loads((complete / "result.json").read_text())
    assert cell["metrics"][0] == result["report"]["winner"] and cell["title"] == "winner"
    assert cell["instruction"] == result["winner"]["instruction"]
    said, _ = finished.invoke(sample_command, model, "-p", "red 1", "--prompting", complete / "winner.yaml",
                              "--labels", "warm,cold", "--json")  # fmt: skip
    assert json.loads(said)["answer"] in ("warm", "cold")


@pytest.mark.slow
def test_a_server_proposes_and_is_not_asked_again(model, colours, tmp_path):
    def answer(body: dict[str, Any], number: int) -> Response:
        text = body["messages"][0]["content"]
        if "other words" in text:
            return completion(f"Reworded {body['seed']}.")
        return completion("Never ends", "length") if number == 0 else completion(f'"Name the colour {number}."')

    given = ["--candidates", 3, "--rounds", 1, "--keep", 1, "--records", 4, "--metric", "log_likelihood"]
    out = tmp_path / "search"
    with chat_server(answer) as server:
        words = (
            model,
            "--dataset",
            colours,
            "--out",
            out,
            "--proposer",
            f"{{url: '{server.url}', concurrency: 1}}",
            *given,
        )
        _, err = finished.invoke(command, *words)
        assert "1 proposals lost: cut off (length)" in err
        asked = len(server.asked)
        assert asked >= 4 and len({body["seed"] for body in server.asked[3:]}) == asked - 3
        before = content(out)
        for name in ("round-0.json", "round-1.json", "result.json", "winner.yaml", "candidates.jsonl"):
            (out / name).unlink()
        finished.invoke(command, *words)
        assert len(server.asked) == asked
    assert content(out) == before
    rows = [json.loads(line) for line in (out / "candidates.jsonl").read_text().splitlines()]
    assert {"Name the colour 1.", "Name the colour 2."} <= {row["instruction"] for row in rows}


@pytest.mark.parametrize("missing", ["a line", "a round", "the report", "all but the first line"])
def test_a_search_goes_on_from_what_is_there_and_ends_the_same(missing, complete, model, colours, tmp_path):
    out = tmp_path / "search"
    shutil.copytree(complete, out)
    for name in ("result.json", "winner.yaml"):
        (out / name).unlink()
    lines = (out / "candidates.jsonl").read_text().splitlines(keepends=True)
    kept = {"a line": lines[:-1], "the report": lines, "all but the first line": lines[:1]}
    kept["a round"] = [line for line in lines if json.loads(line)["round"] < 1]
    (out / "candidates.jsonl").write_text(
        "".join(kept[missing]) + ('{"instruction": "ha' if missing == "a line" else "")
    )
    if missing == "a round":
        (out / "round-1.json").unlink()
    finished.invoke(command, *words(model, colours, out))
    assert content(out) == content(complete)


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_the_same(complete, model, colours, tmp_path):
    out = tmp_path / "search"
    given = [sys.executable, "-m", "stages.cli", "prompt-search", *map(str, words(model, colours, out))]
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(given, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "candidates.jsonl").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    finished.invoke(command, *words(model, colours, out))
    assert content(out) == content(complete)


def test_a_complete_search_is_shown_again_without_work(complete, model, colours):
    before = content(complete)
    said, _ = finished.invoke(command, *words(model, colours, complete), "--json")
    assert content(complete) == before and finished.last_json(said) == json.loads(
        before["result.json"].replace("OUT", str(complete))
    )
    assert "On 12 records that the search never saw" in said


def test_another_search_in_the_folder_is_refused(complete, model, colours, tmp_path):
    with pytest.raises(UserError, match=r"holds another search\nseed: 0 there, 1 here"):
        finished.invoke(command, *words(model, colours, complete), "--seed", 1)
    with pytest.raises(UserError, match="not an http or https address"):
        finished.invoke(command, *words(model, colours, tmp_path / "new"), "--proposer", "http:///v1")
    with pytest.raises(UserError, match="OPENAI_API_KEY, which should hold the key, is not set"):
        finished.invoke(command, *words(model, colours, tmp_path / "new"), "--proposer", "https://api.openai.com/v1")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not a search"):
        finished.invoke(command, *words(model, colours, tmp_path))
