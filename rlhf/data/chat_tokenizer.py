"""Text to tokens with the chat template.

A prompt is rendered and encoded as a whole, as `apply_chat_template` of plain transformers does, so a served model
reads the tokens that it was trained on. A response is encoded on its own, as a continuation: it is generated after
the prompt's tokens.

Truncation: a prompt keeps its end, and its first token if that is BOS. A response is never truncated; see
`rlhf.data.encode_records`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.lazy import torch, transformers
from rlhf.core.limits import read_json_object
from rlhf.data.chat_rendering import MARK, InText, RefusedText, Renderer
from rlhf.data.chat_templates import freeze_clock, read_template, reads_clock
from rlhf.data.schema import Message

PROBE = "\N{BLACK STAR}"
"""A response that shows where the template puts responses."""


def load_tokenizer(config: ModelConfig, path: str, frozen_at: str | None = None) -> ChatTokenizer:
    """The tokenizer of a model folder or a model on the Hub, with the chat template that the config selects.

    For an encoder, CLS and SEP are used as BOS and EOS. A template that reads the clock is frozen.

    Args:
        config: Which chat template, and what happens to control tokens in text.
        path: Where the tokenizer is.
        frozen_at: The time that the template's `strftime_now` gives, in ISO format; by default the present.

    Raises:
        UserError: No tokenizer found, no end-of-sequence token, or an unusable chat template.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself, for instance at JSON nested too deeply
        raise UserError(f"model.path: no tokenizer can be loaded from {path}", str(error).split("\n")[0]) from None
    tokenizer.init_kwargs.pop("local_files_only", None)  # else saved with it, though it tells of this process
    if tokenizer.bos_token is None and tokenizer.eos_token is None and tokenizer.cls_token and tokenizer.sep_token:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    kind, default = ChatTokenizer, "default"
    if _is_encoder_decoder(path):
        kind, default = EncoderDecoderTokenizer, "encoder-decoder"
    chosen = config.chat_template != "auto"
    own_template = chosen or bool(tokenizer.chat_template)
    if chosen or not own_template:
        tokenizer.chat_template = read_template(config.chat_template if chosen else default)
    template = tokenizer.get_chat_template()
    if reads_clock(template):
        frozen_at = frozen_at or datetime.now().isoformat(timespec="seconds")
        tokenizer.chat_template = freeze_clock(template, datetime.fromisoformat(frozen_at))
    else:
        frozen_at = None
    return kind(tokenizer, config.control_tokens_in_text, frozen_at, own_template)


def _is_encoder_decoder(path: str) -> bool:
    """Whether the model next to a tokenizer, or the base of the adapter there, is an encoder-decoder."""
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file() and not (Path(path) / "config.json").is_file():
        path = str(read_json_object(adapter).get("base_model_name_or_path"))
    try:
        found, _ = transformers.PretrainedConfig.get_config_dict(path)
    except (OSError, ValueError):
        return False  # a tokenizer alone, or a config that loading the model refuses
    return bool(found.get("is_encoder_decoder"))


END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>", "[EOS]")
"""What model families call the token that ends an answer."""


def _no_end(tokenizer: Any) -> UserError:
    """The error for a tokenizer without EOS and a template without an end of turn, with the command that names one."""
    vocabulary, path = tokenizer.get_vocab(), str(tokenizer.name_or_path)
    found = next((token for token in END_TOKENS if token in vocabulary), None)
    code = f"from transformers import AutoTokenizer as A; t = A.from_pretrained({path!r}); "
    code += f"t.eos_token = {found or END_TOKENS[3]!r}; t.save_pretrained({path!r})"
    known = f"Its vocabulary has {found}" if found else "Its vocabulary has none of the usual ones"
    grow = "" if found else ", and set model.resize_embeddings=true, since the model has no row for a new token"
    return UserError(
        f"model.path: the tokenizer of {path} has no EOS token, and the chat template writes no end of turn",
        "Nothing would end an answer, neither in training nor in sampling.",
        f"{known}; name the token once: {shlex.join(['python', '-c', code])}{grow}. Or set model.chat_template to a "
        "template that writes one of the added tokens after an answer.",
    )


def _around_response(before: str, full: str) -> tuple[str, str]:
    """What a template writes between its generation prompt and a response, and after a response.

    A generation prompt may open a reasoning block (`<think>`) that a finished turn does not show, or shows empty in
    another form. The text before the response then ends that block.

    Args:
        before: A user turn with the generation prompt.
        full: The same turn and PROBE as its response.

    Raises:
        UserError: The response does not follow the generation prompt.
    """
    same = _shared_start(before, full)
    rest, (lead, *tail) = before[same:], full[same:].split(PROBE)
    if len(tail) == 1 and not rest:
        return lead, tail[0]
    if len(tail) == 1 and before.rstrip().endswith("<think>"):
        return lead if "</think>" in lead else "\n</think>\n\n", tail[0]
    raise UserError(
        "model.chat_template: a conversation with a response does not start with its generation prompt",
        f"{full[:120]!r} does not start with {before[:120]!r}, so the tokens of the response are unknown.",
        "Use a template whose generation prompt is the start of the assistant turn, and which writes text content.",
    )


