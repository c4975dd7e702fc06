"""Stage 2: a reward model from human rankings.

A batch element is a whole ranking: a prompt and its K candidates. Every candidate is encoded and scored once, after a
prompt that is encoded once if the model allows it, and the loss compares the K scores, so pairs are never stored.

rankings -> token rows (rlhf.data.tables) -> batches (rlhf.reward.collator) -> scores (rlhf.models.scalar)
-> ranking loss (rlhf.reward.losses) -> best weights -> metrics, scale -> model
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from rlhf import distributed
from rlhf.cli.entry import main
from rlhf.config.base import DataConfig
from rlhf.core.console import say
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.data.selection import open_datasets
from rlhf.data.tables import tokenize
from rlhf.memory.peak import PeakMemory
from rlhf.models.scalar import ScalarModel, load_scalar
from rlhf.models.shared_prompt import NO_SHARING
from rlhf.models.vocabulary import token_count
from rlhf.reward.agreement import Agreement
from rlhf.reward.collator import RankingCollator, RewardBatch, comparable, learnable
from rlhf.reward.config import RewardConfig
from rlhf.reward.held_out import HeldOutScores, mean_loss
from rlhf.reward.losses import RankingBatch, centering_penalty
from rlhf.reward.metrics import ScoredRanking
from rlhf.reward.scoring import score_rankings, score_texts
from rlhf.runs.parents import parent_facts
from rlhf.runs.run import data_facts, finish, open_run
from rlhf.training.engine import Engine
from rlhf.training.loop import Loop, Objective, supervised_engine
from rlhf.training.opening import open_stage
from rlhf.tuning.methods import say_trainable
from rlhf.tuning.save import save_result


def run(config: RewardConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train, measure on the held-out rankings, normalise, and save the result in the run folder's model/."""
    # 1. tokenizer, run folder, rows
    start = open_stage(config, resume, ["ranking"], "scalar")
    chat, limit, data = start.chat, start.limit, start.data
    human_agreement = Agreement.of(data[len(config.data.train) :] or data)
    data += open_datasets(config.data.demonstrations, ["demonstration"], "data.demonstrations")
    facts = {"parents": [parent_facts(config.model.path)], "data": data_facts(data), **chat.facts()}
    folder = open_run(config, "reward", resume, overwrite, facts)
    tables = tokenize(folder.path, chat, limit, config.data, "ranking")
    if config.data.demonstrations:  # those whose mean score becomes 0
        named = DataConfig(train=config.data.demonstrations)
        reference = tokenize(folder.path, chat, limit, named, "demonstration", name="reference").train
    # 2. the model and its trainable weights; the seed gives all ranks the same initial weights, new head included
    transformers.set_seed(config.seed)
    memory = PeakMemory()
    scalar = load_scalar(config.model, start.path, tokens=token_count(chat.tokenizer), as_stored=distributed.grouped())
    scalar.set_scale(0.0, 1.0)
    scalar.model = config.tuning(scalar.model, chat, "scalar")
    say_trainable(config.tuning, scalar.model)
    if not config.shared_prompts:
        scalar.shared_prompts = NO_SHARING
    elif not scalar.shared_prompts.max_length:
        say(f"Prompts: encoded once for each answer, since {type(scalar.model).__name__} cannot share them")
    # 3. training
    train = learnable(tables.train, config.loss)
    held_out = tables.eval if comparable(tables.eval, config.loss) else None
    engine = supervised_engine(config, scalar)
    tokens = config.batch.micro_batch_size * limit
    objective = RewardObjective(config, chat, scalar, held_out, tokens, human_agreement)
    loop = Loop(config, folder, engine, objective, train, held_out is not None)
    loop.fit(resume)
    # 4. held-out metrics and the scale, from one set of scores
    if held_out is not None:
        headline, known = objective.best.report(folder, engine, loop.best_step)
    else:
        headline, known = {}, objective.score(engine, tables.train)
    if config.normalize == "completions":
        scalar.set_scale(*mean_and_std(known))
    elif config.normalize == "demonstrations":
        scalar.set_scale(objective.mean_score(engine, reference), 1.0)
    # 5. the result: the weights of the best checkpoint
    scalar.config.get_text_config().pad_token_id = pad_id_unless_end(chat)
    save_result(folder.path, scalar.model, chat, config.tuning)
    facts = {
        "scale": {"mean": scalar.mean, "std": scalar.std},
        "score_range": usual_range(known, scalar.mean, scalar.std),
    }
    finish(folder, step=loop.best_step, metrics=headline, peak_memory=memory.measured(), **facts)
    memory.report_rows(config, train)


# ---- training ------------------------------------------------------------------------------------------------------


