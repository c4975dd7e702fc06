"""`rlhf evaluate`: a policy on demonstrations and by a reward, alone or against another; a reward model on rankings,
benchmarks and perturbed answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.cli import options, task_options
from rlhf.cli.sampling_options import SamplingOptions, with_sampling
from rlhf.core.console import print_json, say
from rlhf.core.errors import UserError
from rlhf.core.files import check_writable
from rlhf.data.selection import chosen_records
from rlhf.data.store import Dataset, open_dataset
from rlhf.judging.config import read_judge
from rlhf.policy_evaluation.ranked import RANKINGS, REFERENCES
from rlhf.prompting.ways import check_way, parse_shots, read_prompting
from rlhf.reward.agreement import Agreement
from rlhf.tasks.config import TaskConfig
from rlhf.tasks.task import load_task

OF_ANSWERS = frozenset(
    {"n", "system", "temperature", "top_k", "top_p", "max_new_tokens", "min_new_tokens", "stop", "chat_template"}
)
"""Options of sampled answers."""


@with_sampling
def command(
    context: typer.Context,
    model: str,
    datasets: list[Path] | None = None,
    *,
    dataset: list[Path] | None = None,
    split: options.Split = None,
    limit: options.Limit = None,
    reward: options.Reward = None,
    against: str | None = None,
    judge: str | None = None,
    reference: str | None = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1)] = 1,
    system: options.System = None,
    prompting: list[str] | None = None,
    shots: str | None = None,
    metric: task_options.Metric = None,
    labels: task_options.Labels = None,
    pattern: task_options.Pattern = None,
    answers: Path | None = None,
    perturb: bool = False,
    perturb_rankings: Annotated[int, typer.Option(min=2)] = 100,
    benchmark: str | None = None,
    lm_eval: str | None = None,
    html: Path | None = None,
    output: options.Out = None,
    as_json: options.Json = False,
    sampling: SamplingOptions,
) -> None:
    """Measure a model on held-out data.

    Args:
        model (RUN|MODEL): A run, a model folder, a hub name, or a reward source as for --reward.
        datasets ([DATASET]...): For a policy: demonstrations, rankings (their best answers), prompts. For a reward
            model: rankings.
        dataset: The same as an argument DATASET; may be repeated.
        against (RUN|MODEL|references): Compare with this policy, or the dataset's own answers: whose are better by
            --reward or --judge?
        judge (URL|FILE|{...}|rankings): With --against: this judge on a server compares the answers. `rankings`: people
            did, in DATASET, whose candidates name MODEL and others as authors.
        reference (RUN|MODEL): Also estimate the KL of the policies' answers to this model.
        n: Number of answers to each prompt.
        prompting (WAY|FILE|{...}): Measure answers to prompts of this kind: zero-shot, few-shot, cloze,
            chain-of-thought, a YAML file, or '{name: few-shot, shots: 8}'. May be repeated.
        shots (N,N,...): With --prompting: numbers of examples, each in its own line.
        answers: With --prompting: write the answers to this JSON-lines file.
        perturb: For a reward model: score answers again after changes that should not raise a score.
        perturb_rankings (N): With --perturb: use at most this many rankings of each dataset.
        benchmark (NAME): For a reward model: all rankings are from this benchmark: reward-bench-2 or rm-bench. By
            default, the `source` of each ranking names it.
        lm_eval (TASK,...|FILE|{...}): Run these tasks of lm-evaluation-harness instead of a dataset, such as
            arc_easy,hellaswag or '{tasks: [mine], include_path: tasks, num_fewshot: 5}'.
        html: Write the results to this HTML file.
        output: Write the metrics to this JSON file.
    """
    check_writable(output, "--out")
    check_writable(answers, "--answers")
    check_writable(html, "--html")
    named = [*(datasets or ()), *(dataset or ())]
    if not prompting and (shots or metric or labels or pattern or answers):
        raise UserError("--shots, --metric, --labels, --pattern and --answers are for --prompting", remedy="Give it.")
    for_rewards = perturb or benchmark
    if lm_eval:
        if named or for_rewards or html or prompting or reward or judge or reference:
            what = "--lm-eval takes only MODEL, --against, --seed, --chat-template, --out and --json"
            raise UserError(what, "Its tasks have their own data and sampling.")
        ignored = {"split", "limit", "perturb_rankings"} | OF_ANSWERS - {"chat_template"}
        options.refuse_given(context, ignored, "is not for --lm-eval, whose tasks have their own data and sampling")
        from rlhf.policy_evaluation.harness import evaluate_harness

        _finish(evaluate_harness(model, against, lm_eval, sampling), output, as_json)
        return
    if prompting:
        if for_rewards or html:
            raise UserError("--perturb, --benchmark and --html are not for --prompting")
        if reward or against or judge or reference:
            raise UserError(
                "--reward, --against, --judge and --reference are not for --prompting, whose answers have a right one"
            )
        options.refuse_given(context, {"n", "perturb_rankings"}, "is not for --prompting")
        task = task_options.task_config(str(_only(named)), split, limit, metric, labels, pattern)
        result = _evaluate_prompting(model, prompting, shots, task, sampling, system, answers)
        _finish(result, output, as_json)
        return
    if judge == RANKINGS:
        if for_rewards or reward or reference:
            raise UserError("--judge rankings loads no model: leave out --reward, --reference, --perturb, --benchmark")
        options.refuse_given(context, OF_ANSWERS | {"perturb_rankings"}, "is for answers that a model writes")
        result = _evaluate_ranked(model, against, open_dataset(_only(named)), split, limit, html)
        _finish(result, output, as_json)
        return
    test = RewardTest([open_dataset(path) for path in named], split, limit, benchmark, sampling.seed)
    from rlhf.evaluation.scored import is_single_model  # imports torch
    from rlhf.inference.policy import model_kind

    if not is_single_model(model) or model_kind(model, sampling.trust_remote_code) == "reward":
        if reward or against or judge or reference:
            what = "--reward, --against, --judge and --reference are for policies"
            raise UserError(f"{model}: is a reward model; {what}")
        options.refuse_given(context, OF_ANSWERS, f"is for policies, and {model} is a reward model")
        if not perturb:
            options.refuse_given(context, ["perturb_rankings"], "is for --perturb")
        test.check()
        result = _evaluate_reward(model, test, perturb_rankings if perturb else 0, html, sampling.trust_remote_code)
    else:
        if for_rewards:
            raise UserError(f"{model}: is a policy; --perturb and --benchmark are for reward models")
        options.refuse_given(context, ["perturb_rankings"], f"is for reward models, and {model} is a policy")
        data = open_dataset(_only(named))
        _check_comparison(data, reward, against, judge, bool(reference or html))
        for option, path in (("--against", against), ("--reference", reference)):
            if path and path != REFERENCES and model_kind(path, sampling.trust_remote_code) == "reward":
                raise UserError(f"{option} {path}: a reward model gives no answers", remedy="Name an SFT or PPO run.")
        from rlhf.policy_evaluation.policies import PolicyTest

        sampled = bool(reward or judge or reference or html)
        if not sampled:
            why = "is for sampled answers, which need --reward, --judge, --reference or --html"
            options.refuse_given(context, OF_ANSWERS - {"chat_template"}, why)
        asked = read_judge(judge) if judge else None
        params = sampling.params(model)
        policies = PolicyTest(data, split, limit, reward, asked, reference, sampled, n, params, sampling, system)
        result = _evaluate_policies(model, against, policies, html)
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


def _check_comparison(data: Dataset, reward: str | None, against: str | None, judge: str | None, more: bool) -> None:
    """Check that a policy can be measured on the dataset; `more`: its answers are measured in another way too.

    Raises:
        UserError: It cannot.
    """
    if data.kind == "prompt" and not (reward or judge or more):
        raise UserError(
            f"{data.path}: prompts without answers cannot measure a policy",
            remedy="Give --reward or --reference, or name a dataset of demonstrations or rankings.",
        )
    if judge and not against:
        raise UserError("--judge: needs answers to compare with", remedy="Give --against RUN or references.")
    if against == REFERENCES and data.kind == "prompt":
        raise UserError(f"{data.path}: has no answers to compare with", remedy="Name demonstrations or rankings.")
    if against == REFERENCES and not (reward or judge):
        raise UserError("--against references: needs something that compares", remedy="Give --reward or --judge.")


def _finish(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    if output is not None:
        options.write_whole(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        say(f"Metrics: {output}")
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


def _evaluate_policies(model: str, against: str | None, test: Any, html: Path | None) -> dict[str, Any]:
    """One or two policies (`test` is a `PolicyTest`), printed, written as a page, and returned."""
    from rlhf.policy_evaluation.examples import of_answers  # imports torch
    from rlhf.policy_evaluation.policies import evaluate_policies
    from rlhf.policy_evaluation.tables import show

    found, mine, theirs = evaluate_policies(model, against, test)
    data = test.data
    facts = {"model": model, "dataset": str(data.path), "fingerprint": data.fingerprint, "split": test.split}
    result = facts | found
    show(result)
    if html is not None:
        _write_page(html, result, of_answers(mine, theirs) if mine is not None else [], mine, theirs)
    return result


def _evaluate_ranked(
    model: str, against: str | None, data: Dataset, split: str | None, limit: int | None, html: Path | None
) -> dict[str, Any]:
    """Win rates from human rankings, printed, written as a page, and returned."""
    if data.kind != "ranking":
        raise UserError(f"{data.path}: holds {data.kind}s", "--judge rankings needs human rankings of answers.")
    from rlhf.policy_evaluation.examples import of_rankings  # imports torch
    from rlhf.policy_evaluation.ranked import ranked_comparisons
    from rlhf.policy_evaluation.tables import show

    found, pairs = ranked_comparisons(list(chosen_records(data, split, limit)), model, against)
    result: dict[str, Any] = {"model": model, "dataset": str(data.path), "fingerprint": data.fingerprint}
    result |= {"split": split, "judge": RANKINGS, "comparisons": found}
    show(result)
    if html is not None:
        _write_page(html, result, of_rankings(pairs[found[0]["against"]]))
    return result


def _write_page(html: Path, result: dict[str, Any], examples: Any, mine: Any = None, theirs: Any = None) -> None:
    from rlhf.policy_evaluation.page import render  # imports matplotlib

    options.write_whole(html, render(result, examples, mine, theirs))
    say(f"Page: {html}")


# ---- reward models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardTest:
    """The data and options of a reward model's evaluation."""

    data: list[Dataset]
    split: str | None
    limit: int | None
    benchmark: str | None
    seed: int

    def check(self) -> None:
        """Check datasets and options before a model is loaded.

        Raises:
            UserError: No dataset, one without rankings, or an unknown benchmark.
        """
        from rlhf.evaluation.benchmarks import BENCHMARKS

        if not self.data:
            raise UserError("name a dataset of rankings", remedy="rlhf evaluate MODEL DATASET...")
        for data in self.data:
            if data.kind != "ranking":
                what = f"{data.path}: holds {data.kind}s; a reward model is measured on rankings"
                raise UserError(what, remedy="Name a dataset of rankings; `rlhf data import` makes one.")
        if self.benchmark is not None:
            try:
                BENCHMARKS[self.benchmark]
            except ValueError as error:
                raise UserError(f"--benchmark: {error}") from None


