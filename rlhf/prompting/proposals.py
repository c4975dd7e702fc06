"""Instructions that a model proposes: from solved examples, and as other wordings of an instruction.

The two requests are those of automatic prompt engineering (Zhou et al. 2022, sections 3.1 and 3.3) in our words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlhf.core.console import warn
from rlhf.core.errors import UserError
from rlhf.data.schema import Message, Prompt
from rlhf.inference.policy import Policy
from rlhf.inference.sampling import sample
from rlhf.prompting.prompts import PromptBuilder
from rlhf.prompting.ways import Prompting
from rlhf.rollout.types import SamplingParams, stream_seed
from rlhf.servers.cache import ReplyCache
from rlhf.servers.client import Server
from rlhf.servers.config import ServerConfig
from rlhf.servers.replies import ChatRequest, Reply

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
class Asked:
    """A request for instructions."""

    text: str
    samples: int = 1


class Proposer(Protocol):
    """Whatever writes texts."""

    def write(self, requests: Sequence[Asked], seed: int) -> list[list[str]]:
        """The texts that answer each request; fewer than asked for where some failed."""

    def fits(self, text: str) -> bool:
        """Whether a request leaves room for its answer."""


@dataclass(frozen=True)
class LocalProposer:
    """A policy on this machine that proposes instructions."""

    policy: Policy
    temperature: float
    tokens: int
    """Longest instruction in tokens."""

    def _builder(self) -> PromptBuilder:
        return PromptBuilder(Prompting("zero-shot"), self.policy.chat)

    def fits(self, text: str) -> bool:
        """Whether a request leaves room for its answer."""
        return len(self._builder().chat.prompt([Message("user", text)])) <= self.policy.limit - self.tokens

    def write(self, requests: Sequence[Asked], seed: int) -> list[list[str]]:
        """The texts that answer each request."""
        builder = self._builder()
        policy = replace(self.policy, chat=builder.chat)
        # A base model goes on after its answer; an instruction is one paragraph.
        stop = ("\n\n",) if builder.layout == "plain" else ()
        params = SamplingParams(self.tokens, temperature=self.temperature, stop=stop, batch_size=32)
        found = []
        for request in requests:  # the number of samples differs
            prompts = [Prompt((Message("user", request.text),))]
            found += [
                [one.text for one in samples] for samples in sample(policy, prompts, params, seed, request.samples)
            ]
        return found


@dataclass(frozen=True)
class ServerProposer:
    """A server with OpenAI's chat API that proposes instructions. Its replies are kept, and not paid for twice."""

    config: ServerConfig
    cache: ReplyCache
    temperature: float
    tokens: int
    """Longest instruction in tokens."""

    def fits(self, text: str) -> bool:
        """Whether a request leaves room for its answer; a server's context is taken to be large."""
        return True

    def write(self, requests: Sequence[Asked], seed: int) -> list[list[str]]:
        """The texts that answer each request, without those that failed or were cut off, which a warning counts.

        Raises:
            UserError: No request got an answer, or see `Server`.
        """
        with Server(self.config, self.cache) as server:
            base = {**server.request_options(self.tokens), "temperature": self.temperature}
            asked = []
            for request in requests:
                messages = [{"role": "user", "content": request.text}]
                for number in range(request.samples):
                    # a server that keeps to the seed would give equal samples for equal seeds
                    own = {"seed": stream_seed(seed, number) % 2**31}
                    asked.append(ChatRequest(messages, base | own, number))
            replies = iter(list(server.ask(asked)))
        found, lost = [], Counter[str]()
        for request in requests:
            texts = []
            for reply in (next(replies) for _ in range(request.samples)):
                if isinstance(reply, Reply) and reply.finish_reason == "stop":
                    texts.append(reply.text)
                else:
                    cut = f"cut off ({reply.finish_reason})" if isinstance(reply, Reply) else reply.reason
                    lost[cut] += 1
            found.append(texts)
        for reason, count in lost.items():
            warn(f"{self.config.url}: {count:,} proposals lost: {reason}")
        if not any(found):
            raise UserError(
                f"{self.config.url}: proposed nothing", remedy="Raise --instruction-tokens, or name another."
            )
        return found


def from_examples(pairs: Sequence[tuple[str, str]], fits: Any) -> str:
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
