"""Ways of prompting. One table, PROMPTING; imports no torch.

A row turns its options into a `Prompting`: the wording, the examples, and how the answer is taken.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from rlhf.config.load import inline_values, read_values
from rlhf.core.errors import UserError, nearest
from rlhf.core.table import Pick, Table, options_of

PROMPTING = Table("way of prompting")
Layout = Literal["auto", "turns", "text", "plain"]
CONTENT_FREE = ("N/A", "[MASK]", "")
"""Inputs without content (Zhao et al. 2021, section 5)."""
CUE = "Let's think step by step."
"""Kojima et al. 2022."""
VOTE_TEMPERATURE = 0.7
"""The default temperature where answers are voted on (Wang et al. 2022, section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How a question becomes a prompt. The fields are options of all ways."""

    instruction: Annotated[str, StringConstraints(strip_whitespace=True)] = ""
    template: str = "{prompt}\n{answer}"
    layout: Layout = "auto"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        if re.findall(r"\{prompt\}|\{answer\}", self.template) != ["{prompt}", "{answer}"]:
            raise UserError(
                f"template {self.template!r}: needs {{prompt}} once, and after it {{answer}} once",
                remedy="For instance: 'Review: {prompt}\\nSentiment: {answer}'",
            )

    @property
    def parts(self) -> tuple[str, str, str]:
        """The template's text before the prompt, between the prompt and the answer, and after the answer."""
        before, rest = self.template.split("{prompt}")
        between, after = rest.split("{answer}")
        return before, between, after


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Which solved examples precede a question. The fields but `rationales` are options of the ways that show some."""

    shots: Annotated[int, Field(ge=0)] = 4
    choose: Literal["random", "similar", "balanced"] = "random"
    similarity: Literal["tfidf", "embedding"] = "tfidf"
    redraw: bool = False
    order_seed: Annotated[int, Field(ge=0)] | None = None
    random_labels: bool = False
    examples_from: str = ""
    rationales: bool = False
    """Whether whole answers are shown, reasoning included; else only the sentence with the answer."""


@dataclass(frozen=True)
class LabelWords:
    """How a label is chosen by the log-probs of words."""

    verbaliser: dict[str, list[str]]
    normalise: bool = False
    content_free: tuple[str, ...] = ()
    """Inputs for calibration; none: no calibration."""


@dataclass(frozen=True)
class Prompting:
    """One way of prompting with its options."""

    name: str
    wording: Wording = Wording()
    shots: Shots | None = None
    """None if the way shows no examples."""
    label_words: LabelWords | None = None
    """None if answers are generated."""
    cue: str = ""
    """Starts the reasoning."""
    cue_with_shots: bool = True
    """Whether the cue follows examples too."""
    samples: int = 1
    """Answers that are sampled and voted on."""
    title: str = ""
    """What tables call it: the file's name, or the name of the way with the options that were given."""

    def with_shots(self, count: int) -> Prompting:
        """The same with another number of examples.

        Raises:
            UserError: It shows no examples.
        """
        if self.shots is None:
            raise UserError(f"--shots {count}: {self.name} shows no examples", remedy="Use few-shot, or leave it out.")
        return replace(self, shots=replace(self.shots, shots=count))

    @property
    def count(self) -> int:
        """Number of examples."""
        return self.shots.shots if self.shots else 0


def read_way(spec: str) -> dict[str, Any]:
    """The values of a way of prompting, `name` among them, unchecked.

    Args:
        spec: Its name, a YAML mapping such as ``{name: few-shot, shots: 4}``, or a YAML file of one.

    Raises:
        UserError: It is none of these.
    """
    if (values := inline_values(spec, "--prompting")) is not None:
        return values
    is_file = spec.endswith((".yaml", ".yml")) or Path(spec).is_file()
    return read_values(spec) if is_file else {"name": spec}


def read_prompting(spec: str) -> Prompting:
    """A way of prompting; see `read_way`.

    Raises:
        UserError: There is no such way, or an option is wrong.
    """
    values = read_way(spec)
    try:
        found: Prompting = PROMPTING.pick(values)()
    except ValueError as error:
        raise UserError(f"--prompting {spec}: {error}", remedy="docs/prompting.md describes them.") from None
    is_file = not spec.lstrip().startswith("{") and spec != values["name"]
    return replace(found, title=Path(spec).stem if is_file else _title(values))


def _from_file(value: Any) -> Any:
    return read_way(value) if isinstance(value, str) and value.endswith((".yaml", ".yml")) else value


WayOption = Annotated[Pick, PROMPTING, BeforeValidator(_from_file)]
"""The type of a config field: a way of prompting, or a YAML file of one, such as `winner.yaml` of prompt-search."""


def _title(values: dict[str, Any]) -> str:
    short = [f"{key}={value}" for key, value in values.items() if key not in ("name", "shots", *_LONG)]
    return " ".join([values["name"], *short])


_LONG = ("instruction", "template", "verbaliser", "separator", "cue", "content_free")


def parse_shots(text: str | None) -> list[int]:
    """``0,1,2,4`` as numbers; nothing for None.

    Raises:
        UserError: It is no list of whole numbers from 0.
    """
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 6 for word in words):
        raise UserError(f"--shots {text!r}: is not a list of whole numbers", remedy="For instance: --shots 0,1,2,4,8")
    return list(map(int, words))