def _shared_start(one: str, other: str) -> int:
    """The number of characters that two texts share at their start."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class ChatTokenizer:
    """A tokenizer with its chat template: encodes prompts, responses and conversations, and decodes responses.

    Attributes:
        end_id: The token that ends a response: the template's end of turn, else EOS.
        pad_id: The padding token (PAD, else `end_id`); masks hide it everywhere.
        lead: What the template writes between the generation prompt and a response: a space, or the end of a reasoning
            block that is empty.
        frozen_at: The time that the template's `strftime_now` gives, in ISO format; None if it does not read the clock.
        own_template: False if `default` is used, because the model has no template and none was chosen.
    """

    def __init__(
        self, tokenizer: Any, in_text: InText = "as_text", frozen_at: str | None = None, own_template: bool = True
    ) -> None:
        self.tokenizer, self.frozen_at, self.own_template = tokenizer, frozen_at, own_template
        self.renderer = Renderer(tokenizer, in_text)
        probe = [Message("user", "hello"), Message("assistant", PROBE)]
        question, before, full = self._probe(probe[:1], False), self._probe(probe[:1], True), self._probe(probe, False)
        self._generation_prompt = before[_shared_start(question, before) :]
        self.lead, tail = _around_response(before, full)
        self.renderer.add_control(before + full)
        added = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends = [token for token in self._encode(tail) if token in added]
        if not ends and tokenizer.eos_token_id is None:
            raise _no_end(tokenizer)
        self.end_id: int = ends[0] if ends else tokenizer.eos_token_id
        end_text = tokenizer.convert_ids_to_tokens(self.end_id)
        self._end = tail[: tail.index(end_text) + len(end_text)] if ends else ""
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.end_id

    @cached_property
    def _anchor(self) -> list[int]:
        """Tokens to put before a continuation if the tokenizer adds a space at the start of any text; else none."""
        newline, joined = self._encode("\n"), self._encode("\na")
        return [] if joined == newline + self._encode("a") else newline

    @property
    def anchored(self) -> bool:
        """Whether the tokenizer adds a space at the start of any text."""
        return bool(self._anchor)

    def _probe(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """Render a conversation that every template must accept."""
        try:
            return self.renderer.render(messages, generation_prompt)
        except RefusedText as error:
            raise UserError(f"model.chat_template: {error.what}, one user turn and its answer", error.why) from None

    def _encode(self, text: str) -> list[int]:
        return self.renderer.encode(text)

    def _encode_next(self, text: str) -> list[int]:
        """Token ids of text that continues other text."""
        if anchor := self._anchor:
            anchored = self._encode("\n" + text)
            if anchored[: len(anchor)] == anchor:
                return anchored[len(anchor) :]
        return self._encode(text)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with a user turn, including the generation prompt.

        Raises:
            RefusedText: The template refuses the conversation, or see `model.control_tokens_in_text`.
        """
        return self._encode(self.renderer.render(messages, True))

    def response(self, text: str) -> list[int]:
        """Token ids of a response, including `end_id`.

        Where the template ends an empty reasoning block before the response, a response with a reasoning block of its
        own ("... </think> ...") does without.

        Raises:
            RefusedText: See `model.control_tokens_in_text`.
        """
        lead = self.lead
        if "</think>" in text and "<think>" in self._generation_prompt + lead:
            opened = "<think>" in self._generation_prompt
            lead, text = "", text.removeprefix("<think>").removeprefix("\n") if opened else text
        ids = self._encode_next(lead + self.renderer.marked(text))
        return [*ids, self.end_id]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation that ends with a response, and for each whether the assistant said it.

        The assistant's tokens are those of its last response, and of earlier ones that the template writes as it
        writes the last one: after the generation prompt. They include ends of turns.

        Raises:
            RefusedText: See `prompt`.
        """
        before, response = messages[:-1], self.response(messages[-1].content)
        text = self.renderer.render(before, True)
        ids, flags = self._encode(text), None
        if any(m.role == "assistant" for m in before):
            flags = self._flags(ids, text, self._earlier_responses(before, text))
        return ids + response, (flags or [False] * len(ids)) + [True] * len(response)

    def _earlier_responses(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where in `text` the responses are that follow a generation prompt: (start after it, end with its end)."""
        found = []
        for start, end in self.renderer.response_spans(messages, text):
            while start and text[start - 1].isspace() and not text.endswith(self._headers, 0, start):
                start -= 1
            while self._end and end < len(text) and text[end].isspace() and not text.startswith(self._end, end):
                end += 1
            if text.endswith(self._headers, 0, start) and text.startswith(self._end, end):
                lead = text.endswith(self._headers[0], 0, start) * len(self.lead)
                found.append((start - lead, end + len(self._end)))
        return found

    @cached_property
    def _headers(self) -> tuple[str, str]:
        return self._generation_prompt + self.lead, self._generation_prompt

    def _flags(self, ids: list[int], text: str, spans: Sequence[tuple[int, int]]) -> list[bool] | None:
        """For each token of `text`, whether it lies in one of the spans; None if the tokenizer gives no positions."""
        if not self.tokenizer.is_fast or MARK in text:
            return self._flags_by_pieces(ids, text, spans)
        positions = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        flags, waiting = [], iter([*spans, (len(text) + 1, len(text) + 1)])
        first, last = next(waiting)
        for start, end in positions:
            while start >= last:
                first, last = next(waiting)
            flags.append(first <= start and end <= last)
        return flags

    def _flags_by_pieces(self, ids: list[int], text: str, spans: Sequence[tuple[int, int]]) -> list[bool] | None:
        """`_flags` without positions: the text is encoded in pieces, which must give the tokens of the whole."""
        cuts = [0, *(place for span in spans for place in span), len(text)]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:])]
        encoded = [self._encode_next(piece) if i else self._encode(piece) for i, piece in enumerate(pieces)]
        if [token for piece in encoded for token in piece] != ids:
            return None
        return [i % 2 == 1 for i, piece in enumerate(encoded) for _ in piece]

    def whole(self, chat: Sequence[Mapping[str, str]], response: str) -> list[int]:
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
        ids = ids[:-1] if ids and ids[-1] == self.end_id else ids  # an end of turn need not be a special token
        text = self._decode([*self._anchor, *ids])[len(self._decode(self._anchor)) :]
        return text.removeprefix(self._decoded_lead)

    def decode_all(self, responses: Iterable[Sequence[int]]) -> list[str]:
        """The text of each response; see `decode`."""
        return [self.decode(ids) for ids in responses]

    @cached_property
    def _decoded_lead(self) -> str:
        """`lead` as `decode` gives it: without special tokens."""
        return self._decode([*self._anchor, *self._encode_next(self.lead)])[len(self._decode(self._anchor)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def truncate_prompt(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens of a prompt; its first token is kept if that is BOS."""
        if len(ids) <= room:
            return ids
        first = ids[: ids[0] == self.tokenizer.bos_token_id]
        return first + ids[len(ids) - room + len(first) :]

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 (16 hex digits) of the vocabulary with special tokens (`tokenizer`) and of the `chat_template`."""
        vocabulary = json.dumps([self.tokenizer.get_vocab(), self.tokenizer.special_tokens_map], sort_keys=True)
        return {"tokenizer": short_hash(vocabulary), "chat_template": short_hash(self.tokenizer.chat_template)}

    def facts(self) -> dict[str, str]:
        """What run.json records: the fingerprints, and of a template that reads the clock `template_time`."""
        return self.fingerprints() | ({"template_time": self.frozen_at} if self.frozen_at else {})


class EncoderDecoderTokenizer(ChatTokenizer):
    """For an encoder-decoder: the encoder reads the prompt with its generation prompt, the decoder the response alone.

    A response is therefore encoded as text of its own, with the start token that the tokenizer puts before text (BART),
    and only the last response of a conversation is the decoder's.
    """

    @cached_property
    def _start(self) -> list[int]:
        whole, bare = (list(self.tokenizer("a", add_special_tokens=on)["input_ids"]) for on in (True, False))
        return whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]

    def response(self, text: str) -> list[int]:
        return [*self._start, *self._encode(self.renderer.marked(text)), self.end_id]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        prompt, response = self.prompt(messages[:-1]), self.response(messages[-1].content)
        return prompt + response, [False] * len(prompt) + [True] * len(response)

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(ids[:-1] if ids and ids[-1] == self.end_id else ids)


def short_hash(text: str) -> str:
    """The first 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stop_ids(model: Any, chat: ChatTokenizer) -> list[int]:
    """The tokens that end a response: the chat template's first, then those of the tokenizer and generation config."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    others = {chat.tokenizer.eos_token_id, *listed} - {None, chat.end_id}
    return [chat.end_id, *sorted(others)]
