"""Durable triggers in a cluster: consumers in every slot in use, which any number of engines share (0080)."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from scopestate.actors.consuming import ConsumerPort, ConsumerStatus, DeadLetter
from scopestate.errors import ConfigError, StorageError
from scopestate.ops.triggers import Trigger
from scopestate.persistence.redis.cluster_events import ClusterReader
from scopestate.persistence.redis.cluster_lines import Lines
from scopestate.persistence.redis.cluster_port import (
    BASE_US,
    BEHIND_ALL,
    NO_LIMIT,
    ClusterPort,
    place_in_slot,
    position_of,
)
from scopestate.persistence.redis.consumers import PAGE, letters_of, named
from scopestate.persistence.redis.consuming import Begin, Names, names_key
from scopestate.persistence.redis.damage import number_in
from scopestate.persistence.redis.history import store_key
from scopestate.persistence.redis.keeping import LOOK_EVERY_S, Keeper, KeptPort
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.port import reason_of, status_of
from scopestate.persistence.redis.registry import Record, Registry

log = logging.getLogger("scopestate.persistence.redis")

_LOOK_S: Final = 1.0
"""How often the registry is read: how long a pause, a replay or a new slot may go unnoticed."""
_ALIVE_MS: Final = 15_000
"""How long an engine counts as alive that does not look at the registry any more."""
_GONE: Final = b"gone"
"""What the script replies if the consumer is not in its slot."""
_SLACK: Final = 200
"""Entries that may be left in a stream above what it should keep: it is trimmed in larger parts."""


class ClusterConsumers(Keeper):
    """The consumers of one cluster and prefix."""

    def __init__(self, reader: ClusterReader, options: RedisOptions, engine: str, limit: str) -> None:
        """`engine`: a name of this engine that no other one has. `limit`: see `script.LIMITED`."""
        super().__init__()
        self.reader = reader
        self.engine = engine
        self.limit = limit
        self._events_kept = options.events_kept
        self._patience_s = options.call_timeout_s
        self._lines = self.lines()
        self._kept_lines = self.lines()
        """For the keeper: it does not wait for others."""
        self.registry = Registry(reader.shape, self._lines, engine, self._patience_s)
        self._own_registry = Registry(reader.shape, self._kept_lines, engine, 0.0)
        self._changes = -1
        self._records: dict[str, Record] = {}
        self._looked_at: set[int] = set()
        """Slots in which every consumer is known to be."""
        self._orphans: set[str] = set()
        """Consumers that slots have and the registry had not, when this was looked at last."""
        self._grown: set[int] = set(reader.known_slots())
        """Slots whose stream may have to be trimmed."""
        self._next_look = 0.0

    # -------------------------------------------------------------------------------------------------- for the ports

    def open(self, name: str, trigger: Trigger) -> ConsumerPort:
        if trigger.order == "trigger" and trigger.scope is None:
            raise ConfigError(
                f"the durable trigger {name!r} has `order` trigger, and in a cluster events of several scopes have no "
                "common order: write `order` key or scope (with `batch` as well), or name one `scope`"
            )
        if trigger.start not in ("now", "earliest"):
            raise ConfigError(
                f"the durable trigger {name!r} cannot begin at a cursor: in a cluster each slot has its own stream; "
                "write `start` now or earliest"
            )
        port = ClusterPort(name, trigger, self)
        while True:
            try:
                if port.join(Begin(trigger.start)):
                    return port
                self.forget(name)  # which another engine has begun
            except BaseException:
                port.close()
                raise

    def enlist(self, port: KeptPort) -> None:
        self._next_work = 0.0  # the registry is to know soon that this engine takes its events
        super().enlist(port)

    def close(self) -> None:
        super().close()
        self._close_lines()

    def lines(self) -> Lines:
        return Lines(self.reader.servers, self._patience_s)

    def count_letters(self, name: str) -> int:
        replies = self._lines.ask_many(
            [(slot, self._names(slot, name).count_letters()) for slot in self.reader.known_slots()]
        )
        return sum(reply for reply in replies if not isinstance(reply, StorageError))

    def note_arrivals(self) -> None:
        for port in self._cluster_ports():
            port.note(self.reader.known_slots())

    def note_arrivals_in(self, slot: int) -> None:
        """Note that the stream of a slot has new entries. On a reader's thread."""
        self._grown.add(slot)
        for port in self._ports:
            port.note((slot,))  # type: ignore[attr-defined] # all of them are `ClusterPort`s

    def look_after_others(self) -> None:
        # Always: this engine may be the only one that sees a slot come into use.
        self._start()

    # ------------------------------------------------------------------------------------------- from the program

    def names(self) -> list[str]:
        return sorted(self._look())

    def status(self, name: str) -> ConsumerStatus | None:
        record = self._look().get(name)
        if record is None:
            return None
        slots = self.reader.known_slots()
        replies = self._ask_all([(slot, self._names(slot, name).status()) for slot in slots])
        found = [status for status in (status_of(name, reply) for reply in replies) if status is not None]
        # It is not in these yet, and will begin there with the first event.
        new = [slot for slot, reply in zip(slots, replies, strict=True) if reply == _GONE]
        counted = self._ask_all([(slot, ("GET", self.reader.shape.in_slot(slot).counter)) for slot in new])
        return ConsumerStatus(
            name,
            sum(one.lag_events for one in found) + sum(int(number or 0) for number in counted),
            max((one.lag_seconds for one in found), default=0.0),
            0,
            0,
            sum(one.dead for one in found),
            reason_of(record.paused),
        )

    def pause(self, name: str, why: str) -> bool:
        return self._pause(name, why or "paused")

    def resume(self, name: str) -> bool:
        lost = 0
        if name in self._look():
            slots = self.reader.known_slots()
            lost = sum(
                int(reply[1]) for reply in self._ask_all([(slot, self._names(slot, name).pause("")) for slot in slots])
            )
        if lost:
            log.error("consumer %r continues; %d of its events were trimmed before it read them", name, lost)
        return self._pause(name, "")

    def _pause(self, name: str, why: str) -> bool:
        known = self.registry.pause(name, why)
        if known:
            for port in self._cluster_ports():
                if port.name == name:
                    if not why:
                        port.clear_problem()
                    port.note_pause(why)
        return known

    def forget(self, name: str) -> bool:
        known = self.registry.forgetting(name)
        if known:
            slots = self.reader.slots_in_use()
            self._ask_all([(slot, self._names(slot, name).forget()) for slot in slots])
            self.registry.forgotten(name)
        return known

    def letters(self, consumer: str | None, limit: int, after: str | None) -> list[DeadLetter]:
        behind = (0, "") if after is None else _place_in_order(after)
        found: list[DeadLetter] = []
        bases = self._bases()
        for name in self.names() if consumer is None else [consumer]:
            # One more than asked for: the letter `after` may be among them.
            asked = [
                (slot, self._names(slot, name).letters(max(_number_at(behind[0], base) - 2, 0), limit + 2))
                for slot, base in bases.items()
            ]
            for (slot, base), rows in zip(bases.items(), self._ask_all(asked), strict=True):
                letters = self._letters_in(name, slot, base, rows)
                found += [letter for letter in letters if _place_in_order(letter.id) > behind]
        return heapq.nsmallest(limit, found, key=lambda letter: _place_in_order(letter.id))

    def letter(self, letter_id: str) -> DeadLetter | None:
        name, position = named(letter_id)
        slot, _ = place_in_slot(position)
        base = self._bases([slot]).get(slot)
        if not name or base is None:
            return None
        number = _number_at(position, base)
        (rows,) = self._ask_all([(slot, self._names(slot, name).letters(max(number - 1, 0), 1))])
        return next((one for one in self._letters_in(name, slot, base, rows) if one.id == letter_id), None)

    def _letters_in(self, name: str, slot: int, base: int, rows: Sequence[Any]) -> Iterable[DeadLetter]:
        return letters_of(name, rows, lambda number: position_of(base, number, slot))

    def _change_letters(
        self,
        consumer: str | None,
        ids: Sequence[str] | None,
        step: Callable[[Names, Sequence[int] | None], tuple[Any, ...]],
    ) -> int:
        parts: dict[tuple[str, int], list[int] | None] = {}
        if ids is None:
            names = self.names() if consumer is None else [consumer]
            parts = {(name, slot): None for name in names for slot in self.reader.known_slots()}
        else:
            bases = self._bases()
            for letter_id in ids:
                name, position = named(letter_id)
                slot, _ = place_in_slot(position)
                if name and consumer in (None, name) and slot in bases:
                    numbers = parts.setdefault((name, slot), [])
                    assert numbers is not None
                    numbers.append(_number_at(position, bases[slot]))
        count = 0
        while parts:
            asked = [(slot, step(self._names(slot, name), numbers)) for (name, slot), numbers in parts.items()]
            done = self._ask_all(asked)
            count += sum(done)
            parts = {
                part: None
                for (part, numbers), changed in zip(parts.items(), done, strict=True)
                if numbers is None and changed >= PAGE
            }
        if count:
            self.registry.changed()  # it may have blocked others
            self.note_arrivals()
        return count

    def _bases(self, slots: Sequence[int] | None = None) -> dict[int, int]:
        """Return the bases of the positions of all slots that have one."""
        slots = self.reader.known_slots() if slots is None else slots
        shape = self.reader.shape
        replies = self._ask_all([(slot, ("HGET", store_key(shape.in_slot(slot)), "base")) for slot in slots])
        return {
            slot: number_in(reply, store_key(shape.in_slot(slot)), self._lines.address_of(slot))
            for slot, reply in zip(slots, replies, strict=True)
            if reply is not None
        }

    def _names(self, slot: int, consumer: str) -> Names:
        return Names(self.reader.shape.in_slot(slot), consumer, self.engine)

    def _look(self) -> dict[str, Record]:
        return self.registry.look(0, ())[1]

    def _ask_all(self, asked: Sequence[tuple[int, tuple[Any, ...]]]) -> list[Any]:
        """Send commands and return their replies. Raises the error of the first one that has failed."""
        replies = self._lines.ask_many(asked, wait_s=self._patience_s)
        for reply in replies:
            if isinstance(reply, StorageError):
                raise reply
        return replies

    # ------------------------------------------------------------------------------------------- on the keeper's thread

    def _cluster_ports(self) -> list[ClusterPort]:
        return [port for port in self._ports if isinstance(port, ClusterPort)]

    def _close_lines(self) -> None:
        self._lines.close()
        self._kept_lines.close()

    def _maintain(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_work:
            return
        self._next_work = now_s + _LOOK_S
        ports = self._cluster_ports()
        changes, records = self._own_registry.look(_ALIVE_MS, [port.name for port in ports if not port.stopping])
        self._records = records
        if changes != self._changes:
            self._changes = changes
            self.note_arrivals()
        for port in ports:
            port.note_record(records.get(port.name))
        self._alone = sorted(name for name, record in records.items() if not record.engines)
        slots = set(self.reader.known_slots())
        if now_s >= self._next_look:
            self._next_look = now_s + LOOK_EVERY_S
            self._looked_at.clear()
            self._finish_forgetting(records)
        self._reconcile(sorted(slots - self._looked_at), records)
        if records:
            self._trim()
        else:
            self._grown.clear()

    def _finish_forgetting(self, records: dict[str, Record]) -> None:
        """Complete what an engine has begun that is gone, perhaps."""
        for name, record in records.items():
            if record.state == "forgetting":
                self.forget(name)

    def _reconcile(self, slots: Sequence[int], records: dict[str, Record]) -> None:
        """See to it that every consumer is in each of these slots, from the first event on: they are new."""
        asked = [(slot, ("HKEYS", names_key(self.reader.shape.in_slot(slot)))) for slot in slots]
        orphans: set[str] = set()
        looked: set[int] = set()
        missing: list[tuple[int, str]] = []
        for slot, reply in zip(slots, self._kept_lines.ask_many(asked), strict=True):
            if isinstance(reply, StorageError):
                continue  # it is looked at again
            there = {name.decode() for name in reply}
            orphans |= there - set(records)
            missing += [(slot, name) for name in set(records) - there]
            looked.add(slot)
        # Read again: an engine may have forgotten it, which it enters in the registry before it takes it from a slot.
        now = self._own_registry.look(0, ())[1] if missing else {}
        self._looked_at |= looked
        joins: list[tuple[int, tuple[Any, ...]]] = []
        for slot, name in missing:
            record = records[name]
            if record.state != "ready":
                continue  # the engine that makes it or removes it looks after its slots
            found = now.get(name)
            if found is not None and (found.state, found.life) == ("ready", record.life):
                joins.append((slot, self._names(slot, name).join(BEHIND_ALL, self.limit, NO_LIMIT)))
            else:
                self._looked_at.discard(slot)
        for (slot, _), reply in zip(joins, self._kept_lines.ask_many(joins), strict=True):
            if isinstance(reply, StorageError):
                self._looked_at.discard(slot)
        for name in orphans & self._orphans:
            log.warning("consumer %r was not in the registry of the cluster, and is kept: a server has lost it", name)
            self._own_registry.adopt(name)
        if slots:
            self._orphans = orphans

    def _trim(self) -> None:
        """Trim the streams that have grown."""
        grown = list(self._grown)
        self._grown.difference_update(grown)
        asked = [(slot, self._names(slot, "").trim(self._events_kept)) for slot in grown]
        for slot, reply in zip(grown, self._kept_lines.ask_many(asked), strict=True):
            if isinstance(reply, StorageError) or reply[0] > self._events_kept + _SLACK or reply[1]:
                self._grown.add(slot)


def _number_at(position: int, base: int) -> int:
    """Return the number of an event in its slot."""
    return position // 16_384 - base // BASE_US


def _place_in_order(letter_id: str) -> tuple[int, str]:
    name, position = named(letter_id)
    return position, name
