"""The clock that deadlines are compared with: wall time that does not go back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from scopestate.signals import Guard

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher

_MS: Final = 1_000_000
"""Nanoseconds in a millisecond."""


class Clock:
    """Milliseconds since the epoch, which never go back (docs/design/0039-expiry.md).

    It is the time since the machine started, including time in suspend, plus an offset that only grows. If the wall
    clock is set back, this clock continues from where it is: no expired key comes back, and no deadline is delayed. If
    the wall clock is set forward, this clock follows at the next reading. Methods may be called from any thread.
    """

    def __init__(self, dispatcher: Dispatcher, at_least_ms: int = 0) -> None:
        """`at_least_ms`: where the clock of an earlier process stopped; 0 if there was none."""
        self._wall_ns = dispatcher.wall_ns
        self._uptime_ns = dispatcher.uptime_ns
        self._exclusive = Guard()
        self._offset_ns = at_least_ms * _MS - self._uptime_ns()
        self.now_ms()  # so that a time of day that is set back before the first reading is noticed too

    def now_ms(self) -> int:
        """Return the time. It is never before what an earlier call has returned, on any thread."""
        # The wall clock first. If this thread is delayed between the two lines, their difference is too small, which
        # changes nothing. The other way round, each such delay would put the clock ahead permanently.
        wall_ns = self._wall_ns()
        uptime_ns = self._uptime_ns()
        if wall_ns > uptime_ns + self._offset_ns:
            self._exclusive.run(self._follow, wall_ns - uptime_ns)
        return (uptime_ns + self._offset_ns) // _MS

    def _follow(self, offset_ns: int) -> None:
        self._offset_ns = max(self._offset_ns, offset_ns)

    def at_least(self, ms: int) -> None:
        """Continue from `ms` if the clock is before it: that is where the clock of an earlier process stopped."""
        self._exclusive.run(self._follow, ms * _MS - self._uptime_ns())

    def ahead_ms(self) -> int:
        """Return how far this clock is ahead of a wall clock that was set back; 0 if it is not ahead."""
        return max(0, self.now_ms() - self._wall_ns() // _MS)

    def disown(self) -> None:
        """In a forked child: the guard may be held by a thread that is not here."""
        self._exclusive = Guard()
