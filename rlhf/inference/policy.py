"""Loading a trained policy, for the commands that sample from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.config.base import ModelConfig
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer, load_tokenizer
from rlhf.models.adapters import virtual_tokens_of
from rlhf.models.load import compute_dtype, load_hf_config, load_policy, quiet, sequence_limit
from rlhf.models.vocabulary import mask_unknown_ids, token_count
from rlhf.rollout.types import SamplingParams
from rlhf.runs.parents import refuse_specialist, resolve_model_path
from rlhf.runs.run import is_run, read_run
from rlhf.tuning.save import generation_config


@dataclass(frozen=True)
class Policy:
    """A language model in evaluation mode, on this process's device."""

    path: str
    """The run, model folder or hub name, as given."""
    model: Any
    chat: ChatTokenizer
    limit: int
    """Longest sequence in tokens, prompt and completion together."""
    trust_remote_code: bool = False

    @property
    def prompt_learning(self) -> bool:
        """Whether learned virtual tokens precede every prompt; only PEFT's own forward pass adds them."""
        return hasattr(self.model, "peft_config") and self.model.active_peft_config.is_prompt_learning

    def prompt_limit(self, params: SamplingParams, limit: int | None = None) -> int:
        """The longest prompt in tokens. `limit` bounds the whole sequence further.

        Raises:
            UserError: The completion leaves no room for a prompt.
        """
        longest = min(self.limit, limit or self.limit)
        if params.max_new_tokens + 1 > longest:
            raise UserError(
                f"--max-new-tokens {params.max_new_tokens} leaves no room for a prompt in {longest} tokens",
                remedy=f"Use --max-new-tokens {longest // 2} or less.",
            )
        return longest - params.max_new_tokens


def model_kind(path: str | Path, trust_remote_code: bool = False) -> str:
    """Whether a run, model folder or hub name holds a `policy` or a `reward` model.

    Raises:
        UserError: The run is not finished, or there is no model.
    """
    folder = resolve_model_path(path)
    refuse_specialist(path)
    if is_run(path):
        return "reward" if read_run(path)["stage"] == "reward" else "policy"
    found = load_hf_config(ModelConfig(path=str(path), trust_remote_code=trust_remote_code), folder)
    names = found.architectures or []
    return "reward" if any(name.endswith("ForSequenceClassification") for name in names) else "policy"


def open_policy(path: str | Path, chat_template: str = "auto", trust_remote_code: bool = False) -> Policy:
    """Load the policy of a run, a model folder or a hub name.

    Raises:
        UserError: No finished run or model there, a reward model, or no usable chat template.
    """
    quiet()
    folder = resolve_model_path(path)
    if not (Path(folder) / "adapter_config.json").is_file() and model_kind(path, trust_remote_code) == "reward":
        raise UserError(
            f"{path}: a reward model gives scores, not answers",
            remedy=f"Name an SFT or PPO run, and this one as --reward {path}.",
        )
    config = ModelConfig(path=str(path), chat_template=chat_template, trust_remote_code=trust_remote_code)
    chat = load_tokenizer(config, folder)
    model: Any = load_policy(config, folder, compute_dtype("auto"))
    mask_unknown_ids(model, token_count(chat.tokenizer))
    limit = sequence_limit(config, load_hf_config(config, folder)) - virtual_tokens_of(folder)
    # Only the command's options decide how to sample, not the generation config of the model's author (top_k 50, ...).
    model.generation_config = generation_config(model, chat)
    return Policy(str(path), model.to(distributed.device()).eval(), chat, limit, trust_remote_code)
