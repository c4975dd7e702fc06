"""The loop of the DPO stage against TRL's DPOTrainer on the expanded pairs: time per ranking and peak memory.

    python benchmarks/dpo.py --repeats 3

Both train the same random Llama (4 layers, 3.5M parameters) on the same rankings of K answers without ties, in float32,
without recomputation, with one optimizer step per 4 rankings and the loss on all pairs; both compute the reference's
log-probs before training, which is not measured. TRL sees a ranking as K (K - 1) / 2 pairs, 8 in a forward pass; ours
takes as many rankings as have no more tokens than that. The learning rate is almost 0, so the losses stay at log 2, and
both must agree in the mean log-prob of the better answers of the pairs. Each run is a separate process; the sides
alternate, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from reward import rankings
from sft import Timed

RANKINGS = 4
"""Rankings per optimizer step."""
PAIRS = 8
"""Pairs per forward pass of TRL, its default."""
VOCABULARY = 320
LEARNING_RATE = 1e-12


def save_model(place: str) -> None:
    """A random Llama and a tokenizer of that many words."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(place)


# ---- one run, in a process of its own ------------------------------------------------------------------------------


def train_ours(place: str, rows: list[dict[str, Any]], micro: int, timed: Timed) -> Callable[[], float]:
    """A function that trains with the loop of `rlhf dpo`; it gives the mean log-prob of the better answers."""
    import datasets

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

    batch = {"batch_size": RANKINGS, "micro_batch_size": micro}
    values = {"run": f"{place}/run", "model": {"path": place}, "data": {"train": "unused"}, "precision": "float32"}
    values |= {"batch": batch, "optimizer": {"lr": LEARNING_RATE, "schedule": "constant"}, "log": {"every": 1}}
    config = check_config(DPOConfig, values, "benchmark")
    table = datasets.Dataset.from_list([
        {
            **row,
            "ranks": list(range(1, len(row["candidates"]) + 1)),
            "ratings": [None] * len(row["candidates"]),
            "weight": 1.0,
            "length": len(row["prompt"]) + max(map(len, row["candidates"])),
        }
        for row in rows
    ])  # fmt: skip
    chat, folder = load_tokenizer(config.model, place), open_run(config, "dpo", False, False, {})
    model = load_policy(config.model, place)
    engine = supervised_engine(config, PreferencePolicy(model))
    objective = DPOObjective(config, model, RankingCollator(chat, True, sharing_of(model), distributed.device()))
    reference = [logprobs for logprobs, _ in objective.answers(engine, table, reference=True)]
    loop = Loop(config, folder, engine, objective, table.add_column("reference", reference), held_out=False)
    loop._train_step = timed.wrap(loop._train_step)  # type: ignore[method-assign]

    def train() -> float:
        loop.fit(False)
        lines = (folder.path / "metrics.jsonl").read_text("utf-8").splitlines()
        return statistics.fmean(json.loads(line)["logps/chosen"] for line in lines)

    return train


def train_theirs(place: str, rows: list[dict[str, Any]], timed: Timed) -> Callable[[], float]:
    """The same for TRL's trainer on all pairs."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    pairs = [
        {"prompt_ids": row["prompt"], "chosen_ids": better, "rejected_ids": worse}
        for row in rows
        for better, worse in itertools.combinations(row["candidates"], 2)
    ]
    in_step = len(pairs) * RANKINGS // len(rows)
    micro = min(PAIRS, in_step)
    args = DPOConfig(
        output_dir=f"{place}/trl", per_device_train_batch_size=micro, gradient_accumulation_steps=in_step // micro,
        num_train_epochs=1, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", logging_steps=1, max_length=None,
        bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, precompute_ref_log_probs=True,
        per_device_eval_batch_size=PAIRS,
    )  # fmt: skip

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *words: Any, **more: Any) -> None:
            timed.begin()

        def on_step_end(self, *words: Any, **more: Any) -> None:
            timed.end()

    class OnTokens(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *words: Any, **more: Any) -> Any:
            return dataset  # the rows are token ids already

    trainer = OnTokens(
        model=AutoModelForCausalLM.from_pretrained(place), args=args, train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(place), callbacks=[Clock()],
    )  # fmt: skip

    def train() -> float:
        trainer.train()
        return statistics.fmean(line["logps/chosen"] for line in trainer.state.log_history if "logps/chosen" in line)

    return train


def run(side: str, place: str, candidates: int, prompt: int, answer: int, steps: int) -> dict[str, float]:
    """Train and measure.

    Returns:
        `seconds` (wall clock) and `cpu` (processor) per ranking, medians over all steps except the first; `mb`, the
        peak memory above that before training; `logps`, the mean log-prob of the better answers of all pairs.
    """
    import torch

    rows = rankings(candidates, prompt, answer, steps)
    tokens = 2 * PAIRS * (prompt + answer)
    micro = max(n for n in (1, 2, 4) if n == 1 or n * (prompt + candidates * answer) <= tokens)
    timed = Timed()
    train = train_ours(place, rows, micro, timed) if side == "ours" else train_theirs(place, rows, timed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    logps = train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds, cpu = timed.medians()
    return {"seconds": seconds / RANKINGS, "cpu": cpu / RANKINGS, "mb": peak / 1024, "logps": logps}


# ---- all runs ---------------------------------------------------------------------------------------------------


def measure(side: str, *sizes: int) -> dict[str, float]:
    """`run` in a new process with one thread, unless OMP_NUM_THREADS says otherwise."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--one", side, place, *map(str, sizes)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a table: medians over the repeats, and the median of the ratios of neighbouring runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--candidates", type=int, nargs="+", default=[2, 4, 9])
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[1, 2, 4], help="Prompt lengths as multiples of the answer length."
    )
    parser.add_argument("--answer", type=int, default=32, help="Mean tokens per answer.")
    parser.add_argument("--steps", type=int, default=4, help="Optimizer steps; the first is not measured.")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, place, *sizes = args.one
        save_model(place)
        print(json.dumps(run(side, place, *map(int, sizes))))
        return
    print("| K | prompt / answer | ours, ms | TRL, ms | ratio (range) | of CPU time | ours, MB | TRL, MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for candidates, factor in itertools.product(args.candidates, args.prompts):
        sizes = (candidates, factor * args.answer, args.answer, args.steps)
        pairs = [(measure("ours", *sizes), measure("trl", *sizes)) for _ in range(args.repeats)]
        if any(abs(a["logps"] - b["logps"]) > 1e-3 * abs(a["logps"]) for a, b in pairs):
            raise SystemExit(f"the log-probs differ, so this was not the same work: {pairs}")
        ratios, cpu = ([b[name] / a[name] for a, b in pairs] for name in ("seconds", "cpu"))
        middle = [[statistics.median(pair[i][name] for pair in pairs) for i in (0, 1)] for name in ("seconds", "mb")]
        (ours, trl), (our_mb, trl_mb) = middle
        print(
            f"| {candidates} | {factor} | {1000 * ours:.0f} | {1000 * trl:.0f} | {statistics.median(ratios):.1f}x "
            f"({min(ratios):.1f} to {max(ratios):.1f}) | {statistics.median(cpu):.1f}x | {our_mb:.0f} | {trl_mb:.0f} "
            f"| {trl_mb / our_mb:.1f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
