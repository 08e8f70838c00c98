"""Connecting again and again, with pauses."""

from __future__ import annotations

import logging
import random
import time
from typing import Final

from scopestate.errors import NotConnected
from scopestate.persistence.redis.connection import Connection, Target

log = logging.getLogger("scopestate.persistence.redis")

_BACKOFF_S: Final = (0.05, 1.0)
"""Shortest and longest pause between attempts to connect; a quarter of it is random, so that engines spread out."""


class Backoff:
    """How long to pause after one failure and the next."""

    def __init__(self) -> None:
        self.failures = 0
        """Since the last success."""

    def next_pause_s(self) -> float:
        """Count a failure, and return the seconds to pause."""
        pause_s = min(_BACKOFF_S[0] * 2.0**self.failures, _BACKOFF_S[1])
        self.failures = min(self.failures + 1, 16)
        return pause_s * random.uniform(0.75, 1.0)

    def reset(self) -> None:
        """It works again."""
        self.failures = 0


class Attempts:
    """The attempts of one link to reach its server. Used by whoever holds the link."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._backoff = Backoff()
        self.successes = 0
        """Connections made so far."""
        self.due = 0.0
        """When the next attempt may be made; in the past: now. Seconds on the monotonic clock."""
        self.why_not: str | None = None
        """Why there is no connection, if the last attempt failed."""

    def connect(self) -> Connection:
        """Try now. Raises NotConnected."""
        connection = self._target.dial()
        if self._backoff.failures:
            log.warning("connected to Redis at %s again", connection.address)
        self.successes += 1
        self._backoff.reset()
        self.due, self.why_not = 0.0, None
        return connection

    def note_failure(self, error: NotConnected) -> None:
        """Put the next attempt off, longer each time."""
        self.why_not = str(error)
        if not self._backoff.failures:
            log.warning("%s; calls wait for it and it is tried again", error)
        self.due = time.monotonic() + self._backoff.next_pause_s()
