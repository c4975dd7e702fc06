"""`rlhf data tasks`: exemplars, rows that cannot be used, options and templates of one's own, real rows."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import jsonl, last_line, run, tree
from task_datasets import MINE, made, own

from data_tools.importers.run import NothingUsable
from data_tools.tasks.families import ALWAYS, families, load_family, read_family
from data_tools.tasks.make import Options, Pools, make_tasks
from data_tools.tasks.rows import Mapper
from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord
from rlhf.data.store import open_dataset

# ---- exemplars -----------------------------------------------------------------------------------------------------


def test_exemplars_come_before_the_question_and_are_other_rows(tmp_path):
    rows = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(5)] + [{"question": "q0?", "answer": "a0"}]
    file = jsonl(tmp_path / "r.jsonl", rows)
    make_tasks([file], tmp_path / "d", family="qa", options=Options(("question-answer",), shots=2))
    seen = Counter()
    for index, (prompt, answer) in enumerate(made(tmp_path / "d")):
        blocks = prompt.split("\n\n")
        number = index % 5
        assert blocks[2] == f"Question: q{number}?\nAnswer:" and answer == f"a{number}"
        shown = [block.split("\n")[0] for block in blocks[:2]]
        assert len({*shown, f"Question: q{number}?"}) == 3
        for block in blocks[:2]:
            asked, cue, given = block.split("\n")
            assert cue == "Answer:" and asked == f"Question: q{given[1:]}?"
        seen.update(shown)
    assert len(seen) == 5
    make_tasks([file], tmp_path / "again", family="qa", options=Options(("question-answer",), shots=2))
    assert tree(tmp_path / "again") == tree(tmp_path / "d")
    make_tasks([file], tmp_path / "other", family="qa", options=Options(("question-answer",), shots=2, seed=1))
    assert made(tmp_path / "other") != made(tmp_path / "d")


def test_exemplars_are_of_train_and_of_the_same_task_and_mode(tmp_path):
    def row(task, split, number, **more):
        return {"question": f"{task} {split} {number}?", "answer": f"{number}", "task": task, "split": split, **more}

    rows = [row(task, split, i) for task in ("x", "y") for split in ("train", "validation", "test") for i in range(4)]
    rows += [row("x", "train", i, rationale="So.") for i in range(10, 14)] + [row("z", "test", 1)]
    file = jsonl(tmp_path / "r.jsonl", rows)
    summary = make_tasks([file], tmp_path / "d", family="qa", options=Options(("ask",), shots=2))
    assert (summary.read, summary.written, summary.rejected) == (29, 28, 1)
    assert summary.reasons == {"too few other rows for its exemplars": 1}
    assert "0 of its task fit" in summary.first["too few other rows for its exemplars"].detail
    splits = Counter()
    for record in open_dataset(tmp_path / "d").records():
        *shown, asked = record.messages[0].content.split("\n\n")
        assert len(shown) == 2
        for block in shown:
            assert f"{record.group} train " in block
            assert ("The answer is" in block) == ("+cot" in record.source)
        assert f"{record.group} " in asked
        splits[record.split] += 1
    assert splits == {"train": 12, "eval": 8, "test": 8}


def test_the_pool_is_a_sample_of_bounded_size():
    family = load_family("qa")
    mapper = Mapper(family, (), None, "t")
    examples = [mapper({"question": f"q{i}?", "answer": "a"}) for i in range(2000)]
    pools = Pools(iter(examples), family, 0)
    with pytest.raises(BadRecord, match="500 of its task fit, 501 are needed"):
        pools.take(examples[0], 501, random.Random(0))
    shown = pools.take(examples[0], 499, random.Random(0))
    early = sum(int(example.fields["question"][1:-1]) < 1000 for example in shown)
    assert 200 < early < 300  # not only the first or the last ones


def test_which_template_a_row_gets_depends_on_the_row_and_the_seed_alone(tmp_path):
    rows = [{"text": f"text {i}", "label": "a"} for i in range(60)]
    for name, order in (("one", rows), ("two", rows[::-1])):
        make_tasks([jsonl(tmp_path / "r.jsonl", order)], tmp_path / name, family="classification", choices="a,b")
    one, two = (sorted(made(tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert len({record.source for record in open_dataset(tmp_path / "one").records()}) == 6


# ---- rows that cannot be used --------------------------------------------------------------------------------------


def test_bad_rows_are_rejected_with_line_and_reason(tmp_path):
    file = tmp_path / "r.csv"
    file.write_text('text,mood\nHi!,glad\n"Well,\nwell.",1\nOh.,angry\n,sad\nEh?\nNo.,\nOff.,-1\n', "utf-8")
    summary = make_tasks([file], tmp_path / "d", templates=own(tmp_path / "m.yaml"), choices="sad,glad")
    assert made(tmp_path / "d") == [
        ("Hi!\nHow was that said?\n- sad\n- glad", "glad"),
        ("Well,\nwell.\nHow was that said?\n- sad\n- glad", "glad"),
    ]
    assert (summary.read, summary.written, summary.rejected) == (7, 2, 5)
    rejected = [json.loads(line) for line in (tmp_path / "d" / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (5, "mood: not one of the choices"),
        (6, "text: missing or empty"),
        (7, "not as many fields as columns"),
        (8, "mood: missing or empty"),
        (9, "mood: not one of the choices"),
    ]
    assert rejected[0]["detail"] == "'angry'; the choices are 'sad', 'glad'"
    assert rejected[0]["raw"] == "Oh.,angry"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a?"}, "answer: missing or empty"),
        ({"question": "a?", "answer": " "}, "answer: missing or empty"),
        ({"question": ["a?"], "answer": "b"}, "question: not text"),
        ({"question": "a?", "answer": "b", "choices": "b,c"}, "choices: not a list"),
        ({"question": "a?", "answer": "b", "choices": ["b", "b "]}, "choices: not two or more different texts"),
        ({"question": "a?", "answer": "d", "choices": ["b", "c"]}, "answer: not one of the choices"),
        ({"question": "a?", "answer": 2, "choices": ["b", "c"]}, "answer: not one of the choices"),
        ({"question": "a?", "answer": {"x": 1}, "choices": ["b", "c"]}, "answer: not text"),
        ({"question": "a?", "answer": "b", "split": "holdout"}, "split: not one of train, eval, test"),
        ({"question": "a?", "answer": "b", "context": "\ud800"}, "context: not valid Unicode (a lone surrogate)"),
        (["a?", "b"], "not an object"),
        ("a?", "not an object"),
    ],
)  # fmt: skip
def test_every_fault_of_a_row_has_its_reason(tmp_path, row, reason):
    file = jsonl(tmp_path / "r.jsonl", [{"question": "Why?", "answer": "So."}, row])
    summary = make_tasks([file], tmp_path / "d", family="qa")
    assert (summary.read, summary.written, summary.reasons) == (2, 1, {reason: 1})
    with pytest.raises(UserError, match="--strict stops"):
        make_tasks([file], tmp_path / "s", family="qa", strict=True)
    assert not (tmp_path / "s").exists()


def test_true_and_false_are_the_choices_0_and_1(tmp_path):
    rows = [{"first": "a", "second": "b", "label": label} for label in (True, False, "0", "yes")]
    file = jsonl(tmp_path / "r.jsonl", rows)
    make_tasks([file], tmp_path / "d", family="similarity", choices="no,yes")
    assert [answer for _, answer in made(tmp_path / "d")] == ["yes", "no", "no", "yes"]


def test_no_usable_row_writes_nothing_and_the_error_names_the_columns(tmp_path):
    file = jsonl(tmp_path / "r.jsonl", [{"Frage": "a?", "Antwort": "b"}] * 2)
    with pytest.raises(NothingUsable, match="none of 2 rows could be used") as caught:
        make_tasks([file], tmp_path / "d", family="qa")
    assert "no column 'question' among 'Frage', 'Antwort'" in caught.value.why
    result = run("tasks", file, "--family", "qa", "--out", tmp_path / "d", "--json", "--overwrite")
    assert result.exit_code != 0 and last_line(result)["rejected"] == 2
    assert not (tmp_path / "d").exists()
    words = ("--field", "question=Frage", "--field", "answer = Antwort")
    result = run(
        "tasks", file, "--family", "qa", *words, "--template", "ask", "--out", tmp_path / "d", "--json", "--overwrite"
    )
    assert result.exit_code == 0 and made(tmp_path / "d") == [("a?", "b")] * 2
    assert last_line(result) == {
        "out": str(tmp_path / "d"), "kind": "demonstration", "read": 2, "written": 2, "rejected": 0, "reasons": {},
    }  # fmt: skip


def test_columns_are_computed_with(tmp_path):
    row = {"Der Text": "Ja", "opts": "no|yes", "key": "B", "n": 2}
    words = ["question={{ row['Der Text'] ~ ' ' ~ n * 2 }}", "choices={{ opts.split('|') }}",
             "answer={{ 'AB'.find(key) }}", "task={{ 'my task' }}"]  # fmt: skip
    make_tasks(
        [jsonl(tmp_path / "r.jsonl", [row])], tmp_path / "d", family="qa", fields=words, options=Options(("pick",))
    )
    assert made(tmp_path / "d") == [("Ja 4\nPick one of these:\n- no\n- yes", "yes")]
    assert next(iter(open_dataset(tmp_path / "d").records())).group == "my task"
    rows = jsonl(tmp_path / "r.jsonl", [row, {"opts": 3}])
    summary = make_tasks([rows], tmp_path / "d", family="qa", fields=words, overwrite=True)
    assert summary.reasons == {"question: cannot be computed": 1}


def test_what_a_row_says_is_never_taken_as_a_template(tmp_path):
    text = "{{ answer }} {% for %} <b>&amp;</b> {{ ''.__class__ }}"
    file = jsonl(tmp_path / "r.jsonl", [{"question": text, "answer": "{{ question }}"}])
    make_tasks([file], tmp_path / "d", family="qa", options=Options(("ask",)))
    assert made(tmp_path / "d") == [(text, "{{ question }}")]


# ---- wrong options and templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --family or --templates"),
        ({"family": "qa", "templates": "x.yaml"}, "give either --family or --templates"),
        ({"family": "q&a"}, "--family: none is called 'q&a'"),
        ({"family": "qa", "fields": ["question"]}, "is not FIELD=COLUMN"),
        ({"family": "qa", "fields": ["query=x"]}, "qa has no field 'query'"),
        ({"family": "qa", "fields": ["question={{ x"]}, None),  # a column may be called so
        ({"family": "qa", "fields": ["question={{ x( }}"]}, "--field question 'x[(]': not an expression"),
        ({"family": "qa", "choices": "yes"}, "not two or more different texts"),
        ({"family": "qa", "options": Options(("aks",))}, "qa has none called 'aks'"),
        ({"family": "qa", "options": Options(cot="always")}, "'always' is not a way"),
        ({"family": "qa", "options": Options(shots=-1)}, "is below 0"),
        ({"templates": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    file = jsonl(tmp_path / "r.jsonl", [{"question": "a?", "answer": "b", "{{ x": "c?"}])
    if message is None:
        make_tasks([file], tmp_path / "d", **options)
        return
    with pytest.raises(UserError, match=message):
        make_tasks([file], tmp_path / "d", **options, overwrite=True)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": [{"name": "how", "prompt": "{{ text"}]}, "template 'how': prompt: not a Jinja template: line 1"),
        ({"templates": [{"name": "how", "prompt": "{{ txt }}"}]}, "template 'how': prompt: there is no field 'txt'"),
        ({"templates": [{"name": "how", "prompt": "{{ text }}{{ mood }}"}]}, "there is no field 'mood'"),  # the answer
        ({"templates": [{"name": "how", "prompt": "{{ text }}{{ answer }}"}]}, "there is no field 'answer'"),
        ({"templates": [{"name": "how", "prompt": "Well?"}]}, "template 'how': does not use the field 'text'"),
        ({"templates": [{"name": "how"}]}, "template 'how': prompt: Field required"),
        ({"templates": [{"prompt": "{{ text }}"}]}, "template 1: name: Field required"),
        ({"templates": MINE["templates"] * 2}, "template 'how': there are two of that name"),
        ({"templates": [{**MINE["templates"][0], "wording": {"bad": False}}]}, "wording: bad: Input should be a valid"),
        ({"templates": [{**MINE["templates"][0], "answer": "x"}]}, "answer: Extra inputs are not permitted"),
        ({"templates": []}, "templates: List should have at least 1"),
        ({"answer": "tone"}, "answer: 'tone' is not one of `fields`"),
        ({"fields": {"text": "", "mood": "", "options": ""}}, "a field cannot be called 'options'"),
        ({"fields": {"my text": "", "mood": ""}}, "a field cannot be called 'my text'"),
        ({"cot": {"prompt": "{{ prompt }}", "target": "{{ why }}"}}, "cot: target: there is no field 'why'"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_templates_of_ones_own_that_are_wrong_are_reported_with_file_and_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read_family(own(tmp_path / "m.yaml", **changes))
    assert caught.value.what.startswith(f"{tmp_path / 'm.yaml'}: ")


@pytest.mark.parametrize("text", ["", "- a", "a: [", "!!python/object/apply:os.system ['true']", "\x00"])
def test_a_file_that_is_not_of_the_form_is_reported(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match=r"m\.yaml: "):
        read_family(tmp_path / "m.yaml")


def test_a_template_that_cannot_be_rendered_rejects_the_row(tmp_path):
    templates = [{"name": "first-word", "prompt": "{{ text.split()[2] }}"}]
    file = jsonl(tmp_path / "r.jsonl", [{"text": "one two", "mood": "x"}, {"text": "one two three", "mood": "x"}])
    summary = make_tasks([file], tmp_path / "d", templates=own(tmp_path / "m.yaml", templates=templates))
    assert made(tmp_path / "d") == [("three", "x")]
    assert summary.reasons == {"a template cannot be rendered": 1}


def test_a_row_that_no_template_fits_is_rejected(tmp_path):
    file = jsonl(tmp_path / "r.jsonl", [{"text": "Hi", "mood": "x"}])  # the template asks for choices
    with pytest.raises(NothingUsable, match="none of 1 rows") as caught:
        make_tasks([file], tmp_path / "d", templates=own(tmp_path / "m.yaml"))
    assert "no template fits the row's fields (it has answer, mood, text)" in caught.value.why


def test_the_dataset_keeps_its_templates_and_the_command_that_makes_it_again(tmp_path):
    file, mine = jsonl(tmp_path / "r.jsonl", [{"text": "Hi", "mood": "sad"}]), own(tmp_path / "m.yaml")
    words = ["tasks", file, "--templates", mine, "--choices", "sad,glad", "--task", "t", "--template", "how"]
    result = run(*words, "--all-templates", "--seed", 3, "--out", tmp_path / "d")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "d" / "templates.yaml").read_bytes() == mine.read_bytes()
    origin = open_dataset(tmp_path / "d", verify=True).manifest["origin"]
    assert origin["command"] == (
        f"rlhf data tasks {file} --templates {mine} --choices sad,glad --task t --template how --all-templates --seed 3"
    )
    assert [row["path"] for row in origin["files"]] == [str(file)] and origin["written"] == 1


def test_the_families_are_listed_with_their_templates():
    result = run("families", "--json")
    assert result.exit_code == 0 and [row["family"] for row in last_line(result)["families"]] == list(families())
    result = run("families", "inference")
    assert "-- witness" in result.output and "choices: entailment, neutral, contradiction" in result.output
    assert run("families", "inferense").exception.remedy.startswith("did you mean 'inference'?")


# ---- real rows -----------------------------------------------------------------------------------------------------

FLAN = [
    "question=instruction",
    'rationale={{ output.rpartition("\\nThe answer is ")[0] }}',
    'answer={{ output.rpartition("\\nThe answer is ")[2].removesuffix(".") }}',
]


GSM8K = [
    "question=instruction",
    'rationale={{ output.rpartition("\\n#### ")[0]|regex_replace("<<[^>]*>>") }}',
    'answer={{ output.rpartition("#### ")[2] }}',
]


def test_real_flan_rows_come_out_as_flan_wrote_them(tmp_path, shared):
    path = shared / "data" / "instructions" / "flan_cot.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 0, None, 10)]
    file = jsonl(tmp_path / "cot.jsonl", rows)
    summary = make_tasks([file], tmp_path / "d", family="qa", fields=FLAN, options=Options(("ask",)))
    assert (summary.written, summary.rejected) == (len(rows), 0)
    for row, record in zip(rows, open_dataset(tmp_path / "d").records()):
        assert record.messages[0].content == f"Reason step by step, then answer.\n{row['instruction'].strip()}"
        assert record.answer == row["output"].strip() or row["output"].endswith("..")
        assert record.group == row["task"]
    make_tasks([file], tmp_path / "a", family="qa", fields=FLAN, options=Options(("ask",), cot="never"))
    first = next(iter(open_dataset(tmp_path / "a").records()))
    assert first.messages[0].content.startswith('Claim: "Only people named Floyd wearing pink')
    assert first.answer == "no"


def test_real_gsm8k_rows_are_asked_after_worked_ones(tmp_path, shared):
    path = shared / "data" / "instructions" / "gsm8k_train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 300)]
    file = jsonl(tmp_path / "gsm8k.jsonl", rows)
    make_tasks([file], tmp_path / "d", family="qa", fields=GSM8K, options=Options(("ask",), shots=1, cot="both"))
    direct, reasoned = islice(open_dataset(tmp_path / "d").records(), 2)
    asked = rows[0]["instruction"]
    assert asked.startswith("Natalia sold clips")
    assert direct.messages[0].content.endswith(f"\n\n{asked}") and direct.answer == "72"
    assert reasoned.messages[0].content.endswith(f"\n\nReason step by step, then answer.\n{asked}")
    assert reasoned.answer == (
        "Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May.\n"
        "The answer is 72."
    )
    worked = reasoned.messages[0].content.split("\n\n")[0]
    assert worked.startswith("Reason step by step") and "\nThe answer is " in worked and "<<" not in worked


# ---- any rows ------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "b", "train"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


any_rows = st.lists(st.dictionaries(st.sampled_from(["question", "answer", "context", *ALWAYS]), values), max_size=6)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(rows=any_rows, shots=st.integers(0, 2))
def test_whatever_a_row_holds_it_is_written_or_rejected(tmp_path, rows, shots):
    file = jsonl(tmp_path / "r.jsonl", [{"question": "Why?", "answer": "So."}, *rows])
    words = ["question={{ question.split('x')[0] }}"] if shots else []
    try:
        options = Options(shots=shots)
        said = make_tasks([file], tmp_path / "d", family="qa", fields=words, options=options, overwrite=True).as_dict()
    except NothingUsable as error:
        said = error.summary.as_dict()
    assert said["read"] == said["written"] + said["rejected"] == 1 + len(rows)
    assert sum(said["reasons"].values()) == said["rejected"]
