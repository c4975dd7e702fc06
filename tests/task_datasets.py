"""Templates of one's own, and what a dataset of tasks says."""

from __future__ import annotations

import yaml

from rlhf.data.store import open_dataset

MINE = {
    "family": "mood",
    "fields": {"text": "What was said.", "mood": "How."},
    "answer": "mood",
    "templates": [{"name": "how", "prompt": "{{ text }}\nHow was that said?\n{{ options }}"}],
}


def own(path, **changes):
    """A file of templates of one's own."""
    path.write_text(yaml.safe_dump({**MINE, **changes}), "utf-8")
    return path


def made(path):
    """(prompt, answer) of every record."""
    return [(record.messages[0].content, record.answer) for record in open_dataset(path).records()]
