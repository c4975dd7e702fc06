"""Specialists: a head of transformers for one labelled task, on an encoder such as BERT, or another family.

labelled rows (JSON, CSV, Parquet) -> examples -> token rows -> batches -> loss -> best weights -> metrics -> model
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets as hf_datasets
import torch
import transformers
from torch import Tensor

from data_tools.importers.run import find_files
from data_tools.reading.csv_rows import CSV, csv_rows
from data_tools.reading.rows import JSON, rows
from data_tools.tasks.rows import parse_split
from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.config.load import load_stage_config
from rlhf.core.console import format_number, is_main, say, table, warn
from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.data.jsonl import Reject
from rlhf.data.manifest import file_hash
from rlhf.data.schema import BadRecord
from rlhf.models.load import load_hf_config, quiet, sequence_limit
from rlhf.runs.parents import parent_facts, resolve_model_path
from rlhf.runs.run import Run, finish, open_run
from rlhf.specialist.config import LabelledData, SpecialistConfig
from rlhf.specialist.head import Batch, Head, LabelledRow
from rlhf.specialist.model import Specialist, load_specialist, load_text_tokenizer, train_new_weights
from rlhf.training.engine import Engine
from rlhf.training.loop import Loop, Objective, supervised_engine
from rlhf.tuning.methods import say_trainable
from rlhf.tuning.shards import save_weights


def run(config: SpecialistConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train, measure on the held-out rows, and leave the result in the run folder's model/."""
    distributed.start(config.timeout_seconds, config.deepspeed is not None)
    quiet()
    path = resolve_model_path(config.model.path)
    # 1. rows, with the labels that the training rows have; tokenizer, run folder, token rows
    data = read(config)
    head = data.head
    tokenizer = load_text_tokenizer(config.model, path, head)
    limit = sequence_limit(config.model, load_hf_config(config.model, path))
    facts = {"parents": [parent_facts(config.model.path)], "data": data.facts, "labels": list(head.labels)}
    folder = open_run(config, "specialist", resume, overwrite, facts)
    train, held_out = (
        encode(head, tokenizer, part, limit, what)
        for part, what in ((data.train, "training"), (data.held_out, "held-out"))
    )
    folder.log("rejected.jsonl", [vars(one) for one in [*data.rejects, *train.rejects, *held_out.rejects]])
    if not train.rows:
        raise UserError("data.train: no row is left to train on", f"See {folder.path}/rejected.jsonl.")
    # 2. the model and its trained weights; the seed gives all ranks the same new head
    transformers.set_seed(config.seed)
    model, new = load_specialist(config.model, path, head, tokenizer)
    model = config.tuning(model, None, head.tuning_task)
    train_new_weights(model, new)
    say_trainable(config.tuning, model)
    # 3. training
    engine = supervised_engine(config, Specialist(model, head))
    objective = SpecialistObjective(config, head, tokenizer, held_out)
    loop = Loop(config, folder, engine, objective, hf_datasets.Dataset.from_list(train.rows), bool(held_out.rows))
    loop.fit(resume)
    # 4. the result: the weights of the best checkpoint, and their metrics
    metrics = report(folder, head, held_out, objective.predict(engine)[0], loop.best_step) if held_out.rows else {}
    save(folder.path / "model", model, tokenizer)
    finish(folder, step=loop.best_step, metrics=metrics)


# ---- data ----------------------------------------------------------------------------------------------------------


def check_rows(file: Path, overrides: Sequence[str]) -> None:
    """Read the rows of a config file, as `--dry-run` does.

    Raises:
        UserError: See `read`.
    """
    read(load_stage_config(SpecialistConfig, file, overrides))


Placed = tuple[LabelledRow, str, int]
"""An example with its file and line."""


@dataclass(frozen=True)
class Labelled:
    """The labelled rows of a run."""

    head: Head
    """The head, with the labels of the training rows."""
    train: list[Placed]
    held_out: list[Placed]
    rejects: list[Reject]
    facts: list[dict[str, Any]]
    """What run.json records about the files."""


