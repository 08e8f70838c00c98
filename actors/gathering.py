"""How long a commit waits for callers that are about to write again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

SHARE: Final = 0.5
"""The longest wait after a commit, as a share of the time that it took."""
LONGEST_S: Final = 0.002
"""The longest wait after a commit, however slow the disk is."""
STEP_S: Final = 50e-6
"""How long to pause before the waiting calls are counted again."""
ENOUGH: Final = 64
"""With this many calls a commit does not wait for more: its own cost is a small part of each."""
MOST_SKIPPED: Final = 63
"""How many waits are left out at most after those that were in vain."""


class Gathering:
    """Lets a commit wait until the callers that the last one has answered have written again.

    Without a wait, the first caller that is back begins a commit alone, and the others come during that commit: callers
    split into groups, each of which waits for the commit of the other. A wait of a fraction of a commit joins them.

    A single writer never waits, as the last commit had no other call. If callers do not come back, such as those that
    write once, most of the waits are left out.

    Used within turns of the actor that saves.
    """

    def __init__(self, clock: Callable[[], float], pause: Callable[[float], object]) -> None:
        """`clock`: the time in seconds. `pause(seconds)` blocks this thread."""
        self._clock = clock
        self._pause = pause
        self._answered = 0
        """Calls that the last commit has answered."""
        self._expected = 0
        """Calls that the next commit waits for."""
        self._until_s = 0.0
        """When its wait ends."""
        self._to_skip = self._skipped = 0

    def note_answers(self, calls: int, waiting: int, took_s: float) -> None:
        """Note that a commit is about to answer `calls`.

        `waiting`: calls that wait for the next commit. `took_s`: how long this one took, in seconds.
        """
        self._answered += calls
        self._expected = min(self._answered + waiting, ENOUGH)
        self._until_s = self._clock() + min(took_s * SHARE, LONGEST_S)

    def wait(self, waiting: Callable[[], int]) -> None:
        """Wait until the expected calls have come, or long enough. `waiting()` counts the calls that wait."""
        found = first = waiting()
        if not found:
            return  # a commit without calls: the expected ones are for the next
        expected, self._expected, self._answered = self._expected, 0, 0
        if found >= expected or self._clock() >= self._until_s:
            return
        if self._to_skip:
            self._to_skip -= 1
            return
        while found < expected and self._clock() < self._until_s:
            self._pause(STEP_S)
            found = waiting()
        if 2 * (found - first) >= expected - first:
            self._skipped = 0
        else:
            self._skipped = self._to_skip = min(2 * self._skipped + 1, MOST_SKIPPED)
