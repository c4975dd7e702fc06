"""Formats of published datasets and tools in which each row is converted by itself.

`row_format` makes a row of the table `IMPORTERS` of each; `data_tools.importers` says what its docstring, options and
traits mean. Order and ranks are checked against the dataset's card.
"""

from data_tools.published import arena, orders, potato, prism  # noqa: F401  # the modules add their rows