def read(config: SpecialistConfig) -> Labelled:
    """Read the labelled rows of a config and print what was found.

    Raises:
        UserError: A file cannot be read, there is nothing to train on, fewer than two labels, a held-out label is new,
            or a held-out text is also in the training rows.
    """
    head: Head = config.task()
    data, rejects = config.data, []
    files = {key: find_files(paths, (*CSV, *JSON)) for key, paths in (("train", data.train), ("eval", data.eval))}
    train, held_out = (list(_examples(head, files[key], rejects)) for key in ("train", "eval"))
    if files["eval"]:
        train = _of_split(train, None, "train")
    else:
        train, held_out = _divide(train, data, config.seed)
    for reject in rejects[:3]:
        warn(f"{reject}")
    say(
        f"Data: {len(train):,} training rows, {len(held_out):,} held-out rows, {len(rejects):,} rejected"
        + (": see rejected.jsonl" if rejects else "")
    )
    if not train:
        why = f"{len(rejects):,} rows were rejected, the first: {rejects[0]}" if rejects else "There are no rows."
        raise UserError("data.train: no usable row", why, "Name the columns in the options of `task`.")
    _check_apart(train, held_out)
    fitted = head.fitted(*([example for example, _, _ in part] for part in (train, held_out)))
    if fitted.labels:
        say(f"Labels: {', '.join(fitted.labels[:20])}{' ...' if len(fitted.labels) > 20 else ''}")
    if not held_out:
        warn("no row is held out, so nothing is measured; set data.eval, data.hold_out or a column `split`")
    paths = dict.fromkeys([*files["train"], *files["eval"]])
    facts = [{"path": str(file), "kind": "labelled rows", "fingerprint": file_hash(file)} for file in paths]
    return Labelled(fitted, train, held_out, rejects, facts)


def _of_split(examples: list[Placed], *splits: str | None) -> list[Placed]:
    return [one for one in examples if one[0].split in splits]


def _examples(head: Head, files: Sequence[Path], rejects: list[Reject]) -> Iterator[Placed]:
    for file in files:
        reader = csv_rows if file.name.endswith(CSV) else rows
        for item in reader(file, rejects.append):
            try:
                if not isinstance(item.value, dict):
                    raise BadRecord("not an object", type(item.value).__name__)
                split = parse_split(str(item.value.get("split") or ""))
                yield replace(head.example(item.value), split=split), str(file), item.line
            except BadRecord as fault:
                rejects.append(Reject.of(file, item.line, fault, item.raw))


def _divide(found: list[Placed], data: LabelledData, seed: int) -> tuple[list[Placed], list[Placed]]:
    """Training and held-out examples of the same files: by their column `split`, else by a hash of their inputs."""
    if any(example.split for example, _, _ in found):
        if data.hold_out:
            raise UserError("data.hold_out: leave it out; the rows have a column `split` that says what is held out")
        return _of_split(found, None, "train"), _of_split(found, "eval")
    held = [one for one in found if _share(one[0], seed) < data.hold_out]
    return [one for one in found if _share(one[0], seed) >= data.hold_out], held


