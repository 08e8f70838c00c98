"""Durable triggers in Redis: consumers that any number of engines share (docs/design/0050-redis-journal.md)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import msgspec

from scopestate.actors.consuming import ConsumerPort, Consumers, ConsumerStatus, DeadLetter
from scopestate.errors import StorageError
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.persistence.redis.connection import Connection, Refusal
from scopestate.persistence.redis.consuming import Begin, Names, names_key
from scopestate.persistence.redis.entries import state_event_of
from scopestate.persistence.redis.history import store_key
from scopestate.persistence.redis.port import Line, Place, RedisPort, status_of
from scopestate.persistence.redis.script import with_source
from scopestate.signals import Guard, exclusive, join

log = logging.getLogger("scopestate.persistence.redis")

_TRIM_EVERY_S: Final = 1.0
_LOOK_EVERY_S: Final = 10.0
"""How often consumers without an engine are looked for."""
_NAMED: Final = 5
_MOMENT_S: Final = 0.005
"""How long an outcome waits for another operation that it can be sent with."""
_AGAIN_S: Final = 0.5
"""Pause after an operation that has failed."""
_PAGE: Final = 5000
"""Dead letters that the script replays or removes at a time."""


class RedisConsumers(Consumers):
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
        self._begin_of = begin_of
        self._place = place
        self._visit = visit
        self._events_kept = events_kept
        self._limit = limit
        self._ports: list[RedisPort] = []
        self._bell = threading.Event()
        self._exclusive = Guard()
        self._closing = False
        self._next_trim = self._next_look = 0.0
        self._rests = False
        """True while the keeper sleeps until something is due, rather than for a moment."""
        self._alone: list[str] = []
        """Consumers from which no engine takes events."""
        self._line = Line(place)
        self._thread: threading.Thread | None = None
        self._why_not: str | None = None

    # -------------------------------------------------------------------------------------------------- the port's

    def open(self, name: str, trigger: Trigger) -> ConsumerPort:
        port = RedisPort(name, self._place, trigger, self._limit, self._bell.set, self._nudge, self._enlist)
        port.join(self._begin_of(trigger.start))
        return port

    def _nudge(self) -> None:
        """Note that a delivery has ended. The next operation within a moment also sends the outcome."""
        if self._rests:
            self._rests = False
            self._bell.set()

    def _enlist(self, port: RedisPort) -> None:
        if port not in self._ports:
            self._ports.append(port)
        self._start()
        self._bell.set()

    @exclusive
    def _start(self) -> None:
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._run, name="scopestate-redis-consumers", daemon=True)
            self._thread.start()

    def note_arrivals(self) -> None:
        """Note that the stream has new entries. On the reader's thread."""
        for port in self._ports:
            port.wake()

    def problem(self) -> str | None:
        """Return what is wrong now, as text."""
        if self._why_not is not None:
            return f"durable triggers wait: {self._why_not}"
        for port in list(self._ports):
            if port.problem is not None:
                return f"{port.problem}; resume it when you have read this"
        if self._alone:
            names = ", ".join(repr(name) for name in self._alone[:_NAMED])
            return f"no engine has a trigger for consumers whose events are kept: {names}; register one, or forget them"
        return None

    @property
    def missed(self) -> int:
        """The number of events that consumers are known to have lost, as far as this engine has noticed."""
        return sum(port.lost for port in list(self._ports))

    def close(self) -> None:
        """Report what has ended, and give back what this engine holds. Idempotent."""
        self._exclusive.run(self._begin_closing)
        self._bell.set()
        if self._thread is not None:
            join(self._thread)

    def _begin_closing(self) -> None:
        self._closing = True

    def look_after_others(self) -> None:
        """If there are consumers, make sure that those without an engine are noticed and the stream is trimmed."""
        try:
            found = self.names()
        except StorageError as error:
            log.warning("could not look for consumers without an engine: %s", error)
            return
        if found:
            self._start()

    # ------------------------------------------------------------------------------------------- from the program

    def states(self) -> list[tuple[str, str | None]]:
        """Return the consumers that this engine takes events from: other engines take care of the rest."""
        return [(port.name, port.paused()) for port in list(self._ports) if not port.stopping]

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
                    port.problem = None
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
            for letter in _letters_of(name, rows, base):
                at = _place_in_order(letter.id)
                if at > behind:
                    found.append((at, letter))
        return [letter for _, letter in sorted(found, key=lambda pair: pair[0])[:limit]]

    def letter(self, letter_id: str) -> DeadLetter | None:
        name, position = _named(letter_id)
        if not name:
            return None
        base = self._base()
        rows = self._do(self._place.names(name).letters(max(position - base - 1, 0), 1))
        found = [letter for letter in _letters_of(name, rows, base) if letter.id == letter_id]
        return found[0] if found else None

    def replay(self, consumer: str | None, ids: Sequence[str] | None, *, reset: bool) -> int:
        def step(names: Names, numbers: Sequence[int] | None) -> tuple[Any, ...]:
            return names.replay(numbers, reset=reset)

        return self._change_letters(consumer, ids, step)

    def purge(self, consumer: str | None, ids: Sequence[str] | None, *, before_ms: int | None) -> int:
        def step(names: Names, numbers: Sequence[int] | None) -> tuple[Any, ...]:
            if numbers is None and before_ms is not None:
                return names.purge_before(before_ms)
            return names.purge(numbers)

        return self._change_letters(consumer, ids, step)

    def count(self, consumer: str | None) -> int:
        found = [self.status(name) for name in (self.names() if consumer is None else [consumer])]
        return sum(status.dead for status in found if status is not None)

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
                if numbers is not None or done < _PAGE:
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
            name, position = _named(letter_id)
            if name and consumer in (None, name):
                numbers.setdefault(name, []).append(position - base)
        yield from numbers.items()

    def _base(self) -> int:
        with self._visit() as connection:
            return int(connection.call("HGET", store_key(self._place.shape), "base") or 0)

    def _do(self, command: tuple[Any, ...]) -> Any:
        with self._visit() as connection:
            try:
                return connection.call(*command)
            except Refusal as refusal:
                if refusal.word != "NOSCRIPT":
                    raise
                return connection.call(*with_source(command))

    # ------------------------------------------------------------------------------------------- the keeper's thread

    def _run(self) -> None:
        busy = False
        while not self._closing:
            self._rests = not busy
            self._bell.wait(_MOMENT_S if busy else self._pause_s())
            self._bell.clear()
            was_nudged = not (busy or self._rests)
            self._rests = False
            if was_nudged:
                self._bell.wait(_MOMENT_S)
            busy = any(port.has_outcomes for port in list(self._ports))
            try:
                for port in list(self._ports):
                    self._look_after(port)
                self._trim()
                self._why_not = None
            except StorageError as error:
                if self._why_not is None:
                    log.warning("%s; durable triggers wait for it", error)
                self._why_not = str(error)
            except Exception:
                log.exception("keeping durable triggers in Redis up to date failed")
        self._end()

    def _pause_s(self) -> float:
        if self._why_not is not None:
            return _AGAIN_S
        now = time.monotonic()
        times = [self._next_trim]
        for port in list(self._ports):
            times += [port.next_beat, port.next_wake] if port.next_wake else [port.next_beat]
        return max(min(times) - now, 0.0)

    def _look_after(self, port: RedisPort) -> None:
        now = time.monotonic()
        if port.has_outcomes or port.has_failed or port.stopping or now >= port.next_beat:
            port.keep()
        if port.next_wake and now >= port.next_wake:
            port.next_wake = 0.0
            port.wake()
        if port.is_over:
            self._ports.remove(port)

    def _trim(self) -> None:
        now = time.monotonic()
        if now < self._next_trim:
            return
        self._next_trim = now + _TRIM_EVERY_S
        names = self._place.names("")
        while self._line.ask(names.trim(self._events_kept))[0][1]:
            pass
        if now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            (found,) = self._line.ask(("HKEYS", names_key(self._place.shape)))
            every = sorted(name.decode() for name in found)
            replies = self._line.ask(*[self._place.names(name).status() for name in every]) if every else []
            self._alone = [
                name for name, reply in zip(every, replies, strict=True) if reply != b"gone" and not reply[7]
            ]

    def _end(self) -> None:
        for port in list(self._ports):
            try:
                port.leave()
            except StorageError as error:
                log.warning("%s: the events that this engine holds go to other engines once their time is over", error)
            port.close()
        self._ports.clear()
        self._line.close()


def _letters_of(name: str, rows: Sequence[Any], base: int) -> Iterator[DeadLetter]:
    for number, entry_id, letter, fields, replays in rows:
        event: StateEvent | None = state_event_of(entry_id, fields, base) if fields else None
        if event is None:
            log.error("the event of dead letter %s of consumer %r is gone", number, name)
            continue
        died, attempts, first, details = letter.split(b" ", 3)
        error, traceback = msgspec.json.decode(details)
        yield DeadLetter(
            f"{name}:{event.position}",
            name,
            event,
            int(attempts),
            int(first),
            int(died),
            error,
            traceback,
            int(replays),
        )


def _named(letter_id: str) -> tuple[str, int]:
    """Return consumer and position of a letter's id; no consumer if it is not one."""
    name, _, position = letter_id.rpartition(":")
    return (name, int(position)) if position.isascii() and position.isdigit() else ("", 0)


def _place_in_order(letter_id: str) -> tuple[int, str]:
    name, position = _named(letter_id)
    return position, name
