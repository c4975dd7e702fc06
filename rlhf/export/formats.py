"""From a finished run to a folder that plain transformers (or PEFT) loads. One table, EXPORTERS.

The folder appears under its name only when it is whole; it needs nothing of this project.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.files import whole_folder
from rlhf.core.lazy import lazy
from rlhf.core.table import Pick, Table
from rlhf.data.chat import ChatTokenizer, load_tokenizer
from rlhf.export.model_card import MARK, Card, render
from rlhf.inference.sampling_params import sampling_params
from rlhf.runs.run import fingerprint, is_run, read_run, resolve_model_path

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch, nn = lazy("torch"), lazy("torch.nn")


EXPORTERS = Table("export format")
ROLES = ("policy", "critic", "reward", "reference")
"""What of a PPO run can be exported; of any other run there is one result."""
PAD = "<|pad|>"


@dataclass(frozen=True)
class Source:
    """A finished run that is to be exported."""

    run: Path
    stage: str
    """sft, reward or ppo; `critic` for the critic of a PPO run."""
    model: Path
    config: ModelConfig
    chat: ChatTokenizer


@dataclass(frozen=True)
class Exported:
    """What an exporter has written."""

    dtype: str
    parameters: int
    stop_ids: tuple[int, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of a reward model's raw scores."""
    folded: bool = False
    """Whether they are in the weights already."""
    adapter_base: str | None = None


# ---- formats -----------------------------------------------------------------------------------------------------


@EXPORTERS.row("hf")
def hf(source: Source, folder: Path, *, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto") -> Exported:
    """The whole model, adapters merged, for `AutoModelForCausalLM` or `AutoModelForSequenceClassification`.

    `dtype` is that of the weights; `auto` leaves them as the run has them.
    """
    if source.stage != "critic" and (source.model / "adapter_config.json").is_file():
        raise UserError(
            f"{source.run}: learned virtual tokens cannot be merged into a model's weights",
            "They stand before every prompt and are seen by PEFT alone.",
            "Export the adapter: --format adapter.",
        )
    write = _write_reward if source.stage in ("reward", "critic") else _write_policy
    return write(source, folder, None if dtype == "auto" else getattr(torch, dtype))


def _write_policy(source: Source, folder: Path, dtype: torch.dtype | None) -> Exported:
    from rlhf.models.load import load_policy
    from rlhf.models.save import generation_config

    tokenizer = source.chat.tokenizer
    model = load_policy(source.config, str(source.model), dtype or _stored_dtype(source.model))
    model.config.use_cache = True  # it is off for training only
    model.generation_config = generation_config(model, source.chat)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(source.chat.pad_id)
    tokenizer.padding_side = "left"  # answers begin where prompts end
    _save(model, tokenizer, folder)
    stops = tuple(model.generation_config.eos_token_id)
    return Exported(_name(model.dtype), model.num_parameters(), stop_ids=stops)


def _write_reward(source: Source, folder: Path, dtype: torch.dtype | None) -> Exported:
    from rlhf.models.scalar import load_scalar

    tokenizer = source.chat.tokenizer
    critic = source.stage == "critic"
    scalar = _merged_critic(source) if critic else load_scalar(source.config, str(source.model), head="trained")
    model, scale = scalar.model, (scalar.mean, scalar.std)
    head = _biased_head(model)
    if head is not None:  # in float32, whatever comes out
        with torch.no_grad():
            head.weight.div_(scalar.std)
            head.bias.sub_(scalar.mean).div_(scalar.std)
        scalar.set_scale(0.0, 1.0)
    if source.chat.pad_id == source.chat.end_id:
        # transformers reads a decoder at the last token that is not padding, which must not be the end of the answer.
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(source.chat.pad_id)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = True  # it is off for training only
    model.config.problem_type = "regression"  # pipelines then leave the number as it is
    model.config.id2label, model.config.label2id = {0: "reward"}, {"reward": 0}
    model.to(dtype or _stored_dtype(source.model))
    _save(model, tokenizer, folder)
    return Exported(_name(model.dtype), model.num_parameters(), scale=scale, folded=head is not None)


def _merged_critic(source: Source) -> Any:
    """The critic's adapter and value head in the base that it was trained on, float32."""
    from peft import PeftModel

    from rlhf.models.scalar import ScalarModel, load_scalar, reward_scale

    base = load_scalar(source.config, _base_of(source.model)).model
    scalar = ScalarModel(PeftModel.from_pretrained(base, source.model).merge_and_unload())
    scalar.set_scale(*reward_scale(source.model))
    return scalar


def _base_of(adapter: Path) -> str:
    return str(json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])


