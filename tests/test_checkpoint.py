"""Checkpoints are whole or not there, bounded in number, and carry every random generator."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import xxhash

from rlhf.core.errors import UserError
from rlhf.runs.checkpoint import SEAL, Checkpoints, _share, damage
from rlhf.runs.random_state import rng_state, seed_everything, set_rng_state


def write(checkpoints, step, protect=None):
    with checkpoints.write(step, protect) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_bytes(bytes(100 + step))


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_newest_are_kept_and_the_best(checkpoints):
    for step in (1, 2, 3, 4):
        write(checkpoints, step, protect=1)
    assert names(checkpoints) == ["step-00000001", "step-00000003", "step-00000004"]
    assert checkpoints.newest() == (4, checkpoints.path(4))


def test_an_exception_while_writing_leaves_no_checkpoint_of_that_name(checkpoints):
    write(checkpoints, 1)
    with pytest.raises(RuntimeError), checkpoints.write(2) as folder:
        (folder / "weights").write_bytes(b"half")
        raise RuntimeError
    assert checkpoints.newest() == (1, checkpoints.path(1))
    write(checkpoints, 3)
    assert names(checkpoints) == ["step-00000001", "step-00000003"]  # what the failure left is cleared away


SEALS = ["no seal", "half a seal", "[]", "3", '"text"', "null", '{"files": 3}', '{"files": [1]}', '{"files": {}}']


@pytest.mark.parametrize("harm", ["cut", "missing", "other bytes", *SEALS])
def test_a_damaged_checkpoint_is_never_taken_for_a_whole_one(harm, checkpoints, capsys):
    write(checkpoints, 1)
    write(checkpoints, 2)
    weights, seal = checkpoints.path(2) / "part" / "weights", checkpoints.path(2) / SEAL
    {
        "cut": lambda: weights.write_bytes(b"short"),
        "missing": weights.unlink,
        "other bytes": lambda: weights.write_bytes(b"x" * 102),
        "no seal": seal.unlink,
        "half a seal": lambda: seal.write_text(seal.read_text()[:20]),
    }.get(harm, lambda: seal.write_text(harm))()
    assert damage(checkpoints.path(2)) is not None
    assert checkpoints.newest() == (1, checkpoints.path(1))
    assert "step-00000002" in capsys.readouterr().err


def test_the_seal_lists_every_file_with_its_size_and_checksum(checkpoints):
    write(checkpoints, 5)
    seal = json.loads((checkpoints.path(5) / SEAL).read_text())
    sums = {"part/weights": xxhash.xxh3_128(bytes(105)).hexdigest()}
    assert seal == {"step": 5, "world_size": 1, "files": {"part/weights": 105}, "xxh3_128": sums}


@pytest.mark.parametrize("place", [0, 2**20, 2**21 + 6])
def test_one_flipped_bit_anywhere_is_found_and_the_file_is_named(place, checkpoints, capsys):
    for step in (1, 2):
        with checkpoints.write(step) as folder:
            (folder / "big").write_bytes(bytes(2**21 + 7))
            (folder / "empty").touch()
    with open(checkpoints.path(2) / "big", "r+b") as file:
        file.seek(place)
        file.write(b"\x01")
    assert damage(checkpoints.path(2), verify=False) is None, "the size has not changed"
    assert checkpoints.newest() == (1, checkpoints.path(1))
    assert "big is damaged: its checksum differs" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"step-00000002: big is damaged"):
        checkpoints.check(2)


def test_where_every_checkpoint_is_damaged_the_run_does_not_silently_start_again(checkpoints):
    write(checkpoints, 1)
    (checkpoints.path(1) / "part" / "weights").write_bytes(b"x" * 101)
    with pytest.raises(UserError, match=r"step-00000001: part/weights is damaged"):
        checkpoints.newest()


def test_each_rank_hashes_the_files_that_it_wrote(monkeypatch):
    names = ["a/rng-0.pt", "a/rng-1.pt", "loop.json", "state-2.safetensors", "state-3.safetensors"]
    monkeypatch.setenv("WORLD_SIZE", "3")  # fewer than wrote them
    shares = []
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        shares.append(_share(names))
    assert shares == [[0, 2, 4], [1], [3]]


def test_without_checkpoints_there_is_no_newest(checkpoints):
    assert checkpoints.newest() is None


def test_the_random_state_comes_back_for_every_generator(tmp_path):
    seed_everything(7)
    torch.save(rng_state(), tmp_path / "rng.pt")

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw()
    assert draw() != first
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first


def test_ranks_are_seeded_apart_and_repeatably(monkeypatch):
    found = []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        seed_everything(7)
        found.append(float(torch.rand(())))
    assert found[0] == found[2] != found[1]
