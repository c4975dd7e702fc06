"""`rlhf data propose`: K distinct answers to each prompt, for people to rank.

prompts chosen -> a person's answer, where there is one -> answers of each checkpoint in turn, drawn again where two are
alike -> (the prompts on which reward models disagree most) -> the order shuffled -> a dataset of proposals
"""

from __future__ import annotations

import gc
import heapq
import json
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from data_tools.annotate.candidates import alike, disagreement
from data_tools.io.derive import Derivation
from data_tools.io.rejects import print_reasons
from rlhf.cli import options
from rlhf.config.base import ModelConfig
from rlhf.core.console import say, table
from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy
from rlhf.data.chat import load_tokenizer
from rlhf.data.encode import Counts, encode_ranking
from rlhf.data.schema import BadRecord, Candidate, Demonstration, Prompt, Proposal, Ranking, to_dict
from rlhf.data.selection import chosen_records
from rlhf.data.store import Dataset, Reject, open_dataset
from rlhf.inference.policy import open_policy, quiet, sampling_for
from rlhf.inference.sampling import Sampled, sample
from rlhf.rollout.types import SamplingParams, stream_seed
from rlhf.runs.run import fingerprint, is_run, parent_facts, read_run, resolve_model_path

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

BATCH_TOKENS = 16384
"""Most tokens in one forward pass of a judge, padding included."""
POOL = 4
"""Prompts that are answered for each one that is kept, with --select disagreement."""


