"""`rlhf data distill`: answers of teachers become demonstrations or candidates; what is of no use is counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from typing import Any

import finished
import pytest
import tiny
from chat_servers import chat_server, completion, fault
from rows import jsonl

from data_tools.annotate.candidates import fault as answer_fault
from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset
from stages.distill import command


def distill(*words: object) -> dict[str, Any]:
    """Run the command; its JSON."""
    said, _ = finished.invoke(command, *words, "--json", program="rlhf data distill")
    return finished.last_json(said)


@pytest.fixture
def questions(tmp_path):
    return jsonl(
        tmp_path / "questions.jsonl",
        [{"prompt": f"What is {i} plus {i}?", "answer": f"The answer is {2 * i}."} for i in range(8)],
    )


def asked_number(request: dict[str, Any]) -> int:
    return int(request["messages"][-1]["content"].split()[2])


# ---- which answers are of no use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Paris is the capital of France.", None),
        ("I'm sorry to hear that you are ill. Rest helps.", None),
        ("I can help with that: boil the water first.", None),
        ("  \n", "the answer is empty"),
        ("I'm sorry, but I can't help with that.", "the teacher refused to answer"),
        ("I’m afraid I cannot do that.", "the teacher refused to answer"),
        ("As an AI language model, I do not have feelings.", "the teacher refused to answer"),
        ("What is the capital of France, the country in Europe?", "the answer repeats the prompt"),
        ("no " * 100, "the answer repeats itself"),
        ("Earlier   ANSWER", "the answer is the same as another one to the prompt"),
    ],
)
def test_answers_of_no_use_have_a_reason(text, reason):
    prompt = "What is the capital of France, the country in Europe?"
    found = answer_fault(text, "stop", "", prompt, ["Earlier answer"])
    assert (found.reason if found else None) == reason


def test_half_answers_and_refusals_that_the_server_names_are_of_no_use():
    assert answer_fault("The capital is", "length", "", "?", []).reason == "the answer is cut off at the length limit"
    assert answer_fault("", "stop", "no", "?", []).reason == "the teacher refused to answer"
    assert answer_fault("", "content_filter", "", "?", []).reason == "the teacher refused to answer"


# ---- a teacher on a server -----------------------------------------------------------------------------------------


def test_good_answers_become_demonstrations_and_the_others_rejects_with_their_reason(questions, tmp_path):
    responses = {
        0: completion("The answer is 0."),
        1: completion("The answer", "length"),
        2: completion(""),
        3: completion("I cannot help with that."),
        4: completion("What is 4 plus 4?"),
        5: fault(400, "content policy"),
        6: completion(None, refusal="no"),
        7: completion("Fourteen."),
    }
    with chat_server(lambda request, _: responses[asked_number(request)]) as found:
        made = distill(
            questions, "--teacher", found.url, "--out", tmp_path / "out", "--price-input", 1, "--price-output", 2,
            "--temperature", 0.7, "--max-new-tokens", 50,
        )  # fmt: skip
    assert made["written"] == 2 and made["rejected"] == 6
    assert made["reasons"] == {
        "the answer is cut off at the length limit": 1,
        "the answer is empty": 1,
        "the teacher refused to answer": 2,
        "the answer repeats the prompt": 1,
        "the server refused the request": 1,
    }
    words = 4 + 2 + 0 + 5 + 5 + 1 + 1  # `chat_servers.completion` counts a token for each, and one for None
    assert made["tokens"] == {"prompt": 70, "completion": words}
    assert made["cost"] == made["cost_in_all"] == pytest.approx((70 + 2 * words) / 1e6)
    records = list(open_dataset(tmp_path / "out", "demonstration").records())
    assert [r.answer for r in records] == ["The answer is 0.", "Fourteen."]
    assert records[0].author == "model:m" and records[0].messages[0].content == "What is 0 plus 0?"
    origin = json.loads((tmp_path / "out" / "manifest.json").read_text())["origin"]
    sampling = {"max_tokens": 50, "temperature": 0.7, "seed": 0}
    assert origin["teacher"] == {"kind": "server", "url": found.url, "model": "m", "sampling": sampling}
    assert {r["max_tokens"] for r in found.asked} == {50} and len({r["seed"] for r in found.asked}) == 8
    reject = json.loads((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()[0])
    assert reject["line"] == 2 and json.loads(reject["raw"])["reply"] == "The answer"


def test_prompts_of_all_splits_are_asked_and_keep_their_split_unless_one_is_named(tmp_path):
    rows = [{"prompt": f"What is {i} plus {i}?", "split": ("train", "eval", "test")[i]} for i in range(3)]
    prompts = jsonl(tmp_path / "prompts.jsonl", rows)
    with chat_server(lambda request, _: completion(f"It is {2 * asked_number(request)}.")) as found:
        distill(prompts, "--teacher", found.url, "--out", tmp_path / "all")
        distill(prompts, "--teacher", found.url, "--out", tmp_path / "some", "--split", "train")
    assert [r.split for r in open_dataset(tmp_path / "all").records()] == ["train", "eval", "test"]
    assert [r.split for r in open_dataset(tmp_path / "some").records()] == ["train"]


def test_a_command_that_was_stopped_asks_only_for_what_is_missing(questions, tmp_path):
    words = (questions, "--out", tmp_path / "out", "--concurrency", 1)

    def answer(request, number):
        return fault(401, "expired") if number == 5 else completion(f"The answer is {asked_number(request)}.")

    with chat_server(answer) as found:
        with pytest.raises(UserError, match="401"):
            distill(*words, "--teacher", found.url)
        assert not (tmp_path / "out").exists()
        made = distill(*words, "--teacher", found.url)
        assert made["written"] == 8 and made["usage"]["cached"] == 5 and made["usage"]["requests"] == 3
        assert len(found.asked) == 6 + 3
        manifest = (tmp_path / "out" / "manifest.json").read_bytes()
        again = distill(*words, "--teacher", found.url, "--overwrite")
        assert again["usage"]["requests"] == 0 and (tmp_path / "out" / "manifest.json").read_bytes() == manifest


def test_rationales_are_asked_for_by_a_cue_that_the_record_does_not_have_and_checked_against_the_answer(
    questions, tmp_path
):
    def answer(request, _):
        number = asked_number(request)
        if number == 3:
            return completion("I add them and get six.")
        return completion(f"Twice {number}.\nThe answer is {2 * number + (number == 5)}.")

    with chat_server(answer) as found:
        made = distill(questions, "--teacher", found.url, "--out", tmp_path / "o", "--rationales", "--check")
    assert made["reasons"] == {"no answer is found in the text": 1, "another answer than the demonstration's": 1}
    assert all("step by step" in request["messages"][0]["content"] for request in found.asked)
    records = list(open_dataset(tmp_path / "o").records())
    assert len(records) == 6 and records[0].messages[0].content == "What is 0 plus 0?"
    assert records[1].answer == "Twice 1.\nThe answer is 2."


def test_several_answers_become_candidates_for_ranking(questions, tmp_path):
    def answer(request, number):
        same = asked_number(request) == 2
        return completion("Always the same." if same else f"Answer {request['seed']}.")

    with chat_server(answer) as found:
        made = distill(questions, "--teacher", found.url, "--out", tmp_path / "o", "--as", "candidates", "--n", 3)
    assert made["written"] == 7
    assert made["reasons"] == {
        "the answer is the same as another one to the prompt": 2,
        "only one answer is left to rank": 1,
    }
    proposal = next(iter(open_dataset(tmp_path / "o", "proposal").records()))
    assert [(c.author, c.author_kind) for c in proposal.candidates] == [("m", "model")] * 3


def test_a_teacher_that_only_writes_nonsense_makes_no_dataset(questions, tmp_path):
    with chat_server(lambda *_: completion("")) as found, pytest.raises(UserError, match="no usable answer"):
        distill(questions, "--teacher", found.url, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher", "http://127.0.0.1:9/v1", "--as", "candidates", "--n", 1), "needs at least two answers"),
        (("--teacher", "http://127.0.0.1:9/v1", "--check"), "needs a pattern that finds the answer"),
        (("--teacher", "http://user:secret@host/v1"), "user name, password"),
        (("--teacher", "http://host/v1", "--max-cost", 3), "needs price_input"),
        (("--teacher", "LLAMA", "--retries", 3), "--retries: is for a teacher on a server"),
        (("--teacher", "./nothing"), "nothing"),
    ],
)
def test_what_cannot_work_is_refused_before_the_teacher_is_asked(questions, tmp_path, words, message):
    words = [tiny.llama() if word == "LLAMA" else word for word in words]
    with pytest.raises(UserError, match=message) as caught:
        distill(questions, "--out", tmp_path / "o", *words)
    assert "secret" not in str(caught.value) and not (tmp_path / "o").exists()


# ---- a local teacher -----------------------------------------------------------------------------------------------


def test_a_local_model_teaches_and_its_replies_are_read_from_the_disk(questions, tmp_path):
    words = (questions, "--teacher", tiny.llama(), "--max-new-tokens", 8, "--stop", "e", "--n", 2)
    made = distill(*words, "--out", tmp_path / "o")
    assert made["usage"]["requests"] == 16 and made["written"] > 0
    origin = json.loads((tmp_path / "o" / "manifest.json").read_text())["origin"]
    assert origin["teacher"]["fingerprint"] == origin["parents"][1]["fingerprint"]
    for file in list((tmp_path / "o.replies").rglob("*.json"))[:3]:
        file.unlink()  # as if the command had been killed
    again = distill(*words, "--out", tmp_path / "p", "--cache", tmp_path / "o.replies")
    assert 0 < again["usage"]["requests"] <= 6
    assert list(open_dataset(tmp_path / "p").records()) == list(open_dataset(tmp_path / "o").records())


# ---- real processes ------------------------------------------------------------------------------------------------


def start(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, text=True, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_after_kill_9_the_same_command_goes_on_and_pays_for_nothing_twice(questions, tmp_path):
    killed = []

    def answer(request, number):
        if number == 4:  # four replies are on the disk, because they are asked for one by one
            killed[0].send_signal(signal.SIGKILL)
            killed[0].wait()
        return completion(f"The answer is {asked_number(request)}.")

    words = ("-m", "stages.cli", "data", "distill", questions, "--out", tmp_path / "o", "--concurrency", 1)
    with chat_server(answer) as found:
        killed.append(start(*words, "--teacher", found.url))
        assert killed[0].wait(timeout=120) == -signal.SIGKILL and len(found.asked) == 5
        assert start(*words, "--teacher", found.url).wait(timeout=120) == 0
    times = Counter(asked_number(request) for request in found.asked)
    assert times == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 1, 6: 1, 7: 1}, "the one under way was not answered"
    assert len(list(open_dataset(tmp_path / "o").records())) == 8


@pytest.mark.real
def test_transformers_serve_is_a_teacher(tmp_path):
    from transformers import AutoTokenizer

    model, port = str(shutil.copytree(tiny.STORIES, tmp_path / "model")), tiny.free_port()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    beginnings = jsonl(tmp_path / "b.jsonl", [{"prompt": f"One day, a little {animal}"} for animal in tiny.ANIMALS[:4]])
    serve = start("-c", SERVE, "serve", model, "--port", port, "--device", "cpu")
    try:
        wait_for(f"http://localhost:{port}/health", serve)
        made = distill(
            beginnings, "--teacher", f"http://localhost:{port}/v1", "--teacher-model", model, "--out", tmp_path / "o",
            "--max-new-tokens", 400,
        )  # fmt: skip
    finally:
        serve.terminate()
        serve.wait(30)
    assert made["usage"]["requests"] == 4 and made["usage"]["failures"] == made["usage"]["uncounted"] == 0
    assert made["written"] > 0 and made["written"] + made["rejected"] == 4 and made["tokens"]["completion"] > 400


SERVE = "from transformers.cli.transformers import main; main()"


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("no server")
