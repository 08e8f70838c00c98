"""Functions of the program that run within a turn: those of `modify` and `transact`.

Such a function has its scope to itself, so it must not wait for anything of the engine: what it waits for may wait for
this scope. A call that it makes is refused at once, whichever scope is meant, because two such functions that call each
other's scopes would wait for ever.
"""

from __future__ import annotations

import time
from threading import get_ident
from typing import Final

from scopestate.actors.containment import Log
from scopestate.errors import WouldDeadlock

log: Final = Log("scopestate.scope")

LONG_S: Final = 0.1
"""A function that takes longer is logged: it holds its scope all that time."""

RUNNING: Final[dict[int, str]] = {}
"""Thread id -> the scope within whose turn it runs a function of the program. A call first looks if it is empty."""


def refuse_within_function() -> None:
    """Raise WouldDeadlock if this thread runs a function of the program within a turn."""
    scope = RUNNING.get(get_ident())
    if scope is not None:
        raise WouldDeadlock(
            f"the function of a `modify` or `transact` on scope {scope!r} has called the engine. It runs within the "
            "turn of its scope and must not wait for another call: use only what it was given, and call the engine "
            "before or after it"
        )


class Stopwatch:
    """Logs functions that take long: the first of a scope, and then each that takes twice as long as those before."""

    __slots__ = ("_longest_s",)

    def __init__(self) -> None:
        self._longest_s = LONG_S / 2

    def note(self, scope: str, began: float) -> None:
        """A function of `scope` has ended, which began at `time.monotonic()` = `began`."""
        took_s = time.monotonic() - began
        if took_s >= 2 * self._longest_s:
            self._longest_s = took_s
            log.warning(
                "the function of a `modify` or `transact` on scope %r took %.3f s; the other calls of the scope waited "
                "for it. It runs within a turn: do slow work before it. (Logged again if one takes twice as long)",
                scope,
                took_s,
            )
