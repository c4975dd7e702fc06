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
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_arithmetic import PHASES, PUBLISHED, Setting, measurements, setting_for, step_table, table, works

ROOT = Path(__file__).resolve().parents[1]
GRACE = 30
"""Seconds after its time limit at which a side is stopped."""
DATASHEETS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}
"""Dense bf16 operations/s and bytes/s of the SXM boards, from the vendor's data sheets."""


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
    limit = {"check": 60, "steps": 60, "trl": setting.seconds * 3 // 4}.get(side, setting.seconds) + GRACE
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
        "seconds": limit - GRACE if side != "check" else 0,  # 0: two updates
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
        done = subprocess.run(program, capture_output=True, text=True, env=env, timeout=limit)
        failed = done.stdout[-1000:] + done.stderr[-3000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"stopped after {limit} s"
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


def compare(
    setting: Setting, limits: dict[str, float], element: int, trl: Path | None, about: dict[str, Any], file: Path
) -> None:
    """Run the check and the sides, and print and write what is known after each: a run that is cut off still tells."""
    sides: dict[str, Any] = {}
    found: dict[str, Any] = {}

    def note(side: str, result: dict[str, Any]) -> None:
        found[side] = result
        if result["updates"] and side not in ("check", "steps"):
            sides[side] = measurements(result, setting, limits, element)
        file.write_text(json.dumps(about | {"sides": sides, "raw": found}, indent=1), "utf-8")

    with tempfile.TemporaryDirectory() as name:
        folder, small = Path(name), Path(name) / "small"
        tiny = replace(setting_for(0, 0.0), step=setting.step, compile=setting.compile)
        make_models(tiny, small)
        note("check", measure("check", tiny, small))
        print(works(found["check"]), flush=True)
        if not found["check"]["updates"]:
            raise SystemExit("nothing else is measured, because the check failed; see above")
        make_models(setting, folder)
        note("ours", measure("ours", setting, folder))
        if sides:
            print(f"\n{table(sides)}", flush=True)
        note("steps", measure("steps", setting, folder))
        print(f"\n{step_table(found['steps'], setting, limits, element)}", flush=True)
        if trl is not None and (trl / "trl").is_dir():
            note("TRL 1.12.0", measure("trl", setting, folder, trl))
            if "TRL 1.12.0" in sides:
                print(f"\n{table(sides)}", flush=True)
        else:
            where = f"{trl} holds no package trl" if trl else "no folder was named with --trl"
            print(f"TRL is skipped: {where}", flush=True)
    if any(result["failed"] for result in found.values()):
        raise SystemExit("a side failed or timed out; see above")


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
    everything = {"machine": here, "limits": limits, "setting": asdict(setting)}
    compare(setting, limits, 2 if here["gpu_bytes"] else 4, args.trl, everything, args.out / "gpu.json")


if __name__ == "__main__":
    main()
