"""Tasks as a teacher reads and writes them, and which of them are unusable."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.data.schema import BadRecord

Kind = Literal["classification", "generation"]
FEWEST_WORDS, MOST_WORDS = 4, 150
NO_INPUT = "<noinput>"
BEYOND_TEXT = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
"""Words of instructions that a model of text cannot follow, as Self-Instruct and Alpaca list them."""
CLASSIFYING = re.compile(
    r"\b(classif\w+|categori\w+|true or false|yes or no|sentiment|(?:positive|negative) or (?:positive|negative)"
    r"|which (?:category|class|type|of the following)|determine (?:if|whether)|(?:decide|judge|tell me|identify|detect)"
    r" (?:if|whether)|is (?:this|the following) .* or )\b",
    re.IGNORECASE,
)
REQUEST = """\
Write {count} new tasks for a language model, in the form of the examples below.

- Do not repeat an example or another task: vary the verbs, the topics, the form of the answer and its length.
- About half of them ask for one of a few labels (classification), the others for a text.
- A language model without pictures, sound, files or the internet can do them.
- The instruction is one or two sentences in English, a question or a command.
- The input is a specific example of at most 100 words; where the instruction needs none, it is {no_input}.
- The output is a right and complete answer of at most 100 words.

{examples}

Task {next}
Instruction:"""
_TASK = re.compile(
    r"Instruction:[ \t]*(?P<instruction>.*?)\s*(?:\n\s*Input:[ \t]*(?P<input>.*?)\s*)?\n\s*Output:[ \t]*(?P<output>.*?)"
    r"(?=\n\s*(?:[#*]+\s*)?(?:Task\s+\d+|(?:\d+\.\s*)?Instruction:)|\Z)",
    re.DOTALL,
)


@dataclass(frozen=True)
class GrownTask:
    """An instruction, its input, which may be empty, and the answer."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """The user message: instruction and input."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    @property
    def kind(self) -> Kind:
        """`classification` if the instruction asks for one of a few labels, by its words, and the answer is short."""
        asks = CLASSIFYING.search(self.instruction) is not None
        return "classification" if asks and len(self.output.split()) <= 10 else "generation"

    def written(self, number: int) -> str:
        """The task as it is shown to the teacher."""
        lines = (f"Task {number}", f"Instruction: {self.instruction}", f"Input: {self.input or NO_INPUT}")
        return "\n".join((*lines, f"Output: {self.output}"))


def request(examples: Sequence[GrownTask], count: int) -> str:
    """What a teacher is asked. It may go on from the last line, or write the form again."""
    shown = "\n\n".join(task.written(number) for number, task in enumerate(examples, 1))
    return REQUEST.format(count=count, examples=shown, next=len(examples) + 1, no_input=NO_INPUT)


def parse(text: str, cut_off: bool) -> list[GrownTask]:
    """The tasks in a teacher's reply, without the last one if the reply was cut off."""
    text = text.strip()
    if not re.match(r"(?:[#*]+\s*)?(?:Task\s+\d|(?:\d+\.\s*)?Instruction:)", text):
        text = f"Instruction: {text}"  # it went on from the last line of the request
    found = [match.groupdict(default="") for match in _TASK.finditer(text)]
    tasks = [
        GrownTask(
            " ".join(one["instruction"].split()),
            "" if one["input"].strip().lower().strip("<>.() ") in ("noinput", "no input", "none", "") else one["input"],
            one["output"].strip().rstrip("#").strip(),
        )
        for one in found
    ]
    return tasks[:-1] if cut_off else tasks


def fault(task: GrownTask) -> BadRecord | None:
    """Why a task is unusable, by the rules of Self-Instruct (Wang et al. 2023, appendix A.1) and Alpaca; else None."""
    words = task.instruction.split()
    if not words:
        return BadRecord("the instruction is empty", remedy=_OTHER)
    if not task.output:
        return BadRecord("the output is empty", remedy=_OTHER)
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS:
        what = f"the instruction has fewer than {FEWEST_WORDS} or more than {MOST_WORDS} words"
        return BadRecord(what, f"{len(words)} words", _OTHER)
    if task.instruction[0] in string.punctuation:
        return BadRecord("the instruction begins with punctuation", task.instruction[:20], _OTHER)
    if not task.instruction[0].isascii():
        return BadRecord("the instruction does not begin in English", task.instruction[:20], _OTHER)
    beyond = re.search(rf"\b({'|'.join(BEYOND_TEXT)})\b", task.instruction, re.IGNORECASE)
    if beyond:
        return BadRecord("the instruction needs more than text", beyond[0].lower(), _OTHER)
    if task.instruction.lower().startswith("write a program"):
        return BadRecord("the instruction asks for a program", remedy=_OTHER)
    if task.output in (task.instruction, task.input):
        return BadRecord("the output repeats the task", remedy=_OTHER)
    return None


_OTHER = "Nothing, if most tasks are kept; else ask a stronger teacher."
