"""Import: files of one format -> one dataset, with every row accounted for."""

from __future__ import annotations

import gc
import glob
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from data_tools.importers import IMPORTERS
from data_tools.importers.table import AUTO, detect
from data_tools.io.rejects import FILE_NAME, Rejects, by_count, print_reasons
from data_tools.reading.turns import from_json_text
from data_tools.statistics.accumulator import Accumulator
from data_tools.statistics.agreement import AgreementObserver
from rlhf.core import console
from rlhf.core.command_line import command_line
from rlhf.core.errors import UserError, nearest
from rlhf.core.limits import read_yaml
from rlhf.core.table import Pick
from rlhf.data.columns import as_record
from rlhf.data.jsonl import Reject
from rlhf.data.manifest import file_hash
from rlhf.data.schema import SPLITS, BadRecord
from rlhf.data.writer import DatasetWriter, check_new

OPTIONS_FILE = "import.yaml"
"""In the dataset folder: the options of its import, as `--options` reads them."""


@dataclass(frozen=True)
class ImportSummary:
    """The counts of an import: `read` = `written` + `rejected`."""

    out: Path
    kind: str | None
    """None where nothing was written."""
    read: int
    written: int
    rejected: int
    reasons: dict[str, int]
    """Rejected rows by reason, most frequent first."""
    first: dict[str, Reject]
    """The first row of each reason."""

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("read", "written", "rejected", "reasons")}
        return {"out": str(self.out), "kind": self.kind, **counts}

    def show(self) -> None:
        """Print the table of reasons and the sum."""
        print_reasons(self.reasons, self.first)
        line = f"read {self.read:,} = written {self.written:,} + rejected {self.rejected:,}"
        if self.kind is not None:
            where = f"; rejected rows: {self.out / FILE_NAME}" if self.rejected else ""
            line += f" -> {self.out} ({self.kind}s){where}"
        console.say(line)


class NothingUsable(UserError):
    """No row could be used, and nothing was written; `summary` has the reasons."""

    def __init__(self, summary: ImportSummary) -> None:
        self.summary = summary
        first = next(iter(summary.first.values()), None)
        why = f"First: {first}" if first else "The files hold no row."
        remedy = first.remedy if first else ""
        super().__init__(f"{summary.out}: not written: none of {summary.read:,} rows could be used", why, remedy)


@contextmanager
def unusable_shown(as_json: bool) -> Iterator[None]:
    """Within this context, the summary of an import of which no row could be used is shown before its error."""
    try:
        yield
    except NothingUsable as error:
        error.summary.show()
        if as_json:
            console.print_json(error.summary.as_dict())
        raise


