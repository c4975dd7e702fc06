"""The memory of forward, backward and decoding beyond weights and optimizer state: the real modules on fake tensors.

A deep model is traced at two small depths, and memory is extrapolated linearly in depth.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from rlhf.config.base import StageConfig
from rlhf.core.table import Pick
from rlhf.memory.tracer import CACHE, GRADIENTS, MemorySnapshot, MemoryTracer, fake_tensors, use_fake_weights
from rlhf.memory.workload import BatchShape, Role, architecture, roles
from rlhf.models.classifiers import new_classifier
from rlhf.models.forward import causal_lm
from rlhf.models.load import recompute_activations
from rlhf.models.scalar import ScalarModel
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.models import ActorCritic
from rlhf.ppo.types import MicroBatch
from rlhf.rollout.slots import SPARE, JoinedCache, choose
from rlhf.rollout.types import SamplingParams
from rlhf.training.engine import cast_frozen_linears_
from rlhf.tuning.methods import TUNING, virtual_tokens

Snapshots = dict[str, MemorySnapshot]


# ---- traced models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one model."""

    total: int
    trained: int
    held: int
    """Bytes of all of them on one process, between the passes."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the trained tensors."""
    largest: int
    """Elements of the largest tensor, trained or not."""


class TracedModel:
    """The memory of a config's passes beyond weights and optimizer state, in bytes by part. Results are cached.

    Args:
        config: A stage's config.
        batch: Its largest batches.
        bfloat16: Whether the compute dtype is bfloat16.
        deepspeed: Whether DeepSpeed runs it. It casts trained weights too; plain torch keeps them in float32.
        base: Folder with the config.json of models whose runs do not exist yet.
    """

    def __init__(
        self, config: StageConfig, batch: BatchShape, bfloat16: bool, deepspeed: bool, base: str | None = None
    ) -> None:
        self.config, self.batch, self.base = config, batch, base
        self.compute = torch.bfloat16 if bfloat16 else torch.float32
        self.weights = self.compute if deepspeed else torch.float32
        self.autocast, self.deepspeed = bfloat16 and not deepspeed, deepspeed
        self.roles = roles(config)
        self.shared = any(role.shares for role in self.roles)
        self._architectures = {role.path: architecture(config.model, role.path, base) for role in self.roles}
        self.checkpointing = config.gradient_checkpointing

    def extrapolate_to(self, other: TracedModel, batch: BatchShape) -> TracedModel:
        """The memory for another batch shape, extrapolated from this model and `other`, which has larger batches."""

        def steps(name: str) -> float:
            mine, larger, target = (getattr(shape, name) for shape in (self.batch, other.batch, batch))
            return (target - mine) / max(1, larger - mine)

        made = copy.copy(self)
        made.batch, made.sizes = batch, self.sizes
        made.passes = _extrapolated(self.passes, other.passes, steps("rows"))
        made.update = _extrapolated(self.update, other.update, steps("rows"))
        if batch.sequences:
            made.rollout = _extrapolated(self.rollout, other.rollout, steps("sequences"))
        return made

    def layers(self, role: Role) -> int:
        """The number of layers of a role's model."""
        return int(self._architectures[role.path].get_text_config().num_hidden_layers)

    @cached_property
    def vocab_size(self) -> int:
        return int(self._architectures[self.roles[0].path].get_text_config().vocab_size)

    @cached_property
    def sizes(self) -> list[ParameterCounts]:
        """Parameter counts of each role."""
        found = []
        for role in self.roles:
            weights = list(self._shaped(role, None).parameters())
            trained = [p.numel() for p in weights if p.requires_grad]
            shapes = tuple(tuple(p.shape) for p in weights if p.requires_grad)
            held = sum(p.numel() * p.itemsize for p in weights)
            largest = max(p.numel() for p in weights)
            found.append(ParameterCounts(sum(p.numel() for p in weights), sum(trained), held, shapes, largest))
            if role.shares:  # a frozen adapter counts as large as the policy's
                own = sum(trained) or found[0].trained
                found[-1] = ParameterCounts(own, sum(trained), 4 * own, shapes, max(trained, default=0))
        return found

    def _shaped(self, role: Role, depth: int | None) -> Any:
        """The role's model on the meta device, with `depth` of its layers."""
        found = copy.deepcopy(self._architectures[role.path])
        if depth is not None:
            text = found.get_text_config()
            text.num_hidden_layers = depth
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:depth]
        found.use_cache, found.num_labels = False, 1
        build = new_classifier if role.scalar else transformers.AutoModelForCausalLM.from_config
        attention = self.config.model.attn_implementation
        # Every attention without a tokens x tokens matrix counts like sdpa, whether it is installed here or not.
        options = {"attn_implementation": attention if attention in (None, "eager") else "sdpa"}
        with torch.device("meta"):
            model = build(found, dtype=torch.float32, **options)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            if role.tuning is None:
                model.requires_grad_(False)
            else:
                model = _traceable(role.tuning)(model, None, "scalar" if role.scalar else "causal")
        if role.tuning is not None and self.checkpointing:
            recompute_activations(model, use_reentrant=False)
        model = ScalarModel(model) if role.scalar else model
        if role.tuning is None and not self.deepspeed:
            cast_frozen_linears_(model, self.compute)
            return model
        if self.shared and not self.deepspeed:  # the base is loaded in the compute dtype, adapters are float32
            for weight in model.parameters():
                weight.data = weight.data if weight.requires_grad else weight.data.to(self.compute)
            return model
        return model.to(self.compute if role.tuning is None else self.weights)

    def _by_depth(self, trace: Callable[[int | None], Snapshots], deep: list[Role]) -> Snapshots:
        """`trace` at full depth, or extrapolated from two small depths if all models have the same repeating layers."""
        counts = {self.layers(role) for role in deep}
        types = [getattr(self._architectures[role.path].get_text_config(), "layer_types", None) for role in deep]
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
        return _extrapolated(near, far, (layers - first) / (second - first))

    # ---- passes

    @contextmanager
    def _tracing(self, *models: nn.Module, selected: int | None = None) -> Iterator[MemoryTracer]:
        """Trace the block; the models, on the meta device, get fake weights."""
        autocast = torch.autocast("cpu", dtype=self.compute) if self.autocast else nullcontext()
        with fake_tensors():
            for model in models:
                use_fake_weights(model)
            with (
                MemoryTracer(models, self.batch.selected if selected is None else selected, self.vocab_size) as tracer,
                autocast,
            ):
                yield tracer

    def _micro_batch(self) -> MicroBatch:
        rows, width = self.batch.rows, self.batch.width
        ids = torch.zeros(rows, width, dtype=torch.int64)
        flags = torch.zeros(rows, width, dtype=torch.bool)
        lengths = torch.zeros(rows, dtype=torch.int64)
        return MicroBatch([], ids, torch.ones_like(ids), None, flags, lengths, self.batch.selected)

    @cached_property
    def update(self) -> Snapshots:
        """The peaks of a micro-batch's forward and backward, with its gradients.

        Which part of the pass has the highest peak depends on the depth, so each is extrapolated on its own: `forward`,
        the `critic`'s forward, `backward`, and the `policy`'s backward; gradients do not count when a peak is chosen.
        Plain torch has more parts: `late`, when most gradients exist, and, if there is one, all parts of a second
        micro-batch (`more forward`, ...), which adds to the gradients of the first.
        """
        tuned = [role for role in self.roles if role.tuning is not None]

        def trace(depth: int | None) -> Snapshots:
            models = [self._shaped(role, depth) for role in tuned]
            critic = causal_lm(models[1].model).get_input_embeddings() if models[1:] else None
            with self._tracing(*models) as tracer:
                loss = self._loss(models)
                parameters = [p for model in models for p in model.parameters() if p.requires_grad]
                more = ("more ",) if self.batch.micro_batches > 1 and not self.deepspeed else ()
                for name in ("", *more):
                    tracer.mark(f"{name}forward")
                    if critic is not None:  # called once in a forward pass, but again where activations are recomputed
                        hook = critic.register_forward_pre_hook(lambda *_, name=name: tracer.mark(f"{name}critic"))
                    value, outputs = loss()
                    tracer.mark(f"{name}backward")
                    if critic is not None:  # whose backward comes first
                        hook.remove()
                        outputs.grad_fn.register_prehook(lambda *_, name=name: tracer.mark(f"{name}policy"))
                    value.backward()
                    tracer.label(GRADIENTS, [p.grad for p in parameters])
                    tracer.mark(f"{name}end")
            parts = itertools.pairwise(tracer.marks)
            found = {a: tracer.highest(a, b, None if a.startswith("more") else GRADIENTS) for a, b in parts}
            if not self.deepspeed:
                turn, end = tracer.marks["backward"], tracer.marks["end"]
                tracer.marks["late"] = turn + 3 * (end - turn) // 4
                found["late"] = tracer.highest("late", "end")
            return found

        return self._by_depth(trace, tuned)

    def _loss(self, models: list[Any]) -> Callable[[], tuple[Tensor, Any]]:
        """The stage's loss of one micro-batch, without the arithmetic on one number per token, and what the first model
        gives for it."""
        config, both = self.config, ActorCritic(models[0], models[1] if models[1:] else None)
        batch = self._micro_batch()

        def loss() -> tuple[Tensor, Any]:
            if self.roles[0].scalar:
                scores = models[0](batch.input_ids, batch.attention_mask)
                return scores.sum(), scores
            out = both(batch, config.rollout.temperature if isinstance(config, PPOConfig) else 1.0)
            total = out.logprobs.sum()
            if isinstance(config, PPOConfig) and config.loss.entropy_coef:
                total = total + out.entropies.sum()
            return total if out.values is None else total + out.values.sum(), out.logprobs

        return loss

    @property
    def scoring(self) -> MemorySnapshot:
        """The largest peak of the forward passes without gradients."""
        return max(self.passes.values(), key=lambda snapshot: snapshot.total)

    @cached_property
    def passes(self) -> Snapshots:
        """The peaks of the forward passes without gradients, by role; of several of a name the largest."""

        def trace(role: Role, depth: int | None) -> Snapshots:
            model = self._shaped(role, depth)
            with self._tracing(model) as tracer, torch.no_grad():
                batch = self._micro_batch()
                if not role.scalar:
                    ActorCritic(model, None)(batch, 1.0)
                elif role.name == "critic":
                    model.token_values(batch.input_ids, batch.attention_mask)
                else:
                    model(batch.input_ids, batch.attention_mask)
            return {"pass": tracer.highest()}

        distinct = {
            (role.path, role.scalar, role.tuning is None): role for role in self.roles if role.name != "reference"
        }
        found: Snapshots = {}
        for role in distinct.values():
            peak = self._by_depth(partial(trace, role), [role])["pass"]
            found[role.name] = max(peak, found.get(role.name, peak), key=lambda snapshot: snapshot.total)
        return found

    @cached_property
    def rollout(self) -> Snapshots:
        """Peaks of prefill, `join` (prompts enter the cache), `decode` to full length and `wait` (more enter)."""
        assert isinstance(self.config, PPOConfig)
        before = virtual_tokens(self.config.tuning)  # in the cache, like tokens of the prompt
        batch = replace(self.batch, prompt=self.batch.prompt + before, width=self.batch.width + before)
        rollout = self.config.rollout
        new = rollout.max_new_tokens
        sampling = SamplingParams(new, rollout.min_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p)

        def trace(depth: int | None) -> Snapshots:
            policy: Any = causal_lm(self._shaped(self.roles[0], depth).eval())
            with self._tracing(policy, selected=batch.sequences) as tracer, torch.no_grad():
                prompts = _prefill(policy, batch.sequences, batch.prompt)
                _label_cache(tracer, prompts)
                tracer.mark("join")
                cache = JoinedCache(prompts, batch.sequences)
                _copy_prompts(cache, prompts, batch)
                del prompts
                tracer.mark("decode")
                for _ in range(math.ceil((new - 1) / SPARE)):
                    _label_cache(tracer, cache)
                    cache.columns.end = min(cache.mask.shape[1], batch.prompt + new - 1)
                    cache.before_step(cache.columns.end)
                _label_cache(tracer, cache)
                step, ones = torch.zeros(batch.sequences, 1, dtype=torch.int64), cache.before_step(batch.width - 1)
                logits = policy(
                    input_ids=step, attention_mask=ones, position_ids=step, past_key_values=cache.cache,
                    use_cache=True, logits_to_keep=1,
                ).logits[:, -1].float()  # fmt: skip
                choose(logits, torch.zeros(batch.sequences), sampling)
                del logits
                tracer.mark("wait")
                if batch.joins:
                    waiting = _prefill(policy, batch.sequences, batch.prompt)
                    _label_cache(tracer, waiting)
                    _copy_prompts(cache, waiting, batch)
                tracer.mark("end")
            marks = (None, "join", "decode", "wait", "end")
            return {start or "prefill": tracer.highest(start, end) for start, end in itertools.pairwise(marks)}

        return self._by_depth(trace, [self.roles[0]])


