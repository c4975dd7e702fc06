"""`rlhf data next`: which proposals, and which of their answers, to rank next.

proposals -> scores of each answer by several reward models -> the K most informative answers of each prompt
-> information / seconds of ranking x novelty -> the best N, in the order in which to rank them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data_tools.io.derive import Derivation
from data_tools.io.rejects import print_reasons
from rlhf.cli import options
from rlhf.core.console import print_json, say
from rlhf.core.errors import UserError, blame
from rlhf.data.jsonl import Reject, to_dict
from rlhf.data.schema import BadRecord, Proposal
from rlhf.data.store import open_dataset
from rlhf.runs.parents import parent_facts, resolve_model_path
from rlhf.runs.run import stage_of

if TYPE_CHECKING:
    import numpy as np

MEMBERS = 8
WHY = "why.jsonl"


def command(
    candidates: Path,
    *,
    n: options.Positive,
    out: Path,
    reward: list[str] | None = None,
    ranked: list[Path] | None = None,
    k: Annotated[int | None, typer.Option(min=2)] = None,
    per: Literal["second", "ranking"] = "second",
    split: str | None = None,
    members: Annotated[int, typer.Option(min=2)] = MEMBERS,
    seed: int = 0,
    overwrite: options.ReplaceDataset = False,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Choose the prompts and answers whose rankings are most informative for a reward model per second of ranking.

    Args:
        candidates (CANDIDATES): A dataset of proposals.
        n: Number of prompts to choose.
        out: Output dataset of proposals, in the order to rank.
        reward (RUN|{...}): An ensemble, or a reward model of one; give two or more models.
        ranked (DATASET): Rankings so far; without --reward a bag-of-words ensemble learns from them. May be repeated.
        k: Answers to rank per prompt; all by default.
        per: Choose by information per second, or per ranking.
        split: train, eval or test; all by default.
        members: Members of the bag-of-words ensemble, without --reward.
        seed: Seed of the bag-of-words ensemble.
    """
    paths = _models(reward or [], ranked or [])
    data, before = open_dataset(candidates, "proposal"), [open_dataset(path, "ranking") for path in ranked or ()]
    from data_tools.annotate import choose_next as choosing  # imports scipy
    from data_tools.annotate import word_ensemble

    facts = {"seed": seed, "k": k, "per": per, "reward": paths or f"a bag of words with {members} members"}
    with Derivation(out, "proposal", [data, *before], facts, overwrite=overwrite) as made:
        made.origin["parents"] += [{"kind": "model", **parent_facts(path)} for path in paths]
        known = [one for dataset in before for one in dataset.records()]
        found = [one for one in data.records(on_reject=made.rejects) if split is None or one.split == split]
        usable, skipped = choosing.fresh(found, known)
        if not usable:
            why = (
                f"{len(found):,} proposals are in it{f' with split {split}' if split else ''}; {skipped:,} are ranked."
            )
            raise UserError(f"{candidates}: no unranked proposal", why, "Make more with `rlhf data propose`.")
        if paths:
            tables = _model_scores(paths, usable, trust_remote_code)
        else:
            weights = word_ensemble.train(known, members, seed)
            tables = word_ensemble.scores([[c.text for c in one.candidates] for one in usable], weights)
        whole = [(one, scores) for one, scores in zip(usable, tables) if scores is not None]
        for one in (one for one, scores in zip(usable, tables) if scores is None):
            fault = BadRecord("an answer is too long for a reward model", remedy="Use models that read longer texts.")
            made.rejects(
                Reject.of(
                    candidates, (one.read_at or (None, 0))[1], fault, json.dumps(to_dict(one), ensure_ascii=False)
                )
            )
        if not whole:
            raise UserError(f"{candidates}: no proposal fits into the reward models", remedy="Use other models.")
        cost = choosing.fit_cost(known)
        pool = choosing.choices([one for one, _ in whole], [scores for _, scores in whole], k, cost)
        chosen = choosing.choose(pool, n, known, per == "second")
        for one in chosen:
            made.write(one.proposal)
        why_lines = [one.why() for one in chosen]
        (made.partial / WHY).write_text("".join(json.dumps(line) + "\n" for line in why_lines), "utf-8")
        summary = {"out": str(out), "written": made.count, "rejected": made.rejects.count, "skipped": skipped}
        summary |= {"seconds": sum(one.seconds for one in chosen), "timed": cost.timed, "chosen": why_lines}
    choosing.show(chosen, pool, cost)
    print_reasons(made.rejects.reasons, made.rejects.first)
    fewer = f" (of {n:,} wanted: there are no more)" if len(chosen) < n else ""
    say(f"chose {len(chosen):,}{fewer} -> {out} (proposals); {skipped:,} were ranked before or are there twice")
    say(f"Rank them: rlhf data rank {quote(str(out))} --annotator NAME, or with --web in a browser")
    if as_json:
        print_json(summary)


def _models(specs: Sequence[str], ranked: Sequence[Path]) -> list[str]:
    """The paths of the reward models, checked before one is loaded."""
    from rlhf.reward.sources import model_terms
    from rlhf.reward.spec import read_reward

    paths: list[str] = []
    for spec in specs:
        with blame("--reward"):
            pick = read_reward(spec)
        if pick.name not in ("model", "ensemble"):
            raise UserError(f"--reward {spec}: is not a reward model", remedy="Name a run of the reward stage.")
        paths += [term["path"] for term in model_terms(pick)]
    if not paths and not ranked:
        why = "Uncertainty comes from reward models, or from a bag-of-words ensemble that learns from rankings."
        raise UserError("neither --reward nor --ranked", why, "Give one; first rank some 20 prompts of random choice.")
    if len(paths) == 1:
        why = "A ranking is informative where models disagree."
        raise UserError("--reward: one reward model", why, "Give two or more that were trained with different seeds.")
    for path in paths:
        resolve_model_path(path)
        if (stage := stage_of(path)) not in (None, "reward"):
            raise UserError(f"--reward {path}: is a run of the {stage} stage", remedy="Name runs of the reward stage.")
    return paths


def _model_scores(paths: Sequence[str], proposals: Sequence[Proposal], trust: bool) -> list[np.ndarray | None]:
    """(members, answers) raw scores of each proposal; None where an answer does not fit into a model."""
    import numpy as np

    from rlhf.inference.reward_model import open_reward_model  # imports torch

    columns = [open_reward_model(path, trust).raw_scores(proposals) for path in paths]  # one in memory at a time
    return [np.array(rows) if all(rows) else None for rows in zip(*columns)]
