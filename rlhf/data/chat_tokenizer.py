"""Text to tokens with the chat template.

A conversation is encoded piece by piece (everything up to a generation prompt, then the response, ...), so the prompt
has the same tokens in every stage and before every response.

Truncation: a prompt keeps its end, and its first token if that is BOS. A response is never truncated; see
`rlhf.data.encode_records`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy
from rlhf.data.chat_templates import read_template
from rlhf.data.schema import Message

if TYPE_CHECKING:
    import torch
    import transformers
else:
    torch, transformers = lazy("torch"), lazy("transformers")

PROBE = "\N{BLACK STAR}"
"""A response that shows where the template puts responses."""


def load_tokenizer(config: ModelConfig, path: str) -> ChatTokenizer:
    """The tokenizer of a model folder or a model on the Hub, with the chat template that the config selects.

    For an encoder, CLS and SEP are used as BOS and EOS.

    Raises:
        UserError: No tokenizer found, no end-of-sequence token, or an unusable chat template.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself, for instance at JSON nested too deeply
        raise UserError(f"model.path: no tokenizer can be loaded from {path}", str(error).split("\n")[0]) from None
    if tokenizer.bos_token is None and tokenizer.eos_token is None and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if config.chat_template != "auto" or not tokenizer.chat_template:
        name = "default" if config.chat_template == "auto" else config.chat_template
        tokenizer.chat_template = read_template(name)
    return ChatTokenizer(tokenizer)


class ChatTokenizer:
    """A tokenizer with its chat template: encodes prompts, responses and conversations, and decodes responses.

    Attributes:
        end_id: The token that ends a response: the template's end of turn, else EOS.
        pad_id: The padding token (PAD, else `end_id`); masks hide it everywhere.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        probe = [Message("user", "hello"), Message("assistant", PROBE)]
        before, full = self._render(probe[:1], True), self._render(probe, False)
        if not full.startswith(before) or PROBE not in full:
            raise UserError(
                "model.chat_template: a conversation with a response does not start with its generation prompt",
                f"{full[:120]!r} does not start with {before[:120]!r}, so the tokens of the response are unknown.",
                "Use a template whose generation prompt is the start of the assistant turn.",
            )
        self._lead, tail = full[len(before) :].split(PROBE)
        ends = [token for token in self._encode(tail) if token in self._special]
        if not ends and tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token and the chat template has no end of turn")
        self.end_id: int = ends[0] if ends else tokenizer.eos_token_id
        # If the template writes an end of turn, the text after it (often a newline) belongs to the next piece.
        end_text = tokenizer.convert_ids_to_tokens(self.end_id)
        self._tail, self._after_end = tail, tail.split(end_text, 1)[1] if ends else ""
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.end_id

    @cached_property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _anchor(self) -> list[int]:
        """Tokens to put before a continuation if the tokenizer adds a space at the start of any text; else none."""
        newline, joined = self._encode("\n"), self._encode("\na")
        return [] if joined == newline + self._encode("a") else newline

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        chat = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # templates may raise anything
            raise UserError(f"model.chat_template: failed on a conversation: {error}") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _encode_next(self, text: str) -> list[int]:
        """Token ids of text that continues other text."""
        anchored = self._encode("\n" + text) if self._anchor else []
        if anchored[: len(self._anchor)] == self._anchor and self._anchor:
            return anchored[len(self._anchor) :]
        return self._encode(text)

    def _pieces(self, messages: Sequence[Message]) -> list[tuple[list[int], bool]]:
        """The pieces (token ids, is a response) of a conversation, up to its last message or its generation prompt."""
        pieces: list[tuple[list[int], bool]] = []
        done = ""
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        stops = turns if messages[-1].role == "assistant" else [*turns, len(messages)]
        for i in stops:
            before = self._render(messages[:i], True)
            if not before.startswith(done):  # the template rewrites earlier turns, so they count as prompt text
                pieces, done = [], ""
            encode = self._encode_next if done else self._encode
            pieces.append((encode(before[len(done) :]), False))
            if i == len(messages):
                break
            pieces.append((self.response(messages[i].content), True))
            full = self._render(messages[: i + 1], False)
            done = full[: len(full) - len(self._after_end)] if self._after_end else full
        return pieces

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with a user turn, including the generation prompt."""
        return [token for piece, _ in self._pieces(messages) for token in piece]

    def response(self, text: str) -> list[int]:
        """Token ids of a response, including `end_id`."""
        return [*self._encode_next(self._lead + text), self.end_id]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and for each whether the assistant said it (ends of turns included)."""
        pieces = self._pieces(messages)
        ids = [token for piece, _ in pieces for token in piece]
        return ids, [is_response for piece, is_response in pieces for _ in piece]

    def whole(self, chat: Sequence[dict[str, str]], response: str) -> list[int]:
        """Token ids of a prompt, given as {role, content} mappings, followed by its response."""
        return self.prompt([Message(**m) for m in chat]) + self.response(response)  # type: ignore[arg-type]

    def pad(self, rows: Sequence[Sequence[int]], device: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad rows of token ids on the right: int64 ids [B, T] and attention mask [B, T], 1 = a token."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad_id] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens and without the template's leading text."""
        text = self._decode([*self._anchor, *ids])[len(self._decode(self._anchor)) :]
        return text.removeprefix(self._lead)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def truncate_prompt(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens of a prompt; its first token is kept if that is BOS."""
        if len(ids) <= room:
            return ids
        if ids[0] == self.tokenizer.bos_token_id:
            return [ids[0], *ids[len(ids) - room + 1 :]]
        return ids[len(ids) - room :]

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 (16 hex digits) of the vocabulary with special tokens (`tokenizer`) and of the `chat_template`."""
        vocabulary = json.dumps([self.tokenizer.get_vocab(), self.tokenizer.special_tokens_map], sort_keys=True)
        parts = {"tokenizer": vocabulary, "chat_template": self.tokenizer.chat_template}
        return {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in parts.items()}


def stop_ids(model: Any, chat: ChatTokenizer) -> list[int]:
    """The tokens that end a response: the chat template's first, then those of the tokenizer and generation config."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    others = {chat.tokenizer.eos_token_id, *listed} - {None, chat.end_id}
    return [chat.end_id, *sorted(others)]