def _extrapolated(near: Snapshots, far: Snapshots, steps: float) -> Snapshots:
    return {name: near[name].extrapolate(far[name], steps) for name in near}


def _prefill(policy: Any, rows: int, width: int) -> Any:
    cache = transformers.DynamicCache()
    ids = torch.zeros(rows, width, dtype=torch.int64)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    policy(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids, **options)
    return cache


def _copy_prompts(cache: JoinedCache, prompts: Any, batch: BatchShape) -> None:
    slots = torch.zeros(batch.sequences, dtype=torch.int64)
    cache.columns.end = max(cache.columns.end, batch.prompt)
    for mine, new in zip(cache.layers, prompts.layers):
        mine.keys[slots, :, : batch.prompt] = new.keys[slots]
        mine.values[slots, :, : batch.prompt] = new.values[slots]


def _label_cache(tracer: MemoryTracer, cache: Any) -> None:
    tracer.label(CACHE, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])


def _traceable(pick: Pick) -> Pick:
    """A tuning method with the same shapes that needs neither tokenizer nor GPU."""
    if pick.name == "prompt-tuning":
        return TUNING.pick({"name": pick.name, "tokens": pick.options["tokens"]})
    if pick.name == "qlora":
        return TUNING.pick({"name": "lora", **pick.options})
    return pick


def _layers_option(pick: Pick) -> int:
    """The number of last layers that are trained; 0 for all layers."""
    return int(pick.options.get("layers") or 0)


def _period(types: list[str] | None) -> int:
    """The number of layers after which their types repeat."""
    if not types:
        return 1
    return next(p for p in range(1, len(types) + 1) if all(types[i] == types[i % p] for i in range(len(types))))
