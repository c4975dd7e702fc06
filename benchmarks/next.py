"""What does `rlhf data next` gain per hundred rankings over rankings of random choice?

    python benchmarks/next.py --world demo --json next.jsonl
    python benchmarks/next.py --world ukp --json next.jsonl
    python benchmarks/next.py --world ukp-skewed --json next.jsonl
    python benchmarks/next.py --report next.jsonl

Each seed ranks 50 random proposals, then twice 50 more: random ones with K random answers, or those that `rlhf data
next` chooses, by information per second or per ranking. A bag-of-words reward model learns from all so far; its
accuracy is measured on pairs of other prompts. `demo`: requests of the demo's world with 6 answers of its writers, 4 to
rank, by its annotators with their noise; accuracy is against the hidden rule. `ukp`: UKPConvArg1, arguments that people
compared, 3 of up to 6 to rank; 10 of the 32 topics, drawn by the seed, are held out; `ukp-skewed`: three
quarters of the proposals are on four of the topics, three on each of the others. Half a processor minute each.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from data_tools.annotate import word_ensemble  # noqa: E402
from data_tools.annotate.choose_next import RankingTime, choices, choose  # noqa: E402
from rlhf.data.schema import Candidate, Message, Proposal, Ranking  # noqa: E402

START, STEP, STEPS, POOL, HELD_OUT, MEMBERS = 50, 50, 2, 400, 300, 8
WAYS = ("random", "second", "ranking")
K = {"demo": 4, "ukp": 3, "ukp-skewed": 3}


class Demo:
    """Requests of the demo's world with answers of its writers, ranked by its annotators."""

    def __init__(self, seed: int) -> None:
        from data_tools.demo_world.text import prompts

        self.rng = random.Random(f"demo {seed}")
        asked = prompts({"train": POOL, "test": HELD_OUT}, self.rng)
        made = [self._answered(prompt) for prompt in asked]
        self.pool, self.held_out = made[:POOL], made[POOL:]

    def _answered(self, prompt: Any) -> Proposal:
        from data_tools.demo_world.rules import read_request
        from data_tools.demo_world.text import WRITERS, write

        texts: dict[str, None] = {}
        while len(texts) < 6:
            texts[write(self.rng.choice(WRITERS), read_request(prompt), self.rng)] = None
        return Proposal(prompt.messages, candidates=tuple(map(Candidate, texts)))

    def rank(self, proposal: Proposal) -> Ranking:
        from data_tools.demo_world.rules import ANNOTATORS, rank

        return rank(self.rng.choice(ANNOTATORS), proposal, proposal.candidates, self.rng)

    def test_pairs(self) -> list[tuple[str, str]]:
        from data_tools.demo_world.rules import judge

        found = []
        for one in self.held_out:
            points = [(judge(one, c.text).points, c.text) for c in one.candidates]
            found += [(a, b) for (x, a), (y, b) in itertools.permutations(points, 2) if x > y]
        return found


