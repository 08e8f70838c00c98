"""Log lines that clients cause, bounded in number and in length, so that no client can fill a disk."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

BURST: Final = 10
"""Warnings of one kind within one period."""
BURST_INFO: Final = 100
PERIOD_S: Final = 60.0
LONGEST: Final = 200
"""Characters of one argument."""


class BoundedLog:
    """A logger for what clients cause. Lines with the same message count as one kind. Not thread-safe."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._kinds: dict[str, list[float]] = {}
        """Message -> [start of its period, lines since then]. Messages are literals, so there are few."""

    def warning(self, message: str, *args: Any) -> None:
        """Log a warning, or count it as left out."""
        self._write(logging.WARNING, BURST, message, args)

    def info(self, message: str, *args: Any) -> None:
        """As `warning`, at level INFO."""
        self._write(logging.INFO, BURST_INFO, message, args)

    def debug(self, message: str, *args: Any) -> None:
        """Log at level DEBUG, cut in length but not bounded in number."""
        if self._log.isEnabledFor(logging.DEBUG):
            self._log.debug(message, *(shown(arg) for arg in args))

    def _write(self, level: int, burst: int, message: str, args: tuple[Any, ...]) -> None:
        if not self._log.isEnabledFor(level):
            return
        now = time.monotonic()
        kind = self._kinds.get(message)
        if kind is None or now - kind[0] >= PERIOD_S:
            left_out = 0 if kind is None else int(kind[1]) - burst
            self._kinds[message] = kind = [now, 0]
            if left_out > 0:
                self._log.log(level, "%d lines like the next one were left out", left_out)
        kind[1] += 1
        if kind[1] <= burst:
            self._log.log(level, message, *(shown(arg) for arg in args))
            if kind[1] == burst:
                self._log.log(level, "further lines like the previous one are left out for %g s", PERIOD_S)


def shown(value: Any) -> Any:
    """Return a value as it is logged: a long text, or the long text of an exception, is cut."""
    if isinstance(value, Exception):
        value = str(value)
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}... ({len(value)} characters)"
    return value
