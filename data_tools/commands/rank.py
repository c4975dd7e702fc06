"""`rlhf data rank`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from data_tools.annotate import terminal
from data_tools.commands.common import Candidates, Json
from data_tools.ranking_page import merge as merging
from data_tools.ranking_page import server
from data_tools.ranking_page.page import Settings, share
from data_tools.ranking_page.votes import MODES, annotator_name
from rlhf.core import console
from rlhf.core.errors import UserError
from rlhf.data.schema import BadRecord

Mode = Enum("Mode", {name: name for name in MODES}, type=str)  # type: ignore[misc]


def rank_command(
    context: typer.Context,
    candidates: Candidates,
    *,
    annotator: str | None = None,
    out: Path | None = None,
    web: bool = False,
    share_file: Annotated[Path | None, typer.Option("--share")] = None,
    merge: list[Path] | None = None,
    replace: bool = False,
    mode: Mode = Mode.rank,  # type: ignore[attr-defined]
    per_item: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    as_json: Json = False,
) -> None:
    """Rank proposals at the terminal, or in a browser (--web, --share). Each ranking is saved at once; rerun to
    continue.

    Args:
        annotator (NAME): Who ranks. Needed at the terminal; with --share, filled in on the page.
        out: The JSONL file; by default, next to CANDIDATES, rankings-NAME.jsonl, or in a browser rankings-web.jsonl.
        web: Serve a page on this machine for any number of annotators.
        share_file (FILE.html): Write the page as a file that works without a server.
        merge (RESULT.json): Add what such a page has saved; may be repeated.
        replace: With --merge: also results that share prompts, and no vote, with what is there.
        mode: On the page: order all answers, or choose only the best and the worst.
        per_item (N): With --web: rankings wanted of each prompt; by default, one by every annotator.
        seed: On the page: shuffles the answers.
        port: With --web; 0 takes the last one, or any.
    """
    _check_ways(context, web=web, share=share_file is not None, merge=bool(merge))
    if merge:
        found = merging.merge(candidates, merge, out, replace)
        server.show(found)
    elif share_file is not None:
        found = _share(candidates, share_file, annotator or "", mode.value, seed)
    elif web:
        found = server.rank_in_browser(candidates, out, mode=mode.value, seed=seed, per_item=per_item, port=port)
        server.show(found)
    else:
        if annotator is None:
            remedy = "Name yourself with --annotator, or rank in a browser with --web."
            raise UserError("--annotator: is missing", "Rankings say who made them.", remedy)
        found = terminal.rank(candidates, _checked(annotator), out)
    if as_json:
        console.print_json(found)


WAYS = {
    "": ("annotator", "out"),
    "--web": ("out", "mode", "per_item", "seed", "port"),
    "--share": ("annotator", "mode", "seed"),
    "--merge": ("out", "replace"),
}
"""Way of ranking -> the options that it takes, besides those of all."""


def _check_ways(context: typer.Context, **chosen: bool) -> None:
    """Refuse two ways of ranking at once, and options that the way does not take.

    Raises:
        UserError: See above.
    """
    ways = [f"--{name}" for name, given in chosen.items() if given]
    if "--share" in ways and "--web" in ways:
        ways.remove("--web")  # `--web --share FILE` is the page as a file
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)}: one at a time", remedy="Run one command for each.")
    way = ways[0] if ways else ""
    for name in ("annotator", "out", "replace", "mode", "per_item", "seed", "port"):
        given = context.get_parameter_source(name)
        if name not in WAYS[way] and given is not None and given.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            takes = ", ".join(way or "the terminal" for way, names in WAYS.items() if name in names)
            raise UserError(f"{option}: has no effect {f'with {way}' if way else 'at the terminal'}",
                            remedy=f"Leave it out; it goes with {takes}.")  # fmt: skip


def _share(candidates: Path, file: Path, annotator: str, mode: str, seed: int) -> dict[str, Any]:
    name = _checked(annotator) if annotator else ""
    dataset, items = server.open_items(candidates)
    share(file, Settings(dataset.fingerprint, mode, seed, len(items), name), items)
    console.say(f"{len(items):,} prompts -> {file}. Send it to annotators; they send back the result that it saves:")
    console.say(f"  rlhf data rank {quote(str(candidates))} --merge RESULT.json")
    return {"share": str(file), "items": len(items)}


def _checked(annotator: str) -> str:
    """The name as it is kept.

    Raises:
        UserError: It is empty, too long, or has characters that cannot be seen.
    """
    try:
        return annotator_name(annotator)
    except BadRecord as fault:
        raise UserError(f"--{fault}", "Rankings say who made them.", fault.remedy) from None
