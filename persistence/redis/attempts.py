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


class Attempts:
    """The attempts of one link to reach its server. Used by whoever holds the link."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._failures = 0
        self.successes = 0
        """Connections made so far."""
        self.due = 0.0
        """When the next attempt may be made; in the past: now. Seconds on the monotonic clock."""
        self.why_not: str | None = None
        """Why there is no connection, if the last attempt failed."""

    def connect(self) -> Connection:
        """Try now. Raises NotConnected."""
        connection = self._target.dial()
        if self._failures:
            log.warning("connected to Redis at %s again", connection.address)
        self.successes += 1
        self._failures, self.due, self.why_not = 0, 0.0, None
        return connection

    def note_failure(self, error: NotConnected) -> None:
        """Put the next attempt off, longer each time."""
        self.why_not = str(error)
        if not self._failures:
            log.warning("%s; calls wait for it and it is tried again", error)
        pause = min(_BACKOFF_S[0] * 2**self._failures, _BACKOFF_S[1])
        self._failures = min(self._failures + 1, 16)
        self.due = time.monotonic() + pause * random.uniform(0.75, 1.0)
