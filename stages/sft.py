"""Stage 1: instruction tuning on demonstrations. The loss is the negative log-likelihood of the assistant's tokens.

demonstrations -> token rows (rlhf.data.tables) -> token batches -> log-probs -> loss -> best weights -> runs/NAME/model
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.tables import tokenize
from rlhf.memory.peak import PeakMemory
from rlhf.models.forward import TokenPredictions, head_chunks, is_encoder_decoder, predicting_states, token_logprobs
from rlhf.models.vocabulary import token_count
from rlhf.rollout.samplers import hf
from rlhf.rollout.streams import stream_seed
from rlhf.rollout.types import SamplingParams
from rlhf.runs.parents import parent_facts
from rlhf.runs.run import data_facts, finish, open_run
from rlhf.sft.batches import (
    DistillationBatch,
    StepByStepBatch,
    TokenBatch,
    check_packing,
    pack,
    step_by_step_batch,
    token_batch,
)  # fmt: skip
from rlhf.sft.config import LogitsConfig, SFTConfig, StepByStepConfig
from rlhf.sft.divergence import StudentPredictions, divergence, student_predictions
from rlhf.sft.teacher import FrozenTeacher, check_teacher
from rlhf.tasks.answers import answer_pattern
from rlhf.training.engine import Engine
from rlhf.training.loop import Loop, Objective, supervised_engine
from rlhf.training.opening import open_stage, tuned_policy
from rlhf.tuning.save import generation_config, save_result

KINDS = ("demonstration", "ranking")
"""Kinds of records to train on: a ranking's best answer is the demonstration."""


