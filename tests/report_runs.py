"""Run folders with metrics and samples, as stages write them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from rlhf.runs.lock import LOCK

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\x1b[31m'\""


def write_run(path: Path, stage: str, rows: list[dict], samples: list[dict] = (), config: Any = None, **info) -> Path:
    path.mkdir(parents=True)
    facts = {"stage": stage, "status": "complete", "model_fingerprint": stage * 8, "packages": {"torch": "2.0"}, **info}
    (path / "run.json").write_text(json.dumps(facts))
    (path / "config.yaml").write_text(yaml.safe_dump(config or {"seed": 0}))
    for name, lines in (("metrics", rows), ("samples", samples)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / LOCK).touch()
    (path / "model").mkdir()
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, path / "model/model.safetensors")
    return path


def sample(step: int, prompt: str, answer: str, score: float, **more) -> dict:
    return {"step": step, "messages": [{"role": "user", "content": prompt}], "answer": answer, "score": score,
            "ended": True, **more}  # fmt: skip


def write_chain(folder: Path, text: str = "word", gain: float = 1.0, config: Any = None, tokens: bool = False) -> Path:
    """SFT, reward and PPO runs in a folder; every text that a run can write contains `text`."""
    steps = [{"step": n, "train/loss": 2 / n, "time/step": 0.5, "train/tokens": 10} for n in (1, 2, 3)]
    sft = write_run(
        folder / "sft", "sft", steps,
        data=[{"path": f"nowhere/{text}", "kind": "demonstration", "fingerprint": "d" * 64}],
    )  # fmt: skip
    slices = {name: {"accuracy": 0.7, "accuracy_interval": [0.6, 0.8], "pairs": 9} for name in (text, "other")}
    reward = write_run(
        folder / "reward", "reward", [{"step": n, "eval/accuracy": 0.5 + n / 10} for n in (1, 2)],
        parents=[{"path": str(sft), "stage": "sft", "fingerprint": "sft" * 8}],
    )  # fmt: skip
    held_out = {"accuracy": 0.7, "accuracy_interval": [0.65, 0.75], "longer_accuracy": 0.55, "pairs": 1000,
                "rankings": 200, "by_annotator": slices}  # fmt: skip
    (reward / "reward_metrics.json").write_text(json.dumps(held_out))
    rows = [{"step": 0, "eval/scores": 0.0, "eval/kl": 0.0}]
    rows += [{"step": n, "objective/scores": n / 4, "objective/kl": n / 2, "time/learn": 1.0, "throughput/learn": 100}
             for n in (1, 2, 3, 4)]  # fmt: skip
    rows += [{"step": 4, "eval/scores": gain, "eval/kl": 2.0}]
    samples = [sample(step, f"{text} {n}", f"{text} at {step}", n / 10 + gain * (step > 0))
               for step in (0, 4) for n in range(20)]  # fmt: skip
    if tokens:
        for n, row in enumerate(samples):
            columns = {name: [0.5 * n, -1.0, 2.0] for name in ("value", "reward", "logprob")}
            numbers = columns | {"ref_logprob": [0.0, 0.0, 0.0], "advantage": [3.0, -2.0, 1.0]}
            row["tokens"] = {"text": [text, " at", ""], **numbers}
    parents = [{"path": str(one), "fingerprint": one.name * 8} for one in (sft, reward)]
    write_run(folder / "ppo", "ppo", rows, samples, config or {"updates": 4, "note": text}, parents=parents)
    return folder
