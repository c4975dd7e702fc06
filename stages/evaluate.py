"""`rlhf evaluate`: a policy on demonstrations and by a reward, alone or against another; a reward model on rankings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli import options
from rlhf.cli.sampling_options import SamplingOptions, with_sampling
from rlhf.core.console import print_json, say, table, warn
from rlhf.core.errors import UserError
from rlhf.data.encode_records import EncodingCounts
from rlhf.data.selection import chosen_prompts, chosen_records, with_system
from rlhf.data.store import Dataset, open_dataset
from rlhf.reward.agreement import Agreement
from rlhf.rollout.types import SamplingParams


@with_sampling
def command(
    model: options.Model,
    dataset: Annotated[
        Path,
        typer.Option(
            help="For a policy: demonstrations, rankings (their best answers) or prompts. For a reward model: rankings."
        ),
    ],
    split: options.Split = None,
    limit: options.Limit = None,
    reward: options.Reward = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN|MODEL", help="Compare with this policy: whose answers score higher?")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of answers to each prompt, with --reward.")] = 1,
    system: options.System = None,
    output: Annotated[Path | None, typer.Option("--out", help="Write the metrics here, as JSON.")] = None,
    as_json: options.Json = False,
    *,
    sampling: SamplingOptions,
) -> None:
    """Measure a model on held-out data."""
    options.check_writable(output, "--out")
    data = open_dataset(dataset)
    from rlhf.inference.policy import model_kind  # imports torch

    result: dict[str, Any] = {"model": model, "dataset": str(dataset), "fingerprint": data.fingerprint, "split": split}
    if model_kind(model, sampling.trust_remote_code) == "reward":
        if reward or against:
            raise UserError(f"{model}: is a reward model; --reward and --against are for policies")
        result |= _evaluate_reward(model, data, split, limit, sampling.trust_remote_code)
    else:
        if data.kind == "prompt" and not reward:
            raise UserError(
                f"{data.path}: prompts alone give nothing to measure a policy by",
                remedy="Score its answers with --reward, or name a dataset of demonstrations or rankings.",
            )
        if against and model_kind(against, sampling.trust_remote_code) == "reward":
            raise UserError(f"--against {against}: a reward model gives no answers", remedy="Name an SFT or PPO run.")
        test = PolicyTest(data, split, limit, reward, n, sampling.params(model), sampling, system)
        result |= _evaluate_policies(model, against, test)
    if output is not None:
        options.write_whole(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if as_json:
        print_json(result)


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
    model: str, data: Dataset, split: str | None, limit: int | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Agreement of a reward model with rankings, printed and returned."""
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
    return {"rankings": len(rows), "skipped": dict(counts.skipped), "metrics": metrics}
