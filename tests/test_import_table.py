"""What every row of the table of importers promises, whatever its format."""

from __future__ import annotations

import gzip
import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from imports import AUTHENTIC, DATA, EXPORTS
from rows import jsonl, tree

from data_tools.importers import IMPORTERS
from data_tools.importers.run import NothingUsable, import_dataset
from data_tools.importers.table import read_head
from data_tools.io.rejects import Rejects
from data_tools.reading.unread import HOLDS
from rlhf.core.errors import UserError
from rlhf.data.jsonl import from_dict, open_bytes, to_dict
from rlhf.data.store import open_dataset

UNKNOWN = [EXPORTS / "summarize_from_feedback" / "axis_eval.json"]
"""Files that hold no ranking and no demonstration of any format."""


def sample_file(row, folder, name="sample"):
    """The row's sample as a file whose name ends as the format's do."""
    path = folder / f"{name}{row.traits['suffixes'][0]}"
    path.write_text(row.traits["sample"], "utf-8", newline="")
    return path


def imported(row, path, out, **options):
    """The summary of an import with the options that the row's sample needs."""
    return import_dataset(
        row.name, [path], out, options=row.traits.get("sample_options", {}), **options, overwrite=True
    )


def detected(path):
    """The names of the formats that recognise the file, and why."""
    head = read_head(path)
    return {row.name: why for row in IMPORTERS if (why := row.traits["detect"](head))}


@pytest.mark.parametrize("row", IMPORTERS, ids=lambda row: row.name)
class TestEveryImporter:
    def test_its_docstring_says_what_the_format_is_and_how_it_ranks(self, row):
        assert row.summary.endswith(".")
        assert len(row.summary) <= 120
        assert "rank" in " ".join((row.fn.__doc__ or "").split()).lower()
        assert all(suffix.startswith(".") for suffix in row.traits["suffixes"])

    def test_its_sample_imports_without_a_reject(self, row, tmp_path):
        summary = imported(row, sample_file(row, tmp_path), tmp_path / "d", strict=True)
        assert summary.written == summary.read >= 1
        records = list(open_dataset(tmp_path / "d", verify=True).records())
        assert all(from_dict(to_dict(record)) == record for record in records)
        if summary.kind == "ranking":
            doc = " ".join(row.fn.__doc__.split())
            assert any(word in doc for word in ("Ranks:", "ranks", "rank 1", "Ranks")), (
                "how do its labels become ranks?"
            )
            assert any(1 in record.ranks for record in records)

    def test_it_alone_recognises_its_sample(self, row, tmp_path):
        found = detected(sample_file(row, tmp_path))
        assert list(found) == [row.name]
        assert not found[row.name].endswith("."), "the end of a sentence that goes on"

    def test_it_says_which_options_it_needs(self, row, tmp_path):
        required = [name for name, field in row.options.model_fields.items() if field.is_required()]
        if required:
            with pytest.raises(UserError, match=required[0]):
                import_dataset(row.name, [sample_file(row, tmp_path)], tmp_path / "d")
        with pytest.raises(UserError, match="has no option 'no_such_option'"):
            import_dataset(
                row.name, [sample_file(row, tmp_path)], tmp_path / "d", options={"no_such_option": 1}, overwrite=True
            )

    def test_the_same_input_gives_the_same_bytes(self, row, tmp_path):
        path = sample_file(row, tmp_path)
        for name in "ab":
            imported(row, path, tmp_path / name)
        assert tree(tmp_path / "a") == tree(tmp_path / "b")

    def test_gzip_gives_the_same_records(self, row, tmp_path):
        plain = sample_file(row, tmp_path)
        zipped = tmp_path / f"{plain.name}.gz"
        zipped.write_bytes(gzip.compress(plain.read_bytes()))
        assert detected(zipped).keys() == {row.name}
        for name, file in (("a", plain), ("b", zipped)):
            imported(row, file, tmp_path / name)
        assert open_dataset(tmp_path / "a").fingerprint == open_dataset(tmp_path / "b").fingerprint


