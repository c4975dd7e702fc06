"""PPO at the size of OPT-1.3B on one GPU: seconds, fraction of the hardware's limits, and hours for 131,900 prompts.

    bash benchmarks/gpu.sh                    # finds or makes the environment, then runs this program
    python benchmarks/gpu.py --trl DIR        # DIR: pip install --no-deps --target DIR trl==1.12.0

The setting is the one for which DeepSpeed-Chat published 11.7 hours on one A100-80G (README, table 1, and
BenckmarkSetting.md): actor OPT-1.3B, critic and reward model of OPT-350M's size, prompts of 256 tokens and completions
of exactly 256, steps of 1,024 prompts with one optimizer step each, one epoch. Weights are random, which costs the same
time. The critic has OPT-350M's size, but not its projection of the embeddings.

Without a GPU all sizes are small, to test the program itself; the timings then mean nothing.

The hardware's limits are measured first: bytes read and written by a large copy, and a large matrix product.
Decoding must read, at every step, the weights once and the keys and values of all tokens so far:
    steps x 2 bytes x weights + columns x layers x 2 x width x 2 bytes,   divided by the copy's rate.
Training must compute, for T tokens, A of them completion tokens, on sequences of S tokens:
    6 x T x weights of the linear layers + 6 x A x (vocabulary x width) + 6 x T x S x width x layers,
the last term for causal attention, half of the square. Recomputation that saves memory is not required work, so it is
reported separately: always the head's logits, 2 x A x (vocabulary x width); with gradient checkpointing a whole forward
pass.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "score", "learn")
PROMPTS = 131_900
PUBLISHED = "DeepSpeed-Chat published 11.7 h on one A100-80G"
DATASHEETS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}
"""Dense bf16 operations/s and bytes/s of the SXM boards, from the vendor's data sheets."""


@dataclass(frozen=True)
class Shape:
    """A decoder's size."""

    layers: int
    width: int
    heads: int
    inner: int
    vocab: int

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices: query, key, value, output and the two of the feed-forward part."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of the language model's head."""
        return self.vocab * self.width

    def forward_flops(self, tokens: int, length: int, head_tokens: int) -> float:
        """Operations of a forward pass over sequences of `length`; the head works on `head_tokens` of the tokens."""
        attention = 2 * tokens * length * self.width * self.layers
        return 2.0 * tokens * self.linear + 2.0 * head_tokens * self.head + attention


@dataclass(frozen=True)
class Setting:
    """Models and sizes of one measurement."""

    policy: Shape
    critic: Shape
    prompt_tokens: int
    new_tokens: int
    episodes: int
    trl_episodes: int
    """Episodes per step for TRL: fewer, because it keeps the logits of a whole rollout."""
    batch_size: int
    micro_batch_tokens: int
    seconds: int
    """Time limit of each side, including loading."""
    step: str = "eager"
    compile: bool = False
    gradient_checkpointing: bool = False

    def update_flops(self, episodes: int) -> dict[str, float]:
        """Operations that scoring and learning require in one update, and those that learning repeats."""
        length, answers = self.prompt_tokens + self.new_tokens, episodes * self.new_tokens
        tokens = episodes * length
        policy = self.policy.forward_flops(tokens, length, answers)
        critic = self.critic.forward_flops(tokens, length, 0)
        twice = policy + critic if self.gradient_checkpointing else 2.0 * answers * self.policy.head
        return {"score": 2 * policy + 2 * critic, "learn": 3 * (policy + critic), "twice": twice}

    def decode_bytes(self, steps: int, columns: int, element: int) -> float:
        """Bytes that decoding must read: the weights at every step, and the keys and values of all row-columns."""
        weights = self.policy.linear + self.policy.head
        return float(element) * (steps * weights + 2 * columns * self.policy.layers * self.policy.width)


