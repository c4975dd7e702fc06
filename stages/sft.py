"""Stage 1: instruction tuning on demonstrations. The loss is the negative log-likelihood of the assistant's tokens.

demonstrations -> token rows (rlhf.data.tables) -> token batches -> log-probs -> loss -> best weights -> runs/NAME/model
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.data.selection import open_datasets
from rlhf.data.tables import tokenize
from rlhf.memory.peak import PeakMemory
from rlhf.models.encoder_decoder import is_encoder_decoder
from rlhf.models.load import load_hf_config, load_policy, quiet, sequence_limit
from rlhf.models.logprobs import TokenPredictions, head_chunks, token_predictions
from rlhf.models.vocabulary import token_count
from rlhf.runs.run import data_facts, finish, open_run, parent_facts, resolve_model_path, template_time
from rlhf.sft.batches import TokenBatch, check_packing, pack, token_batch
from rlhf.sft.config import SFTConfig
from rlhf.training.engine import Engine
from rlhf.training.loop import Loop, Objective, supervised_engine
from rlhf.tuning.methods import say_trainable, virtual_tokens
from rlhf.tuning.save import generation_config, save_result

KINDS = ("demonstration", "ranking")
"""What can be learned from: of a ranking, its best answer is the demonstration."""


def run(config: SFTConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train, and leave the result in the run folder's model/."""
    distributed.start(config.timeout_seconds, config.deepspeed is not None)
    quiet()
    path = resolve_model_path(config.model.path)
    # 1. tokenizer, run folder, rows
    chat = load_tokenizer(config.model, path, template_time(config, resume))
    limit = sequence_limit(config.model, load_hf_config(config.model, path)) - virtual_tokens(config.tuning)
    data = open_datasets([*config.data.train, *config.data.eval], KINDS, "data")
    facts = {"parents": [parent_facts(config.model.path)], "data": data_facts(data), **chat.facts()}
    folder = open_run(config, "sft", resume, overwrite, facts)
    tables = tokenize(folder.path, chat, limit, config.data, "demonstration", KINDS)
    # 2. the model, and what of it is trained; the same first weights on every rank
    transformers.set_seed(config.seed)
    memory = PeakMemory()
    model = config.tuning(load_policy(config.model, path, tokens=token_count(chat.tokenizer)), chat, "causal")
    say_trainable(config.tuning, model)
    # 3. training
    train = pack(tables.train, limit, model) if config.batch.packing else tables.train
    engine = supervised_engine(config, TokenPredictor(model))
    if config.batch.packing:
        check_packing(engine, model, chat, max(tables.train["length"]))
    objective = SFTObjective(config, chat, model, tables.eval)
    loop = Loop(config, folder, engine, objective, train, held_out=len(tables.eval) > 0)
    loop.fit(resume)
    # 4. the result: the weights of the best checkpoint
    save_result(folder.path, model, chat, config.tuning)
    loss = loop.best[1] if loop.best else None
    metrics = {} if loss is None else {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
    finish(folder, step=loop.best_step, metrics=metrics, peak_memory=memory.measured())
    lengths = tables.train["length"]
    memory.report(config, limit if config.batch.packing else max(lengths), sum(lengths) / len(lengths))


# ---- the loss ------------------------------------------------------------------------------------------------------


class TokenPredictor(nn.Module):
    """The policy as the engine calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch, chunks: int) -> TokenPredictions:
        """Predictions for the labelled tokens."""
        return token_predictions(
            self.model, batch.input_ids, batch.attention_mask, batch.labelled, chunks, batch.position_ids
        )


class SFTObjective(Objective[TokenBatch]):
    """The negative log-likelihood of the assistant's tokens; on held-out demonstrations also sample completions."""

    means = ("train/entropy", "train/token_accuracy")

    def __init__(self, config: SFTConfig, chat: ChatTokenizer, model: Any, held_out: Any) -> None:
        self.config, self.chat, self.model, self.held_out = config, chat, model, held_out
        self.vocab_size = model.config.get_text_config().vocab_size

    def batch(self, rows: list[dict[str, Any]]) -> TokenBatch:
        return token_batch(rows, self.chat, self.config.batch.packing)

    def items(self, batch: TokenBatch) -> Tensor:
        return batch.labelled.sum()

    def tokens(self, batch: TokenBatch) -> Tensor:
        return torch.ones_like(batch.input_ids).sum() if batch.attention_mask is None else batch.attention_mask.sum()

    def loss(self, engine: Engine, batch: TokenBatch) -> tuple[Tensor, list[Tensor]]:
        logprobs, entropies, top1 = self._predict(engine, batch)
        return -logprobs.sum(), [entropies.sum(), top1.sum()]

    def _predict(self, engine: Engine, batch: TokenBatch) -> TokenPredictions:
        most = distributed.all_max(batch.labelled.sum())  # ZeRO-3 needs the same number of chunks on all ranks
        found: TokenPredictions = engine(batch, head_chunks(int(most), self.vocab_size))
        return found

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Mean negative log-likelihood in nats per assistant token, perplexity, and the fraction ranked first."""
        sums = torch.zeros(3, dtype=torch.float64, device=distributed.device())
        for batch in self._held_out_batches():
            logprobs, _, top1 = self._predict(engine, batch)
            sums += torch.stack([-logprobs.double().sum(), top1.double().sum(), batch.labelled.sum().double()])
        loss, right, tokens = distributed.all_sum(sums).tolist()
        loss /= max(tokens, 1)
        return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": right / max(tokens, 1)}

    def _held_out_batches(self) -> Iterator[TokenBatch]:
        """This rank's part of the held-out rows; every rank gets the same number of batches, some without labels."""
        micro, ranks = self.config.batch.micro_batches(distributed.world_size())[0], distributed.world_size()
        lengths = self.held_out["length"][:]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for start in range(0, len(order), micro * ranks):
            mine = order[start : start + micro * ranks][distributed.rank() :: ranks]
            batch = self.batch([self.held_out[row] for row in mine or order[:1]])
            yield batch if mine else replace(batch, labelled=torch.zeros_like(batch.labelled))

    def samples(self, engine: Engine) -> list[dict[str, Any]]:
        """Completions of the first held-out prompts."""
        rows = [self.held_out[i] for i in range(min(self.config.eval.samples, len(self.held_out)))]
        if not rows:
            return []
        starts = [answer_start(row["labels"]) for row in rows]
        prompts = [row["input_ids"][:start] for row, start in zip(rows, starts)]
        with engine.autocast():
            answers = sample_answers(self.model, self.chat, prompts, self.config.eval.sample_tokens)
        decode = self.chat.tokenizer.decode
        return [
            {
                "prompt": decode(prompt),
                "answer": self.chat.decode(answer),
                "ended": self.chat.end_id in answer,
                "demonstration": self.chat.decode(row["input_ids"][start:]),
            }
            for prompt, answer, row, start in zip(prompts, answers, rows, starts)
        ]


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats."""
    return math.exp(min(loss, 700))


def answer_start(labels: list[int]) -> int:
    """Where the last completion begins in a row of labels: after the last token that is not trained on."""
    return max((i + 1 for i, label in enumerate(labels) if label == -100), default=0)


def sample_answers(model: Any, chat: ChatTokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy completions of token prompts, cut after the token that ends them. Every rank calls it with the same."""
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = generation_config(model, chat)
    config.update(do_sample=False, max_new_tokens=max_new_tokens, max_length=None, use_cache=True)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    before = 1 if is_encoder_decoder(model) else width  # the decoder's start token, or the prompt
    return [_until_end(row, config.eos_token_id) for row in out[:, before:]]


def _until_end(row: Tensor, ends: list[int]) -> list[int]:
    tokens = row.tolist()
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


if __name__ == "__main__":
    main("sft")
