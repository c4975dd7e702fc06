"""The model card of an exported run, in the hub's format: a YAML header, how to load it, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.core.console import format_number
from rlhf.core.lazy import lazy
from rlhf.rollout.types import SamplingParams
from rlhf.runs.run import is_run, read_run

if TYPE_CHECKING:
    import huggingface_hub
else:
    huggingface_hub = lazy("huggingface_hub")

MARK = "Made with rlhf-rankings"
"""Stands in every card; what has no such card is no export of ours and never replaced by one."""
SUMMARIES = {
    "sft": "A policy instruction-tuned on demonstrations that people wrote.",
    "reward": "A reward model that learned from human rankings: it gives an answer a score, higher = better.",
    "ppo": "A policy trained with PPO against a reward, starting from an instruction-tuned policy.",
    "critic": "The critic of a PPO run: at every token of an answer it foretells the reward that is still to come.",
}
BOOKKEEPING = ("run", "timeout_seconds", "checkpoints", "log", "deepspeed", "data", "reference")
"""Keys of a stage's config that say nothing about the model."""


# ---- lineage -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ancestor:
    """One stage of a run's lineage, or the model at its beginning."""

    name: str
    """The run's path as it was named, or the model's."""
    stage: str | None = None
    """None for a model that is no run of ours."""
    info: dict[str, Any] = field(default_factory=dict)
    """Its run.json; empty where the run is not there any more."""
    fingerprint: str | None = None
    """SHA-256 of its result, as the child noted it."""
    folder: Path | None = None
    note: str = ""


def lineage(run: Path) -> list[Ancestor]:
    """A run and all that it came from, parents before children, each once.

    Parents are looked for where the child's run.json says, then beside the child. One whose result has another
    fingerprint than the child noted is not followed: it is another model by now.
    """
    info = read_run(run)
    found: dict[str, Ancestor] = {}
    _walk(Ancestor(_public(str(run)), info["stage"], info, info.get("model_fingerprint"), run), found)
    return list(found.values())


def _walk(child: Ancestor, found: dict[str, Ancestor]) -> None:
    for noted in child.info.get("parents", []):
        parent = _parent(noted, child.folder)
        if parent.name not in found:
            _walk(parent, found)
    found[child.name] = child


def _parent(noted: dict[str, Any], child: Path | None) -> Ancestor:
    path, stage, fingerprint = noted["path"], noted.get("stage"), noted.get("fingerprint")
    name = _public(path)
    if stage is None:
        return Ancestor(name)
    places = [Path(path), *([child.resolve().parent / Path(path).name] if child else [])]
    runs = [place for place in places if is_run(place)]
    for place in runs:
        info = read_run(place)
        if info.get("model_fingerprint") == fingerprint:
            return Ancestor(name, stage, info, fingerprint, place)
    note = "has been trained anew since" if runs else "not there any more"
    return Ancestor(name, stage, fingerprint=fingerprint, note=note)


def _public(path: str) -> str:
    """A path without the folders above, which are nobody else's business; relative paths and hub names as they are."""
    return Path(path).name if path.startswith(("/", "~", "..")) else path


def base_model(ancestors: Sequence[Ancestor]) -> str | None:
    """The hub name of the model that the first stage started from, where it is one."""
    name = next((a.name for a in ancestors if a.stage is None), "")
    return name if name.count("/") == 1 and not name.startswith(".") and not Path(name).exists() else None


# ---- what the card says ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What a model card needs to know."""

    run: Path
    path: str
    """What the loading snippet names: the hub name, or the folder."""
    format: str
    """A row of the table of exporters."""
    end_token: str
    """The token that ends an answer."""
    stop_tokens: Sequence[str]
    sampling: SamplingParams
    """How the policy sampled in training, or the plain distribution."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation: score = (logit - mean) / std."""
    folded: bool = False
    """Whether the scale is in the weights already."""
    adapter_base: str | None = None
    """The model that an adapter is loaded into."""
    license: str | None = None
    stage: str = "ppo"
    """sft, reward, ppo or critic."""

    @property
    def scalar(self) -> bool:
        """Whether the model gives a number instead of text."""
        return self.stage in ("reward", "critic")


