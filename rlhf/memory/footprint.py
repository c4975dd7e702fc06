"""What the passes of a config hold beside weights and optimizer: the real modules run on imagined tensors.

A deep model is imagined twice with few of its layers, since they are alike, and the line is drawn on from there.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from rlhf.config.base import StageConfig
from rlhf.core.table import Pick
from rlhf.memory.tracer import CACHE, GRADIENTS, MemorySnapshot, Meter, fake_tensors, materialise
from rlhf.memory.workload import BatchShape, Role, architecture, roles
from rlhf.models.load import recompute_activations
from rlhf.models.logprobs import causal_lm, head_chunks
from rlhf.models.scalar import ScalarModel
from rlhf.models.tuning import TUNING
from rlhf.ppo.actor_critic import ActorCritic
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.types import MicroBatch
from rlhf.reward.config import RewardConfig
from rlhf.rollout import kv_cache
from rlhf.rollout.decoding import choose
from rlhf.rollout.types import SamplingParams
from rlhf.sft.config import SFTConfig
from rlhf.training.engine import cast_frozen_linears_

Moments = dict[str, MemorySnapshot]


# ---- imagined models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Numbers of parameters."""

    total: int
    trained: int
    held: int
    """Bytes of all of them, undivided, between the passes."""


class TracedModel:
    """What the passes of a config hold beside weights and optimizer, in bytes by part. Everything is computed once.

    Args:
        config: A stage's config.
        work: Its largest batches.
        halves: The computation is in bfloat16.
        divided: DeepSpeed runs it, which casts the trained weights too; plain torch keeps them in float32.
        base: Stands in for runs that are still to come.
    """

    def __init__(
        self, config: StageConfig, work: BatchShape, halves: bool, divided: bool, base: str | None = None
    ) -> None:
        self.config, self.work, self.base = config, work, base
        self.compute = torch.bfloat16 if halves else torch.float32
        self.weights = self.compute if divided else torch.float32
        self.autocast, self.divided = halves and not divided, divided
        self.roles = roles(config)
        self.shared = any(role.shares for role in self.roles)
        self._found = {role.path: architecture(config.model, role.path, base) for role in self.roles}
        self.checkpointing = config.gradient_checkpointing

    def toward(self, other: TracedModel, work: BatchShape) -> TracedModel:
        """The passes for some other work, on the line to passes with more sequences in each batch."""

        def steps(name: str) -> float:
            mine, theirs, wanted = (getattr(w, name) for w in (self.work, other.work, work))
            return (wanted - mine) / max(1, theirs - mine)

        made, rows = copy.copy(self), steps("rows")
        made.work = work
        found: dict[str, Any] = {"sizes": self.sizes, "scoring": self.scoring.along(other.scoring, rows)}
        found["update"] = {name: self.update[name].along(other.update[name], rows) for name in self.update}
        if work.sequences:
            beside = steps("sequences")
            found["rollout"] = {name: self.rollout[name].along(other.rollout[name], beside) for name in self.rollout}
        made.__dict__ |= found
        return made

    def layers(self, role: Role) -> int:
        """How many the model has."""
        return int(self._found[role.path].get_text_config().num_hidden_layers)

    @cached_property
    def vocab_size(self) -> int:
        return int(self._found[self.roles[0].path].get_text_config().vocab_size)

    @cached_property
    def sizes(self) -> list[Size]:
        """Of each role."""
        found = []
        for role in self.roles:
            weights = list(self._shaped(role, None).parameters())
            trained = [p.numel() for p in weights if p.requires_grad]
            held = sum(p.numel() * p.itemsize for p in weights)
            found.append(Size(sum(p.numel() for p in weights), sum(trained), held))
            if role.shares:  # a frozen adapter counts as large as the policy's
                own = sum(trained) or found[0].trained
                found[-1] = Size(own, sum(trained), 4 * own)
        return found

    def _shaped(self, role: Role, depth: int | None) -> Any:
        """The role's model on the meta device, with `depth` of its layers."""
        found = copy.deepcopy(self._found[role.path])
        if depth is not None:
            text = found.get_text_config()
            text.num_hidden_layers = depth
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:depth]
        found.use_cache, found.num_labels = False, 1
        kind = transformers.AutoModelForSequenceClassification if role.scalar else transformers.AutoModelForCausalLM
        wanted = self.config.model.attn_implementation
        # What holds no matrix of weights between all tokens counts as sdpa does, whether it is installed here or not.
        options = {"attn_implementation": wanted if wanted in (None, "eager") else "sdpa"}
        with torch.device("meta"):
            model = kind.from_config(found, dtype=torch.float32, **options)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            if role.tuning is None:
                model.requires_grad_(False)
            else:
                model = _plannable(role.tuning)(model, None, "scalar" if role.scalar else "causal")
        if role.tuning is not None and self.checkpointing:
            recompute_activations(model, use_reentrant=False)
        model = ScalarModel(model) if role.scalar else model
        if role.tuning is None and not self.divided:
            cast_frozen_linears_(model, self.compute)
            return model
        if self.shared and not self.divided:  # the base is loaded so, adapters are in float32
            for weight in model.parameters():
                weight.data = weight.data if weight.requires_grad else weight.data.to(self.compute)
            return model
        return model.to(self.compute if role.tuning is None else self.weights)

    def _deep(self, trace: Callable[[int | None], Moments], deep: list[Role]) -> Moments:
        """`trace` of the whole depth, or drawn on from two small depths where layers are alike."""
        counts = {self.layers(role) for role in deep}
        types = [getattr(self._found[role.path].get_text_config(), "layer_types", None) for role in deep]
        period = max(_period(t) for t in types)
        tuned = [role.tuning for role in deep if role.tuning is not None]
        if len(counts) > 1 or any(pick.name == "modules" for pick in tuned):
            return trace(None)
        layers = counts.pop()
        first = max([2, *(int(_layers_option(pick)) + 1 for pick in tuned)])
        first = math.ceil(first / period) * period
        second = first + max(2, period)
        if layers <= second + 2:
            return trace(None)
        near, far = trace(first), trace(second)
        return {name: near[name].along(far[name], (layers - first) / (second - first)) for name in near}

    # ---- passes

    @contextmanager
    def _metered(self, *models: nn.Module, wanted: int | None = None) -> Iterator[Meter]:
        """Inside, models of the meta device have imagined weights, and what is done with them is counted."""
        autocast = torch.autocast("cpu", dtype=self.compute) if self.autocast else nullcontext()
        with fake_tensors():
            for model in models:
                materialise(model)
            with Meter(models, self.work.wanted if wanted is None else wanted, self.vocab_size) as meter, autocast:
                yield meter

    def _batch(self) -> MicroBatch:
        rows, width = self.work.rows, self.work.width
        ids = torch.zeros(rows, width, dtype=torch.int64)
        flags = torch.zeros(rows, width, dtype=torch.bool)
        lengths = torch.zeros(rows, dtype=torch.int64)
        chunks = head_chunks(self.work.wanted, self.vocab_size)
        return MicroBatch([], ids, torch.ones_like(ids), None, flags, lengths, chunks)

    @cached_property
    def update(self) -> Moments:
        """The pass of a micro-batch, with the gradients that are there: its highest moments, a line drawn through each.

        Which of them is the highest of all depends on the depth, so each part of the pass has its own: `forward`, the
        `critic`'s after the policy's, `backward`, and the `policy`'s after the critic's; gradients do not decide. Plain
        torch has more: `late`, when most of the gradients have come, and all parts of a second micro-batch (`more
        forward`, ...), which adds to the gradients of the first.
        """
        tuned = [role for role in self.roles if role.tuning is not None]

        def trace(depth: int | None) -> Moments:
            models = [self._shaped(role, depth) for role in tuned]
            embeddings = causal_lm(models[1].model).get_input_embeddings() if models[1:] else None
            head = causal_lm(models[0]).get_output_embeddings() if models[1:] else None
            with self._metered(*models) as meter:
                loss = self._loss(models)
                parameters = [p for model in models for p in model.parameters() if p.requires_grad]
                for name in ("",) if self.divided else ("", "more "):
                    meter.mark(f"{name}forward")
                    with _marking(meter, f"{name}critic", embeddings):
                        value = loss()
                    meter.mark(f"{name}backward")
                    # The critic's comes first; then the policy's head computes its logits again.
                    with _marking(meter, f"{name}policy", head):
                        value.backward()
                    meter.call(GRADIENTS, [p.grad for p in parameters])
                    meter.mark(f"{name}end")
            parts = itertools.pairwise(meter.marks)
            found = {a: meter.highest(a, b, None if a.startswith("more") else GRADIENTS) for a, b in parts}
            if not self.divided:
                turn, end = meter.marks["backward"], meter.marks["end"]
                meter.marks["late"] = turn + 3 * (end - turn) // 4
                found["late"] = meter.highest("late", "end")
            return found

        return self._deep(trace, tuned)

    def _loss(self, models: list[Any]) -> Callable[[], Tensor]:
        """The stage's loss of one micro-batch, but for what is done with a number a token."""
        if isinstance(self.config, PPOConfig):
            both = ActorCritic(models[0], models[1] if len(models) > 1 else None)

            def ppo() -> Tensor:
                out = both(self._batch(), self.config.rollout.temperature)  # type: ignore[attr-defined]
                total = out.logprobs.sum()
                if self.config.loss.entropy_coef:  # type: ignore[attr-defined]
                    total = total + out.entropies.sum()
                return total if out.values is None else total + out.values.sum()

            return ppo
        batch = self._batch()
        if isinstance(self.config, RewardConfig):
            return lambda: models[0](batch.input_ids, batch.attention_mask).sum()
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(causal_lm(models[0]), outputs=("log_probs", "entropy", "is_top1"))
        options = {"labels": batch.input_ids, "use_cache": False, "fused_lm_head": True}
        return lambda: (
            -models[0](input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options).log_probs.sum()
        )

    @cached_property
    def scoring(self) -> MemorySnapshot:
        """The largest of the passes without gradients."""

        def trace_of(role: Role) -> Callable[[int | None], Moments]:
            def trace(depth: int | None) -> Moments:
                model = self._shaped(role, depth)
                with self._metered(model) as meter, torch.no_grad():
                    batch = self._batch()
                    if isinstance(self.config, SFTConfig):
                        self._loss([model])()
                    elif not role.scalar:
                        ActorCritic(model, None)(batch, 1.0)
                    elif role.name == "critic":
                        model.token_values(batch.input_ids, batch.attention_mask)
                    else:
                        model(batch.input_ids, batch.attention_mask)
                return {"pass": meter.highest()}

            return trace

        unlike = {
            (role.path, role.scalar, role.tuning is None): role for role in self.roles if role.name != "reference"
        }
        found = [self._deep(trace_of(role), [role])["pass"] for role in unlike.values()]
        return max(found, key=lambda moment: moment.total)

    @cached_property
    def rollout(self) -> Moments:
        """Prefill, `join` of the prompts to the cache, `decode` until it is longest, and `wait`: prompts that enter."""
        work = self.work
        assert isinstance(self.config, PPOConfig)
        new, how = self.config.rollout.max_new_tokens, self.config.rollout
        sampling = SamplingParams(new, how.min_new_tokens, how.temperature, how.top_k, how.top_p)

        def trace(depth: int | None) -> Moments:
            policy = self._shaped(self.roles[0], depth).eval()
            with self._metered(policy, wanted=work.sequences) as meter, torch.no_grad():
                prompts = _prefill(policy, work.sequences, work.prompt)
                _call_cache(meter, prompts)
                meter.mark("join")
                cache = kv_cache.JoinedCache(prompts, work.sequences)
                _enter(cache, prompts, work)
                del prompts
                meter.mark("decode")
                for _ in range(math.ceil((new - 1) / kv_cache.SPARE)):
                    _call_cache(meter, cache)
                    cache.columns.end = min(cache.mask.shape[1], work.prompt + new - 1)
                    cache.before_step(cache.columns.end)
                _call_cache(meter, cache)
                step, ones = torch.zeros(work.sequences, 1, dtype=torch.int64), cache.before_step(work.width - 1)
                logits = policy(
                    input_ids=step, attention_mask=ones, position_ids=step, past_key_values=cache.cache,
                    use_cache=True, logits_to_keep=1,
                ).logits[:, -1].float()  # fmt: skip
                choose(logits, torch.zeros(work.sequences), sampling)
                del logits
                meter.mark("wait")
                if work.joins:
                    coming = _prefill(policy, work.sequences, work.prompt)
                    _call_cache(meter, coming)
                    _enter(cache, coming, work)
                meter.mark("end")
            marks = (None, "join", "decode", "wait", "end")
            return {start or "prefill": meter.highest(start, end) for start, end in itertools.pairwise(marks)}

        return self._deep(trace, [self.roles[0]])


