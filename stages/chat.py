"""`rlhf chat`: talk with a model in the terminal. Reads lines from a pipe as well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.cli import options
from rlhf.cli.sampling_options import SamplingOptions, with_sampling
from rlhf.core.console import err, format_number, printable, say
from rlhf.core.errors import UserError, blame, nearest
from rlhf.core.files import append_jsonl
from rlhf.data.jsonl import to_dict
from rlhf.data.schema import Demonstration, Message
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import SamplingParams

if TYPE_CHECKING:  # imports torch
    from rlhf.inference.policy import Policy

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes an incomplete UTF-8 character to."""


@with_sampling
def command(model: options.Model, system: options.System = None, *, sampling: SamplingOptions) -> None:
    """Chat with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    params = sampling.params(model)
    chat = Chat(sampling.open(model), params, sampling.seed, system)
    chat.policy.prompt_limit(params)
    if sys.stdin.isatty():
        say(
            f"{model}, temperature {format_number(params.temperature)}. /help lists the commands, Ctrl-D leaves.", "dim"
        )
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not chat.obey(line):
                    break
            else:
                chat.turn(line)
        except UserError as fault:  # a mistyped command must not end the conversation
            _note(str(fault), "red")


def _read_line() -> str | None:
    """The next line, None at the end of the input. Ctrl-C clears the line."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401 - gives input() editing and history

    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


@dataclass
class Chat:
    """A conversation with a model."""

    policy: Policy
    sampling: SamplingParams
    seed: int
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    """User and assistant turns, without the system message."""
    answers: int = 0
    """Number of answers so far, including undone ones: each has its own random stream."""

    @property
    def conversation(self) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *self.messages]

    # ---- turns ---------------------------------------------------------------------------------------------------

    def turn(self, text: str) -> None:
        """Answer a user message and print the answer token by token. Ctrl-C stops it; the answer so far is kept."""
        from rlhf.inference.sampling import generate  # imports torch

        chat, question = self.policy.chat, Message("user", text)
        prompt = chat.prompt([*self.conversation, question])
        limit = self.policy.prompt_limit(self.sampling)
        if len(prompt) > limit:
            _note(f"(the conversation is cut to its last {limit:,} tokens)")
        printer, why = _Printer(chat.decode), f"(cut off after {self.sampling.max_new_tokens:,} tokens)"
        self.answers += 1
        seed, ended = stream_seed(self.seed, self.answers), False
        try:
            ended = generate(self.policy, chat.truncate_prompt(prompt, limit), seed, self.sampling, printer.add).ended
        except KeyboardInterrupt:
            why = "(stopped)"
        answer = printer.finish()
        if not ended:
            _note(why)
        if answer.strip():
            self.messages += [question, Message("assistant", answer)]
        else:
            _note("(no answer; your message is removed)")

    # ---- commands ------------------------------------------------------------------------------------------------

    def obey(self, line: str) -> bool:
        """Run a command; False if it ends the chat."""
        name, _, words = line[1:].partition(" ")
        if name in ("quit", "exit", "q"):
            return False
        if name not in COMMANDS:
            raise UserError(f"unknown command /{name}; {nearest(name, [*COMMANDS, 'quit'])}")
        COMMANDS[name][0](self, words.strip())
        return True

    def reset(self, words: str) -> None:
        """Start a new conversation; the system message stays."""
        self.messages.clear()
        _note("(new conversation)")

    def set_system(self, words: str) -> None:
        """Set the system message; without TEXT there is none."""
        self.system = words or None
        _note("(system message set)" if words else "(no system message)")

    def undo(self, words: str) -> None:
        """Remove the last message and its answer."""
        if not self.messages:
            raise UserError("there is nothing to undo")
        del self.messages[-2:]
        _note("(taken back)")

    def save(self, words: str) -> None:
        """Append the conversation to a JSONL file, as a demonstration of its last answer."""
        if not words:
            raise UserError("/save needs a file name", remedy="/save chat.jsonl")
        if not self.messages:
            raise UserError("there is nothing to save")
        *before, last = self.conversation
        with blame("cannot be saved"):
            record = Demonstration(tuple(before), source=f"chat with {self.policy.path}", answer=last.content)
            append_jsonl(Path(words).expanduser(), [to_dict(record)])
        _note(f"(saved to {words})")

    def set_temperature(self, words: str) -> None:
        """Sample at this temperature from now on; 0 is greedy."""
        try:
            value = float(words)
        except ValueError:
            raise UserError(f"/temperature needs a number, got {words!r}") from None
        if not 0 <= value < float("inf"):
            raise UserError(f"temperature {words} must be 0 (greedy) or more")
        self.sampling = replace(self.sampling, temperature=value)
        _note(f"(temperature {format_number(value)})")

    def help(self, words: str) -> None:
        """List the commands."""
        for name, (method, argument) in COMMANDS.items():
            _note(f"{f'/{name} {argument}':<16} {method.__doc__}")
        _note(f"{'/quit':<16} Leave, as Ctrl-D does; Ctrl-C stops an answer.")


COMMANDS: dict[str, tuple[Callable[[Chat, str], None], str]] = {
    "reset": (Chat.reset, ""),
    "system": (Chat.set_system, "TEXT"),
    "undo": (Chat.undo, ""),
    "save": (Chat.save, "FILE"),
    "temperature": (Chat.set_temperature, "X"),
    "help": (Chat.help, ""),
}
"""Command -> method, whose docstring is its help, and the name of its argument."""


def _note(text: str, style: str = "dim") -> None:
    """Print a message of the program, not the model, on standard error."""
    err().print(text, style=style, markup=False, soft_wrap=True)


class _Printer:
    """Prints an answer token by token. Bytes of an incomplete character are held back until it is complete."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._show(self._decode(self._ids).rstrip(UNFINISHED))

    def _show(self, text: str) -> None:
        sys.stdout.write(printable(text[self._shown :]))
        sys.stdout.flush()
        self._shown = max(self._shown, len(text))

    def finish(self) -> str:
        """Print the remaining bytes and end the line; returns the whole answer."""
        text = self._decode(self._ids)
        self._show(text)
        print(flush=True)
        return text
