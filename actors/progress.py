"""The progress of a consumer of the journal: what is fetched, what is over, and what a save has to write. Pure.

Positions are those of the journal. A save writes `done`, which says that every delivery up to it is over except those
with a row of their own, and rows for everything else. Events of different scopes are saved in any order, so an event
below the newest one may come later: `floor` is how far all of them are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from scopestate.actors.consuming import Held, Outcome
from scopestate.actors.journal import ConsumerChange, Letter, Pending, SavedConsumer
from scopestate.ops.results import StateEvent

MANY: Final = 256
"""With more rows than this for deliveries that are over after `done`, the save chooses the form with fewer rows."""


class Progress:
    """What one consumer has done. Not for several threads at once."""

    def __init__(self, saved: SavedConsumer) -> None:
        self.number = saved.number
        self.floor = saved.done
        """Everything up to here was fetched."""
        self.above = set(saved.acked)
        """Positions after `floor` that were fetched."""
        self.open: dict[int, None] = {}
        """Deliveries that are not over."""
        self.dead = saved.dead
        """Dead letters that it has."""
        self._done = saved.done
        """The value of `done` that was saved last."""
        self._known = saved.pending
        self._begun = saved.begun
        self._rows = set(saved.pending)
        """Deliveries that have a row as pending in the store."""
        self._acked: list[int] = []
        """Deliveries that are over, and not saved yet as such."""
        self._over: list[int] = []
        """Deliveries that are over and need a row of their own in the next save."""
        self._pending: dict[int, Pending] = {}
        """Deliveries that are not over, and whose state is not saved yet."""
        self._letters: list[Letter] = []
        self._joined: set[int] = set()
        """Deliveries that a transaction acknowledges: over when the change of its scope is saved."""
        for position in saved.pending:
            self.open[position] = None

    # ------------------------------------------------------------------------------------------------------ fetching

    def pending_at_start(self) -> list[int]:
        """Return the positions up to `floor` that an earlier session has left, in order.

        Those after it come with the events around them: an earlier event of the same key may have been handled without
        that being saved.
        """
        return sorted(position for position in self._known if position <= self.floor)

    @property
    def has_begun(self) -> bool:
        """True if an attempt that an earlier session has begun was not fetched yet."""
        return bool(self._begun)

    def is_left(self, position: int) -> bool:
        """Return whether an earlier session has begun a delivery, or left a row of it."""
        return position in self._known

    def overlooked(self) -> list[int]:
        """Return the deliveries up to `floor` that an earlier session has left and that were not read, in order."""
        return sorted(position for position in self._known if position <= self.floor) if self._known else []

    def held(self, event: StateEvent) -> Held:
        """Return an event as a delivery, with what is known of its attempts."""
        position = event.position
        known, begun = self._known.pop(position, None), self._begun.pop(position, 0)
        if known is None:
            return Held(event, begun, cut_off=bool(begun))
        # An attempt that was interrupted by a kill is repeated at once.
        cut_off = begun > known.attempts
        due_ms = 0 if cut_off else known.due_ms
        return Held(event, max(known.attempts, begun), known.first_ms, due_ms, known.error, cut_off, known.held)

    def lost(self, position: int) -> None:
        """Drop a pending delivery whose event the journal does not have."""
        self._known.pop(position, None)
        self._acked.append(position)
        self.open.pop(position, None)

    def fetched(self, position: int) -> bool:
        """Record a fetched event that is to be handled. False: it was fetched before."""
        if position <= self.floor or position in self.above:
            return False
        self.above.add(position)
        self.open[position] = None
        return True

    def passed(self, position: int) -> None:
        """Record a fetched event that is not for this consumer."""
        if position > self.floor:
            self.above.add(position)

    def reach(self, floor: int) -> None:
        """Record that every event up to `floor` was fetched or passed."""
        if floor > self.floor:
            self.floor = floor
            self.above = {position for position in self.above if position > floor}

    # ------------------------------------------------------------------------------------------------------- outcomes

    def join(self, position: int) -> None:
        """Record that a transaction is about to acknowledge a delivery."""
        self._joined.add(position)

    def part(self, position: int) -> None:
        """Undo `join`: the transaction has failed."""
        self._joined.discard(position)

    def joined_is_saved(self, position: int) -> None:
        """Record that the change with the acknowledgement is on disk."""
        self._joined.discard(position)
        self._pending.pop(position, None)
        self._rows.discard(position)
        self._over.append(position)
        self.open.pop(position, None)

    def end(self, outcome: Outcome, now_ms: int) -> None:
        """Record how an attempt has ended."""
        position = outcome.position
        if position not in self.open or position in self._joined:
            return
        if outcome.verdict == "done":
            self._pending.pop(position, None)
            self._acked.append(position)
            self._over.append(position)
            del self.open[position]
            return
        blocked = outcome.verdict == "held"
        if outcome.verdict == "retry" or blocked:
            self._pending[position] = Pending(
                position, outcome.attempts, outcome.first_ms, outcome.due_ms, outcome.error, blocked
            )
        if outcome.verdict == "retry":
            return
        assert outcome.event is not None  # the runtime passes the event of a delivery that it gives up
        self._letters.append(
            Letter(
                0,
                self.number,
                outcome.event,
                outcome.attempts,
                outcome.first_ms,
                now_ms,
                outcome.error,
                outcome.traceback,
            )
        )
        if not blocked:
            self._pending.pop(position, None)
            self._rows.discard(position)
            del self.open[position]

    def reopen(self, pending: Pending) -> None:
        """Record that a dead letter is a delivery again, and is saved as one."""
        self.open[pending.position] = None
        self._rows.add(pending.position)
        self._known[pending.position] = pending
        self._begun.pop(pending.position, None)

    def released(self, position: int) -> None:
        """Record that a delivery is over, and that this is saved: the letter that held its lane back was purged."""
        self._pending.pop(position, None)
        self._rows.discard(position)
        self.open.pop(position, None)

    def losing(self, positions: Iterable[int]) -> list[int] | None:
        """Return which of these deliveries are not over. None: the outcome of some must be saved first."""
        if any(one.held for one in self._pending.values()):
            return None
        floor, above, still = self.floor, self.above, self.open
        return [p for p in positions if p in still or (p > floor and p not in above)]

    def skip(self, positions: Sequence[int]) -> list[int]:
        """Record that these deliveries are lost, and that this is saved. Return those that were fetched."""
        gone = [position for position in positions if position in self.open]
        for position in gone:
            del self.open[position]
            self._pending.pop(position, None)
            self._known.pop(position, None)
            self._begun.pop(position, None)
            self._rows.discard(position)
            self._joined.discard(position)
        self._done = max(self._done, *positions)
        self.reach(self._done)
        return gone

    # --------------------------------------------------------------------------------------------------------- saving

    def unsaved(self) -> int:
        """Return how many ended deliveries are not saved."""
        return len(self._acked) + len(self._pending) + len(self._letters)

    def change(self) -> ConsumerChange | None:
        """Return what a save has to write; None if nothing has changed. `saved` or nothing follows."""
        done = min(self.floor, min(self.open) - 1) if self.open else self.floor
        done = max(done, self._done)
        # Not deliveries that a transaction acknowledges: the acknowledgement may be in the same save, and is written
        # before.
        sent = {position: one for position, one in self._pending.items() if position not in self._joined}
        pending = list(sent.values())
        acked, rows = self._acked.copy(), self._rows
        behind = [position for position in acked if position > done]
        if len(behind) > MANY:
            high = min(self.floor, min(self._joined) - 1) if self._joined else self.floor
            bare = [p for p in self.open if p <= high and p not in rows and p not in self._pending]
            if len(bare) < len(behind):
                done = max(done, high)
                pending += [Pending(position) for position in bare]
        if done == self._done and not acked and not pending and not self._letters:
            return None
        self._sending = (len(self._acked), len(self._over), sent)
        told = [position for position in acked if position > done or position in rows]
        return ConsumerChange(self.number, done, told, pending, self._letters.copy(), self._over.copy())

    def saved(self, change: ConsumerChange) -> None:
        """Record that the last result of `change` is on disk."""
        count, over_count, pending = self._sending
        del self._acked[:count]
        del self._over[:over_count]
        del self._letters[: len(change.letters)]
        self._rows.difference_update(change.acked)
        over = set(self._acked)
        self._rows.update(one.position for one in change.pending if one.position in self.open or one.position in over)
        for position, sent in pending.items():
            if self._pending.get(position) is sent:
                del self._pending[position]
        self._done = max(self._done, change.done)

    _sending: tuple[int, int, dict[int, Pending]] = (0, 0, {})

    def oldest(self) -> int | None:
        """Return the position of the oldest delivery that is not over; None if there is none."""
        return min(self.open) if self.open else None
