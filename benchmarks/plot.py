"""Plot the rows that `ppo.py --json FILE` and `scaling.py cost --json FILE` append to a file.

    python benchmarks/plot.py rows.jsonl --out docs/images    # ppo-against-trl.svg, cost.svg if they have rows

The last of several rows with the same name is used. Plots have a white background, so they are readable on any page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6fb3", "#d9822b", "#777777"
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "svg.hashsalt": "benchmarks", "axes.edgecolor": GREY, "savefig.facecolor": "white",
}  # fmt: skip
SIDES = {
    "ours": "ours", "ours-compiled": "ours, compiled", "ours-shared": "ours, one base",
    "ours-shared-last2": "ours, one base,\nlast two layers", "trl-nogc": "TRL, nothing\nrecomputed",
}  # fmt: skip


def ratios(rows: list[dict[str, Any]]) -> Figure:
    """Plot time and memory of each side of `ppo.py` as a ratio to TRL's faster variant, for each length regime.

    All rows use the same number of cores, in one process (`1x2`) or several (`2x1`).
    """
    found = {(row["regime"], row["side"], row["cores"]): row for row in rows}
    best: dict[str, dict[str, Any]] = {}
    for (regime, side, _), row in found.items():
        if side == "trl" and (regime not in best or row["seconds"] < best[regime]["seconds"]):
            best[regime] = row
    pairs = sorted(
        (key for key in found if key[1] != "trl" and key[0] in best),
        key=lambda key: ([*best].index(key[0]), [*SIDES].index(key[1])),
    )
    figure = Figure(figsize=(7.2, 1.2 + 0.75 * len(pairs)), layout="constrained")
    axes = figure.add_subplot()
    for i, pair in enumerate(pairs):
        for shift, name, key, colour in ((-0.18, "time", "seconds", BLUE), (0.18, "peak memory", "peak_mb", ORANGE)):
            ratio = best[pair[0]][key] / found[pair][key]
            axes.barh(i + shift, ratio, 0.34, color=colour, label=name if i == 0 else None)
            axes.annotate(f"{ratio:.2f}x", (ratio, i + shift), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(pairs)), [_label(*pair) for pair in pairs])
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
    axes.margins(x=0.12)
    axes.set(xlabel="times less than TRL 1.12 takes for a PPO update (dotted: the same)", xlim=(0, None))
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _label(regime: str, side: str, cores: str) -> str:
    processes = cores.split("x")[0]
    return f"{SIDES[side]}{'' if processes == '1' else f',{chr(10)}{processes} processes'}\n({regime})"


def costs(rows: list[dict[str, Any]]) -> Figure:
    """Plot time and memory against each size of `scaling.py cost`, as multiples of the smallest size's."""
    found = {(row["axis"], row["size"]): row for row in rows}
    names = list(dict.fromkeys(axis for axis, _ in found))
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(2, 2, place + 1)
        line = [found[key] for key in sorted(found) if key[0] == name]
        sizes, first = [row["size"] for row in line], line[0]
        times = [sum(row["phases"]) / sum(first["phases"]) for row in line]
        labels = place == 0
        axes.plot(
            sizes, [size / sizes[0] for size in sizes], ":", color=GREY, label="in proportion" if labels else None
        )
        axes.plot(sizes, times, "o-", color=BLUE, label="processor time" if labels else None)
        memory = [row["mb"] / first["mb"] for row in line]
        axes.plot(sizes, memory, "s-", color=ORANGE, label="peak memory" if labels else None)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set(title=name)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


FIGURES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], Figure]]] = {
    "ppo": ("ppo-against-trl.svg", ratios),
    "scaling": ("cost.svg", costs),
}
"""Benchmark -> file name and plot function."""


def main() -> None:
    """Draw every plot that there are rows for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="Files of rows.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    rows = [json.loads(line) for file in args.rows for line in file.read_text("utf-8").splitlines()]
    for benchmark, (name, draw) in FIGURES.items():
        mine = [row for row in rows if row["benchmark"] == benchmark]
        if mine:
            with matplotlib.rc_context(STYLE):
                draw(mine).savefig(args.out / name, metadata={"Date": None})
            print(args.out / name)


if __name__ == "__main__":
    main()
