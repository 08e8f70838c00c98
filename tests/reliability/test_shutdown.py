"""Programs that end, in every way but SIGKILL: nothing acknowledged is lost, every event is handled or reported."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reliability.figures import record
from reliability.living import PATIENCE_S, saved, start_child

SIGTERMS = 8

pytestmark = pytest.mark.parametrize("durability", ["interval", "commit"])


class Program:
    """A child program: what it said, and how it ended."""

    def __init__(self, name: str, directory: Path, durability: str) -> None:
        self._process = start_child("shutdown", name, directory, durability)
        self._output = b""
        self.acknowledged: dict[str, int] = defaultdict(int)
        self.handled: dict[str, list[int]] = defaultdict(list)
        self.reported: dict[str, list[int]] = defaultdict(list)
        self.errors = ""

    def wait_until_ready(self, *, more: int = 200) -> None:
        """Wait until it says so, and then for some more of its output."""
        assert self._process.stdout is not None
        stop, length = time.monotonic() + PATIENCE_S, None
        while length is None or len(self._output) < length:
            assert time.monotonic() < stop, self._output[-500:]
            if select.select([self._process.stdout], [], [], 1.0)[0]:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                assert data, self._process.communicate()[1].decode()
                self._output += data
            if length is None and b"ready\n" in self._output:
                length = len(self._output) + more

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end and return its status: negative for a signal."""
        output, errors = self._process.communicate(timeout=PATIENCE_S)
        self.errors = errors.decode()
        for line in (self._output + output).decode().splitlines():
            match line.split():
                case ["ack", scope, number]:
                    self.acknowledged[scope] = int(number)
                case ["event", scope, number]:
                    self.handled[scope].append(int(number))
                case ["report", scope, number]:
                    self.reported[scope].append(int(number))
        return self._process.returncode

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def start(tmp_path: Path, durability: str) -> Iterator[Callable[[str], Program]]:
    started: list[Program] = []

    def start_(name: str) -> Program:
        started.append(Program(name, tmp_path / "store", durability))
        return started[-1]

    yield start_
    for program in started:
        program.kill()


def check_nothing_lost(program: Program, directory: Path) -> int:
    """What was acknowledged is on disk, and each write that is on disk was handled or reported, once, in order."""
    assert program.acknowledged, "the program wrote nothing"
    for scope, number in program.acknowledged.items():
        sequence, values = saved(directory, scope)
        # One more may be on disk: acknowledged, and killed before it could say so.
        assert number <= sequence <= number + 1, f"{scope}: {program.errors}"
        assert values == {"n": b"%d" % sequence}
        assert sorted(program.handled[scope] + program.reported[scope]) == list(range(1, sequence + 1))
        assert program.handled[scope] == sorted(program.handled[scope])
    return sum(program.acknowledged.values())


