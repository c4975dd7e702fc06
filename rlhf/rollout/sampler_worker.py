"""The process of the sampler `process`: `python -m rlhf.rollout.sampler_worker FOLDER` (see `sampler_process`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig
from transformers.initialization import no_init_weights

from rlhf.config.base import ModelConfig
from rlhf.data.chat_tokenizer import load_tokenizer
from rlhf.distributed.launch import end_with_parent
from rlhf.models.vocabulary import mask_unknown_ids, token_count
from rlhf.rollout.samplers import hf
from rlhf.rollout.types import SamplingParams


def main(folder: Path, answers: TextIO) -> None:
    """Work through the requests whose numbers come on stdin, until it closes."""
    settings = json.loads((folder / "sampler.json").read_text("utf-8"))
    chat = load_tokenizer(ModelConfig(path=str(folder)), str(folder), settings["time"])
    model: Any = None
    for line in sys.stdin:
        number = int(line)
        weights = folder / f"weights-{number}"
        if model is None:
            model = new_model(folder, weights, settings)
            mask_unknown_ids(model, token_count(chat.tokenizer))
        load_weights(model, weights)
        shutil.rmtree(weights)
        request = folder / f"request-{number}.json"
        asked = json.loads(request.read_text("utf-8"))
        request.unlink()
        options = asked["sampling"]
        sampling = SamplingParams(**options | {"stop": tuple(options["stop"])})
        found = hf(model, asked["prompts"], asked["seeds"], sampling, chat, step=settings["step"])
        rows = [list(asdict(one).values()) for one in found]
        (folder / f"answer-{number}.json").write_text(json.dumps(rows), "utf-8")
        print(number, file=answers, flush=True)


def new_model(folder: Path, weights: Path, settings: dict[str, Any]) -> Any:
    """The model of the folder's config without its weights, in the dtype of the first weights that were sent."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with safe_open(weights / "000000.safetensors", "pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    with no_init_weights(), torch.device(settings["device"]):
        model = kind.from_config(config, dtype=dtype, attn_implementation=settings["attention"])
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


@torch.no_grad()
def load_weights(model: Any, folder: Path) -> None:
    """Copy the weights of a folder into a model. Tied weights come under one name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = set()
    for path in folder.iterdir():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                parameters[name].copy_(file.get_tensor(name))
                filled.add(parameters[name].data_ptr())
    empty = [name for name, parameter in parameters.items() if parameter.data_ptr() not in filled]
    if empty:
        raise RuntimeError(f"no weights were sent for {empty[:3]}")


if __name__ == "__main__":
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to all processes; the rank still needs this one
    torch.set_flush_denormal(True)  # as the trainer; see rlhf.distributed.start
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not be read as a reply
    main(Path(sys.argv[1]), answers)
