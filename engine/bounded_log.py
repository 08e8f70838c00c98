"""Log lines that others cause: bounded in number and in length, so that no client can fill a disk."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

BURST: Final = 10
"""Lines of one kind within one period."""
PERIOD_S: Final = 60.0
LONGEST: Final = 200
"""Characters of one argument."""


class BoundedLog:
    """A logger for what clients cause. Lines with the same message are of one kind; for one thread."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._kinds: dict[str, list[float]] = {}
        """Message -> when its period began, its lines so far. There are as many as messages in the source."""

    def warning(self, message: str, *args: Any) -> None:
        """Log a warning, or count it among those that are left out."""
        now = time.monotonic()
        kind = self._kinds.get(message)
        if kind is None or now - kind[0] >= PERIOD_S:
            left_out = 0 if kind is None else int(kind[1]) - BURST
            self._kinds[message] = kind = [now, 0]
            if left_out > 0:
                self._log.warning("%d more lines like the next one were left out", left_out)
        kind[1] += 1
        if kind[1] <= BURST:
            self._log.warning(message, *(shown(arg) for arg in args))
            if kind[1] == BURST:
                self._log.warning("further lines like the one before are left out for %g s", PERIOD_S)


def shown(value: Any) -> Any:
    """The value for a log line: text is cut. What is not text, number or exception is given as it is."""
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}... ({len(value)} characters)"
    if isinstance(value, Exception):
        text = str(value)
        return f"{text[:LONGEST]}..." if len(text) > LONGEST else text
    return value
