"""Few threads, datasets that tests share, and no silent skip in CI of what needs the shared data."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny

if TYPE_CHECKING:
    from rlhf.data.chat_tokenizer import ChatTokenizer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; tests send Ctrl-C to children
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random numbers that a test does not seed are those of its name, whichever tests the worker ran before."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(seed)  # torch.manual_seed writes down where it was called


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """A stage that a test runs in this process flushes denormal numbers to zero, which later tests may need."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="module")
def quick_memory_line(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tracing a model takes half the time of a tiny run: only runs in test_memory.py end with predicted memory."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_memory.py":
            patch.setattr("rlhf.memory.peak._predicted", lambda *_: "not in tests")
        yield


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """`os.fsync` guards against a power cut, which no test makes; what a killed process wrote is there without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def configs_without_text() -> Iterator[None]:
    """transformers writes out each config that it reads for a log line that is off: a twentieth of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        if "transformers" in sys.modules:
            from transformers import GenerationConfig, PretrainedConfig

            for kind in (PretrainedConfig, GenerationConfig):
                patch.setattr(kind, "__repr__", object.__repr__)
        yield


@pytest.fixture(autouse=True, scope="module")
def no_search_for_garbage(request: pytest.FixtureRequest) -> Iterator[None]:
    """A search through all that a worker holds is half of a small call of what asks for one; test_soak.py counts."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_soak.py":
            patch.setattr(gc, "collect", lambda *_: 0)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 24 demonstrations and 4 held out: what short PPO runs take their prompts from."""
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "prompts", 24, held_out=4)


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 40 demonstrations and 8 held out."""
    return tiny.write_demonstrations(tmp_path_factory.mktemp("data") / "demos", 40)


@pytest.fixture(scope="session")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 36 rankings of 4 candidates and 8 held out."""
    return tiny.write_rankings(tmp_path_factory.mktemp("data") / "rankings", 36, candidates=4)


@pytest.fixture(scope="session")
def few_rankings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 12 rankings of 4 candidates and 8 held out, for steps on all of them at once."""
    return tiny.write_rankings(tmp_path_factory.mktemp("data") / "few-rankings", 12, candidates=4)


@pytest.fixture(scope="session")
def chat() -> ChatTokenizer:
    """The tiny Llama's tokenizer with its chat template."""
    from rlhf.config.base import ModelConfig
    from rlhf.data.chat_tokenizer import load_tokenizer

    return load_tokenizer(ModelConfig(path=tiny.llama()), tiny.llama())


@pytest.hookimpl(trylast=True)  # after the tests that are not to run were taken out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first in each worker's part, since xdist's workers begin with equal parts of the list.

    They are those on real data and those with a time limit of their own. A worker would be alone with one at the end.
    """
    marks = ("real", "timeout")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if any(item.get_closest_marker(mark) for mark in marks)]
    others = iter([item for item in items if item not in set(long)])
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        size = (len(items) - len(ordered)) // (workers - worker)  # as xdist divides the list
        part = long[worker::workers]
        ordered += [*part, *islice(others, max(0, size - len(part)))]
    items[:] = [*ordered, *others]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What imports make is there to stay: neither they nor the runs of tests are to search it for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(10_000)  # a small run makes some hundred thousand objects


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests measured: they say it with `record_property("figures", text)`."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, text in report.user_properties if report.when == "call" else ():
            if name == "figures":
                terminalreporter.write_line(text)
    if os.environ.get("CI"):
        for report in filter(_not_in_ci, terminalreporter.getreports("skipped")):
            terminalreporter.write_line(f"{report.nodeid} was skipped for want of what CI has", red=True)


def _not_in_ci(report: pytest.TestReport) -> bool:
    """Whether a test was skipped for want of something that CI has, so that there the skip is a failure."""
    return any(name in str(report.longrepr) for name in ("shared is absent", "chromium is not installed"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and any(map(_not_in_ci, reporter.getreports("skipped"))):
        session.exitstatus = 1


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces with addresses 10.77.9.1 and 10.77.9.2, as two hosts on one cable."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not installed")
    names, ends = ("rlhf-a", "rlhf-b"), ("rlhf-va", "rlhf-vb")
    commands = [["netns", "add", name] for name in names]
    commands += [["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]]
    for number, (name, end) in enumerate(zip(names, ends), 1):
        commands += [["link", "set", end, "netns", name]]
        inside = ["netns", "exec", name, "ip"]
        commands += [[*inside, "addr", "add", f"10.77.9.{number}/24", "dev", end]]
        commands += [[*inside, "link", "set", device, "up"] for device in (end, "lo")]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {' '.join(command)}: {done.stderr.strip()}")
        yield list(zip(names, ends))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
