"""PPO, ours against TRL 1.12.0 (the last with PPO): time and memory per update, and whether both learn equally fast.

    pip install --no-deps --target /tmp/trl112 trl==1.12.0
    python benchmarks/ppo.py --trl /tmp/trl112                      # three regimes of completion lengths
    python benchmarks/ppo.py --trl /tmp/trl112 --learn --updates 20  # the reward over 20 updates
    python benchmarks/ppo.py --trl /tmp/trl112 --model llama-30m --episodes 16 --updates 2

Each run is a separate process; runs do not overlap. Both sides have the same weights (stories260K, or with --model
llama-30m a random Llama of 30M parameters, vocabulary 32,000, heads of 64), story openings as
prompts, reward (fraction of sentences that name an animal), temperature 0.7, 64 episodes, 4 epochs of 4 minibatches,
learning rate 3e-4, KL coefficient 0.05, AdamW as TRL sets it, float32. TRL's trainer has its defaults otherwise, with
the stop token set. Seconds count from the end of one update to the end of the next, without the first update.
Processor seconds are the sum over all threads. Peak memory is above the imports, the same libraries on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
REGIMES = ("full", "realistic", "long-tailed")
PHASES = ("rollout", "score", "learn")
VOCABULARY = 32_000
ADAPTERS = {
    "ours-shared": {"name": "lora", "rank": 8, "alpha": 16},
    "ours-shared-last2": {"name": "lora", "rank": 8, "alpha": 16, "layers": 2},
}
"""The adapters of policy and critic on our sides with one base for all roles."""
SIDES = ("ours", "ours-compiled", *ADAPTERS, "trl", "trl-nogc")
COLUMNS = ("run", "s an update, median (range)", "processor s", *PHASES)
COLUMNS += ("answer tokens", "tokens/s", "peak MB", "time", "memory")


def write_prompts(path: Path) -> None:
    """The first eight words of each story."""
    lines = (SHARED / "data" / "text" / "tinystories_1000.jsonl").read_text("utf-8").splitlines()
    openings = sorted({" ".join(json.loads(line)["text"].split()[:8]) for line in lines})
    rows = [json.dumps({"prompt": opening, "source": "tinystories", "split": "train"}) for opening in openings]
    path.write_text("\n".join(rows) + "\n", "utf-8")


def write_model(folder: Path) -> None:
    """A random Llama of 30M parameters with the tokenizer of stories260K, extended to 32,000 tokens that are words."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    tokenizer.add_tokens([f"<word-{i}>" for i in range(VOCABULARY - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=[1, 2],
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(side: str, regime: str, args: argparse.Namespace, folder: Path, **changes: Any) -> dict[str, Any]:
    """Run some updates of one side with a changed setting. Memory and processor time are sums over all processes."""
    spec = {
        "run": str(folder / f"{side}-{regime}"),
        "prompts": str(folder / "prompts.jsonl"),
        "model": str(SHARED / "models" / "stories260K" if args.model == "stories260K" else folder / args.model),
        "tests": str(ROOT / "tests"),
        "ends": [1, 2],  # this model ends a story with <s>; </s> does not occur
        "regime": regime,
        "updates": args.updates,
        "new_tokens": args.new_tokens,
        "episodes": args.episodes,
        "epochs": 4,
        "minibatches": args.minibatches,
        "micro_batch_tokens": args.micro_batch_tokens,
        "lr": 3e-4,
        "seed": args.seed,
        "trl_checkpointing": side != "trl-nogc",
        "tuning": ADAPTERS.get(side),
        "compile": side == "ours-compiled",
        "overrides": [*args.ours, *(["precision=bfloat16"] if args.bfloat16 else [])],
        "bfloat16": args.bfloat16,
    } | changes
    file, result = folder / "spec.json", folder / "result.json"
    file.write_text(json.dumps(spec), "utf-8")
    path = [*([str(args.trl)] if side.startswith("trl") else []), str(ROOT)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    program = [sys.executable, str(ROOT / "benchmarks" / "ppo_sides.py"), side.split("-")[0], str(file), str(result)]
    if args.processes > 1:
        env |= {"WORLD_SIZE": str(args.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in range(args.processes):
        mine = env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if args.processes > 1 else {})
        output = (folder / f"output.{rank}").open("w", encoding="utf-8")
        ranks.append(subprocess.Popen(program, stdout=output, stderr=subprocess.STDOUT, env=mine))
    for rank, process in enumerate(ranks):
        if process.wait():
            raise SystemExit(f"{side}, {regime}:\n{(folder / f'output.{rank}').read_text('utf-8')[-6000:]}")
    results = [json.loads(result.with_suffix(f".{rank}").read_text("utf-8")) for rank in range(args.processes)]
    found: dict[str, Any] = results[0]
    found["processor"] = [sum(seconds) for seconds in zip(*(r["processor"] for r in results))]
    found["peak_mb"] = sum(r["peak_mb"] for r in results)
    if side.startswith("trl"):  # each process counts its own tokens
        found["tokens"] = [sum(tokens) for tokens in zip(*(r["tokens"] for r in results))]
    return found


def free_port() -> str:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def row(name: str, found: dict[str, Any], first: dict[str, Any] | None) -> str:
    """One line of the table; ratios are to `first`."""
    median = statistics.median(found["seconds"])
    phases = [statistics.median(found["phases"][phase]) for phase in PHASES]
    rate = sum(found["tokens"]) / sum(found["seconds"])
    cells = [name, f"{median:.2f} ({min(found['seconds']):.2f}-{max(found['seconds']):.2f})"]
    cells += [f"{seconds:.2f}" for seconds in (statistics.median(found["processor"]), *phases)]
    cells += [f"{sum(found['tokens']) / len(found['tokens']):,.0f}", f"{rate:,.0f}", f"{found['peak_mb']:,.0f}"]
    if first is not None:
        cells += [f"{median / statistics.median(first['seconds']):.2f}x", f"{found['peak_mb'] / first['peak_mb']:.2f}x"]
    return "| " + " | ".join(cells) + " |"


def compare_speed(args: argparse.Namespace, folder: Path) -> None:
    """Compare the sides in the three length regimes."""
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for regime in args.regimes:
        first = None
        for side in args.sides:
            found = measure(side, regime, args, folder, updates=args.updates + 1)
            print(row(f"{regime}: {side}", found, first), flush=True)
            first = first or found
            if args.json is not None:
                facts = {"seconds": statistics.median(found["seconds"]), "peak_mb": found["peak_mb"]}
                with args.json.open("a", encoding="utf-8") as lines:
                    lines.write(
                        json.dumps(
                            {
                                "benchmark": "ppo",
                                "regime": regime,
                                "side": side,
                                "cores": f"{args.processes}x{args.threads}",
                                **facts,
                            }
                        )
                        + "\n"
                    )


def compare_learning(args: argparse.Namespace, folder: Path) -> None:
    """Compare the reward over the updates; completions end by themselves."""
    for side in args.sides:
        found = measure(side, "natural", args, folder)
        scores = found["scores"]
        reached = next((i + 1 for i, score in enumerate(scores) if score >= 0.6), None)
        median, kl = statistics.median(found["seconds"]), found["kl"][-1]
        print(f"{side}: {sum(scores[:2]) / 2:.3f} -> {sum(scores[-3:]) / 3:.3f} in {len(scores)} updates")
        passed = "" if reached is None else f" after {sum(found['seconds'][: reached - 1]):.0f} s (from update 1 on)"
        print(f"   0.60 first reached at update {reached}{passed}; KL {kl:.1f} at the end")
        processor = " + ".join(f"{statistics.median(found[name]):.2f}" for name in ("processor", "children"))
        print(f"   an update: {median:.2f} s, {processor} processor seconds here and in child processes (the sampler)")
        print("   " + " ".join(f"{score:.3f}" for score in scores), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="Folder with TRL 1.12.0.")
    parser.add_argument("--model", choices=("stories260K", "llama-30m"), default="stories260K")
    parser.add_argument("--learn", action="store_true", help="Compare what they learn instead of how fast they are.")
    parser.add_argument("--updates", type=int, default=5, help="Measured updates, after one warm-up update.")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=("ours", "trl"),
        help="ours-compiled: with compile=true. ours-shared: one base with LoRA of rank 8 for policy and critic; "
        "-last2: in the last two layers. trl-nogc: TRL without the gradient checkpointing that is its default.",
    )  # fmt: skip
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=4, help="Minibatches per epoch; our default is 4, TRL's 1.")
    parser.add_argument("--new-tokens", type=int, help="Longest completion in tokens; 256, with --learn 96.")
    parser.add_argument(
        "--ours", nargs="+", default=[], metavar="KEY=VALUE", help="Further config overrides for our side."
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="Our batch.micro_batch_tokens.")
    parser.add_argument("--bfloat16", action="store_true", help="Both sides compute in bfloat16.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="Threads of each process.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="File that the rows are appended to, for plot.py.")
    args = parser.parse_args()
    args.new_tokens = args.new_tokens or (96 if args.learn else 256)
    cores = f"{args.processes} x {args.threads} threads"
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {cores}, completions of up to {args.new_tokens} tokens")
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder) / "prompts.jsonl")
        if args.model == "llama-30m":
            write_model(Path(folder) / args.model)
        (compare_learning if args.learn else compare_speed)(args, Path(folder))


if __name__ == "__main__":
    main()
