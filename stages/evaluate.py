"""`rlhf evaluate`: a policy on demonstrations and by a reward, alone or against another; a reward model on rankings,
benchmarks and perturbed answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli import options, task_options
from rlhf.cli.sampling_options import SamplingOptions, with_options, with_sampling
from rlhf.core.console import print_json, say
from rlhf.core.errors import UserError, blame
from rlhf.core.files import check_writable
from rlhf.data.selection import chosen_records
from rlhf.data.store import Dataset, open_dataset
from rlhf.judging.config import read_judge
from rlhf.policy_evaluation.ranked import RANKINGS, REFERENCES
from rlhf.prompting.ways import check_way, parse_shots, read_prompting
from rlhf.reward.agreement import Agreement
from rlhf.tasks.task import load_task


@dataclass(frozen=True)
class PolicyOptions:
    """By what policies are measured.

    Args:
        against (RUN|MODEL|references): Compare with this policy, or the dataset's own answers: whose are better by
            --reward or --judge?
        judge (URL|FILE|{...}|rankings): With --against: this judge on a server compares the answers. `rankings`: people
            did, in DATASET, whose candidates name MODEL and others as authors.
        reference (RUN|MODEL): Also estimate the KL of the policies' answers to this model.
    """

    reward: options.Reward = None
    against: str | None = None
    judge: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class PromptingOptions:
    """How a policy is prompted, and its answers are read.

    Args:
        prompting (WAY|FILE|{...}): Measure answers to prompts of this kind: zero-shot, few-shot, cloze,
            chain-of-thought, a YAML file, or '{name: few-shot, shots: 8}'. May be repeated.
        shots (N,N,...): With --prompting: numbers of examples, each in its own line.
        answers: With --prompting: write the answers to this JSON-lines file.
    """

    prompting: list[str] | None = None
    shots: str | None = None
    metric: task_options.Metric = None
    labels: task_options.Labels = None
    pattern: task_options.Pattern = None
    answers: Path | None = None


@dataclass(frozen=True)
class RewardOptions:
    """What reward models are measured on.

    Args:
        perturb: For a reward model: score answers again after changes that should not raise a score.
        perturb_rankings (N): With --perturb: use at most this many rankings of each dataset.
        benchmark (NAME): For a reward model: all rankings are from this benchmark: reward-bench-2 or rm-bench. By
            default, the `source` of each ranking names it.
    """

    perturb: bool = False
    perturb_rankings: Annotated[int, typer.Option(min=2)] = 100
    benchmark: str | None = None


OF_POLICIES, OF_PROMPTING, OF_REWARDS, OF_SAMPLING = (
    {field.name for field in fields(group)}
    for group in (PolicyOptions, PromptingOptions, RewardOptions, SamplingOptions)
)
OF_ANSWERS = OF_SAMPLING - {"seed", "trust_remote_code"} | {"n", "system"}
"""Options of sampled answers."""


@dataclass(frozen=True)
class EvaluationSubject:
    """What is measured, on which records."""

    model: str
    data: list[Dataset]
    split: str | None
    limit: int | None
    html: Path | None
    sampling: SamplingOptions

    @property
    def only(self) -> Dataset:
        """The dataset, where exactly one is needed.

        Raises:
            UserError: None is named, or several.
        """
        if len(self.data) != 1:
            count = len(self.data)
            what = f"{count} datasets are named, but a policy takes one" if count else "name a dataset"
            raise UserError(what, remedy="rlhf evaluate MODEL DATASET")
        return self.data[0]

    def facts(self) -> dict[str, Any]:
        """What is recorded about it, where there is one dataset."""
        data = self.only
        return {"model": self.model, "dataset": str(data.path), "fingerprint": data.fingerprint, "split": self.split}

    def write_page(self, text: str) -> None:
        """Write the results as a page."""
        options.write_whole(self.html, text)
        say(f"Page: {self.html}")


@with_sampling
@with_options("rewards", RewardOptions)
@with_options("asked", PromptingOptions)
@with_options("policy", PolicyOptions)
def command(
    context: typer.Context,
    model: str,
    datasets: list[Path] | None = None,
    *,
    dataset: list[Path] | None = None,
    split: options.Split = None,
    limit: options.Limit = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1)] = 1,
    system: options.System = None,
    lm_eval: str | None = None,
    html: Path | None = None,
    output: options.Out = None,
    as_json: options.Json = False,
    policy: PolicyOptions,
    asked: PromptingOptions,
    rewards: RewardOptions,
    sampling: SamplingOptions,
) -> None:
    """Measure a model on held-out data.

    Args:
        model (RUN|MODEL): A run, a model folder, a hub name, or a reward source as for --reward.
        datasets ([DATASET]...): For a policy: demonstrations, rankings (their best answers), prompts. For a reward
            model: rankings.
        dataset: The same as an argument DATASET; may be repeated.
        n: Number of answers to each prompt.
        lm_eval (TASK,...|FILE|{...}): Run these tasks of lm-evaluation-harness instead of a dataset, such as
            arc_easy,hellaswag or '{tasks: [mine], include_path: tasks, num_fewshot: 5}'.
        html: Write the results to this HTML file.
        output: Write the metrics to this JSON file.
    """
    for option, path in (("--out", output), ("--answers", asked.answers), ("--html", html)):
        check_writable(path, option)
    refuse = partial(options.refuse_given, context)
    if not asked.prompting:
        refuse(OF_PROMPTING, "is for --prompting")
    if lm_eval:
        ignored = {"datasets", "dataset", "split", "limit", "html"} | OF_REWARDS | OF_POLICIES | OF_PROMPTING
        why = "is not for --lm-eval, whose tasks have their own data and sampling"
        refuse((ignored | OF_ANSWERS) - {"against", "chat_template"}, why)
        from rlhf.policy_evaluation.harness import evaluate_harness

        _finish(evaluate_harness(model, policy.against, lm_eval, sampling), output, as_json)
        return
    data = [open_dataset(path) for path in (*(datasets or ()), *(dataset or ()))]
    subject = EvaluationSubject(model, data, split, limit, html, sampling)
    if asked.prompting:
        why = "is not for --prompting, whose answers have a right one"
        refuse(OF_POLICIES | OF_REWARDS | {"html", "n"}, why)
        result = _evaluate_prompting(subject, asked, system)
    elif policy.judge == RANKINGS:
        refuse(OF_ANSWERS | OF_REWARDS | {"reward", "reference"}, "is not for --judge rankings, which loads no model")
        result = _evaluate_ranked(subject, policy.against)
    elif _is_reward(subject):
        refuse(OF_ANSWERS | OF_POLICIES, f"is for policies, and {model} is a reward model")
        if not rewards.perturb:
            refuse({"perturb_rankings"}, "is for --perturb")
        result = _evaluate_reward(subject, rewards)
    else:
        refuse(OF_REWARDS, f"is for reward models, and {model} is a policy")
        sampled = bool(policy.reward or policy.judge or policy.reference or html)
        if not sampled:
            why = "is for sampled answers, which need --reward, --judge, --reference or --html"
            refuse(OF_ANSWERS - {"chat_template"}, why)
        result = _evaluate_policies(subject, policy, n, system, sampled)
    _finish(result, output, as_json)


def _is_reward(subject: EvaluationSubject) -> bool:
    from rlhf.evaluation.scored import is_single_model  # imports torch
    from rlhf.inference.policy import model_kind

    model = subject.model
    return not is_single_model(model) or model_kind(model, subject.sampling.trust_remote_code) == "reward"


def _finish(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    if output is not None:
        options.write_json(output, result)
        say(f"Metrics: {output}")
    if as_json:
        print_json(result)


# ---- prompting ---------------------------------------------------------------------------------------------------


def _evaluate_prompting(subject: EvaluationSubject, asked: PromptingOptions, system: str | None) -> dict[str, Any]:
    """Each way of prompting measured on a task, printed and returned."""
    model, sampling, place = subject.model, subject.sampling, str(subject.only.path)
    config = task_options.task_config(
        place, subject.split, subject.limit, asked.metric, asked.labels, asked.pattern
    )  # fmt: skip
    ways, counts = [read_prompting(spec) for spec in asked.prompting or ()], parse_shots(asked.shots)
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
    if asked.answers is not None:
        options.write_rows(asked.answers, answer_rows(cells))
    facts = {"model": model, "split": config.split, "seed": sampling.seed, "sampling": asdict(params), **task.facts()}
    return facts | {"prompting": [cell.as_dict() for cell in cells]}


# ---- policies ----------------------------------------------------------------------------------------------------


def _evaluate_policies(
    subject: EvaluationSubject, policy: PolicyOptions, n: int, system: str | None, sampled: bool
) -> dict[str, Any]:
    """One or two policies, printed, written as a page, and returned; `sampled`: their answers are measured."""
    model, data, sampling = subject.model, subject.only, subject.sampling
    _check_comparison(data, policy, sampled)
    from rlhf.inference.policy import model_kind  # imports torch

    for option, path in (("--against", policy.against), ("--reference", policy.reference)):
        if path and path != REFERENCES and model_kind(path, sampling.trust_remote_code) == "reward":
            raise UserError(f"{option} {path}: a reward model gives no answers", remedy="Name an SFT or PPO run.")
    from rlhf.policy_evaluation.examples import of_answers
    from rlhf.policy_evaluation.policies import PolicyTest, evaluate_policies
    from rlhf.policy_evaluation.tables import show

    judge, params = read_judge(policy.judge) if policy.judge else None, sampling.params(model)
    test = PolicyTest(
        data, subject.split, subject.limit, policy.reward, judge, policy.reference, sampled, n, params, sampling, system
    )  # fmt: skip
    found, mine, theirs = evaluate_policies(model, policy.against, test)
    result = subject.facts() | found
    show(result)
    if subject.html is not None:
        from rlhf.policy_evaluation.page import render  # imports matplotlib

        subject.write_page(render(result, of_answers(mine, theirs) if mine is not None else [], mine, theirs))
    return result


def _check_comparison(data: Dataset, policy: PolicyOptions, sampled: bool) -> None:
    """Check that a policy can be measured on the dataset.

    Raises:
        UserError: It cannot.
    """
    compared = policy.reward or policy.judge
    if data.kind == "prompt" and not sampled:
        raise UserError(
            f"{data.path}: prompts without answers cannot measure a policy",
            remedy="Give --reward or --reference, or name a dataset of demonstrations or rankings.",
        )
    if policy.judge and not policy.against:
        raise UserError("--judge: needs answers to compare with", remedy="Give --against RUN or references.")
    if policy.against == REFERENCES and data.kind == "prompt":
        raise UserError(f"{data.path}: has no answers to compare with", remedy="Name demonstrations or rankings.")
    if policy.against == REFERENCES and not compared:
        raise UserError("--against references: needs something that compares", remedy="Give --reward or --judge.")


def _evaluate_ranked(subject: EvaluationSubject, against: str | None) -> dict[str, Any]:
    """Win rates from human rankings, printed, written as a page, and returned."""
    data = subject.only
    if data.kind != "ranking":
        raise UserError(f"{data.path}: holds {data.kind}s", "--judge rankings needs human rankings of answers.")
    from rlhf.policy_evaluation.examples import of_rankings  # imports torch
    from rlhf.policy_evaluation.ranked import ranked_comparisons
    from rlhf.policy_evaluation.tables import show

    records = list(chosen_records(data, subject.split, subject.limit))
    found, pairs = ranked_comparisons(records, subject.model, against)
    result = subject.facts() | {"judge": RANKINGS, "comparisons": found}
    show(result)
    if subject.html is not None:
        from rlhf.policy_evaluation.page import render  # imports matplotlib

        subject.write_page(render(result, of_rankings(pairs[found[0]["against"]]), None, None))
    return result


# ---- reward models -----------------------------------------------------------------------------------------------


def _evaluate_reward(subject: EvaluationSubject, rewards: RewardOptions) -> dict[str, Any]:
    """A reward model on each dataset, printed, written as a page, and returned."""
    _check_rankings(subject.data, rewards.benchmark)
    from rlhf.evaluation.battery import battery  # imports torch
    from rlhf.evaluation.card import dataset_card
    from rlhf.evaluation.scored import open_answer_scorer
    from rlhf.evaluation.tables import show_card

    seed, model, cards = subject.sampling.seed, subject.model, []
    scorer = open_answer_scorer(model, subject.sampling.trust_remote_code)
    for data in subject.data:
        records = list(chosen_records(data, subject.split, subject.limit))
        card = dataset_card(scorer, data, records, _agreement(data), rewards.benchmark, seed)
        card["perturbations"] = battery(scorer, records, rewards.perturb_rankings, seed) if rewards.perturb else None
        _check_scored(card)
        cards.append(card)
        show_card(card, model)
    result = {"model": model, "split": subject.split, "seed": seed, "datasets": cards}
    if subject.html is not None:
        from rlhf.evaluation.page import render  # imports matplotlib

        subject.write_page(render(result))
    return result


def _check_rankings(datasets: list[Dataset], benchmark: str | None) -> None:
    """Check datasets and the benchmark before a model is loaded.

    Raises:
        UserError: No dataset, one without rankings, or an unknown benchmark.
    """
    from rlhf.evaluation.benchmarks import BENCHMARKS

    if not datasets:
        raise UserError("name a dataset of rankings", remedy="rlhf evaluate MODEL DATASET...")
    for data in datasets:
        if data.kind != "ranking":
            what = f"{data.path}: holds {data.kind}s; a reward model is measured on rankings"
            raise UserError(what, remedy="Name a dataset of rankings; `rlhf data import` makes one.")
    if benchmark is not None:
        with blame("--benchmark"):
            BENCHMARKS[benchmark]


def _check_scored(card: dict[str, Any]) -> None:
    """Refuse rankings none of which fits its benchmark.

    Raises:
        UserError: There are none.
    """
    from rlhf.evaluation import tables

    for benchmark in card["benchmarks"]:
        if benchmark["score"] is None:
            what = f"{card['dataset']}: no ranking has the form of {benchmark['name']}"
            remedy = "Import the benchmark's own file with `rlhf data import auto`; --benchmark is for such rankings."
            raise UserError(what, "; ".join(tables.notes(benchmark)), remedy)


def _agreement(data: Dataset) -> Agreement | None:
    """Human agreement: from the manifest, else from the votes of named annotators in the dataset."""
    if (noted := Agreement.of([data])) is not None:
        return noted
    from data_tools.statistics.accumulator import accumulated  # imports numpy
    from data_tools.statistics.agreement import agreement_of

    facts = agreement_of(accumulated(data))
    if facts is None:
        return None
    low, high = facts["interval"]
    return Agreement(facts["agreement"], facts["ceiling"], (low, high))
