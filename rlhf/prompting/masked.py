"""Masked language models: log-probs of words at the mask of a text.

A word of k tokens takes the place of k masks. Its log-prob is the sum of those of its tokens at their masks, all
masked at once, as in pattern-exploiting training (Schick and Schütze 2021, "It's Not Just Size That Matters", eq. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.console import track
from rlhf.core.errors import UserError
from rlhf.data.chat_rendering import RefusedText
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.inference.policy import Policy, open_policy
from rlhf.models.load import compute_dtype, load_hf_config, quiet, sequence_limit
from rlhf.prompting.continuations import similar
from rlhf.runs.parents import resolve_model_path


@dataclass(frozen=True)
class MaskedModel:
    """A masked language model in evaluation mode, on this process's device."""

    path: str
    model: Any
    chat: ChatTokenizer
    """With the template `plain`; CLS and SEP are its BOS and EOS."""
    limit: int
    """Longest text in tokens, CLS and SEP included."""

    def word_ids(self, gap: str, word: str) -> list[int]:
        """Tokens of a word after other text and `gap`."""
        tokenizer = self.chat.tokenizer
        before, whole = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", f"a{gap}{word}"))
        return whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(word, False)

    def text_ids(self, before: str, masks: int, after: str) -> list[int]:
        """Tokens of a text with masks between `before` and `after`; a long one loses tokens after CLS.

        Text that spells a control token, such as `[MASK]`, does not become one.

        Raises:
            RefusedText: The masks do not fit, or see `ChatTokenizer`.
        """
        renderer, mask = self.chat.renderer, self.chat.tokenizer.mask_token
        body = renderer.encode(renderer.marked(before) + mask * masks + renderer.marked(after))
        kept = body[max(0, len(body) - self.limit + 2) :]
        if kept.count(self.chat.tokenizer.mask_token_id) != masks:
            raise RefusedText(f"the text after the mask does not fit in {self.limit:,} tokens", "", "Shorten it.")
        return [self.chat.tokenizer.cls_token_id, *kept, self.chat.tokenizer.sep_token_id]

    def logprobs(self, texts: Sequence[tuple[str, str]], words: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of each word at the mask of each text in nats, summed over the word's tokens.

        Args:
            texts: What is before and after the mask.
            words: Token ids of the words.

        Returns:
            [text][word].
        """
        found = [[0.0] * len(words) for _ in texts]
        rows = [(i, size, self.text_ids(before, size, after)) for i, (before, after) in enumerate(texts)
                for size in sorted({len(word) for word in words})]  # fmt: skip
        for batch in track(similar(rows, lambda row: len(row[2])), "masks", unit="batches"):
            logits = self._at_masks([ids for _, _, ids in batch]).log_softmax(-1)
            start = 0
            for i, size, _ in batch:
                part = logits[start : start + size]
                start += size
                for k, word in enumerate(words):
                    if len(word) == size:
                        found[i][k] = float(part[torch.arange(size), torch.tensor(word)].double().sum())
        return found

    @torch.no_grad()
    def _at_masks(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """float32 [masks, V]: logits at the masks of all rows; the output layer sees no other position."""
        ids, attention = self.chat.pad(rows, self.model.device)
        at_mask = (ids == self.chat.tokenizer.mask_token_id) & (attention == 1)
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][at_mask], *inputs[1:]))
        try:
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=attention).logits
        finally:
            hook.remove()
        return logits.float()


def is_masked(path: str | Path, trust_remote_code: bool = False) -> bool:
    """Whether a model folder or hub name holds a masked language model.

    Raises:
        UserError: There is no model.
    """
    folder = resolve_model_path(path)
    if (Path(folder) / "adapter_config.json").is_file():
        return False
    config = load_hf_config(ModelConfig(path=str(path), trust_remote_code=trust_remote_code), folder)
    return any(name.endswith("ForMaskedLM") for name in config.architectures or [])


def open_masked(path: str | Path, trust_remote_code: bool = False) -> MaskedModel:
    """Load a masked language model from a model folder or a hub name.

    Raises:
        UserError: It cannot be loaded, or its tokenizer has no mask.
    """
    quiet()
    folder = resolve_model_path(path)
    config = ModelConfig(path=str(path), chat_template="plain", trust_remote_code=trust_remote_code)
    found, chat = load_hf_config(config, folder), load_tokenizer(config, folder)
    if chat.tokenizer.mask_token is None or chat.tokenizer.cls_token is None or chat.tokenizer.sep_token is None:
        raise UserError(f"{path}: its tokenizer lacks a mask, CLS or SEP token", remedy="Name a BERT-like model.")
    try:
        model = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=compute_dtype("auto")
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be loaded", str(error).split("\n")[0]) from None
    return MaskedModel(str(path), model.to(distributed.device()).eval(), chat, sequence_limit(config, found))


def open_prompted(
    path: str | Path, chat_template: str = "auto", trust_remote_code: bool = False
) -> Policy | MaskedModel:
    """Load a policy, or a masked language model.

    Raises:
        UserError: See `open_policy` and `open_masked`.
    """
    if is_masked(path, trust_remote_code):
        return open_masked(path, trust_remote_code)
    return open_policy(path, chat_template, trust_remote_code)