def _evaluate_reward(
    model: str, test: RewardTest, perturb_rankings: int, html: Path | None, trust_remote_code: bool
) -> dict[str, Any]:
    """A reward model on each dataset, printed, written as a page, and returned."""
    from rlhf.evaluation.battery import battery  # imports torch
    from rlhf.evaluation.card import dataset_card
    from rlhf.evaluation.scored import open_answer_scorer
    from rlhf.evaluation.tables import show_card

    scorer = open_answer_scorer(model, trust_remote_code)
    cards = []
    for data in test.data:
        records = list(chosen_records(data, test.split, test.limit))
        card = dataset_card(scorer, data, records, _agreement(data), test.benchmark, test.seed)
        card["perturbations"] = battery(scorer, records, perturb_rankings, test.seed) if perturb_rankings else None
        _check_scored(card)
        cards.append(card)
        show_card(card, model)
    result = {"model": model, "split": test.split, "seed": test.seed, "datasets": cards}
    if html is not None:
        from rlhf.evaluation.page import render  # imports matplotlib

        options.write_whole(html, render(result))
        say(f"Page: {html}")
    return result


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
    from data_tools.statistics.ceiling import agreement_of

    facts = agreement_of(accumulated(data))
    if facts is None:
        return None
    low, high = facts["interval"]
    return Agreement(facts["agreement"], facts["ceiling"], (low, high))
