"""Commands are functions whose docstrings are the help of their arguments and options."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from rlhf.core.lazy_group import command_app, described


def example(
    run: str,
    *,
    steps: Annotated[int, typer.Option("--steps", "-s", min=1)] = 3,
    name: str,
    all_of_it: bool = False,
    plain: bool = True,
) -> None:
    """Do something.

    With care.

    Args:
        run (RUN): Which
            one.
        steps: How many: at most all.
        name (NAME|{...}): How it is called.
        all_of_it: Leave nothing out.
        plain: Without colours.
    """


def test_the_docstring_is_the_help_and_its_args_are_that_of_the_options():
    command = typer.main.get_command(command_app(example))
    found = {parameter.name: parameter for parameter in command.params}
    assert command.help == "Do something.\n\nWith care."
    assert (found["run"].param_type_name, found["run"].metavar, found["run"].help) == ("argument", "RUN", "Which one.")
    assert found["name"].opts == ["--name"] and found["name"].required and found["name"].metavar == "NAME|{...}"
    assert found["steps"].opts == ["--steps", "-s"] and found["steps"].help == "How many: at most all."
    assert found["all_of_it"].opts == ["--all-of-it"] and found["all_of_it"].secondary_opts == []
    assert found["plain"].opts == ["--plain"] and found["plain"].secondary_opts == ["--no-plain"]


def test_a_parameter_that_the_docstring_leaves_out_stays_as_it_is():
    one = inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, annotation=int)
    assert described([one], "Do something.\n\nArgs:\n    other: Another.\n") == [one]
