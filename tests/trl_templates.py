"""The chat templates that TRL ships, with a tiny tokenizer."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import tiny

from rlhf.data.chat_tokenizer import ChatTokenizer

FOLDER = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations))) / "chat_templates"
TAG = re.compile(r"<(?:[|｜][^<>'\"{}]{1,40}|[a-z_]{2,20}|/[a-z_]{2,20}|[a-z_]{2,20}[|])[|｜]?>")


def chat_with(template: str, **options: str) -> ChatTokenizer:
    """The tiny tokenizer with a template; its tags are added tokens, and those with bars special ones."""
    tokenizer = tiny.tokenizer().__class__.from_pretrained(tiny.llama())
    tags = set(TAG.findall(template))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(t for t in tags if "|" in t or "_turn" in t)})
    tokenizer.add_tokens(sorted(t for t in tags if "|" not in t and "_turn" not in t))
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, **options)
