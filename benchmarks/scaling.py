"""How PPO scales: 2 processes against 1 at every ZeRO stage, cost against size, and the model of docs/scaling.md.

    python benchmarks/scaling.py                        # both measurements
    python benchmarks/scaling.py processes              # time, memory, bytes sent and predicted, by ZeRO stage
    python benchmarks/scaling.py cost --json rows.jsonl # answer length, batch, K, vocabulary; rows for plot.py
    python benchmarks/scaling.py --model-table          # the table of docs/scaling.md (--machine h200: for an H200)

A random Llama (4 layers, 3.4M parameters, 512 tokens) is policy, critic, reference and reward model. Completions have a
fixed length; float32, one thread per process. DeepSpeed's buffers and thresholds are reduced in proportion to the
model, so that it gathers and releases weights as it does for a large one. Each run is one or two separate processes;
its first update is not measured. As root on Linux the processes run in a separate network namespace, and the traffic
on its loopback device is compared with the counted bytes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling_model import MACHINES, PHASES, Job, Model, Weights, micro_batches, sent, table

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
FLOAT32 = 4
TINY = Model("tiny", layers=4, hidden=256, ffn=688, heads=4, kv_heads=4, vocab=512)
JOB = Job(episodes=32, prompt=8, answer=64, minibatches=2, micro_batch_tokens=400)
"""Four micro-batches on each of two ranks, to distinguish what is sent per micro-batch from what is sent per step."""
AXES = {
    "answer length": (32, 64, 128, 256),
    "episodes": (16, 32, 64, 128),
    "vocabulary": (512, 4096, 32768),
    "K": (2, 4, 8, 16),
}
"""The sizes that `cost` varies: the first three in PPO; K in the reward model, per ranking."""


TIDY = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""Makes glibc return freed tensors at once, so that each phase has its own peak."""


@dataclass(frozen=True)
class Setting:
    """One run."""

    job: Job = JOB
    model: Model = TINY
    processes: int = 1
    stage: int | None = None
    updates: int = 4


# ---- runs ----------------------------------------------------------------------------------------------------------


