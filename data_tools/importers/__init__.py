"""Importers: one row of the table turns one format into the schema.

An importer is a function ``(path, reject, *, options) -> Iterator[Record]`` of one file. It streams: a file may be
larger than memory. Whatever cannot be used goes to `reject` as a `Reject` with its line, and never raises; the reason
is the same words for every such row. A record is one ranking or demonstration that a person made or could have made:
each gives one record or one reject. Keyword-only parameters are options of ``rlhf data import --option NAME=VALUE``;
their annotations are what values are checked against.

The docstring's first line is the format's description, and it states what the format's order or numbers mean as ranks
(1 = best), and whether the candidates are in the order in which the annotator saw them. Traits:

- `suffixes`: which files of a folder belong to the format.
- `sample`: the text of a short file of the format, as `rlhf data formats` shows it; it imports without a reject.
- `detect`: ``(Head) -> str | None``: why a file that begins so is of this format, as the end of the sentence "it is
  ... because ...", or None if it is not. No file is detected by two formats.
"""

from data_tools.importers import (  # noqa: F401  # the modules add their rows
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
from data_tools.importers.table import IMPORTERS as IMPORTERS
from data_tools.importers.table import importer_of
from data_tools.published import PUBLISHED

for _row in PUBLISHED:
    _traits = {name: value for name, value in _row.traits.items() if name not in ("left_out", "read")}
    IMPORTERS.row(_row.name, **_traits)(
        importer_of(_row.fn, **{name: value for name, value in _row.traits.items() if name not in _traits})
    )
