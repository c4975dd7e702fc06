"""`rlhf prompt-search`: a model proposes instructions; they are scored on one part of the data, reported on another.

See `rlhf.prompting.search` for the steps and the folder.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.cli import options, task_options
from rlhf.cli.sampling_options import SamplingOptions, with_sampling
from rlhf.config.load import check_config, inline_values
from rlhf.core.console import print_json, say, table
from rlhf.core.errors import UserError
from rlhf.data.selection import train_records
from rlhf.inference.teacher import is_server
from rlhf.prompting.ways import Prompting, check_way, read_prompting, read_way
from rlhf.runs.parents import parent_facts
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import ChatServer
from rlhf.servers.config import ServerConfig
from rlhf.tasks.metrics import MetricValue
from rlhf.tasks.task import Task, load_task

PROPOSAL_TEMPERATURE = 0.9
"""High, so that proposals differ."""


@with_sampling
def command(
    model: options.Model,
    *,
    dataset: Path,
    out: Path,
    prompting: str = "zero-shot",
    proposer: str | None = None,
    candidates: options.Positive = 16,
    rounds: options.NotNegative = 2,
    keep: options.Positive = 4,
    records: options.Positive = 100,
    split: options.Split = None,
    limit: options.Limit = None,
    metric: task_options.Metric = None,
    labels: task_options.Labels = None,
    pattern: task_options.Pattern = None,
    instruction_tokens: options.Positive = 64,
    overwrite: bool = False,
    as_json: options.Json = False,
    sampling: SamplingOptions,
) -> None:
    """Search for an instruction that makes a model answer better, without training.

    Args:
        dataset: Demonstrations with a train split, whose answers are correct.
        out: Output folder; an unfinished search in it continues.
        prompting (WAY|FILE|{...}): The way of prompting that gets the instruction.
        proposer (RUN|MODEL|URL|{...}): Who proposes: a model, a server with OpenAI's API, or '{url: ..., model: ...,
            key_env: ...}'. By default the model itself.
        candidates: Instructions proposed per round.
        rounds: Rounds in which the best are reworded.
        keep: Number of best instructions that are reworded.
        records: Training records per instruction's score.
        instruction_tokens: Longest instruction in tokens.
        overwrite: Delete an earlier search in the folder first.
    """
    way, params = read_prompting(prompting), sampling.params(model)
    server = _server(proposer or "")
    config = task_options.task_config(str(dataset), split, limit, metric, labels, pattern)
    task = load_task(task_options.with_label_metrics(config, [way]))
    check_way(way, task.rules.labels, sampling.temperature)
    if overwrite and (out / "search.json").is_file():
        shutil.rmtree(out)
    from rlhf.inference.policy import Policy  # imports torch
    from rlhf.prompting.evaluation import evaluate_prompting
    from rlhf.prompting.masked import MaskedModel, open_prompted
    from rlhf.prompting.proposals import Proposer, local_proposer, server_proposer
    from rlhf.prompting.search import PromptSearch, SearchPlan, split_parts

    @functools.cache  # opened when needed, after the options of an earlier search were compared
    def opened(path: str, chat_template: str) -> Policy | MaskedModel:
        return open_prompted(path, chat_template, sampling.trust_remote_code)

    @contextmanager
    def propose(seed: int) -> Iterator[Proposer]:
        replies, given = ReplyCache(out / "replies"), (PROPOSAL_TEMPERATURE, instruction_tokens, seed)
        if server is not None:
            with ChatServer(server, replies) as asked:
                yield server_proposer(asked, *given)
            return
        writer = opened(proposer or model, sampling.chat_template if proposer in (None, model) else "auto")
        if isinstance(writer, MaskedModel):
            raise UserError(f"{writer.path}: a masked language model writes no text", remedy="Name a --proposer.")
        yield local_proposer(writer, *given, replies)

    def measure(part: Task, way: Prompting) -> MetricValue:
        scored = opened(model, sampling.chat_template)
        return evaluate_prompting(scored, part, way, params, sampling.temperature, sampling.seed).measured[0]

    plan = SearchPlan(candidates, rounds, keep, records, sampling.seed)
    parts = split_parts(task, list(train_records([task.data])), plan)
    facts: dict[str, Any] = {
        "model": parent_facts(model), "way": read_way(prompting),
        "proposer": {"url": server.url, "model": server.model} if server else parent_facts(proposer or model),
        "split": split, "instruction_tokens": instruction_tokens, "temperature": sampling.temperature,
        **task.facts(), **asdict(params), **asdict(plan),
    }  # fmt: skip
    result = PromptSearch(out, facts, plan, parts, (way, read_way(prompting)), measure, propose).run()
    _show(result)
    if as_json:
        print_json(result)


def _server(proposer: str) -> ServerConfig | None:
    """The server that proposes; None if a model does.

    Raises:
        UserError: Its address or an option is wrong, or its key is not in the environment.
    """
    values = {"url": proposer} if is_server(proposer) else inline_values(proposer, "--proposer")
    if values is None:
        return None
    found = check_config(ServerConfig, values, "--proposer")
    found.key()
    return found


def _show(result: dict[str, Any]) -> None:
    """Print the best instructions, and the best one's metrics on records that the search never saw."""
    rows = [(row["score"], row["round"], row["instruction"] or "(no instruction)") for row in result["best"]]
    title = f"The best of {result['candidates']:,} instructions, on the records that they were chosen by"
    table(title, [result["winner"]["metric"], "round", "instruction"], rows)
    report = result["report"]
    rows = [(label, found["value"], found["low"], found["high"]) for label, found in
            (("the best", report["winner"]), ("before the search", report["without_search"]))]  # fmt: skip
    title = f"On {report['records']:,} records that the search never saw"
    table(title, ["instruction", report["winner"]["metric"], "95% low", "high"], rows)
    say(f"Use it with --prompting {result['file']}")
