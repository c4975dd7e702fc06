"""A recorded PPO update on the page: recomputed, and its best and worst episodes token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.core.console import format_number
from rlhf.core.errors import UserError
from rlhf.core.page import cut
from rlhf.report.answers import ShownAnswer, shown
from rlhf.report.gather import Answer, RunRecord

if TYPE_CHECKING:
    from rlhf.data.chat_tokenizer import ChatTokenizer
    from rlhf.replay.record import UpdateRecord

EPISODES = 2
"""Episodes shown of the highest and of the lowest scores each."""
NAMES = {
    "logprobs": "logprob", "ref_logprobs": "ref_logprob", "values": "value", "rewards": "reward",
    "advantages": "advantage",
}  # fmt: skip
"""Columns of a record -> what `rlhf.report.answers` calls them."""


@dataclass(frozen=True)
class ShownUpdate:
    """A recorded update as the page shows it."""

    step: int
    steps: list[int]
    """All updates that the run has recorded."""
    facts: str
    rows: list[tuple[str, str, str, str, bool]]
    """What was compared, from what it was computed, largest difference, verdict, and whether it agrees."""
    agrees: bool
    episodes: list[tuple[str, ShownAnswer]]
    """Prompt and answer."""
    fault: str
    """Why the record cannot be shown; empty if it can."""


def newest_update(run: RunRecord) -> ShownUpdate | None:
    """The newest recorded update of a PPO run; None if it has recorded none."""
    if not (run.path / "updates").is_dir():
        return None
    from rlhf.replay.opened import open_update, tokenizer_of  # import torch
    from rlhf.replay.record import recorded

    steps = recorded(run.path)
    if not steps:
        return None
    try:
        opened = open_update(run.path, steps[-1])
        chat = tokenizer_of(run.path, opened.config)
    except UserError as error:
        return ShownUpdate(steps[-1], steps, "", [], False, [], str(error).splitlines()[0])
    rows = [
        (one.name, one.how, format_number(one.difference, 2), one.verdict, one.agrees) for one in opened.comparisons
    ]
    rollout = opened.record.experience.rollout
    facts = (
        f"{len(rollout.completions):,} answers, {int(rollout.lengths.sum()):,} tokens,"
        f" KL coefficient {format_number(opened.record.kl_coef, 3)}"
    )
    fault = "" if opened.intact else "the file is not the one that was written: its checksum differs"
    agrees = opened.intact and not opened.wrong
    return ShownUpdate(steps[-1], steps, facts, rows, agrees, _episodes(opened.record, chat), fault)


def _episodes(update: UpdateRecord, chat: ChatTokenizer) -> list[tuple[str, ShownAnswer]]:
    from rlhf.replay.tokens import MOST_TOKENS, pieces

    rollout, scores = update.experience.rollout, update.experience.scores
    order = scores.argsort(descending=True).tolist()
    found = []
    for episode in dict.fromkeys([*order[:EPISODES], *order[-EPISODES:]]):
        completion = rollout.completions[episode]
        ids = completion.ids[:MOST_TOKENS]
        tokens = {"text": pieces(chat, ids)} | {
            name: update.columns[column][episode, : len(ids)].tolist()
            for column, name in NAMES.items()
            if column in update.columns
        }
        prompt = str(rollout.prompts.messages[episode][-1].get("content", ""))
        answer = Answer(prompt, "", chat.decode(ids), float(scores[episode]), completion.ended, tokens)
        found.append((cut(prompt), shown(answer)))
    return found
