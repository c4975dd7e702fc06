"""The sides of `benchmarks/gpu.py`, each a separate process: `gpu_sides.py check|ours|steps|trl SPEC.json RESULT.json`.

`check` says in seconds, with tiny models, whether anything works at all. `ours` and `trl` get the same weights, prompts
and lengths, and one optimizer step per update, as in DeepSpeed-Chat. The result is rewritten after every update, so
that a timeout loses only the current one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

PHASES = ("rollout", "score", "learn")


def now() -> float:
    """Seconds, after the GPU has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """Reset the peak of memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # if the kernel forbids it, the peak covers all phases so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Peak memory since `reset_peak` in GB (10^9 bytes): allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes.group(1)) * 1024 / 1e9 if kilobytes else 0.0


class Notes:
    """Time and memory of each update; the first is marked as the warm-up."""

    def __init__(self, spec: dict[str, Any], path: Path) -> None:
        self.spec, self.path = spec, path
        self.began, self.mark = now(), now()
        self.result: dict[str, Any] = {"loaded_gb": 0.0, "load_seconds": 0.0, "updates": []}

    def loaded(self) -> None:
        """Call when the models are on their device."""
        self.result |= {"load_seconds": now() - self.mark, "loaded_gb": peak_gb()}
        self.mark = now()

    def update(self, **figures: Any) -> None:
        """Call at the end of an update."""
        self.result["updates"].append({"seconds": now() - self.mark, **figures})
        self.path.write_text(json.dumps(self.result), "utf-8")
        self.mark = now()

    def time_for_another(self) -> bool:
        """Whether another update fits into the time limit; there are at least two, the first of them a warm-up."""
        updates = self.result["updates"]
        if len(updates) < 2 or self.spec["profile"]:
            return len(updates) < 2
        return bool(now() - self.began + updates[-1]["seconds"] < self.spec["seconds"])


# ---- ours ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def profiled(file: Path) -> Iterator[None]:
    """Write the operations that take most time, on the GPU if there is one."""
    cuda = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        yield
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    file.write_text(profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90), "utf-8")


class Decoding:
    """Counts the decoding steps of a rollout and times its prefills, by wrapping the sampler."""

    def __init__(self) -> None:
        from rlhf.rollout.decoding import Schedule
        from rlhf.rollout.slots import Slots

        self.clear()
        prefill, step = Schedule._prefill_into_slots, Slots._step

        def timed_prefill(schedule: Any) -> None:
            start = now()
            prefill(schedule)
            self.figures["prefill_seconds"] += now() - start

        def counted_step(slots: Any) -> None:
            step(slots)
            held = slots.cache.columns  # in use; a cache of fixed size has more
            self.figures["decode_steps"] += 1
            self.figures["decode_columns"] += len(slots.requests) * (held.end - held.start)

        Schedule._prefill_into_slots = timed_prefill  # type: ignore[method-assign]
        Slots._step = counted_step  # type: ignore[method-assign]

    def clear(self) -> None:
        self.figures = {"prefill_seconds": 0.0, "decode_steps": 0, "decode_columns": 0}


def our_config(spec: dict[str, Any]) -> dict[str, Any]:
    """A user's config."""
    return {
        "run": spec["run"],
        "model": {"path": spec["policy"], "chat_template": "plain"},
        "data": {"prompts": spec["prompts"], "max_prompt_tokens": spec["prompt_tokens"]},
        "reward": {"name": "model", "path": spec["reward"]},
        "critic": {"init": "reward"},
        "rollout": {
            "prompts_per_update": spec["episodes"],
            "max_new_tokens": spec["new_tokens"],
            "min_new_tokens": spec["new_tokens"],  # every completion has its full length
            "batch_size": spec["batch_size"],
            "sampler": {"name": "hf", "step": spec["step"]},
        },
        "batch": {"epochs": 1, "minibatches": 1, "micro_batch_tokens": spec["micro_batch_tokens"]},
        "compile": spec["compile"],
        "gradient_checkpointing": spec["gradient_checkpointing"],
    }


def ours(spec: dict[str, Any], notes: Notes) -> None:
    """Updates of stages.ppo.PPO, without the evaluations and checkpoints of a run."""
    import stages.ppo
    from rlhf.config.load import check_config
    from rlhf.ppo.config import PPOConfig

    peaks: dict[str, float] = {}
    nothing = contextlib.nullcontext()

    class Clock(stages.ppo.Clock):
        @contextlib.contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            reset_peak()
            warm = bool(notes.result["updates"])
            watch = profiled(Path(spec["profile"]) / f"profile-{phase}.txt") if spec["profile"] and warm else nothing
            with super().__call__(phase), watch:
                yield
            peaks[phase] = peak_gb()

    stages.ppo.Clock = Clock  # type: ignore[misc]
    reset_peak()
    stage = stages.ppo.PPO(check_config(PPOConfig, our_config(spec), "benchmark"), resume=False, overwrite=True)
    notes.loaded()
    decoding = Decoding()
    while notes.time_for_another():
        decoding.clear()
        figures = stage.update(len(notes.result["updates"]))
        if figures["rollout/response_length"] != spec["new_tokens"]:
            raise SystemExit(f"completions of {figures['rollout/response_length']} tokens, not {spec['new_tokens']}")
        phases = {phase: figures[f"time/{phase}"] for phase in PHASES}
        ratio = [figures["policy/first_ratio_min"], figures["policy/first_ratio_max"]]
        notes.update(phases=phases, peak_gb=dict(peaks), ratio=ratio, kl=figures["objective/kl"], **decoding.figures)


