"""Instructions that a model proposes: from solved examples, and as other wordings of an instruction.

The two requests are those of automatic prompt engineering (Zhou et al. 2022, sections 3.1 and 3.3) in our words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rlhf.core.console import warn
from rlhf.core.errors import UserError
from rlhf.data.schema import Message, Prompt
from rlhf.inference.policy import Policy
from rlhf.inference.teacher import LocalTeacher, ServerTeacher, Teacher
from rlhf.prompting.prompts import PromptBuilder
from rlhf.prompting.ways import Prompting
from rlhf.rollout.types import SamplingParams
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import ChatServer
from rlhf.servers.replies import Failure

FROM_EXAMPLES = """\
Someone was given an instruction and answered these inputs as it says.

{pairs}

The instruction was:"""
REWORD = """\
Write the following instruction in other words, with the same meaning. Give the new wording alone.

Instruction: {instruction}

New wording:"""
LONGEST = 600
"""Characters; a longer text is no instruction."""


@dataclass(frozen=True)
class Proposer:
    """A teacher that is asked for instructions."""

    teacher: Teacher
    fits: Callable[[str], bool]
    """Whether a request leaves room for its answer."""
    whole: bool = False
    """Whether a text that was cut off is lost; a base model goes on after its answer."""

    def write(self, requests: Sequence[str], samples: int = 1) -> list[list[str]]:
        """The texts that answer each request, without those that are lost, which a warning counts.

        Raises:
            UserError: No request got an answer, or see `Teacher`.
        """
        found, lost = list[list[str]](), Counter[str]()
        for replies in self.teacher.answers([Prompt((Message("user", text),)) for text in requests], samples):
            found.append([])
            for reply in replies:
                if isinstance(reply, Failure):
                    lost[reply.reason] += 1
                elif self.whole and reply.finish_reason != "stop":
                    lost[f"cut off ({reply.finish_reason})"] += 1
                else:
                    found[-1].append(reply.text)
        for reason, count in lost.items():
            warn(f"{self.teacher.name}: {count:,} proposals lost: {reason}")
        if not any(found):
            raise UserError(
                f"{self.teacher.name}: proposed nothing", remedy="Raise --instruction-tokens, or name another."
            )
        return found


def local_proposer(policy: Policy, temperature: float, tokens: int, seed: int, cache: ReplyCache) -> Proposer:
    """A policy on this machine that proposes instructions of at most `tokens` tokens."""
    builder = PromptBuilder(Prompting("zero-shot"), policy.chat)
    # A base model goes on after its answer; an instruction is one paragraph.
    stop = ("\n\n",) if builder.layout == "plain" else ()
    params = SamplingParams(tokens, temperature=temperature, stop=stop, batch_size=32)
    teacher = LocalTeacher(policy.path, params, lambda _: replace(policy, chat=builder.chat), seed, cache)
    room = policy.limit - tokens
    return Proposer(teacher, lambda text: len(builder.chat.prompt([Message("user", text)])) <= room)


def server_proposer(server: ChatServer, temperature: float, tokens: int, seed: int) -> Proposer:
    """A server that proposes instructions of at most `tokens` tokens; its context is taken to be large."""
    options = {**server.request_options(tokens), "temperature": temperature}
    return Proposer(ServerTeacher(server, options, seed), lambda text: True, whole=True)


def from_examples(pairs: Sequence[tuple[str, str]], fits: Callable[[str], bool]) -> str:
    """The request for an instruction from solved inputs; with fewer of them where they do not fit.

    Raises:
        UserError: Not even one fits.
    """
    for count in range(len(pairs), 0, -1):
        shown = "\n\n".join(f"Input: {asked}\nOutput: {answered}" for asked, answered in pairs[:count])
        text = FROM_EXAMPLES.format_map({"pairs": shown})
        if fits(text):
            return text
    raise UserError(
        "prompt-search: not even one example fits into the context of the model that proposes instructions",
        remedy="Name another model with --proposer, or use shorter records.",
    )


def reword(instruction: str) -> str:
    """The request for another wording of an instruction."""
    return REWORD.format_map({"instruction": instruction})


def instruction_in(text: str) -> str | None:
    """The instruction in a model's text: its first paragraph, without a heading and quotes; None if there is none."""
    first = next((part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()), "")
    first = re.sub(r"^(?:[Tt]he )?(?:[Nn]ew wording|[Ii]nstruction)(?: was)?:\s*", "", " ".join(first.split()))
    if len(first) > 1 and first[0] == first[-1] and first[0] in "\"'`":
        first = first[1:-1].strip()
    return first if 0 < len(first) <= LONGEST and any(c.isalnum() for c in first) else None
