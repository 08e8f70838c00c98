"""One consumer of a store's journal, whose events several engines handle: this one and its followers.

An engine *holds* an event that it was given and that is not over. As long as an engine holds an event of a lane, only
this engine is given the later events of that lane; events that are read for another engine are *parked*. So the events
of a lane are handled one after the other, whichever engines handle them, and each engine keeps the order of what it
holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.backlog import size_of
from scopestate.actors.consuming import Held, Outcome
from scopestate.actors.containment import Log
from scopestate.actors.holders import Early, Hold, Holder, SharedLane, Source
from scopestate.errors import StorageError, Unsupported
from scopestate.ops.triggers import Trigger
from scopestate.signals import Guard

if TYPE_CHECKING:
    from scopestate.ops.results import StateEvent

log = Log("scopestate.triggers")

HERE: Final = ""
"""The name of this engine as a holder."""
ENDED: Final = -1
"""In place of the number of an attempt: it has ended, and its outcome is not reported yet."""
MOST_PARKED: Final = 10_000
"""The most events that are parked. With more, nothing is read until some of them are given to an engine."""
MOST_PARKED_BYTES: Final = 64 << 20
NEAR_MS: Final = 1000
"""As `actors.fetching.NEAR_S`: a retry that is due later is not waited for."""

_SELECTING: Final = ("scope", "key", "scope_prefix", "prefix", "events", "only_if_changed", "fields", "order")
"""The options of a trigger that say which events a consumer has, and in which order."""


def selects_alike(one: Trigger, other: Trigger) -> bool:
    """Return whether two triggers of one consumer want the same events in the same order."""
    return all(getattr(one, name) == getattr(other, name) for name in _SELECTING)


def standing_by(consumer: str) -> str:
    """Return the text that says that an engine's trigger gets no events, because a newer one has other filters."""
    return (
        f"the trigger of consumer {consumer!r} here stands by: another process has registered the name later, "
        "with other filters or another order, which apply now"
    )