def _biased_head(model: Any) -> Any:
    """The last linear layer of a classifier, where it has a bias that can take the mean up; None otherwise."""
    head = model.score if hasattr(model, "score") else model.classifier
    linear = [m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    return linear[-1] if linear and linear[-1].bias is not None else None


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stored_dtype(folder: Path) -> torch.dtype:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found: torch.dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@EXPORTERS.row("adapter")
def adapter(source: Source, folder: Path) -> Exported:
    """The PEFT adapter alone, for `PeftModel.from_pretrained` on the model that it was trained on."""
    from safetensors import safe_open

    places = [source.model] if source.stage == "critic" else [source.run / "adapter", source.model]
    found = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    if found is None:
        raise UserError(
            f"{source.run}: this run has no adapter",
            "Its tuning method changed the model's own weights.",
            "Export the whole model: --format hf.",
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(found / name, folder / name)
    source.chat.tokenizer.save_pretrained(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118 - not a mapping
    return Exported(
        dtype=_name(tensors[0].dtype),
        parameters=sum(tensor.numel() for tensor in tensors),
        stop_ids=(source.chat.end_id,),
        scale=_adapter_scale(source),
        adapter_base=_base_of(folder),
    )


def _adapter_scale(source: Source) -> tuple[float, float]:
    from rlhf.models.scalar import reward_scale

    return reward_scale(source.model) if source.stage in ("reward", "critic") else (0.0, 1.0)


# ---- the whole export --------------------------------------------------------------------------------------------


def export(
    run: str | Path,
    out: str | Path,
    exporter: Pick,
    *,
    role: str = "policy",
    name: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a finished run's result into the folder `out`, with tokenizer, chat template and model card.

    Args:
        run: The run's folder.
        out: The folder to make; it appears only when it is whole.
        exporter: A row of EXPORTERS with its options.
        role: Which of a PPO run's ROLES. Its reward model and its reference are the results of the runs that it
            started from.
        name: The hub name under which it will be pushed, for the card; nowhere when left out.
        license: A licence identifier of the hub, for the card.
        overwrite: Replace an earlier export.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        path, format, stage, dtype, parameters, stop_tokens, adapter_base, and the fingerprint of what was written.

    Raises:
        UserError: Not a finished run, `out` is taken, or the run has nothing of that format.
    """
    run, out = Path(run), Path(out)
    if role in ("reward", "reference"):
        run = _parent_run(run, role)
    stage, model = read_run(run)["stage"], Path(resolve_model_path(run))
    check_out(out, run, overwrite)
    from rlhf.inference.policy import quiet  # imports torch

    quiet()
    config = ModelConfig(path=str(run), trust_remote_code=trust_remote_code)
    chat = load_tokenizer(config, str(model))
    if role == "critic":
        stage, model = "critic", _critic_of(run)
    source = Source(run, stage, model, config, chat)
    tokens = source.chat.tokenizer.convert_ids_to_tokens
    with _writing(out), whole_folder(out) as folder:
        done = exporter(source, folder)
        if name is not None and done.adapter_base is not None and Path(done.adapter_base).is_dir():
            raise UserError(
                f"--push-to-hub: the adapter belongs to the local folder {done.adapter_base}",
                "Nobody else could load it.",
                "Push the whole model: --format hf.",
            )
        card = Card(
            run, name or str(out), exporter.name, tokens(source.chat.end_id), tokens(list(done.stop_ids)),
            sampling_params(run), done.scale, done.folded, done.adapter_base, license, stage,
        )  # fmt: skip
        (folder / "README.md").write_text(render(card), "utf-8")
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that nobody else may read
        digest = fingerprint(folder)
    facts = {"path": str(out), "format": exporter.name, "stage": stage, "dtype": done.dtype}
    facts |= {"parameters": done.parameters, "stop_tokens": list(card.stop_tokens), "adapter_base": done.adapter_base}
    return facts | {"fingerprint": digest}


def _parent_run(run: Path, role: str) -> Path:
    """The run whose result is a PPO run's reward model or reference.

    Raises:
        UserError: It is no PPO run, has no such role, or the parent is not a run or not the one it was any more.
    """
    info = read_run(run)
    place = ("reference", "reward").index(role)
    if info["stage"] != "ppo" or len(info["parents"]) <= place:
        raise UserError(f"--role {role}: {run} has no {role} model", remedy="Name a PPO run that has one.")
    noted = info["parents"][place]
    parent = Path(noted["path"])
    if not is_run(parent):
        raise UserError(
            f"--role {role}: it is {parent} itself, which is no run", "There is nothing to merge.", "Use it as it is."
        )
    if read_run(parent).get("model_fingerprint") != noted.get("fingerprint"):
        raise UserError(f"--role {role}: {parent} has been trained anew since {run}", "It is another model by now.")
    return parent


def _critic_of(run: Path) -> Path:
    folder = run / "critic"
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--role critic: {run} has kept none",
            "A critic is kept by PPO runs with model.sharing `shared`, as an adapter.",
        )
    return folder


def check_out(out: Path, run: Path, overwrite: bool) -> None:
    """Refuse a folder that is taken. Only an earlier export, known by its card, is ever replaced.

    Raises:
        UserError: It is.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    card = out / "README.md"
    mine = card.is_file() and MARK in card.read_text("utf-8", errors="replace")
    if not mine or out.resolve() in (run.resolve(), *run.resolve().parents):
        raise UserError(f"--out {out}: exists and is not an export", remedy="Name another folder; nothing is deleted.")
    if not overwrite:
        raise UserError(f"--out {out}: holds an export already", remedy="Replace it with --overwrite, or name another.")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written: {error}", remedy="Free disk space, or name another folder."
        ) from None
