"""`rlhf data check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from data_tools.check.metrics import METRICS
from data_tools.check.page import write_page
from data_tools.check.report import check
from data_tools.check.show import show, show_rules
from data_tools.commands.common import DatasetPath, Json
from rlhf.core import console
from rlhf.core.files import check_writable
from rlhf.core.lazy_group import command_app
from rlhf.data.store import open_dataset

METRICS_HELP = "\b\nMetrics (fractions from 0 to 1):\n" + "\n".join(f"  {row.name}: {row.summary}" for row in METRICS)


def check_command(
    path: DatasetPath,
    *,
    against: list[Path] | None = None,
    html: Path | None = None,
    no_near: bool = False,
    model: str | None = None,
    fail_on: list[str] | None = None,
    as_json: Json = False,
) -> None:
    """Measure duplicates, leaks, contradictions, biases, agreement and annotators, with intervals and a verdict.

    Args:
        against (EVALSET): A dataset whose prompts must not be in this one; may be repeated.
        html (PAGE): Write a page with plots and examples.
        no_near: Skip the (slow) search for near-duplicates.
        model (RUN|MODEL): Also find the records that this model's chat template refuses.
        fail_on (RULE): Exit with status 1 if this holds of a metric: 'agreement<0.6', 'random-annotators>0'; may be
            repeated.
    """
    check_writable(html, "--html")
    report = check(path, against=against or (), near=not no_near, fail_on=fail_on or ())
    show(report)
    found = _against_template(path, model) if model else {}
    if html is not None:
        write_page(report, html)
        console.say(f"page: {html}")
    else:
        console.say("--html PAGE writes this with plots and examples")
    show_rules(report)
    if as_json:
        console.print_json(report.as_dict() | found)
    if report.fired:
        raise typer.Exit(1)


def _against_template(path: Path, model: str) -> dict[str, Any]:
    """Print which records the model's chat template refuses; returns them as plain JSON."""
    from rlhf.data.row_check import row_check  # slow: it loads the tokenizer

    check = row_check(model)
    check.add(open_dataset(path).records(), str(path))
    console.say(f"chat template of {model}: {check.describe()}")
    return {"chat_template": check.as_dict()}


app = command_app(check_command)
app.registered_commands[0].epilog = METRICS_HELP
