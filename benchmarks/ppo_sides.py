"""The two sides of `benchmarks/ppo.py`, each run as a separate process: `python ppo_sides.py ours|trl SPEC.json`.

Several processes of a side divide its work as under their launchers (RANK and WORLD_SIZE are set). Both sides get the
same weights, prompts, reward and settings. If completion lengths are imposed, they depend only on (regime, update). The
end token is forbidden before that length and forced at it: on our side through the uniform noise that our sampler
inverts, on TRL's through a logits processor, so neither side's loop changes.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import transformers

LIBRARIES = (
    "bitsandbytes", "datasets", "deepspeed", "peft", "pandas", "story_rewards",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
SCHEDULE = {"update": 0}
"""Which update's lengths the next rollout takes."""


def answer_lengths(regime: str, update: int, count: int, longest: int) -> list[int]:
    """Tokens of each completion, including the end token; `longest` means cut off without one.

    `realistic` is log-normal, mean about 0.4 x longest; `long-tailed` is Pareto with exponent 1 from longest / 16 on.
    """
    generator = torch.Generator().manual_seed(1000 + update)
    if regime == "full":
        return [longest] * count
    if regime == "realistic":
        drawn = 0.345 * longest * torch.exp(0.6 * torch.randn(count, generator=generator))
    else:
        drawn = longest / 16 / (1 - torch.rand(count, generator=generator))
    return drawn.round().clamp(2, longest).long().tolist()


def resident(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, MB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024  # type: ignore[union-attr]


def mine(lengths: list[int]) -> list[int]:
    """This process's part of an update's completion lengths."""
    count, rank = len(lengths) // int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    return lengths[rank * count : (rank + 1) * count]


class Stopwatch:
    """Seconds from the end of one update to the end of the next; the first update is the warm-up."""

    def __init__(self) -> None:
        for library in LIBRARIES:  # both sides import these libraries; memory is counted above them
            importlib.import_module(library)
        self.ends: list[float] = []
        self.processor: list[float] = []
        self.children: list[float] = []
        self.base = resident("VmRSS")

    def mark(self) -> None:
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())
        times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        self.children.append(sum(time.user + time.system for time in times))

    def result(self, **figures: Any) -> dict[str, Any]:
        """The measurements, with seconds of every update except the first, and the peak above the imports in MB."""
        times = {"seconds": self.ends, "processor": self.processor, "children": self.children}
        passed = {name: [b - a for a, b in zip(at, at[1:])] for name, at in times.items()}
        return {**passed, "base_mb": self.base, "peak_mb": resident("VmHWM") - self.base, **figures}


