"""The page docs/formats.md, written from the table of importers: ``python -m data_tools.commands.import_docs``."""

from __future__ import annotations

import inspect
import re
from typing import get_origin

from data_tools.importers import IMPORTERS
from data_tools.reading.csv_rows import CSV
from data_tools.reading.rows import JSON
from rlhf.core.table import TableRow

HEAD = """# Formats, and what their ranks mean

This page lists every format that `rlhf data import FORMAT FILES --out DATASET` reads, and what its ranks mean. With
`auto` in place of FORMAT the command recognises the format by the first rows, and says why. `rlhf data formats` prints
this list, and `rlhf data formats FORMAT` everything about one format. The page is generated from the importers by
`python -m data_tools.commands.import_docs > docs/formats.md`; a test keeps it current.

In the schema rank 1 is the best, and equal ranks are a tie. Formats have different conventions, and to confuse two of
them reverses what is learned:

- 0 is the best reply in OpenAssistant, and the worst rating in HelpSteer.
- 0 means the first summary in summarize-from-feedback, the second answer in SHP, and neither in PandaLM.
- In Label Studio and Argilla 2 the position in the list is the rank; in Argilla 1 it is a number next to the item.
- A negative preference means the first response in HelpSteer3. In ratings, as in UltraFeedback, higher is better.

After an import, look at a record whose winner you know. `rlhf data check` also says how often the longer answer and the
answer shown first win; with reversed ranks these fractions are reversed too.

Files can be plain, gzipped or compressed with zstd, whatever their names: JSON lines, JSON arrays of any size (they are
streamed), concatenated JSON values, Parquet, and Arrow as `save_to_disk` writes it. A folder means all files in it with
the suffixes of the format. Where no format fits, [csv](#csv) reads rows of any of these containers, and of CSV, TSV and
Excel, by the names of their fields; `auto` types the command out for your file. A field that is null is absent.
Put glob patterns in quotes. Give options with `--option NAME=VALUE`, or in a YAML file with `--options`; they are
stored as `import.yaml` in the dataset's folder, so that you can repeat the import.
"""


def page() -> str:
    """The whole page as Markdown."""
    rows = sorted(IMPORTERS, key=lambda row: row.name)
    listed = ["| format | ranks |", "| --- | --- |"]
    listed += [f"| [{row.name}](#{row.name}) | {_ranks(row)} |" for row in rows]
    return "\n\n".join([HEAD.rstrip(), "\n".join(listed), *(_section(row) for row in rows)]) + "\n"


def _text(row: TableRow) -> str:
    return inspect.getdoc(row.fn) or ""


def _ranks(row: TableRow) -> str:
    """The sentence on ranks, for the table."""
    found = re.search(r"\bRanks: (.*?)(?:[.;](?=\s)|\n\n|\n- |\Z)", _text(row), re.DOTALL)
    return " ".join(found[1].split()).replace("|", "\\|") if found else "none: demonstrations or prompts"


def _section(row: TableRow) -> str:
    text = _text(row).replace("``", "`")
    text = re.sub(r"^( +)(?=\S)", "", text, flags=re.MULTILINE)
    parts = [f"## {row.name}", text]
    fields = row.options.model_fields
    if fields:
        options = ["| option | type | default |", "| --- | --- | --- |"]
        for name, field in fields.items():
            kind = field.annotation
            type_name = str(kind).replace("typing.", "") if get_origin(kind) else getattr(kind, "__name__", str(kind))
            default = "required" if field.is_required() else f"`{field.default!r}`"
            options.append(f"| `{name}` | {type_name.replace(' | ', ' or ')} | {default} |")
        parts.append("\n".join(options))
    suffixes = row.traits["suffixes"]
    known = {JSON: "those of JSON and Parquet", JSON + CSV: "those of JSON, Parquet, CSV and TSV"}
    named = known.get(suffixes) or ", ".join(f"`{suffix}`" for suffix in suffixes)
    parts.append(f"Files of a folder: {named}.")
    parts.append(f"```text\n{row.traits['sample'].strip()}\n```")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