def command(
    models: Annotated[list[str], typer.Argument(metavar="RUN|MODEL...", help="Runs, model folders, or hub names.")],
    prompts: Annotated[Path, typer.Option(help="A dataset of any kind; its prompts are answered.")],
    out: Annotated[Path, typer.Option("--out", help="The dataset of proposals to make.")],
    k: Annotated[int, typer.Option("--k", min=2, help="Answers to each prompt, a person's included.")] = 4,
    count: Annotated[int | None, typer.Option(min=1, help="So many prompts; all of them when left out.")] = None,
    select: Annotated[
        Literal["random", "disagreement"], typer.Option(help="Which prompts: at random, or where judges disagree most.")
    ] = "random",
    judge: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="A reward model; give two or more for disagreement.")
    ] = None,
    pool: Annotated[
        int | None, typer.Option(min=1, help=f"Prompts that are judged; {POOL} times --count when left out.")
    ] = None,
    skip: Annotated[
        list[Path] | None, typer.Option(metavar="DATASET", help="Leave out this dataset's prompts; may be repeated.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, eval or test; all when left out.")] = None,
    human: Annotated[
        bool, typer.Option("--human/--no-human", help="Mix in a person's answer where PROMPTS has one.")
    ] = True,
    similar: Annotated[
        float, typer.Option(min=0, max=1, help="Answers with this share of words in common count as alike.")
    ] = 0.9,
    tries: Annotated[int, typer.Option(min=1, help="How many more answers a model may try where some are alike.")] = 4,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    chat_template: options.ChatTemplate = "auto",
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write K distinct answers of one or several models to each prompt, shuffled, for people to rank."""
    judges, drawn = judge or [], {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens, "stop": stop,
    }  # fmt: skip
    given = {
        "prompts": prompts, "k": k, "count": count, "select": select, "judge": judges, "pool": pool, "skip": skip,
        "split": split, "similar": similar, "tries": tries, **drawn, "seed": seed, "chat_template": chat_template,
        "human": human, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if select == "disagreement":
        pool = pool or POOL * (count or 0)
    _check(models, judges, select, count, pool)
    samplings = [sampling_for(model, **drawn) for model in models]
    task = Task(models, samplings, k, similar, tries, seed, chat_template, trust_remote_code)
    data, skipped = open_dataset(prompts), [open_dataset(path) for path in skip or ()]
    facts = {"sampling": {model: asdict(sampling) for model, sampling in zip(models, samplings)}}
    with Derivation(out, "proposal", [data, *skipped], ["propose", *models, *_words(given)], facts) as made:
        made.origin["parents"] += [model_facts(path) for path in (*models, *judges)]
        asked = choose(data, skipped, split, pool or count, seed, human)
        for reject in data.rejects:
            made.rejects(reject)
        tally = answer(task, asked)
        asked = set_aside(asked, made, prompts)
        if select == "disagreement":
            asked = most_disputed(asked, judges, count or 0, made, prompts, trust_remote_code)
        if not asked:
            raise UserError(f"{out}: not made: no prompt got two distinct answers", remedy=_MORE)
        proposals = [one.proposal(seed) for one in asked]
        for proposal in proposals:
            made.write(proposal)
        summary = {"out": str(out), "written": made.written, "set_aside": made.rejects.count}
        summary |= {"reasons": made.rejects.reasons, "answers": dict(_answers(proposals)), **asdict(tally)}
        made.origin |= {"answers": summary["answers"], **asdict(tally)}
    show(summary, proposals, made, k)
    if as_json:
        options.print_json(summary)


def _words(given: dict[str, Any]) -> Iterator[str]:
    """The options as they stand in a command; those that were not given are left out."""
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "human":
            yield flag if value else "--no-human"
        elif value is True:
            yield flag
        elif value is not False and value is not None:
            for one in value if isinstance(value, list) else [value]:
                yield from (flag, str(one))


def _check(models: Sequence[str], judges: Sequence[str], select: str, count: int | None, pool: int | None) -> None:
    """Refuse what can be refused before the first model answers."""
    if select == "random" and (judges or pool):
        raise UserError("--judge and --pool are for --select disagreement", remedy="Add it, or leave them out.")
    if select == "disagreement" and len(judges) < 2:
        what = f"--select disagreement: needs two judges or more, got {len(judges)}"
        raise UserError(what, remedy="Train reward models with different seeds; give --judge for each.")
    if select == "disagreement" and (count is None or count > (pool or 0)):
        raise UserError("--select disagreement: keeps --count of --pool prompts", remedy="Give --count, below --pool.")
    wanted = [(model, ("sft", "ppo")) for model in models] + [(judge, ("reward",)) for judge in judges]
    for path, stages in wanted:
        resolve_model_path(path)
        if is_run(path) and read_run(path)["stage"] not in stages:
            raise UserError(f"{path}: is a run of the {read_run(path)['stage']} stage, not of {' or '.join(stages)}")


def model_facts(path: str) -> dict[str, Any]:
    """What the manifest says of a model: its path and, of what lies on this disk, the fingerprint of its weights."""
    facts = {"kind": "model", **parent_facts(path)}
    if "fingerprint" not in facts and Path(path).is_dir():
        facts["fingerprint"] = fingerprint(Path(path))
    return facts


# ---- prompts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A prompt with the answers that it has so far."""

    prompt: Prompt
    number: int
    """Of its first record in the dataset, from 1."""
    candidates: list[Candidate]
    """A person's answer comes first, then those of the models."""

    @property
    def human(self) -> bool:
        """A person's answer is among them."""
        return any(candidate.author_kind == "person" for candidate in self.candidates)

    def proposal(self, seed: int) -> Proposal:
        """What is ranked: the order in which the candidates stand there is the order in which to show them."""
        shown = list(self.candidates)
        random.Random(f"{seed} {self.prompt.prompt_id}").shuffle(shown)
        of = self.prompt
        return Proposal(of.messages, of.source, of.group, of.split, tuple(shown))


def choose(
    data: Dataset, skip: Sequence[Dataset], split: str | None, count: int | None, seed: int, human: bool
) -> list[Asked]:
    """Prompts at random, each once, with a person's answer where `human` and where there is one.

    They are the first `count` by a hash of seed and prompt, in that order: which of two prompts comes first does not
    depend on what else the dataset holds, or on what is skipped. Two passes; ids and the chosen prompts are in memory.

    Raises:
        UserError: No prompt is left.
    """
    passed = {record.prompt_id for dataset in skip for record in dataset.records()}
    ids = {record.prompt_id for record in _records(data, split)} - passed
    if not ids:
        why = f"{len(passed):,} prompts are skipped." if passed else ""
        raise UserError(f"{data.path}: no prompt is left to answer", why, "Bring new prompts.")
    place = {name: stream_seed(seed, int(name, 16)) for name in ids}
    wanted = heapq.nsmallest(count or len(ids), ids, place.__getitem__)
    chosen: dict[str, Asked | None] = dict.fromkeys(wanted)
    for number, record in enumerate(_records(data, split), 1):
        if record.prompt_id not in chosen:
            continue
        asked = chosen[record.prompt_id]
        if asked is None:
            prompt = Prompt(record.messages, record.source, record.group, record.split)
            asked = chosen[record.prompt_id] = Asked(prompt, number, [])
        if human and not asked.candidates:
            asked.candidates.extend(by_person(record))
    return [asked for asked in chosen.values() if asked is not None]