# ---- ours ----------------------------------------------------------------------------------------------------------


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Run stages.ppo on the spec."""
    import stages.ppo
    from rlhf import distributed
    from rlhf.config.load import check_config
    from rlhf.ppo.config import PPOConfig

    if spec["regime"] != "natural":
        impose_on_ours(spec)
    watch = Stopwatch()
    distributed.start(timeout_seconds=600)
    stage = stages.ppo.PPO(check_config(PPOConfig, our_config(spec), "benchmark"), resume=False, overwrite=True)
    log = stage.reporter.update

    def logged(done: int, figures: dict[str, float]) -> None:
        log(done, figures)
        SCHEDULE["update"] = done
        watch.mark()

    stage.reporter.update = logged  # type: ignore[method-assign]
    stage.train()
    distributed.stop()
    lines = [json.loads(line) for line in (Path(spec["run"]) / "metrics.jsonl").read_text("utf-8").splitlines()]
    updates = [line for line in lines if "objective/kl_coef" in line]
    return watch.result(
        phases={phase: [u[f"time/{phase}"] for u in updates][1:] for phase in ("rollout", "score", "learn")},
        tokens=[u["rollout/response_length"] * spec["episodes"] for u in updates][1:],
        scores=[u["objective/scores"] for u in updates],
        kl=[u["objective/kl"] for u in updates],
    )


def our_config(spec: dict[str, Any]) -> dict[str, Any]:
    """A user's config; where it differs from our defaults it reproduces TRL's update rule."""
    from rlhf.config.load import override_values

    tuning = spec["tuning"] or "full"
    values = {
        "run": spec["run"],
        "seed": spec["seed"],
        "model": {
            "path": spec["model"],
            "chat_template": "plain",
            "sharing": "shared" if spec["tuning"] else "separate",
        },
        "tuning": tuning,
        "data": {"prompts": spec["prompts"], "max_prompt_tokens": 64},
        "reward": {"name": "function", "function": "story_rewards:animal_share"},
        "critic": {"init": "policy", "tuning": tuning},
        "updates": spec["updates"],
        "rollout": {
            "prompts_per_update": spec["episodes"],
            "max_new_tokens": spec["new_tokens"],
            "temperature": 0.7,
            "merge_adapters": spec["tuning"] is not None,
            "sampler": "hf" if spec["regime"] == "natural" else "imposed",
        },
        "kl": {"controller": {"name": "fixed", "coef": 0.05}},
        "loss": {"value_coef": 0.1},
        "compile": spec["compile"],
        "batch": {
            "epochs": spec["epochs"],
            "minibatches": spec["minibatches"],
            "micro_batch_tokens": spec["micro_batch_tokens"],
        },
        "optimizer": {
            "policy_lr": spec["lr"],
            "critic_lr": spec["lr"],
            "schedule": "linear",
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "max_grad_norm": 1e9,  # TRL's PPO clips no gradient
        },
        "eval": {"every": spec["updates"], "prompts": 0},
        "checkpoints": {"every": spec["updates"]},
    }
    override_values(values, spec["overrides"])
    return values


def impose_on_ours(spec: dict[str, Any]) -> None:
    """Add a sampler `imposed`: `hf` without end tokens, where a special value in a completion's noise ends it."""
    from rlhf.rollout import slots
    from rlhf.rollout.samplers import SAMPLERS, hf

    lengths: dict[int, int] = {}
    noise, choose, ends = slots.uniform_noise, slots.choose, list(spec["ends"])

    @SAMPLERS.row("imposed")
    def sampler(model: Any, prompts: Any, seeds: Any, sampling: Any, chat: Any) -> Any:
        drawn = answer_lengths(spec["regime"], SCHEDULE["update"], spec["episodes"], sampling.max_new_tokens)
        lengths.update(zip(seeds, mine(drawn), strict=True))
        return hf(model, prompts, seeds, sampling, chat)

    def noise_with_end(seed: int, count: int) -> torch.Tensor:
        found = noise(seed, count)
        if lengths[seed] < count:
            found[lengths[seed] - 1] = 2.0
        return found

    def choose_or_end(logits: torch.Tensor, uniform: torch.Tensor, sampling: Any) -> torch.Tensor:
        logits[:, ends] = float("-inf")
        return torch.where(uniform > 1, ends[0], choose(logits, uniform.clamp(max=1 - 1e-6), sampling))

    slots.uniform_noise, slots.choose = noise_with_end, choose_or_end


# ---- TRL -----------------------------------------------------------------------------------------------------------


class ProgrammaticReward(torch.nn.Module):
    """The reward function as a sequence classifier, which TRL's `get_reward` calls."""

    base_model_prefix = "body"

    def __init__(self, decode: Any) -> None:
        super().__init__()
        self.decode, self.context = decode, 0

    def body(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Scores of int64 [B, T] at every position, as hidden states [B, T, 1]."""
        from story_rewards import animal_share

        answers = zip(input_ids[:, self.context :], attention_mask[:, self.context :].bool())
        scores = [animal_share([], self.decode(ids[mask].tolist())) for ids, mask in answers]
        return SimpleNamespace(hidden_states=[torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class ImposedEnd(transformers.LogitsProcessor):
    """Forbids the end tokens, and forces the first of them at each completion's length."""

    def __init__(self, spec: dict[str, Any], context: int) -> None:
        lengths = mine(answer_lengths(spec["regime"], SCHEDULE["update"], spec["episodes"], spec["new_tokens"]))
        self.lengths, self.context, self.ends = torch.tensor(lengths), context, list(spec["ends"])
        self.longest = spec["new_tokens"]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1] - self.context + 1
        scores[:, self.ends] = float("-inf")
        if length < self.longest:
            due = self.lengths == length
            scores[due] = float("-inf")
            scores[due, self.ends[0]] = 0.0
        return scores