def render(card: Card) -> str:
    """The card's text, Markdown with a YAML header."""
    ancestors = lineage(card.run)
    name = card.path.rstrip("/").split("/")[-1]
    parts = [
        f"---\n{_header(card, ancestors)}\n---",
        f"# {name}",
        f"{SUMMARIES[card.stage]} {MARK} {version('rlhf-rankings')}, run `{_public(str(card.run))}`.",
        "## How to load\n\n" + "\n\n".join(_loading(card)),
        "## Lineage\n\n" + _lineage_table(ancestors),
        "## Data\n\n" + _data_table(ancestors),
        "## Results\n\n" + _results_table(ancestors),
        "## Training\n\n" + _training(card.run),
        "## Packages\n\n" + _table(("package", "version"), read_run(card.run)["packages"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _header(card: Card, ancestors: Sequence[Ancestor]) -> str:
    tags = ["rlhf", card.stage if card.stage != "reward" else "reward-model", "human-feedback"]
    base = base_model(ancestors)
    if card.adapter_base is not None and not Path(card.adapter_base).exists():
        base = card.adapter_base
    data = huggingface_hub.ModelCardData(
        license=card.license or "unknown",
        base_model=base,
        library_name="peft" if card.adapter_base else "transformers",
        pipeline_tag="text-classification" if card.scalar else "text-generation",
        tags=tags,
    )
    return str(data.to_yaml())


def _loading(card: Card) -> Iterator[str]:
    if card.scalar:
        yield _snippet(card, REWARD_SNIPPET)
        yield _scale_text(card)
    else:
        yield _snippet(card, POLICY_SNIPPET)
        yield "An answer ends with one of: " + ", ".join(f"`{token}`" for token in card.stop_tokens) + "."
        if card.sampling.stop:
            strings = ", ".join(f"`{json.dumps(string)}`" for string in card.sampling.stop)
            yield f"In training it also ended after {strings}: pass `stop_strings` and `tokenizer` to `generate`."
    if card.adapter_base is not None:
        yield f"This is an adapter: it works only on `{card.adapter_base}`, with the weights that it was trained on."


def _scale_text(card: Card) -> str:
    mean, std = card.scale
    read = "Only the token that ends an answer is read, so nothing may follow it."
    trained = "The training loss saw the scores before normalisation."
    if card.stage == "critic":
        read = "The last token is read: the number is the value of the text that ends there."
        trained = "The training loss saw them normalised."
    if card.folded:
        text = f"The normalisation of the scores (mean {mean:.6g}, standard deviation {std:.6g}) is in the weights."
    else:
        text = f"The model gives raw logits. Scores are normalised: `score = (logit - {mean!r}) / {std!r}`; the "
        text += (
            "constants are `reward_mean` and `reward_std` in `config.json`."
            if not card.adapter_base
            else ("constants are no part of the adapter.")
        )
    return f"{text} {read} {trained}"


def _snippet(card: Card, template: str) -> str:
    kind = "AutoModelForSequenceClassification" if card.scalar else "AutoModelForCausalLM"
    labels = ", num_labels=1" if card.scalar else ""
    load = f"model = {kind}.from_pretrained(path)"
    peft = ""
    if card.adapter_base is not None:
        peft = "from peft import PeftModel\n"
        load = f"model = {kind}.from_pretrained({card.adapter_base!r}{labels})\n"
        load += "model.config.pad_token_id = None\n" if card.scalar else ""
        load += "model = PeftModel.from_pretrained(model, path).eval()"
    mean, std = (0.0, 1.0) if card.folded else card.scale
    score = "logit" if (mean, std) == (0.0, 1.0) else f"(logit - {mean!r}) / {std!r}"
    drawn = card.sampling
    options = f"do_sample=True, temperature={drawn.temperature}, top_k={drawn.top_k}, top_p={drawn.top_p}"
    code = template.format(
        peft=peft, kind=kind, path=repr(card.path), load=load, end=repr(card.end_token), score=score,
        tokens=drawn.max_new_tokens, options=options,
    )  # fmt: skip
    return f"```python\n{code}```"


POLICY_SNIPPET = """\
{peft}from transformers import {kind}, AutoTokenizer

path = {path}
tokenizer = AutoTokenizer.from_pretrained(path)
{load}

messages = [{{"role": "user", "content": "Tell me a story."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={tokens}, {options})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

REWARD_SNIPPET = """\
import torch
{peft}from transformers import {kind}, AutoTokenizer

path = {path}
tokenizer = AutoTokenizer.from_pretrained(path)
{load}

messages = [
    {{"role": "user", "content": "Tell me a story."}},
    {{"role": "assistant", "content": "Once upon a time there was an owl."}},
]
end = {end}
text = tokenizer.apply_chat_template(messages, tokenize=False)
text = text.rstrip().removesuffix(end) + end  # the score is read at the token that ends the answer
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    logit = model(**inputs).logits[0, 0].item()
print({score})
"""


# ---- tables ------------------------------------------------------------------------------------------------------


def _lineage_table(ancestors: Sequence[Ancestor]) -> str:
    rows = []
    for a in ancestors:
        code = str(a.info.get("git") or "")
        rows.append((a.stage or "start", f"`{a.name}`", _short(a.fingerprint) or a.note, _short(code, 12)))
    return _table(("stage", "name", "SHA-256 of the result", "commit"), rows) + "".join(
        f"\n\n`{a.name}` {a.note}, so what it came from cannot be told." for a in ancestors if a.note
    )


def _data_table(ancestors: Sequence[Ancestor]) -> str:
    rows = [
        (a.stage, f"`{_public(d['path'])}`", d["kind"], _short(d["fingerprint"]))
        for a in ancestors
        for d in a.info.get("data", [])
    ]
    return _table(("stage", "dataset", "records", "SHA-256"), rows)


def _results_table(ancestors: Sequence[Ancestor]) -> str:
    """The figures that each stage kept in its run.json under `metrics`."""
    rows = [
        (a.stage, name, format_number(value))
        for a in ancestors
        for name, value in a.info.get("metrics", {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    return _table(("stage", "figure", "value"), rows)


def _training(run: Path) -> str:
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    kept = {key: value for key, value in config.items() if key not in BOOKKEEPING}
    return f"```yaml\n{yaml.safe_dump(_without_folders(kept), sort_keys=False, allow_unicode=True)}```"


def _without_folders(value: Any) -> Any:
    """A config whose `path`s are made public."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _public(item) if key == "path" else _without_folders(item) for key, item in value.items()}


def _short(digest: str | None, digits: int = 16) -> str:
    return f"`{digest[:digits]}`" if digest else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return text if len(lines) > 2 else "Nothing is noted."
