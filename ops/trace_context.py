"""The trace that a call is part of, as the W3C recommendation "Trace Context" writes it, and how it travels.

Every event has a depth: how many handlers led to it. The depth already goes wherever the call goes, so the context of
a trace travels in it, as a `TracedDepth`: a number with one more attribute. A call without a trace has a plain `int`,
and nothing is stored or sent for it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

LONGEST_STATE: Final = 512
"""Characters that a `tracestate` may have. The recommendation lets a longer one be dropped."""

_traceparent: Final = re.compile(
    r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
).fullmatch
_tracestate: Final = re.compile(r"[\x20-\x7e]+").fullmatch


class TraceContext(NamedTuple):
    """The span that a call or a write was made in. Made by `read_context` from what was not checked."""

    traceparent: str
    """Version, trace, span and flags: 55 characters, such as `00-<32 hex digits>-<16 hex digits>-01`."""
    tracestate: str = ""
    """What tracing systems add to it, as `key=value,key=value`. At most `LONGEST_STATE` characters."""

    @property
    def text(self) -> str:
        """Both as one text, as they are stored: the state, if there is one, follows a space. `read_text` reads it."""
        return f"{self.traceparent} {self.tracestate}" if self.tracestate else self.traceparent


class TracedDepth(int):
    """The depth of a call or an event that is part of a trace."""

    context: TraceContext

    is_used = False
    """True on the class once the process has made one: until then a writer need not look for any."""

    @classmethod
    def of(cls, depth: int, context: TraceContext | None) -> int:
        """Return a depth with a context; the plain depth if that is None."""
        if context is None:
            return int(depth)
        made = cls(depth)
        made.context = context
        cls.is_used = True
        return made

    def deeper(self) -> int:
        """Return the depth of what a handler of this event does, in the same trace."""
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
    """Return the context that two headers name; None if there is none, or `traceparent` is not valid.

    A `tracestate` that is too long or is not printable ASCII is dropped. A traceparent of a later version is read as
    far as version 00 goes. Source: W3C Trace Context, sections 3.2 and 4.
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
    """Return the context of which this is the `text`; None if it is not one."""
    traceparent, _, tracestate = text.partition(" ")
    return read_context(traceparent, tracestate)