class RewardObjective(Objective[RewardBatch]):
    """The ranking loss over batches of whole rankings, with loss and pair metrics on held-out ones.

    Args:
        held_out: A table of rankings, or None.
        batch_tokens: Most tokens, padding included, in a forward pass that scores held-out candidates.
        human_agreement: Human agreement on the held-out rankings, if known.
    """

    def __init__(
        self, config: RewardConfig, chat: ChatTokenizer, scalar: ScalarModel, held_out: Any, batch_tokens: int,
        human_agreement: Agreement | None = None,
    ) -> None:  # fmt: skip
        self.chat, self.scalar, self.held_out = chat, scalar, held_out
        self.batch_tokens = batch_tokens
        self.ranking_loss, self.centering = config.loss, config.center_rewards_coefficient
        self.collator = RankingCollator(chat, config.data.weights == "use", scalar.shared_prompts, distributed.device())
        self.best = HeldOutScores(lambda engine: self.score(engine, self.held_out), human_agreement)

    def batch(self, rows: list[dict[str, Any]]) -> RewardBatch:
        return self.collator(rows)

    def items(self, batch: RewardBatch) -> Tensor:
        """Summed weights of the rankings. Rankings without a comparable pair were removed before training."""
        return batch.rankings.weights.sum()

    def tokens(self, batch: RewardBatch) -> Tensor:
        return batch.attention_mask.sum()

    def loss(self, engine: Engine, batch: RewardBatch) -> tuple[Tensor, list[Tensor]]:
        scores = engine.forward(batch.input_ids, batch.attention_mask, batch.branches)
        return self.losses(scores, batch.rankings)[0].sum(), []

    def losses(self, scores: Tensor, rankings: RankingBatch) -> tuple[Tensor, Tensor]:
        """The weighted loss [B] of each ranking, centering penalty included; and which rankings have a loss [B].

        Args:
            scores: Float [N], one per candidate.
            rankings: Ranks of the candidates.
        """
        losses, counted = self.ranking_loss(scores, rankings)
        if self.centering:
            losses = losses + self.centering * rankings.weights * centering_penalty(scores, rankings.ranking)
        return losses, counted

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Loss and pair metrics on the held-out rankings."""
        scored = self.score(engine, self.held_out)
        return self.best.log(self.held_out_loss(scored), step, scored)

    def held_out_loss(self, scored: Sequence[ScoredRanking]) -> float:
        """Weighted mean over the held-out rankings that can be compared."""
        columns = self.held_out.select_columns(["ranks", "ratings", "weight"])

        def losses(start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
            rankings = replace(self.collator, device=None).rankings(columns[start:end])
            scores = torch.tensor([score for item in scored[start:end] for score in item.scores])
            return *self.losses(scores, rankings), rankings.weights

        return mean_loss(len(scored), losses)

    # ---- scores, before any normalisation

    def score(self, engine: Engine, rankings: Any) -> list[ScoredRanking]:
        """Raw scores of a table of rankings. Every rank calls it."""
        with engine.autocast():
            return score_rankings(self.scalar, self.chat, rankings, self.batch_tokens)

    def mean_score(self, engine: Engine, demonstrations: Any) -> float:
        """Mean raw score of a table of demonstrations. Every rank calls it."""
        ids, lengths = demonstrations["input_ids"], demonstrations["length"][:]
        with engine.autocast():
            return statistics.fmean(score_texts(self.scalar, self.chat, ids.__getitem__, lengths, self.batch_tokens))


# ---- the result ----------------------------------------------------------------------------------------------------


def mean_and_std(scored: Sequence[ScoredRanking]) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores of all candidates; a std of 0 becomes 1."""
    scores = [score for item in scored for score in item.scores]
    return statistics.fmean(scores), statistics.pstdev(scores) or 1.0


def usual_range(scored: Sequence[ScoredRanking], mean: float, std: float) -> dict[str, float]:
    """The 1% and 99% quantiles of the normalised scores of all candidates, for run.json: `low` and `high`.

    The guard of PPO looks for scores outside of it."""
    scores = (np.array([score for item in scored for score in item.scores]) - mean) / std
    low, high = np.quantile(scores, [0.01, 0.99])
    return {"low": float(low), "high": float(high)}


def pad_id_unless_end(chat: ChatTokenizer) -> int | None:
    """The padding token for the saved config, by which plain transformers finds the last token of an answer.

    transformers scores at the last token that is not padding. If padding and end token are the same id, it would score
    one token too early; without a padding token it scores texts one by one and refuses batches.
    """
    return chat.pad_id if chat.pad_id != chat.end_id else None


if __name__ == "__main__":
    main("reward")
