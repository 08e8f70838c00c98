"""The event depth: how many handlers led to a call. It travels with calls, so that endless chains of events are found.

The entry `scopestate-depth=N` in a message's `baggage` says that calls made by its handler have depth N. SDKs copy the
baggage to the calls that a handler makes, except some with telemetry off: see `WorkerSession.depth_of`.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final

event_depth: Final[ContextVar[int]] = ContextVar("scopestate_event_depth", default=0)
"""0 outside handlers, 1 in the handler of an event from outside, 2 in that of an event fired by such a handler, ..."""

KEY: Final = "scopestate-depth"
_entry: Final = re.compile(rf"(?:^|,)\s*{KEY}\s*=\s*([0-9]{{1,9}})\s*(?:[;,]|$)", re.ASCII).search


def depth_in(baggage: str | None) -> int:
    """Return the depth in a message's baggage; 0 if it has none."""
    if baggage is None or KEY not in baggage:
        return 0
    found = _entry(baggage)
    return 0 if found is None else int(found[1])


def with_depth(baggage: str | None, depth: int) -> str:
    """Return `baggage` with the depth added, unless it has one."""
    if not baggage:
        return f"{KEY}={depth}"
    return baggage if depth_in(baggage) else f"{baggage},{KEY}={depth}"
