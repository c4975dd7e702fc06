"""One frozen base with an adapter per task. The rows of a batch belong to different tasks and share its forward pass.

LoRA, IA3 and bottleneck adapters act in the layers, row by row (`rlhf.inference.routed`). The virtual tokens of prompt
tuning, P-tuning and prefix tuning are keys and values before the prompt: they do not depend on it, so they are computed
once per task and copied into the KV cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.core.console import warn
from rlhf.core.errors import UserError
from rlhf.data.schema import Prompt
from rlhf.inference.policy import Policy
from rlhf.inference.routed import IN_LAYERS, Rows, attach
from rlhf.models.adapters import adapter_settings
from rlhf.models.attention import plain_attention
from rlhf.models.load import refuse_encoder_decoder
from rlhf.rollout.decoding import decode
from rlhf.rollout.kv_cache import joinable
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.runs.model_folder import fingerprint
from rlhf.runs.run import is_run
from rlhf.tuning.origin import adapter_folder

NO_ADAPTER = "none"
"""In place of an adapter's path: the plain base."""
PREFIX = "base_model.model."
NOT_BY_ROW = ("use_dora", "use_bdlora", "target_parameters", "trainable_token_indices", "modules_to_save")
"""Options of PEFT whose weights cannot be chosen row by row."""
Virtual = list[tuple[Tensor, Tensor]]
"""Keys and values [heads, tokens, head size] of virtual tokens, per layer."""


@dataclass(frozen=True)
class TaskAdapter:
    """An adapter folder, read."""

    task: str
    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """PEFT's type: LORA, IA3, BOTTLENECK, PROMPT_TUNING, P_TUNING, PREFIX_TUNING."""
        return str(self.config.get("peft_type"))


def read_adapter(task: str, path: str | Path) -> TaskAdapter:
    """Read the adapter of a task.

    Args:
        task: Its name.
        path: A run whose result is an adapter or that saved one next to the merged model, or an adapter folder.

    Raises:
        UserError: There is no adapter, or it is of a kind that cannot be chosen row by row.
    """
    path = Path(path)
    folder = adapter_folder(str(path)) if is_run(path) else path
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter {task}={path}: there is no adapter (no adapter_config.json)",
            remedy="Name a run that trained an adapter (`tuning: lora`, `prompt-tuning`, ...), or an adapter folder.",
        )
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"--adapter {task}={path}: {file.name} is missing", remedy="Only safetensors are read.")
    config = adapter_settings(folder)
    adapter = TaskAdapter(task, folder, config, load_file(file))
    unusable = [key for key in NOT_BY_ROW if config.get(key)]
    if adapter.kind not in KINDS or unusable:
        what = f"is {adapter.kind}" if adapter.kind not in KINDS else f"uses {', '.join(unusable)}"
        raise UserError(
            f"--adapter {task}={path}: {what}, which cannot be chosen row by row",
            remedy=f"Supported are {', '.join(KINDS)}. Use one adapter at a time: its run in place of MODEL.",
        )
    return adapter


