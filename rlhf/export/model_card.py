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


@dataclass(frozen=True)
class CardFacts:
    """What a model card says besides what the run's folder holds."""

    run: Path
    path: str
    """The path in the loading snippet: the hub name, or the folder."""
    lead: str
    """What the chat template writes between the generation prompt and an answer."""
    end_token: str
    """The token that ends an answer."""
    stop_tokens: Sequence[str]
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation: score = (logit - mean) / std."""
    folded: bool = False
    """Whether the weights include the scale."""
    adapter_base: str | None = None
    """The model that an adapter is loaded into."""
    bottleneck: bool = False
    """Whether that adapter is one of ours, which PEFT does not know."""
    license: str | None = None
    stage: str = "ppo"
    """sft, reward, dpo, ppo or critic."""
    own_class: bool = False
    """Whether body and head of a scalar model load separately."""
    encoder_decoder: bool = False
    control: tuple[Sequence[str], Sequence[str]] = ((), ())
    """Control tokens that are not special, and special tokens that text may spell."""
    anchored: bool = False
    """Whether the tokenizer begins any text with a space."""


def model_card(facts: CardFacts) -> str:
    """The card, Markdown with a YAML header."""
    from huggingface_hub import ModelCard, ModelCardData  # slow, and every command that exports imports this module

    ancestors, scalar = lineage(facts.run), facts.stage in ("reward", "critic")
    mean, std = facts.scale
    plain = facts.folded or facts.scale == (0.0, 1.0)
    adapter_base = facts.adapter_base or "."
    local_base = adapter_base.startswith((".", "/", "~")) or Path(adapter_base).exists()
    config = read_run_config(facts.run)
    kept = {key: _without_folders(value) for key, value in config.items() if key not in BOOKKEEPING}
    training = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    # The hub's EvalResult is not used: it must name a dataset of the hub, and the data of a run are local.
    sampling = {"max_new_tokens": 128, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "stop": []} | config.get(
        "rollout", {}
    )
    header = ModelCardData(
        license=facts.license or "unknown",
        base_model=base_model(ancestors) if local_base else facts.adapter_base,
        library_name="peft" if facts.adapter_base and not facts.bottleneck else "transformers",
        pipeline_tag="text-classification" if scalar else _text_task(facts),
        tags=["rlhf", "reward-model" if facts.stage == "reward" else facts.stage, "human-feedback"],
    )
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        name=facts.path.rstrip("/").split("/")[-1],
        summary=SUMMARIES[facts.stage], mark=MARK, version=version("rlhf-rankings"),
        run=_code(public_path(str(facts.run))),
        scalar=scalar, stage=facts.stage, bottleneck=facts.bottleneck, folded=facts.folded, mean=mean, std=std,
        model_class=_model_class(facts, scalar), own_class=facts.own_class, encoder_decoder=facts.encoder_decoder,
        path=repr(facts.path), adapter_base=repr(facts.adapter_base) if facts.adapter_base else None,
        lead=f"{facts.lead!r} + " if facts.lead else "", template_time=read_run(facts.run).get("template_time"),
        control=_set_changes(*facts.control), anchored=facts.anchored, end_token=repr(facts.end_token),
        score="logit" if plain else f"(logit - {mean!r}) / {std!r}",
        stop_tokens=facts.stop_tokens, sampling=sampling,
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


def _model_class(facts: CardFacts, scalar: bool) -> str:
    """The auto class of transformers that loads the export."""
    if facts.own_class:
        return "AutoModel"
    if scalar:
        return "AutoModelForSequenceClassification"
    return "AutoModelForSeq2SeqLM" if facts.encoder_decoder else "AutoModelForCausalLM"


def _text_task(facts: CardFacts) -> str:
    """The hub's name for what a policy does."""
    return "text2text-generation" if facts.encoder_decoder else "text-generation"


def _set_changes(more: Sequence[str], less: Sequence[str]) -> str:
    """Python code that adds tokens to a set and takes some out."""
    return "".join(
        f" {sign} {{{', '.join(map(repr, tokens))}}}" for sign, tokens in (("|", more), ("-", less)) if tokens
    )


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
