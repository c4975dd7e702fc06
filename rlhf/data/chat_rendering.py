"""Conversations to text with a chat template, and the control tokens that may not come from the conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from rlhf.core.console import printable
from rlhf.core.errors import UserError
from rlhf.core.time_limit import TimeIsUp, time_limit
from rlhf.data.schema import Message
from rlhf.data.tool_turns import DEFINITIONS, PROBE, SHOWN, TOOL_ROLES, as_transformers

RENDER_SECONDS = 30.0
"""Longest time that a template may take for one conversation; 10,001 turns take a tenth of a second."""
TOOL_REMEDY = "Use a model whose template has them, or import the chats with --option tools=cut."
REASONING = ("<think>", "</think>")
"""Tokens that an answer may hold: the reasoning before the answer proper."""
MARK = "\U000f0000"
"""The character with which transformers' `mark_control_tokens` marks a control token that is text."""
START, END = "\U000f0002", "\U000f0003"
"""Private-use characters around a response, which show where the template puts it."""

InText = Literal["as_text", "reject"]


class RefusedText(UserError):
    """A conversation or answer that cannot become tokens. One such row is rejected; the others go on.

    Args:
        reason: What is wrong, in the same words for every such row, so that rows can be counted by it.
        detail: What it is in this row.
        remedy: What to do.
    """

    def __init__(self, reason: str, detail: str, remedy: str) -> None:
        self.reason = printable(reason)  # a template's message may quote the row
        super().__init__(printable(f"{reason}: {detail}" if detail else reason), remedy=remedy)


class Renderer:
    """Renders conversations as `apply_chat_template` of plain transformers does.

    Attributes:
        in_text: What happens to text that reads like a control token: `as_text` encodes it as the characters that it
            is, as `apply_chat_template(..., sanitize_control_tokens=True)` does; `reject` refuses the row.
        control: The control tokens: special tokens, and added tokens that the template writes.
    """

    def __init__(self, tokenizer: Any, in_text: InText) -> None:
        self.tokenizer, self.in_text = tokenizer, in_text
        self.control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(
            tokenizer.all_special_tokens
        )

    def add_control(self, rendered: str) -> None:
        """Take the added tokens in a rendered probe as control tokens: `<|User|>` need not be a special one."""
        self.control |= {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content in rendered}
        self.control = {token for token in self.control if token.strip() and token not in REASONING}
        self.__dict__.pop("_pattern", None)

    def other_than_special(self) -> tuple[list[str], list[str]]:
        """Control tokens that are not special tokens, and special tokens that are no control tokens."""
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return sorted(self.control - special), sorted(special - self.control)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def holds_control(self, text: str) -> str | None:
        """The first control token that a text spells; None if there is none."""
        found = self._pattern.search(text)
        return found[0] if found else None

    def marked(self, text: str) -> str:
        """The text with marks around control tokens that it spells, for `encode`.

        Raises:
            RefusedText: There are some, and `in_text` is `reject`.
        """
        found = self.holds_control(text)
        if found is None:
            return text
        if self.in_text == "reject" or not self.tokenizer.is_fast:
            raise RefusedText(
                "text that spells a control token",
                f"{found!r} in {text[:60]!r}",
                "Remove it from the row"
                + (", or set model.control_tokens_in_text=as_text." if self.tokenizer.is_fast else "."),
            )
        from transformers.utils.chat_template_utils import mark_control_tokens

        marked: str = mark_control_tokens(text, self._pattern)
        return marked

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """The text of a conversation, with marks as `marked` makes them.

        Raises:
            RefusedText: The template refuses it, takes longer than RENDER_SECONDS or does not write its turns of tools,
                or see `marked`.
        """
        used = {m.role for m in messages}
        if used.intersection(TOOL_ROLES) and (missing := sorted(used & self._unwritten)):
            raise RefusedText("the chat template does not write turns of tools", ", ".join(missing), TOOL_REMEDY)
        return self._apply(*as_transformers(messages, self.marked), generation_prompt)

    @cached_property
    def _unwritten(self) -> set[str]:
        """The roles of tools whose turns the template refuses or leaves out, in part or whole."""
        unwritten = set()
        for role in TOOL_ROLES:
            turns = [turn for turn in PROBE if turn[0] == role or turn[0] != DEFINITIONS]
            try:
                written = self._apply(*as_transformers(turns), True)
            except RefusedText:
                written = ""
            unwritten |= {role} if any(word not in written for word in SHOWN[role]) else set()
        return unwritten

    def _apply(self, chat: list[dict[str, Any]], tools: list[Any] | None, generation_prompt: bool) -> str:
        try:
            with time_limit(RENDER_SECONDS):
                text: str = self.tokenizer.apply_chat_template(
                    chat, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
                )
        except TimeIsUp:
            reason = f"the chat template takes longer than {RENDER_SECONDS:g} s for a conversation"
            raise RefusedText(reason, "", "Correct the template, or remove the row.") from None
        except Exception as error:  # templates may raise anything
            fault = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
            remedy = "Remove such rows, fold a system turn into the first user turn, or set model.chat_template."
            raise RefusedText(f"the chat template refuses the conversation: {fault}", "", remedy) from None
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text. A marked control token is encoded as the characters that it is.

        Raises:
            RefusedText: The tokenizer cannot spell a control token as text.
        """
        if MARK not in text:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
            return ids
        try:
            ids = self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        except ValueError as error:
            raise RefusedText("text that spells a control token", str(error), "Remove it from the row.") from None
        return ids

    # ---- where responses are -----------------------------------------------------------------------------------------

    def response_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where the responses of a conversation are in its rendered `text`, which ends with a generation prompt.

        Returns:
            (start, end) of each response that is there in full, without white space at its ends. None are found if the
            template writes another text when responses are marked.
        """
        fenced = [m._replace(content=_fenced(m.content)) if m.role == "assistant" else m for m in messages]
        marked = self.render(fenced, True)
        if marked.replace(START, "").replace(END, "") != text:
            return []
        spans: list[tuple[int, int]] = []
        start = -1
        for marks, found in enumerate(re.finditer(f"[{START}{END}]", marked)):
            position = found.start() - marks
            if found[0] == START:
                start = position
            elif start >= 0:
                spans.append((start, position))
                start = -1
        return spans


def _fenced(text: str) -> str:
    """The text between START and END. White space stays outside, where a template can still trim it."""
    core = text.strip()
    return text.replace(core, f"{START}{core}{END}", 1) if core else text