class TaskAdapters:
    """A base model whose rows use the adapters of their tasks."""

    def __init__(self, policy: Policy, paths: Mapping[str, str | Path]) -> None:
        """
        Args:
            policy: The base. Its modules are changed, so it is not usable without the adapters afterwards.
            paths: Task -> run, adapter folder, or `none` for the plain base.

        Raises:
            UserError: An adapter does not fit the base, or is of an unsupported kind.
        """
        refuse_encoder_decoder(policy.model.config, policy.path, "one base for many tasks does")
        self.policy, self.model, self.names = policy, policy.model, list(paths)
        adapters = [None if path == NO_ADAPTER else read_adapter(task, path) for task, path in paths.items()]
        for adapter in adapters:
            if adapter is not None:
                _check_base(adapter, policy)
        self.rows = Rows(self.model.device)
        self.virtual: list[Virtual] = [[] for _ in adapters]
        self.task_of: dict[str, int] = {}
        """Id of a prompt -> index of its task; see `route`."""
        with torch.inference_mode(), plain_attention(self.model):
            for index, adapter in enumerate(adapters):
                if adapter is not None and adapter.kind in VIRTUAL:
                    self.virtual[index] = VIRTUAL[adapter.kind](self.model, adapter)
        for kind, make in IN_LAYERS.items():
            self._attach(kind, adapters, make)

    def _attach(self, kind: str, adapters: Sequence[TaskAdapter | None], make: Callable[..., Any]) -> None:
        """Attach the adapters of one kind to the modules that any of them changes."""
        of_kind = [None if one is None or one.kind != kind else _by_module(one) for one in adapters]
        modules = dict(self.model.named_modules())
        for name in dict.fromkeys(name for found in of_kind for name in found or ()):
            module = modules.get(name)
            if module is None:
                task = next(self.names[i] for i, found in enumerate(of_kind) if found and name in found)
                raise UserError(
                    f"--adapter {task}: its weights are for a module {name}, which {self.policy.path} does not have",
                    remedy="Name the base that the adapter was trained on as MODEL.",
                )
            parts = [None if found is None else found.get(name) for found in of_kind]
            configs = [None if one is None else one.config for one in adapters]
            attach(module, make(self.rows, name, parts, configs, self.model))

    # ---- sampling ----------------------------------------------------------------------------------------------------

    @property
    def routed_policy(self) -> Policy:
        """The base as a policy whose limit leaves room for the virtual tokens of any task."""
        most = max(map(self.virtual_tokens, range(len(self.names))))
        return replace(self.policy, limit=self.policy.limit - most)

    def virtual_tokens(self, task: int) -> int:
        """Number of virtual tokens before the prompts of a task."""
        return self.virtual[task][0][0].shape[1] if self.virtual[task] else 0

    def sample(
        self, prompts: Sequence[list[int]], tasks: Sequence[int], seeds: Sequence[int], params: SamplingParams,
    ) -> list[Completion]:  # fmt: skip
        """One completion of each prompt by its task's adapter; the same tokens as with that adapter alone.

        Args:
            prompts: Token ids.
            tasks: Index into `names` for each prompt.
            seeds: Random stream of each completion.
            params: How to sample.

        Raises:
            UserError: Virtual tokens, and a model that keeps no key and value per token.
        """
        if any(self.virtual) and not joinable(self.model):
            raise UserError(
                f"{self.policy.path}: a {self.model.config.model_type} model keeps no key and value per token",
                "Virtual tokens are put there.",
                "Use LoRA adapters, or one adapter at a time.",
            )
        return decode(self.model, prompts, seeds, params, self.policy.chat, adapters=_Requests(self, tasks))

    def fill(self, cache: Any, tasks: Sequence[int]) -> int:
        """Write the virtual tokens of a task per row into an empty cache, padded on the left; returns the columns."""
        width = max(map(self.virtual_tokens, tasks))
        if not width:
            return 0
        for layer, like in enumerate(next(filter(None, self.virtual))):
            none = tuple(side[:, :0] for side in like)
            rows = [self.virtual[task][layer] if self.virtual[task] else none for task in tasks]
            cache.update(*(_padded(column, width) for column in zip(*rows)), layer)
        return width

    def route(self, prompts: Sequence[Prompt], field: str | None) -> list[Prompt]:
        """Find the adapter of each prompt by a field of its record, for `task_of`.

        Args:
            prompts: Records of any kind.
            field: `group` or `source`; None if there is one task for all.

        Returns:
            The prompts that have an adapter. A warning counts the others by their value of the field.

        Raises:
            UserError: No prompt has one.
        """
        if field is None:
            self.task_of = {prompt.prompt_id: 0 for prompt in prompts}
            return list(prompts)
        kept = [prompt for prompt in prompts if getattr(prompt, field) in self.names]
        values = [getattr(prompt, field) for prompt in prompts]
        missing = Counter(value or "(empty)" for value in values if value not in self.names)
        named = ", ".join(f"{value} {count:,}" for value, count in missing.most_common(8))
        if not kept:
            raise UserError(
                f"--route {field}: none of the {len(prompts):,} prompts belongs to a task that has an adapter",
                f"Their {field} is: {named}. Adapters were given for: {', '.join(self.names)}.",
                "Name the adapters after these values: --adapter VALUE=PATH.",
            )
        if missing:
            warn(f"{missing.total():,} prompts are rejected, since no adapter was given for their {field}: {named}")
        self.task_of = {prompt.prompt_id: self.names.index(getattr(prompt, field)) for prompt in kept}
        return kept