def _records(data: Dataset, split: str | None) -> Iterator[Any]:
    return data.records() if split is None else chosen_records(data, split)


def by_person(record: Prompt) -> list[Candidate]:
    """A person's answer: a demonstration's, or of a ranking the first candidate of rank 1 that a person wrote."""
    if isinstance(record, Demonstration):
        return [Candidate(record.answer, record.author, "person")]
    if isinstance(record, Ranking):
        return [c for c, rank in zip(record.candidates, record.ranks) if rank == 1 and c.author_kind == "person"][:1]
    return []


# ---- answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """How prompts are answered."""

    models: Sequence[str]
    samplings: Sequence[SamplingParams]
    """Of each model."""
    k: int
    similar: float
    tries: int
    seed: int
    chat_template: str
    trust_remote_code: bool

    def due(self, index: int, asked: Asked, models: int) -> int:
        """How many candidates prompt `index` should have once the first `models` models have answered.

        A person's answer takes one of the K places; the others go to the models in turn, beginning with the next model
        at the next prompt.
        """
        places = range(self.k - asked.human)
        return asked.human + sum((index + place) % len(self.models) < models for place in places)


@dataclass
class Tally:
    """What became of the answers that were drawn and not taken, and how many of the others are cut off."""

    drawn: int = 0
    empty: int = 0
    alike: int = 0
    """Not taken, because another answer to the prompt says nearly the same."""
    cut_off: int = 0
    """Taken, although the model had not ended at --max-new-tokens."""


def answer(task: Task, asked: Sequence[Asked]) -> Tally:
    """Add distinct answers to each prompt, up to K. One model is in memory at a time.

    A model gives one answer to each prompt in a pass, and has `tries` more passes than answers to give. What it still
    lacks then, because its answers are alike, falls to the next model.
    """
    tally = Tally()
    for number, path in enumerate(task.models):
        policy = open_policy(path, task.chat_template, task.trust_remote_code)
        sampling = task.samplings[number]
        most = max(missing for _, missing in _missing(task, asked, number))
        for attempt in range(most + task.tries if sampling.temperature else 1):  # greedy: the same each time
            rows = [one for one, missing in _missing(task, asked, number) if missing > 0]
            if not rows:
                break
            seed = stream_seed(task.seed, number, attempt)
            for (drawn,), one in zip(sample(policy, [row.prompt for row in rows], sampling, seed), rows):
                _take(drawn, one.candidates, policy.path, task.similar, tally)
        del policy
        gc.collect()
        torch.cuda.empty_cache()
    return tally


def _missing(task: Task, asked: Sequence[Asked], number: int) -> Iterator[tuple[Asked, int]]:
    """Each prompt, with how many answers it lacks of the models up to this one."""
    return ((one, task.due(i, one, number + 1) - len(one.candidates)) for i, one in enumerate(asked))


def _take(drawn: Sampled, candidates: list[Candidate], author: str, similar: float, tally: Tally) -> None:
    """Add an answer to the candidates, unless it is empty or alike to one of them."""
    tally.drawn += 1
    if not drawn.text.strip():
        tally.empty += 1
    elif any(alike(drawn.text, other.text, similar) for other in candidates):
        tally.alike += 1
    else:
        tally.cut_off += not drawn.answer.ended
        candidates.append(Candidate(drawn.text, author, "model"))


_MORE = "Raise --temperature or --tries, or name more models."


def set_aside(asked: Sequence[Asked], made: Derivation, path: Path) -> list[Asked]:
    """Without the prompts that have fewer than two answers; those go to the rejects."""
    for one in asked:
        if len(one.candidates) < 2:
            _reject(one, made, path, BadRecord("fewer than two distinct answers", remedy=_MORE))
    return [one for one in asked if len(one.candidates) >= 2]


