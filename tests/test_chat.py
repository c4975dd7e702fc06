"""`rlhf chat`: turns, streaming, commands, Ctrl-C, a real terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import finished
import pytest
import tiny

from rlhf.core.console import printable
from rlhf.core.errors import UserError
from rlhf.data.schema import Message
from rlhf.data.store import open_dataset
from rlhf.inference.policy import Policy, open_policy
from rlhf.inference.sampling_params import sampling_params
from stages.chat import COMMANDS, Chat, command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    # not the whole model: the answers of such a run go on for ever
    return finished.sft(tmp_path_factory.mktemp("runs") / "sft", {"name": "last-layers", "layers": 1})


@pytest.fixture(scope="module")
def policy(run: str) -> Policy:
    return open_policy(run)


@pytest.fixture
def chat(policy: Policy) -> Chat:
    return Chat(policy, sampling_params(policy.path, max_new_tokens=8), seed=0)


def talk(run: str, *lines: str, words: tuple[object, ...] = ()) -> tuple[str, str]:
    return finished.invoke(command, run, "--max-new-tokens", 8, *words, stdin="\n".join(lines) + "\n")


# ---- turns -------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_one_answer_a_line_and_nothing_else(run: str, chat: Chat) -> None:
    said, notes = talk(run, "One?", "", "Two?")
    for text in ("One?", "Two?"):
        chat.turn(text)
    answers = [message.content for message in chat.messages if message.role == "assistant"]
    assert said == "".join(printable(answer) + "\n" for answer in answers) and len(answers) == 2
    assert "> " not in notes


def test_later_turns_see_the_earlier_ones(chat: Chat) -> None:
    chat.turn("One?")
    chat.turn("Two?")
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
    again = Chat(chat.policy, chat.sampling, seed=0, answers=1)
    again.turn("Two?")
    assert again.messages[-1] != chat.messages[-1]


def test_the_seed_decides_the_answers(run: str) -> None:
    assert talk(run, "One?", "Two?") == talk(run, "One?", "Two?")
    assert talk(run, "One?", words=("--seed", 1)) != talk(run, "One?")


def test_an_answer_is_shown_as_it_comes(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Screen())
    chat.turn("One?")
    assert len([text for text in writes if text.strip()]) > 2
    assert "".join(writes) == printable(chat.messages[-1].content) + "\n"


def test_a_character_of_several_bytes_is_shown_whole(policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    from stages.chat import _Printer

    printer = _Printer(policy.chat.decode)
    for token in policy.chat.response("owl \N{OWL} \N{SNOWMAN}")[:-1]:
        printer.add(token)
    assert "\N{REPLACEMENT CHARACTER}" not in capsys.readouterr().out
    assert printer.finish() == "owl \N{OWL} \N{SNOWMAN}"


def test_ctrl_c_stops_an_answer_and_keeps_what_has_come(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.sampling = replace(chat.sampling, min_new_tokens=16)
    chat.turn("One?")
    whole = chat.messages[-1].content

    class Screen(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            Screen.writes += 1
            if Screen.writes == 4:
                signal.raise_signal(signal.SIGINT)
            return len(text)

    again = Chat(chat.policy, chat.sampling, seed=0)
    monkeypatch.setattr(sys, "stdout", Screen())
    again.turn("One?")
    part = again.messages[-1].content
    assert again.messages[-1].role == "assistant" and whole.startswith(part) and 0 < len(part) < len(whole)
    again.turn("Two?")
    assert len(again.messages) == 4


def test_a_long_conversation_keeps_its_end(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.turn("word " * 200 + "owl?")
    assert chat.messages[-1].role == "assistant"
    assert "cut to its last 120 tokens" in capsys.readouterr().err


# ---- commands ----------------------------------------------------------------------------------------------------


def test_help_lists_every_command(run: str) -> None:
    _, notes = talk(run, "/help")
    assert all(f"/{name}" in notes for name in [*COMMANDS, "quit"])


def test_reset_forgets_the_turns_and_keeps_the_system_message(chat: Chat) -> None:
    chat.obey("/system Be brief.")
    chat.turn("One?")
    assert chat.conversation[0] == Message("system", "Be brief.") and len(chat.conversation) == 3
    chat.obey("/reset")
    assert chat.conversation == [Message("system", "Be brief.")]
    chat.obey("/system")
    assert chat.conversation == []


def test_undo_takes_back_one_exchange(chat: Chat) -> None:
    chat.turn("One?")
    before = list(chat.messages)
    chat.turn("Two?")
    chat.obey("/undo")
    assert chat.messages == before
    chat.obey("/undo")
    with pytest.raises(UserError, match="nothing to undo"):
        chat.obey("/undo")


def test_saved_conversations_are_demonstrations(chat: Chat, tmp_path: Path) -> None:
    chat.system = "Be brief."
    chat.turn("One?")
    chat.obey(f"/save {tmp_path / 'chat.jsonl'}")
    chat.turn("Two?")
    chat.obey(f"/save {tmp_path / 'chat.jsonl'}")
    data = open_dataset(tmp_path / "chat.jsonl", "demonstration")
    records = list(data.records())
    assert not data.rejects and [len(record.messages) for record in records] == [2, 4]
    assert records[1].answer == chat.messages[-1].content


def test_temperature_holds_from_now_on(chat: Chat) -> None:
    chat.obey("/temperature 0")
    assert chat.sampling.temperature == 0
    first, second = Chat(chat.policy, chat.sampling, seed=0), Chat(chat.policy, chat.sampling, seed=1)
    for one in (first, second):
        one.turn("One?")
    assert first.messages == second.messages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 1", "did you mean 'temperature'"),
        ("/temperature hot", "needs a number"),
        ("/temperature -1", "must be 0"),
        ("/temperature nan", "must be 0"),
        ("/save", "needs a file name"),
        ("/save x.jsonl", "nothing to save"),
        ("/undo", "nothing to undo"),
    ],
)
def test_a_mistyped_command_is_refused_and_the_chat_continues(line: str, message: str, run: str) -> None:
    said, notes = talk(run, line, "One?", "/quit", "Two?")
    assert message in notes
    assert said.count("\n") >= 1 and said == talk(run, "One?")[0]


def test_a_conversation_that_cannot_be_saved_is_refused(chat: Chat, tmp_path: Path) -> None:
    chat.turn("One?")
    with pytest.raises(UserError, match="cannot be saved"):
        chat.obey(f"/save {tmp_path / 'nowhere' / 'chat.jsonl'}")


# ---- a terminal --------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(run: str) -> Iterator[Terminal]:
    found = Terminal(run)
    yield found
    found.close()


class Terminal:
    """`rlhf chat` in a pseudo-terminal."""

    def __init__(self, run: str) -> None:
        code = "from rlhf.core.lazy_group import command_app; from stages.chat import command; command_app(command)()"
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.chdir(tiny.REPOSITORY)
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
            os.execv(sys.executable, [sys.executable, "-c", code, run, "--max-new-tokens", "60"])

    def until(self, text: str, seconds: float = 240) -> str:
        """What is shown until `text` comes."""
        shown, end = "", time.monotonic() + seconds
        while text not in shown:
            assert time.monotonic() < end, shown
            if select.select([self.handle], [], [], 0.1)[0]:
                try:
                    shown += os.read(self.handle, 4096).decode(errors="replace")
                except OSError:  # the other side has closed
                    raise AssertionError(f"ended before {text!r}: {shown}") from None
        return shown

    def ended(self, seconds: float = 60) -> bool:
        """Whether the program ends by itself."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.handle], [], [], 0.1)[0]:
                try:
                    os.read(self.handle, 4096)
                except OSError:
                    return True
        return False

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def close(self) -> None:
        os.close(self.handle)
        os.waitpid(self.pid, 0)


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_clears_the_line_and_ctrl_d_leaves(terminal: Terminal) -> None:
    assert "/help" in terminal.until("> ")
    terminal.type("half a li")
    terminal.until("half a li")
    time.sleep(0.5)  # as a person would: readline misses a signal in the moment before it waits for the next key
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("One?\n")
    terminal.until("> ")
    terminal.type("/undo\n")
    assert "taken back" in terminal.until("> ")
    terminal.type("\x04")
    assert terminal.ended()
