"""The Jinja chat templates for models without one."""

from __future__ import annotations

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
}
"""`default` names the roles; in `plain` the response continues the prompt."""


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
