"""A process that lives and is killed again and again, and what it said."""

from __future__ import annotations

import json
import os
import selectors
import signal
import time
from collections import defaultdict
from pathlib import Path

from reliability.living import PATIENCE_S, start_child

from scopestate.persistence.sqlite.schema import RESERVED

INTERVAL_MS = 30


class Life:
    """The output of one child between its beginning and its end."""

    def __init__(self, highest: dict[str, int]) -> None:
        self.opened = False
        self.tried: dict[str, int] = defaultdict(int)
        self.acknowledged: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """Name -> (number, NS) of each acknowledged write, in order."""
        self.events: dict[str, list[int]] = defaultdict(list)
        self.highest = highest
        """Scope -> the highest number of an event, of this life and of those before."""
        self.last_save_begun = 0
        self.last_save_done = 0
        self.safe_before = 0
        """Whatever was acknowledged before this time is in a save that is done: the one before it had ended by then."""
        self.busy_since = 0
        """When the save or commit began that the death interrupted; 0 if none was in progress."""
        self.longest_call = 0
        """Nanoseconds that the longest save or commit took."""
        self.killed_at = 0
        self.repeated = 0
        """Transactions that were asked for again, and were not done again."""
        self.expired: list[tuple[str, str, int]] = []
        """(scope, key, value) of each event that tells of an expired key, in order."""

    def hear(self, words: list[str]) -> None:
        match words:
            case ["open", ns]:
                self.opened = True
                self.last_save_begun = self.last_save_done = int(ns)
            case ["try", name, number, _]:
                self.tried[name] = int(number)
            case ["ack", name, number, ns]:
                self.acknowledged[name].append((int(number), int(ns)))
            case ["event", scope, number, _]:
                assert int(number) > self.highest[scope], f"{scope}: the number {number} was given before"
                self.highest[scope] = int(number)
                # What may have been given before a death is skipped, a whole range: how many writes there were is left.
                self.events[scope].append(int(number) % RESERVED)
            case ["again", scope, number, called, answer]:
                assert called == "0", f"{scope}: the transaction {number} was done, and is done again"
                assert answer == number, f"{scope}: the transaction {number} was answered by {answer}"
                self.repeated += 1
            case ["expired", scope, key, value]:
                self.expired.append((scope, key, int(value)))
            case ["alive", scope, key, expires_ms, now_ms]:
                assert int(expires_ms) > int(now_ms), f"{scope}: {key} was read, and had expired"
            case ["save", ns]:
                self.last_save_begun = int(ns)
            case ["busy", ns]:
                self.busy_since = int(ns)
            case ["idle", ns]:
                self.longest_call = max(self.longest_call, int(ns) - self.busy_since)
                self.busy_since = 0
            case ["saved", ns]:
                self.safe_before, self.last_save_done = self.last_save_done, int(ns)
            case _:
                raise AssertionError(f"the child said {words}")

    def longest_call_s(self) -> float:
        """Seconds that the longest save or commit took, also one that was not done at the death."""
        running = self.killed_at - self.busy_since if self.busy_since else 0
        return max(running, self.longest_call) / 1e9

    def last_acknowledged(self, name: str, *, before: int | None = None) -> int:
        """Number of the last acknowledged write; with `before`, of those acknowledged before that time. 0 if none."""
        numbers = (number for number, ns in self.acknowledged[name] if before is None or ns < before)
        return max(numbers, default=0)


class Mortal:
    """The process that forks a child per life, and kills them."""

    def __init__(self) -> None:
        self.process = start_child("crash")
        assert self.process.stdout is not None
        self._pipe = self.process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe, selectors.EVENT_READ)
        self._rest = b""
        self._highest: dict[str, int] = defaultdict(int)

    def live(self, directory: Path, last: dict[str, int], span_s: float, *, after_open: bool) -> Life:
        """Let a child live for `span_s` seconds, from its start or from its engine's opening, and kill it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(directory), INTERVAL_MS, last]).encode() + b"\n")
        self.process.stdin.flush()
        life, pid = Life(self._highest), 0
        deadline: float | None = None
        patience = time.monotonic() + PATIENCE_S
        while True:
            now = time.monotonic()
            assert now < patience, "the child does not live or die"
            if deadline is not None and now >= deadline:
                life.killed_at = time.monotonic_ns()
                os.kill(pid, signal.SIGKILL)
                deadline = None
            for words in self._lines(0.5 if deadline is None else deadline - now):
                match words:
                    case ["begin", number]:
                        pid = int(number)
                        deadline = None if after_open else time.monotonic() + span_s
                    case ["end", status]:
                        assert os.waitstatus_to_exitcode(int(status)) == -signal.SIGKILL
                        return life
                    case _:
                        life.hear(words)
                        if after_open and words[0] == "open":
                            deadline = time.monotonic() + span_s

    def _lines(self, wait_s: float) -> list[list[str]]:
        self._selector.select(max(wait_s, 0.0))
        try:
            data = os.read(self._pipe, 1 << 20)
        except BlockingIOError:
            return []
        assert data, self.process.stderr.read().decode() if self.process.stderr else ""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode().split() for line in lines]

    def end(self) -> None:
        self._selector.close()
        os.set_blocking(self._pipe, True)
        self.process.communicate(timeout=PATIENCE_S)
