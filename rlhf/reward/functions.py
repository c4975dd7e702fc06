"""Calls of a user's reward function: its value is checked and its time is limited."""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any

from pydantic import AfterValidator

from rlhf.core.errors import UserError
from rlhf.core.time_limit import TimeIsUp, time_limit


def import_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        ValueError: It cannot be imported or called.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} is not of the form module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's module, which may raise anything
        fault = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name!r} cannot be imported: {fault}; the working folder is on the path") from None
    if not callable(found):
        raise ValueError(f"{name!r} is not a function")
    return found


def _importable(name: str) -> str:
    import_function(name)
    return name


FunctionName = Annotated[str, AfterValidator(_importable)]

IN_PPO = "In PPO, the last checkpoint is usable."
LARGEST = 3.4028234663852886e38
"""The largest float32; scores are float32."""


def call_reward_function(
    function: Callable[..., Any], name: str, completions: Iterable[tuple[Sequence[Mapping[str, str]], str]],
    seconds: float,
) -> list[float]:  # fmt: skip
    """The scores of completions by a reward function.

    Args:
        function: Called with (prompt messages, answer). It gets a copy of the messages, which it may change.
        name: Its name in messages.
        completions: (prompt messages, answer) of each.
        seconds: How long one call may take; see `time_limit`.

    Raises:
        UserError: It raised an exception, took too long, or returned anything but one finite number. Names the prompt
            and the answer.
    """
    scores: list[float] = []
    try:
        with time_limit(seconds) as start:
            for messages, answer in completions:
                copies = [dict(message) for message in messages]
                start()
                value = function(copies, answer)
                score = _number(value)
                if score is None or not abs(score) <= LARGEST:  # NaN is not
                    break
                scores.append(score)
            else:
                return scores
    except TimeIsUp as error:
        fault = f"did not return within {seconds:g} s{_place(error)}"
        remedy = "Make it faster or give its own calls a time limit, or raise the reward's `timeout_seconds`."
    except (Exception, SystemExit) as error:
        fault = f"raised {type(error).__name__}: {error}{_place(error)}"
        remedy = f"Correct the function. {IN_PPO}"
    else:
        fault = f"returned {_short(value)}, not {'one' if score is None else 'a finite'} number"
        remedy = f"Return one number (int, float, or a tensor of one element). {IN_PPO}"
    prompt = messages[-1]["content"] if messages else ""
    raise UserError(
        f"reward function {name} {fault}", f"Prompt: ...{prompt[-80:]!r}; answer: {answer[:80]!r}.", remedy
    ) from None


def _number(value: Any) -> float | None:
    """A number, or the one element of an array or tensor, as a float; None for anything else.

    Text is refused even if it is a numeral: a function that returns text has most likely failed to parse it.
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and math.prod(shape) == 1:
        value = value.item()
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _short(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the user's __repr__
        text = "?"
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _place(error: BaseException) -> str:
    """The innermost line of the traceback in the function's own file: ` at FILE:LINE`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    lines = [f.lineno for f in frames if f.filename == frames[0].filename]
    return f" at {frames[0].filename}:{lines[-1]}" if frames else ""