# ---- what can be refused before a model is loaded ------------------------------------------------------------------


def check_way(prompting: Prompting, labels: Sequence[str], temperature: float | None) -> None:
    """Check a way against the labels of a task and the temperature that the user gave.

    Raises:
        UserError: See `word_pairs` and `check_votes`.
    """
    check_votes(prompting, temperature)
    if prompting.label_words is not None:
        word_pairs(prompting.label_words.verbaliser, labels or list(prompting.label_words.verbaliser))


def check_votes(prompting: Prompting, temperature: float | None) -> None:
    """Refuse a vote of equal answers.

    Raises:
        UserError: Several answers are sampled at temperature 0.
    """
    if prompting.samples > 1 and temperature == 0:
        raise UserError(
            f"--temperature 0: the {prompting.samples} answers to a question would all be the same",
            remedy=f"Use --temperature {VOTE_TEMPERATURE}, or samples: 1.",
        )


def word_pairs(verbaliser: dict[str, list[str]], labels: Sequence[str]) -> list[tuple[str, str]]:
    """(label, word) pairs; without a verbaliser each label is its own word.

    Raises:
        UserError: A label has no words, or words are for no label.
    """
    if len(labels) < 2:
        raise UserError(
            "cloze: needs the labels to choose from",
            remedy="Give --labels, or a verbaliser: {positive: happy, negative: [sad, angry]}",
        )
    if not verbaliser:
        return [(label, label) for label in labels]
    for name in verbaliser:
        if name not in labels:
            raise UserError(f"verbaliser: the task has no label {name!r}", remedy=nearest(name, labels))
    for label in labels:
        if label not in verbaliser:
            raise UserError(f"verbaliser: the label {label!r} has no word", remedy="Each label needs one.")
    return [(label, word) for label in labels for word in verbaliser[label]]


# ---- rows ----------------------------------------------------------------------------------------------------------


def _given(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Call a function with those of the options that it has."""
    return function(
        **{name: value for name, value in options.items() if name in inspect.signature(function).parameters}
    )


@PROMPTING.row("zero-shot")
@options_of(Wording)
def zero_shot(**options: Any) -> Prompting:
    """The question alone, after an instruction if there is one; the model writes the answer."""
    return Prompting("zero-shot", _given(Wording, options))


@PROMPTING.row("few-shot")
@options_of(Wording)
@options_of(Shots, without=("rationales",))
def few_shot(**options: Any) -> Prompting:
    """Solved examples before the question (Brown et al. 2020); the model writes the answer."""
    return Prompting("few-shot", _given(Wording, options), _given(Shots, options))


@PROMPTING.row("cloze")
@options_of(Wording)
@options_of(Shots, without=("shots", "rationales"))
def cloze(
    *, verbaliser: dict[str, str | list[str]] | None = None, normalise: bool = False, calibrate: bool = False,
    content_free: Annotated[list[str], Field(min_length=1)] = list(CONTENT_FREE), # noqa: B006
    shots: Annotated[int, Field(ge=0)] = 0, **options: Any,
) -> Prompting:  # fmt: skip
    """The most likely label word as the answer: after the text, or at the mask of a masked language model."""
    words = {label: [given] if isinstance(given, str) else given for label, given in (verbaliser or {}).items()}
    for label, given in words.items():
        if not given or not all(word.strip() for word in given):
            raise UserError(f"verbaliser: {label!r} has no word, or an empty one")
    found = LabelWords(words, normalise, tuple(content_free) if calibrate else ())
    return Prompting("cloze", _given(Wording, options), _given(Shots, {**options, "shots": shots}), found)


@PROMPTING.row("chain-of-thought")
@options_of(Wording)
@options_of(Shots, without=("shots", "rationales"))
def chain_of_thought(
    *, cue: str | None = None, samples: Annotated[int, Field(ge=1, le=1000)] = 1,
    shots: Annotated[int, Field(ge=0)] = 0, **options: Any,
) -> Prompting:  # fmt: skip
    """Reasoning before the answer (Wei et al. 2022): a cue, or examples with their rationales; answers may be voted on.

    The default cue is Kojima's (2022) without examples, and none with them.
    """
    chosen = replace(_given(Shots, {**options, "shots": shots}), rationales=True)
    text, always = (CUE, False) if cue is None else (cue.strip(), True)
    return Prompting("chain-of-thought", _given(Wording, options), chosen, None, text, always, samples)
