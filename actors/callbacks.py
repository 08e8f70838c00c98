"""Running callers' functions within turns, and refusing calls of the engine from them.

While such a function runs, its scope serves no other call. If it called the engine, it would at best see a scope
outside of its transaction, and at worst wait for itself, or for a thread that waits for it. So every call of the engine
on that thread is refused at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import Any, Final

from scopestate.actors.containment import Log
from scopestate.errors import WouldDeadlock

log: Final = Log("scopestate.scope")

LONG_S: Final = 0.25
"""A function that runs longer is logged: other callers of its scope may have waited for it."""

_METHODS: Final = ("modify", "transact")

IN_CALLBACK: Final[dict[int, str]] = {}
"""Thread id -> the method whose function runs there, or the check of a value that runs there.

Nearly always empty, which every call of the engine checks."""

if hasattr(os, "register_at_fork"):
    # Threads that run functions do not exist in a forked child, and new threads may get their ids.
    os.register_at_fork(after_in_child=IN_CALLBACK.clear)


def run_callback(name: str, scope: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call a function of a caller in a turn of `scope`; `name`: the method that it was given to, or what it is.

    It is the `runner` of such turns. Raises what the function raises.
    """
    me = get_ident()
    began = monotonic()
    # Between entering and leaving the table only the function is called, so an interruption cannot leave the entry
    # behind.
    try:
        IN_CALLBACK[me] = name
        return function(argument)
    finally:
        if me in IN_CALLBACK:
            del IN_CALLBACK[me]
        took_s = monotonic() - began
        if took_s > LONG_S:
            what = f"the function of a {name}" if name in _METHODS else name
            log.warning("%s on scope %r took %.2f s: other calls waited", what, scope, took_s)


def refuse_in_callback() -> None:
    """Raise WouldDeadlock if this thread runs a function of `modify` or `transact`, or checks a value."""
    name = IN_CALLBACK.get(get_ident())
    if name is not None:
        other = "the methods of the transaction" if name == "transact" else "what it is given"
        what = f"the function of `{name}`" if name in _METHODS else name
        raise WouldDeadlock(f"{what} has called an engine: it may use {other} only, and nothing was changed")
