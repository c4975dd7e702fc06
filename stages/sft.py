"""Stage 1: instruction tuning on demonstrations, over TRL's SFTTrainer. The loss is over assistant tokens alone.

demonstrations -> token rows (rlhf.data.tables) -> batches -> SFTTrainer -> best weights -> runs/NAME/model
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from trl import SFTConfig as SFTArguments
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.core.errors import UserError
from rlhf.data.chat import ChatTokenizer, load_tokenizer
from rlhf.data.tables import open_all, tokenize
from rlhf.inference.policy import quiet
from rlhf.memory.peak import PeakMemory
from rlhf.models.load import load_hf_config, load_policy, sequence_limit
from rlhf.models.packed_attention import VARLEN
from rlhf.models.save import generation_config, save_result
from rlhf.models.tuning import say_trainable, virtual_tokens
from rlhf.runs.run import Run, data_facts, finish, open_run, parent_facts, resolve_model_path
from rlhf.sft.config import SFTConfig
from rlhf.training.trainer import StageTrainer, training_arguments

KINDS = ("demonstration", "ranking")
"""What can be learned from: of a ranking, its best answer is the demonstration."""


def run(config: SFTConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train, and leave the result in the run folder's model/."""
    distributed.start(config.timeout_seconds, config.deepspeed is not None)
    quiet()
    path = resolve_model_path(config.model.path)
    # 1. tokenizer, run folder, rows
    chat = load_tokenizer(config.model, path)
    limit = sequence_limit(config.model, load_hf_config(config.model, path)) - virtual_tokens(config.tuning)
    data = open_all([*config.data.train, *config.data.eval], KINDS, "data")
    facts = {"parents": [parent_facts(config.model.path)], "data": data_facts(data), **chat.fingerprints()}
    folder = open_run(config, "sft", resume, overwrite, facts)
    tables = tokenize(folder.path, chat, limit, config.data, "demonstration", KINDS)
    # 2. the model, and what of it is trained; the same first weights on every rank
    transformers.set_seed(config.seed)
    memory = PeakMemory()
    model = config.tuning(load_policy(config.model, path), chat, "causal")
    say_trainable(config.tuning, model)
    # 3. training
    train = pack(tables.train, limit, model) if config.batch.packing else tables.train
    trainer = PolicyTrainer(config, folder, chat, model, train, tables.eval)
    trainer.fit(resume)
    # 4. the result: the weights of the best checkpoint
    save_result(folder.path, trainer.model, chat, config.tuning)
    best = trainer.state.best_metric
    metrics = {} if best is None else {"eval/loss": best, "eval/perplexity": perplexity(best)}
    finish(folder, step=trainer.best_step, metrics=metrics)
    memory.report(config, limit if config.batch.packing else max(tables.train["length"]))


def pack(table: Any, limit: int, model: Any) -> Any:
    """Rows of up to `limit` tokens with several demonstrations each, by best-fit decreasing (TRL's `bfd`).

    Raises:
        UserError: The model's attention would let the demonstrations of a row see each other.
    """
    attention = model.config._attn_implementation
    if attention not in VARLEN:
        raise UserError(
            f"batch.packing: the attention implementation is {attention!r}",
            "It would let the demonstrations that share a row see each other.",
            "Set model.attn_implementation=flash_attention_2 (needs a GPU and flash-attn), or batch.packing=false.",
        )
    return pack_dataset(table.select_columns(["input_ids", "labels"]), limit, "bfd")


class PolicyTrainer(StageTrainer, SFTTrainer):
    """TRL's loss on our token rows, with held-out loss, perplexity and sample answers."""

    def __init__(self, config: SFTConfig, run: Run, chat: ChatTokenizer, model: Any, train: Any, held_out: Any) -> None:
        self.chat = chat
        arguments = training_arguments(
            config, run, SFTArguments, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None
        )
        super().__init__(
            config,
            run,
            args=arguments,
            model=model,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=chat.tokenizer,
            data_collator=DataCollatorForLanguageModeling(chat.pad_id, padding_free=config.batch.packing),
        )

    def _send_telemetry(self) -> None:
        """Nothing about a run leaves the machine."""

    def evaluate_records(self, model: Any) -> dict[str, float]:
        """Mean negative log-likelihood in nats per assistant token, perplexity, and the share of tokens foretold."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for inputs, rows in self.held_out_batches():
            inputs["labels"][rows:] = -100
            out = model(**inputs, use_cache=False, fused_lm_head=True)
            sums += torch.stack([-out.log_probs.double().sum(), out.is_top1.double().sum(), out.label_mask.sum()])
        loss, right, tokens = distributed.all_sum(sums).tolist()
        loss /= max(tokens, 1)
        return {"loss": loss, "perplexity": perplexity(loss), "token_accuracy": right / max(tokens, 1)}

    def after_evaluation(self, model: Any, step: int) -> None:
        """Answers to the first held-out prompts go to samples.jsonl."""
        rows = [self.eval_dataset[i] for i in range(min(self.config.eval.samples, len(self.eval_dataset)))]
        if not rows:
            return
        starts = [answer_start(row["labels"]) for row in rows]
        prompts = [row["input_ids"][:start] for row, start in zip(rows, starts)]
        answers = sample_answers(self.model, self.chat, prompts, self.config.eval.sample_tokens)
        decode = self.chat.tokenizer.decode
        self.run.log(
            "samples.jsonl",
            [
                {
                    "step": step,
                    "prompt": decode(prompt),
                    "answer": self.chat.decode(answer),
                    "ended": self.chat.end_id in answer,
                    "demonstration": self.chat.decode(row["input_ids"][start:]),
                }
                for prompt, answer, row, start in zip(prompts, answers, rows, starts)
            ],
        )


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats."""
    return math.exp(min(loss, 700))


def answer_start(labels: list[int]) -> int:
    """Where the last answer begins in a row of labels: after the last token that is not trained on."""
    return max((i + 1 for i, label in enumerate(labels) if label == -100), default=0)


def sample_answers(model: Any, chat: ChatTokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The likeliest answers to token prompts, cut after the token that ends them. Every rank calls it alike."""
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = generation_config(model, chat)
    config.update(do_sample=False, max_new_tokens=max_new_tokens, max_length=None, use_cache=True)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [_until_end(row, config.eos_token_id) for row in out[:, width:]]


def _until_end(row: Tensor, ends: list[int]) -> list[int]:
    tokens = row.tolist()
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


if __name__ == "__main__":
    main("sft")
