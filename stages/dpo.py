"""Rankings without RL: direct preference optimisation, the counterpart of stages 2 and 3 on the same rankings.

The reward of an answer is implicit: beta x (log-prob under the policy - log-prob under the reference). A ranking loss
of the reward-model stage compares the rewards of a ranking's answers with each other (Rafailov 2023, arXiv:2305.18290).

rankings -> token rows (rlhf.data.tables) -> log-probs by the reference, once (rlhf.dpo.reference) -> batches
-> log-probs by the policy (rlhf.dpo.policy) -> implicit rewards -> ranking loss -> best weights -> metrics -> model
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.core.console import say
from rlhf.data.tables import tokenize
from rlhf.dpo.batches import PreferenceBatch, answer_tokens, preference_batch
from rlhf.dpo.config import DPOConfig
from rlhf.dpo.losses import METRICS, implicit_rewards, pair_metrics, sft_loss
from rlhf.dpo.policy import PreferencePolicy, sharing_of
from rlhf.dpo.reference import chunks_of, score_answers, with_reference
from rlhf.memory.peak import PeakMemory
from rlhf.models.adapters import is_adapter
from rlhf.models.shared_prompt import NO_SHARING
from rlhf.reward.agreement import Agreement
from rlhf.reward.collator import RankingCollator, comparable, learnable
from rlhf.reward.held_out import HeldOutScores, mean_loss
from rlhf.reward.losses import RankingBatch
from rlhf.reward.metrics import ScoredRanking
from rlhf.runs.parents import parent_facts
from rlhf.runs.run import data_facts, finish, open_run
from rlhf.training.engine import Engine
from rlhf.training.loop import Loop, Objective, supervised_engine
from rlhf.training.opening import open_stage, tuned_policy
from rlhf.tuning.save import save_result


def run(config: DPOConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train, measure on the held-out rankings, and leave the policy in the run folder's model/."""
    # 1. tokenizer, run folder, rows
    start = open_stage(config, resume, ["ranking"])
    chat, data, parent = start.chat, start.data, parent_facts(config.model.path)
    human_agreement = Agreement.of(data[len(config.data.train) :] or data)
    folder = open_run(config, "dpo", resume, overwrite, {"parents": [parent], "data": data_facts(data), **chat.facts()})
    tables = tokenize(folder.path, chat, start.limit, config.data, "ranking")
    train = learnable(tables.train, config.loss)
    held_out = tables.eval if comparable(tables.eval, config.loss) else None
    # 2. the policy and its trainable weights
    memory = PeakMemory()
    model = tuned_policy(config, start)
    sharing = sharing_of(model) if config.shared_prompts else NO_SHARING
    if config.shared_prompts and not sharing.max_length:
        say(f"Prompts: encoded once for each answer, since {type(model).__name__} cannot share them")
    engine = supervised_engine(config, PreferencePolicy(model, goes_on=is_adapter(start.path)))
    # 3. the reference's log-probs, before any weight changes
    collator = RankingCollator(chat, config.data.weights == "use", sharing, distributed.device())
    objective = DPOObjective(config, model, collator, human_agreement)
    facts = {"model": parent, "resize_embeddings": config.model.resize_embeddings, "dtype": str(engine.dtype)}
    cache = folder.path / "cache"
    compute = partial(objective.answers, engine, reference=True)
    train = with_reference(cache / "reference-train.arrow", train, facts, compute)
    if held_out is not None:
        objective.held_out = with_reference(cache / "reference-eval.arrow", held_out, facts, compute)
    # 4. training
    loop = Loop(config, folder, engine, objective, train, held_out is not None)
    loop.fit(resume)
    # 5. held-out metrics, and the result: the weights of the best checkpoint
    headline = objective.best.report(folder, engine, loop.best_step)[0] if held_out is not None else {}
    save_result(folder.path, model, chat, config.tuning)
    finish(folder, step=loop.best_step, metrics=headline, peak_memory=memory.measured())
    memory.report_rows(config, train)


