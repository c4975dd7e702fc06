"""Trained models in use: loading a policy, sampling with progress, scoring. What sample, evaluate and chat share."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.core.lazy import lazy
from rlhf.data.chat import ChatTokenizer, load_tokenizer, stop_ids
from rlhf.rollout.types import SamplingParams
from rlhf.runs.run import is_run, read_run, resolve_model_path

if TYPE_CHECKING:
    import peft
    import torch
    import transformers
else:
    peft, torch, transformers = lazy("peft"), lazy("torch"), lazy("transformers")


BATCH_SIZE = 32


def quiet() -> None:
    """Keep the libraries' chatter about loading off the terminal, and all of it off standard output."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", "Position ids are not supported")  # virtual tokens have none, rightly
    if not torch.cuda.is_available():  # DeepSpeed, which transformers imports, would print that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# ---- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """A causal LM that is ready to answer: in evaluation mode, on this process's device."""

    path: str
    """As it was named: a run, a model folder or a hub name."""
    model: Any
    chat: ChatTokenizer
    limit: int
    """Longest sequence in tokens, prompt and answer together."""
    trust_remote_code: bool = False

    @property
    def prompt_learning(self) -> bool:
        """True where learned virtual tokens stand before every prompt, so that only PEFT's own passes are right."""
        return hasattr(self.model, "peft_config") and self.model.active_peft_config.is_prompt_learning

    def room(self, sampling: SamplingParams, limit: int | None = None) -> int:
        """How many tokens a prompt may have, `limit` bounding the sequence further.

        Raises:
            UserError: None are left.
        """
        longest = min(self.limit, limit or self.limit)
        if sampling.max_new_tokens + 1 > longest:
            raise UserError(
                f"--max-new-tokens {sampling.max_new_tokens} leaves no room for a prompt in {longest} tokens",
                remedy=f"Use --max-new-tokens {longest // 2} or less.",
            )
        return longest - sampling.max_new_tokens


def model_kind(path: str | Path, trust_remote_code: bool = False) -> str:
    """`policy` or `reward`: what a run, model folder or hub name holds.

    Raises:
        UserError: An unfinished run, or no model there.
    """
    folder = resolve_model_path(path)
    if is_run(path):
        return "reward" if read_run(path)["stage"] == "reward" else "policy"
    from rlhf.models.load import load_hf_config

    found = load_hf_config(ModelConfig(path=str(path), trust_remote_code=trust_remote_code), folder)
    names = found.architectures or []
    return "reward" if any(name.endswith("ForSequenceClassification") for name in names) else "policy"


def open_policy(path: str | Path, chat_template: str = "auto", trust_remote_code: bool = False) -> Policy:
    """Load the policy of a run, a model folder or a hub name.

    Raises:
        UserError: No finished run or model there, a reward model, or no usable chat template.
    """
    from rlhf import distributed
    from rlhf.models.load import compute_dtype, load_hf_config, load_policy, sequence_limit

    quiet()
    folder = resolve_model_path(path)
    if not (Path(folder) / "adapter_config.json").is_file() and model_kind(path, trust_remote_code) == "reward":
        raise UserError(
            f"{path}: a reward model gives scores, not answers",
            remedy=f"Name an SFT or PPO run, and this one as --reward {path}.",
        )
    config = ModelConfig(path=str(path), chat_template=chat_template, trust_remote_code=trust_remote_code)
    chat = load_tokenizer(config, folder)
    base = adapter_base(Path(folder)) or folder
    model: Any = load_policy(config, base, compute_dtype("auto"))
    limit = sequence_limit(config, load_hf_config(config, base))
    # Sampling follows the command's options alone, not what a model's author set for `generate` (penalties, top_k 50).
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stop_ids(model, chat), pad_token_id=chat.pad_id, bos_token_id=chat.tokenizer.bos_token_id
    )
    if base != folder:
        model = peft.PeftModel.from_pretrained(model, folder)
        limit -= getattr(model.active_peft_config, "num_virtual_tokens", None) or 0
    return Policy(str(path), model.to(distributed.device()).eval(), chat, limit, trust_remote_code)


def adapter_base(folder: Path) -> str | None:
    """The model that a PEFT adapter folder belongs to; None where the folder is no adapter.

    Raises:
        UserError: The base is a local folder that is not there any more.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = str(json.loads(file.read_text("utf-8"))["base_model_name_or_path"])
    if base.startswith((".", "/", "runs/")) and not (Path(base) / "config.json").is_file():
        raise UserError(
            f"{folder}: the model {base} that this adapter belongs to is not there",
            "An adapter holds only what was added to that model.",
            "Bring that folder back, or run the command from the folder where the stage was started.",
        )
    return base


# ---- sampling ----------------------------------------------------------------------------------------------------


def sampling_for(path: str | Path, **given: Any) -> SamplingParams:
    """How to sample: the options that were given, else how a PPO run sampled in training, else the plain distribution.

    Args:
        path: A run, model folder or hub name.
        given: Fields of `Sampling`; None (or an empty `stop`) stands for "not given".

    Raises:
        UserError: A value is out of its range.
    """
    chosen: dict[str, Any] = {"max_new_tokens": 128}
    if is_run(path) and read_run(path)["stage"] == "ppo":
        rollout = yaml.safe_load((Path(path) / "config.yaml").read_text("utf-8"))["rollout"]
        names = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "stop")
        chosen |= {name: rollout[name] for name in names}
    chosen |= {name: value for name, value in given.items() if value not in (None, [], ())}
    sampling = SamplingParams(**chosen | {"stop": tuple(chosen.get("stop", ())), "batch_size": BATCH_SIZE})
    if not 0 <= sampling.temperature < math.inf:
        raise UserError(f"--temperature {sampling.temperature} is not a number from 0 (greedy) up")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"--top-p {sampling.top_p} is not above 0 and at most 1")
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise UserError(
            f"--min-new-tokens {sampling.min_new_tokens} is above --max-new-tokens {sampling.max_new_tokens}"
        )
    return sampling


def _on_device(model: Any) -> Any:
    from rlhf import distributed

    return model.to(distributed.device()).eval()
