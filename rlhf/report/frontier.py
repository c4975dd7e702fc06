"""Score against KL: the updates and evaluations of PPO runs, and best-of-n at the KL that it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf.core.plot import COLOURS
from rlhf.report.charts import WIDTH, Chart, ChartLine, draw, thinned
from rlhf.report.gather import RunRecord, Subject


def frontier(subjects: Sequence[Subject]) -> Chart | None:
    """The held-out evaluations joined in their order, the updates as dots, and best-of-n where `rlhf sample --curve`
    has written it into the run folder; None without two points."""
    lines, about = [], []
    for number, subject in enumerate(subjects):
        run = subject.of("ppo")
        if run is None:
            continue
        alone = len(subjects) == 1
        colour = COLOURS[(2 * number if alone else number) % len(COLOURS)]
        other = COLOURS[1] if alone else colour
        prefix = "" if alone else f"{subject.name}, "
        lines += _run_lines(run, prefix, colour, other)
        if (found := best_of(run)) is not None:
            points = found["best_of"]
            kls, scores = [point["kl"] for point in points], [point["score"] for point in points]
            lines.append(ChartLine(f"{prefix}best of n", kls, scores, COLOURS[2] if alone else colour, dots=True))
            about.append(
                f"{prefix or 'Best of n: '}n from {points[0]['n']} to {points[-1]['n']} answers of {found['policy']} to"
                f" {found['prompts']} prompts by {found['reward']}, at log n - (n - 1) / n nats."
            )
    if not lines:
        return None
    first = "Each point is one evaluation or update. Steep is good: more score for less distance from the reference."
    across = "KL to the reference, nats per answer"
    wide, narrow = (
        draw(name, "Score against KL", " ".join([first, *about]), lines, across, upward="score", width=width)
        for name, width in (("frontier", 6), ("frontier-narrow", WIDTH))
    )
    return replace(wide, narrow=narrow)


def _run_lines(run: RunRecord, prefix: str, colour: str, other: str) -> list[ChartLine]:
    lines = []
    for group, word, hue, joined in (("objective", "updates", other, False), ("eval", "held out", colour, True)):
        kl, score = run.evidence[f"{group}/kl"], run.evidence[f"{group}/scores"]
        scores = dict(zip(score.steps, score.values))
        pairs = [(x, scores[step]) for step, x in zip(kl.steps, kl.values) if step in scores]
        if len(pairs) > 1:
            xs, ys = ([x for x, _ in pairs], [y for _, y in pairs]) if joined else thinned(sorted(pairs))
            lines.append(ChartLine(prefix + word, xs, ys, hue, dots=True, joined=joined))
    return lines


def best_of(run: RunRecord) -> dict[str, Any] | None:
    """The newest best-of-n curve by name that lies in a run's folder; None without one."""
    return next((curve for one in reversed(run.results.values()) if (curve := _curve(one)) is not None), None)


def _curve(found: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        numbers = [(int(one["n"]), float(one["kl"]), float(one["score"])) for one in found["best_of"]]
        facts = {name: str(found[name]) for name in ("policy", "reward", "prompts")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # another file
    if len(numbers) < 2 or not all(math.isfinite(number) for point in numbers for number in point):
        return None
    return {"best_of": [dict(zip(("n", "kl", "score"), point)) for point in numbers], **facts}