class DPOObjective(Objective[PreferenceBatch]):
    """A ranking loss on implicit rewards, and the SFT term; on held-out rankings also the metrics of reward models."""

    means = METRICS

    held_out: Any = None
    """Rankings with the reference's log-probs."""

    def __init__(
        self, config: DPOConfig, model: Any, collator: RankingCollator, human_agreement: Agreement | None = None
    ) -> None:
        self.config, self.collator, self.vocab_size = config, collator, model.config.get_text_config().vocab_size
        self.best = HeldOutScores(lambda engine: self.scored(self.answers(engine, self.held_out)), human_agreement)

    def batch(self, rows: list[dict[str, Any]]) -> PreferenceBatch:
        return preference_batch(rows, self.collator)

    def items(self, batch: PreferenceBatch) -> Tensor:
        """Summed weights of the rankings. Rankings without a comparable pair were removed before training."""
        return batch.rankings.weights.sum()

    def tokens(self, batch: PreferenceBatch) -> Tensor:
        return batch.attention_mask.sum()

    def loss(self, engine: Engine, batch: PreferenceBatch) -> tuple[Tensor, list[Tensor]]:
        logprobs = engine.forward(batch, chunks_of(engine, batch, self.vocab_size))
        rewards = implicit_rewards(logprobs, batch.reference, self.config.beta)
        losses, _ = self.losses(rewards, logprobs, batch.tokens, batch.rankings)
        metrics = pair_metrics(rewards, logprobs, batch.rankings) @ batch.rankings.weights
        return losses.sum(), list(metrics)

    def losses(
        self, rewards: Tensor, logprobs: Tensor, tokens: list[int], rankings: RankingBatch
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss [B] of each ranking, SFT term included; and which rankings have a loss [B].

        Args:
            rewards: Implicit rewards [N].
            logprobs: Log-probs of the answers [N], nats.
            tokens: Lengths of the answers in tokens [N].
            rankings: How the answers were ranked.
        """
        losses, counted = self.config.loss(rewards, rankings)
        if self.config.sft_coef:
            losses = losses + self.config.sft_coef * rankings.weights * sft_loss(
                logprobs, logprobs.new_tensor(tokens), rankings
            )
        return losses, counted

    # ---- held-out rankings

    def answers(self, engine: Engine, rankings: Any, reference: bool = False) -> list[list[float]]:
        """Log-probs of the answers of a table of rankings. Every rank calls it."""
        training, at_once = engine.module.training, self.config.batch.micro_batches(distributed.world_size())[0]
        engine.module.eval()
        found = score_answers(engine, self.collator, rankings, at_once, self.vocab_size, reference)
        engine.module.train(training)
        return found

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """The loss, TRL's metrics and the ranking metrics."""
        answers = self.answers(engine, self.held_out)
        sums, weight = torch.zeros(len(METRICS)), 0.0

        def losses(start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal sums, weight
            rows = self.held_out[start:end]
            rankings = replace(self.collator, device=None).rankings(rows)
            logprobs, reference = (torch.tensor(list(chain(*part))) for part in (answers[start:end], rows["reference"]))
            rewards = implicit_rewards(logprobs, reference, self.config.beta)
            sums = sums + pair_metrics(rewards, logprobs, rankings) @ rankings.weights
            weight += float(rankings.weights.sum())
            tokens = answer_tokens(rows["prompt"], rows["candidates"])
            return *self.losses(rewards, logprobs, tokens, rankings), rankings.weights

        logged = self.best.log(mean_loss(len(answers), losses), step, self.scored(answers), "kendall_tau_b")
        return logged | dict(zip(METRICS, (sums / weight).tolist()))

    def scored(self, answers: list[list[float]]) -> list[ScoredRanking]:
        """The held-out rankings with the implicit rewards of their answers, from their log-probs."""
        return [
            ScoredRanking.of(row, (self.config.beta * (mine - base) for mine, base in zip(logprobs, row["reference"])))
            for row, logprobs in zip(self.held_out, answers)
        ]


if __name__ == "__main__":
    main("dpo")
