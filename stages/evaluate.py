"""`rlhf evaluate`: a policy on demonstrations and by a reward, alone or against another; a reward model on rankings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli import options, task_options
from rlhf.cli.sampling_options import SamplingOptions, with_sampling
from rlhf.core.console import print_json, say, table, warn
from rlhf.core.errors import UserError
from rlhf.data.encode_records import EncodingCounts
from rlhf.data.selection import chosen_prompts, chosen_records, with_system
from rlhf.data.store import Dataset, open_dataset
from rlhf.prompting.ways import check_way, parse_shots, read_prompting
from rlhf.reward.agreement import Agreement
from rlhf.rollout.types import SamplingParams
from rlhf.tasks.config import TaskConfig
from rlhf.tasks.task import load_task


@with_sampling
def command(
    model: options.Model,
    datasets: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DATASET]...",
            help="For a policy: demonstrations, rankings (their best answers), prompts. For a reward model: rankings.",
        ),
    ] = None,
    dataset: Annotated[
        list[Path] | None, typer.Option(help="The same as an argument DATASET; may be repeated.")
    ] = None,
    split: options.Split = None,
    limit: options.Limit = None,
    reward: options.Reward = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN|MODEL", help="Compare with this policy: whose answers score higher?")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of answers to each prompt, with --reward.")] = 1,
    system: options.System = None,
    prompting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WAY|FILE|{...}",
            help="Measure answers to prompts made in this way: zero-shot, few-shot, cloze, chain-of-thought, a YAML"
            " file, or '{name: few-shot, shots: 8}'. May be repeated.",
        ),
    ] = None,
    shots: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="With --prompting: numbers of examples, each in its own line.")
    ] = None,
    metric: task_options.Metric = None,
    labels: task_options.Labels = None,
    pattern: task_options.Pattern = None,
    answers: Annotated[
        Path | None, typer.Option(help="With --prompting: write each answer here, as JSON lines.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", help="Write the metrics here, as JSON.")] = None,
    as_json: options.Json = False,
    *,
    sampling: SamplingOptions,
) -> None:
    """Measure a model on held-out data."""
    options.check_writable(output, "--out")
    options.check_writable(answers, "--answers")
    named = [*(datasets or ()), *(dataset or ())]
    if not prompting and (shots or metric or labels or pattern or answers):
        raise UserError("--shots, --metric, --labels, --pattern and --answers are for --prompting", remedy="Give it.")
    if prompting:
        if reward or against:
            raise UserError("--reward and --against are not for --prompting, whose answers have a right one")
        task = task_options.task_config(str(_only(named)), split, limit, metric, labels, pattern)
        result = _evaluate_prompting(model, prompting, shots, task, sampling, system, answers)
        _finish(result, output, as_json)
        return
    from rlhf.inference.policy import model_kind  # imports torch

    if model_kind(model, sampling.trust_remote_code) == "reward":
        if reward or against:
            raise UserError(f"{model}: is a reward model; --reward and --against are for policies")
        result = _evaluate_reward(model, _only(named), split, limit, sampling.trust_remote_code)
    else:
        data = open_dataset(_only(named))
        if data.kind == "prompt" and not reward:
            raise UserError(
                f"{data.path}: prompts alone give nothing to measure a policy by",
                remedy="Score its answers with --reward, or name a dataset of demonstrations or rankings.",
            )
        if against and model_kind(against, sampling.trust_remote_code) == "reward":
            raise UserError(f"--against {against}: a reward model gives no answers", remedy="Name an SFT or PPO run.")
        test = PolicyTest(data, split, limit, reward, n, sampling.params(model), sampling, system)
        result = _facts(model, data, split) | _evaluate_policies(model, against, test)
    _finish(result, output, as_json)


def _only(datasets: list[Path]) -> Path:
    """The dataset, where exactly one is needed.

    Raises:
        UserError: None is named, or several.
    """
    if len(datasets) != 1:
        what = "name a dataset" if not datasets else f"{len(datasets)} datasets are named, but a policy takes one"
        raise UserError(what, remedy="rlhf evaluate MODEL DATASET")
    return datasets[0]


def _facts(model: str, data: Dataset, split: str | None) -> dict[str, Any]:
    return {"model": model, "dataset": str(data.path), "fingerprint": data.fingerprint, "split": split}


def _finish(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    if output is not None:
        options.write_whole(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if as_json:
        print_json(result)


# ---- prompting ---------------------------------------------------------------------------------------------------


def _evaluate_prompting(
    model: str, prompting: list[str], shots: str | None, config: TaskConfig, sampling: SamplingOptions,
    system: str | None, answers: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Each way of prompting measured on a task, printed and returned."""
    ways, counts = [read_prompting(spec) for spec in prompting], parse_shots(shots)
    ways = [way.with_shots(count) for way in ways for count in counts] if counts else ways
    config = task_options.with_label_metrics(config, ways)
    task, params = load_task(config), sampling.params(model)
    for way in ways:
        check_way(way, task.rules.labels, sampling.temperature)
    from rlhf.prompting.evaluation import answer_rows, evaluate_prompting, show  # imports torch
    from rlhf.prompting.masked import open_prompted

    opened = open_prompted(model, sampling.chat_template, sampling.trust_remote_code)
    given = (params, sampling.temperature, sampling.seed, system)
    cells = [evaluate_prompting(opened, task, way, *given) for way in ways]
    show(cells, task, model)
    if answers is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answer_rows(cells)]
        options.write_whole(answers, "".join(lines))
    facts = {"model": model, "split": config.split, "seed": sampling.seed, "sampling": asdict(params), **task.facts()}
    return facts | {"prompting": [cell.as_dict() for cell in cells]}


