"""Which roles of PPO can share one base, found from run.json and config files before any weights are loaded.

A LoRA run is its base plus an adapter, so two LoRA runs on the same base need only one copy of its weights. The same
holds for bottleneck adapters, whose runs hold only the adapter. Local weights are identified by their fingerprints, hub
models by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.core.errors import UserError
from rlhf.core.table import Pick
from rlhf.ppo.config import PPOConfig
from rlhf.reward.sources import model_terms
from rlhf.runs.parents import resolve_model_path
from rlhf.runs.run import read_run
from rlhf.tuning.origin import base_of, is_unmerged, tuning_of, weights_of

SEPARATE = "or set model.sharing=separate."


@dataclass(frozen=True)
class RoleAdapter:
    """The adapter that one role adds to the base."""

    tuning: Pick
    """`lora`, `qlora` or `bottleneck` with its options, dropout 0."""
    start: str | None
    """The run whose adapter it starts from; None for a new one, which leaves the outputs unchanged."""


@dataclass(frozen=True)
class SharedRoles:
    """One base, and the adapters of the roles on it."""

    base: str
    """Model folder or hub name."""
    weights: str
    """The base's fingerprint, or `hub:` and its name."""
    adapters: Mapping[str, RoleAdapter]
    """Adapters of `policy`, `critic`, `reward` and `reference`. Without an adapter the reference is the base;
    other roles without one do not exist in this run."""

    def describe(self) -> str:
        """One line for the table that is printed before a run."""
        parts = [f"{role} {'new' if a.start is None else f'from {a.start}'}" for role, a in self.adapters.items()]
        reference = [] if "reference" in self.adapters else ["reference without adapter"]
        return f"one base {self.base} ({_short(self.weights)}): {', '.join(parts + reference)}"


def recognise(config: PPOConfig) -> SharedRoles:
    """The roles of a config with `model.sharing: shared`.

    The base is the model that PPO starts from, if the reward run is an adapter on it. Otherwise the base is the model
    that both the SFT run and the reward run are adapters on: the policy then starts from SFT's adapter, and a frozen
    copy of that adapter is the reference.

    Raises:
        UserError: The models have no base in common, or a parent is not a LoRA run with matching options.
    """
    start, reward = config.model.path, config.reward_model
    base, known, sft = start, weights_of(start), None
    if is_unmerged(start):
        _lora_of(start, "model.path")
        sft, origin = start, base_of(start)
        base, known = origin["path"], origin["weights"]
    mine = known
    if reward is not None:
        tuning = _lora_of(reward, "reward.path")
        if any(term.get("retokenize") for term in model_terms(config.reward) if term["path"] == reward):
            raise UserError(
                "reward.retokenize is not supported with model.sharing `shared`",
                "Both models use the policy's tokenizer.",
                f"Leave retokenize out, {SEPARATE}",
            )
        theirs = base_of(reward)
        if theirs["weights"] != mine:
            sft = _sft_beside(start, mine, reward, theirs)
            base, known = str(theirs["path"]), str(theirs["weights"])
            if weights_of(base) != known:
                raise UserError(
                    f"model.sharing: {base} has changed since {reward} was trained on it (fingerprint mismatch)",
                    f"It is {_short(weights_of(base))} now and was {_short(known)}.",
                    f"Train these runs again, {SEPARATE}",
                )
    adapters = {"policy": RoleAdapter(config.tuning, sft)}
    if config.needs_critic:
        adapters["critic"] = RoleAdapter(config.critic.tuning, reward if config.critic.init == "reward" else sft)
    if reward is not None:
        adapters["reward"] = RoleAdapter(tuning, reward)
    if sft is not None:
        adapters["reference"] = RoleAdapter(config.tuning, sft)
    for role, key in (("policy", "tuning"), ("critic", "critic.tuning"), ("reward", "tuning")):
        if role in adapters:
            _check_options(key, adapters[role], config.tuning)
    return SharedRoles(resolve_model_path(base), known, adapters)


def _lora_of(run: str, key: str) -> Pick:
    """The tuning of a LoRA run, without dropout.

    Raises:
        UserError: It is not a LoRA run.
    """
    tuning = tuning_of(run)
    if tuning is None or not tuning.row.traits["roles"]:
        found = "a model without a run folder" if tuning is None else f"a run with `tuning: {tuning.name}`"
        raise UserError(
            f"{key}: {run} is {found}; model.sharing `shared` needs an adapter",
            "With model.sharing `shared` every role must be an adapter (LoRA, bottleneck) on the same base model.",
            f"Train it with `tuning: lora`, {SEPARATE}",
        )
    return tuning


def _sft_beside(start: str, mine: str, reward: str, theirs: Mapping[str, str]) -> str:
    """`start`, if it is an SFT LoRA run on the base of the reward run.

    Raises:
        UserError: It is not, so the two have no base in common.
    """
    tuning = tuning_of(start)
    why = f"{reward} is an adapter on {theirs['path']} ({_short(theirs['weights'])}). "
    why += f"model.path {start} is {_short(mine)}"
    if tuning is None or not tuning.row.traits["roles"] or read_run(start)["stage"] != "sft":
        why += ", which is not an SFT LoRA run."
    else:
        own = base_of(start)
        if own["weights"] == theirs["weights"]:
            return start
        why += f", an adapter on {own['path']} ({_short(own['weights'])})."
    raise UserError(
        "model.sharing: policy and reward model have no base in common",
        why,
        f"Train the reward model with `tuning: lora` from {start}, or SFT too with `tuning: lora` from "
        f"{theirs['path']}; {SEPARATE}",
    )


def _check_options(key: str, adapter: RoleAdapter, policy: Pick) -> None:
    """Refuse an adapter whose options differ from those of the run it starts from."""
    if adapter.tuning.name != policy.name:
        raise UserError(
            f"tuning: {policy.name}, but {adapter.start} is a {adapter.tuning.name} run",
            "The base is quantised for all roles or for none.",
            f"Set tuning to {adapter.tuning.name}, {SEPARATE}",
        )
    run = None if adapter.start is None else _lora_of(adapter.start, key)
    if run is None or (run.name, run.options) == (adapter.tuning.name, adapter.tuning.options):
        return
    other = {name: value for name, value in run.options.items() if adapter.tuning.options.get(name) != value}
    raise UserError(
        f"{key}: differs from the tuning of {adapter.start}, whose adapter it starts from",
        f"That run has {', '.join(f'{name}: {value}' for name, value in other.items()) or run.name}.",
        f"Set the same, {SEPARATE}",
    )


def _short(weights: str) -> str:
    return weights.removeprefix("hub:") if weights.startswith("hub:") else f"fingerprint {weights[:12]}"
