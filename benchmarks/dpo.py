"""The loop of the DPO stage against TRL's DPOTrainer on the expanded pairs: time per ranking and peak memory.

    python benchmarks/dpo.py --repeats 3

`pairs.py` describes the model, the rankings and the measurement. Both sides take the loss on all pairs, and compute the
reference's log-probs before training, which is not measured. The losses stay at log 2, so both must agree in the mean
log-prob of the better answers of the pairs.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from pairs import PAIRS, Benchmark, Rows, clock, logged, our_table, our_values, their_values
from sft import Timed


def train_ours(place: str, rows: Rows, micro: int, timed: Timed) -> Callable[[], float]:
    """A function that trains with the loop of `rlhf dpo`; it gives the mean log-prob of the better answers."""
    from rlhf import distributed
    from rlhf.config.load import check_config
    from rlhf.data.chat_tokenizer import load_tokenizer
    from rlhf.dpo.config import DPOConfig
    from rlhf.dpo.policy import PreferencePolicy, sharing_of
    from rlhf.models.load import load_policy
    from rlhf.reward.collator import RankingCollator
    from rlhf.runs.run import open_run
    from rlhf.training.loop import Loop, supervised_engine
    from stages.dpo import DPOObjective

    config = check_config(DPOConfig, our_values(place, micro), "benchmark")
    table = our_table(rows)
    chat, folder = load_tokenizer(config.model, place), open_run(config, "dpo", False, False, {})
    model = load_policy(config.model, place)
    engine = supervised_engine(config, PreferencePolicy(model))
    objective = DPOObjective(config, model, RankingCollator(chat, True, sharing_of(model), distributed.device()))
    reference = [logprobs for logprobs, _ in objective.answers(engine, table, reference=True)]
    loop = Loop(config, folder, engine, objective, table.add_column("reference", reference), held_out=False)
    loop._train_step = timed.wrap(loop._train_step)  # type: ignore[method-assign]

    def train() -> float:
        loop.fit(False)
        return logged(folder.path, "logps/chosen")

    return train


def train_theirs(place: str, rows: Rows, timed: Timed) -> Callable[[], float]:
    """The same for TRL's trainer on all pairs."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = [
        {"prompt_ids": row["prompt"], "chosen_ids": better, "rejected_ids": worse}
        for row in rows
        for better, worse in itertools.combinations(row["candidates"], 2)
    ]
    more = {"precompute_ref_log_probs": True, "per_device_eval_batch_size": PAIRS}
    args = DPOConfig(**their_values(place, len(pairs), len(rows)), **more)

    class OnTokens(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *words: Any, **more: Any) -> Any:
            return dataset  # the rows are token ids already

    trainer = OnTokens(
        model=AutoModelForCausalLM.from_pretrained(place), args=args, train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(place), callbacks=[clock(timed)],
    )  # fmt: skip

    def train() -> float:
        trainer.train()
        return statistics.fmean(line["logps/chosen"] for line in trainer.state.log_history if "logps/chosen" in line)

    return train


BENCHMARK = Benchmark(__file__, "LlamaForCausalLM", train_ours, train_theirs, lambda a, b: abs(a - b) <= 1e-3 * abs(a))

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
