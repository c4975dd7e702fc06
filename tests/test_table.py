"""Tables: rows by name, options checked against the row's signature, nearest matches in errors."""

from __future__ import annotations

import copy
import sys
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from data_tools.aggregate.methods import AGGREGATORS
from data_tools.importers import IMPORTERS
from rlhf.config.optimizers import OPTIMIZERS
from rlhf.core.table import Pick, Table
from rlhf.evaluation.benchmarks import BENCHMARKS
from rlhf.export.formats import EXPORTERS
from rlhf.guard.actions import ACTIONS
from rlhf.guard.rules import RULES
from rlhf.ppo.advantages import ADVANTAGES
from rlhf.ppo.kl import KL_CONTROLLERS, KL_ESTIMATORS, MISSING_EOS
from rlhf.prompting.ways import PROMPTING
from rlhf.reward.combining import COMBINATIONS
from rlhf.reward.losses import RANKING_LOSSES
from rlhf.reward.perturbations import PERTURBATIONS
from rlhf.reward.sources import REWARDS
from rlhf.rollout.samplers import SAMPLERS
from rlhf.specialist.heads import HEADS
from rlhf.tasks.metrics import METRICS
from rlhf.tuning.methods import TUNING

FRUIT = Table("fruit")


@FRUIT.row("apple", colour="red")
def apple(count, *, weight: Annotated[float, Field(gt=0)] = 0.5, sort: str | None = None):
    """A pome."""
    return count * weight


@FRUIT.row("pear")
def pear(count):
    """Another pome."""
    return count


@FRUIT.row("nut")
def nut():
    """No fruit: who cracks it."""
    return sys._getframe(1).f_code.co_name


class Basket(BaseModel):
    fruit: Annotated[Pick, FRUIT] = FRUIT.pick("pear")


def test_a_name_alone_picks_the_row_with_its_defaults():
    pick = FRUIT.pick("apple")
    assert (pick.name, pick.options, pick(4)) == ("apple", {"weight": 0.5, "sort": None}, 2.0)


def test_a_call_of_a_pick_enters_the_row_directly():
    assert FRUIT.pick("nut")() == "test_a_call_of_a_pick_enters_the_row_directly"


def test_picks_of_one_row_with_equal_options_are_equal_and_a_copy_has_options_of_its_own():
    pick = FRUIT.pick("apple")
    copied = copy.deepcopy(pick)
    assert copied == pick == FRUIT.pick({"name": "apple", "weight": 0.5})
    assert pick not in (FRUIT.pick({"name": "apple", "weight": 2}), FRUIT.pick("pear"), pick.plain)
    copied.options["weight"] = 3.0
    assert (pick(2), copied(2), copied.plain["weight"]) == (1.0, 6.0, 3.0)


def test_options_are_converted_to_the_signatures_types():
    assert FRUIT.pick({"name": "apple", "weight": "1e-1"}).options["weight"] == 0.1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("aple", ["unknown fruit 'aple'", "did you mean 'apple'", "pear"]),
        ({"name": "apple", "wieght": 1}, ["no option 'wieght'", "did you mean 'weight'"]),
        ({"name": "apple", "weight": -1}, ["weight", "greater than 0"]),
        ({"name": "pear", "weight": 1}, ["no option 'weight'", "it has no options"]),
        ({"weight": 1}, ["mapping with `name`"]),
        (3, ["expected the name of a fruit"]),
    ],
)
def test_what_does_not_fit_is_refused_with_a_hint(spec, words):
    with pytest.raises(ValueError) as caught:
        FRUIT.pick(spec)
    assert all(word in str(caught.value) for word in words)


def test_a_config_field_picks_and_is_written_back():
    basket = Basket(fruit={"name": "apple", "weight": 2})
    assert basket.fruit(3) == 6
    assert basket.model_dump(mode="json") == {"fruit": {"name": "apple", "weight": 2.0, "sort": None}}
    assert Basket(**basket.model_dump()).fruit == basket.fruit
    assert Basket().model_dump() == {"fruit": "pear"}


def test_a_name_is_given_once():
    with pytest.raises(KeyError, match="already"):
        FRUIT.row("apple")(pear)


ALL = [
    ADVANTAGES, KL_ESTIMATORS, KL_CONTROLLERS, MISSING_EOS, RANKING_LOSSES, REWARDS, SAMPLERS, TUNING, OPTIMIZERS,
    COMBINATIONS, PERTURBATIONS, RULES, ACTIONS, HEADS, PROMPTING, METRICS, BENCHMARKS, EXPORTERS, AGGREGATORS,
    IMPORTERS,
]  # fmt: skip


@pytest.mark.parametrize("row", [row for table in ALL for row in table], ids=lambda row: row.name)
def test_every_row_says_in_a_line_what_it_is_and_has_typed_options(row):
    assert len(row.summary) > 10 and row.summary.endswith("."), "the first line of its docstring is no whole sentence"
    for name, field in row.options.model_fields.items():
        assert field.annotation is not None, name
