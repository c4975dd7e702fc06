"""`rlhf replay`: open a recorded PPO update and recompute it."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf.cli import options
from rlhf.core.console import format_number, print_json, say, table, warn
from rlhf.core.errors import UserError
from rlhf.runs.run import read_run

if TYPE_CHECKING:
    from rlhf.replay.opened import OpenedUpdate
    from rlhf.replay.recompute import Recomputed

SHOWN_TOKENS = 60
"""Most tokens of an episode in the table."""
SHOWN_FAULTS = 3


def command(
    run: Path,
    *,
    step: options.PositiveOrNone = None,
    episodes: options.NotNegative = 3,
    tokens: Annotated[int | None, typer.Option(min=0)] = None,
    models: bool = True,
    as_json: options.JsonLines = False,
) -> None:
    """Open a recorded PPO update and recompute it. Exit status 1: something differs from the record.

    KL, rewards, advantages, returns and metrics are computed from the recorded log-probs, values and scores; with the
    checkpoint from before the update (the first needs none), the models recompute log-probs, values and scores.

    Args:
        run (RUN): A PPO run.
        step: The update, as in metrics.jsonl. By default, list the recorded ones.
        episodes: Number of episodes to print.
        tokens: Print this episode token by token.
        models: Also load the models of that update and recompute with them.
        as_json: Print only JSON lines, one per comparison.
    """
    if read_run(run)["stage"] != "ppo":
        raise UserError(f"{run}: only PPO runs record updates", remedy="Name a PPO run.")
    from rlhf.replay.record import folder, recorded  # imports torch

    if step is None:
        say(_listed(run, recorded(run)))
        return
    from rlhf.replay.opened import open_update

    opened = open_update(run, step)
    if models:
        opened = replace(opened, comparisons=opened.comparisons + _by_models(run, opened))
    found = opened.comparisons
    if as_json:
        for one in found:
            facts = {name: getattr(one, name) for name in ("name", "how", "values", "difference", "verdict")}
            print_json(facts | ({} if math.isfinite(one.difference) else {"difference": None}))
    else:
        _show(run, opened, episodes, tokens)
        rows = [(one.name, one.how, one.values, f"{one.difference:.2g}", one.verdict) for one in found]
        table(f"Update {step:,} recomputed", ("what", "from", "values", "largest difference", "result"), rows)
    for fault in opened.damage[:SHOWN_FAULTS]:
        warn(f"{run}: {fault}")
    if (more := len(opened.damage) - SHOWN_FAULTS) > 0:
        warn(f"{run}: {more:,} more such faults; see `rlhf doctor {quote(str(run))}`")
    if not opened.intact:
        warn(f"{folder(run, step)}: the file has changed since it was written: the checksum differs")
    if opened.wrong:
        warn(f"update {step:,}: recomputed differently from the record: {', '.join(opened.wrong)}")
    if opened.wrong or not opened.intact:
        raise typer.Exit(1)
    if not as_json:
        say(f"Update {step:,}: all {len(found)} comparisons agree.", style="green")


def _listed(run: Path, steps: list[int]) -> str:
    """The number of recorded updates and their steps, and how to open one."""
    if not steps:
        return f"{run}: no update is recorded; a run records some with log.record_every=50"
    count, last = f"{len(steps):,} updates are recorded, of steps", "the last"
    if len(steps) == 1:
        count, last = "1 update is recorded, of step", "it"
    which = ", ".join(f"{step:,}" for step in steps)
    return f"{run}: {count} {which}. To open {last}: rlhf replay {quote(str(run))} --step {steps[-1]}"


def _by_models(run: Path, opened: OpenedUpdate) -> list[Recomputed]:
    from rlhf.replay.models import allowed_difference, by_models, checkpoint_before
    from rlhf.replay.recompute import compare_models

    update, config = opened.record, opened.config
    try:
        checkpoint_before(run, update.step)
    except UserError as error:
        warn(f"without the models: {str(error).splitlines()[0]}")
        return []
    with contextlib.redirect_stdout(io.StringIO()):  # what loading them prints is said of a run that trains
        made = by_models(config, run, update)
    return compare_models(update, made, allowed_difference(config, run))


def _show(run: Path, opened: OpenedUpdate, episodes: int, token_of: int | None) -> None:
    """Print the episodes with the highest and lowest scores, or one token by token."""
    from rlhf.replay.opened import tokenizer_of
    from rlhf.replay.tokens import pieces

    update, experience = opened.record, opened.record.experience
    rollout, scores, mask = experience.rollout, experience.scores, experience.rollout.response_mask
    count = len(rollout.completions)
    if token_of is not None and token_of >= count:
        raise UserError(f"--tokens {token_of:,}: the update has episodes 0 to {count - 1:,}")
    say(f"{run}, update {update.step:,}: {count:,} episodes, {int(rollout.lengths.sum()):,} response tokens, "
        f"KL coefficient {format_number(update.kl_coef)}", style="bold")  # fmt: skip
    chat = tokenizer_of(run, opened.config)
    order = scores.argsort(descending=True).tolist()
    picked = list(dict.fromkeys([*order[: (episodes + 1) // 2], *order[len(order) - episodes // 2 :]]))
    for episode in picked:
        kl, value = update.kl[episode][mask[episode]], update.advantages.advantages[episode][mask[episode]]
        say(f"Episode {episode}: score {float(scores[episode]):.3f}, KL {float(kl.sum()):.3f} nats,"
            f" advantage {float(value.mean()):+.3f} on average, {int(rollout.lengths[episode])} tokens")  # fmt: skip
        say(f"  {rollout.prompts.messages[episode][-1]['content']}")
        say(f"  -> {chat.decode(rollout.completions[episode].ids)}")
    if token_of is None:
        return
    ids = rollout.completions[token_of].ids[:SHOWN_TOKENS]
    names = [name for name in ("logprobs", "ref_logprobs", "kl", "values", "rewards", "advantages", "returns")
             if name in update.columns]  # fmt: skip
    rows = [[repr(text)[1:-1], *(float(update.columns[name][token_of, at]) for name in names)]
            for at, text in enumerate(pieces(chat, ids))]  # fmt: skip
    table(f"Episode {token_of} token by token", ("token", *names), rows)
