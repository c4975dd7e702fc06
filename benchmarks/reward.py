"""The loop of the reward stage against TRL's RewardTrainer on the expanded pairs: time per ranking and peak memory.

    python benchmarks/reward.py --repeats 3

`pairs.py` describes the model, the rankings and the measurement. Both sides must have the same mean loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from pairs import Benchmark, Rows, clock, logged, our_table, our_values, their_values
from sft import Timed


def train_ours(place: str, rows: Rows, micro: int, timed: Timed) -> Callable[[], float]:
    """A function that trains with the loop of `rlhf reward` on whole rankings and gives the mean loss."""
    from rlhf.config.load import check_config
    from rlhf.data.chat_tokenizer import load_tokenizer
    from rlhf.models.scalar import load_scalar
    from rlhf.reward.config import RewardConfig
    from rlhf.runs.run import open_run
    from rlhf.training.loop import Loop, supervised_engine
    from stages.reward import RewardObjective

    config = check_config(RewardConfig, our_values(place, micro), "benchmark")
    chat, run = load_tokenizer(config.model, place), open_run(config, "reward", False, False, {})
    scalar = load_scalar(config.model, place)
    engine = supervised_engine(config, scalar)
    objective = RewardObjective(config, chat, scalar, None, batch_tokens=2**14)
    loop = Loop(config, run, engine, objective, our_table(rows), held_out=False)
    loop._train_step = timed.wrap(loop._train_step)  # type: ignore[method-assign]

    def train() -> float:
        loop.fit(False)
        return logged(run.path, "train/loss")

    return train


def train_theirs(place: str, rows: Rows, timed: Timed) -> Callable[[], float]:
    """The same for TRL's trainer on all pairs."""
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    pairs = [
        {"chosen_ids": row["prompt"] + better, "rejected_ids": row["prompt"] + worse}
        for row in rows
        for better, worse in itertools.combinations(row["candidates"], 2)
    ]
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(place),
        args=RewardConfig(**their_values(place, len(pairs), len(rows))),
        train_dataset=datasets.Dataset.from_list(pairs), processing_class=AutoTokenizer.from_pretrained(place),
        callbacks=[clock(timed)],
    )  # fmt: skip
    return lambda: float(trainer.train().training_loss)


BENCHMARK = Benchmark(
    __file__, "LlamaForSequenceClassification", train_ours, train_theirs, lambda a, b: abs(a - b) <= 1e-4
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
