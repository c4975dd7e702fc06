"""Errors say what they are about."""

from __future__ import annotations

import pytest

from rlhf.core.errors import UserError, blame, need_package


def test_errors_of_values_and_files_get_the_place_why_and_remedy():
    for error in (ValueError("no number"), OSError("no space")):
        with pytest.raises(UserError) as found, blame("--size 3x", "It counts.", "Write a number."):
            raise error
        assert (found.value.what, found.value.why) == (f"--size 3x: {error}", "It counts.")
        assert found.value.remedy == "Write a number."


def test_a_users_error_keeps_its_own_why_and_remedy_behind_the_place():
    with pytest.raises(UserError) as found, blame("data.train", "Not this.", "Nor this."):
        raise UserError("a/b: there is no dataset", "It was moved.", "Check the path.")
    assert str(found.value) == "data.train: a/b: there is no dataset\nIt was moved.\nCheck the path."


def test_other_errors_pass_as_they_are():
    with pytest.raises(KeyError, match="missing"), blame("--size"):
        raise KeyError("missing")


def test_a_package_that_is_not_installed_is_named_with_what_needs_it():
    need_package("json", "task: tags", "pip install json")
    with pytest.raises(UserError, match="task: tags needs no_such_package, which is not installed") as found:
        need_package("no_such_package", "task: tags", "pip install it")
    assert found.value.remedy == "pip install it"