class _Requests:
    """The adapters of a call of `sample`, as its slots ask for them (`rlhf.rollout.types.RowAdapters`)."""

    def __init__(self, adapters: TaskAdapters, tasks: Sequence[int]) -> None:
        self.adapters, self.tasks = adapters, tasks

    def key(self, request: int) -> int:
        return self.tasks[request]

    def virtual_tokens(self, request: int) -> int:
        return self.adapters.virtual_tokens(self.tasks[request])

    def select(self, requests: Sequence[int | None]) -> None:
        rows = self.adapters.rows
        # a free slot keeps the task that it had, so that the rows are not grouped again when a completion ends
        before = rows.tasks if len(rows.tasks) == len(requests) else [self.tasks[0]] * len(requests)
        rows.select([before[i] if one is None else self.tasks[one] for i, one in enumerate(requests)])

    def fill(self, cache: Any, requests: Sequence[int]) -> int:
        return self.adapters.fill(cache, [self.tasks[request] for request in requests])


def _padded(sides: Sequence[Tensor], width: int) -> Tensor:
    """Keys or values [heads, tokens, head size] as one tensor, with zeros before those of fewer than `width` tokens."""
    return torch.stack([nn.functional.pad(side, (0, 0, width - side.shape[1], 0)) for side in sides])


# ---- weights of an adapter -----------------------------------------------------------------------------------------


def _by_module(adapter: TaskAdapter) -> dict[str, dict[str, Tensor]]:
    """Module of the base -> the adapter's tensors for it."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.weights.items():
        path, _, name = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if name == "bias":
            path, _, name = path.rpartition(".")
            name += ".bias"
        found.setdefault(path, {})[name] = tensor
    return found


# ---- virtual tokens ------------------------------------------------------------------------------------------------


def _embedded(model: Any, adapter: TaskAdapter) -> Virtual:
    """Keys and values of learned embeddings: what the base makes of them, before any prompt."""
    words = adapter.weights["prompt_embeddings"].to(model.device, model.dtype)[None]
    if words.shape[2] != model.get_input_embeddings().weight.shape[1]:
        raise _other_shape(adapter)
    cache: Any = transformers.DynamicCache()
    model(inputs_embeds=words, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def _prefix(model: Any, adapter: TaskAdapter) -> Virtual:
    """Keys and values that were learned themselves; PEFT stores [tokens, layers x 2 x heads x head size]."""
    probe: Any = transformers.DynamicCache()
    first = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=first, past_key_values=probe, use_cache=True, logits_to_keep=1)
    layers, (_, heads, _, size) = len(probe.layers), probe.layers[0].keys.shape
    learned = adapter.weights["prompt_embeddings"].to(model.device, model.dtype)
    if learned.shape[1] != layers * 2 * heads * size:
        raise _other_shape(adapter)
    parts = learned.view(-1, layers, 2, heads, size).permute(1, 2, 3, 0, 4)
    return [(part[0].contiguous(), part[1].contiguous()) for part in parts]


def _other_shape(adapter: TaskAdapter) -> UserError:
    return UserError(
        f"--adapter {adapter.task}={adapter.folder}: its virtual tokens have another width than this model's",
        remedy="Name the base that the adapter was trained on as MODEL.",
    )


VIRTUAL: dict[str, Callable[[Any, TaskAdapter], Virtual]] = {
    "PROMPT_TUNING": _embedded, "P_TUNING": _embedded, "PREFIX_TUNING": _prefix,
}  # fmt: skip
KINDS = (*IN_LAYERS, *VIRTUAL)


def _check_base(adapter: TaskAdapter, policy: Policy) -> None:
    """Refuse an adapter that was trained on another base, where both are folders here."""
    own, trained = Path(str(policy.model.name_or_path)), Path(str(adapter.config.get("base_model_name_or_path")))
    both_here = own.is_dir() and trained.is_dir() and own.resolve() != trained.resolve()
    if both_here and fingerprint(own) != fingerprint(trained):
        raise UserError(
            f"--adapter {adapter.task}={adapter.folder}: was trained on {trained}, not on {own}",
            "Its weights are changes to that model.",
            f"Name {trained} as MODEL.",
        )
