"""Importers: one row of the table turns one format into the schema.

`row_format` makes an importer of a function that converts one JSON object; `file_format` takes a whole importer, a
function ``(path, reject, *, options) -> Iterator[Record]`` of one file. It streams: a file may be larger than memory.
Whatever cannot be used goes to `reject` as a `Reject` with its line, and never raises; the reason is the same words for
every such row. A record is one ranking or demonstration that a person made or could have made: each gives one record or
one reject. Keyword-only parameters are options of ``rlhf data import --option NAME=VALUE``; their annotations are what
values are checked against.

The docstring's first line is the format's description, and it states what the format's order or numbers mean as ranks
(1 = best), and whether the candidates are in the order in which the annotator saw them. Traits:

- `suffixes`: which files of a folder belong to the format.
- `sample`: the text of a short file of the format, as `rlhf data formats` shows it; it imports without a reject. It is
  kept as `data_tools/published/samples/NAME.*`.
- `detect`: ``(FileHead) -> str | None``: why a file that begins so is of this format, as the end of the sentence "it is
  ... because ...", or None if it is not. No file is detected by two formats.
"""

from data_tools import published  # noqa: F401  # its modules add their rows, and so do these
from data_tools.importers import (  # noqa: F401
    argilla,
    comparisons,
    csv_mapping,
    demonstrations,
    judges,
    label_studio,
    openassistant,
    pairs,
    prodigy,
    rated,
    schema_records,
)
from data_tools.published.table import IMPORTERS as IMPORTERS
