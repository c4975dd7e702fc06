"""One frozen base for four roles: policy, critic, reward model and reference are adapters on it, in one engine.

    role        adapter             head
    policy      trained             the base's own
    critic      trained             values, trained
    reward      frozen              scores, frozen
    reference   none, or SFT's      the base's own

Each adapter layer has a property that names its active adapter; `SharedBase.acting` sets it and leaves requires_grad
unchanged, because an engine depends on it (PEFT's `set_adapter` changes it). A layer without an adapter of that name
passes its input through the base only. Outside of `acting` the policy's adapter is active, so sampler, merging and
saving need no knowledge of the other roles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.console import is_main, say
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.models.classifiers import new_classifier
from rlhf.models.forward import hidden_states, token_values
from rlhf.models.load import (
    compute_dtype,
    count_parameters,
    load_hf_config,
    load_policy,
    recompute_activations,
    refuse_encoder_decoder,
)
from rlhf.models.scalar import ScalarModel
from rlhf.models.vocabulary import mask_unknown_ids, token_count
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.frozen_layers import FrozenLayers
from rlhf.ppo.models import Models, policy_logprobs
from rlhf.ppo.shared_roles import RoleAdapter, SharedRoles, recognise
from rlhf.ppo.types import MicroBatch, TokenOutputs
from rlhf.reward.sources import RewardInputs
from rlhf.runs.parents import resolve_model_path
from rlhf.training.engine import Engine, make_engine
from rlhf.tuning import merging
from rlhf.tuning.methods import HEADS, TASKS, adapter_config
from rlhf.tuning.origin import adapter_folder
from rlhf.tuning.save import origin_of

POLICY = "default"
"""PEFT's name for the policy's adapter, which is saved and merged; other adapters have the name of their role."""
HEADED = ("critic", "reward")
HEAD_KEY = "base_model.model.score.weight"
"""What PEFT calls the head of a reward model in a saved adapter."""


class SharedBase(nn.Module):
    """The base with all adapters and heads; replaces `rlhf.ppo.models.ActorCritic` and frozen models.

    Args:
        policy: PEFT's wrapper around the base, with the adapters of all roles.
        scalars: The scalar models of `critic` and `reward`, if present; they use the base's body.
    """

    def __init__(self, policy: Any, scalars: dict[str, ScalarModel]) -> None:
        super().__init__()
        self.policy = policy
        self.heads = nn.ModuleDict({role: scalar.model.score for role, scalar in scalars.items()})
        self.scalars = scalars  # in a plain dictionary: their bodies are registered as the policy's already
        self.frozen_layers = FrozenLayers(policy)
        self.layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def critic(self) -> ScalarModel | None:
        return self.scalars.get("critic")

    def forward(
        self, batch: MicroBatch, temperature: float = 1.0, ptx: MicroBatch | None = None, role: str = "policy"
    ) -> Any:
        """The outputs of a role for a micro-batch.

        Args:
            batch: Sequences; role `reward` reads only the tokens and their mask. With `frozen_states` every role but
                `frozen_layers` starts from them.
            temperature: Logits are divided by it.
            ptx: Demonstrations, for the policy.
            role: `policy` (with the critic's values), `critic`, `reference`, `reward`, or `frozen_layers`.

        Returns:
            `TokenOutputs`; for `critic` the values, float32 [n]; for `reward` the scores, float32 [B]; for
            `frozen_layers` the hidden states that enter the first layer with adapters, [B, L, H].
        """
        if role == "frozen_layers":
            ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
            return self.frozen_layers.states(lambda: hidden_states(self.policy, ids, mask, positions))
        inputs = (batch.input_ids, batch.attention_mask, batch.response_mask, batch.position_ids)
        start = self.frozen_layers.starting_from
        with start(batch.frozen_states), self.acting(role):
            if role == "reward":
                return self.scalars["reward"](batch.input_ids, batch.attention_mask)
            if role == "critic":
                return token_values(self.critic, *inputs)
            logprobs, entropies = policy_logprobs(self.policy, batch, temperature)
        values = None
        if role == "policy" and self.critic is not None:
            with start(batch.frozen_states), self.acting("critic"):
                values = token_values(self.critic, *inputs)
        ptx_logprobs = None if ptx is None else policy_logprobs(self.policy, ptx, temperature=1.0)[0]
        return TokenOutputs(logprobs, entropies, values, ptx_logprobs)

    @contextmanager
    def acting(self, role: str) -> Iterator[None]:
        """Within this context the adapters of `role` are active."""
        before = [layer._active_adapter for layer in self.layers]
        for layer in self.layers:
            layer._active_adapter = _name(role)
        try:
            yield
        finally:
            for layer, name in zip(self.layers, before):
                layer._active_adapter = name

    def recompute(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For gradient checkpointing: contexts of a forward pass and of its recomputation in the backward pass, when
        another role may be active."""
        name = self.layers[0].active_adapters[0]
        return nullcontext(), self.acting("policy" if name == POLICY else name)

    def adapter(self, role: str) -> list[nn.Parameter]:
        """The weights of a role's adapter."""
        name = _name(role)
        parts: list[Any] = [getattr(layer, kind) for layer in self.layers for kind in layer.adapter_layer_names]
        mine = [part[name] for part in parts if name in part]
        return [p for part in mine for p in (part.parameters() if isinstance(part, nn.Module) else [part])]


# ---- building ------------------------------------------------------------------------------------------------------


class SharedModels(Models):
    """`SharedBase` behind the interface of the PPO stage."""

    def __init__(self, engine: Engine, reward_model: str | None) -> None:
        super().__init__(engine)
        self._reward_model = reward_model

    @property
    def scorers(self) -> dict[str, Callable[[RewardInputs], Tensor]]:
        return {} if self._reward_model is None else {self._reward_model: self._scores}

    @torch.no_grad()
    def _scores(self, inputs: RewardInputs) -> Tensor:
        ids, mask = inputs.input_ids, inputs.attention_mask
        batch = MicroBatch([], ids, mask, None, mask.bool(), mask.sum(1), 1, inputs.frozen_states)
        scores: Tensor = self.engine.forward(batch, role="reward")
        return scores.float().cpu()

    def with_frozen_states(self, batch: MicroBatch) -> MicroBatch:
        module: Any = self.engine.module
        if not module.frozen_layers.depth:
            return batch
        return batch._replace(frozen_states=self.engine.forward(batch, role="frozen_layers"))

    def reference(self, batch: MicroBatch, temperature: float) -> TokenOutputs:
        outputs: TokenOutputs = self.engine.forward(batch, temperature, role="reference")
        return outputs

    def save(self, run: Path, chat: ChatTokenizer, config: PPOConfig) -> None:
        super().save(run, chat, config)
        module: Any = self.engine.module
        save_critic(run, module)


def load_shared(config: PPOConfig, chat: ChatTokenizer) -> SharedModels:
    """All models of a run with `model.sharing: shared`, in one engine.

    Raises:
        UserError: They have no base in common; see `rlhf.ppo.shared_roles`.
    """
    roles = recognise(config)
    module, groups = build(config, roles, chat)
    trained, total = count_parameters(module)
    say(f"Models: {roles.describe()}; {trained:,} of {total:,} parameters are trained")
    frozen = module.frozen_layers
    if frozen.depth:
        say(f"The first {frozen.depth} of {len(frozen.layers)} layers are computed once per rollout")
    engine = make_engine(module, groups, config.optimizer, config.precision, config.deepspeed)
    return SharedModels(engine, config.reward_model)


def build(config: PPOConfig, roles: SharedRoles, chat: ChatTokenizer) -> tuple[SharedBase, list[dict[str, Any]]]:
    """The module, and the optimizer's groups of what is trained."""
    tokens = token_count(chat.tokenizer)
    found = load_hf_config(config.model, roles.base)
    refuse_encoder_decoder(found, roles.base, "model.sharing `shared` does")
    base = load_policy(config.model, roles.base, compute_dtype(config.precision), tokens, distributed.grouped())
    mask_unknown_ids(base, tokens)
    shapes = {role: _peft_config(base, adapter) for role, adapter in roles.adapters.items()}
    policy = config.tuning(base, chat, "causal")
    for role, adapter in roles.adapters.items():
        if role != "policy":
            policy.add_adapter(role, shapes[role])
        if adapter.start is not None:
            _start_from(policy, _name(role), adapter.start)
    scalars = {role: _scalar(config.model, base, roles.adapters[role]) for role in HEADED if role in roles.adapters}
    module = SharedBase(policy, scalars)
    module.requires_grad_(False)
    groups = []
    for role, rate in (("policy", config.optimizer.policy_lr), ("critic", config.optimizer.critic_lr)):
        trained = [*module.adapter(role), *(module.heads[role].parameters() if role in module.heads else [])]
        groups.append({"params": [parameter.requires_grad_(True) for parameter in trained], "lr": rate})
    if config.gradient_checkpointing:
        policy.train()  # transformers recomputes only in training mode; dropout is off, so nothing else changes
        recompute_activations(policy, use_reentrant=False, context_fn=module.recompute)
    return module, groups


def _name(role: str) -> str:
    return POLICY if role == "policy" else role


def _peft_config(base: Any, adapter: RoleAdapter) -> Any:
    """PEFT's config of an adapter for the base, which has none yet."""
    found = adapter_config(adapter.tuning, base, "causal")
    found.inference_mode = False
    return found


def _saved(run: str) -> dict[str, Tensor]:
    """The weights of a run's adapter, and of its head if it has one."""
    return load_file(adapter_folder(run) / "adapter_model.safetensors")


def _start_from(policy: Any, name: str, run: str) -> None:
    """Load a run's adapter weights into the adapter `name`.

    Raises:
        UserError: Their shapes differ.
    """
    saved = {key: value for key, value in _saved(run).items() if key != HEAD_KEY}
    expected = get_peft_model_state_dict(policy, adapter_name=name, save_embedding_layers=False)
    if {key: value.shape for key, value in saved.items()} != {key: value.shape for key, value in expected.items()}:
        odd = sorted(set(saved) ^ set(expected))[:2]
        raise UserError(
            f"{run}/adapter: does not fit the base of this run",
            f"Weights that only one of the two has: {', '.join(odd) or 'none, but shapes differ'}.",
            "Set model.sharing=separate.",
        )
    set_peft_model_state_dict(policy, saved, adapter_name=name)


def _scalar(config: ModelConfig, base: Any, adapter: RoleAdapter) -> ScalarModel:
    """A scalar model around the base's own body. Its head is that of the run the adapter starts from, or a new one."""
    head = None if adapter.start is None else _saved(adapter.start).get(HEAD_KEY)
    remote = {"trust_remote_code": config.trust_remote_code}
    if head is None:
        settings = copy.deepcopy(base.config)
        settings.num_labels = 1
    else:
        settings = AutoConfig.from_pretrained(resolve_model_path(str(adapter.start)), **remote)
        settings._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        model = new_classifier(settings, **remote)
    prefix = base.base_model_prefix
    if not hasattr(model, "score") or type(getattr(model, prefix)) is not type(getattr(base, prefix)):
        raise UserError(
            f"model.sharing: {type(model).__name__} is not {type(base).__name__} with another head",
            remedy="Set model.sharing=separate.",
        )
    setattr(model, prefix, getattr(base, prefix))
    model.score.to_empty(device="cpu")
    with torch.no_grad():
        if head is None:
            model.score.weight.normal_(std=0.02)  # as `load_scalar` does for a critic
        else:
            model.score.weight.copy_(head)
    return ScalarModel(model)


# ---- the critic as a result ----------------------------------------------------------------------------------------


def save_critic(path: Path, module: SharedBase) -> None:
    """Write the critic's adapter and value head to `critic/` of a run folder, in PEFT's format for a sequence
    classifier over the base, with that classifier's config. Every rank calls it."""
    if module.critic is None:
        return
    parameters = [*module.adapter("critic"), *module.heads["critic"].parameters()]
    with merging.gathered(parameters):
        if is_main():
            state = get_peft_model_state_dict(module.policy, adapter_name="critic", save_embedding_layers=False)
            state[HEAD_KEY] = module.heads["critic"].weight
            folder = path / "critic"
            folder.mkdir(exist_ok=True)
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors"
            )
            settings = copy.deepcopy(module.policy.peft_config["critic"])
            settings.task_type, settings.modules_to_save = TASKS["scalar"], list(HEADS)
            settings.inference_mode, settings.base_model_name_or_path = True, origin_of(module.policy)
            settings.save_pretrained(str(folder))
            module.critic.config.save_pretrained(folder)
