"""Durable triggers in real processes that are killed with SIGKILL under load: every promise holds after each death."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from durable.places import CONSUMERS, EFFECTS, KEYS, SCOPE
from effort import size
from reliability.figures import record
from reliability.living import untraced_environment
from stored import values_of

from scopestate.persistence import FileAdapter
from tests.durable.checker import Asked, Began, Checker, Counted, Ended, Finished, Left, Over

KILLS = {"commit": size(8, 200), "interval": size(6, 100)}
PATIENCE_S = 300.0
HERE = Path(__file__).parent


class Child:
    """The process that forks a child for each life, and what these say."""

    def __init__(self, marks: Path) -> None:
        paths = [str(HERE.parent), *(path for path in sys.path if path)]
        environment = {**untraced_environment(), "PYTHONPATH": os.pathsep.join(paths), "SCOPESTATE_MARKS": str(marks)}
        self._errors = (marks.parent / "errors.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "child_durable.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._rest = b""
        self.checker = Checker()
        self.delivered = 0

    def live(self, place: str, durability: str, last: dict[str, int], span_s: float, *, is_last: bool = False) -> None:
        """Let a child live: for `span_s` seconds from its engine's opening, or, the last one, until it has finished."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([place, durability, last, is_last]).encode() + b"\n")
        self._process.stdin.flush()
        pid, kill_at, patience = 0, None, time.monotonic() + PATIENCE_S
        while True:
            for words in self._lines():
                match words:
                    case ["begin", number]:
                        pid = int(number)
                    case ["open"]:
                        kill_at = None if is_last else time.monotonic() + span_s
                    case ["end", status]:
                        ended = os.waitstatus_to_exitcode(int(status))
                        assert ended == (0 if is_last else -signal.SIGKILL), self.errors()
                        return
                    case _:
                        self._hear(words)
            now = time.monotonic()
            if kill_at is not None and now >= kill_at:
                os.kill(pid, signal.SIGKILL)
                kill_at = None
            assert now < patience, f"the child does not live or die: {self.errors()}"

    def _hear(self, words: list[str]) -> None:
        match words:
            case ["began", consumer, one, scope, key, number, attempt]:
                self.delivered += 1
                self.checker.take(Began(consumer, one, scope, key, int(number), int(attempt)))
            case ["ended", consumer, one, verdict]:
                self.checker.take(Ended(consumer, one, verdict))
            case ["asked", consumer, ids]:
                self.checker.take(Asked(consumer, frozenset(ids.split(",")) - {"-"}))
            case ["left", consumer, ids]:
                self.checker.take(Left(consumer, frozenset(ids.split(",")) - {"-"}))
            case ["finished"]:
                pass
            case _:
                raise AssertionError(f"the child said {words}")

    def _lines(self) -> Iterator[list[str]]:
        assert self._process.stdout is not None
        time.sleep(0.001)  # bounds how much is read at a time; what is there does not wait for it
        data = self._process.stdout.read()
        if data is None:
            return
        assert data, self.errors()
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from (line.decode().split() for line in lines)

    def errors(self) -> str:
        """What the children have written to standard error."""
        self._errors.seek(0)
        return self._errors.read()[-5000:]

    def end(self) -> None:
        """End the process that forks."""
        self._process.stdin.close()  # type: ignore[union-attr]  # it has one
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()  # type: ignore[union-attr]  # it has one
        self._errors.close()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    marks = tmp_path / "marks"
    marks.mkdir()
    made = Child(marks)
    yield made
    made.end()


def on_disk(directory: Path) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str, int], int]]:
    """Return the number of each key, and how often the effect of each event is there. The store is sound."""
    adapter = FileAdapter(directory)
    try:
        assert adapter.check() == []
        numbers = {(SCOPE, key): int(json) for key, json in values_of(adapter.load(SCOPE)).items()}
        effects: dict[Any, int] = {}
        for name, json in values_of(adapter.load(EFFECTS)).items():
            key, number = name.split()
            effects[SCOPE, key, int(number)] = int(json)
    finally:
        adapter.close()
    return numbers, effects


@pytest.mark.timeout(1200)  # seconds for each kill at most
@pytest.mark.parametrize("durability", KILLS)
def test_killed_under_load_every_committed_event_is_handled_in_order_and_no_other(
    child: Child, tmp_path: Path, durability: str
) -> None:
    directory = tmp_path / "store"
    moments = random.Random(durability)
    numbers: dict[tuple[str, str], int] = {}
    for kill in range(KILLS[durability]):
        span_s = moments.uniform(0.3, 0.6) if kill % 10 == 1 else moments.uniform(0.0, 0.12)
        child.live(str(directory), durability, {key: numbers.get((SCOPE, key), 0) for key in KEYS}, span_s)
        numbers, effects = on_disk(directory)
        child.checker.take(Counted("counts", effects, is_all=False))
        child.checker.take(Over(numbers))
        assert child.checker.violations == []
    child.live(str(directory), durability, {}, 0.0, is_last=True)
    numbers, effects = on_disk(directory)
    child.checker.take(Over(numbers, killed=False))
    child.checker.take(Counted("counts", effects))
    child.checker.take(Finished(numbers))

    assert child.checker.violations == []
    written = sum(numbers.values())
    assert set(child.checker.consumers) == CONSUMERS
    assert child.delivered > len(CONSUMERS) * written > 100
    record(
        f"SIGKILL with durable triggers: {durability}",
        kills=KILLS[durability],
        committed=written,
        deliveries=child.delivered,
    )
