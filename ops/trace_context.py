"""The trace that a call is part of, in the format of the W3C recommendation "Trace Context", and how it is passed on.

Every event has a depth: how many handlers led to it. The depth is passed on with each call already, so it carries the
context of the trace too: a `TracedDepth` is a number with one more attribute. A call without a trace has a plain
`int`, and nothing is stored or sent for a trace.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

LONGEST_STATE: Final = 512
"""The most characters of a `tracestate`. The recommendation allows dropping a longer one."""

_traceparent: Final = re.compile(
    r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
).fullmatch
_tracestate: Final = re.compile(r"[\x20-\x7e]+").fullmatch


class TraceContext(NamedTuple):
    """The span that a call or a write was made in. `read_context` makes one from unchecked text."""

    traceparent: str
    """Version, trace, span and flags: 55 characters, such as `00-<32 hex digits>-<16 hex digits>-01`."""
    tracestate: str = ""
    """Data of tracing systems, as `key=value,key=value`. At most `LONGEST_STATE` characters."""

    @property
    def text(self) -> str:
        """Both as one text, for storing: `traceparent`, then a space and `tracestate` if it is not empty.

        `read_text` reads it.
        """
        return f"{self.traceparent} {self.tracestate}" if self.tracestate else self.traceparent


class TracedDepth(int):
    """The depth of a call or an event that is part of a trace."""

    context: TraceContext

    is_used = False
    """Set to True on the class when the process makes the first one. Until then, writers need not look for any."""

    @classmethod
    def of(cls, depth: int, context: TraceContext | None) -> int:
        """Return a depth with a context; the plain depth if `context` is None."""
        if context is None:
            return int(depth)
        made = cls(depth)
        made.context = context
        cls.is_used = True
        return made

    def deeper(self) -> int:
        """Return the depth of the calls that a handler of this event makes, in the same trace."""
        return TracedDepth.of(self + 1, self.context)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return (int, (int(self),))

    def __copy__(self) -> TracedDepth:
        return self

    def __deepcopy__(self, memo: object) -> TracedDepth:
        return self


def context_of(depth: int) -> TraceContext | None:
    """Return the context that a depth carries; None if it is a plain number."""
    return depth.context if isinstance(depth, TracedDepth) else None


def read_context(traceparent: str | None, tracestate: str | None = None) -> TraceContext | None:
    """Return the context that two headers describe; None if `traceparent` is missing or not valid.

    A `tracestate` that is too long or not printable ASCII is dropped. Of a `traceparent` of a later version, only the
    fields of version 00 are read. Source: W3C Trace Context, sections 3.2 and 4.
    """
    if not traceparent or len(traceparent) > LONGEST_STATE:
        return None
    found = _traceparent(traceparent)
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    state = tracestate or ""
    if len(state) > LONGEST_STATE or _tracestate(state) is None:
        state = ""
    return TraceContext(f"00-{trace}-{span}-{flags}", state)


def read_text(text: str) -> TraceContext | None:
    """Return the context that `TraceContext.text` wrote as this text; None if the text is not valid."""
    traceparent, _, tracestate = text.partition(" ")
    return read_context(traceparent, tracestate)
