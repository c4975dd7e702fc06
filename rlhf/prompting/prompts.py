"""A question with its instruction and examples as a conversation, in the layout that suits the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from rlhf.core.errors import UserError
from rlhf.data.chat_templates import TEMPLATES
from rlhf.data.chat_tokenizer import ChatTokenizer, EncoderDecoderTokenizer
from rlhf.data.schema import Message
from rlhf.prompting.examples import Example, without_system
from rlhf.prompting.ways import Prompting


class PromptBuilder:
    """Makes prompts of one way for one model.

    Raises:
        UserError: The layout does not suit the model.

    Attributes:
        layout: `turns`, examples are earlier turns of the conversation; `text`, they are text in the one user turn;
            `plain`, there are no turns, and the answer continues the text.
        chat: The tokenizer with the template for this layout.
        gap: Spaces before the answer in the plain layout. They belong to the answer's first token.
        after: The template's text after the answer.
    """

    def __init__(self, prompting: Prompting, chat: ChatTokenizer) -> None:
        self.prompting, wording = prompting, prompting.wording
        is_chat = chat.own_template and chat.tokenizer.chat_template != TEMPLATES["plain"]
        divided = isinstance(chat, EncoderDecoderTokenizer)
        if divided and wording.layout == "plain":
            raise UserError(
                "layout: plain is not for an encoder-decoder, whose answer does not continue the text of its prompt",
                remedy="Use layout: text, or leave it out.",
            )
        auto = "turns" if is_chat else "text" if divided else "plain"
        self.layout = wording.layout if wording.layout != "auto" else auto
        self.chat = chat
        if self.layout == "plain":  # the template `plain`: BOS and the text
            tokenizer = copy.copy(chat.tokenizer)
            tokenizer.chat_template = TEMPLATES["plain"]
            self.chat = ChatTokenizer(tokenizer, chat.renderer.in_text)
        self._before, self._between, self.after = wording.parts
        self.gap = self._between[len(self._between.rstrip(" ")) :] if self.layout == "plain" else ""

    def messages(self, question: Sequence[Message], examples: Sequence[Example]) -> tuple[Message, ...]:
        """The conversation that ends with the question."""
        system = [message for message in question if message.role == "system"]
        turns = without_system(question)
        instruction, separator = self.prompting.wording.instruction, self.prompting.wording.separator
        cue = self.prompting.cue if not examples or self.prompting.cue_with_shots else ""
        if self.layout == "turns":
            found = [message for example in examples for message in self._turns(example)]
            found += [*turns[:-1], Message("user", self._asked(turns[-1].content, cue))]
            if instruction:
                first = next(i for i, message in enumerate(found) if message.role == "user")
                found[first] = Message("user", instruction + separator + found[first].content)
            return (*system, *found)
        parts = [instruction] if instruction else []
        parts += [self._solved(example) for example in examples]
        parts.append(self._asked(_as_text(turns), cue))
        if self.layout == "text":
            return (*system, Message("user", separator.join(parts)))
        return (Message("user", separator.join([message.content for message in system] + parts)),)

    def _asked(self, content: str, cue: str) -> str:
        """A question up to its answer. The cue begins the answer in the plain layout, else it ends the question."""
        if self.layout == "plain":
            return self._before + content + self._between.rstrip(" ") + (self.gap + cue if cue else "")
        return self._before + content + self._between.rstrip() + (f"\n{cue}" if cue else "")

    def _turns(self, example: Example) -> list[Message]:
        turns = without_system(example.messages)
        asked = Message("user", self._asked(turns[-1].content, ""))
        return [*turns[:-1], asked, Message("assistant", example.answer + self.after)]

    def _solved(self, example: Example) -> str:
        return self._before + _as_text(without_system(example.messages)) + self._between + example.answer + self.after

    def fitting(
        self, question: Sequence[Message], examples: Sequence[Example], room: int
    ) -> tuple[tuple[Message, ...], list[int], int]:
        """The conversation with as many examples as fit, those next to the question; its tokens; how many fit.

        Args:
            room: Most tokens of the prompt. A question that is longer by itself is not cut here.

        Raises:
            RefusedText: The chat template refuses the conversation.
        """
        for start in range(len(examples) + 1):
            messages = self.messages(question, examples[start:])
            ids = self.chat.prompt(messages)
            if len(ids) <= room:
                break
        return messages, ids, len(examples) - start

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer after a prompt, without the token that ends it."""
        return self.chat.response(self.gap + text)[:-1]

    def answer_text(self, text: str) -> str:
        """The answer in a generated text: in the plain layout it ends where the next example would begin."""
        separator = self.prompting.wording.separator
        return text.strip().split(separator)[0].strip() if self.layout == "plain" and separator else text.strip()


def _as_text(turns: Sequence[Message]) -> str:
    """Turns as one text; several are named by their roles."""
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in turns)
