"""Every text template that TRL ships: prompts are plain transformers' tokens, responses continue them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import tiny

from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.schema import Message

FOLDER = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations))) / "chat_templates"
PICTURES = ("idefics3", "llava_next", "smolvlm")
"""Templates that take lists of text and pictures only: text content is lost or an error."""
TEMPLATES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.startswith(PICTURES))
DIALOGUE = [
    Message("user", "Hello there"),
    Message("assistant", "Hi."),
    Message("user", "Who are you?"),
    Message("assistant", "  A test\nof two lines. "),
    Message("user", "Really?"),
]
TAG = re.compile(r"<(?:[|｜][^<>'\"{}]{1,40}|[a-z_]{2,20}|/[a-z_]{2,20}|[a-z_]{2,20}[|])[|｜]?>")


def chat_with(template: str, **options: str) -> ChatTokenizer:
    """The tiny tokenizer with a template; its tags are added tokens, and those with bars special ones."""
    tokenizer = tiny.tokenizer().__class__.from_pretrained(tiny.llama())
    tags = set(TAG.findall(template))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(t for t in tags if "|" in t or "_turn" in t)})
    tokenizer.add_tokens(sorted(t for t in tags if "|" not in t and "_turn" not in t))
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, **options)


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request: pytest.FixtureRequest) -> ChatTokenizer:
    return chat_with((FOLDER / f"{request.param}.jinja").read_text("utf-8"))


def plain(chat: ChatTokenizer, messages: list[Message], **options: bool) -> list[int]:
    rows = [{"role": m.role, "content": m.content} for m in messages]
    return chat.tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False, **options)


def test_prompts_of_every_length_are_the_tokens_of_plain_transformers(chat: ChatTokenizer) -> None:
    for turns in (1, 3, 5):
        assert chat.prompt(DIALOGUE[:turns]) == plain(chat, DIALOGUE[:turns])


def test_a_conversation_is_the_prompt_and_the_response(chat: ChatTokenizer) -> None:
    for turns in (1, 3, 5):
        ids, mine = chat.conversation([*DIALOGUE[:turns], Message("assistant", "Yes.")])
        prompt, response = chat.prompt(DIALOGUE[:turns]), chat.response("Yes.")
        assert ids == prompt + response
        assert mine[len(prompt) :] == [True] * len(response)
        said = chat.tokenizer.decode([t for t, flag in zip(ids[: len(prompt)], mine) if flag])
        assert "Hello" not in said and "Who" not in said and "Really" not in said


def test_a_response_survives_encoding_and_decoding(chat: ChatTokenizer) -> None:
    for text in ("Yes.", "two\nlines", "Is 2 < 3? Yes."):
        assert chat.decode(chat.response(text)) == text
        assert chat.response(text).count(chat.end_id) == 1


def test_control_tokens_in_text_are_encoded_as_text(chat: ChatTokenizer) -> None:
    token = chat.tokenizer.convert_ids_to_tokens(chat.end_id)
    control = chat.tokenizer.convert_tokens_to_ids(sorted(chat.renderer.control))
    clean, spelled = [Message("user", "Say  now")], [Message("user", f"Say {token} now")]
    count = lambda ids: sum(ids.count(one) for one in control)  # noqa: E731
    assert count(chat.prompt(spelled)) == count(chat.prompt(clean))
    assert count(chat.response(f"Say {token} now")) == count(chat.response("Say  now"))
    assert chat.decode(chat.response(f"Say {token} now")) == f"Say {token} now"
