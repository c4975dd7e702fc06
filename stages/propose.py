"""`rlhf data propose`: K distinct answers to each prompt, for people to rank.

prompts -> a person's answer, if any -> answers of each model in turn, sampled again where two are too similar
-> (the prompts on which reward models disagree most) -> the order shuffled -> a dataset of proposals
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_tools.annotate.propose import (
    TOO_FEW,
    OpenProposal,
    Tally,
    add_answer,
    answers_by_author,
    choose_prompts,
    missing_answers,
    most_disputed,
    reject_incomplete,
    show,
)
from data_tools.io.derive import Derivation
from rlhf.cli import options
from rlhf.cli.sampling_options import SamplingOptions, with_sampling
from rlhf.core.console import print_json
from rlhf.core.errors import UserError
from rlhf.data.schema import Proposal
from rlhf.data.selection import chosen_records
from rlhf.data.store import Dataset, open_dataset
from rlhf.rollout.streams import stream_seed
from rlhf.runs.parents import parent_facts, resolve_model_path
from rlhf.runs.run import stage_of

POOL = 4
"""Prompts that are answered per prompt kept, with --select disagreement."""


@with_sampling
def command(
    models: list[str],
    *,
    prompts: Path,
    out: Path,
    k: Annotated[int, typer.Option(min=2)] = 4,
    count: options.PositiveOrNone = None,
    select: Literal["random", "disagreement"] = "random",
    judge: list[str] | None = None,
    pool: Annotated[
        int | None, typer.Option(min=1, help=f"Number of prompts that are judged; {POOL} times --count by default.")
    ] = None,
    skip: list[Path] | None = None,
    split: str | None = None,
    human: bool = True,
    similar: Annotated[float, typer.Option(min=0, max=1)] = 0.9,
    tries: options.Positive = 4,
    overwrite: options.ReplaceDataset = False,
    as_json: options.Json = False,
    sampling: SamplingOptions,
) -> None:
    """Write K distinct answers of one or several models to each prompt, shuffled, for people to rank.

    Args:
        models (RUN|MODEL...): Runs, model folders, or hub names.
        prompts: A dataset of any kind; its prompts are answered.
        out: Output dataset of proposals.
        k: Answers per prompt, including a person's.
        count: Number of prompts; all by default.
        select: Which prompts: random ones, or those with the most disagreement.
        judge (RUN): A reward model; give two or more for disagreement.
        skip (DATASET): Leave out this dataset's prompts; may be repeated.
        split: train, eval or test; all by default.
        human: Include a person's answer where PROMPTS has one.
        similar: Answers that share this fraction of their words are too similar.
        tries: More samples of a model if answers are too similar.
    """
    judges, seed = judge or [], sampling.seed
    if select == "disagreement":
        pool = pool or POOL * (count or 0)
    _check(models, judges, select, count, pool)
    params = {model: sampling.params(model) for model in models}
    data, skipped = open_dataset(prompts), [open_dataset(path) for path in skip or ()]
    facts = {"sampling": {model: asdict(one) for model, one in params.items()}}
    with Derivation(out, "proposal", [data, *skipped], facts, overwrite=overwrite) as made:
        made.origin["parents"] += [{"kind": "model", **parent_facts(path)} for path in (*models, *judges)]
        opened = choose(data, skipped, split, pool or count, seed, human)
        for reject in data.rejects:
            made.rejects(reject)
        tally = answer(opened, models, sampling, k, similar, tries)
        opened = reject_incomplete(opened, made, prompts)
        if select == "disagreement":
            scores = [judge_scores(path, opened, sampling.trust_remote_code) for path in judges]
            opened = most_disputed(opened, scores, count or 0, made, prompts)
        if not opened:
            raise UserError(f"{out}: not made: no prompt got two distinct answers", remedy=TOO_FEW)
        proposals = [one.shuffled(seed) for one in opened]
        for proposal in proposals:
            made.write(proposal)
        summary = {"out": str(out), "written": made.count, "rejected": made.rejects.count}
        summary |= {"reasons": made.rejects.reasons, "answers": answers_by_author(proposals), **asdict(tally)}
        made.origin |= {"answers": summary["answers"], **asdict(tally)}
    show(summary, proposals, made, k)
    if as_json:
        print_json(summary)


def _check(models: Sequence[str], judges: Sequence[str], select: str, count: int | None, pool: int | None) -> None:
    """Check the options before the first model is loaded."""
    if select == "random" and (judges or pool):
        raise UserError("--judge and --pool are for --select disagreement", remedy="Add it, or leave them out.")
    if select == "disagreement" and len(judges) < 2:
        what = f"--select disagreement: needs at least two judges, got {len(judges)}"
        raise UserError(what, remedy="Train reward models with different seeds; give --judge for each.")
    if select == "disagreement" and (count is None or count > (pool or 0)):
        raise UserError("--select disagreement: keeps --count of --pool prompts", remedy="Give --count, below --pool.")
    wanted = [(model, ("sft", "dpo", "ppo")) for model in models] + [(judge, ("reward",)) for judge in judges]
    for path, stages in wanted:
        resolve_model_path(path)
        if (stage := stage_of(path)) not in (None, *stages):
            raise UserError(f"{path}: is a run of the {stage} stage, not of {' or '.join(stages)}")


def choose(
    data: Dataset, skip: Sequence[Dataset], split: str | None, count: int | None, seed: int, human: bool
) -> list[OpenProposal]:
    """Random prompts of a split: those with the lowest hash of seed and prompt. See `choose_prompts`."""
    read = data.records if split is None else lambda: chosen_records(data, split)
    return choose_prompts(read, skip, lambda name: stream_seed(seed, int(name, 16)), count, human)


def answer(
    opened: Sequence[OpenProposal], models: Sequence[str], sampling: SamplingOptions, k: int, similar: float, tries: int
) -> Tally:
    """Add distinct answers to each proposal, up to K. One model is in memory at a time.

    A model gives one answer to each prompt in a pass, and has `tries` more passes than answers to give.
    """
    import torch  # slow, so after all checks that do not need it

    from rlhf.inference.sampling import accepted, sample

    tally = Tally()
    for number, path in enumerate(models):
        policy, params = sampling.open(path), sampling.params(path)
        usable = {prompt.prompt_id for prompt in accepted(policy, [one.prompt for one in opened])}
        most = max(missing for _, missing in missing_answers(opened, k, len(models), number))
        for attempt in range(most + tries if params.temperature else 1):  # greedy completions are the same each time
            rows = [one for one, missing in missing_answers(opened, k, len(models), number) if missing > 0]
            rows = [one for one in rows if one.prompt.prompt_id in usable]
            if not rows:
                break
            seed = stream_seed(sampling.seed, number, attempt)
            for (drawn,), one in zip(sample(policy, [row.prompt for row in rows], params, seed), rows):
                add_answer(one, drawn.text, policy.path, drawn.completion.ended, similar, tally)
        del policy
        gc.collect()
        torch.cuda.empty_cache()
    return tally


def judge_scores(
    judge: str, opened: Sequence[OpenProposal], trust_remote_code: bool = False
) -> list[tuple[float, ...]]:
    """A reward model's raw scores of each proposal's candidates; () where an answer does not fit into the model."""
    from rlhf.inference.reward_model import open_reward_model  # imports torch

    asked = [Proposal(one.prompt.messages, candidates=tuple(one.candidates)) for one in opened]
    return open_reward_model(judge, trust_remote_code).raw_scores(asked)