def save_models(model: Model, place: Path) -> None:
    """A random policy and a random reward model with the tokenizer of stories260K."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = {
        "vocab_size": model.vocab, "hidden_size": model.hidden, "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    for kind, name in ((LlamaForCausalLM, "policy"), (LlamaForSequenceClassification, "reward")):
        kind(LlamaConfig(**shape)).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)


def write_prompts(path: Path) -> None:
    """Story openings; the config cuts them to one length."""
    lines = (SHARED / "data" / "text" / "tinystories_1000.jsonl").read_text("utf-8").splitlines()
    openings = sorted({" ".join(json.loads(line)["text"].split()[:8]) for line in lines})
    path.write_text("\n".join(json.dumps({"prompt": text, "split": "train"}) for text in openings), "utf-8")


def zero_settings(stage: int, parameters: int) -> dict[str, Any]:
    """The file of configs/deepspeed for a stage, with buffers and thresholds scaled from 8B to this model."""
    file = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    settings: dict[str, Any] = json.loads(file.read_text("utf-8"))
    zero, billion = settings["zero_optimization"], parameters // 8
    zero |= {"reduce_bucket_size": billion // 2, "allgather_bucket_size": billion // 2}
    if stage == 3:
        zero |= {"stage3_max_reuse_distance": billion, "stage3_max_live_parameters": billion}
        zero |= {"stage3_prefetch_bucket_size": billion // 20, "stage3_param_persistence_threshold": 1000}
    return settings


def own_network() -> list[str]:
    """The command prefix that starts a new network namespace; empty where that is not allowed."""
    words = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


@functools.cache
def measure(setting: Setting) -> list[dict[str, Any]]:
    """The measurements of each rank of a run; see scaling_run.py."""
    job = setting.job
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_models(setting.model, place)
        write_prompts(place / "prompts.jsonl")
        if setting.stage is not None:
            (place / "zero.json").write_text(json.dumps(zero_settings(setting.stage, setting.model.policy)), "utf-8")
        spec = {
            "run": str(place / "run"),
            "precision": "float32",
            "deepspeed": None if setting.stage is None else str(place / "zero.json"),
            "model": {"path": str(place / "policy"), "chat_template": "plain"},
            "data": {"prompts": str(place / "prompts.jsonl"), "max_prompt_tokens": job.prompt},
            "reward": {"name": "model", "path": str(place / "reward")},
            "critic": {"init": "policy"},
            "updates": setting.updates,
            "rollout": {
                "prompts_per_update": job.episodes, "max_new_tokens": job.answer, "min_new_tokens": job.answer,
            },
            "batch": {
                "epochs": job.epochs, "minibatches": job.minibatches, "micro_batch_tokens": job.micro_batch_tokens,
            },
            "eval": {"every": setting.updates, "prompts": 0},
            "checkpoints": {"every": setting.updates},
        }  # fmt: skip
        (place / "spec.json").write_text(json.dumps(spec), "utf-8")
        launcher = own_network() if setting.processes > 1 else []
        launcher += [sys.executable]
        if setting.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(setting.processes)]
            launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        program = [str(ROOT / "benchmarks" / "scaling_run.py"), str(place / "spec.json"), str(place / "result")]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run([*launcher, *program], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{setting}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return [json.loads((place / f"result-{rank}").read_text("utf-8")) for rank in range(setting.processes)]


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seconds(found: dict[str, Any], phase: str) -> float:
    """Wall-clock seconds of a phase, median over the updates except the first."""
    return statistics.median(update["figures"][f"time/{phase}"] for update in found["updates"][1:])


# ---- processes -----------------------------------------------------------------------------------------------------


def predicted(setting: Setting) -> dict[str, float]:
    """Bytes that each rank sends in an update, by phase, as docs/scaling.md calculates."""
    policy, scalar = FLOAT32 * setting.model.policy, FLOAT32 * setting.model.scalar
    _, passes = micro_batches(setting.job, setting.processes)
    weights = Weights(policy, scalar, policy, scalar)
    assert setting.stage is not None
    return sent(setting.stage, setting.processes, weights, passes, setting.job.minibatches, setting.job.epochs)


def compare_processes(hidden: int, episodes: int, updates: int) -> None:
    """Print time and memory, then bytes as predicted, as counted, and on the loopback device."""
    os.environ |= TIDY
    print(
        "| run | s per update | speed-up | rollout, score, learn | peak MB per rank: load, rollout, score, learn, save|"
    )
    print("|" + " --- |" * 5)
    model, job = replace(TINY, hidden=hidden, ffn=TINY.ffn * hidden // TINY.hidden), replace(JOB, episodes=episodes)
    base, traffic = 0.0, []
    for stage in (None, 0, 1, 2, 3):
        setting = Setting(job, model, processes=1 if stage is None else 2, stage=stage, updates=updates)
        found = measure(setting)
        phases = [seconds(found[0], phase) for phase in PHASES]
        base = base or sum(phases)
        name = "1 process" if stage is None else f"2 processes, ZeRO {stage}"
        peaks = [max(rank["peak_mb"][phase] for rank in found) for phase in ("load", *PHASES, "save")]
        shown = ", ".join(f"{phase:.2f}" for phase in phases), ", ".join(f"{peak:,.0f}" for peak in peaks)
        print(f"| {name} | {sum(phases):.2f} | {base / sum(phases):.2f}x | {' | '.join(shown)} |", flush=True)
        if stage is not None:
            traffic += byte_rows(setting, found[0]["updates"][-1])
    print("\n| ZeRO | phase | MB a rank sends, predicted | counted | predicted / counted | on the loopback device |")
    print("|" + " --- |" * 6 + "\n" + "\n".join(traffic))


def byte_rows(setting: Setting, update: dict[str, Any]) -> list[str]:
    """Lines for one update; phases in which no weights or gradients are sent have no ratio."""
    rows = []
    for phase, expected in predicted(setting).items():
        counted, device = update["sent"].get(phase, 0.0), update["loopback"][phase] / setting.processes
        ratio = f"{expected / counted:.3f}" if expected else ""
        seen = f"{device / 1e6:.2f}" if own_network() else "not measured"
        rows.append(f"| {setting.stage} | {phase} | {expected / 1e6:.2f} | {counted / 1e6:.2f} | {ratio} | {seen} |")
    return rows


# ---- cost ----------------------------------------------------------------------------------------------------------


def cost(axis: str, size: int, updates: int) -> dict[str, Any]:
    """Processor seconds by phase and peak MB with one size changed; micro-batches of 2,048 tokens."""
    if axis == "K":
        from reward import BENCHMARK

        ranking = BENCHMARK.measure("ours", size, 64, 32, updates)  # prompts of 64 tokens, answers of 32
        return {"axis": axis, "size": size, "phases": [ranking["cpu"]], "mb": ranking["mb"]}
    setting = Setting(job=replace(JOB, micro_batch_tokens=2048), updates=updates)
    if axis == "vocabulary":
        setting = replace(setting, model=replace(TINY, vocab=size))
    else:
        field = {"answer length": "answer", "episodes": "episodes"}[axis]
        setting = replace(setting, job=replace(setting.job, **{field: size}))
    (found,) = measure(setting)
    phases = [statistics.median(u["processor"][phase] for u in found["updates"][1:]) for phase in PHASES]
    return {"axis": axis, "size": size, "phases": phases, "mb": max(found["peak_mb"].values())}


def compare_costs(axes: Sequence[str], updates: int, file: Path | None) -> None:
    """Print processor seconds and memory against each size, and append the rows to `file`."""
    print("| what grows | size | processor s | of it rollout, score, learn | peak MB | time x | size x |")
    print("|" + " --- |" * 7)
    for axis in axes:
        rows = []
        for size in AXES[axis]:
            rows.append(cost(axis, size, updates))
            report(rows, file)


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print the last row, compared with the first, and append it to the file."""
    first, last = rows[0], rows[-1]
    parts = ", ".join(f"{phase:.2f}" for phase in last["phases"]) if len(last["phases"]) > 1 else ""
    times = f"{sum(last['phases']) / sum(first['phases']):.2f} | {last['size'] / first['size']:.0f}"
    total = f"{sum(last['phases']):.3f}"
    print(f"| {last['axis']} | {last['size']:,} | {total} | {parts} | {last['mb']:,.0f} | {times} |", flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"benchmark": "scaling", **last}) + "\n")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("processes", "cost", []), help="Both by default.")
    parser.add_argument("--updates", type=int, default=3, help="Updates of each run; the first is not measured.")
    parser.add_argument("--hidden", type=int, default=TINY.hidden, help="Width of the model, for `processes`.")
    parser.add_argument("--episodes", type=int, default=JOB.episodes, help="Episodes per update, for `processes`.")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="The sizes that `cost` varies.")
    parser.add_argument("--json", type=Path, help="File that the rows of `cost` are appended to.")
    parser.add_argument("--model-table", action="store_true", help="Print the table of docs/scaling.md and exit.")
    parser.add_argument("--machine", choices=MACHINES, default="h100", help="The machine of --model-table.")
    args = parser.parse_args()
    if args.model_table:
        print(table(MACHINES[args.machine]))
        return
    if not args.what or "processes" in args.what:
        compare_processes(args.hidden, args.episodes, args.updates)
        print()
    if not args.what or "cost" in args.what:
        compare_costs(args.axes, args.updates, args.json)


if __name__ == "__main__":
    main()
