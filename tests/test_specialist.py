"""Specialists: heads of transformers on labelled rows."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import specialist_rows
import tiny
import torch
import transformers
import ukp
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import f1_score
from stopped import stopped_after

import stages.specialist
from rlhf.config.base import ModelConfig
from rlhf.config.load import check_config
from rlhf.core.errors import UserError
from rlhf.export.export import export
from rlhf.export.formats import EXPORTERS
from rlhf.inference.policy import open_policy
from rlhf.models.load import quiet
from rlhf.specialist.config import SpecialistConfig
from rlhf.specialist.head import LabelledRow
from rlhf.specialist.heads import HEADS
from rlhf.specialist.model import Specialist, load_specialist, load_text_tokenizer
from rlhf.specialist.spans import SpanAnswers, token_f1

TASKS = ("text", "pair", "tags", "span")
quiet()


def trained(folder: Path, task, train, held_out=None, **values) -> Path:
    stages.specialist.run(specialist_rows.config(folder, task, train, held_out, **values))
    return folder / "run"


def metrics(run: Path) -> dict[str, float]:
    return {one["metric"]: one["value"] for one in json.loads((run / "specialist_metrics.json").read_text())["metrics"]}


def fitted(task, found: list[dict]):
    head = HEADS.pick(task)()
    examples = [head.example(row) for row in found]
    return head.fitted(examples, []), examples


def loaded(task, count: int = 6, path: str | None = None):
    """A head, its model in evaluation mode, and a batch of encoded rows."""
    head, examples = fitted(task, specialist_rows.rows(task if isinstance(task, str) else task["name"], count))
    path = path or tiny.bert()
    tokenizer = load_text_tokenizer(ModelConfig(path=path), path, head)
    torch.manual_seed(0)
    model, new = load_specialist(ModelConfig(path=path), path, head, tokenizer)
    rows = [head.encode(tokenizer, example, 128) for example in examples]
    return head, model.eval(), new, head.batch(tokenizer, rows, "cpu"), rows


# ---- losses, metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_that_of_transformers(task):
    head, model, _, batch, _ = loaded(task)
    ours = head.loss(Specialist(model, head)(batch), batch) / head.items(batch.targets)
    if task == "span":
        theirs = model(**batch.inputs, start_positions=batch.targets[:, 0], end_positions=batch.targets[:, 1]).loss
    else:
        theirs = model(**batch.inputs, labels=batch.targets).loss
    # transformers' span loss also counts logits of padding, which ours leaves out
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if task == "span" else 1e-5, atol=1e-5)


def test_the_training_is_that_of_transformers_trainer(tmp_path):
    rows = specialist_rows.rows("text", 8)
    _, model, _, batch, _ = loaded("text", 8)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    base = tmp_path / "base"
    model.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    saved = json.loads((base / "config.json").read_text())
    saved |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(saved))
    optimizer = {"lr": 1e-3, "schedule": "linear", "warmup": 0.0}
    run = trained(
        tmp_path, "text", rows, False, model={"path": str(base)}, optimizer=optimizer,
        batch={"batch_size": 8, "max_steps": 4},
    )  # fmt: skip
    data = [{k: v[i] for k, v in batch.inputs.items()} | {"labels": batch.targets[i]} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=8, max_steps=4, learning_rate=1e-3,
        lr_scheduler_type="linear", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    transformers.Trainer(peer, arguments, train_dataset=data).train()
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").state_dict()
    for name, weight in peer.state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-4, msg=name)


def test_balanced_class_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    rows = [{"text": f"t{i}", "label": "a" if i < 6 else "b" if i < 8 else "c"} for i in range(9)]
    head, examples = fitted({"name": "text", "class_weights": "balanced"}, rows)
    wanted = compute_class_weight("balanced", classes=np.array(list("abc")), y=[e.target for e in examples])
    assert head.weights == pytest.approx(tuple(wanted))
    assert head.items(torch.tensor([0, 2])).item() == pytest.approx(0.5 + 3.0)


def test_macro_f1_and_entity_f1_are_those_of_the_libraries():
    gold, predicted = list("aabbbcc"), list("abbbacc")
    head, _ = fitted("text", [{"text": f"t{i}", "label": label} for i, label in enumerate(gold)])
    found = {m.metric: m for m in head.metrics([LabelledRow(("x",), label) for label in gold], predicted)}
    assert found["f1"].value == pytest.approx(f1_score(gold, predicted, average="macro"))
    assert found["accuracy"].value == pytest.approx(5 / 7) and found["accuracy"].low < 5 / 7 < found["accuracy"].high
    tags = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "O", "O"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC", "O", "B-PER"]]
    head, examples = fitted("tags", [{"tokens": ["w"] * 4, "tags": row} for row in tags])
    found = {m.metric: m.value for m in head.metrics(examples, guess)}
    assert found["entity_f1"] == pytest.approx(entity_f1(tags, guess))
    assert head.by_label(examples, guess)["LOC"]["f1-score"] == 1.0


def test_span_metrics_follow_squad():
    # "Denver Broncos" and "the broncos, Denver colts": 2 shared words of 2 and 3, so F1 = 2 * 2 / 5
    assert token_f1("Denver Broncos", "the broncos, Denver colts") == pytest.approx(0.8)
    assert token_f1("", "") == 1.0 and token_f1("", "x") == 0.0
    head = HEADS.pick({"name": "span", "no_answer": True})()
    examples = [
        LabelledRow(("q", "c"), SpanAnswers(("The Moon.", "luna"), (0, 0))),
        LabelledRow(("q", "c"), SpanAnswers((), ())),
    ]
    found = {m.metric: m.value for m in head.metrics(examples, ["moon", "moon"])}
    assert found == {"exact_match": 0.5, "token_f1": 0.5}


def test_the_best_span_is_in_the_context_in_order_and_short_enough():
    head = HEADS.pick({"name": "span", "longest": 2})()
    row = {"length": 5, "starts": [-1, 0, 2, 4, 6], "ends": [-1, 1, 3, 5, 7], "context": "a b c d"}
    logits = torch.tensor([[9.0, 9.0], [5.0, 0.0], [0.0, 3.0], [0.0, 0.0], [0.0, 4.0]])
    assert head.predictions(logits[None], [row]) == ["a b"]  # "a b c d" scores 9 but has 4 tokens; "a b" scores 8


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("text", {"text": "x"}, "label: missing"),
        ("text", {"text": " ", "label": "a"}, "text: empty"),
        ("text", {"text": 3, "label": "a"}, "text: not text"),
        ("pair", {"premise": "x", "label": "a"}, "hypothesis: missing"),
        ({"name": "text", "labels": ["a", "b"]}, {"text": "x", "label": 2}, "not one of `labels`"),
        ("tags", {"tokens": ["a", "b"], "tags": ["O"]}, "not one for each token"),
        ("span", {"question": "q", "context": "c d", "answer": "e"}, "does not occur in the context"),
        ("span", {"question": "q", "context": "c d", "answer": ""}, "answer: empty"),
        (
            {"name": "span", "start": "at"}, {"question": "q", "context": "c d", "answer": "d", "at": 1},
            "is not where `start` says",
        ),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_has_a_reason(task, row, reason):
    with pytest.raises(ValueError, match=reason):
        HEADS.pick(task)().example(row)


def test_rows_are_read_as_their_publishers_write_them():
    squad = {"question": "q", "context": "c d c", "answer": {"text": ["c", "d"], "answer_start": [4, 2]}}
    assert HEADS.pick("span")().example(squad).target == SpanAnswers(("c", "d"), (4, 2))
    assert HEADS.pick("tags")().example({"tokens": "a b", "tags": "O B-X"}).target == ["O", "B-X"]
    numbered = HEADS.pick({"name": "text", "labels": ["neg", "pos"]})()
    assert [numbered.example({"text": "x", "label": v}).target for v in (1, "0", "pos")] == ["pos", "neg", "pos"]
    renamed = HEADS.pick({"name": "text", "text": "Review", "label": "stars"})()
    assert renamed.example({"Review": "x", "stars": 2.0}).target == "2"


def test_bad_data_is_refused_before_the_model_is_loaded(tmp_path):
    rows = specialist_rows.rows("text", 12)
    refused = {
        "labels that no training row has: 'odd'": (rows, [{"text": "new", "label": "odd"}]),
        "rows of two labels or more": ([row | {"label": "pos"} for row in rows], False),
        "have the text of a training row": (rows, rows[:1]),
        "no usable row": ([{"review": "x"}], False),
    }
    for words, (train, held_out) in refused.items():
        with pytest.raises(UserError, match=words):
            trained(tmp_path, "text", train, held_out)
        assert not (tmp_path / "run").exists()


def test_options_that_do_nothing_are_refused():
    base = {"run": "r", "model": {"path": "m"}, "task": "text", "data": {"train": "t"}}
    for more, words in {
        "model.chat_template": ({"model": {"path": "m", "chat_template": "plain"}}, "without a chat template"),
        "tuning": ({"tuning": "prompt-tuning"}, "cannot be merged"),
        "task": ({"task": {"name": "text", "tex": "x"}}, "has no option 'tex'"),
    }.values():
        with pytest.raises(UserError) as found:
            check_config(SpecialistConfig, base | more, "test")
        assert words in str(found.value) + found.value.why


def test_rejected_and_cut_rows_are_counted(tmp_path, capsys):
    rows = specialist_rows.rows("text", 12)
    rows += [{"text": "", "label": "pos"}, {"text": "long " * 300, "label": "neg"}]
    run = trained(tmp_path, "text", rows, batch={"batch_size": 8, "max_steps": 1})
    out = " ".join("".join(capsys.readouterr()).split())
    assert "13 training rows, 12 held-out rows, 1 rejected" in out
    assert "1 of 13 training texts are longer than 128 tokens" in out
    (reject,) = map(json.loads, (run / "rejected.jsonl").read_text().splitlines())
    assert reject["line"] == 13 and reject["reason"] == "text: empty"


def test_a_training_answer_behind_the_cut_is_rejected(tmp_path):
    rows = specialist_rows.rows("span", 8)
    rows += [{"question": "q?", "context": "word " * 300 + "end", "answer": "end"}]
    run = trained(tmp_path, "span", rows, batch={"batch_size": 8, "max_steps": 1})
    (reject,) = map(json.loads, (run / "rejected.jsonl").read_text().splitlines())
    assert reject["reason"].startswith("answer: beyond the tokens") and reject["line"] == 9


def test_held_out_rows_are_those_of_the_column_split_or_a_fraction(tmp_path):
    rows = specialist_rows.rows("text", 60)
    marked = [row | {"split": "validation" if i % 3 == 0 else "train"} for i, row in enumerate(rows)]
    data = {"train": specialist_rows.write(tmp_path / "a.jsonl", marked)}
    found = stages.specialist.read(specialist_rows.config(tmp_path, "text", [], False, data=data))
    assert (len(found.train), len(found.held_out)) == (40, 20)
    data = {"train": specialist_rows.write(tmp_path / "b.jsonl", rows + rows), "hold_out": 0.25}
    found = stages.specialist.read(specialist_rows.config(tmp_path, "text", [], False, data=data))
    assert len(found.train) + len(found.held_out) == 120 and 14 < len(found.held_out) < 50


def test_csv_and_parquet_rows_are_read_alike(tmp_path):
    import datasets

    rows = specialist_rows.rows("text", 8)
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    files = [str(tmp_path / "a.csv"), str(tmp_path / "a.parquet"), specialist_rows.write(tmp_path / "a.jsonl", rows)]
    read = lambda file: stages.specialist.read(  # noqa: E731
        specialist_rows.config(tmp_path, "text", [], False, data={"train": file})
    )
    first, *others = [[example for example, _, _ in read(file).train] for file in files]
    assert len(first) == 8 and all(other == first for other in others)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "metric", "pipeline"),
    [
        ("text", "accuracy", "text-classification"),
        pytest.param("pair", "accuracy", "text-classification", marks=pytest.mark.slow),
        pytest.param("tags", "entity_f1", "token-classification", marks=pytest.mark.slow),
        pytest.param("span", "exact_match", None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_specialist_learns_and_plain_transformers_loads_it(tmp_path, task, metric, pipeline):
    batch = {"batch_size": 16, "max_steps": 80}
    run = trained(tmp_path, task, specialist_rows.rows(task, 160), batch=batch, optimizer={"lr": 5e-3})
    assert metrics(run)[metric] > 0.8
    assert "local_files_only" not in (run / "model" / "tokenizer_config.json").read_text("utf-8")
    held_out = specialist_rows.rows(task, 12, seed=1)
    if pipeline is None:  # transformers 5 has no pipeline for spans
        model = transformers.AutoModelForQuestionAnswering.from_pretrained(run / "model").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
        row = held_out[0]
        inputs = tokenizer(row["question"], row["context"], return_tensors="pt")
        output = model(**inputs)
        first, last = output.start_logits.argmax(), output.end_logits.argmax()
        assert tokenizer.decode(inputs["input_ids"][0, first : last + 1]).strip() in row["context"]
        return
    use = transformers.pipeline(pipeline, model=str(run / "model"), device="cpu")
    if task == "tags":
        found = use(" ".join(held_out[0]["tokens"]), aggregation_strategy="first")
        assert [one["entity_group"] for one in found][:2] == ["ANIMAL", "PER"]
        return
    texts = [
        row["text"] if task == "text" else {"text": row["premise"], "text_pair": row["hypothesis"]} for row in held_out
    ]
    labels = [use([text])[0]["label"] for text in texts]
    assert sum(a == row["label"] for a, row in zip(labels, held_out)) / 12 == pytest.approx(metrics(run)[metric])


@pytest.mark.parametrize("task", ["text", "tags", "span"])
@pytest.mark.parametrize("tuning", ["lora", {"name": "last-layers", "layers": 1}])
def test_a_part_of_the_weights_is_trained_and_the_result_is_whole(tmp_path, task, tuning):
    run = trained(
        tmp_path, task, specialist_rows.rows(task, 16), tuning=tuning, batch={"batch_size": 8, "max_steps": 3}
    )
    kind = getattr(transformers, HEADS.pick(task)().auto_class)
    model, info = kind.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = transformers.AutoModel.from_pretrained(tiny.bert())
    same = torch.equal(model.bert.encoder.layer[0].output.dense.weight, base.encoder.layer[0].output.dense.weight)
    assert same == (tuning != "lora")


def test_a_stopped_run_continues_bit_for_bit(tmp_path):
    values = {"batch": {"batch_size": 8, "max_steps": 6}, "checkpoints": {"every": 2}, "eval": {"every": 6}}
    rows = specialist_rows.rows("text", 20)
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", "text", rows, **values)
    (tmp_path / "stopped").mkdir()
    config = specialist_rows.config(tmp_path / "stopped", "text", rows, **values)
    with stopped_after(5):
        stages.specialist.run(config)
    from rlhf.runs.lock import unlock

    unlock(tmp_path / "stopped" / "run")
    stages.specialist.run(config, resume=True)
    weights = [folder / "model" / "model.safetensors" for folder in (whole, tmp_path / "stopped" / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


FAMILIES = {
    "roberta": {"max_position_embeddings": 130, "pad_token_id": 0},
    "deberta-v2": {"max_position_embeddings": 128, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {"max_position_embeddings": 128, "local_attention": 8, "global_attn_every_n_layers": 2},
}


@pytest.mark.parametrize("task", ["text", "tags", "span"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_encoders_have_the_heads(tmp_path, family, task):
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        **special | FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    head, model, new, batch, rows = loaded(task, path=str(tmp_path))
    logits = Specialist(model, head)(batch)
    (head.loss(logits, batch) / head.items(batch.targets)).backward()
    parameters = dict(model.named_parameters())
    assert new and all(parameters[name].grad is not None for name in new if name in parameters)
    assert len(head.predictions(logits.detach(), rows)) == len(rows)


def test_a_family_without_the_head_is_refused():
    config = transformers.MambaConfig(vocab_size=320, hidden_size=16)
    folder = Path(tiny.bert()).with_name("mamba-without-head")
    config.save_pretrained(folder)
    head, _ = fitted("tags", specialist_rows.rows("tags", 4))
    with pytest.raises(UserError, match="no TokenClassification head for mamba"):
        load_specialist(ModelConfig(path=str(folder)), str(folder), head, tiny.tokenizer())


def test_commands_for_language_models_refuse_a_specialist(tmp_path):
    run = trained(tmp_path, "text", specialist_rows.rows("text", 8), batch={"batch_size": 8, "max_steps": 1})
    for command in (lambda: open_policy(run), lambda: export(run, tmp_path / "out", EXPORTERS.pick("hf"))):
        with pytest.raises(UserError, match="a specialist gives labels"):
            command()


@pytest.mark.real
@pytest.mark.skipif(not (ukp.SOURCE.is_file() and tiny.STORIES.is_dir()), reason="../shared is not there")
def test_a_small_real_model_tells_real_debates_from_each_other(tmp_path):
    """Four debates with 70 arguments each; a model of 260,000 parameters that was trained on children's stories."""
    debates: dict[str, str] = {}
    with gzip.open(ukp.SOURCE, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            debates |= {row[key]: row["topic"].partition("_")[0] for key in ("chosen", "rejected")}
    largest = [name for name, _ in Counter(debates.values()).most_common(4)]
    rows = [{"text": text, "label": name} for text, name in debates.items() if name in largest]
    data = {"train": specialist_rows.write(tmp_path / "arguments.jsonl", rows), "hold_out": 0.25}
    run = trained(
        tmp_path, "text", [], False, data=data, model={"path": str(tiny.STORIES), "max_length": 128},
        batch={"batch_size": 8, "epochs": 4}, optimizer={"lr": 2e-3},
    )  # fmt: skip
    found = json.loads((run / "specialist_metrics.json").read_text())
    accuracy, commonest = found["metrics"][0], max(row["support"] for row in found["labels"].values())
    assert accuracy["low"] > commonest / accuracy["n"]
