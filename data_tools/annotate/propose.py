"""Building proposals: which prompts, how many answers each model owes, which answers are kept. Loads no models."""

from __future__ import annotations

import heapq
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from data_tools.annotate.candidates import disagreement, too_similar
from data_tools.io.derive import Derivation
from data_tools.io.rejects import print_reasons
from rlhf.core.console import say, table
from rlhf.core.errors import UserError
from rlhf.data.jsonl import Reject, to_dict
from rlhf.data.schema import MODEL_AUTHOR, BadRecord, Candidate, Demonstration, Prompt, Proposal, Ranking
from rlhf.data.store import Dataset

TOO_FEW = "Raise --temperature or --tries, or name more models."

# ---- prompts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenProposal:
    """A prompt with the candidates that it has so far: a person's answer first, then those of the models."""

    prompt: Prompt
    number: int
    """The position of its first record in the dataset, from 1."""
    candidates: list[Candidate]

    @property
    def has_human(self) -> bool:
        """Whether a person wrote one of the candidates."""
        return any(candidate.author_kind == "person" for candidate in self.candidates)

    def shuffled(self, seed: int) -> Proposal:
        """The proposal as it is ranked. Its candidates are in the order in which they are shown."""
        shown = list(self.candidates)
        random.Random(f"{seed} {self.prompt.prompt_id}").shuffle(shown)
        return Proposal(*self.prompt.prompt_fields, tuple(shown))


def choose_prompts(
    records: Callable[[], Iterable[Any]],
    skip: Sequence[Dataset],
    order: Callable[[str], int],
    count: int | None = None,
    human: bool = True,
) -> list[OpenProposal]:
    """Choose prompts, each once, and give each a person's answer where there is one.

    Reads the records twice; in memory are the ids of all prompts and the chosen prompts.

    Args:
        records: Gives the records, of any kind; called twice.
        skip: Datasets whose prompts are left out.
        order: Prompt id -> sort key. The prompts with the lowest keys are chosen, in that order, so which of two
            prompts comes first does not depend on the other records.
        count: Number of prompts; all by default.
        human: Whether a person's answer becomes a candidate.

    Raises:
        UserError: No prompt is left.
    """
    skipped = {record.prompt_id for dataset in skip for record in dataset.records()}
    keys = {name: order(name) for name in {record.prompt_id for record in records()} - skipped}
    if not keys:
        why = f"{len(skipped):,} prompts are skipped." if skipped else ""
        raise UserError("--prompts: no prompt is left to answer", why, "Bring new prompts.")
    chosen: dict[str, OpenProposal | None] = dict.fromkeys(heapq.nsmallest(count or len(keys), keys, keys.__getitem__))
    for number, record in enumerate(records(), 1):
        if record.prompt_id not in chosen:
            continue
        found = chosen[record.prompt_id]
        if found is None:
            prompt = Prompt(*record.prompt_fields)
            found = chosen[record.prompt_id] = OpenProposal(prompt, number, [])
        if human and not found.candidates:
            found.candidates.extend(_human_answer(record))
    return [found for found in chosen.values() if found is not None]


def _human_answer(record: Prompt) -> list[Candidate]:
    """A demonstration's answer, or the first candidate of rank 1 in a ranking that a person wrote."""
    if isinstance(record, Demonstration) and not record.author.startswith(MODEL_AUTHOR):
        return [Candidate(record.answer, record.author, "person")]
    if isinstance(record, Ranking):
        return [c for c, rank in zip(record.candidates, record.ranks) if rank == 1 and c.author_kind == "person"][:1]
    return []


# ---- answers -----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of the sampled answers."""

    drawn: int = 0
    empty: int = 0
    similar: int = 0
    """Skipped, because another answer to the prompt says nearly the same."""
    cut_off: int = 0
    """Kept, although the model did not end before --max-new-tokens."""


def missing_answers(
    opened: Sequence[OpenProposal], k: int, models: int, model: int
) -> Iterator[tuple[OpenProposal, int]]:
    """Each proposal, with the number of answers that it still needs from the models up to `model` (from 0).

    A person's answer takes one of the K places. The others go to the models in turn, beginning with the next model at
    the next prompt. What an earlier model could not give, because its answers are too similar, falls to the next one.
    """
    for index, one in enumerate(opened):
        turns = sum((index + place) % models <= model for place in range(k - one.has_human))
        yield one, one.has_human + turns - len(one.candidates)