def _share(example: LabelledRow, seed: int) -> float:
    """A number from 0 to 1 that depends only on the inputs and the seed."""
    digest = hashlib.sha256(repr((seed, example.inputs)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _check_apart(train: Sequence[Any], held_out: Sequence[Any]) -> None:
    """Refuse held-out texts that are trained on as well."""
    seen = {repr(example.inputs) for example, _, _ in train}
    both = [(file, line) for example, file, line in held_out if repr(example.inputs) in seen]
    if both:
        file, line = both[0]
        raise UserError(
            f"data: {len(both):,} held-out rows have the text of a training row, the first at {file}:{line}",
            "Metrics on them would not measure performance on new texts.",
            "Remove them from one of the two.",
        )


@dataclass(frozen=True)
class Encoded:
    """Token rows, with their examples in the same order."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    examples: list[LabelledRow] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def cut(self) -> int:
        """Texts of which the model reads only the start."""
        return sum(row["cut"] for row in self.rows)


def encode(head: Head, tokenizer: Any, part: Sequence[Any], limit: int, what: str) -> Encoded:
    """Token rows of examples. Training rows whose answer is truncated are rejected."""
    found = Encoded()
    for example, file, line in part:
        try:
            row = head.encode(tokenizer, example, limit)
            if what == "training" and row["target"] == [-1, -1]:
                raise BadRecord("answer: beyond the tokens that the model can read", f"of {limit} tokens")
            found.rows.append(row)
            found.examples.append(example)
        except BadRecord as fault:
            found.rejects.append(Reject.of(Path(file), line, fault, repr(example.inputs)[:1000]))
    if found.cut:
        of = f"{found.cut:,} of {len(found.rows):,} {what} texts"
        warn(f"{of} are longer than {limit} tokens; the model reads their start")
    if found.rejects:
        warn(f"{len(found.rejects):,} {what} rows rejected, the first: {found.rejects[0]}")
    return found


# ---- training ------------------------------------------------------------------------------------------------------


class SpecialistObjective(Objective[Batch]):
    """The cross-entropy of labels, tags, or first and last tokens of spans; with metrics on the held-out rows."""

    def __init__(self, config: SpecialistConfig, head: Head, tokenizer: Any, held_out: Encoded) -> None:
        self.config, self.head, self.tokenizer, self.held_out = config, head, tokenizer, held_out

    def batch(self, rows: list[dict[str, Any]]) -> Batch:
        return self.head.batch(self.tokenizer, rows, distributed.device())

    def items(self, batch: Batch) -> Tensor:
        return self.head.items(batch.targets)

    def tokens(self, batch: Batch) -> Tensor:
        return batch.inputs["attention_mask"].sum()

    def loss(self, engine: Engine, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        return self.head.loss(engine.forward(batch), batch), []

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        predictions, loss = self.predict(engine)
        measured = self.head.metrics(self.held_out.examples, predictions)
        return {"loss": loss} | {one.metric: one.value for one in measured}

    @torch.no_grad()
    def predict(self, engine: Engine) -> tuple[list[Any], float]:
        """Predictions for the held-out rows, and their mean loss. Every rank computes all of them."""
        rows = self.held_out.rows
        order = sorted(range(len(rows)), key=lambda index: rows[index]["length"])
        found: dict[int, Any] = {}
        total = count = 0.0
        size = self.config.batch.micro_batch_size
        for start in range(0, len(order), size):
            part = order[start : start + size]
            batch = self.batch([rows[index] for index in part])
            logits = engine.forward(batch)
            total += float(self.head.loss(logits, batch))
            count += float(self.items(batch))
            found |= zip(part, self.head.predictions(logits, [rows[index] for index in part]))
        return [found[index] for index in range(len(rows))], total / max(count, 1e-9)


# ---- the result ----------------------------------------------------------------------------------------------------


def report(run: Run, head: Head, held_out: Encoded, predictions: list[Any], step: int) -> dict[str, float]:
    """Show the held-out metrics and write them to specialist_metrics.json; returns those for run.json."""
    measured = head.metrics(held_out.examples, predictions)
    by_label = head.by_label(held_out.examples, predictions)
    bounds = lambda one: "" if one.low is None else f"{one.low:.3f} to {one.high:.3f}"  # noqa: E731
    lines = [(one.metric, f"{one.value:.3f}", bounds(one), one.n) for one in measured]
    table("Held-out rows", ("metric", "value", "95% interval", "rows"), lines)
    if by_label:
        names = ("precision", "recall", "f1-score", "support")
        lines = [(label, *(format_number(row[name]) for name in names)) for label, row in by_label.items()]
        table("By label", ("label", "precision", "recall", "F1", "number"), lines)
    if is_main():
        found = {"step": step, "metrics": [one.as_dict() for one in measured], "labels": by_label, "cut": held_out.cut}
        write_json(run.path / "specialist_metrics.json", found)
    return {one.metric: one.value for one in measured}


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save the model with merged adapters, and its tokenizer, so that transformers loads them. Every rank calls it."""
    save_weights(folder, model)
    if is_main():
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main("specialist")