@pytest.mark.parametrize(
    "row", [row for row in IMPORTERS if row.traits["suffixes"][0] == ".jsonl"], ids=lambda row: row.name
)
class TestEveryImporterOfJSONLines:
    def test_bad_rows_after_good_ones_are_rejected_with_line_and_remedy(self, row, tmp_path):
        good = sample_file(row, tmp_path, "good")
        values = [json.dumps(value) for value in _values(good)]
        path = tmp_path / "in.jsonl"
        path.write_text("\n".join([*values, "null", "{}", '{"cut": ']), "utf-8")
        clean, summary = imported(row, good, tmp_path / "a"), imported(row, path, tmp_path / "b")
        assert (summary.written, summary.rejected) == (clean.written, 3)
        assert summary.read == summary.written + summary.rejected == summary.written + sum(summary.reasons.values())
        rejected = [json.loads(line) for line in (tmp_path / "b" / "rejected.jsonl").read_text("utf-8").splitlines()]
        assert [item["line"] for item in rejected] == [len(values) + i for i in (1, 2, 3)]
        assert all(item["file"] == str(path) and item["reason"] and item["remedy"] for item in rejected)
        assert [item["raw"] for item in rejected] == ["null", "{}", '{"cut": ']
        with pytest.raises(UserError, match=rf"in\.jsonl:{len(values) + 1}: "):
            imported(row, path, tmp_path / "c", strict=True)
        assert not (tmp_path / "c").exists()

    def test_a_file_of_something_else_is_reported_row_by_row(self, row, tmp_path):
        awkward = [
            None,
            1,
            "x",
            [],
            {},
            [[]],
            [{}, {}],
            {"chosen": None},
            {"messages": {}},
            {"candidates": {}},
            {"data": 1},
        ]
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in awkward), "utf-8")
        with pytest.raises(NothingUsable) as caught:
            imported(row, path, tmp_path / "d")
        summary = caught.value.summary
        assert summary.rejected == summary.read == len(awkward)
        assert not (tmp_path / "d").exists()

    def test_parquet_gives_the_same_records(self, row, tmp_path):
        plain = sample_file(row, tmp_path)
        table = pa.Table.from_pylist(_values(plain))
        pq.write_table(table, tmp_path / "in.parquet")
        assert detected(tmp_path / "in.parquet").keys() == {row.name}
        for name, file in (("a", plain), ("b", tmp_path / "in.parquet")):
            imported(row, file, tmp_path / name)
        assert open_dataset(tmp_path / "a").fingerprint == open_dataset(tmp_path / "b").fingerprint


UNREAD = {
    "prompt": ("second_question", "And what else?"),
    "system turn": ("other_system_prompt", "Speak like a pirate."),
    "answer": ("third_response", "Neither of them."),
    "judgement": ("expert_preference", 1),
    "media": ("image", "pear.png"),
}
"""Role -> a field that no format has, and its value."""
WHOLE_ROWS = {"openassistant", "label-studio", "argilla"}
"""Formats whose rows hold records, which have the fields."""


@pytest.mark.parametrize(
    "row",
    [row for row in IMPORTERS if row.traits["suffixes"][0] == ".jsonl" and row.name not in WHOLE_ROWS],
    ids=lambda row: row.name,
)
def test_no_importer_loses_a_field_that_could_matter(row, tmp_path):
    values = _values(sample_file(row, tmp_path))
    importer = IMPORTERS.pick({"name": row.name, **row.traits.get("sample_options", {})})

    def reasons(ignored=(), **more):
        path = jsonl(tmp_path / "in.jsonl", [{**value, **more} for value in values])
        with Rejects(tmp_path / "rejected.jsonl", ignored_fields=ignored) as rejects:
            records = list(importer(path, rejects))
        assert bool(records) != bool(rejects.reasons)
        return list(rejects.reasons)

    for role, (name, value) in UNREAD.items():
        assert reasons(**{name: value}) == [f"{name}: not read, and by its name it could hold {HOLDS[role]}"]
        assert reasons([name], **{name: value}) == []
        assert reasons(**{name: "", f"{name}_source": "a"}) == []


def _values(path):
    text = path.read_text("utf-8").strip()
    try:
        value = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line]
    return value if isinstance(value, list) else [value]


@pytest.mark.skipif(not DATA.exists(), reason="../shared is absent")
@pytest.mark.parametrize("name", AUTHENTIC)
def test_it_alone_recognises_its_authentic_files_and_can_use_them(name, tmp_path):
    for i, file in enumerate(AUTHENTIC[name]):
        assert list(detected(file)) == [name], file
        if file.stat().st_size > 500_000:  # a part is enough to see that it is read
            with open_bytes(file) as lines:
                file = tmp_path / f"{i}-{file.name.removesuffix('.gz')}"
                file.write_bytes(b"".join(islice(lines, 200)))
        summary = import_dataset(name, [file], tmp_path / f"d{i}")
        assert summary.written > summary.rejected
        assert summary.read == summary.written + summary.rejected


@pytest.mark.skipif(not DATA.exists(), reason="../shared is absent")
@pytest.mark.parametrize("file", UNKNOWN, ids=lambda file: file.name)
def test_ratings_of_one_answer_are_of_no_format(file):
    assert detected(file) == {}