def add_answer(one: OpenProposal, text: str, author: str, ended: bool, most_similar: float, tally: Tally) -> None:
    """Add a model's answer to the candidates, unless it is empty or too similar to one of them."""
    tally.drawn += 1
    if not text.strip():
        tally.empty += 1
    elif any(too_similar(text, other.text, most_similar) for other in one.candidates):
        tally.similar += 1
    else:
        tally.cut_off += not ended
        one.candidates.append(Candidate(text, author, "model"))


def reject_incomplete(opened: Sequence[OpenProposal], made: Derivation, path: Path) -> list[OpenProposal]:
    """The proposals with at least two candidates; the others go to the rejects."""
    for one in opened:
        if len(one.candidates) < 2:
            _reject(one, made, path, BadRecord("fewer than two distinct answers", remedy=TOO_FEW))
    return [one for one in opened if len(one.candidates) >= 2]


def _reject(one: OpenProposal, made: Derivation, path: Path, fault: BadRecord) -> None:
    made.rejects(Reject.of(path, one.number, fault, json.dumps(to_dict(one.prompt), ensure_ascii=False)))


def most_disputed(
    opened: Sequence[OpenProposal],
    scores: Sequence[Sequence[Sequence[float]]],
    count: int,
    made: Derivation,
    path: Path,
) -> list[OpenProposal]:
    """The `count` proposals on which the reward models disagree most, in falling order; see `disagreement`.

    Args:
        opened: The proposals.
        scores: [reward model][proposal][candidate]; no scores for a proposal with an answer that does not fit into
            the model. Such proposals go to the rejects.
        count: How many are kept.
        made: Takes the rejects and the mean disagreement.
        path: The dataset of prompts, for the rejects.
    """
    disputed: list[tuple[float, OpenProposal]] = []
    for one, *found in zip(opened, *scores):
        if all(len(row) == len(one.candidates) for row in found):
            disputed.append((disagreement(found), one))
        else:
            remedy = "Lower --max-new-tokens, or use reward models that read longer texts."
            _reject(one, made, path, BadRecord("an answer is too long for a reward model", remedy=remedy))
    disputed.sort(key=lambda item: -item[0])
    kept = disputed[:count]
    if kept:
        means = [statistics.fmean(value for value, _ in part) for part in (kept, disputed)]
        made.origin["disagreement"] = {"kept": means[0], "pool": means[1], "prompts": len(disputed)}
        say(f"Disagreement: {means[0]:.3g} on the {len(kept):,} prompts kept, {means[1]:.3g} on all {len(disputed):,}")
    return [one for _, one in kept]


# ---- what is printed ---------------------------------------------------------------------------------------------


def answers_by_author(proposals: Sequence[Proposal]) -> dict[str, int]:
    """Author -> number of answers; all people count as `people`."""
    authors = (c for proposal in proposals for c in proposal.candidates)
    return dict(Counter("people" if c.author_kind == "person" else c.author for c in authors))


def show(summary: dict[str, Any], proposals: Sequence[Proposal], made: Derivation, k: int) -> None:
    """Print the answers of each author, the number of answers per prompt, the rejects and the totals."""
    table("answers", ["by", "answers"], sorted(summary["answers"].items()))
    sizes = Counter(len(proposal.candidates) for proposal in proposals)
    table("prompts", ["answers", "prompts"], sorted(sizes.items(), reverse=True))
    print_reasons(made.rejects.reasons, made.rejects.first)
    say(
        f"{summary['drawn']:,} answers sampled; skipped: {summary['similar']:,} similar, {summary['empty']:,} empty; "
        f"{summary['cut_off']:,} of those kept are cut off at --max-new-tokens"
    )
    short = sum(n for size, n in sizes.items() if size < k)
    fewer = f" ({short:,} with fewer than {k} answers)" if short else ""
    say(f"proposed {summary['written']:,}{fewer} -> {summary['out']} (proposals); rejected {summary['rejected']:,}")
    say(f"Rank them: rlhf data rank {quote(str(summary['out']))} --annotator NAME, or with --web in a browser")
