"""What a process privately holds while a model of 187M parameters is loaded, built and saved, against the prediction.

python benchmarks/loading.py                          # all runs
python benchmarks/loading.py --only "SFT, 4 processes, ZeRO-3, float32"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import LORA, ROOT, SHARED, ppo, trainer, write_data

SHARD_BYTES = 50_000_000
"""Files of weights that are read and written."""
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
LAST = {"name": "last-layers", "layers": 1}
RUNS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    f"{label}, {processes} processes, ZeRO-{zero}, {precision}": (stage, processes, zero, {"precision": precision, **v})
    for label, stage, processes, zero, precision, v in (
        ("SFT", "sft", 2, 3, "float32", {}),
        ("SFT", "sft", 4, 3, "float32", {}),
        ("SFT", "sft", 4, 3, "bfloat16", {}),
        ("SFT with LoRA", "sft", 2, 3, "float32", {"tuning": LORA}),
        ("reward model", "reward", 2, 3, "bfloat16", {}),
        ("DPO", "dpo", 2, 3, "float32", {"tuning": LORA}),
        ("PPO with LoRA", "ppo", 2, 3, "float32", {"tuning": LORA, "critic": {"init": "policy", "tuning": LAST}}),
        ("PPO", "ppo", 4, 3, "bfloat16", {"critic": {"init": "policy"}}),
        ("SFT", "sft", 2, 2, "float32", {}),
        ("SFT", "sft", 4, 2, "float32", {}),
    )
}  # fmt: skip


def make_model(folder: Path) -> None:
    """Write a random Llama in bfloat16 with heads of 64 and untied embeddings, and the tokenizer of stories260K."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16_000, num_key_value_heads=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=None, **SHAPE,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHARED / "models" / "stories260K" / name, folder / name)


def config_of(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """A run's config; writes its data."""
    stage, _, zero, more = RUNS[name]
    values = ppo(128, 16, 16, 4) if stage == "ppo" else trainer(2, 64)
    config = write_data("reward" if stage == "dpo" else stage, values | more, folder)
    config["reward"] = {"name": "function", "function": "loading_side:reward"}
    if stage != "ppo":
        del config["reward"]
    chosen = {"path": str(model), "chat_template": "plain"}
    return config | {"run": str(folder / "run"), "model": chosen, "deepspeed": f"configs/deepspeed/zero{zero}.json"}


def measure(name: str, config: dict[str, Any], folder: Path) -> list[dict[str, int]]:
    """Highest private bytes of each rank by phase; see `loading_side`."""
    stage, processes, _, _ = RUNS[name]
    spec = {"stage": stage, "config": config, "shard_bytes": SHARD_BYTES, "result": str(folder / "result")}
    (folder / "spec.json").write_text(json.dumps(spec), "utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]), "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [sys.executable, *launcher, str(ROOT / "benchmarks" / "loading_side.py"), str(folder / "spec.json")]
    done = subprocess.run(program, capture_output=True, text=True, env=env, cwd=ROOT, timeout=900)
    if done.returncode:
        raise SystemExit(f"{name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads((folder / f"result-{rank}.json").read_text("utf-8")) for rank in range(processes)]


def predicted(name: str, config: dict[str, Any]) -> float:
    """The phase `load` of `rlhf plan` without a GPU, where the host's memory is all there is; bytes."""
    from rlhf.cli.stage_configs import STAGES
    from rlhf.config.load import check_config
    from rlhf.memory.cpu_range import predicted as predict

    stage, processes, _, more = RUNS[name]
    checked = check_config(STAGES[stage], config, "benchmark")
    return predict(checked, more["precision"] == "bfloat16", processes, 64, 2).phases["load"].total


def main() -> None:
    """Print the table; each figure is the highest of all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    print(time.strftime("%Y-%m-%d %H:%M"))
    print("| run | predicted MB | highest MB | error | built MB | saving MB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place) / "model")
        for name in args.only:
            folder = Path(tempfile.mkdtemp(dir=place))
            config = config_of(name, Path(place) / "model", folder)
            ranks, guess = measure(name, config, folder), predicted(name, config)
            peak = max(max(rank["weights"], rank["engine"]) for rank in ranks)
            built, saving = (max(rank[phase] for rank in ranks) for phase in ("built", "save"))
            sizes = [f"{size / 1e6:,.0f}" for size in (guess, peak)] + [f"{guess / peak - 1:+.0%}"]
            sizes += [f"{size / 1e6:,.0f}" for size in (built, saving)]
            print(f"| {name} | {' | '.join(sizes)} |", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