def setting_for(gpu_bytes: int, flops: float) -> Setting:
    """The large setting, reduced to the GPU's memory and, by smaller steps, to its speed; a small one without a GPU."""
    if not gpu_bytes:
        tiny = Shape(layers=2, width=64, heads=4, inner=256, vocab=512)
        return Setting(tiny, tiny, 16, 16, 8, 8, batch_size=8, micro_batch_tokens=128, seconds=1)
    policy = Shape(layers=24, width=2048, heads=32, inner=8192, vocab=50272)
    critic = Shape(layers=24, width=1024, heads=16, inner=4096, vocab=50272)
    free = max(4e9, gpu_bytes - 45e9)  # weights, gradients and AdamW's moments of both take about 30 GB
    rows = _power_of_two(free / (1.15 * 512 * 4 * policy.layers * policy.width))  # keys and values of 512 tokens
    tokens = _power_of_two(free / 4e6)  # activations: about 3 MB a token of policy and critic together
    episodes = min(1024, max(64, _power_of_two(1024 * flops / 500e12)))  # at most the 1,024 of DeepSpeed-Chat
    batch, micro_batch = min(episodes, rows), min(32768, max(1024, tokens))
    return Setting(policy, critic, 256, 256, episodes, episodes // 4, batch, micro_batch, seconds=190)


def _power_of_two(most: float) -> int:
    return 1 << max(0, int(most).bit_length() - 1)


# ---- inputs --------------------------------------------------------------------------------------------------------


def make_models(setting: Setting, folder: Path) -> None:
    """Random weights as two model folders, with a tokenizer of one word per token, and prompts of the exact length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [f"w{i}" for i in range(setting.policy.vocab - len(special))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = (
        ("policy", transformers.OPTForCausalLM, setting.policy),
        ("reward", transformers.OPTForSequenceClassification, setting.critic),
    )
    for name, kind, shape in kinds:
        config = transformers.OPTConfig(
            vocab_size=shape.vocab, hidden_size=shape.width, num_hidden_layers=shape.layers, ffn_dim=shape.inner,
            num_attention_heads=shape.heads, max_position_embeddings=2048, word_embed_proj_dim=shape.width,
            num_labels=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model = kind(config).to(torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        del model
    gc.collect()
    torch.cuda.empty_cache()
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(words, k=setting.prompt_tokens - 1)) for _ in range(setting.episodes)]  # and <s>
    lines = [json.dumps({"prompt": prompt, "source": "random", "split": "train"}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


# ---- hardware limits -----------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any]) -> float:
    """Median seconds of a function after three warm-ups."""
    times = []
    for _ in range(13):
        start = _now()
        work()
        times.append(_now() - start)
    return statistics.median(times[3:])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ceilings() -> dict[str, float]:
    """Operations/s of a matrix product in the compute dtype, bytes/s of a copy (read and written), data-sheet values.

    Data-sheet values are given only for known GPUs.
    """
    cuda = torch.cuda.is_available()
    device, size, side = ("cuda", 2**32, 8192) if cuda else ("cpu", 2**26, 512)
    dtype = torch.bfloat16 if cuda else torch.float32
    halves = torch.randn(2, size // 4, device=device)
    copied = 2 * size / seconds_of(lambda: halves[0].copy_(halves[1]))
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    multiplied = 2 * side**3 / seconds_of(lambda: a @ b)
    found = {"flops": multiplied, "bytes": copied}
    name = torch.cuda.get_device_name() if cuda else ""
    for board, (sheet_flops, sheet_bytes) in DATASHEETS.items():
        if board in name:
            found |= {"sheet_flops": sheet_flops, "sheet_bytes": sheet_bytes}
    return found


# ---- the sides, in turn --------------------------------------------------------------------------------------------


def measure(
    side: str, setting: Setting, folder: Path, trl: Path | None = None, profile: Path | None = None
) -> dict[str, Any]:
    """Run one side in a new process; on a timeout, return what it had written."""
    spec = {
        "run": str(folder / f"run-{side}"),
        "policy": str(folder / "policy"),
        "reward": str(folder / "reward"),
        "prompts": str(folder / "prompts.jsonl"),
        "prompt_tokens": setting.prompt_tokens,
        "new_tokens": setting.new_tokens,
        "episodes": setting.trl_episodes if side == "trl" else setting.episodes,
        "batch_size": setting.batch_size,
        "micro_batch_tokens": setting.micro_batch_tokens,
        "step": setting.step,
        "seconds": setting.seconds,
        "compile": setting.compile,
        "gradient_checkpointing": setting.gradient_checkpointing,
        "profile": str(profile) if profile else None,
    }
    file, result = folder / "spec.json", folder / f"{side}.json"
    file.write_text(json.dumps(spec), "utf-8")
    path = [*([str(trl)] if trl else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    program = [sys.executable, str(ROOT / "benchmarks" / "gpu_sides.py"), side, str(file), str(result)]
    try:
        done = subprocess.run(program, capture_output=True, text=True, env=env, timeout=setting.seconds + 60)
        failed = done.stdout[-1000:] + done.stderr[-3000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"stopped after {setting.seconds + 60} s"
    if failed:
        print(f"{side}: {failed}", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(result.read_text("utf-8")) if result.is_file() else {"updates": []}
    return found | {"episodes": spec["episodes"], "failed": failed}


def profile(setting: Setting, out: Path) -> None:
    """Profile the phases of a warm update with few tokens."""
    with tempfile.TemporaryDirectory() as name:
        make_models(setting, Path(name))
        found = measure("ours", setting, Path(name), profile=out)
    if found["failed"]:
        raise SystemExit("the profile is incomplete; see above")
    print(f"{out}/profile-PHASE.txt: the operations that take most time in {', '.join(PHASES)}", flush=True)


def measurements(found: dict[str, Any], setting: Setting, limits: dict[str, float], element: int) -> dict[str, Any]:
    """The table's values for a side: medians over its updates, without the first if there are more."""
    updates = found["updates"][1:] or found["updates"]
    episodes, medians = found["episodes"], {p: statistics.median(u["phases"][p] for u in updates) for p in PHASES}
    seconds = statistics.median(update["seconds"] for update in updates)
    tokens = episodes * (setting.prompt_tokens + setting.new_tokens)
    work = setting.update_flops(episodes)
    shown = {
        "prompts an update": episodes,
        "updates measured": len(updates),
        "seconds an update": seconds,
        "hours for 131,900 prompts": seconds / episodes * PROMPTS / 3600,
        **{f"seconds in {phase}": medians[phase] for phase in PHASES},
        "answer tokens/s in rollout": episodes * setting.new_tokens / medians["rollout"],
        **{f"tokens/s in {phase}": tokens / medians[phase] for phase in ("score", "learn")},
        "fraction of the matrix rate in score": work["score"] / medians["score"] / limits["flops"],
        "fraction of the matrix rate in learn": work["learn"] / medians["learn"] / limits["flops"],
        "the same, with what is computed twice": None,
        "the same, of the data sheet's matrix rate": None,
        "fraction of the bandwidth limit in decoding": None,
        "the same, of the data sheet's bandwidth": None,
        "peak GB, loaded": found["loaded_gb"],
        **{f"peak GB in {phase}": max(u["peak_gb"][phase] for u in updates) for phase in PHASES},
    }
    if "decode_steps" in updates[-1]:  # ours
        both = work["learn"] + work["twice"]
        shown["the same, with what is computed twice"] = both / medians["learn"] / limits["flops"]
        fractions = []
        for u in updates:
            moved = setting.decode_bytes(u["decode_steps"], u["decode_columns"], element)
            fractions.append(moved / (u["phases"]["rollout"] - u["prefill_seconds"]) / limits["bytes"])
        shown["fraction of the bandwidth limit in decoding"] = statistics.median(fractions)
    for ours, theirs, limit, sheet in (
        ("fraction of the matrix rate in learn", "the same, of the data sheet's matrix rate", "flops", "sheet_flops"),
        (
            "fraction of the bandwidth limit in decoding",
            "the same, of the data sheet's bandwidth",
            "bytes",
            "sheet_bytes",
        ),
    ):
        if shown[ours] is not None and sheet in limits:
            shown[theirs] = shown[ours] * limits[limit] / limits[sheet]
    return shown


def step_table(found: dict[str, Any], setting: Setting, limits: dict[str, float], element: int) -> str:
    """Markdown table of the decoding steps, over one batch of completions after a warm-up batch."""
    lines = [
        "| decoding step | ms | fraction of the bandwidth limit | first batch, s | second, s |",
        f"|{' --- |' * 5}",
    ]
    for update in found["updates"]:
        seconds = update["took"][1] - update["prefill_seconds"]
        fraction = setting.decode_bytes(update["decode_steps"], update["decode_columns"], element) / seconds
        first, second = update["took"]
        ms = 1000 * seconds / update["decode_steps"]
        lines.append(f"| {update['step']} | {ms:.2f} | {fraction / limits['bytes']:.1%} | {first:.2f} | {second:.2f} |")
    return "\n".join(lines)


def table(sides: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(sides)} |", f"|{' --- |' * (len(sides) + 1)}"]
    for name in next(iter(sides.values())):
        cells = [_cell(name, side[name]) for side in sides.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.startswith(("fraction", "the same")):
        return f"{value:.1%}"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:,.2f}"


def machine() -> dict[str, Any]:
    """The device and the package versions."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    if not torch.cuda.is_available():
        return {"device": "CPU (small mode: the timings mean nothing)", "gpu_bytes": 0, "versions": versions}
    properties = torch.cuda.get_device_properties(0)
    return {"device": properties.name, "gpu_bytes": properties.total_memory, "versions": versions}


def main() -> None:
    """Measure, print the table, write gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="Folder with TRL 1.12.0; without it only ours is measured.")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", ROOT / ".gpu")), help="Folder for gpu.json."
    )
    parser.add_argument("--batch-size", type=int, help="Sequences that our side decodes together.")
    parser.add_argument("--micro-batch-tokens", type=int, help="Tokens per training pass, on both sides.")
    parser.add_argument("--seconds", type=int, help="Time limit of each side.")
    parser.add_argument("--step", choices=("eager", "cuda_graph"), help="How our side decodes in the updates.")
    parser.add_argument("--compile", action="store_true", help="Run our side with compile=true.")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="Turn it on for our side; TRL keeps its default."
    )
    parser.add_argument("--profile", action="store_true", help="Instead, write profile-PHASE.txt of a short update.")
    args = parser.parse_args()
    here = machine()
    transformers.utils.logging.disable_progress_bar()
    if not here["gpu_bytes"]:
        torch.set_num_threads(1)
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    names = ("batch_size", "micro_batch_tokens", "seconds", "step", "compile", "gradient_checkpointing")
    given = {name: getattr(args, name) for name in names}
    limits = ceilings()
    setting = setting_for(here["gpu_bytes"], limits["flops"])
    setting = replace(setting, **{key: value for key, value in given.items() if value})
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {here['device']}, {here['versions']}")
    print(", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in limits.items()))
    print(
        f"{setting.batch_size} answers at a time, passes of {setting.micro_batch_tokens} tokens; {PUBLISHED}",
        flush=True,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if args.profile:
        profile(replace(setting, new_tokens=16, episodes=min(128, setting.episodes)), args.out)
        return
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        make_models(setting, Path(name))
        found = {"ours": measure("ours", setting, Path(name)), "steps": measure("steps", setting, Path(name))}
        if args.trl is not None and (args.trl / "trl").is_dir():
            found["TRL 1.12.0"] = measure("trl", setting, Path(name), args.trl)
        else:
            where = f"{args.trl} holds no package trl" if args.trl else "no folder was named with --trl"
            print(f"TRL is skipped: {where}", flush=True)
    element = 2 if here["gpu_bytes"] else 4
    for side, result in found.items():
        if result["updates"] and side != "steps":
            sides[side] = measurements(result, setting, limits, element)
    everything = {"machine": here, "limits": limits, "setting": asdict(setting), "sides": sides, "raw": found}
    (args.out / "gpu.json").write_text(json.dumps(everything, indent=1), "utf-8")
    if sides:
        print(f"\n{table(sides)}", flush=True)
    print(f"\n{step_table(found['steps'], setting, limits, element)}", flush=True)
    if any(result["failed"] for result in found.values()):
        raise SystemExit("a side failed or timed out; see above")


if __name__ == "__main__":
    main()
