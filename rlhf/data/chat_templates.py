"""The Jinja chat templates for models without one, and templates that read the clock."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from rlhf.core.errors import UserError

TEMPLATES = {
    "default": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}User: {{ m.content }}\n"
        "{% else %}Assistant: {{ m.content }}{{ eos_token }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "encoder-decoder": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{{ m.content }}{{ eos_token }}"
        "{% else %}{{ m.content }}{% if m.role == 'system' %} {% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
    ),
}
"""`default` names the roles; in `plain` the response continues the prompt; `encoder-decoder` gives the tokens that T5
and BART were trained on: text and end token."""

_CLOCK = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


def read_template(name: str) -> str:
    """The text of a template: a name in TEMPLATES, or a file.

    Raises:
        UserError: It is neither.
    """
    if name not in TEMPLATES and not Path(name).is_file():
        raise UserError(
            f"model.chat_template: {name!r} is neither auto, {', '.join(TEMPLATES)} nor a file",
            remedy="Give the path of a Jinja chat template.",
        )
    return TEMPLATES.get(name) or Path(name).read_text("utf-8")


def reads_clock(template: str) -> bool:
    """Whether a template calls `strftime_now`, so that its text differs from day to day."""
    return "strftime_now(" in template


def freeze_clock(template: str, now: datetime) -> str:
    """The template with each call `strftime_now("%d %b %Y")` replaced by the date or time `now` as text.

    The template is saved with the model, so later stages, servers and exports write the date of the training.

    Raises:
        UserError: A call takes its format from a variable.
    """
    frozen = _CLOCK.sub(lambda call: _literal(now.strftime(call[1] if call[1] is not None else call[2])), template)
    if reads_clock(frozen):
        raise UserError(
            "model.chat_template: calls strftime_now with a format that is not a text in quotes",
            "The date cannot be frozen, so the same conversation would become other tokens on another day.",
            "Write the format, or the date itself, into a copy of the template; set model.chat_template to that file.",
        )
    return frozen


def _literal(text: str) -> str:
    """A text as a Jinja string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
