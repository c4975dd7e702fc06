"""`rlhf export`: a finished run as a folder that transformers loads, with a model card; can also push it to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf.cli import options
from rlhf.core.console import print_json, say, warn
from rlhf.core.errors import UserError, blame
from rlhf.export.export import ROLES, export
from rlhf.export.formats import EXPORTERS
from rlhf.export.hub import check_hub, push

FORMATS = "; ".join(f"{row.name}: {row.summary.rstrip('.')}" for row in EXPORTERS)


def command(
    run: Path,
    *,
    out: Path,
    format: Annotated[str, typer.Option(help=FORMATS)] = "hf",
    role: Annotated[str, typer.Option(metavar="|".join(ROLES))] = "policy",
    dtype: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Export a finished run in Hugging Face format, with tokenizer, chat template, stop tokens and model card.

    Args:
        run (RUN): The folder of a finished run.
        out: Output folder.
        role: Which model of a PPO run; critic only with model.sharing `shared`.
        dtype: float32, bfloat16 or float16, of the weights; by default as in the run.
        license (ID): The model's licence, such as apache-2.0, for the card.
        overwrite: Replace an earlier export.
        push_to_hub (USER/MODEL): Also upload the folder to the Hugging Face hub.
        private: Make the hub repository private.
    """
    with blame("--format"):
        exporter = EXPORTERS.pick({"name": format} | ({} if dtype is None else {"dtype": dtype}))
    if role not in ROLES:
        raise UserError(f"--role {role}: no such role", remedy=f"One of: {', '.join(ROLES)}.")
    if private and push_to_hub is None:
        raise UserError("--private: only a folder that is pushed can be private", remedy="Add --push-to-hub.")
    if push_to_hub is not None:
        check_hub(push_to_hub)
        if license is None:
            warn("the card says `license: unknown`; name one with --license")
    facts = export(
        run, out, exporter, role=role, name=push_to_hub, license=license, overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"Exported: {out}  {facts['parameters']:,} parameters, {facts['dtype']}, {size / 1e6:,.1f} MB")
    if facts["stop_tokens"]:
        say(f"Answers end with: {', '.join(facts['stop_tokens'])}")
    if push_to_hub is not None:
        facts["pushed"] = push(out, push_to_hub, private)
        say(f"Pushed: {facts['pushed']}")
    if as_json:
        print_json(facts)
