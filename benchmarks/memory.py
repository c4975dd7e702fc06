"""Peak memory: the prediction of `rlhf plan` against measurement, and PPO's peak against TRL 1.12.0's.

python benchmarks/memory.py --plan                       # predicted and measured peaks by phase
python benchmarks/memory.py --ranges                     # the range of `rlhf plan --gpus 0`, and measured peaks
pip install --no-deps --target /tmp/trl112 trl==1.12.0
python benchmarks/memory.py --trl /tmp/trl112            # PPO's peak against TRL's
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the second holds the reward function
PHASES = ("load", "rollout", "scoring", "update", "checkpoint")
SMALL, MIDDLE, WIDE = (
    {"hidden_size": 320, "intermediate_size": 864, "layers": 6, "heads": 5},
    {"hidden_size": 384, "intermediate_size": 1536, "layers": 8, "heads": 6},
    {"hidden_size": 192, "intermediate_size": 512, "layers": 4, "heads": 3},
)


def ppo(tokens: int, prompt: int, new: int, episodes: int = 8, **more: Any) -> dict[str, Any]:
    """Values of a PPO config."""
    batch = {"epochs": 1, "minibatches": 2, "micro_batch_tokens": tokens} | more.pop("batch", {})
    return {
        "updates": 2,
        "reward": {"name": "function", "function": "memory_side:reward"},
        "critic": {"init": "policy"} | more.pop("critic", {}),
        "data": {"max_prompt_tokens": prompt},
        "rollout": {"prompts_per_update": episodes, "max_new_tokens": new, "min_new_tokens": new},
        "batch": batch,
        "eval": {"prompts": 0, "every": 2},
        "checkpoints": {"every": 2},
        **more,
    }


def trainer(rows: int, length: int, **more: Any) -> dict[str, Any]:
    """Values of an SFT or reward config."""
    batch = {"micro_batch_size": rows, "batch_size": 2 * rows, "max_steps": 2} | more.pop("batch", {})
    return {"batch": batch, "length": length, "eval": {"every": 2}, "checkpoints": {"every": 2}, **more}


LORA = {"name": "lora", "rank": 16}
ZERO2, ZERO3 = ({"deepspeed": f"configs/deepspeed/zero{stage}.json"} for stage in (2, 3))
OFFLOAD2, OFFLOAD3 = ({"deepspeed": f"configs/deepspeed/zero{stage}-offload.json"} for stage in (2, 3))
BFLOAT16 = {"precision": "bfloat16"}
CONFIGS: dict[str, tuple[str, dict[str, int], int, int, dict[str, Any]]] = {
    "SFT, full": ("sft", MIDDLE, 32_000, 1, trainer(4, 256)),
    "SFT, lora, recomputing": (
        "sft", MIDDLE, 32_000, 1, trainer(8, 256, tuning=LORA, gradient_checkpointing=True),
    ),
    "reward model": ("reward", MIDDLE, 32_000, 1, trainer(2, 256)),
    "PPO, full": ("ppo", SMALL, 32_000, 1, ppo(1024, 64, 192)),
    "PPO, short answers, two micro-batches": ("ppo", SMALL, 32_000, 1, ppo(1536, 64, 32, 64)),
    "PPO, recomputing": ("ppo", SMALL, 32_000, 1, ppo(2048, 64, 192, gradient_checkpointing=True)),
    "PPO, lora": ("ppo", MIDDLE, 32_000, 1, ppo(1024, 64, 192, tuning=LORA, critic={"tuning": LORA})),
    "PPO, vocabulary 150k": ("ppo", WIDE, 150_000, 1, ppo(1024, 64, 192)),
    "PPO, vocabulary 512": ("ppo", SMALL, 512, 1, ppo(2048, 64, 192, 16)),
    "PPO, one base": (
        "ppo", MIDDLE, 32_000, 1,
        ppo(1024, 64, 192, model={"sharing": "shared"}, tuning=LORA, critic={"tuning": LORA}),
    ),
    "SFT, ZeRO-2, 2 processes": ("sft", MIDDLE, 32_000, 2, trainer(2, 256, **ZERO2)),
    "PPO, ZeRO-2, 2 processes": ("ppo", SMALL, 32_000, 2, ppo(1024, 64, 192, **ZERO2)),
    "PPO, ZeRO-3, 2 processes": ("ppo", SMALL, 32_000, 2, ppo(1024, 64, 192, **ZERO3)),
    "SFT, bfloat16": ("sft", SMALL, 32_000, 1, trainer(4, 256, **BFLOAT16)),
    "SFT, ZeRO-2, 2 processes, bfloat16": ("sft", SMALL, 32_000, 2, trainer(2, 256, **ZERO2, **BFLOAT16)),
    "SFT, ZeRO-2, 2 processes, offload": ("sft", SMALL, 32_000, 2, trainer(2, 256, **OFFLOAD2)),
    "PPO, ZeRO-3, 2 processes, offload, bfloat16": (
        "ppo", SMALL, 32_000, 2, ppo(1024, 64, 192, **OFFLOAD3, **BFLOAT16),
    ),
}  # fmt: skip


# ---- models and data ---------------------------------------------------------------------------------------------


def make_model(folder: Path, shape: dict[str, int], vocabulary: int) -> int:
    """Write a random Llama with heads of 64, tied embeddings, stories260K's tokenizer; return its parameter count."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    source = SHARED / "models" / "stories260K"
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["heads"],
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return sum(p.numel() for p in model.parameters())


