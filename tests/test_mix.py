"""`rlhf data mix`: shares, caps and sizes come out as asked, and no record twice."""

from __future__ import annotations

from fractions import Fraction

import pytest
from rows import DEMONSTRATION, RANKING, dataset, jsonl, last_line, run, tree

from data_tools.curate.mix import counts, mix_datasets, parse_parts, shares
from rlhf.core.errors import UserError
from rlhf.data.store import open_dataset

HALF, FIFTH = Fraction(1, 2), Fraction(1, 5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Datasets a of 40, b of 20 and c of 10 prompts."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 40), ("b", 20), ("c", 10)):
        dataset(tmp_path / name, [{"prompt": f"{name} {i}?"} for i in range(count)])
    return tmp_path


def taken(path):
    """How many records came from each dataset, by the first letter of the prompt."""
    found = {"a": 0, "b": 0, "c": 0}
    asked = [record.messages[0].content for record in open_dataset(path).records()]
    assert len(set(asked)) == len(asked)
    for text in asked:
        found[text[0]] += 1
    return found


def test_shares_by_hand():
    assert shares([None, None], [30, 10]) == [Fraction(3, 4), Fraction(1, 4)]
    assert shares([Fraction(3), Fraction(1)], [7, 900]) == [Fraction(3, 4), Fraction(1, 4)]
    assert shares([HALF, None, None], [5, 30, 10]) == [HALF, Fraction(3, 8), Fraction(1, 8)]


def test_counts_by_hand():
    assert counts([HALF, HALF], [10, 4], None) == [4, 4]  # the smaller one decides
    assert counts([HALF, HALF], [10, 4], 6) == [3, 3]
    third = Fraction(1, 3)
    assert counts([third, third, third], [9, 9, 9], 10) == [4, 3, 3]  # 3.33 each: the rest goes to the first
    assert counts([HALF, FIFTH, Fraction(3, 10)], [99, 99, 99], 7) == [4, 1, 2]  # 3.5, 1.4, 2.1


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [
        (["a", "b", "c"], {}, {"a": 40, "b": 20, "c": 10}),  # no weights: all of all
        (["a", "b", "c"], {"caps": ["a=10"]}, {"a": 10, "b": 20, "c": 10}),
        (["a", "b", "c"], {"size": 7}, {"a": 4, "b": 2, "c": 1}),  # as the sizes
        (["a=0.5", "b=0.5"], {}, {"a": 20, "b": 20, "c": 0}),
        (["a=3", "c=1"], {}, {"a": 30, "b": 0, "c": 10}),  # weights need not sum to 1
        (["a=0.5", "b=0.3", "c"], {}, {"a": 25, "b": 15, "c": 10}),  # c gets the rest, 0.2
        (["a=0.5", "b=0.3", "c"], {"size": 20}, {"a": 10, "b": 6, "c": 4}),
        (["a=0.5", "b", "c"], {"caps": ["b=5"], "size": 24}, {"a": 12, "b": 4, "c": 8}),  # the rest 5 : 10
        (["a=1/3", "b=2/3"], {"size": 30}, {"a": 10, "b": 20, "c": 0}),
    ],
)
def test_weights_caps_and_sizes_come_out(folder, words, options, expected):
    said = mix_datasets(words, "m", **options)
    assert taken("m") == expected
    assert said["written"] == sum(expected.values()) and said["read"] == said["written"] + said["left"]
    assert {part["path"]: part["taken"] for part in said["parts"]} == {k: v for k, v in expected.items() if v}


def test_the_inputs_are_woven_together_and_the_seed_decides(folder):
    for name, seed in (("m", 0), ("again", 0), ("other", 1)):
        mix_datasets(["a=0.5", "b=0.5"], name, size=20, seed=seed)
    assert tree(folder / "m") == tree(folder / "again")
    asked = {name: [r.messages[0].content for r in open_dataset(name).records()] for name in ("m", "other")}
    assert set(asked["m"]) != set(asked["other"])
    assert {text[0] for text in asked["m"][:8]} == {"a", "b"}
    own = [int(text[2:-1]) for text in asked["m"] if text[0] == "a"]
    assert own == sorted(own) and own != list(range(10))


def test_records_keep_their_source_or_get_their_datasets_name(folder):
    dataset(folder / "d", [{"prompt": "d?", "source": "forum"}])
    mix_datasets(["c", "d"], "m")
    assert {record.source for record in open_dataset("m").records()} == {"c", "forum"}


def test_the_command_prints_and_the_manifest_keeps_what_was_taken(folder):
    rows = [{"prompt": "e 1?", "split": "train"}, {"prompt": ""}, {"prompt": "c 1?", "split": "eval"}, {"prompt": 3}]
    jsonl(folder / "e.jsonl", rows)
    dataset(folder / "s", [{"prompt": "c 1?", "split": "train"}])
    result = run("mix", "b=0.5", "e.jsonl", "s", "--cap", "e.jsonl=2", "--out", "m", "--seed", 3, "--json")
    assert result.exit_code == 0, result.output
    said = last_line(result)
    assert [said[name] for name in ("read", "written", "left", "rejected", "leaks")] == [25, 6, 17, 2, 1]
    assert "1 prompts are in more than one split" in result.output
    origin = open_dataset("m", verify=True).manifest["origin"]
    assert origin["command"] == "rlhf data mix b=0.5 e.jsonl s --cap e.jsonl=2 --seed 3"
    assert [parent["path"] for parent in origin["parents"]] == ["b", "e.jsonl", "s"]
    assert origin["parts"][1] == {"path": "e.jsonl", "share": 1 / 3, "available": 2, "taken": 2}


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["a", "a"], {}, "a: is named twice"),
        (["a=x", "b"], {}, "the weight is not a number: 'x'"),
        (["a=0", "b"], {}, "the weight is not above 0"),
        (["a=0.7", "b=0.3", "c"], {}, "leave nothing for the dataset without one"),
        (["a=0.5", "c=0.5"], {"size": 30}, "too few records for its fraction"),
        (["a", "b"], {"caps": ["d=3"]}, "d is not in the mixture"),
        (["a", "b"], {"caps": ["a"]}, "is not PATH=COUNT"),
        (["a", "b"], {"caps": ["a=0"]}, "is not PATH=COUNT"),
        (["a", "b"], {"size": 0}, "is not above 0"),
        (["a", "nowhere"], {}, "there is no dataset"),
        (["a", "rankings"], {}, "a holds prompts, rankings holds rankings"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(folder, words, options, message):
    dataset(folder / "rankings", [RANKING])
    with pytest.raises(UserError, match=message):
        mix_datasets(words, "m", **options)
    assert not (folder / "m").exists()


def test_the_largest_size_is_reported_when_a_record_would_have_to_repeat(folder):
    with pytest.raises(UserError) as caught:
        mix_datasets(["a=0.5", "c=0.5"], "m", size=30)
    assert caught.value.remedy == "The largest size with these weights and caps is 20."
    assert mix_datasets(["a=0.5", "c=0.5"], "m", size=20, overwrite=True)["written"] == 20


def test_a_path_with_an_equals_sign_is_a_path_where_it_exists(folder):
    dataset(folder / "lr=3", [DEMONSTRATION])
    assert [(str(part.path), part.weight) for part in parse_parts(["lr=3", "a=3"])] == [("lr=3", None), ("a", 3)]
