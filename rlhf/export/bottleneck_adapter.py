"""Put the bottleneck adapter of an export into a model of transformers. Copied into exports; needs nothing of rlhf.

    model = AutoModelForCausalLM.from_pretrained(base)
    load_bottleneck(model, folder)

After some modules of the model it adds up(activation(down(out))) to their output (Houlsby et al. 2019).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ACTIVATIONS: dict = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def load_bottleneck(model, folder):
    """Add the adapter in `folder` to `model`, in place, and load the head if the folder has one.

    Args:
        model: The base that the adapter was trained on, as transformers loads it.
        folder: With adapter_config.json and adapter_model.safetensors.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    activation = ACTIVATIONS[config["activation"]]
    for name in config["target_modules"]:
        keys = [f"{name}.bottleneck_{part}" for part in ("down.weight", "down.bias", "up.weight", "up.bias")]
        down, down_bias, up, up_bias = (weights.pop(key) for key in keys)

        def add(module, inputs, output, down=down, down_bias=down_bias, up=up, up_bias=up_bias):
            out = output[0] if isinstance(output, tuple) else output
            parts = [part.to(out.device) for part in (down, down_bias, up, up_bias)]
            hidden = activation(torch.nn.functional.linear(out.to(down.dtype), *parts[:2]))
            out = out + torch.nn.functional.linear(hidden, *parts[2:]).to(out.dtype)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        model.get_submodule(name).register_forward_hook(add)
    if weights:  # the head of a classifier
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{folder}: the model has no {', '.join(unknown)}")
    return model
