"""The importer of Prodigy's choice tasks."""

from __future__ import annotations

from typing import Any

from data_tools.published.table import FileHead, row_format
from data_tools.reading.annotation_exports import ids_of, person, since_1970
from data_tools.reading.fields import is_list_of
from data_tools.reading.judgements import means_tie
from rlhf.data.jsonl import from_dict
from rlhf.data.schema import BadRecord, Ranking, brief


def _detect(head: FileHead) -> str | None:
    if not head.all_have("options", "accept", "answer"):
        return None
    shown = {tuple(map(_shown, row["options"])) for row in head.rows if isinstance(row["options"], list)}
    if len(head.rows) > 1 and len(shown) <= 1:
        return None  # the same options in every task are labels, no answers
    return "its rows have `options`, `accept` and `answer`, as choice tasks do"


@row_format("prodigy", detect=_detect, left_out=lambda prompt: () if prompt == "text" else ("text",))
def prodigy(row: Any, *, prompt: str = "text") -> Ranking:
    """Prodigy: `choice` tasks as `db-out` writes them, whose options are the answers.

    Ranks: the accepted options 1, all others 2: ties within each. An option next to two or more others whose text or
    id says that no answer is better (``tie``, ``Both are equal``) is no answer: accepted, all answers tie. The
    candidates are in the order of the options, in which the annotator saw them. The annotator is `_annotator_id`, or
    `_session_id`; the time `_timestamp`, as UTC.

    Rejected: tasks answered with reject or ignore, tasks in which no option was accepted, accepted ids that are no
    option, a tie accepted together with an answer, and tasks without options: a text with a label (textcat, ner and the
    like) ranks no answers.
    `auto` takes no file in which all tasks have the same options, for these are labels.

    Options: `prompt`, the field that holds the prompt (text, or messages with role and content).
    """
    if not isinstance(row, dict) or not isinstance(row.get("options"), list):
        remedy = "Import tasks of the choice interface, whose options are the answers."
        raise BadRecord("not a choice task: it has no options", remedy=remedy)
    if row.get("answer") in ("reject", "ignore"):
        raise BadRecord(
            f"the task was answered with {row['answer']}", remedy="Nothing is wrong: nothing was preferred."
        )
    if row.get("answer") != "accept":
        raise BadRecord("answer: not one of accept, reject, ignore", brief(row.get("answer")))
    options, accepted = row["options"], row.get("accept")
    if not is_list_of(dict, options):
        raise BadRecord("options: not a list of {id, text}", brief(options))
    ids = ids_of([option.get("id") for option in options], "options")
    if len(set(ids)) < len(ids):
        raise BadRecord("two options have one id", brief(ids))
    if not isinstance(accepted, list) or not accepted:
        raise BadRecord("no option was accepted", brief(accepted), "Nothing was preferred; leave it out.")
    chosen = set(ids_of(accepted, "accept"))
    if unknown := sorted(chosen - set(ids)):
        raise BadRecord("an accepted id is none of the options", brief(unknown))
    if row.get(prompt) in (None, ""):
        raise BadRecord("no prompt is found", brief(prompt), "Name the field that holds it: --option prompt=FIELD")
    ties = {id for id, option in zip(ids, options) if means_tie(id) or means_tie(option.get("text"))}
    ties = ties if len(ids) - len(ties) > 1 else set()
    answers = [(id, option) for id, option in zip(ids, options) if id not in ties]
    if chosen & ties and chosen - ties:
        raise BadRecord("a tie and an answer were accepted", brief(sorted(chosen)), "They contradict each other.")
    candidates = [{"text": option.get("text", option.get("html"))} for _, option in answers]
    ranks = [1 if id in chosen or chosen & ties else 2 for id, _ in answers]
    row = {
        "messages": row[prompt],
        "candidates": candidates,
        "ranks": ranks,
        "annotator": person(row.get("_annotator_id") or row.get("_session_id")),
        "time": since_1970(row.get("_timestamp"), "_timestamp"),
        "shown": True,
        "source": "prodigy",
    }
    return from_dict(row, "ranking")  # type: ignore[return-value]


def _shown(option: Any) -> str | None:
    text = option.get("text") if isinstance(option, dict) else None
    return text if isinstance(text, str) else None
