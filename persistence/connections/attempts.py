"""When to try to connect: at once, and after failures with growing pauses."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final, Generic

from scopestate.errors import NotConnected
from scopestate.persistence.connections.connection import T_Connection, Target

BACKOFF_S: Final = (0.05, 1.0)
"""Shortest and longest pause between attempts to connect; a quarter of it is random, so that engines spread out."""


class Backoff:
    """How long to pause after one failure and the next."""

    def __init__(
        self,
        uniform: Callable[[float, float], float] = random.uniform,
        pauses_s: tuple[float, float] | None = None,
    ) -> None:
        """`pauses_s`: the shortest and the longest one, in seconds; None: BACKOFF_S."""
        self.failures = 0
        """Failures since the last success."""
        self._uniform = uniform
        self._pauses_s = pauses_s or BACKOFF_S

    def next_pause_s(self) -> float:
        """Count a failure, and return the seconds to pause."""
        first_s, most_s = self._pauses_s
        pause_s = min(first_s * 2.0**self.failures, most_s)
        self.failures = min(self.failures + 1, 16)
        return pause_s * self._uniform(0.75, 1.0)

    def reset(self) -> None:
        """Forget the failures: a connection was made."""
        self.failures = 0


class Attempts(Generic[T_Connection]):
    """The attempts of one connection owner to reach its target. For the holder of its claim, except `hasten`."""

    def __init__(
        self,
        target: Target[T_Connection],
        peer: str,
        log: logging.Logger,
        clock: Callable[[], float],
        backoff: Backoff,
        level: int = logging.WARNING,
    ) -> None:
        """`peer`: what the target is, for messages. `level`: the level of messages in the log."""
        self._level = level
        self._target = target
        self._peer = peer
        self._log = log
        self._clock = clock
        self._backoff = backoff
        self.successes = 0
        """Connections made so far."""
        self.due = 0.0
        """When the next attempt may be made: at once if it is in the past. Seconds on the monotonic clock."""
        self.why_not: str | None = None
        """Why there is no connection, if the last attempt failed."""

    def connect(self) -> T_Connection:
        """Try now. Raises NotConnected."""
        dialled = self._target.dial()
        if self._backoff.failures:
            self._log.log(self._level, "connected to %s at %s again", self._peer, dialled.address)
        self.successes += 1
        self._backoff.reset()
        self.due, self.why_not = 0.0, None
        return dialled

    def note_failure(self, error: NotConnected) -> None:
        """Delay the next attempt, longer each time."""
        self.why_not = str(error)
        if not self._backoff.failures:
            self._log.log(self._level, "%s; calls wait for it and it is tried again", error)
        self.due = self._clock() + self._backoff.next_pause_s()

    def hasten(self) -> None:
        """Let the next attempt be made now."""
        self.due = 0.0