def test_leaving_the_main_module_without_close(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start("exits_without_close")

    assert program.end() == 0

    assert program.errors == ""
    assert check_nothing_lost(program, tmp_path / "store") == 50
    assert program.reported["main"] == []


def test_an_exception_that_ends_the_program(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start("dies_of_an_exception")

    assert program.end() == 1

    assert program.errors.endswith("LookupError: a bug of the program\n")
    assert check_nothing_lost(program, tmp_path / "store") == 50


def test_exit_while_daemon_threads_write(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start("exits_while_daemons_write")
    program.wait_until_ready(more=2000)
    assert program._process.stdin is not None
    program._process.stdin.close()
    program._process.stdin = None

    assert program.end() == 0

    assert program.errors == ""
    assert check_nothing_lost(program, tmp_path / "store") > 0


def test_exit_with_two_engines(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start("exits_with_two_engines")

    assert program.end() == 0

    assert program.errors == ""
    assert saved(tmp_path / "store", "main") == (20, {"n": b"20"})
    assert saved(tmp_path / "store-2", "main") == (30, {"n": b"30"})


def test_an_engine_that_was_dropped_without_close(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start("drops_its_engine")

    assert program.end() == 0

    assert program.errors == ""
    assert check_nothing_lost(program, tmp_path / "store") == 50


def test_exit_when_the_interpreter_starts_no_more_threads(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start("exits_when_no_thread_can_be_started")

    assert program.end() == 0

    assert program.errors == ""
    assert saved(tmp_path / "store", "main") == (50, {"n": b"50"})


@pytest.mark.parametrize("name", ["writes_for_ever", "waits_for_ever"])
def test_sigterm_ends_the_process_with_its_status(start: Callable[[str], Program], tmp_path: Path, name: str) -> None:
    program = start(name)
    program.wait_until_ready(more=2000 if name == "writes_for_ever" else 0)

    program.signal(signal.SIGTERM)

    assert program.end() == -signal.SIGTERM
    assert program.errors == ""
    assert check_nothing_lost(program, tmp_path / "store") >= 20


def test_a_second_sigterm_changes_nothing(start: Callable[[str], Program], tmp_path: Path) -> None:
    program = start("writes_for_ever")
    program.wait_until_ready(more=1000)

    for _ in range(5):
        program.signal(signal.SIGTERM)

    assert program.end() == -signal.SIGTERM
    assert check_nothing_lost(program, tmp_path / "store") > 0


@pytest.mark.parametrize("name", ["has_its_own_handler", "closes_in_its_own_handler"])
def test_sigterm_with_a_handler_of_the_program(start: Callable[[str], Program], tmp_path: Path, name: str) -> None:
    program = start(name)
    program.wait_until_ready(more=2000)

    program.signal(signal.SIGTERM)

    assert program.end() == 7, program.errors
    assert program.errors == ""
    assert check_nothing_lost(program, tmp_path / "store") > 0


@pytest.mark.parametrize("name", ["writes_while_daemons_write", "waits_for_ever"])
def test_sigint_is_a_keyboard_interrupt_that_loses_nothing(
    start: Callable[[str], Program], tmp_path: Path, name: str
) -> None:
    program = start(name)
    program.wait_until_ready(more=2000 if name == "writes_while_daemons_write" else 0)

    program.signal(signal.SIGINT)

    assert program.end() == -signal.SIGINT
    assert "KeyboardInterrupt" in program.errors
    assert check_nothing_lost(program, tmp_path / "store") >= 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_hung_handler_delays_the_end_by_the_grace_time_only(
    start: Callable[[str], Program], tmp_path: Path, durability: str, number: signal.Signals
) -> None:
    program = start("has_a_handler_that_hangs")
    program.wait_until_ready(more=0)
    began = time.monotonic()

    program.signal(number)

    assert program.end() == -number
    assert time.monotonic() - began < 0.3 + 20, "close_grace_ms is 300"
    check_nothing_lost(program, tmp_path / "store")
    assert saved(tmp_path / "store", "hang") == (2, {"n": b"2"})
    # Both: the one that hangs and the one behind it. `hear` has handled them as well.
    assert program.reported["hang"] == [2, 1] or program.reported["hang"] == [1, 2]
    assert program.handled["hang"] == [1, 2]


def test_sigterms_at_random_moments(durability: str, tmp_path: Path) -> None:
    moments, acknowledged = random.Random(15), 0
    for number in range(SIGTERMS):
        program = Program("writes_for_ever", tmp_path / f"store-{number}", durability)
        try:
            program.wait_until_ready(more=moments.randrange(3000))
            program.signal(signal.SIGTERM)
            assert program.end() == -signal.SIGTERM
        finally:
            program.kill()
        if program.acknowledged:
            acknowledged += check_nothing_lost(program, tmp_path / f"store-{number}")
    assert acknowledged > 0
    record(f"SIGTERM under load: {durability}", processes=SIGTERMS, acknowledged=acknowledged, lost=0)
