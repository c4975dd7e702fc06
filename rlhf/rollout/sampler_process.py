"""The sampler `process`: `hf` in a process of its own, which samples while the trainer goes on.

Trainer and child exchange files in a private temporary folder and name them in JSON lines on the child's pipes: config
and tokenizer once, the weights whenever they may have changed, then prompts and their completions. The child handles
requests in order, so a rollout keeps the weights that it was started with.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf.core.errors import UserError
from rlhf.data.chat_tokenizer import ChatTokenizer
from rlhf.distributed.exchange_folder import ExchangeFolder
from rlhf.distributed.launch import child_environment, how_it_ended
from rlhf.models.attention import PACKED
from rlhf.models.mapped import autocast_dtype
from rlhf.rollout.types import Completion, SamplingParams
from rlhf.tuning.merging import merged_weights, weight_marks

PART_BYTES = 1 << 27
"""Approximate size of a file of weights."""


def start(
    model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams, chat: ChatTokenizer, *,
    step: str = "eager",
) -> Callable[[], list[Completion]]:  # fmt: skip
    """Start sampling with the weights as they are now; see `rlhf.rollout.samplers.process`.

    Returns:
        A function that waits for the completions.

    Raises:
        UserError: The sampler's process has ended.
    """
    child = _CHILDREN.get(model)
    if child is None:
        child = _CHILDREN[model] = SamplerProcess(model, chat, step)
    return child.start(model, prompts, seeds, replace(sampling, logprobs=True))


class SamplerProcess:
    """The process that samples for one model of this process. It ends with the model, and with this process."""

    def __init__(self, model: Any, chat: ChatTokenizer, step: str) -> None:
        exchange = ExchangeFolder()
        self.folder = exchange.path
        lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        lm.config.save_pretrained(self.folder)
        lm.generation_config.save_pretrained(self.folder)
        chat.tokenizer.save_pretrained(self.folder)
        attention = lm.config._attn_implementation
        settings = {
            "attention": "sdpa" if attention == PACKED else attention,
            "device": str(lm.device),
            "time": chat.frozen_at,
            "step": step,
        }
        (self.folder / "sampler.json").write_text(json.dumps(settings), "utf-8")
        self.child = subprocess.Popen(
            [sys.executable, "-m", "rlhf.rollout.sampler_worker", str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(), text=True,
        )  # fmt: skip
        self.sent = 0
        self.answered = 0
        self.close = weakref.finalize(self, _end, self.child, exchange)

    def start(
        self, model: Any, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingParams
    ) -> Callable[[], list[Completion]]:
        """Send weights and prompts. Gives a function that waits for the completions."""
        if not prompts:
            for _ in merged_weights(model):  # under ZeRO-3 the other ranks need this rank's shares
                pass
            return list
        number, self.sent = self.sent, self.sent + 1
        _write_weights(model, self.folder / f"weights-{number}")
        request = {"prompts": list(prompts), "seeds": list(seeds), "sampling": asdict(sampling)}
        (self.folder / f"request-{number}.json").write_text(json.dumps(request), "utf-8")
        self._tell(number)
        found: list[Completion] = []

        def wait() -> list[Completion]:
            if not found:
                while self.answered <= number:
                    self._next_answer()
                answer = self.folder / f"answer-{number}.json"
                found.extend(Completion(*row) for row in json.loads(answer.read_text("utf-8")))
                answer.unlink()
            return found

        return wait

    def _tell(self, number: int) -> None:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(f"{number}\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise self._lost() from None

    def _next_answer(self) -> None:
        assert self.child.stdout is not None
        if not self.child.stdout.readline():
            raise self._lost()
        self.answered += 1

    def _lost(self) -> UserError:
        return UserError(
            f"rollout.sampler: the sampler's process (pid {self.child.pid}) {how_it_ended(self.child.wait())}",
            "Its own message is above.",
            "Continue from the last checkpoint with --resume.",
        )


_CHILDREN: weakref.WeakKeyDictionary[Any, SamplerProcess] = weakref.WeakKeyDictionary()


def _end(child: subprocess.Popen[str], exchange: ExchangeFolder) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    exchange.close()


@torch.no_grad()
def _write_weights(model: Any, folder: Path) -> None:
    """The weights with adapters merged, tied ones once; under autocast in its dtype, in which `hf` would compute.

    They are written in files of about PART_BYTES, so that under ZeRO-3 this process never holds all of them.
    """
    dtype = autocast_dtype(model.device)
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    marks, written, parts = weight_marks(model), set[int](), count()
    for name, weight in merged_weights(model):
        if marks[name] not in written:
            written.add(marks[name])
            tensors[name] = weight.to("cpu", dtype).contiguous()
        if sum(tensor.nbytes for tensor in tensors.values()) >= PART_BYTES:
            save_file(tensors, folder / f"{next(parts):06}.safetensors")
            tensors.clear()
    save_file(tensors, folder / f"{next(parts):06}.safetensors")