class Ukp:
    """Arguments on 22 topics, ranked as people judged them; the pairs of 10 other topics to test on."""

    def __init__(self, seed: int, skewed: bool = False) -> None:
        from ukp import SOURCE, rebuild_rankings

        rng = random.Random(f"ukp {seed}")
        topics: dict[str, list[dict[str, str]]] = {}
        with gzip.open(SOURCE, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                topics.setdefault(row["topic"], []).append(row)
        order = sorted(topics)
        rng.shuffle(order)
        self.tested = [(row["chosen"], row["rejected"]) for topic in order[:10] for row in topics[topic]]
        made: list[tuple[Proposal, dict[str, int]]] = []
        for number, topic in enumerate(order[10:]):
            rows, before = topics[topic], len(made)
            for texts in rebuild_rankings([(row["chosen"], row["rejected"]) for row in rows]):
                if len(texts) >= 3:
                    shown = rng.sample(texts, len(texts))
                    one = Proposal((Message("user", rows[0]["prompt"]),), candidates=tuple(map(Candidate, shown)))
                    made.append((one, {text: place for place, text in enumerate(texts)}))
            if skewed and number >= 4:
                del made[before + 3 :]
        made = rng.sample(made, min(POOL, len(made)))
        self.pool, self.places = [one for one, _ in made], [places for _, places in made]

    def rank(self, proposal: Proposal) -> Ranking:
        shown = {candidate.text for candidate in proposal.candidates}
        places = next(places for places in self.places if shown <= places.keys())
        order = sorted(shown, key=places.__getitem__)
        ranks = tuple(order.index(candidate.text) + 1 for candidate in proposal.candidates)
        return Ranking(proposal.messages, candidates=proposal.candidates, ranks=ranks)

    def test_pairs(self) -> list[tuple[str, str]]:
        return self.tested


def random_choice(pool: Sequence[Proposal], count: int, k: int, rng: random.Random) -> list[tuple[Proposal, Proposal]]:
    """Random proposals, each with what is ranked of it: k random answers."""
    found = []
    for one in rng.sample(pool, count):
        chosen = sorted(rng.sample(range(len(one.candidates)), min(k, len(one.candidates))))
        found.append((one, Proposal(one.messages, candidates=tuple(one.candidates[i] for i in chosen))))
    return found


def run(world: str, seed: int) -> list[dict[str, Any]]:
    """Accuracy and seconds of reading after each step, for each way."""
    data, k, cost = (
        {"demo": Demo, "ukp": Ukp, "ukp-skewed": partial(Ukp, skewed=True)}[world](seed),
        K[world],
        RankingTime(),
    )
    better, worse = zip(*data.test_pairs())
    tested = word_ensemble.hashed(better) - word_ensemble.hashed(worse)
    start = random_choice(data.pool, START, k, random.Random(f"start {seed}"))
    first = [data.rank(shown) for _, shown in start]
    rows = []
    for way in WAYS:
        used, ranked, rng = [one for one, _ in start], list(first), random.Random(f"{way} {seed}")
        for step in range(STEPS + 1):
            pairs = word_ensemble.WordPairs(ranked, seed)
            weights = word_ensemble.weights(pairs, np.ones(len(pairs.prompt)), np.zeros(word_ensemble.FEATURES))
            logit = tested @ weights
            accuracy = float(np.mean((logit > 0) + (logit == 0) / 2))
            seconds = sum(map(cost.seconds, ranked))
            rows.append({"world": world, "seed": seed, "way": way, "rankings": len(ranked), "accuracy": accuracy,
                         "seconds": seconds})  # fmt: skip
            if step == STEPS:
                break
            gone = {one.id for one in used}
            left = [one for one in data.pool if one.id not in gone]
            if way == "random":
                new = random_choice(left, STEP, k, rng)
            else:
                members = word_ensemble.train(ranked, MEMBERS, seed)
                scores = word_ensemble.scores([[c.text for c in one.candidates] for one in left], members)
                found = choices(left, scores, k, cost)
                whole = {one.proposal.id: proposal for one, proposal in zip(found, left)}
                chosen = choose(found, STEP, ranked, way == "second")
                new = [(whole[one.proposal.id], one.proposal) for one in chosen]
            used += [one for one, _ in new]
            ranked += [data.rank(shown) for _, shown in new]
    return rows


def interval(values: Sequence[float]) -> str:
    """Mean with its 95 % t interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    mean = statistics.fmean(values)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table: accuracy, its gain over random choice in points, minutes of reading."""
    print(
        "| data | way | rankings | accuracy, % | points over random | minutes |\n| --- | --- | --- | --- | --- | --- |"
    )
    at = {(row["world"], row["way"], row["rankings"], row["seed"]): row for row in rows}
    for world, way, rankings in dict.fromkeys(key[:3] for key in at):
        if rankings == START and way != "random":
            continue
        mine = {seed: row for (*key, seed), row in at.items() if key == [world, way, rankings]}
        gains = [
            100 * (row["accuracy"] - at[world, "random", rankings, seed]["accuracy"]) for seed, row in mine.items()
        ]
        accuracy = 100 * statistics.fmean(row["accuracy"] for row in mine.values())
        minutes = statistics.fmean(row["seconds"] for row in mine.values()) / 60
        gain = "" if way == "random" else interval(gains)
        print(f"| {world} | {way} | {rankings} | {accuracy:.1f} | {gain} | {minutes:.0f} |")
    print(f"{len({row['seed'] for row in rows})} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=K)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(12)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    for seed in options.seeds if options.world else ():
        rows = run(options.world, seed)
        with options.json.open("a") if options.json else sys.stdout as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    if options.report:
        report([json.loads(line) for line in options.report.read_text().splitlines()])


if __name__ == "__main__":
    main()
