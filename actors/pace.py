"""How many events an engine may hold for a consumer that it shares with other engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from scopestate.ops.triggers import Trigger

MOST_AHEAD: Final = 512
"""The most events that an engine holds and that wait only for their turn. With more, other engines would be idle."""
_AHEAD_S: Final = 0.05
"""How many seconds of work they are, approximately, at the pace of the handler."""


class Pace:
    """How quickly the deliveries of one engine end."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.ended = 0
        self._monotonic = monotonic
        self._per_s = 0.0
        self._since_s = monotonic()

    def ahead(self) -> int:
        """Return how many deliveries end in `_AHEAD_S`, approximately."""
        now_s = self._monotonic()
        passed_s = now_s - self._since_s
        if passed_s >= _AHEAD_S:
            self._per_s, self.ended, self._since_s = self.ended / passed_s, 0, now_s
        return int(max(self._per_s * _AHEAD_S, self.ended if passed_s < _AHEAD_S else 0))

    def room(self, trigger: Trigger, held: int, lanes: int) -> int:
        """Return how many more events the engine may hold.

        `held`: how many it holds, without those that wait for another attempt; `lanes`: how many lanes these are in.
        It may have as many lanes as it handles side by side, and as many more as it ends while it asks for the next
        ones: what a slow handler could not begin is left to another engine.
        """
        at_once = trigger.concurrency * (trigger.batch or 1)
        if trigger.debounce is not None:
            at_once = max(at_once, MOST_AHEAD)  # each key is debounced separately, and debounced events are held
        return min(at_once + min(self.ahead(), MOST_AHEAD) - lanes, at_once + MOST_AHEAD - held)