def import_dataset(
    importer: str,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    split: str | None = None,
    source: str | None = None,
    strict: bool = False,
    ignored_fields: Collection[str] = (),
    overwrite: bool = False,
    gathered: Accumulator | None = None,
) -> ImportSummary:
    """Import files of one format into a dataset folder, streaming.

    Rows that cannot be used are counted by reason and kept in `rejected.jsonl` in the folder. Where no row can be
    used, nothing is written, and an existing dataset stays. The same files and options give the same bytes.

    Args:
        importer: A row of `IMPORTERS`, or `auto` to recognise it from the files.
        paths: Files (gzip allowed), folders (all files of the format's suffixes in them) and glob patterns.
        out: The dataset folder to make.
        options: Options of the importer, checked against its signature.
        split: Put every record in this split (train, eval or test), whatever the files say.
        source: Give every record this source, whatever the files say.
        strict: Raise at the first row that cannot be used, and write nothing.
        ignored_fields: Fields of rows that need not be read, although they could hold a prompt, an answer or the like.
        overwrite: Replace a dataset of that name.
        gathered: Takes the records while they are written, for the brief check.

    Raises:
        NothingUsable: Not one row could be used.
        UserError: An unknown importer or split, no such file, an empty or damaged file, files of different kinds, an
            `out` that is there already, or a bad row under `strict`.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"--split-name: no split is called {split!r}", remedy=nearest(split, SPLITS))
    check_new(out, overwrite)
    pick, files = _choose(importer, paths, options or {})
    changes = {name: value for name, value in (("split", split), ("source", source)) if value is not None}

    def fill(writer: DatasetWriter, rejects: Rejects) -> None:
        if options:
            header = f"# rlhf data import {pick.name} FILES --options {OPTIONS_FILE} --out DATASET\n"
            text = header + yaml.safe_dump(dict(options), allow_unicode=True, sort_keys=False)
            (writer.partial / OPTIONS_FILE).write_text(text, "utf-8")
        with _no_collector():
            _write(writer, pick, files, rejects, changes)

    observer = AgreementObserver(gathered or Accumulator(brief=False))
    writer = DatasetWriter(out, None, {"importer": pick.name}, observer, overwrite)
    return write_import(writer, files, fill, strict, ignored_fields)


def write_import(
    writer: DatasetWriter,
    files: Sequence[Path],
    fill: Callable[[DatasetWriter, Rejects], None],
    strict: bool,
    ignored_fields: Collection[str] = (),
) -> ImportSummary:
    """Write a dataset that is made of the rows of files.

    Args:
        files: What it is made of, for its manifest.
        fill: Writes the records, and gives rows that cannot be used to the rejects.

    Raises:
        NothingUsable: Not one row could be used; then nothing is written.
    """
    writer.origin["command"] = command_line()
    writer.origin["files"] = [{"path": str(file), "sha256": file_hash(file)} for file in files]
    with writer, Rejects(writer.partial / FILE_NAME, strict, ignored_fields) as rejects:
        fill(writer, rejects)
        counts = {"read": writer.count + rejects.count, "written": writer.count, "rejected": rejects.count}
        reasons = by_count(rejects.reasons)
        summary = ImportSummary(writer.path, writer.kind, **counts, reasons=reasons, first=rejects.first)
        if not writer.count:
            raise NothingUsable(summary)
        writer.origin |= {**counts, "reasons": reasons}
    return summary


def _choose(importer: str, paths: Sequence[str | Path], options: Mapping[str, Any]) -> tuple[Pick, list[Path]]:
    """The importer with its options, and the files that it is to read."""
    try:
        if importer != AUTO:
            pick = IMPORTERS.pick({**options, "name": importer})
            return pick, find_files(paths, pick.row.traits["suffixes"])
        files = find_files(paths, tuple({suffix for row in IMPORTERS for suffix in row.traits["suffixes"]}))
        name, why = detect(files)
        console.say(f"auto: {name}, because {why}")
        return IMPORTERS.pick({**options, "name": name}), files
    except ValueError as error:
        raise UserError(str(error), remedy="`rlhf data formats` lists the formats, with FORMAT its options.") from None


def read_options(file: Path | None, pairs: Sequence[str]) -> dict[str, Any]:
    """Options from a YAML file and from NAME=VALUE words, which take precedence. JSON lists and objects are parsed.

    Raises:
        UserError: The file is not a YAML mapping of names, or a word has no equals sign.
    """
    options: dict[str, Any] = {}
    if file is not None:
        try:
            options = read_yaml(file) or {}
        except (OSError, ValueError) as error:
            raise UserError(f"--options {file}: {error}") from None
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise UserError(f"--options {file}: not a mapping of option: value")
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--option {pair}: not NAME=VALUE", remedy="Write, for instance, --option prompt=Question")
        options[name.strip()] = from_json_text(value)  # other text in braces, such as a template, stays text
    return options


@contextmanager
def _no_collector() -> Iterator[None]:
    """Switch off the cyclic garbage collector: records have no cycles, and scanning them takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _write(writer: DatasetWriter, read: Any, files: list[Path], reject: Rejects, changes: dict[str, Any]) -> None:
    for file in files:
        with console.progress(f"importing {file.name}", None, "rows") as advance:
            records = iter(read(file, reject))
            while chunk := list(islice(records, writer.table_rows)):
                try:
                    writer.write_all([replace(as_record(made), **changes) for made in chunk] if changes else chunk)
                except BadRecord as fault:
                    remedy = "Import each kind to its own --out."
                    raise UserError(f"{file}: {fault}", "A dataset holds one kind of record.", remedy) from None
                advance(len(chunk))


def find_files(paths: Sequence[str | Path], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that the paths name, in a fixed order, each once.

    A folder means all files in it, at any depth, whose names end in one of the suffixes and do not begin with a
    dot; what names no file is taken as a glob pattern (``**`` for any depth).

    Raises:
        UserError: No such file, an empty file, or a folder that is a dataset.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            matches = _in_folder(path, suffixes)
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not matches:
            wanted = f"A file ending in {' or '.join(suffixes)} is looked for in a folder." if path.is_dir() else ""
            raise UserError(f"{path}: no file there", wanted, "Check the path; put a glob pattern in quotes.")
        found |= dict.fromkeys(matches)
    for file in found:
        if not file.stat().st_size:
            raise UserError(f"{file}: empty", "It may be a broken download.", "Fetch it again, or leave it out.")
    return list(found)


def _in_folder(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder}: is a dataset already", remedy="Use it as it is, or name the files to import.")
    saved = {file.parent for file in folder.rglob("state.json") if (file.parent / "dataset_info.json").exists()}
    names = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in names if file.name.endswith(suffixes) and not _is_of_save_to_disk(file, saved))


def _is_of_save_to_disk(file: Path, saved: Collection[Path]) -> bool:
    """Whether a file next to the rows in a folder that `Dataset.save_to_disk` wrote holds none of its rows."""
    if file.name == "dataset_dict.json":
        return any(folder.parent == file.parent for folder in saved)
    return file.parent in saved and (file.suffix == ".json" or file.name.startswith("cache-"))
