"""A question, and a model that is prompted in one of the ways."""

from __future__ import annotations

from typing import Any

from rlhf.data.schema import Demonstration, Message
from rlhf.prompting.run import Prompter
from rlhf.prompting.ways import read_prompting
from rlhf.tasks.task import AnswerRules


def ask(text: str, answer: str = "yes") -> Demonstration:
    return Demonstration((Message("user", text),), answer=answer)


def prompter(model: Any, spec: str, examples: Any = (), seed: int = 0, **rules: Any) -> Prompter:
    return Prompter(model, read_prompting(spec), AnswerRules(**rules), seed, examples)
