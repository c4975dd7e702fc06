"""Formats of published datasets and tools in which each row is converted by itself.

A row of the table is a function ``(row, *, options) -> Record | Iterable[Record | BadRecord]``: it converts one JSON
object, or raises BadRecord. The trait `read`, ``(path, reject) -> Iterator[Item]``, gives the objects where they
are not the rows of a file. `data_tools.importers` reads the files and makes each of them an importer; its docstring,
options and traits mean there what they mean for any importer. Order and ranks are checked against the dataset's card.
"""

from data_tools.published import arena, lists, named_pairs, potato, prism  # noqa: F401  # the modules add their rows
from data_tools.published.table import PUBLISHED as PUBLISHED
