"""What does `rlhf data next` gain over random choice with an ensemble of trained reward models? In the demo's world.

    rlhf demo --out runs/demo
    python benchmarks/next_trained.py --seeds 0 1 2 3 4 5 --json next-trained.jsonl
    python benchmarks/next_trained.py --world demo-skewed --seeds 0 1 2 3 4 5 --json next-trained.jsonl
    python benchmarks/next_trained.py --report next-trained.jsonl

Each seed ranks 100 random proposals. Three reward models, each from the demo's SFT policy and random three quarters of
these rankings, are the ensemble with which `rlhf data next --reward` chooses 100 more out of 400; the baseline takes
random ones with random answers. Two reward models then learn from all 200, by the same stage and settings; their
accuracy is against the hidden rule, on pairs of other requests. 4 of 6 answers are ranked, by the demo's annotators
with their noise. `demo-skewed`: three quarters of the proposals are about three of the 20 animals; what is tested is
about all of them. A minute or two of processor time a seed. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from guard import reward_model  # noqa: E402
from next import Demo, interval, random_choice  # noqa: E402

from data_tools.annotate.choose_next import ChosenProposal, RankingTime, choices, choose  # noqa: E402
from rlhf.data.schema import Proposal, Ranking  # noqa: E402
from rlhf.data.store import open_dataset  # noqa: E402
from rlhf.data.writer import DatasetWriter  # noqa: E402

START, STEP, POOL, HELD_OUT, K = 100, 100, 500, 150, 4
MEMBERS, JUDGED = 3, 2
COMMON, RARE_EACH = 3, 9
"""Animals that three quarters of a skewed pool are about, and its proposals about each of the others."""
Picked = list[tuple[Proposal, Proposal]]
"""Whole proposals, each with the answers of it that are ranked."""


class World(Demo):
    """The demo's world with a pool of `POOL` proposals, of which the first `START` are ranked at random."""

    def __init__(self, seed: int, skewed: bool) -> None:
        from data_tools.demo_world.rules import ANIMALS, read_request
        from data_tools.demo_world.text import prompts

        self.rng = random.Random(f"trained {seed}")
        count = 4 * POOL if skewed else POOL
        asked = prompts({"train": count, "test": HELD_OUT}, self.rng)
        pool = asked[:count]
        if skewed:
            order = self.rng.sample(sorted(ANIMALS), len(ANIMALS))
            of = {animal: [one for one in pool if read_request(one).animal == animal] for animal in order}
            rare = [one for animal in order[COMMON:] for one in of[animal][:RARE_EACH]]
            common = [one for animal in order[:COMMON] for one in of[animal]]
            pool = self.rng.sample(rare + common, min(POOL, len(rare) + len(common)))
        self.pool = [self._answered(prompt) for prompt in pool]
        self.held_out = [self._answered(prompt) for prompt in asked[count:]]

    def accuracy(self, run: Path) -> float:
        """Of a reward model, on the pairs of held-out answers that the hidden rule orders."""
        from data_tools.demo_world.rules import judge
        from rlhf.inference.reward_model import open_reward_model

        right: list[float] = []
        for one, scores in zip(self.held_out, open_reward_model(str(run), False).raw_scores(self.held_out)):
            points = np.array([judge(one, candidate.text).points for candidate in one.candidates])
            gap = np.subtract.outer(np.array(scores), np.array(scores))[np.subtract.outer(points, points) > 0]
            right += ((gap > 0) + (gap == 0) / 2).tolist()
        return statistics.fmean(right)


def train(demo: Path, folder: Path, rankings: Sequence[Ranking], seed: int) -> Path:
    """A reward model from these rankings, by the stage `reward`, which also wants some to hold out."""
    if not (folder / "rankings" / "manifest.json").is_file():
        prompts = {one.prompt_id for one in rankings}
        others = open_dataset(demo / "data" / "rankings", "ranking").records("eval")
        held_out = [one for one in others if one.prompt_id not in prompts][:20]
        with DatasetWriter(folder / "rankings", "ranking", {"made_by": "next_trained.py"}, overwrite=True) as writer:
            for ranking in (*rankings, *held_out):
                writer.write(ranking)
    return reward_model(demo, folder / "reward", folder / "rankings", len(rankings), seed)