class SharedConsumer:
    """Decides which engine handles which event.

    Methods may be called from any thread; `fetch` may wait for the disk.
    """

    def __init__(self, source: Source, now_ms: Callable[[], int], monotonic: Callable[[], float]) -> None:
        self._source = source
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._guard = Guard()
        self._holders: dict[str, Holder] = {}
        self._holds: dict[int, Hold] = {}
        self._lanes: dict[Any, SharedLane] = {}
        self._ready: dict[Any, None] = {}
        """Lanes that have parked events, and of which no engine holds an event."""
        self._parked = self._parked_bytes = 0
        self.leading: Trigger | None = None
        """The trigger that says which events are read, and in which order they are handled."""
        self._waiters: list[Callable[[], object]] = []
        self._has_ended = False
        self._early: Early | None = None
        """What begins and ends here between `expect` and `begin`; None: at any other time."""
        self._unclaimed: Holder | None = None
        """Holds what each engine was handling when the previous owner ended, until that engine claims it."""

    def expect_claims(self) -> None:
        """Keep what was begun in the previous session for the engine that handles it, which is about to join."""
        trigger = Trigger("", "", durable=self._source.name)
        self._unclaimed = Holder("", trigger, 0, lambda: None, lambda positions: None, self._monotonic)

    def end_claims(self) -> None:
        """Deliver again the events that are not claimed by now."""
        self._guard.run(self._end_claims)
        self.wake_all()

    def _end_claims(self) -> None:
        unclaimed, self._unclaimed = self._unclaimed, None
        if unclaimed is not None:
            self._park(list(unclaimed.holds.values()))

    def expect(self, here: Holder) -> None:
        """Record what begins and ends in this engine, which takes events already, until `begin` follows."""
        self._holders[HERE] = here
        self.leading = here.trigger
        self._early = Early({}, [])

    def begin(self, items: Sequence[Held], running: Mapping[int, int]) -> None:
        """Record what this engine holds: everything that was fetched, and was not over a moment ago."""
        here, ended = self._guard.run(self._begin, items, running)
        self.ended(here, ended, is_taken=True)

    def _begin(self, items: Sequence[Held], running: Mapping[int, int]) -> tuple[Holder, list[Outcome]]:
        here, early = self._holders[HERE], self._early or Early({}, [])
        self._early = None
        begun = {**running, **early.begun}
        for item in items:
            attempt = max(begun.get(item.event.position, 0), 0)
            self._put(Hold(item, here, self._lane_of(item.event), attempt))
        return here, early.ended

    # ------------------------------------------------------------------------------------------------------- holders

    @property
    def here(self) -> Holder | None:
        """This engine, if it has a trigger."""
        return self._holders.get(HERE)

    @property
    def stands_by_here(self) -> bool:
        """True if the trigger of this engine gets no events, because a newer one applies."""
        here = self.here
        return here is not None and here.stands_by and not here.is_leaving

    @property
    def is_served_elsewhere(self) -> bool:
        """True if another engine takes events, or may come back for what it was handling."""
        return self._unclaimed is not None or any(name != HERE for name in list(self._holders))

    @property
    def is_forgotten(self) -> bool:
        """True if the consumer is gone."""
        return self._source.forgotten

    @property
    def source(self) -> Source:
        """The consumer."""
        return self._source

    def holder(self, name: str) -> Holder | None:
        """Return the holder with this name; None if no engine has it, or if it was dismissed."""
        return self._holders.get(name)

    def join(self, holder: Holder, held: Sequence[tuple[int, int, int]] = ()) -> list[int] | None:
        """Add an engine that takes events. `held`: what it already holds: position, running attempt, its serial.

        The attempt is 0 if none has begun, or if the next one waits; `ENDED`: its outcome follows. An event that has
        not begun is kept only if everything before it in its lane is over or held by the same engine. Returns the
        positions that it no longer holds: they are over, or another engine has them. None: sharing has ended; ask the
        consumer to share again.
        """
        with self._source.reading:
            if self._has_ended:
                return None
            claimed = self._source.claim([position for position, attempt, _ in held if attempt])
            lost, changed = self._guard.run(self._join, holder, held, {one.event.position: one for one in claimed})
        self._tell(changed)
        return lost

    def _join(
        self, holder: Holder, held: Sequence[tuple[int, int, int]], claimed: dict[int, Held]
    ) -> tuple[list[int], list[tuple[Holder, list[int]]]]:
        before = self._holders.pop(holder.name, None)
        kept = {position for position, _, _ in held}
        if before is not None:
            holder.given = before.given
            for hold in list(before.holds.values()):
                self._move(hold, holder)
        self._holders[holder.name] = holder
        changed = self._elect()
        # An event that it was given and never got; it is the first of its lane again.
        self._park([hold for hold in list(holder.holds.values()) if hold.item.event.position not in kept])
        places = {position: lane for lane in self._lanes.values() for position in kept.intersection(lane.parked)}
        lost: list[int] = []
        # First the events that are running, or were: they cannot be given to another engine now.
        for position, attempt, serial in sorted(held, key=lambda one: (not one[1], one[0])):
            lane = places.get(position)
            if attempt:
                mine = self._claimed(holder, position, claimed.pop(position, None), lane)
            else:
                mine = self._kept(holder, position, lane)
            if mine is None:
                lost.append(position)
                continue
            mine.begun, mine.serial = max(attempt, 0), serial
            if attempt:
                self._set_waits(mine, waits=False)
        for item in claimed.values():  # no engine has it now
            self._park_one(item)
        holder.given = deque([item for item in holder.given if item.event.position not in kept])
        return lost, changed

    def _claimed(self, holder: Holder, position: int, item: Held | None, parked_in: SharedLane | None) -> Hold | None:
        """Return an event whose attempt is running in an engine as held by it; None if another engine has it."""
        hold = self._holds.get(position)
        if hold is None:
            if item is None and parked_in is not None and parked_in.is_open_to(holder):
                item = self._unpark(parked_in, position)
            if item is None:
                return None
            hold = Hold(item, holder, self._lane_of(item.event))
            self._put(hold)
        elif hold.holder is self._unclaimed:
            self._move(hold, holder)
        return hold if hold.holder is holder else None

    def _kept(self, holder: Holder, position: int, parked_in: SharedLane | None) -> Hold | None:
        """Return an event that an engine has not begun as held by it; None: it comes in the order of its lane.

        An event that was not read yet, or waits to be claimed, is not kept either: earlier events of its lane may come.
        """
        hold = self._holds.get(position)
        lane = parked_in if hold is None else hold.lane
        if holder.stands_by or lane is None or (hold is not None and hold.holder is not holder):
            return None
        first = next(iter(lane.parked), position)
        if not lane.is_open_to(holder) or first < position:
            if hold is not None:
                self._park([hold])
            return None
        if hold is None:
            hold = Hold(self._unpark(lane, position), holder, lane)
            self._put(hold)
            self._set_waits(hold, waits=hold.item.blocked or hold.item.due_ms > self._now_ms())
        return hold

    def _unpark(self, lane: SharedLane, position: int) -> Held:
        item = lane.parked.pop(position)
        self._count_parked(item, -1)
        self._ready.pop(lane.name, None)
        return item

    def leave(self, name: str) -> None:
        """Remove an engine: it closes, it is gone, or its trigger is.

        Its events go to other engines. May wait for the disk.
        """
        holder = self._holders.get(name)
        for position, hold in [] if holder is None else list(holder.holds.items()):
            if hold.fence is not None and holder is not None and self.resolve(holder, position, hold.serial):
                self.lose((position,))  # it was acknowledged by its transaction
        changed = self._guard.run(self._leave, name)
        self._tell(changed)
        self._wake()

    def retire(self, name: str) -> None:
        """Give an engine no more events. It may finish what it is handling; the rest goes to others."""
        self._tell(self._guard.run(self._retire, name))
        self._wake()

    def _retire(self, name: str) -> list[tuple[Holder, list[int]]]:
        holder = self._holders.get(name)
        if holder is None:
            return []
        holder.is_leaving = holder.stands_by = True
        idle = [hold for hold in holder.holds.values() if not hold.begun]
        positions = [hold.item.event.position for hold in idle]
        self._park(idle)
        holder.given.clear()
        if not holder.holds:
            del self._holders[name]
        return [*([(holder, positions)] if positions else []), *self._elect()]

    def _leave(self, name: str) -> list[tuple[Holder, list[int]]]:
        holder = self._holders.pop(name, None)
        if holder is None:
            return []
        for hold in holder.holds.values():
            if hold.begun:
                hold.item = msgspec.structs.replace(hold.item, attempts=hold.begun, cut_off=True, due_ms=0)
        self._park(list(holder.holds.values()))
        return self._elect()

    def _elect(self) -> list[tuple[Holder, list[int]]]:
        """Find out whose trigger applies. Returns engines, each with the events taken away from it."""
        holders = [one for one in self._holders.values() if not one.is_leaving]
        if not holders:
            return []
        newest = max(holders, key=lambda one: one.since_ms)
        before, self.leading = self.leading, newest.trigger
        self._source.follow(newest.trigger)
        changed = []
        for one in holders:
            stood, one.stands_by = one.stands_by, not selects_alike(one.trigger, newest.trigger)
            if one.stands_by and not stood:
                log.warning("%s (%s)", standing_by(self._source.name), one.trigger.trigger_id)
            if one.stands_by is not stood:
                one.wake()
            if one.stands_by:
                changed.append((one, [hold for hold in one.holds.values() if not hold.begun]))
        told = [(one, [hold.item.event.position for hold in holds]) for one, holds in changed if holds]
        self._park([hold for _, holds in changed for hold in holds])
        if before is not None and before.order != newest.trigger.order:
            self._sort_again()
        return told

    def _sort_again(self) -> None:
        """Sort all held and parked events into lanes again, because the order has changed."""
        holds = sorted(self._holds.values(), key=lambda one: one.item.event.position)
        parked = sorted(
            (item for lane in self._lanes.values() for item in lane.parked.values()), key=lambda one: one.event.position
        )
        for holder in self._holders.values():
            holder.active = holder.lanes = 0
        self._lanes, self._ready, self._holds, self._parked, self._parked_bytes = {}, {}, {}, 0, 0
        for hold in holds:
            waits, hold.waits = hold.waits, False
            hold.lane = self._lane_of(hold.item.event)
            self._put(hold)
            self._set_waits(hold, waits=waits)
        for item in parked:
            self._park_one(item)

    # ------------------------------------------------------------------------------------------------------ fetching

    def fetch(self, holder: Holder | None, most: int) -> list[Held]:
        """Return the next events for an engine, [] if there are none for it now. Raises StorageError."""
        if holder is None or self._source.paused() is not None:
            return []
        found, more = self._guard.run(self._give, holder, most)
        try:
            while more > 0 and self._may_read():
                with self._source.reading:
                    read = self._source.read(more)
                    if not read:
                        break
                    mine, more = self._guard.run(self._sort, holder, read, most - len(found))
                    found += mine
        except StorageError:
            self.keep(holder, found)
            raise
        if len(found) < most:
            holder.is_hungry = True
        if holder.name == HERE and not self.is_served_elsewhere:
            with self._source.reading:  # not while another engine joins
                self._guard.run(self._go_on_alone)
        return found

    def _may_read(self) -> bool:
        return self._parked < MOST_PARKED and self._parked_bytes < MOST_PARKED_BYTES

    def _go_on_alone(self) -> None:
        here = self.here
        others = self._parked or self._unclaimed is not None
        if here is not None and list(self._holders) == [HERE] and not others and not here.given:
            self._has_ended = True
            self._source.end_sharing()

    def _give(self, holder: Holder, most: int) -> tuple[list[Held], int]:
        """Return the parked events that go to this engine, and how many more it may get."""
        given = holder.given
        found = [given.popleft() for _ in range(min(most, len(given)))]
        if self._holders.get(holder.name) is not holder or holder.stands_by:
            return found, 0
        while (more := min(holder.room(), most - len(found))) > 0 and self._ready:
            name = next(iter(self._ready))
            lane = self._lanes[name]
            del self._ready[name]
            for item in list(islice(lane.parked.values(), more)):
                del lane.parked[item.event.position]
                self._count_parked(item, -1)
                self._put(Hold(item, holder, lane))
                found.append(item)
                if item.due_ms > self._now_ms() or item.blocked:
                    self._set_waits(self._holds[item.event.position], waits=True)
        return found, more

    def _sort(self, holder: Holder, items: Iterable[Held], most: int) -> tuple[list[Held], int]:
        """Return those of these events that go to this engine, and how many more it may get. The others are parked."""
        found = []
        gone = self._holders.get(holder.name) is not holder or holder.stands_by
        for item in items:
            position = item.event.position
            hold = self._holds.get(position)
            lane = self._lane_of(item.event)
            if hold is not None:  # a dead letter that held back its lane is replayed
                hold.item = item
                self._set_waits(hold, waits=item.blocked)
                if hold.holder is holder:
                    found.append(item)
                else:
                    hold.holder.given.append(item)
                    hold.holder.wake()
            elif position in lane.parked:
                lane.parked[position] = item
            elif self._unclaimed is not None and item.cut_off:
                self._put(Hold(item, self._unclaimed, lane))
            elif gone or lane.parked or lane.waits or not lane.is_open_to(holder):
                self._park_one(item)
            else:
                hold = Hold(item, holder, lane)
                self._put(hold)
                self._set_waits(hold, waits=item.blocked or item.due_ms > self._now_ms())
                found.append(item)
        return found, 0 if gone else min(holder.room(), most - len(found))

    def keep(self, holder: Holder, items: Sequence[Held]) -> None:
        """Give these events to the engine with its next fetch, because they were too many for one answer."""
        self._guard.run(holder.given.extendleft, reversed(items))

    # ------------------------------------------------------------------------------------------------------ outcomes

    def began(self, holder: Holder, attempts: Sequence[tuple[int, int]], serial: int = 0) -> list[int]:
        """Record attempts that are about to begin. Returns the positions that the engine does not hold.

        `serial`: a number that the engine gives to this message alone; `fence` and `resolve` name the attempts by it.
        """
        held, gone = self._guard.run(self._began, holder, attempts, serial)
        if held:
            self._source.note(held)
        return gone

    def _began(
        self, holder: Holder, attempts: Sequence[tuple[int, int]], serial: int
    ) -> tuple[list[tuple[int, int]], list[int]]:
        if self._early is not None:
            self._early.begun.update(attempts)
            return list(attempts), []
        held, gone = [], []
        for position, attempt in attempts:
            hold = holder.holds.get(position)
            if hold is None:
                gone.append(position)
                continue
            hold.begun, hold.serial, hold.item.due_ms = attempt, serial, 0
            self._set_waits(hold, waits=False)
            held.append((position, attempt))
        return held, gone

    def ended(self, holder: Holder, outcomes: Sequence[Outcome], *, is_taken: bool = False) -> None:
        """Record how attempts have ended. Events that the engine no longer holds do not count.

        `is_taken`: the consumer knows them already.
        """
        count, failed = self._guard.run(self._ended, holder, outcomes)
        for position in failed:
            self._source.transaction_failed(position)
        if count:
            # Before the lanes continue: a save must not contain the next event of a lane without this one.
            if not is_taken:
                self._source.take(count)
            self._guard.run(self._let_go, holder, count)
            self._wake()

    def _ended(self, holder: Holder, outcomes: Sequence[Outcome]) -> tuple[list[Outcome], list[int]]:
        if self._early is not None:
            self._early.ended.extend(outcomes)
            return list(outcomes), []
        count, failed = [], []
        known: set[int] = set()
        for outcome in outcomes:
            hold = holder.holds.get(outcome.position)
            if hold is None or outcome.position in known:
                continue
            known.add(outcome.position)
            if outcome.verdict in ("dead", "held") and outcome.event is None:
                outcome = msgspec.structs.replace(outcome, event=hold.item.event)  # noqa: PLW2901 - as it counts
            count.append(outcome)
            hold.begun = hold.serial = 0
            fence, hold.fence = hold.fence, None
            if fence is not None:
                fence.setdefault("won", "end")
                if "changed" not in fence:
                    failed.append(outcome.position)
        return count, failed

    def _let_go(self, holder: Holder, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            hold = holder.holds.get(outcome.position)
            if hold is None:
                continue
            holder.pace.ended += 1
            if outcome.verdict in ("done", "dead"):
                self._drop(hold)
                continue
            hold.item = msgspec.structs.replace(
                hold.item,
                attempts=outcome.attempts,
                first_ms=outcome.first_ms,
                due_ms=outcome.due_ms,
                error=outcome.error,
                cut_off=False,
                blocked=outcome.verdict == "held",
            )
            if holder.is_leaving:
                self._park([hold])
            else:
                self._set_waits(hold, waits=True)
        if holder.is_leaving and not holder.holds and self._holders.get(holder.name) is holder:
            del self._holders[holder.name]

    def lose(self, positions: Sequence[int]) -> None:
        """End these deliveries: their dead letters were purged, or their events trimmed."""
        self._tell(self._guard.run(self._lose, positions))
        self._wake()

    def _lose(self, positions: Sequence[int]) -> list[tuple[Holder, list[int]]]:
        lost: dict[Holder, list[int]] = {}
        for position in positions:
            hold = self._holds.get(position)
            if hold is not None:
                lost.setdefault(hold.holder, []).append(position)
                self._drop(hold)
        gone = set(positions)
        for lane in [lane for lane in self._lanes.values() if not gone.isdisjoint(lane.parked)]:
            for position in gone.intersection(lane.parked):
                self._count_parked(lane.parked.pop(position), -1)
            self._tidy(lane)
        return list(lost.items())

    # -------------------------------------------------------------------------------------------------- transactions

    def fence(self, holder: Holder, position: int, serial: int) -> dict[str, str]:
        """Return the fence of the transaction of an attempt. Raises Unsupported if the attempt is over."""
        return self._guard.run(self._fence, holder, position, serial)

    def _fence(self, holder: Holder, position: int, serial: int) -> dict[str, str]:
        hold = holder.holds.get(position)
        if hold is None or self._holders.get(holder.name) is not holder or hold.serial != serial:
            raise Unsupported(
                "a delivery whose attempt is over", f"'{self._source.name}:{position}': it has ended, or took too long"
            )
        hold.fence = fence = dict[str, str]()
        return fence

    def resolve(self, holder: Holder, position: int, serial: int) -> bool:
        """Return whether the transaction of an attempt has happened.

        After this call it can no longer happen. May wait for the disk.
        """
        hold = holder.holds.get(position)
        fence = None if hold is None else hold.fence
        if hold is not None:
            if hold.serial == serial:
                hold.serial = 0
            if fence is None:
                return False
            hold.fence = None
            if fence.setdefault("won", "end") == "turn":
                # It was changed in memory, or is being changed right now. This waits for a commit that holds it back.
                try:
                    self._source.flush()
                except StorageError as error:
                    log.debug("saving a transaction of '%s:%d': %s", self._source.name, position, error)
        if self._source.is_acknowledged(position):
            return True
        if fence is not None:
            self._source.transaction_failed(position)
        return False

    # ----------------------------------------------------------------------------------------------------- the tables

    def _lane_of(self, event: StateEvent) -> SharedLane:
        order = "key" if self.leading is None else self.leading.order
        if order == "key":
            name: Any = (event.scope, event.key)
        elif order == "scope":
            name = event.scope
        else:
            name = event.position if order == "none" else None
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = SharedLane(name)
        return lane

    def _put(self, hold: Hold) -> None:
        position, lane = hold.item.event.position, hold.lane
        lane.holds[position] = self._holds[position] = hold.holder.holds[position] = hold
        lane.add(hold.holder, 1)

    def _drop(self, hold: Hold) -> None:
        position, lane = hold.item.event.position, hold.lane
        self._set_waits(hold, waits=False)
        del lane.holds[position], self._holds[position], hold.holder.holds[position]
        lane.add(hold.holder, -1)
        self._tidy(lane)

    def _tidy(self, lane: SharedLane) -> None:
        """Update a lane from which an event was taken."""
        if lane.holds:
            return
        if lane.parked:
            self._ready[lane.name] = None
        else:
            self._ready.pop(lane.name, None)
            self._lanes.pop(lane.name, None)

    def _move(self, hold: Hold, holder: Holder) -> None:
        """Move a hold to another entry of the same engine."""
        position, before = hold.item.event.position, hold.holder
        del before.holds[position]
        holder.holds[position] = hold
        hold.lane.add(before, -1)
        hold.lane.add(holder, 1)
        hold.holder = holder

    def _set_waits(self, hold: Hold, *, waits: bool) -> None:
        if hold.waits is waits:
            return
        lane, hold.waits = hold.lane, waits
        before = lane.waits
        lane.waits += 1 if waits else -1
        if not before or not lane.waits:
            by = -1 if waits else 1
            for holder, count in lane.holders.items():
                holder.active += by * count
                holder.lanes += by

    def _park(self, holds: Sequence[Hold]) -> None:
        """Take these events from the engines that hold them, and park them before the other events of their lanes."""
        first: dict[SharedLane, list[Held]] = {}
        for hold in holds:
            lane = hold.lane
            first.setdefault(lane, []).append(hold.item)
            parked, lane.parked = lane.parked, {}
            self._drop(hold)
            lane.parked = parked
        for lane, items in first.items():
            lane.parked = _in_order({**{item.event.position: item for item in items}, **lane.parked})
            for item in items:
                self._count_parked(item, 1)
            self._lanes[lane.name] = lane
            self._tidy(lane)

    def _park_one(self, item: Held) -> None:
        lane = self._lane_of(item.event)
        position = item.event.position
        comes_last = not lane.parked or next(reversed(lane.parked)) < position
        lane.parked[position] = item
        if not comes_last:
            lane.parked = _in_order(lane.parked)
        self._count_parked(item, 1)
        self._tidy(lane)

    def _count_parked(self, item: Held, by: int) -> None:
        self._parked += by
        self._parked_bytes += by * size_of(item.event)

    def _tell(self, changed: Sequence[tuple[Holder, list[int]]]) -> None:
        for holder, positions in changed:
            holder.lost(positions)

    def _wake(self) -> None:
        """Wake the engines that look for more."""
        for holder in list(self._holders.values()):
            if holder.is_hungry:
                holder.is_hungry = False
                holder.wake()
        if self._waiters:
            for waiter in self._waiters.copy():
                waiter()

    def wake_all(self) -> None:
        """Wake all engines: there may be something to fetch."""
        for holder in list(self._holders.values()):
            holder.wake()
        for waiter in self._waiters.copy():
            waiter()

    # ------------------------------------------------------------------------------------------------------- waiting

    def watch(self, waiter: Callable[[], object]) -> Callable[[], object]:
        """Call `waiter` whenever something has ended. Returns a function that stops this."""
        self._guard.run(self._waiters.append, waiter)
        return lambda: self._guard.run(self._waiters.remove, waiter)

    def is_settled(self, mark: int) -> bool:
        """Return whether no event up to a position will be handled soon: none is left, or all of them wait long."""
        if self._source.paused() is not None or not (self._holders or self._unclaimed):
            return not any(hold.begun for hold in list(self._holds.values()))
        return self._source.is_read_to(mark) and self._guard.run(self._is_settled, mark)

    def _is_settled(self, mark: int) -> bool:
        near_ms = self._now_ms() + NEAR_MS
        for lane in self._lanes.values():
            items = [*[hold.item for hold in lane.holds.values()], *lane.parked.values()]
            if any(hold.waits and _is_far(hold.item, near_ms) for hold in lane.holds.values()):
                continue
            if items and min(item.event.position for item in items) <= mark and not _is_far(items[0], near_ms):
                return False
        return True


def _in_order(parked: dict[int, Held]) -> dict[int, Held]:
    return dict(sorted(parked.items()))


def _is_far(item: Held, near_ms: int) -> bool:
    return item.blocked or item.due_ms > near_ms
