"""When to check the keys of a scope that have deadlines: a wheel with slots of four widths."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final

from scopestate.signals import certainly

NEVER: Final = 1 << 62
"""Later than every deadline, in milliseconds since the epoch."""

_HOUR_MS: Final = 3_600_000
"""Deadlines at least this far away are in slots of 2**18 ms."""
_MINUTE_MS: Final = 60_000
"""Deadlines at least this far away are in slots of 4,096 ms; from 64 ms on in slots of 64 ms, and below in slots of 1
ms."""
_FINER: Final = {18: 12, 12: 6, 6: 0, 0: 0}
_MOVED: Final = 4
"""Keys that are checked for each one that may be returned. This limits what one call costs."""
_NO_KEYS: Final[dict[str, None]] = {}


class Wheel:
    """Tells which keys of a scope have expired, oldest first, without sorting all of them.

    `deadlines` belongs to the scope and is authoritative: each reader compares with it. The wheel only knows when to
    check a key: at its deadline or earlier. A check finds that the key has expired, or moves it to a slot nearer to its
    deadline, or drops it if it has no deadline any more. So an extra entry or an early check does no harm, and a write
    that is interrupted between the wheel and `deadlines` leaves nothing to repair. A deadline that is moved to a later
    time does not move its key.

    Thread rules: only the thread that runs the scope's turn calls it; `next_due` may be called from any thread.
    """

    __slots__ = ("_deadlines", "_looked_at_ms", "_looks", "_slots", "_starts", "_where")

    def __init__(self, deadlines: Mapping[str, int]) -> None:
        """`deadlines`: key -> milliseconds since the epoch; kept, and read at each check."""
        self._deadlines = deadlines
        self._where: dict[str, tuple[int, int]] = {}
        """key -> the slot in which it will be checked. Entries for it in other slots are outdated."""
        self._slots: dict[tuple[int, int], dict[str, None]] = {}
        """(first millisecond, minus the number of bits of its width) -> its keys."""
        self._starts: list[tuple[int, int]] = []
        """A heap of the names of the slots; of two that begin together, the wider one comes first."""
        self._looked_at_ms = NEVER
        """While `due` has taken names off the heap: the first of them."""
        self._looks = 0
        """How many calls of `due` have put their names back."""

    def __len__(self) -> int:
        """The number of keys that will be checked."""
        return len(self._where)

    def next_due(self) -> int:
        """Return when to check next: the first deadline, or earlier. NEVER if no key has one."""
        if not self._deadlines:
            return NEVER
        while True:
            looks = self._looks
            try:
                first_ms = self._starts[0][0]
            except IndexError:
                first_ms = NEVER
            looked_at_ms = self._looked_at_ms  # after the heap: it is set before a name leaves the heap
            if self._looks == looks:
                return min(first_ms, looked_at_ms)
            # A look has ended in between: the heap may have been read during the look, and the rest after it.

    # --------------------------------------------------------------------------------------------------- placing

    def place(self, key: str, ms: int, now_ms: int) -> bool:
        """Make sure that `key` is checked by `ms`. Called before the write that gives it this deadline.

        Returns True if `next_due` is earlier than before.
        """
        known = self._where.get(key)
        if known is not None and known[0] <= ms:
            return not self._deadlines
        away = abs(ms - now_ms)
        bits = 18 if away >= _HOUR_MS else 12 if away >= _MINUTE_MS else 6 if away >= 64 else 0
        # With the first deadline of all, entries that earlier deadlines have left in the wheel count again.
        return self._move(key, (ms >> bits << bits, -bits), known) or not self._deadlines

    def place_all(self, deadlines: Mapping[str, int], now_ms: int) -> bool:
        """As `place`, for several keys."""
        earlier = False
        for key, ms in deadlines.items():
            earlier |= self.place(key, ms, now_ms)
        return earlier

    def fill(self, now_ms: int) -> None:
        """Place every key that has a deadline, such as those of a scope that was loaded."""
        self.place_all(self._deadlines, now_ms)

    def _move(self, key: str, name: tuple[int, int], known: tuple[int, int] | None) -> bool:
        """Put a key into a slot, and take it out of its present one. Returns True if no slot was before this one."""
        # In this order: wherever this is interrupted, the key is in a slot that will be checked.
        earliest = False
        slot = self._slots.get(name)
        if slot is None:
            # A name without a slot does no harm, nor does a duplicate name.
            starts = self._starts
            heapq.heappush(starts, name)
            slot = self._slots[name] = {}
            earliest = starts[0] is name
        slot[key] = None
        self._where[key] = name
        if known is not None and known != name and (old := self._slots.get(known)) is not None:
            old.pop(key, None)
        return earliest

    # -------------------------------------------------------------------------------------------------- dropping

    def forget(self, key: str) -> None:
        """Drop a key that has no deadline any more.

        Called after the write; without it the entry stays until it is checked.
        """
        self.forget_all((key,))

    def forget_all(self, keys: Iterable[str]) -> None:
        """As `forget`, for several keys. Those that have a deadline stay."""
        deadlines, slots = self._deadlines, self._slots
        for key in keys:
            name = None if key in deadlines else self._where.pop(key, None)
            if name is not None and (slot := slots.get(name)) is not None:
                slot.pop(key, None)
                if not slot:
                    del slots[name]
        self._drop_names()

    def _drop_names(self) -> None:
        starts, slots = self._starts, self._slots
        while starts and starts[0] not in slots:
            heapq.heappop(starts)

    # -------------------------------------------------------------------------------------------------- looking

    def due(self, now_ms: int, limit: int) -> list[str]:
        """Return the keys whose deadline is not after `now_ms`, by deadline, at most `limit`.

        They stay here until they have no deadline any more: if the write that removes them is refused, the next call
        finds them again. A call that has many keys to move returns fewer, perhaps none; `next_due` is then not after
        `now_ms`.
        """
        found: list[str] = []
        passed: list[tuple[int, int]] = []
        left = limit * _MOVED + 64
        starts, slots = self._starts, self._slots
        self._looked_at_ms = starts[0][0] if starts else NEVER
        try:
            while len(found) < limit and left > 0 and starts and starts[0][0] <= now_ms:
                name = starts[0]
                if passed and passed[-1] == name:  # a duplicate name
                    heapq.heappop(starts)
                    continue
                slot = slots.get(name, _NO_KEYS)
                keys = list(islice(slot, left if name[1] else min(left, limit - len(found))))
                left -= len(keys) + 1
                here = self._look(name, slot, keys, now_ms)
                found += here
                if len(slot) > len(here):
                    break  # the rest of this slot comes before the later ones
                if slot:
                    passed.append(name)
                else:
                    slots.pop(name, None)
                heapq.heappop(starts)
        finally:
            certainly(lambda: self._push(passed))
        self._drop_names()
        return found

    def _look(self, name: tuple[int, int], slot: dict[str, None], keys: list[str], now_ms: int) -> list[str]:
        """Move or drop these keys of a slot. Returns those that have expired, which stay in it."""
        here: list[str] = []
        deadlines, where = self._deadlines, self._where
        finer = _FINER[-name[1]]
        for key in keys:
            ms = deadlines.get(key)
            if where.get(key) != name:
                del slot[key]
            elif ms is None:
                del where[key]
                del slot[key]
            elif ms > now_ms:
                away = ms - now_ms
                bits = 18 if away >= _HOUR_MS else 12 if away >= _MINUTE_MS else 6 if away >= 64 else 0
                self._move(key, (ms >> bits << bits, -bits), name)
            elif name == (ms, 0):
                here.append(key)
            else:
                self._move(key, (ms >> finer << finer, -finer), name)
        return here

    def _push(self, names: list[tuple[int, int]]) -> None:
        for name in names:
            heapq.heappush(self._starts, name)
        self._looks += 1
        self._looked_at_ms = NEVER
