"""The datasets of the experiments with real pretrained models (see benchmarks/real_models.py), from `../shared/data`.

    python benchmarks/real_data.py ../shared/data --out datasets/real

- `ukp`: human judgements which of two arguments convinces more (UKPConvArg1), as rankings; 22 topics to train on, 4
  `eval`, 6 `test`.
- `rankings` and `judge`: short human rankings of three kinds: arguments (UKPConvArg1), answers to harmful requests
  (HH harmless) and to questions (OpenAssistant). No prompt and no topic is in both, so a judge trained on the second
  has seen nothing of what the reward model was trained on.
- `demonstrations`: for SFT: the best candidates of `rankings`, OpenAssistant and self-instruct's seed tasks.
- `prompts`: for PPO: the prompts of `rankings` as `train`; as `eval` prompts that are in no other dataset.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from ukp import rebuild_rankings, write_ukp  # noqa: E402

from rlhf.data.schema import Candidate, Demonstration, Message, Ranking  # noqa: E402
from rlhf.data.writer import DatasetWriter  # noqa: E402

LONGEST_PROMPT, LONGEST_ANSWER = 300, 600
"""Characters. Longer texts are left out: they make a run on a CPU long."""


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def arguments(data: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Source, group, prompt and answers, best first, of every ranking that follows."""
    topics: dict[str, list[dict[str, str]]] = {}
    for row in rows(data / "preferences/ukpconvarg1_strict_pairs.jsonl.gz"):
        topics.setdefault(row["topic"], []).append(row)
    for topic, found in sorted(topics.items()):
        for texts in rebuild_rankings((row["chosen"], row["rejected"]) for row in found):
            yield "UKPConvArg1", topic, found[0]["prompt"], texts


def harmless(data: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Pairs of one turn: a request and two answers."""
    for row in rows(data / "preferences/hh_harmless_base_test.jsonl.gz"):
        (start, better), (other, worse) = (row[key].rsplit("\n\nAssistant:", 1) for key in ("chosen", "rejected"))
        if start == other and start.count("\n\nHuman:") == 1:
            prompt = start.removeprefix("\n\nHuman:").strip()
            yield "HH harmless", prompt, prompt, [better.strip(), worse.strip()]


def questions(data: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """First turns of OpenAssistant conversations."""
    for row in rows(data / "preferences/oasst1_en_validation_ranked.jsonl"):
        if len(row["prompt"]) == 1:
            texts = [each["text"] for each in sorted(row["candidates"], key=lambda each: each["rank"])]
            yield "OpenAssistant", row["message_tree_id"], row["prompt"][0]["content"], texts


def fits(prompt: str, answers: list[str]) -> bool:
    """Whether prompt and answers are short enough, and no answer is in two places."""
    short = 0 < len(prompt) <= LONGEST_PROMPT and all(0 < len(text) <= LONGEST_ANSWER for text in answers)
    return short and len(set(answers)) == len(answers)


def instructions(data: Path) -> Iterator[tuple[str, str]]:
    for row in rows(data / "instructions/self_instruct_seed_tasks.jsonl"):
        yield "\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]
    for row in rows(data / "instructions/oasst1_en_validation_sft.jsonl"):
        first, second = row["messages"][:2]
        yield first["content"], second["content"]


def main() -> None:
    """Write the datasets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="The folder `shared/data`.")
    parser.add_argument("--out", type=Path, default=Path("datasets/real"))
    args = parser.parse_args()
    write_ukp(args.out / "ukp")
    found = [each for part in (arguments, harmless, questions) for each in part(args.data) if fits(each[2], each[3])]
    groups = sorted({(source, group) for source, group, *_ in found})
    random.Random(0).shuffle(groups)
    share = dict.fromkeys(groups[::5], "prompts")  # a fifth is for evaluation alone; the rest is divided in two
    share |= dict.fromkeys(groups[1::5] + groups[3::5], "judge")
    share |= dict.fromkeys(groups[2::5] + groups[4::5], "rankings")
    held_out = set(groups[1::20] + groups[2::20])  # a tenth of either half, for choosing a checkpoint
    writers = {name: DatasetWriter(args.out / name, "ranking", overwrite=True) for name in ("rankings", "judge")}
    prompts = DatasetWriter(args.out / "prompts", "demonstration", overwrite=True)
    demonstrations = DatasetWriter(args.out / "demonstrations", "demonstration", overwrite=True)
    seen: set[str] = set()
    with writers["rankings"], writers["judge"], prompts, demonstrations:
        for source, group, prompt, texts in found:
            turns, kind = (Message("user", prompt),), share[source, group]
            if kind != "prompts":
                candidates = tuple(Candidate(text, author_kind="person") for text in texts)
                writers[kind].write(
                    Ranking(
                        turns, source=source, group=group, split="eval" if (source, group) in held_out else "train",
                        candidates=candidates, ranks=tuple(range(1, len(texts) + 1)),
                    )
                )  # fmt: skip
            if kind != "judge" and prompt not in seen:
                split = "eval" if kind == "prompts" else "train"
                prompts.write(Demonstration(turns, answer=texts[0], source=source, group=group, split=split))
            if kind == "rankings" and (prompt not in seen or source == "UKPConvArg1"):
                demonstrations.write(Demonstration(turns, answer=texts[0], source=source, group=group, split="train"))
            seen.add(prompt)
        for index, (prompt, answer) in enumerate(instructions(args.data)):
            if fits(prompt, [answer]) and prompt not in seen:
                seen.add(prompt)
                split = "eval" if index % 10 == 0 else "train"
                turns = (Message("user", prompt),)
                demonstrations.write(
                    Demonstration(turns, answer=answer, source="instructions", group=prompt, split=split)
                )


if __name__ == "__main__":
    main()
