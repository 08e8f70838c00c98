"""Durable triggers in Redis: consumers that any number of engines share (docs/design/0050-redis-journal.md)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import msgspec

from scopestate.actors.consuming import ConsumerPort, ConsumerStatus, DeadLetter
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.persistence.redis.connection import Connection, Refusal, pack
from scopestate.persistence.redis.consuming import Begin, Names, names_key
from scopestate.persistence.redis.damage import explain_refusal, number_in
from scopestate.persistence.redis.entries import state_event_of
from scopestate.persistence.redis.history import store_key
from scopestate.persistence.redis.keeping import LOOK_EVERY_S, Keeper
from scopestate.persistence.redis.port import Line, Place, RedisPort, status_of
from scopestate.persistence.redis.script import with_source

log = logging.getLogger("scopestate.persistence.redis")

_TRIM_EVERY_S: Final = 1.0
PAGE: Final = 5000
"""Dead letters that the script replays or removes at a time."""


class RedisConsumers(Keeper):
    """The consumers of one database and prefix."""

    def __init__(
        self,
        place: Place,
        visit: Callable[[], AbstractContextManager[Connection]],
        events_kept: int,
        limit: str,
        begin_of: Callable[[str], Begin] = Begin,
    ) -> None:
        """`visit` gives a connection for one operation of the program.

        `limit`: see `script.LIMITED`. `begin_of` returns where a new consumer begins.
        """
        super().__init__()
        self._begin_of = begin_of
        self._place = place
        self._visit = visit
        self._events_kept = events_kept
        self._limit = limit
        self._next_look = 0.0
        self._line = Line(place)

    # -------------------------------------------------------------------------------------------------- the port's

    def open(self, name: str, trigger: Trigger) -> ConsumerPort:
        port = RedisPort(name, self._place, trigger, self._limit, self.ring, self.nudge, self.enlist)
        port.join(self._begin_of(trigger.start))
        return port

    def note_arrivals(self) -> None:
        for port in self._ports:
            port.wake()

    # ------------------------------------------------------------------------------------------- from the program

    def names(self) -> list[str]:
        with self._visit() as connection:
            found: list[bytes] = connection.call("HKEYS", names_key(self._place.shape))
        return sorted(name.decode() for name in found)

    def status(self, name: str) -> ConsumerStatus | None:
        return status_of(name, self._do(self._place.names(name).status()))

    def pause(self, name: str, why: str) -> bool:
        known: int = self._pause(name, why or "paused")[0]
        return known == 1

    def resume(self, name: str) -> bool:
        known, lost = self._pause(name, "")
        if int(lost):
            log.error("consumer %r continues; %d of its events were trimmed before it read them", name, lost)
        return bool(known)

    def _pause(self, name: str, why: str) -> Any:
        reply = self._do(self._place.names(name).pause(why))
        for port in list(self._ports):
            if port.name == name and reply[0] == 1:
                if not why:
                    port.clear_problem()
                port.note_pause(why)
        return reply

    def forget(self, name: str) -> bool:
        return bool(self._do(self._place.names(name).forget()))

    def letters(self, consumer: str | None, limit: int, after: str | None) -> list[DeadLetter]:
        base = self._base()
        behind = (0, "") if after is None else _place_in_order(after)
        found: list[tuple[tuple[int, str], DeadLetter]] = []
        for name in self.names() if consumer is None else [consumer]:
            # One more than asked for: the letter `after` may be among them.
            rows = self._do(self._place.names(name).letters(max(behind[0] - base - 1, 0), limit + 1))
            for letter in letters_of(name, rows, base.__add__):
                at = _place_in_order(letter.id)
                if at > behind:
                    found.append((at, letter))
        return [letter for _, letter in sorted(found, key=lambda pair: pair[0])[:limit]]

    def letter(self, letter_id: str) -> DeadLetter | None:
        name, position = named(letter_id)
        if not name:
            return None
        base = self._base()
        rows = self._do(self._place.names(name).letters(max(position - base - 1, 0), 1))
        found = [letter for letter in letters_of(name, rows, base.__add__) if letter.id == letter_id]
        return found[0] if found else None

    def _change_letters(
        self,
        consumer: str | None,
        ids: Sequence[str] | None,
        step: Callable[[Names, Sequence[int] | None], tuple[Any, ...]],
    ) -> int:
        count = 0
        for name, numbers in self._grouped(consumer, ids):
            names = self._place.names(name)
            while True:
                done = int(self._do(step(names, numbers)))
                count += done
                if numbers is not None or done < PAGE:
                    break
        self.note_arrivals()
        return count

    def _grouped(self, consumer: str | None, ids: Sequence[str] | None) -> Iterator[tuple[str, list[int] | None]]:
        if ids is None:
            for name in self.names() if consumer is None else [consumer]:
                yield name, None
            return
        base = self._base()
        numbers: dict[str, list[int]] = {}
        for letter_id in ids:
            name, position = named(letter_id)
            if name and consumer in (None, name):
                numbers.setdefault(name, []).append(position - base)
        yield from numbers.items()

    def _base(self) -> int:
        key = store_key(self._place.shape)
        with self._visit() as connection:
            return number_in(connection.call("HGET", key, "base") or 0, key, self._place.address)

    def _do(self, command: tuple[Any, ...]) -> Any:
        with self._visit() as connection:
            reply = connection.exchange(pack(command))
            if type(reply) is Refusal and reply.word == "NOSCRIPT":
                reply = connection.exchange(pack(with_source(command)))
            if type(reply) is Refusal:

                def ask(commands: Sequence[tuple[Any, ...]]) -> list[Any]:
                    return [connection.call(*one) for one in commands]

                raise explain_refusal(reply, command, self._place.address, ask)
            return reply

    # ------------------------------------------------------------------------------------------- the keeper's thread

    def _close_lines(self) -> None:
        self._line.close()

    def _maintain(self) -> None:
        now = time.monotonic()
        if now < self._next_work:
            return
        self._next_work = now + _TRIM_EVERY_S
        names = self._place.names("")
        while self._line.ask(names.trim(self._events_kept))[0][1]:
            pass
        if now >= self._next_look:
            self._next_look = now + LOOK_EVERY_S
            (found,) = self._line.ask(("HKEYS", names_key(self._place.shape)))
            every = sorted(name.decode() for name in found)
            replies = self._line.ask(*[self._place.names(name).status() for name in every]) if every else []
            self._alone = [
                name for name, reply in zip(every, replies, strict=True) if reply != b"gone" and not reply[7]
            ]


def letters_of(name: str, rows: Sequence[Any], position_of: Callable[[int], int]) -> Iterator[DeadLetter]:
    """Return dead letters from the reply of the script. `position_of`: number of an event -> position."""
    for number, entry_id, letter, fields, replays in rows:
        event: StateEvent | None = state_event_of(entry_id, fields, 0) if fields else None
        if event is None:
            log.error("the event of dead letter %s of consumer %r is gone", number, name)
            continue
        event.position = position_of(event.position)
        try:
            died, attempts, first = map(int, letter.split(b" ", 3)[:3])
            error, traceback = msgspec.json.decode(letter.split(b" ", 3)[3], type=tuple[str, str])
        except (ValueError, IndexError) as damage:
            log.error("what Redis has of dead letter %s of consumer %r is damaged: %s", number, name, damage)  # noqa: TRY400 - the text says it all
            died, attempts, first, error, traceback = 0, 0, 0, "what Redis has of this letter is damaged", ""
        yield DeadLetter(
            f"{name}:{event.position}",
            name,
            event,
            attempts,
            first,
            died,
            error,
            traceback,
            int(replays) if replays.isdigit() else 0,
        )


def named(letter_id: str) -> tuple[str, int]:
    """Return consumer and position of a letter's id; no consumer if it is not one."""
    name, _, position = letter_id.rpartition(":")
    return (name, int(position)) if position.isascii() and position.isdigit() else ("", 0)


def _place_in_order(letter_id: str) -> tuple[int, str]:
    name, position = named(letter_id)
    return position, name
