"""The options of every command that samples from a policy, defined once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from rlhf.cli import options
from rlhf.cli.options import TrustRemoteCode
from rlhf.core.lazy_group import described
from rlhf.inference.sampling_params import sampling_params
from rlhf.rollout.types import SamplingParams

if TYPE_CHECKING:  # imports torch
    from rlhf.inference.policy import Policy

_DEFAULT = "By default as a PPO run sampled in training, else"


@dataclass(frozen=True)
class SamplingOptions:
    """How a command loads a policy and samples from it.

    Args:
        stop (TEXT): An answer also ends after this text; may be repeated.
        seed: Random seed.
        chat_template: auto (the model's own, else `default`), default, plain, encoder-decoder, or the path of a Jinja
            file.
    """

    temperature: Annotated[
        float | None, typer.Option(metavar="T", help=f"Divides the logits; 0 is greedy. {_DEFAULT} 1.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help=f"Sample among the K most likely tokens; 0 is off. {_DEFAULT} off.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help=f"Sample among the most likely tokens of this total probability. {_DEFAULT} 1.")
    ] = None
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help=f"Longest answer in tokens. {_DEFAULT} 128.")] = None
    min_new_tokens: Annotated[int | None, typer.Option(min=0, help=f"Shortest answer in tokens. {_DEFAULT} 0.")] = None
    stop: list[str] | None = None
    seed: options.NotNegative = 0
    chat_template: str = "auto"
    trust_remote_code: TrustRemoteCode = False

    def params(self, model: str) -> SamplingParams:
        """How to sample from a run, model folder or hub name.

        Raises:
            UserError: A value is out of its range.
        """
        return sampling_params(
            model, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            max_new_tokens=self.max_new_tokens, min_new_tokens=self.min_new_tokens, stop=self.stop,
        )  # fmt: skip

    def open(self, model: str) -> Policy:
        """Load the policy of a run, model folder or hub name.

        Raises:
            UserError: See `open_policy`.
        """
        from rlhf.inference.policy import open_policy  # imports torch

        return open_policy(model, self.chat_template, self.trust_remote_code)


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command: its keyword `sampling: SamplingOptions` becomes one option for each field."""
    return with_options("sampling", SamplingOptions)(command)


def with_options(keyword: str, group: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: its keyword, an instance of the dataclass `group`, becomes one option for each field."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(group, include_extras=True)
        signature = inspect.signature(command, eval_str=True)
        kept = [parameter for name, parameter in signature.parameters.items() if name != keyword]
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        options = described(
            (
                inspect.Parameter(f.name, keyword_only, default=f.default, annotation=hints[f.name])
                for f in fields(group)
            ),
            inspect.getdoc(group) or "",
        )

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            chosen = {option.name: given.pop(option.name) for option in options}
            command(**{keyword: group(**chosen)}, **given)

        wrapper.__signature__ = signature.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
        return wrapper

    return decorate
