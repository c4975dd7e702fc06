"""`rlhf data ...`: a table of commands, each imported when it is called.

With --json the last line printed is one JSON object.
"""

from __future__ import annotations

from rlhf.core.lazy_group import command_group

HELP = "Turn what you have into datasets of the schema."
COMMANDS = {
    "import": ("data_tools.commands.imports:import_command", "Import files of one format into a dataset."),
    "formats": ("data_tools.commands.imports:formats_command", "List the formats that `import` reads, or show one."),
    "tasks": ("data_tools.commands.tasks:tasks_command", "Turn labelled rows into demonstrations through templates."),
    "families": ("data_tools.commands.tasks:families_command", "List the families of tasks that have templates."),
    "validate": ("data_tools.commands.prepare:validate_command", "Check every row, stored id and shard of a dataset."),
    "filter": ("data_tools.commands.prepare:filter_command", "Keep the records that match an expression."),
    "dedup": ("data_tools.commands.prepare:dedup_command", "Keep one record of each group of duplicates."),
    "split": ("data_tools.commands.prepare:split_command", "Put every record into a split, by prompt."),
    "mix": ("data_tools.commands.prepare:mix_command", "Sample several datasets into one, by weights and caps."),
    "lineage": ("data_tools.commands.prepare:lineage_command", "Show what a dataset was made from."),
    "stats": ("data_tools.commands.prepare:stats_command", "Count what datasets hold."),
    "check": ("data_tools.commands.check:app", "Measure duplicates, leaks, biases and agreement, with intervals."),
    "annotators": (
        "data_tools.commands.annotators:annotators_command",
        "Measure what each annotator's rankings do to a reward model.",
    ),
    "rank": ("data_tools.commands.rank:rank_command", "Rank proposals at the terminal or in a browser."),
    "aggregate": ("data_tools.commands.aggregate:aggregate_command", "Merge several annotators' rankings into one."),
    "label-studio": ("data_tools.commands.label_studio:app", "Push proposals to Label Studio, pull the rankings."),
}
"""Command -> where it is, and its line in `rlhf data --help`."""
app = command_group("data", HELP, COMMANDS)