def text_of(tokens: int, number: int) -> str:
    """A text of at most this many tokens, and only a few less; it differs by index."""
    lines = (SHARED / "data" / "text" / "tinystories_1000.jsonl").read_text("utf-8").splitlines()
    text = " ".join(json.loads(line)["text"] for line in lines[number % 900 : number % 900 + 12])
    words = text[: tokenizer_of().encode(text).offsets[tokens - 1][0]].split()
    return " ".join(words)


def tokenizer_of() -> Any:
    """The tokenizer of stories260K."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(SHARED / "models" / "stories260K" / "tokenizer.json"))


def write_data(stage: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write rows as long as the config allows; return the config values that name them."""
    file = folder / f"{stage}.jsonl"
    rows: list[dict[str, Any]] = []
    if stage == "ppo":
        longest = values["data"]["max_prompt_tokens"]
        rows = [{"prompt": f"{i} " + text_of(longest + 8, 7 * i), "source": "x", "split": "train"} for i in range(64)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return values | {"data": values["data"] | {"prompts": str(file)}}
    length = values.pop("length")
    for i in range(80):
        row: dict[str, Any] = {"prompt": f"{i} " + text_of(12, 11 * i), "source": "x"}
        row["split"] = "eval" if i % 10 == 0 else "train"
        if stage == "sft":
            row["answer"] = text_of(length - 26, 11 * i + 1)
        else:
            row |= {"candidates": [text_of(length - 26, 11 * i + 1 + k) for k in range(2)], "ranks": [1, 2]}
        rows.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return values | {"data": {"train": str(file)}}


# ---- prediction against measurement --------------------------------------------------------------------------------


def measure(stage: str, config: dict[str, Any], processes: int, folder: Path, give_back: bool = True) -> dict[str, int]:
    """Peaks by phase above the imports, the largest of all ranks, bytes."""
    spec = {"stage": stage, "config": config, "result": str(folder / "result")}
    (folder / "spec.json").write_text(json.dumps(spec), "utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]), "HF_HUB_OFFLINE": "1"}
    env |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if give_back else {}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "benchmarks" / "memory_side.py")]
    done = subprocess.run(
        [*program, str(folder / "spec.json")], capture_output=True, text=True, env=env, cwd=ROOT, timeout=900
    )
    if done.returncode:
        raise SystemExit(f"{stage}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    ranks = [json.loads((folder / f"result-{r}.json").read_text("utf-8"))["peaks"] for r in range(processes)]
    return {phase: max(rank[phase] for rank in ranks) for phase in ranks[0] if phase in PHASES}


def predicted(stage: str, config: dict[str, Any], processes: int, longest: int) -> dict[str, float]:
    """The prediction of `rlhf plan`, without a GPU."""
    from rlhf.cli.stage_configs import STAGES
    from rlhf.config.load import check_config
    from rlhf.distributed.deepspeed_json import read_deepspeed
    from rlhf.memory.predict import ZeroLayout, predict
    from rlhf.memory.traced_model import TracedModel
    from rlhf.memory.workload import batch_shape, limit_of

    checked = check_config(STAGES[stage], config, "benchmark")
    layout = ZeroLayout.of(read_deepspeed(checked.deepspeed) if checked.deepspeed else None)
    work = batch_shape(checked, limit_of(checked), processes, longest)
    passes = TracedModel(checked, work, bfloat16=checked.precision == "bfloat16", deepspeed=layout.stage is not None)
    found = predict(passes, layout, processes, gpu=False)
    return {phase: snapshot.total for phase, snapshot in found.phases.items()}


def range_of(stage: str, config: dict[str, Any], processes: int, longest: int) -> Any:
    """The range that `rlhf plan --gpus 0 --longest` prints, and the end of a run with data of one length."""
    from rlhf.cli.stage_configs import STAGES
    from rlhf.config.load import check_config
    from rlhf.memory.cpu_range import on_cpu

    return on_cpu(check_config(STAGES[stage], config, "benchmark"), False, processes, longest, None, 2)


def config_of(name: str, folder: Path) -> tuple[dict[str, Any], int, int]:
    """Write a config's model and data; gives its values, the longest row in tokens, and the parameter count."""
    stage, shape, vocabulary, _, values = CONFIGS[name]
    count = make_model(folder / "model", shape, vocabulary)
    values = json.loads(json.dumps(values))
    longest = values["data"]["max_prompt_tokens"] if stage == "ppo" else values["length"]
    model = {"path": str(folder / "model"), "chat_template": "plain"} | values.pop("model", {})
    return write_data(stage, values, folder) | {"run": str(folder / "run"), "model": model}, longest, count


def both(name: str, folder: Path) -> tuple[dict[str, float], dict[str, int], int]:
    """Predicted and measured peaks of a config by phase, bytes; and the model's parameter count."""
    stage, _, _, processes, _ = CONFIGS[name]
    config, longest, count = config_of(name, folder)
    return predicted(stage, config, processes, longest), measure(stage, config, processes, folder), count


def compare(names: list[str], folder: Path) -> None:
    """Print for each config the highest phase, then all phases."""
    print("| run | parameters | phase | predicted MB | measured MB | error |\n|---|---|---|---|---|---|")
    for name in names:
        guess, found, count = both(name, Path(tempfile.mkdtemp(dir=folder)))
        highest = (max(guess.values()), max(found.values()))
        for phase, pair in {"peak": highest, **{p: (guess[p], found[p]) for p in PHASES if p in found}}.items():
            head = [name, f"{count / 1e6:.1f}M"] if phase == "peak" else ["", ""]
            cells = [*head, phase, f"{pair[0] / 1e6:,.0f}", f"{pair[1] / 1e6:,.0f}", f"{pair[0] / pair[1] - 1:+.0%}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def compare_ranges(names: list[str], folder: Path) -> None:
    """Print for each config the range, and the peak that is measured with glibc's defaults."""
    print("| run | range | measured MB | holds |\n|---|---|---|---|")
    for name in names:
        stage, _, _, processes, _ = CONFIGS[name]
        place = Path(tempfile.mkdtemp(dir=folder))
        config, longest, _ = config_of(name, place)
        said = range_of(stage, config, processes, longest)
        peak = max(measure(stage, config, processes, place, give_back=False).values())
        holds = "yes" if said.low <= peak <= said.high else "no"
        print(f"| {name} | {said} | {peak / 1e6:,.0f} | {holds} |", flush=True)


# ---- vocabulary x tokens ---------------------------------------------------------------------------------------------


def vocabularies(folder: Path) -> None:
    """Print the phases' memory above weights, optimizer and gradients by vocabulary and micro-batch size."""
    head = ("vocabulary", "micro_batch_tokens", "logits in full, MB", "rollout MB", "scoring MB", "update MB")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for vocabulary in (32_000, 150_000):
        for tokens in (512, 2048):
            place = Path(tempfile.mkdtemp(dir=folder))
            count = make_model(place / "model", WIDE, vocabulary)
            config = write_data("ppo", ppo(tokens, 64, 192, 16), place) | {
                "run": str(place / "run"), "model": {"path": str(place / "model"), "chat_template": "plain"}
            }  # fmt: skip
            found = measure("ppo", config, 1, place)
            states = 4 * 3 * count + 8 * 2 * count  # policy, critic and reference; two snapshots of the trained weights
            above = [found["rollout"] - states, found["scoring"] - states, found["update"] - states - 8 * count]
            full = vocabulary * tokens * 4 * 192 // 256
            cells = [f"{vocabulary:,}", f"{tokens:,}", *(f"{size / 1e6:,.0f}" for size in (full, *above))]
            print(f"| {' | '.join(cells)} |", flush=True)


# ---- against TRL -----------------------------------------------------------------------------------------------------

LARGE = {"hidden_size": 384, "intermediate_size": 1024, "layers": 10, "heads": 6}
"""With a vocabulary of 32,000: 30 million parameters."""


def compare_sides(args: argparse.Namespace, folder: Path) -> None:
    """Print PPO's peak above the imports; the sides have the same weights, prompts, lengths and minibatches."""
    from ppo import measure, write_prompts

    count = make_model(folder / "model", LARGE, 32_000)
    write_prompts(folder / "prompts.jsonl")
    print(f"{count / 1e6:.1f}M parameters, {args.episodes} episodes of {args.new_tokens} tokens, {args.epochs} epochs")
    print("| side | peak MB | of the first | s |\n|---|---|---|---|")
    first = None
    for side in args.sides:
        start = time.perf_counter()
        peak = measure(side, "full", args, folder, model=str(folder / "model"), epochs=args.epochs)["peak_mb"]
        first = first or peak
        print(f"| {side} | {peak:,.0f} | {peak / first:.2f}x | {time.perf_counter() - start:,.0f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="Compare predictions with measurements.")
    parser.add_argument("--ranges", action="store_true", help="Compare ranges with peaks under glibc's defaults.")
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="Which configs to predict.")
    parser.add_argument("--vocabulary", action="store_true", help="Peaks at vocabularies of 32k and 150k.")
    parser.add_argument("--trl", type=Path, help="Folder with TRL 1.12.0, to compare with.")
    parser.add_argument(
        "--sides", nargs="+", choices=("trl", "trl-nogc", "ours", "ours-shared"), default=("trl", "ours", "ours-shared")
    )
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1, help="Epochs; they do not change the peak.")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="Our batch.micro_batch_tokens.")
    parser.add_argument(
        "--ours", nargs="+", default=[], metavar="KEY=VALUE", help="Further config overrides for our side."
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(processes=1, seed=0, minibatches=4)
    args = parser.parse_args()
    if not (args.plan or args.ranges or args.vocabulary or args.trl):
        parser.error("say what to measure: --plan, --ranges, --vocabulary, or --trl DIR")
    print(time.strftime("%Y-%m-%d %H:%M"))
    with tempfile.TemporaryDirectory() as folder:
        if args.plan:
            compare(args.only, Path(folder))
        if args.ranges:
            compare_ranges(args.only, Path(folder))
        if args.vocabulary:
            vocabularies(Path(folder))
        if args.trl:
            compare_sides(args, Path(folder))


if __name__ == "__main__":
    main()
