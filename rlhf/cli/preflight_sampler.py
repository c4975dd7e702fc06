"""Checks of `rollout.sampler` before a PPO run starts: the package, device or server that it needs, and ZeRO."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys

from rlhf.core.errors import UserError, need_package
from rlhf.core.table import Pick


def check_sampler(pick: Pick) -> str:
    """The sampler's name; the package and the device that it needs must be there."""
    if pick.name == "vllm-server":
        return _sampler_server(pick)
    package = pick.row.traits.get("package")
    if package:
        remedy = f"pip install {package}, in an environment of its own, since it pins torch; or use hf."
        need_package(package, f"rollout.sampler: {pick.name}", remedy)
    step = pick.options.get("step", "eager")
    recorded = step == "cuda_graph"
    if package or recorded:
        import torch  # slow, so only for configs that need it

        on_cpu = package is not None and _is_cpu_build(package)
        if not torch.cuda.is_available() and not on_cpu:
            raise UserError(
                f"rollout.sampler: {'step `cuda_graph`' if recorded else pick.name} needs a CUDA device, and this"
                " machine shows none",
                remedy="Use the sampler hf, with its eager step.",
            )
    return pick.name if step == "eager" else f"{pick.name}, step {step}"


def refuse_compiled(compiles: bool, sampler: Pick) -> None:
    """Refuse what does not work under ZeRO stage 3: `compile`, and steps of a sampler that are compiled or recorded.

    Raises:
        UserError: One of them is given.
    """
    step = sampler.options.get("step", "eager")
    for option in ["compile"] * compiles + [f"rollout.sampler: step `{step}`"] * (step != "eager"):
        raise UserError(
            f"{option}: compiled or recorded layers do not work under ZeRO stage 3",
            "Stage 3 gathers and releases the weights of each layer between its operations.",
            "Leave it out, or use a DeepSpeed file of a lower stage.",
        )


def _sampler_server(pick: Pick) -> str:
    """Where completions are sampled; the server must answer, or its environment must have vLLM."""
    url, python = pick.options["url"], pick.options["python"] or sys.executable
    if url is not None:
        defaults = pick.row.options(url=url)
        given = [name for name, value in pick.options.items() if value != getattr(defaults, name)]
        if given:
            raise UserError(
                f"rollout.sampler: {', '.join(given)} cannot be set with url",
                remedy="They belong to the server: give them to `rlhf serve-sampler`.",
            )
        from rlhf.rollout.vllm_client import connect  # imports torch

        return f"{pick.name} at {url}, vLLM with {connect(url).call('GET', '/health')['dtype']}"
    seek = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if shutil.which(python) is None or subprocess.run([python, "-c", seek], check=False).returncode:
        raise UserError(
            f"rollout.sampler: {python} has no vLLM",
            remedy="Install it in an environment of its own, and name its interpreter: "
            "rollout.sampler={name: vllm-server, python: FOLDER/bin/python}.",
        )
    return f"{pick.name}, started by this run"


def _is_cpu_build(package: str) -> bool:
    """Whether a package was built for CPUs: its distribution is called `...-cpu`, or its version `...+cpu`."""
    names = set(importlib.metadata.packages_distributions().get(package, []))
    return any(name.endswith("-cpu") or importlib.metadata.version(name).endswith("+cpu") for name in names)
