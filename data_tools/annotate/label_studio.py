"""Label Studio: proposals out to the annotators, their rankings back, through label-studio-sdk.

One task holds one proposal. Its answers are in the proposal's order and do not show who wrote them; authors, split and
group are restored from the proposals when the rankings are pulled. The key is read from the environment only.
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

from data_tools.importers import IMPORTERS
from data_tools.io.derive import Derivation
from rlhf.core import console
from rlhf.core.command_line import without_credentials
from rlhf.core.errors import UserError
from rlhf.core.files import write_json
from rlhf.data.jsonl import Reject
from rlhf.data.schema import BadRecord, Candidate, Proposal, Ranking
from rlhf.data.store import Dataset, open_dataset
from rlhf.data.writer import check_new

KEY = "LABEL_STUDIO_API_KEY"
CONTROL, RANKED = "ranking", "ranked"
EXPORT, STATE = "label-studio.jsonl", "pull.json"
"""In the folder of pulled rankings: the tasks as they were exported, and what the next pull compares with."""
AT_ONCE = 200
PLACES = ("1st, best", "2nd", "3rd")
CONFIG = """\
<View>
  <Style>
    .rank-prompt {{ max-height: 40vh; overflow-y: auto; margin-bottom: 12px; white-space: pre-wrap; }}
    .htx-ranker-item p {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
    .htx-ranker-item p:last-child {{ display: none; }}
  </Style>
  <View className="rank-prompt"><Text name="prompt" value="$prompt"/></View>
  <Header value="{instruction}" size="5"/>
  <List name="answers" value="$items" title="Answers"/>
  <Ranker name="{control}" toName="answers">{buckets}</Ranker>
</View>
"""
"""The labelling interface. What is not displayed is the item's id, which the editor shows below its text."""


# ---- what annotators see -----------------------------------------------------------------------------------------


def task(proposal: Proposal) -> dict[str, Any]:
    """The data of a proposal's task."""
    prompt = proposal.messages[0].content
    if len(proposal.messages) > 1:
        prompt = "\n\n".join(f"{message.role.upper()}: {message.content}" for message in proposal.messages)
    items = [
        {"id": str(index), "title": f"Answer {index + 1}", "body": candidate.text}
        for index, candidate in enumerate(proposal.candidates)
    ]
    return {"proposal": proposal.id, "messages": proposal.chat, "prompt": prompt, "items": items}


def label_config(places: int | None = None) -> str:
    """The labelling interface: the prompt, the answers on the left, the ranking on the right.

    Args:
        places: How many places there are, each of which may take several answers: ties. None for one ordered list.
    """
    instruction = "Drag every answer from the left into the ranking on the right, best on top."
    titles = {RANKED: "Your ranking, best first"}
    if places is not None:
        instruction = "Drag every answer from the left to its place on the right. Equally good answers share a place."
        titles = {f"place-{n}": PLACES[n - 1] if n <= len(PLACES) else f"{n}th" for n in range(1, places + 1)}
    buckets = "".join(f'<Bucket name="{name}" title="{title}"/>' for name, title in titles.items())
    return CONFIG.format(instruction=instruction, control=CONTROL, buckets=buckets)


def _buckets(config: str) -> list[str]:
    """The names of the ranking's buckets, best first."""
    try:
        rankers = [ranker for ranker in ET.fromstring(config).iter("Ranker") if ranker.get("name") == CONTROL]
    except ET.ParseError:
        rankers = []
    return [bucket.get("name", "") for bucket in rankers[0].iter("Bucket")] if rankers else []


# ---- the server --------------------------------------------------------------------------------------------------


@contextmanager
def _server(url: str) -> Iterator[Any]:
    """A client of the server; its errors become UserErrors, without the credentials that the URL may hold."""
    shown = without_credentials(url)
    try:
        import httpx
        from label_studio_sdk import LabelStudio
        from label_studio_sdk.core.api_error import ApiError
    except ImportError as error:
        raise UserError(
            f"label-studio-sdk cannot be imported ({error})", remedy="pip install 'rlhf-rankings[label-studio]'"
        ) from None
    key = os.environ.get(KEY, "")
    if not key:
        remedy = f"In Label Studio: Account & Settings, Personal Access Token (or Legacy Token); then export {KEY}=..."
        raise UserError(f"{KEY} is not set", "The key is read from the environment alone.", remedy)
    try:
        yield LabelStudio(base_url=url.rstrip("/"), api_key=key)
    except ApiError as error:
        if error.status_code in (401, 403):
            raise UserError(f"{shown}: the server refuses the key in {KEY}", remedy="Take a new key from it.") from None
        if error.status_code == 404:
            raise UserError(f"{shown}: no such project", remedy="Leave --project out to find that of a push.") from None
        raise UserError(
            f"{shown}: the server answers {error.status_code}: {without_credentials(str(error.body))[:500]}"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = "Check --url; start a server with: label-studio start"
        raise UserError(
            f"{shown}: no answer from a Label Studio server: {without_credentials(str(error))}", remedy=remedy
        ) from None


def _mark(dataset: Dataset) -> str:
    """The mark in a project's description that says that it was made for these candidates."""
    return f"rlhf candidates {dataset.fingerprint[:16]}"


def _find(client: Any, dataset: Dataset, project: int | None) -> Any | None:
    """The project: by its number, or the one that was made for these candidates."""
    if project is not None:
        return client.projects.get(project)
    found = [each for each in client.projects.list() if _mark(dataset) in (each.description or "")]
    if len(found) > 1:
        numbers = ", ".join(str(each.id) for each in found)
        raise UserError(f"several projects were made for these candidates: {numbers}", remedy="Name one: --project ID")
    return client.projects.get(found[0].id) if found else None


def _place(url: str, project: int) -> str:
    return f"{without_credentials(url).rstrip('/')}/projects/{project}/data"


def push(
    path: str | Path,
    url: str,
    *,
    project: int | None = None,
    title: str | None = None,
    ties: bool = False,
    annotators: int = 1,
) -> dict[str, Any]:
    """Create or update a project in which people rank the proposals.

    Proposals that the project has already are not sent again, so a push that was interrupted may be repeated.

    Args:
        path: A dataset of proposals.
        url: The server's address.
        project: Its number; None takes the one made for these candidates by an earlier push, or makes one.
        title: The name of a new project.
        ties: Let several answers share a place.
        annotators: How many people rank each task.

    Returns:
        project, url, pushed, already (proposals that were there), proposals.

    Raises:
        UserError: No such dataset, server, project or key, or an interface that is at odds with rankings made in it.
    """
    dataset = open_dataset(path, "proposal")
    proposals = list(dataset.records())
    config = label_config(max((len(p.candidates) for p in proposals), default=2) if ties else None)
    with _server(url) as client:
        found = _find(client, dataset, project)
        if found is None:
            title = (title or f"Rank {Path(path).resolve().name}")[:50]
            settings = {"title": title, "label_config": config, "description": _mark(dataset)}
            found = client.projects.create(**settings, maximum_annotations=annotators, sampling="Sequential sampling")
        elif _buckets(found.label_config or "") != _buckets(config):
            _change(client, found, config)
        there = {(each.data or {}).get("proposal") for each in client.tasks.list(project=found.id)}
        fresh = iter([{"data": task(proposal)} for proposal in proposals if proposal.id not in there])
        pushed = 0
        while chunk := list(islice(fresh, AT_ONCE)):
            client.projects.import_tasks(found.id, request=chunk)
            pushed += len(chunk)
    counts = {"pushed": pushed, "already": len(proposals) - pushed, "proposals": len(proposals)}
    return {"project": found.id, "url": _place(url, found.id), **counts}


def _change(client: Any, project: Any, config: str) -> None:
    if project.total_annotations_number:
        raise UserError(
            f"project {project.id}: its interface has other places than this push would give it",
            f"{project.total_annotations_number} annotations were made in it.",
            "Push with the same --ties as before, or into a new project.",
        )
    client.projects.update(project.id, label_config=config)


# ---- pulling rankings ------------------------------------------------------------------------------------------------


def pull(
    path: str | Path, url: str, out: str | Path, *, project: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Pull the rankings of the proposals, as a dataset that replaces the one of the last pull.

    It holds all rankings in their present state: one that was redone counts once, in its last form; one that was
    deleted or cancelled is gone. Tasks without an annotation and cancelled annotations are counted as rejected.

    Args:
        path: The dataset of proposals that was pushed.
        out: The dataset of rankings to make.
        project: Its number; None takes the one made for these candidates.
        overwrite: Replace a dataset in `out` that is not of an earlier pull.

    Returns:
        project, url, out, read, written, rejected, reasons; and since the last pull into `out`: `new`, `changed`,
        `gone` (annotations).

    Raises:
        UserError: No such dataset, server, project or key, or `out` cannot be written.
    """
    if not (Path(out) / STATE).is_file():
        check_new(out, overwrite)
    dataset = open_dataset(path, "proposal")
    proposals = {proposal.id: proposal for proposal in dataset.records()}
    with _server(url) as client:
        found = _find(client, dataset, project)
        if found is None:
            shown = without_credentials(url)
            raise UserError(
                f"{shown}: no project was made for {path}",
                remedy=f"Push them first: rlhf data label-studio push {quote(str(path))} --url {shown}; "
                "or name it: --project ID",
            )
        tasks = client.projects.exports.as_json(found.id)
        people = {user.id: user.email for user in client.users.list()}
    tasks = sorted((each for each in tasks if each["data"].get("proposal") in proposals), key=lambda each: each["id"])
    before, originals = _state(Path(out) / STATE), _originals(proposals)
    with Derivation(out, "ranking", [dataset], overwrite=True) as made:
        place = made.partial / EXPORT
        redone = [gone for each in tasks for gone in _keep_latest(each, people)]
        place.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in tasks), "utf-8")

        def reject(row: Reject) -> None:
            made.rejects(replace(row, file=str(Path(out) / EXPORT)))

        for record in _rankings(place, _buckets(found.label_config or ""), reject):
            made.write(_restored(record, *originals[record.prompt_id]))
        for gone in redone:
            fault = BadRecord("a later annotation by the same person counts", f"annotation {gone['id']}")
            reject(Reject.of(place, 0, fault, json.dumps(gone, ensure_ascii=False)))
        now = {str(a["id"]): a["updated_at"] for each in tasks for a in each["annotations"] if not a["was_cancelled"]}
        write_json(made.partial / STATE, {"annotations": now})
    since = {"new": len(now.keys() - before), "gone": len(before.keys() - now)}
    since |= {"changed": sum(before.get(key, when) != when for key, when in now.items())}
    return {"project": found.id, "url": _place(url, found.id), **made.summary(), **since}


def _state(path: Path) -> dict[str, str]:
    """Annotation -> when it was last changed, as the last pull found them."""
    try:
        return dict(json.loads(path.read_text("utf-8"))["annotations"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path}: not what a pull wrote: {error!r}", remedy="Delete it, or choose another --out."
        ) from None


def _keep_latest(each: dict[str, Any], people: dict[int, str]) -> list[dict[str, Any]]:
    """Keep each person's last ranking (and what they cancelled) in a task, with their name; return the others."""
    latest: dict[Any, dict[str, Any]] = {}
    annotations = sorted(each["annotations"], key=lambda one: (one["updated_at"], one["id"]))
    for annotation in annotations:
        annotation["completed_by"] = people.get(annotation["completed_by"], annotation["completed_by"])
        if not annotation["was_cancelled"]:
            latest[annotation["completed_by"]] = annotation
    kept = [one for one in annotations if one["was_cancelled"] or one is latest[one["completed_by"]]]
    each["annotations"] = kept
    return [one for one in annotations if one not in kept]


def _rankings(export: Path, buckets: list[str], reject: Any) -> Iterator[Ranking]:
    """The rankings in an export, read as `rlhf data import label-studio` reads any."""
    if not buckets:
        raise UserError(
            f"the project has no Ranker called {CONTROL!r}",
            remedy="Export it and import it by its own names: rlhf data formats label-studio",
        )
    within = "ranked" if buckets == [RANKED] else "tied"
    options = {"prompt": "messages", "items": "items", "control": CONTROL, "buckets": buckets, "within_bucket": within}
    yield from IMPORTERS.pick({"name": "label-studio", **options})(export, reject)


def _originals(proposals: dict[str, Proposal]) -> dict[str, tuple[Proposal, dict[str, Candidate]]]:
    """Prompt -> its first proposal, and all its candidates by their text."""
    originals: dict[str, tuple[Proposal, dict[str, Candidate]]] = {}
    for proposal in proposals.values():
        _, known = originals.setdefault(proposal.prompt_id, (proposal, {}))
        known |= {candidate.text: candidate for candidate in proposal.candidates}
    return originals


def _restored(record: Ranking, original: Proposal, known: dict[str, Candidate]) -> Ranking:
    """The ranking with what annotators were not shown: who wrote the answers, source, group and split of the prompt."""
    candidates = tuple(known.get(candidate.text, candidate) for candidate in record.candidates)
    kept = {"source": original.source or record.source, "group": original.group, "split": original.split}
    return replace(record, candidates=candidates, **kept)


# ---- what is printed ---------------------------------------------------------------------------------------------


def show_push(summary: dict[str, Any]) -> None:
    """Print what `push` returns."""
    line = f"pushed {summary['pushed']:,} proposals; {summary['already']:,} were there already"
    console.say(f"{line} -> project {summary['project']}: {summary['url']}")


def show_pull(summary: dict[str, Any]) -> None:
    """Print what `pull` returns."""
    for reason, count in summary["reasons"].items():
        console.say(f"  {count:,} x {reason}")
    line = f"read {summary['read']:,} = written {summary['written']:,} + rejected {summary['rejected']:,}"
    console.say(f"{line} -> {summary['out']} (rankings) from {summary['url']}")
    console.say(
        f"since the last pull: {summary['new']:,} new, {summary['changed']:,} changed, {summary['gone']:,} gone"
    )