def ensemble_scores(members: Sequence[Path], proposals: Sequence[Proposal]) -> list[np.ndarray]:
    """(members, answers) raw scores of each proposal."""
    from rlhf.inference.reward_model import open_reward_model

    columns = [open_reward_model(str(run), False).raw_scores(proposals) for run in members]
    return [np.array(rows) for rows in zip(*columns)]


def by_random(left: Sequence[Proposal], scores: Sequence[np.ndarray], ranked: Sequence[Ranking], seed: int) -> Picked:
    """Random proposals with random answers."""
    return random_choice(left, STEP, K, random.Random(f"random {seed}"))


def by_next(left: Sequence[Proposal], scores: Sequence[np.ndarray], ranked: Sequence[Ranking], seed: int) -> Picked:
    """What `rlhf data next --per ranking` chooses."""
    found = choices(left, scores, K, RankingTime())
    return _picked(found, left, choose(found, STEP, ranked, per_second=False))


def _picked(found: Sequence[ChosenProposal], left: Sequence[Proposal], chosen: Sequence[ChosenProposal]) -> Picked:
    whole = {one.proposal.id: proposal for one, proposal in zip(found, left)}
    return [(whole[one.proposal.id], one.proposal) for one in chosen]


WAYS: dict[str, Callable[..., Picked]] = {"random": by_random, "next": by_next}


def run(demo: Path, out: Path, world: str, seed: int, ways: Sequence[str]) -> list[dict[str, Any]]:
    """The accuracies at `START` rankings and, for each way, at `STEP` more."""
    data, folder = World(seed, world == "demo-skewed"), out / f"{world}-{seed}"
    start, left = data.pool[:START], data.pool[START:]
    first = [data.rank(shown) for _, shown in random_choice(start, START, K, random.Random(f"start {seed}"))]
    members = [
        train(demo, folder / f"member-{i}", random.Random(f"{seed} part {i}").sample(first, 3 * START // 4), i)
        for i in range(MEMBERS)
    ]
    scores = ensemble_scores(members, left)

    def row(way: str, rankings: Sequence[Ranking]) -> dict[str, Any]:
        name = f"{way}-{len(rankings)}"
        found = [data.accuracy(train(demo, folder / f"{name}-{i}", rankings, 100 + i)) for i in range(JUDGED)]
        return {"world": world, "seed": seed, "way": way, "rankings": len(rankings), "accuracy": found}

    rows = [row("random", first)] if "random" in ways else []
    for way in ways:
        data.rng = random.Random(f"annotators {seed}")  # the same noise for every way
        rows.append(row(way, [*first, *(data.rank(shown) for _, shown in WAYS[way](left, scores, first, seed))]))
    return rows


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table: accuracy, and its difference to random choice with as many rankings, in points."""
    print("| data | way | rankings | seeds | accuracy, % | points over 100 rankings | points over random |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    at = {(r["world"], r["way"], r["rankings"], r["seed"]): 100 * statistics.fmean(r["accuracy"]) for r in rows}
    for world, way, rankings in dict.fromkeys(key[:3] for key in at):
        mine = {seed: value for (*key, seed), value in at.items() if key == [world, way, rankings]}
        cells = [world, way, str(rankings), str(len(mine)), f"{statistics.fmean(mine.values()):.1f}"]
        for other in ("random", START), ("random", rankings):
            gains = [v - at[world, *other, s] for s, v in mine.items() if (world, *other, s) in at]
            same = other == (way, rankings)
            cells.append("" if same or len(gains) < 2 else interval(gains))
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="A finished demo.")
    parser.add_argument("--out", type=Path, default=Path("runs/next-trained"), help="Where runs go.")
    parser.add_argument("--world", choices=("demo", "demo-skewed"), default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if options.report:
        report([json.loads(line) for line in options.report.read_text("utf-8").splitlines()])
        return
    import torch

    torch.set_num_threads(1)
    for seed in options.seeds:
        rows = run(options.demo, options.out, options.world, seed, options.ways)
        with options.json.open("a") if options.json else sys.stdout as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
