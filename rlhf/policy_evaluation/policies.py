"""One policy, or two, measured on a dataset: what is measured, and the result as `rlhf evaluate` writes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlhf.cli.sampling_options import SamplingOptions
from rlhf.core.console import warn
from rlhf.data.schema import Prompt
from rlhf.data.selection import chosen_prompts, chosen_records, with_system
from rlhf.data.store import Dataset
from rlhf.inference.policy import Policy
from rlhf.judging.config import JudgeConfig
from rlhf.judging.judge import Judge
from rlhf.policy_evaluation.measures import (
    Losses,
    PolicyAnswers,
    compare_answers,
    demonstration_losses,
    reference_answers,
    sampled_metrics,
)
from rlhf.policy_evaluation.ranked import REFERENCES
from rlhf.rollout.types import SamplingParams


@dataclass(frozen=True)
class PolicyTest:
    """What policies are measured on, the same for each of them."""

    data: Dataset
    split: str | None
    limit: int | None
    reward: str | None
    judge: JudgeConfig | None
    reference: str | None
    sampled: bool
    """Whether answers are sampled; a reward, a judge or a reference needs them."""
    n: int
    params: SamplingParams
    options: SamplingOptions
    system: str | None

    def prompts(self) -> list[Prompt]:
        """The prompts that are answered."""
        return [with_system(one, self.system) for one in chosen_prompts(self.data, self.split, self.limit)]

    def compare(self, mine: PolicyAnswers, theirs: PolicyAnswers) -> dict[str, Any]:
        """Whose answers win, by the judge if there is one, else by the reward."""
        if self.judge is None:
            return compare_answers(mine, theirs)
        with Judge(self.judge, "pairwise") as judge:
            return compare_answers(mine, theirs, judge)


def _measure(
    test: PolicyTest, policy: Policy, reference: Policy | None
) -> tuple[dict[str, Any], Losses | None, PolicyAnswers | None]:
    metrics: dict[str, Any] = {}
    losses = answers = None
    if test.data.kind != "prompt":
        losses = demonstration_losses(policy, list(chosen_records(test.data, test.split, test.limit)))
        metrics |= losses.metrics()
    if test.sampled:
        found, answers = sampled_metrics(
            policy, test.prompts(), test.reward, test.params, test.options.seed, test.n, reference
        )
        metrics |= found
    return metrics, losses, answers


def evaluate_policies(
    model: str, against: str | None, test: PolicyTest
) -> tuple[dict[str, Any], PolicyAnswers | None, PolicyAnswers | None]:
    """The metrics of a policy, and of another or the dataset's own answers, and the comparison of the two.

    Returns:
        The result of `rlhf evaluate`, and the answers of both that its page shows.

    Raises:
        UserError: A model, the reward or the judge cannot be used, or nothing can be measured.
    """
    policy = test.options.open(model)
    reference = policy if test.reference == model else test.options.open(test.reference) if test.reference else None
    metrics, losses, mine = _measure(test, policy, reference)
    result: dict[str, Any] = {"policy": metrics}
    if mine is not None:
        result |= {"reward": test.reward, "seed": test.options.seed, "sampling": asdict(test.params)}
        result |= {"reference": test.reference}
    theirs = None
    if against == REFERENCES:
        theirs = reference_answers(policy, test.prompts(), test.reward, test.n)
        result["against"] = {"model": against}
    elif against is not None:
        second = test.options.open(against)
        metrics, other_losses, theirs = _measure(test, second, reference)
        result["against"] = {"model": against, **metrics}
        if policy.chat.fingerprints() != second.chat.fingerprints():
            warn("the two have different tokenizers or chat templates: loss and perplexity are not comparable")
        elif losses is not None and other_losses is not None:
            result["loss_difference"] = losses.minus(other_losses)
    if mine is not None and theirs is not None and (test.reward or test.judge):
        result["comparison"] = test.compare(mine, theirs)
    return result, mine, theirs
