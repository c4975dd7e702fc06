"""Near-duplicate search: found when the shingles say so, and only then."""

from __future__ import annotations

import random

import pytest

from data_tools.statistics.near import near_groups, near_matches, similarity
from rlhf.core.errors import UserError

WORDS = [f"word{i}" for i in range(2000)]


def sentence(rng, length=40):
    return " ".join(rng.choices(WORDS, k=length))


def test_similarity_is_the_jaccard_similarity_of_three_words_in_a_row():
    # a b c | b c d | c d e against a b c | b c d | c d f: 2 shared of 4
    assert similarity("a b c d e", "a b c d f") == 0.5
    assert similarity("a b c d", "x y z w") == 0
    assert similarity("yes", "yes") == 1 and similarity("yes", "no") == 0
    assert similarity("one two", "two one") == 0


def test_case_punctuation_and_spacing_do_not_count():
    assert similarity("How do I   peel garlic?", "how do i peel GARLIC") == 1
    assert similarity("ﬁne café", "fine cafe\u0301".upper()) == 1
    assert similarity("?!", "?!") == 1 and similarity("?!", "...") == 0


def test_scripts_without_spaces_are_compared_by_character():
    # five characters, three runs of three each; the last one differs: 2 shared of 4
    assert similarity("今天天气好", "今天天气坏") == 0.5


def test_groups_are_represented_by_their_first_key():
    text = "the quick brown fox jumps over the lazy dog and runs away from here at once"
    groups = near_groups([("x", "something else"), ("b", text), ("a", text.upper() + "!"), ("b", "passed over")], 0.8)
    assert groups == {"x": "x", "b": "b", "a": "b"}


def test_a_group_reaches_as_far_as_its_chain():
    words = [f"w{i}" for i in range(40)]
    moved = [*words[4:], "x1", "x2", "x3", "x4"]
    between = [*words[2:], "x1", "x2"]
    texts = {"first": " ".join(words), "last": " ".join(moved), "between": " ".join(between)}
    assert similarity(texts["first"], texts["last"]) < 0.85 < similarity(texts["first"], texts["between"])
    assert set(near_groups(texts.items(), 0.85).values()) == {"first"}
    del texts["between"]
    assert near_groups(texts.items(), 0.85) == {"first": "first", "last": "last"}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_edited_texts_are_found_and_others_are_not(threshold):
    rng = random.Random(0)
    texts, truth = {}, {}
    for number in range(300):
        words = sentence(rng).split()
        edited = list(words)
        edited[rng.randrange(40)] = "edited"  # at most 3 of 38 runs change: similarity at least 35 / 41
        texts |= {f"{number}": " ".join(words), f"{number} edited": " ".join(edited)}
        near = similarity(" ".join(words), " ".join(edited)) >= threshold
        truth |= {f"{number}": f"{number}", f"{number} edited": f"{number}" if near else f"{number} edited"}
    found = near_groups(texts.items(), threshold)
    missed = sum(found[key] != truth[key] for key in texts if found[key] == key)
    assert all(found[key] in (key, truth[key]) for key in texts), "nothing below the threshold is found"
    assert missed <= (0 if threshold < 0.8 else 6)


def test_many_copies_of_one_text_are_one_group_in_little_time():
    texts = [(str(i), f"Please write a long poem about the sea and the ships, thank you{'!' * i}") for i in range(5000)]
    assert set(near_groups(texts, 0.8).values()) == {"0"}


def test_matches_are_with_the_other_side_only():
    rng = random.Random(1)
    text, lone = sentence(rng), sentence(rng)
    others = [("e1", text), ("e2", sentence(rng))]
    own = [("a", text + " indeed"), ("b", lone), ("c", lone), ("e2", "the same key is the same content")]
    assert near_matches(own, others) == {"a": "e1", "e2": "e2"}
    assert near_matches([], others) == {} and near_matches(own, []) == {} and near_groups([]) == {}


@pytest.mark.parametrize("threshold", [0.2, 1.5, float("nan")])
def test_a_threshold_that_makes_no_sense_is_refused(threshold):
    with pytest.raises(UserError, match=r"not from 0\.5 to 1"):
        near_groups([("a", "x")], threshold)