def run(config: SFTConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train, and leave the result in the run folder's model/."""
    # 1. tokenizer, run folder, rows
    start = open_stage(config, resume, KINDS)
    chat, limit, parents = start.chat, start.limit, [config.model.path]
    if logits := config.distillation and config.distillation.logits:
        limit = min(limit, check_teacher(logits.teacher, config.model, chat))
        parents.append(logits.teacher)
    facts = {"parents": [parent_facts(parent) for parent in parents], "data": data_facts(start.data), **chat.facts()}
    folder = open_run(config, "sft", resume, overwrite, facts)
    steps = config.distillation and config.distillation.step_by_step
    kind, options = ("step-by-step", _tasks(steps)) if steps else ("demonstration", None)
    tables = tokenize(folder.path, chat, limit, config.data, kind, KINDS, options=options)
    # 2. the model and its trainable weights
    memory = PeakMemory()
    model = tuned_policy(config, start)
    # 3. training
    train = pack(tables.train, limit, model) if config.batch.packing else tables.train
    engine = supervised_engine(config, Student(model) if logits else TokenPredictor(model))
    if config.batch.packing:
        check_packing(engine, model, chat, max(tables.train["length"]))
    objective = SFTObjective(config, chat, model, tables.eval)
    if logits:
        teacher = FrozenTeacher(logits.teacher, config.model, chat, engine)
        objective = LogitsObjective(config, chat, model, tables.eval, logits, teacher, limit)
    elif steps:
        objective = StepByStepObjective(config, chat, model, tables.eval, steps)
    loop = Loop(config, folder, engine, objective, train, held_out=len(tables.eval) > 0)
    loop.fit(resume)
    # 4. the result: the weights of the best checkpoint
    save_result(folder.path, model, chat, config.tuning)
    metrics = {"eval/loss": loop.best[1]} if loop.best else {}
    if metrics and not config.distillation:
        metrics["eval/perplexity"] = perplexity(metrics["eval/loss"])
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
        ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
        return token_logprobs(self.model, ids, mask, batch.labelled, 1.0, chunks, positions, top1=True)


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
        return engine.forward(batch, head_chunks(engine.largest(batch.labelled.sum()), self.vocab_size))

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Mean negative log-likelihood in nats per assistant token, perplexity, and top-1 accuracy."""

        def parts(batch: TokenBatch) -> tuple[Tensor, ...]:
            logprobs, _, top1 = self._predict(engine, batch)
            return -logprobs, top1, batch.labelled

        loss, right, tokens = self._held_out_sums(parts)
        loss /= max(tokens, 1)
        return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": right / max(tokens, 1)}

    def _held_out_sums(self, parts: Callable[[Any], tuple[Tensor, ...]]) -> list[float]:
        """Sums of the parts of all held-out batches, in float64."""
        sums = sum(torch.stack([part.double().sum() for part in parts(batch)]) for batch in self._held_out_batches())
        return distributed.all_sum(sums).tolist()

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


# ---- distillation from a teacher's distributions -------------------------------------------------------------------

SAMPLED, CHOSEN = 21, 22
"""Purposes of random streams: the tokens of a sampled answer, and whether a demonstration's answer is sampled."""


class Student(TokenPredictor):
    """The policy as the engine calls it, next to its teacher."""

    def forward(
        self, batch: TokenBatch, chunks: int, states: Tensor, logits: Callable[[Tensor], Tensor],
        measure: Callable[[Tensor, Tensor], Tensor], tokens: int,
    ) -> StudentPredictions:  # fmt: skip
        """Predictions for the labelled tokens, and their divergence from the teacher's."""
        hidden, targets = predicting_states(self.model, batch.input_ids, batch.attention_mask, batch.labelled)
        return student_predictions(self.model, hidden, targets, states, logits, measure, tokens, chunks)


class LogitsObjective(SFTObjective):
    """The divergence from a teacher's next-token distributions, on demonstrations and on the student's own answers
    (GKD, Agarwal et al. 2024, arXiv:2306.13649, algorithm 1, with the choice made for each record, not each batch)."""

    means = ("train/entropy", "train/token_accuracy", "train/divergence", "train/on_policy")

    def __init__(
        self, config: SFTConfig, chat: ChatTokenizer, model: Any, held_out: Any, logits: LogitsConfig,
        teacher: FrozenTeacher, limit: int,
    ) -> None:  # fmt: skip
        super().__init__(config, chat, model, held_out)
        self.logits, self.teacher, self.limit = logits, teacher, limit
        self.known = token_count(chat.tokenizer)
        self.measure = partial(divergence, kind=logits.divergence, beta=logits.beta, temperature=logits.temperature)

    def batch(self, rows: list[dict[str, Any]], sampled: Sequence[bool] = ()) -> DistillationBatch:
        flags = torch.tensor(list(sampled) or [False] * len(rows), device=distributed.device())
        return DistillationBatch(**vars(token_batch(rows, self.chat, packing=False)), sampled=flags)

    def training_batch(
        self, engine: Engine, rows: list[dict[str, Any]], numbers: list[int], step: int
    ) -> DistillationBatch:
        """Demonstrations, a fraction of them with an answer newly sampled from the student."""
        if not self.logits.on_policy:
            return self.batch(rows)
        starts = [answer_start(row["labels"]) for row in rows]
        chosen = [
            i for i, number in enumerate(numbers)
            if starts[i] < self.limit
            and stream_seed(self.config.seed, CHOSEN, step, number) < self.logits.on_policy * 2**63
        ]  # fmt: skip
        prompts = [rows[i]["input_ids"][: starts[i]] for i in chosen]
        seeds = [stream_seed(self.config.seed, SAMPLED, step, numbers[i]) for i in chosen]
        room = min((self.limit - len(prompt) for prompt in prompts), default=1)
        params = SamplingParams(min(self.logits.max_new_tokens, room), temperature=self.logits.sampling_temperature)
        with engine.gathered(self.model):  # on every rank, with prompts or without
            drawn = hf(self.model, prompts, seeds, params, self.chat)
        for i, prompt, one in zip(chosen, prompts, drawn):
            rows[i] = {"input_ids": prompt + one.ids, "labels": [-100] * len(prompt) + one.ids}
        return self.batch(rows, [i in chosen for i in range(len(rows))])

    def loss(self, engine: Engine, batch: TokenBatch) -> tuple[Tensor, list[Tensor]]:
        found, demonstrated = self._distilled(engine, batch)
        total = found.divergences.sum() - self.logits.sft_weight * (found.logprobs * demonstrated).sum()
        return total, [found.entropies.sum(), found.top1.sum(), found.divergences.sum(), (~demonstrated).sum()]

    def _distilled(self, engine: Engine, batch: DistillationBatch) -> tuple[StudentPredictions, Tensor]:
        chunks = head_chunks(engine.largest(batch.labelled.sum()), self.vocab_size)
        states = self.teacher.states(batch)
        found = engine.forward(batch, chunks, states, self.teacher.logits, self.measure, self.known)
        return found, batch.demonstrated

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Loss, divergence, perplexity and top-1 accuracy on held-out demonstrations."""

        def parts(batch: DistillationBatch) -> tuple[Tensor, ...]:
            found, _ = self._distilled(engine, batch)
            return found.divergences, -found.logprobs, found.top1, batch.labelled

        divergence, nll, right, tokens = self._held_out_sums(parts)
        divergence, nll, right = (total / max(tokens, 1) for total in (divergence, nll, right))
        loss = divergence + self.logits.sft_weight * nll
        return {"loss": loss, "divergence": divergence, "perplexity": perplexity(nll), "token_accuracy": right}


# ---- distillation of rationales --------------------------------------------------------------------------------------


def _tasks(steps: StepByStepConfig) -> dict[str, Any]:
    """How a demonstration becomes the two tasks."""
    return {
        "parts": answer_pattern(steps.pattern).parts,
        **steps.model_dump(include={"label_prefix", "rationale_prefix"}),
    }


class StepByStepObjective(SFTObjective):
    """Distilling Step-by-Step (Hsieh et al. 2023, arXiv:2305.02301, equations 1, 3 and 4): the mean over demonstrations
    of the label's loss + `rationale_weight` x the rationale's, each a mean over its tokens. An item is a demonstration.
    """

    means = ("train/label_loss", "train/rationale_loss")

    def __init__(
        self, config: SFTConfig, chat: ChatTokenizer, model: Any, held_out: Any, steps: StepByStepConfig
    ) -> None:
        super().__init__(config, chat, model, held_out)
        self.steps = steps

    def batch(self, rows: list[dict[str, Any]]) -> StepByStepBatch:
        return step_by_step_batch(rows, self.chat, self.steps.rationale_weight)

    def items(self, batch: TokenBatch) -> Tensor:
        return torch.tensor(batch.demonstrations, device=batch.labelled.device)

    def loss(self, engine: Engine, batch: TokenBatch) -> tuple[Tensor, list[Tensor]]:
        losses = -self._predict(engine, batch).logprobs * batch.weights
        label, rationale = losses[batch.is_label].sum(), losses[~batch.is_label].sum()
        return label + rationale, [label, rationale]

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """The loss on held-out demonstrations; of the labels also the loss per demonstration and top-1 accuracy."""

        def parts(batch: StepByStepBatch) -> tuple[Tensor, ...]:
            logprobs, _, top1 = self._predict(engine, batch)
            found = len(logprobs)  # none if this rank has no rows left, and took part in the forward pass
            losses, label = -logprobs * batch.weights[:found], batch.is_label[:found]
            return losses, losses[label], top1[label], label, losses.new_tensor(batch.demonstrations if found else 0)

        loss, label_loss, right, tokens, count = self._held_out_sums(parts)
        count = max(count, 1)
        return {"loss": loss / count, "label_loss": label_loss / count, "token_accuracy": right / max(tokens, 1)}


# ---- samples -------------------------------------------------------------------------------------------------------


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats."""
    return math.exp(min(loss, 700))


def answer_start(labels: list[int]) -> int:
    """Start of the last completion in a row of labels: after the last token that is not trained on."""
    return max((i + 1 for i, label in enumerate(labels) if label == -100), default=0)


def sample_answers(model: Any, chat: ChatTokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy completions of token prompts, cut after the end token. Every rank calls it with the same prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = generation_config(model, chat)
    config.update(do_sample=False, max_new_tokens=max_new_tokens, max_length=None, use_cache=True)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    before = 1 if is_encoder_decoder(model) else width  # the decoder's start token, or the prompt
    rows: list[list[int]] = out[:, before:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in config.eos_token_id), None) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


if __name__ == "__main__":
    main("sft")
