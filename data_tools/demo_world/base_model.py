"""The demo's tiny base model: a byte-level BPE tokenizer and a three-layer Llama, trained on the world's documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from rlhf.core.console import track

PAD, BOS, EOS = range(3)
ROLES = "User:\nAssistant:\n"
"""Words of the chat template, which the tokenizer should know too."""
POSITIONS = 192
WIDTH, LAYERS, HEADS = 64, 3, 4
BATCH_SIZE = 32
LEARNING_RATE = 5e-3


def make_base_model(folder: Path, documents: Sequence[str], steps: int, seed: int) -> dict[str, Any]:
    """Train a base model on documents and save it in Hugging Face format, without a chat template.

    Args:
        folder: The folder to write.
        documents: The texts.
        steps: Optimizer steps of BATCH_SIZE documents.
        seed: Seed of the weights and of the order.

    Returns:
        `parameters`, `vocabulary`, and `loss`: nats per token, mean over the last tenth of the steps.
    """
    tokenizer = make_tokenizer(documents)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(_architecture(len(tokenizer)))
    rows = [[BOS, *ids, EOS] for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]]
    losses = _train(model, rows, steps, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tail = losses[-max(1, steps // 10) :]
    return {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "loss": sum(tail) / len(tail)}


def make_tokenizer(documents: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a token for each word of the documents; it can encode any other text."""
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer, found.decoder = bytes_, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096, min_frequency=2, special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=bytes_.alphabet(), show_progress=False,
    )  # fmt: skip
    found.train_from_iterator([*documents, *[ROLES] * 100], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=POSITIONS
    )


def _architecture(vocabulary: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=WIDTH * 5 // 2, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=POSITIONS, tie_word_embeddings=True, pad_token_id=PAD,
        bos_token_id=BOS, eos_token_id=EOS,
        # The usual 0.02 is for wide models. At this width attention would start flat and copying be learned late.
        initializer_range=0.08,
    )  # fmt: skip


def _train(model: Any, rows: list[list[int]], steps: int, generator: torch.Generator) -> list[float]:
    """Plain language modelling, one document per row; returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    batches = _batches(rows, generator)
    losses = []
    for _ in track(range(steps), "base model", unit="steps"):
        batch = next(batches)
        width = max(map(len, batch))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in batch])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == PAD, -100), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _batches(rows: list[list[int]], generator: torch.Generator) -> Iterator[list[list[int]]]:
    """Endless batches of rows of similar length, in a new random order each pass."""
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        order.sort(key=lambda i: len(rows[i]))
        starts = torch.randperm(len(rows) // BATCH_SIZE, generator=generator).tolist()
        for start in starts:
            yield [rows[i] for i in order[start * BATCH_SIZE : (start + 1) * BATCH_SIZE]]
