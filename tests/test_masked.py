"""Masked language models fill the mask of a prompt."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from prompting_calls import ask, prompter
from tokenizers import Tokenizer, models, pre_tokenizers

from rlhf.core.errors import UserError
from rlhf.prompting.masked import open_masked
from rlhf.rollout.types import SamplingParams

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "movie",
    "makes",
    "me",
    "feel",
    "happy",
    "sad",
    "very",
    ".",
]


def masked(folder: Path, family: str) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, cls_token_id=2, sep_token_id=3,
        bos_token_id=2, eos_token_id=3, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert", "electra"])
def test_a_masked_model_fills_its_mask(family, tmp_path):
    model = open_masked(masked(tmp_path, family))
    spec = '{name: cloze, template: "{prompt} me feel {answer} .", verbaliser: {good: happy, bad: very sad}}'
    (row,) = prompter(model, spec).answer([ask("the movie makes")], SamplingParams(8)).rows
    scores = []
    for word in ([10], [12, 11]):
        ids = [2, 5, 6, 7, 8, 9, *[4] * len(word), 13, 3]
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids])).logits[0, 6 : 6 + len(word)]
        scores.append(math.exp(logits.log_softmax(-1).gather(-1, torch.tensor(word)[:, None]).sum()))
    assert row["probabilities"]["good"] == pytest.approx(scores[0] / sum(scores), rel=1e-4)


def test_text_that_spells_the_mask_is_text(tmp_path):
    model = open_masked(masked(tmp_path, "bert"))
    assert model.text_ids("the [MASK] feel ", 2, " .").count(4) == 2


def test_a_masked_model_writes_no_text_and_knows_its_words(tmp_path):
    model = open_masked(masked(tmp_path, "bert"))
    with pytest.raises(UserError, match="writes no text"):
        prompter(model, "few-shot")
    with pytest.raises(UserError, match="'joyful' is not in the vocabulary"):
        prompter(model, "{name: cloze, verbaliser: {good: joyful, bad: sad}}")