class Watched:
    """Detects the phases of TRL's updates from its calls of `generate` and its first training pass."""

    def __init__(self, spec: dict[str, Any], policy: Any, reward: ProgrammaticReward, watch: Stopwatch) -> None:
        self.spec, self.reward, self.watch = spec, reward, watch
        self.phases: dict[str, list[float]] = {"rollout": [], "score": [], "learn": []}
        self.tokens: list[int] = []
        self.generate, policy.generate = policy.generate, self.answer
        self.rolled, self.learning = 0.0, 0.0

    def answer(self, input_ids: torch.Tensor, **options: Any) -> Any:
        start, context = time.perf_counter(), input_ids.shape[1]
        if self.spec["regime"] != "natural":
            options["logits_processor"] = [ImposedEnd(self.spec, context)]
        output = self.generate(input_ids=input_ids, **options)
        self.rolled, self.learning, self.reward.context = time.perf_counter(), 0.0, context
        self.phases["rollout"].append(self.rolled - start)
        ended = (output.sequences[:, context:] == self.spec["ends"][0]).int()
        steps = output.sequences.shape[1] - context
        self.tokens.append(int(torch.where(ended.any(1), ended.argmax(1) + 1, steps).sum()))
        return output

    def pass_begins(self, *_: Any) -> None:
        if not self.learning:
            self.learning = time.perf_counter()
            self.phases["score"].append(self.learning - self.rolled)

    def update_ends(self, step: int) -> None:
        self.watch.mark()
        self.phases["learn"].append(self.watch.ends[-1] - self.learning)
        SCHEDULE["update"] = step


def trl(spec: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's PPOTrainer on the spec."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from rlhf.config.base import ModelConfig
    from rlhf.data.chat_tokenizer import load_tokenizer
    from rlhf.data.schema import Message

    torch.manual_seed(spec["seed"])
    watch = Stopwatch()
    chat = load_tokenizer(ModelConfig(path=spec["model"], chat_template="plain"), spec["model"])
    openings = [json.loads(line)["prompt"] for line in Path(spec["prompts"]).read_text("utf-8").splitlines()]
    rows = [{"input_ids": chat.prompt([Message("user", opening)])} for opening in openings]
    policy = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, dtype=torch.float32)
    reward = ProgrammaticReward(chat.decode)
    watched = Watched(spec, policy, reward, watch)
    history: list[dict[str, float]] = []

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watched.update_ends(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            history.append(dict(logs))

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=spec["run"],
            seed=spec["seed"],
            bf16=spec.get("bfloat16", False),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=spec["trl_checkpointing"],
            learning_rate=spec["lr"],
            per_device_train_batch_size=len(
                mine([0] * spec["episodes"])
            ),  # with one step of accumulation, so that each minibatch steps
            gradient_accumulation_steps=1,
            num_mini_batches=spec["minibatches"],
            num_ppo_epochs=spec["epochs"],
            total_episodes=spec["episodes"] * spec["updates"],
            response_length=spec["new_tokens"],
            stop_token_id=spec["ends"][0],
            temperature=0.7,
            kl_coef=0.05,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=chat.tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Marks()],
    )
    trainer.model.register_forward_pre_hook(watched.pass_begins)
    trainer.train()
    logged = [line for line in history if "objective/scores" in line]
    return watch.result(
        phases={name: seconds[1:] for name, seconds in watched.phases.items()},
        tokens=watched.tokens[1:],
        scores=[line["objective/scores"] for line in logged],
        kl=[line["objective/kl"] for line in logged],
    )


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    sys.path.append(given["tests"])  # for the reward function
    found = {"ours": ours, "trl": trl}[sys.argv[1]](given)
    Path(sys.argv[3]).with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(found), "utf-8")