def answers_by_step(spec: dict[str, Any], notes: Notes, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each kind of decoding step that this device has, with a function that decodes one batch of greedy completions."""
    from types import SimpleNamespace

    from rlhf.config.base import ModelConfig
    from rlhf.models.load import load_policy
    from rlhf.rollout.samplers import hf
    from rlhf.rollout.types import SamplingParams

    cuda = torch.cuda.is_available()
    model = load_policy(ModelConfig(path=spec["policy"]), spec["policy"])
    model = model.to("cuda", dtype) if cuda else model
    notes.loaded()
    chat: Any = SimpleNamespace(end_id=2, pad_id=1, tokenizer=SimpleNamespace(eos_token_id=2))
    length, rows = spec["new_tokens"], spec["batch_size"]
    sampling = SamplingParams(length, temperature=0, min_new_tokens=length, batch_size=rows)
    torch.manual_seed(0)
    prompts = torch.randint(4, model.config.vocab_size, (rows, spec["prompt_tokens"])).tolist()
    for step in ("eager", "cuda_graph") if cuda else ("eager",):
        yield step, partial(hf, model, prompts, range(rows), sampling, chat, step=step)


def steps(spec: dict[str, Any], notes: Notes) -> None:
    """One batch of completions with each kind of decoding step, twice: the first time the step is recorded."""
    decoding = Decoding()
    for step, decode in answers_by_step(spec, notes, torch.bfloat16):
        took = []
        for _ in range(2):
            decoding.clear()
            start = now()
            decode()
            took.append(now() - start)
        notes.update(step=step, took=took, **decoding.figures)


def check(spec: dict[str, Any], notes: Notes) -> None:
    """Two PPO updates of the tiny models, and whether every kind of decoding step gives the same greedy tokens."""
    ours(spec, notes)
    found = {step: [one.ids for one in decode()] for step, decode in answers_by_step(spec, notes, torch.float32)}
    notes.update(same_tokens={step: ids == found["eager"] for step, ids in found.items()})


# ---- TRL -----------------------------------------------------------------------------------------------------------


class Phases:
    """Detects the phases of TRL's updates from its calls of `generate` and its first training pass."""

    def __init__(self, policy: Any, notes: Notes, autocast: Any) -> None:
        self.notes, self.autocast = notes, autocast
        self.generate, policy.generate = policy.generate, self.answer
        self.marks: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def answer(self, *inputs: Any, **options: Any) -> Any:
        """Called for each batch of a rollout."""
        if not self.marks:
            reset_peak()
        self.marks.setdefault("start", now())
        with self.autocast():
            output = self.generate(*inputs, **options)
        self.marks["rollout"], self.peaks["rollout"] = now(), peak_gb()
        return output

    def pass_begins(self, *_: Any) -> None:
        if "score" not in self.marks:
            self.marks["score"], self.peaks["score"] = now(), peak_gb()
            reset_peak()

    def update_ends(self) -> None:
        ends = [self.marks["start"], self.marks["rollout"], self.marks["score"], now()]
        self.peaks["learn"] = peak_gb()
        phases = {phase: after - before for phase, before, after in zip(PHASES, ends, ends[1:])}
        self.notes.update(phases=phases, peak_gb=dict(self.peaks))
        self.marks.clear()


def trl(spec: dict[str, Any], notes: Notes) -> None:
    """Updates of TRL's PPOTrainer. Trained models have float32 weights under bf16 autocast, in generation too, where
    TRL would use float32 by default; reference and reward model are bf16, as on our side."""
    if torch.cuda.is_available():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its Accelerator ignores `bf16=True`
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    cuda = torch.cuda.is_available()
    low = torch.bfloat16 if cuda else torch.float32

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            phases.update_ends()
            if not notes.time_for_another():
                sys.exit(0)  # PPOTrainer ignores `should_training_stop`

    tokenizer = AutoTokenizer.from_pretrained(spec["policy"])
    lines = Path(spec["prompts"]).read_text("utf-8").splitlines()
    rows = [
        {"input_ids": [tokenizer.bos_token_id, *tokenizer(json.loads(line)["prompt"])["input_ids"]]} for line in lines
    ]
    assert {len(row["input_ids"]) for row in rows} == {spec["prompt_tokens"]}
    reset_peak()
    policy = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32)
    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if cuda else contextlib.nullcontext
    phases = Phases(policy, notes, autocast)
    step = min(spec["episodes"], max(1, spec["micro_batch_tokens"] // (spec["prompt_tokens"] + spec["new_tokens"])))
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=spec["run"],
            bf16=cuda,
            use_cpu=not cuda,
            learning_rate=1e-6,
            per_device_train_batch_size=step,
            gradient_accumulation_steps=spec["episodes"] // step,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=spec["episodes"] * 1000,
            response_length=spec["new_tokens"],  # no stop token: every completion has its full length
            temperature=1.0,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=low),
        reward_model=AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1, dtype=low),
        value_model=AutoModelForSequenceClassification.from_pretrained(
            spec["reward"], num_labels=1, dtype=torch.float32
        ),
        train_dataset=Dataset.from_list(rows),
        callbacks=[Marks()],
    )
    trainer.model.register_forward_pre_hook(phases.pass_begins)
    notes.loaded()
    trainer.train()


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    {"check": check, "ours": ours, "steps": steps, "trl": trl}[sys.argv[1]](given, Notes(given, Path(sys.argv[3])))
