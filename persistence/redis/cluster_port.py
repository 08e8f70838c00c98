"""One durable trigger in a cluster, as an engine sees it: a `RedisPort` for each slot in use, behind one port."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from scopestate.actors.consuming import Held, Outcome
from scopestate.actors.pace import Pace
from scopestate.errors import StorageError, Unsupported
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.persistence.redis.cluster_events import ClusterReader
from scopestate.persistence.redis.cluster_lines import Lines, SlotLine
from scopestate.persistence.redis.consuming import Begin
from scopestate.persistence.redis.entries import state_event_of
from scopestate.persistence.redis.keeping import KeptPort
from scopestate.persistence.redis.port import Line, Place, RedisPort, lane_of
from scopestate.persistence.redis.registry import Record, Registry

log = logging.getLogger("scopestate.persistence.redis")

SLOTS: Final = 16_384
BASE_US: Final = 10
"""The base of the positions in a slot is a time in units of so many microseconds: then they fit into 63 bits."""
BEHIND_ALL: Final = Begin("at", "0", 0)
"""Where a consumer begins in a slot that has come into use after it was made: with the first event ever."""
NO_LIMIT: Final = 1 << 60
"""What a slot is told about `max_dead`: the limit is that of all slots together."""
_ENOUGH: Final = 16
"""With so many events, no further slot is asked."""
_MOST_TRIES: Final = 20_000
"""How many slots are asked by one call, if they have nothing that the filters let through."""
_AGAIN_S: Final = 0.5
"""Pause before a slot is asked again whose server has failed."""
_COUNTED_S: Final = 1.0
"""How long a count of all dead letters is good for."""
_MOST_MARKS: Final = 1000


def position_of(base: int, number: int, slot: int) -> int:
    """Return the position of an event. `base`: that of its slot, as it is stored there."""
    return (base // BASE_US + number) * SLOTS + slot


def place_in_slot(position: int) -> tuple[int, int]:
    """Return the slot of a position, and what `number_at` takes."""
    return position % SLOTS, position // SLOTS


class SlotPlace(Place):
    """Where the consumers are in one slot."""

    def __init__(self, hub: Hub, lines: Lines, slot: int) -> None:
        published = hub.reader.published(slot)
        target = hub.reader.servers.pool_of(slot).target
        super().__init__(hub.reader.shape.in_slot(slot), target, hub.engine, 0.0, lambda: published.newest)
        self._lines = lines
        self._slot = slot

    @property
    def address(self) -> str:
        return self._lines.address_of(self._slot)

    def event_of(self, entry_id: bytes, fields: list[bytes], base: int) -> StateEvent | None:
        event = state_event_of(entry_id, fields, 0)
        if event is not None:
            event.position = position_of(base, event.position, self._slot)
        return event

    def line(self) -> Line:
        return SlotLine(self, self._lines, self._slot)


class Hub(Protocol):
    """What the ports of one engine share."""

    reader: ClusterReader
    registry: Registry
    engine: str
    limit: str

    def ring(self) -> None:
        """Have the keeper check now."""

    def nudge(self) -> None:
        """Note that a delivery has ended."""

    def enlist(self, port: KeptPort) -> None:
        """Take care of a consumer."""

    def lines(self) -> Lines:
        """Return new connections to the servers."""

    def count_letters(self, name: str) -> int:
        """Return how many dead letters a consumer has, in slots whose server can be reached."""


class SlotPort(RedisPort):
    """The part of one consumer that is in one slot."""

    def __init__(self, owner: ClusterPort, place: SlotPlace, trigger: Trigger, slot: int, life: str) -> None:
        """`life`: see `registry.Record`."""
        hub = owner.hub
        super().__init__(owner.name, place, trigger, hub.limit, hub.ring, hub.nudge, lambda _: None)
        self.slot = slot
        self._owner = owner
        self._life = life
        self._pace = owner.pace

    def take(self, most: int) -> tuple[list[Held], bool]:
        """Return the next events, and whether there may be more now. Raises StorageError."""
        with self._exclusive:
            self._send_outcomes()
            return ([], False) if self.stopping or most <= 0 else self._fetch(most)

    @property
    def is_busy(self) -> bool:
        """True if it holds events, or has something to report."""
        return bool(self._held or self._outcomes or self._has_failed)

    @property
    def number(self) -> int:
        """The last number that the consumer has read, as far as this engine knows."""
        return self._number

    @property
    def lives(self) -> int:
        """How often the numbers have begun again."""
        return self._lives

    def active(self) -> list[bytes]:
        """Return the events that it holds, without those of lanes that wait for another attempt."""
        late = {lane_of(self._held[position]) for position in list(self._waiting) if position in self._held}
        return [member for member in list(self._held.values()) if not late or lane_of(member) not in late]

    def unsent_letters(self) -> int:
        """Return how many dead letters are not in Redis yet."""
        return sum(said[0] in {"x", "b"} for _, said in list(self._outcomes))

    def _room(self) -> int:
        return self._owner.room()

    def _joining(self, begin: Begin, trigger: Trigger) -> tuple[tuple[Any, ...], ...]:
        *others, _ = super()._joining(begin, trigger)
        return *others, self._names.join(begin, self._limit, NO_LIMIT)

    def look_again(self, life: str) -> None:
        """If the consumer is not in this slot any more, make it again. Raises StorageError."""
        gone: list[int] = []
        with self._exclusive:
            (exists,) = self._ask(self._names.exists())
            if not exists:
                gone = self._begin_anew()
            self._life = life
        if gone:
            self._lost(gone)

    def _was_forgotten(self) -> bool:
        record = self._owner.record()
        forgotten = record is None or record.life != self._life or record.state == "forgetting"
        self._life = "" if record is None else record.life
        return forgotten


class ClusterPort(KeptPort):
    """One consumer of a cluster."""

    notes_at_once = 1
    """Attempts in different slots cannot be recorded together, and one that cannot be must not hold up the others."""

    def __init__(self, name: str, trigger: Trigger, hub: Hub) -> None:
        self.name = name
        self.hub = hub
        self.pace = Pace()
        self._trigger = trigger
        self._lines = hub.lines()
        self._life = ""
        """Which life of the consumer this is: see `registry.Record`."""
        self._ports: dict[int, SlotPort] = {}
        self._busy: dict[int, SlotPort] = {}
        """Those that hold events, or have something to report."""
        self._changing = threading.Lock()
        """Held while it is decided whether a slot is busy."""
        self._exclusive = threading.Lock()
        """Held by `fetch`."""
        self._due: deque[int] = deque()
        self._is_due: set[int] = set()
        """Slots to ask for events, in this order."""
        self._later: dict[int, float] = {}
        """Slot -> when to ask it. On the monotonic clock."""
        self._failed: dict[int, float] = {}
        """Slot -> until when it is left alone, because its server has failed."""
        self._troubles: dict[int, str] = {}
        """Slot -> why no events could be taken from it."""
        self._wake: Callable[[], object] = _nothing
        self._lost: Callable[[Sequence[int]], object] = _nothing
        self._started = False
        self._is_full = False
        self._pause = ""
        self._marks: dict[int, dict[int, tuple[int, int]]] = {}
        self._last_mark = 0
        self._counting = threading.Lock()
        self._letters = 0
        self._counted_s = 0.0

    # ---------------------------------------------------------------------------------------------- for the runtime

    def join(self, begin: Begin) -> bool:
        """Make the consumer if there is none, in every slot that is in use. Raises StorageError.

        Return False if another engine is just removing it.
        """
        record = self.hub.registry.join(self.name)
        if record.state == "forgetting":
            return False
        if record.state == "joining":
            for slot in self.hub.reader.slots_in_use():
                known = self._ports.get(slot)
                if known is not None:
                    known.look_again(record.life)
                else:
                    self._port(slot, begin, record.life)
            if not self.hub.registry.ready(self.name, record.life):
                raise StorageError(f"consumer {self.name!r} was forgotten while it was being made: try again")
        self._life = record.life
        return True

    def start(
        self,
        trigger: Trigger,
        wake: Callable[[], object],
        lost: Callable[[Sequence[int]], object],
        running: Callable[[], Mapping[int, int]],
    ) -> None:
        self._trigger, self._wake, self._lost = trigger, wake, lost
        self.stopping = self.is_over = False
        self._started = True
        for port in list(self._ports.values()):
            port.start(trigger, self._waker(port.slot), lost, running)
        self.hub.enlist(self)
        self.note(self.hub.reader.known_slots())

    def stop(self) -> None:
        self.stopping = True
        self._wake = _nothing
        for port in list(self._ports.values()):
            port.stop()
        self.hub.ring()

    def note(self, slots: Iterable[int]) -> None:
        """Note that there may be events in these slots. From any thread."""
        for slot in slots:
            if slot not in self._is_due:
                self._is_due.add(slot)
                self._due.append(slot)
        self._wake()

    def fetch(self, most: int) -> list[Held]:
        found: list[Held] = []
        with self._exclusive:
            self._report()  # it makes room
            for _ in range(_MOST_TRIES):
                if self.stopping or self._pause or len(found) >= _ENOUGH:
                    break
                room = min(most - len(found), self.room())
                if room <= 0:
                    self._is_full = not found
                    break
                try:
                    slot = self._due.popleft()
                except IndexError:
                    break
                self._is_due.discard(slot)
                found += self._take(slot, room)
            else:
                self._wake()  # after others had their turn
        return found

    def began(self, attempts: Sequence[tuple[int, int]]) -> None:
        for slot, some in _by_slot(attempts, lambda attempt: attempt[0]).items():
            port = self._ports.get(slot)
            if port is None:
                self._lost([position for position, _ in some])
            else:
                port.began(some)

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        for slot, some in _by_slot(outcomes, lambda one: one.position).items():
            port = self._ports.get(slot)
            if port is not None:
                port.ended(some)

    def flush(self) -> None:
        for port in list(self._busy.values()):
            port.flush()

    def transaction(self, position: int, scope: str) -> Any:
        slot, _ = place_in_slot(position)
        if self.hub.reader.slot_of_scope(scope) != slot:
            raise Unsupported(
                f"a transaction of scope {scope!r} that acknowledges delivery {self.name}:{position}",
                "in a cluster both must be in one slot: use the scope of the event, or give both scopes the same text "
                "in braces, such as `{order-7}` and `{order-7}:log`",
            )
        port = self._ports.get(slot)
        if port is None:
            raise StorageError(f"delivery {self.name}:{position} is not this engine's")
        return port.transaction(position, scope)

    def is_acknowledged(self, position: int) -> bool:
        port = self._ports.get(place_in_slot(position)[0])
        return port is None or port.is_acknowledged(position)

    def mark(self) -> int:
        wanted: dict[int, tuple[int, int]] = {}
        for slot, newest in self.hub.reader.published_by_slot():
            port = self._ports.get(slot)
            if port is None:
                wanted[slot] = 0, newest
            elif port.number < newest:
                wanted[slot] = port.lives, newest
        if not wanted:
            return 0
        self._last_mark += 1
        self._marks[self._last_mark] = wanted
        if len(self._marks) > _MOST_MARKS:
            self._marks.pop(next(iter(list(self._marks))), None)
        return self._last_mark

    def reached(self, mark: int) -> bool:
        wanted = self._marks.get(mark)
        if wanted is None:
            return True
        for slot, (lives, number) in list(wanted.items()):
            port = self._ports.get(slot)
            if port is not None and (port.lives != lives or port.number >= number):
                wanted.pop(slot, None)
        if wanted:
            return False
        self._marks.pop(mark, None)
        return True

    def pause(self, why: str) -> None:
        self.hub.registry.pause(self.name, why)
        self.note_pause(why)

    def full(self, letters: int) -> bool:
        with self._counting:
            now_s = time.monotonic()
            if now_s - self._counted_s >= _COUNTED_S or self._letters >= self._trigger.max_dead:
                unsent = sum(port.unsent_letters() for port in list(self._busy.values()))
                self._letters = self.hub.count_letters(self.name) + unsent
                self._counted_s = now_s
            if self._letters >= self._trigger.max_dead:
                return True
            self._letters += letters
            return False

    def paused(self) -> str | None:
        return self._pause or None

    # ------------------------------------------------------------------------------------------------ for slots

    def room(self) -> int:
        """Return how many more events this engine may hold."""
        active = [(port.slot, member) for port in list(self._busy.values()) for member in port.active()]
        held = len(active)
        room = self.pace.room(self._trigger, held, held)
        if room <= 0 and held > 1:
            lanes = {(slot, lane_of(member)) for slot, member in active}
            room = self.pace.room(self._trigger, held, len(lanes))
        return room

    def record(self) -> Record | None:
        """Return what the registry has of the consumer. Raises StorageError."""
        return self.hub.registry.look(0, ())[1].get(self.name)

    def _waker(self, slot: int) -> Callable[[], object]:
        return lambda: self.note((slot,))

    def _port(self, slot: int, begin: Begin, life: str) -> SlotPort:
        """Return the part in a slot, which is made if need be. Raises StorageError."""
        port = self._ports.get(slot)
        if port is None:
            port = SlotPort(self, SlotPlace(self.hub, self._lines, slot), self._trigger, slot, life)
            port.join(begin)
            self._ports[slot] = port
            if self._started:
                port.start(self._trigger, self._waker(slot), self._lost, dict)
        return port

    def _take(self, slot: int, most: int) -> list[Held]:
        if time.monotonic() < self._failed.get(slot, 0.0):
            self._later[slot] = self._failed[slot]
            return []
        try:
            port = self._port(slot, BEHIND_ALL, self._life)
            try:
                found, more = port.take(most)
            finally:
                with self._changing:
                    if port.is_busy:
                        self._busy[slot] = port
        except StorageError as error:
            self._note_failure(slot, error)
            self._troubles[slot] = f"slot {slot}: {error}"
            self._later[slot] = time.monotonic() + _AGAIN_S
            self.hub.ring()
            return []
        self._failed.pop(slot, None)
        self._troubles.pop(slot, None)
        if port.next_wake:
            self._later[slot], port.next_wake = port.next_wake, 0.0
        if more and not self.stopping:
            self._is_due.add(slot)
            self._due.append(slot)
        return found

    def _note_failure(self, slot: int, error: StorageError) -> None:
        if not self._failed:
            log.warning("consumer %r: slot %d waits: %s", self.name, slot, error)
        self._failed[slot] = time.monotonic() + _AGAIN_S

    def _report(self) -> None:
        """Send outcomes."""
        now_s = time.monotonic()
        for slot, port in list(self._busy.items()):
            if port.has_outcomes and now_s >= self._failed.get(slot, 0.0):
                try:
                    port.flush()
                except StorageError as error:
                    self._note_failure(slot, error)

    # ----------------------------------------------------------------------------------------------- for the keeper

    @property
    def has_outcomes(self) -> bool:
        now_s = time.monotonic()
        return any(
            port.has_outcomes and now_s >= self._failed.get(slot, 0.0) for slot, port in list(self._busy.items())
        )

    @property
    def has_failed(self) -> bool:
        now_s = time.monotonic()
        return any(port.has_failed and now_s >= self._failed.get(slot, 0.0) for slot, port in list(self._busy.items()))

    @property
    def next_beat(self) -> float:
        beats = [max(port.next_beat, self._failed.get(slot, 0.0)) for slot, port in list(self._busy.items())]
        return min(beats, default=math.inf)

    @property
    def next_wake(self) -> float:
        return min(list(self._later.values()), default=0.0)

    @property
    def trouble(self) -> str | None:
        return next(iter(list(self._troubles.values())), None)

    @property
    def problem(self) -> str | None:
        return next((port.problem for port in list(self._ports.values()) if port.problem is not None), None)

    @property
    def lost(self) -> int:
        return sum(port.lost for port in list(self._ports.values()))

    def wake(self) -> None:
        now_s = time.monotonic()
        due = [slot for slot, when_s in list(self._later.items()) if when_s <= now_s]
        for slot in due:
            self._later.pop(slot, None)
        self.note(due)

    def keep(self) -> None:
        now_s = time.monotonic()
        failure: StorageError | None = None
        for slot, port in list(self._busy.items()):
            if self.stopping and not port.stopping:
                port.stop()  # `fetch` has made it at the same moment
            if now_s < self._failed.get(slot, 0.0):
                continue
            if port.has_outcomes or port.has_failed or self.stopping or now_s >= port.next_beat:
                try:
                    port.keep()
                except StorageError as error:
                    self._note_failure(slot, error)
                    failure = error
                    continue
                self._failed.pop(slot, None)
            with self._changing:
                if not port.is_busy:
                    self._busy.pop(slot, None)
        if self._is_full and self.room() > 0:
            self._is_full = False
            self._wake()
        if self.stopping and not self._busy:
            self.hub.registry.leave([self.name])
            self.is_over = True
            self._lines.close()
        if failure is not None:
            raise failure

    def leave(self) -> None:
        failure: StorageError | None = None
        for port in list(self._busy.values()):
            try:
                port.leave()
            except StorageError as error:
                failure = error
        self.is_over = True
        self.hub.registry.leave([self.name])
        if failure is not None:
            raise failure

    def close(self) -> None:
        self.is_over = True
        self._lines.close()

    def note_pause(self, why: str) -> None:
        before, self._pause = self._pause, why
        if before and not why:
            self._wake()

    def clear_problem(self) -> None:
        for port in list(self._ports.values()):
            port.clear_problem()

    def note_record(self, record: Record | None) -> None:
        """Take in what the registry has of it. Raises StorageError."""
        if self.stopping:
            return
        if record is None or record.state == "joining":
            # Another engine has forgotten it, or its record was lost. What slots still have of it is kept.
            with self._exclusive:
                log.warning(
                    "consumer %r was forgotten by another engine, and starts again because its trigger is here",
                    self.name,
                )
                self.join(Begin("now"))
            self.note(list(self._ports))
        elif record.state == "ready":
            self._life = record.life
            self.note_pause(record.paused)


def _by_slot(some: Sequence[Any], position: Callable[[Any], int]) -> dict[int, list[Any]]:
    parts: dict[int, list[Any]] = {}
    for one in some:
        parts.setdefault(place_in_slot(position(one))[0], []).append(one)
    return parts


def _nothing(*_: Any) -> None:
    """Do nothing: there is no runtime."""