def _reject(one: Asked, made: Derivation, path: Path, fault: BadRecord) -> None:
    made.rejects(Reject.of(path, one.number, fault, json.dumps(to_dict(one.prompt), ensure_ascii=False)))


# ---- disagreement ------------------------------------------------------------------------------------------------


def most_disputed(
    asked: Sequence[Asked], judges: Sequence[str], count: int, made: Derivation, path: Path, trust_remote_code: bool
) -> list[Asked]:
    """The `count` prompts about whose answers the judges disagree most, those first; see `disagreement`.

    Prompts with an answer that does not fit into a judge go to the rejects.
    """
    by_judge = [scores(judge, asked, trust_remote_code) for judge in judges]
    disputed: list[tuple[float, Asked]] = []
    for index, one in enumerate(asked):
        found = [judged[index] for judged in by_judge]
        if all(len(row) == len(one.candidates) for row in found):
            disputed.append((disagreement(found), one))
        else:
            remedy = "Lower --max-new-tokens, or use judges that read longer texts."
            _reject(one, made, path, BadRecord("an answer is too long for a judge", remedy=remedy))
    disputed.sort(key=lambda item: -item[0])
    kept = disputed[:count]
    if kept:
        means = [statistics.fmean(value for value, _ in part) for part in (kept, disputed)]
        made.origin["disagreement"] = {"kept": means[0], "pool": means[1], "prompts": len(disputed)}
        say(f"Disagreement: {means[0]:.3g} on the {len(kept):,} prompts kept, {means[1]:.3g} on all {len(disputed):,}")
    return [one for _, one in kept]


def scores(judge: str, asked: Sequence[Asked], trust_remote_code: bool = False) -> list[tuple[float, ...]]:
    """A reward model's raw scores of each prompt's candidates; () where an answer does not fit into the model."""
    from rlhf import distributed
    from rlhf.models.load import compute_dtype, load_hf_config, sequence_limit
    from rlhf.models.scalar import load_scalar
    from rlhf.reward.scoring import score_rankings

    quiet()
    folder, config = resolve_model_path(judge), ModelConfig(path=judge, trust_remote_code=trust_remote_code)
    chat, limit = load_tokenizer(config, folder), sequence_limit(config, load_hf_config(config, folder))
    scalar = load_scalar(config, folder, head="trained").to(distributed.device(), compute_dtype("auto"))
    tied = [
        Ranking(one.prompt.messages, candidates=tuple(one.candidates), ranks=(1,) * len(one.candidates))
        for one in asked
    ]
    rows = enumerate(encode_ranking(ranking, chat, limit, Counts()) for ranking in tied)
    whole = {i: row for i, row in rows if row and len(row["candidates"]) == len(asked[i].candidates)}
    found: list[tuple[float, ...]] = [()] * len(asked)
    for i, scored in zip(whole, score_rankings(scalar, chat, list(whole.values()), BATCH_TOKENS, bar=True)):
        found[i] = scored.scores
    return found


# ---- what is printed ---------------------------------------------------------------------------------------------


def _answers(proposals: Sequence[Proposal]) -> Counter[str]:
    """Author -> answers; those of people together."""
    authors = (c for proposal in proposals for c in proposal.candidates)
    return Counter("people" if c.author_kind == "person" else c.author for c in authors)


def show(summary: dict[str, Any], proposals: Sequence[Proposal], made: Derivation, k: int) -> None:
    """Tables of who wrote how much and how many answers the prompts have, what was set aside, and the sum."""
    table("answers", ["by", "answers"], sorted(summary["answers"].items()))
    sizes = Counter(len(proposal.candidates) for proposal in proposals)
    table("prompts", ["answers", "prompts"], sorted(sizes.items(), reverse=True))
    print_reasons(made.rejects.reasons, made.rejects.first)
    say(
        f"{summary['drawn']:,} answers drawn; not taken: {summary['alike']:,} alike, {summary['empty']:,} empty; "
        f"{summary['cut_off']:,} of those taken are cut off at --max-new-tokens"
    )
    short = sum(n for size, n in sizes.items() if size < k)
    fewer = f" ({short:,} with fewer than {k} answers)" if short else ""
    say(f"proposed {summary['written']:,}{fewer} -> {summary['out']} (proposals); set aside {summary['set_aside']:,}")
    say(f"Rank them: rlhf data rank {summary['out']} --annotator NAME")
