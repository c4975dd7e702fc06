"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import markupsafe

from rlhf.comparison.show import amount
from rlhf.core.page import render_page
from rlhf.core.plot import COLOURS
from rlhf.doctor.run_checks import planned_steps
from rlhf.evaluation.tables import percent
from rlhf.report import answers, facts
from rlhf.report.charts import Chart, stage_charts
from rlhf.report.evaluated import evaluations, policy_evaluations
from rlhf.report.facts import DataFacts
from rlhf.report.frontier import frontier
from rlhf.report.gather import STAGE_NAMES, RunRecord, Subject, short_names
from rlhf.report.guarded import guarded
from rlhf.report.headline import gain, headline
from rlhf.report.updates import newest_update

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SCRIPT = Path(__file__).with_name("report.js")
REPORT_STYLE = Path(__file__).with_name("report.css")


def render(subjects: Sequence[Subject], data: Sequence[DataFacts] = (), refresh: int | None = None) -> str:
    """The page's HTML.

    Args:
        subjects: One, or several to compare.
        data: The datasets that they were trained on.
        refresh: Seconds after which an open page loads itself again; None for a page that is a file.
    """
    return render_page(
        TEMPLATE,
        clean=facts.without_secrets,
        subjects=subjects,
        parts=[_part(subject) for subject in subjects],
        title=" and ".join(subject.name for subject in subjects),
        headlines=[headline(subject) for subject in subjects],
        tiles=[_tiles(subject) for subject in subjects],
        stages=_stages(subjects),
        frontier=frontier(subjects),
        data=data,
        updates=[None if (run := subject.of("ppo")) is None else newest_update(run) for subject in subjects],
        comparison=_comparison(subjects),
        differences=_differences(subjects),
        colours=COLOURS,
        facts=facts,
        amount=amount,
        percent=percent,
        planned=planned_steps,
        report_style=markupsafe.Markup(REPORT_STYLE.read_text("utf-8")),
        evaluated=[
            [] if (run := subject.of("reward")) is None else evaluations(run, f"evaluated{number}")
            for number, subject in enumerate(subjects)
        ],
        policies=[
            [] if (run := subject.of("ppo", "dpo", "sft")) is None else policy_evaluations(run, f"policy{number}")
            for number, subject in enumerate(subjects)
        ],
        guards=[guarded(subject, number) for number, subject in enumerate(subjects)],
        script=markupsafe.Markup(SCRIPT.read_text("utf-8")),
        policy=policy(live=refresh is not None),
        refresh=refresh,
        json=json,
        Markup=markupsafe.Markup,
    )


def policy(live: bool) -> str:
    """The page's content security policy: its own script and styles, nothing from elsewhere, no forms.

    A page that is served while a run goes on may ask the server that it came from for itself.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.read_text("utf-8").encode()).digest()).decode()
    parts = ["default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'", "base-uri 'none'",
             "form-action 'none'", *(["connect-src 'self'"] if live else [])]  # fmt: skip
    return "; ".join(parts)


def _part(subject: Subject) -> dict[str, Any]:
    """The answers of a subject's PPO run."""
    run = subject.of("ppo")
    found = (answers.before_and_after(run), answers.best_and_worst(run)) if run is not None else [([], [])] * 2
    return {"subject": subject} | dict(zip(("pairs", "extremes"), found))


def _tiles(subject: Subject) -> list[tuple[str, str, str]]:
    """Name, value and note of the numbers at the top of the page."""
    tiles, ppo, reward = [], subject.of("ppo"), subject.of("reward")
    found = gain(ppo) if ppo is not None else None
    if found is not None:
        tiles.append(("Score, held out", f"{found.before:.2f} → {found.after:.2f}", f"{found.prompts:,} prompts"))
        low, high = found.win_interval
        tiles.append(("Scored higher than before", percent(found.win_rate), f"{percent(low)} to {percent(high)}"))
    if ppo is not None and len(kl := ppo.evidence["eval/kl"]):
        tiles.append(("KL to the reference", f"{kl.values[-1]:.2f}", "nats per answer"))
    if reward is not None and isinstance(accuracy := reward.held_out.get("accuracy"), float):
        low, high = reward.held_out.get("accuracy_interval") or (accuracy, accuracy)
        tiles.append(("Reward model right", percent(accuracy), f"{percent(low)} to {percent(high)}"))
    costs = [facts.cost(run) for run in subject.runs]
    seconds, tokens = sum(one.seconds * one.processes for one in costs), sum(one.tokens for one in costs)
    if seconds:
        tiles.append(("Training time", facts.duration(seconds), f"{amount(tokens)} tokens"))
    return tiles


def _stages(subjects: Sequence[Subject]) -> list[tuple[str, list[Chart]]]:
    """Stage -> its charts, with all subjects' runs of it."""
    found = []
    for stage, title in STAGE_NAMES.items():
        found_runs = [(subject, run) for subject in subjects for run in subject.runs if run.stage == stage]
        short = short_names([run.path for _, run in found_runs])
        runs = [
            (subject.name if len(subjects) > 1 else name, run) for name, (subject, run) in zip(short, found_runs)
        ]  # fmt: skip
        if runs:
            levels = _levels([run for _, run in runs])
            charts = stage_charts(stage, [(name, run.evidence) for name, run in runs], levels)
            if charts:
                found.append((title, charts))
    return found


def _levels(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Dotted lines: the accuracy that annotators allow, where all runs have the same."""
    ceilings = {run.held_out.get("ceiling") for run in runs}
    known = ceilings.pop() if len(ceilings) == 1 else None
    return {"Held-out pairwise accuracy": known} if isinstance(known, float) else {}


def _comparison(subjects: Sequence[Subject]) -> list[tuple[str, list[str]]]:
    """Headline metric -> its value in each subject."""
    if len(subjects) < 2:
        return []
    rows = [facts.results(subject) for subject in subjects]
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, [row.get(name, "-") for row in rows]) for name in names]


def _differences(subjects: Sequence[Subject]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Stage -> the config keys in which the subjects' runs differ, `-` for a subject without a run of the stage."""
    found = []
    for stage, title in STAGE_NAMES.items():
        runs = [subject.of(stage) for subject in subjects]
        rows = facts.differences([run.evidence.config for run in runs if run])
        if rows:
            values = [(key, iter(row)) for key, row in rows]
            found.append((title, [(key, [next(row) if run else "-" for run in runs]) for key, row in values]))
    return found
