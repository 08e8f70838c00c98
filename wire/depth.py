"""How many handlers deep in events code runs, and how that travels with calls.

The entry `scopestate-depth=N` of a message's `baggage` says that its handler's calls are N handlers deep. SDKs pass
baggage on to the calls that a handler makes; those whose telemetry is off may not, see `WorkerSession.depth_of`.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Final

event_depth: Final[ContextVar[int]] = ContextVar("scopestate_event_depth", default=0)
"""0 outside of handlers, 1 in the handler of an event from outside, 2 in that of an event that such a handler fired."""

KEY: Final = "scopestate-depth"
_entry: Final = re.compile(rf"(?:^|,)\s*{KEY}\s*=\s*([0-9]{{1,9}})\s*(?:[;,]|$)", re.ASCII).search


def depth_in(baggage: str | None) -> int:
    """Return the depth that a message carries; 0 if it carries none."""
    if baggage is None or KEY not in baggage:
        return 0
    found = _entry(baggage)
    return 0 if found is None else int(found[1])


def with_depth(baggage: str | None, depth: int) -> str:
    """Return `baggage` with the depth, unless it has one."""
    if not baggage:
        return f"{KEY}={depth}"
    return baggage if depth_in(baggage) else f"{baggage},{KEY}={depth}"