# ---- policies ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyTest:
    """What policies are measured on, the same for each of them."""

    data: Dataset
    split: str | None
    limit: int | None
    reward: str | None
    n: int
    params: SamplingParams
    options: SamplingOptions
    system: str | None

    def measure(self, path: str) -> tuple[dict[str, Any], list[list[float]], dict[str, str]]:
        """A policy's metrics, its scores ([prompt][completion], empty without a reward) and its text fingerprints."""
        from rlhf.inference.evaluation import demonstration_loss, sampled_metrics  # imports torch

        policy = self.options.open(path)
        metrics: dict[str, Any] = {}
        scores: list[list[float]] = []
        if self.data.kind != "prompt":
            metrics |= demonstration_loss(policy, list(chosen_records(self.data, self.split, self.limit)))
        if self.reward:
            prompts = [with_system(one, self.system) for one in chosen_prompts(self.data, self.split, self.limit)]
            found, scores = sampled_metrics(policy, prompts, self.reward, self.params, self.options.seed, self.n)
            metrics |= found
        return metrics, scores, policy.chat.fingerprints()


def _evaluate_policies(model: str, against: str | None, test: PolicyTest) -> dict[str, Any]:
    """Metrics of one or two policies, printed and returned."""
    from rlhf.inference.evaluation import compare_scores  # imports torch

    metrics, scores, text = test.measure(model)
    result: dict[str, Any] = {"policy": metrics}
    if test.reward:
        result |= {"reward": test.reward, "seed": test.options.seed, "sampling": asdict(test.params)}
    columns = [metrics]
    if against is not None:
        other, other_scores, other_text = test.measure(against)
        columns.append(other)
        result["against"] = {"model": against, **other}
        if text != other_text:
            warn("the two have different tokenizers or chat templates: loss and perplexity are not comparable")
        if scores:
            result["comparison"] = compare_scores(scores, other_scores)
    rows = [(label, *[column[key] for column in columns]) for key, label in LABELS.items() if key in metrics]
    table(f"Held-out: {test.data.path}", ["", model, *([against] if against else [])], rows)
    if "comparison" in result:
        _show_comparison(result["comparison"], model, str(against))
    return result


LABELS = {
    "records": "answers in the data",
    "loss": "loss, nats a token",
    "perplexity": "perplexity",
    "prompts": "prompts",
    "refused": "prompts refused by the chat template",
    "score": "mean score",
    "score_low": "  95% interval, low",
    "score_high": "  95% interval, high",
    "answer_tokens": "answer length, tokens",
    "eos_rate": "answers that ended",
}


def _show_comparison(found: dict[str, Any], model: str, against: str) -> None:
    low, high = found["interval"]
    say(f"{model} wins over {against}: {found['win_rate']:.1%} (95% Wilson interval {low:.1%} to {high:.1%})")
    say(f"{found['wins']} wins, {found['ties']} ties, {found['losses']} losses; a tie counts half")


# ---- reward models -----------------------------------------------------------------------------------------------


def _evaluate_reward(
    model: str, dataset: Path, split: str | None, limit: int | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Agreement of a reward model with rankings, printed and returned."""
    data = open_dataset(dataset)
    if data.kind != "ranking":
        raise UserError(f"{data.path}: holds {data.kind}s; a reward model is measured on rankings")
    from rlhf.inference.reward_model import open_reward_model  # imports torch
    from rlhf.reward.metrics import metric_rows, reward_metrics

    reward, counts = open_reward_model(model, trust_remote_code), EncodingCounts()
    rows = [row for row in reward.encode(chosen_records(data, split, limit), counts) if row is not None]
    if not rows:
        raise UserError(f"no ranking fits in the {reward.limit:,} tokens of {model}")
    counts.kept = len(rows)
    counts.report("rankings")
    humans = Agreement.of([data])
    metrics = reward_metrics(reward.score(rows))
    metrics |= humans.metrics() if humans else {}
    for part in metric_rows(metrics):
        table(*part)
    if humans:
        say(humans.compared_with(metrics["accuracy"]))
    return _facts(model, data, split) | {"rankings": len(rows), "skipped": dict(counts.skipped), "metrics": metrics}
