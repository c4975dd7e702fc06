"""`rlhf data ...`. With --json the last line printed is one JSON object."""

from __future__ import annotations

import typer

from data_tools.commands import aggregate, check, imports, label_studio, prepare, rank, tasks

app = typer.Typer(name="data", help="Turn what you have into datasets of the schema.", no_args_is_help=True)

app.command("import")(imports.import_command)
app.command("formats")(imports.formats_command)
app.command("tasks")(tasks.tasks_command)
app.command("families")(tasks.families_command)
app.command("validate")(prepare.validate_command)
app.command("filter")(prepare.filter_command)
app.command("dedup")(prepare.dedup_command)
app.command("split")(prepare.split_command)
app.command("mix")(prepare.mix_command)
app.command("lineage")(prepare.lineage_command)
app.command("stats")(prepare.stats_command)
app.command("check", epilog=check.METRICS_HELP)(check.check_command)
app.command("rank")(rank.rank_command)
app.command("aggregate")(aggregate.aggregate_command)
app.add_typer(label_studio.app)
