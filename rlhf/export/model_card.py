"""The model card of an exported run, in the hub's format; the text is in model_card.md.jinja."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rlhf.core.console import format_number, printable
from rlhf.data.chat_tokenizer import EncoderDecoderTokenizer
from rlhf.export.formats import Exported, Source
from rlhf.runs.run import is_run, read_run
from rlhf.runs.run_config import read_run_config

MARK = "Made with rlhf-rankings"
"""Part of every card. A folder whose card lacks it is not an export of this project and is never replaced."""
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
SUMMARIES = {
    "sft": "A policy instruction-tuned on demonstrations that people wrote.",
    "reward": "A reward model trained on human rankings: it gives an answer a score, higher = better.",
    "dpo": "A policy trained by direct preference optimisation on human rankings, from an instruction-tuned policy.",
    "ppo": "A policy trained with PPO against a reward, starting from an instruction-tuned policy.",
    "critic": "The critic of a PPO run: at every token of an answer it predicts the reward that is still to come.",
}
BOOKKEEPING = ("run", "timeout_seconds", "checkpoints", "log", "deepspeed", "data")
"""Keys of a stage's config that say nothing about the model."""


def model_card(source: Source, done: Exported, path: str, license: str | None = None) -> str:
    """The card, Markdown with a YAML header.

    Args:
        source: What was exported.
        done: What was written.
        path: The path in the loading snippet: the hub name, or the folder.
        license: A licence identifier of the hub.
    """
    from huggingface_hub import ModelCard, ModelCardData  # slow, and every command that exports imports this module

    run, stage, chat, base = source.run, source.stage, source.chat, done.adapter_base
    ancestors, scalar, (mean, std) = lineage(run), stage in ("reward", "critic"), done.scale
    encoder_decoder, tokens = isinstance(chat, EncoderDecoderTokenizer), chat.tokenizer.convert_ids_to_tokens
    if done.own_class:
        model_class = "AutoModel"
    elif scalar:
        model_class = "AutoModelForSequenceClassification"
    else:
        model_class = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    text_task = "text2text-generation" if encoder_decoder else "text-generation"
    local_base = base is None or base.startswith((".", "/", "~")) or Path(base).exists()
    config = read_run_config(run)
    kept = {key: _without_folders(value) for key, value in config.items() if key not in BOOKKEEPING}
    training = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    sampling = {"max_new_tokens": 128, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop": []}
    more, less = chat.renderer.other_than_special()
    changes = (f" {sign} {{{', '.join(map(repr, some))}}}" for sign, some in (("|", more), ("-", less)) if some)
    # The hub's EvalResult is not used: it must name a dataset of the hub, and the data of a run are local.
    header = ModelCardData(
        license=license or "unknown",
        base_model=base_model(ancestors) if local_base else base,
        library_name="peft" if base and not done.bottleneck else "transformers",
        pipeline_tag="text-classification" if scalar else text_task,
        tags=["rlhf", "reward-model" if stage == "reward" else stage, "human-feedback"],
    )
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        name=path.rstrip("/").split("/")[-1],
        summary=SUMMARIES[stage], mark=MARK, version=version("rlhf-rankings"),
        run=_code(public_path(str(run))),
        scalar=scalar, stage=stage, bottleneck=done.bottleneck, folded=done.folded, mean=mean, std=std,
        model_class=model_class, own_class=done.own_class, encoder_decoder=encoder_decoder,
        path=repr(path), adapter_base=repr(base) if base else None,
        lead=f"{chat.lead!r} + " if chat.lead else "", template_time=read_run(run).get("template_time"),
        control="".join(changes), anchored=chat.anchored, end_token=repr(tokens(chat.end_id)),
        score="logit" if done.folded or done.scale == (0.0, 1.0) else f"(logit - {mean!r}) / {std!r}",
        stop_tokens=tokens(list(done.stop_ids)), sampling=sampling | config.get("rollout", {}),
        lineage=[
            (a.stage or "start", _code(a.name), _short(a.fingerprint) or a.note, _short(a.info.get("git"), 12))
            for a in ancestors
        ],
        missing=[(_code(a.name), a.note) for a in ancestors if a.note],
        data=[
            (a.stage, _code(public_path(d["path"])), d["kind"], _short(d["fingerprint"]))
            for a in ancestors for d in a.info.get("data", [])
        ],
        results=[
            (a.stage, name, format_number(value))
            for a in ancestors for name, value in a.info.get("metrics", {}).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ],
        training=training, fence="`" * max(3, 1 + max(map(len, re.findall("`+", training)), default=0)),
        packages=list(ancestors[-1].info["packages"].items()),
    )  # fmt: skip
    return f"{card}\n"


def _without_folders(value: Any) -> Any:
    """A config value in which every `path` is public."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: public_path(item) if key == "path" else _without_folders(item) for key, item in value.items()}


def _code(text: str) -> str:
    """A Markdown code span that its text cannot end: on one line, without backticks and control characters."""
    return "`" + printable(" ".join(text.split())).replace("`", "'") + "`"


def _short(digest: str | None, digits: int = 16) -> str:
    return f"`{digest[:digits]}`" if digest else ""


# ---- lineage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ancestor:
    """One stage of a run's lineage, or the model at its beginning."""

    name: str
    """The path of the run or model without the folders above it, or a hub name."""
    stage: str | None = None
    """None for a model that is not a run of this project."""
    info: dict[str, Any] = field(default_factory=dict)
    """Its run.json; empty if the run is not available."""
    fingerprint: str | None = None
    """SHA-256 of its result, as recorded by the child."""
    folder: Path | None = None
    note: str = ""
    """Why the run is not available."""


def lineage(run: Path) -> list[Ancestor]:
    """A run and all its ancestors, parents before children, each once.

    A parent is looked for at the path in the child's run.json, then in the child's folder. A parent whose result has
    another fingerprint than the child recorded is not followed: it was trained again.
    """
    info = read_run(run)
    found: dict[str, Ancestor] = {}
    _walk(Ancestor(public_path(str(run)), info["stage"], info, info.get("model_fingerprint"), run), found)
    return list(found.values())


def _walk(child: Ancestor, found: dict[str, Ancestor]) -> None:
    for recorded in child.info.get("parents", []):
        parent = _parent(recorded, child.folder)
        if parent.name not in found:
            _walk(parent, found)
    found[child.name] = child


def _parent(recorded: dict[str, Any], child: Path | None) -> Ancestor:
    path, stage, fingerprint = recorded["path"], recorded.get("stage"), recorded.get("fingerprint")
    name = public_path(path)
    if stage is None:
        return Ancestor(name)
    places = [Path(path), *([child.resolve().parent / Path(path).name] if child else [])]
    runs = [place for place in places if is_run(place)]
    for place in runs:
        info = read_run(place)
        if info.get("model_fingerprint") == fingerprint:
            return Ancestor(name, stage, info, fingerprint, place)
    note = "was trained again since" if runs else "no longer exists"
    return Ancestor(name, stage, fingerprint=fingerprint, note=note)


def public_path(path: str) -> str:
    """The last part of a path outside the working folder, to keep private folder names out of a card."""
    return Path(path).name if path.startswith(("/", "~", "..")) else path


def base_model(ancestors: Sequence[Ancestor]) -> str | None:
    """The hub name of the model that the first stage started from; None if it is a local folder."""
    name = next((a.name for a in ancestors if a.stage is None), "")
    return name if name.count("/") == 1 and not name.startswith(".") and not Path(name).exists() else None