@contextmanager
def _marking(meter: Meter, name: str, module: Any) -> Iterator[None]:
    """Inside, the moment at which the module is first called gets a name; none where there is no module."""
    if module is None:
        yield
        return
    hook = module.register_forward_pre_hook(lambda *_: None if name in meter.marks else meter.mark(name))
    try:
        yield
    finally:
        hook.remove()


def _prefill(policy: Any, rows: int, width: int) -> Any:
    cache = transformers.DynamicCache()
    ids = torch.zeros(rows, width, dtype=torch.int64)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    policy(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids, **options)
    return cache


def _enter(cache: kv_cache.JoinedCache, prompts: Any, work: BatchShape) -> None:
    places = torch.zeros(work.sequences, dtype=torch.int64)
    cache.columns.end = max(cache.columns.end, work.prompt)
    for mine, new in zip(cache.layers, prompts.layers):
        mine.keys[places, :, : work.prompt] = new.keys[places]
        mine.values[places, :, : work.prompt] = new.values[places]


def _call_cache(meter: Meter, cache: Any) -> None:
    meter.call(CACHE, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])


def _plannable(pick: Pick) -> Pick:
    """A tuning method that needs neither tokenizer nor GPU and has the same shapes."""
    if pick.name == "prompt-tuning":
        return TUNING.pick({"name": pick.name, "tokens": pick.options["tokens"]})
    if pick.name == "qlora":
        return TUNING.pick({"name": "lora", **pick.options})
    return pick


def _layers_option(pick: Pick) -> int:
    """In how many of the last layers something is trained; 0 where in all of them."""
    return int(pick.options.get("layers") or 0)


def _period(types: list[str] | None) -> int:
    """After how many layers their kinds repeat."""
    if not types:
        return 1
    return next(p for p in range(1, len(types) + 1) if all(types[i] == types[i % p] for i in range(len(types))))
