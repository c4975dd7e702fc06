"""Importers: one row of the table turns one format into the schema.

An importer is a function ``(path, reject) -> Iterator[Record]`` of one file. It streams: a file may be larger than
memory. Whatever cannot be used goes to `reject` as a `Reject` with its line, and never raises; the reason is the same
words for every such row. The trait `suffixes` says which files of a folder belong to the format. The docstring's
first line is the format's description, and it states what the format's order or numbers mean as ranks (1 = best).
"""

from data_tools.importers import own, pairs  # noqa: F401  # the modules add their rows
from data_tools.importers.rows import IMPORTERS as IMPORTERS
