"""The thread that keeps the consumers of an engine up to date in Redis: outcomes, what each holds, and the streams."""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from scopestate.actors.consuming import ConsumerPort, Consumers
from scopestate.errors import StorageError
from scopestate.persistence.redis.consuming import Names
from scopestate.signals import Guard, exclusive, join

log = logging.getLogger("scopestate.persistence.redis")

LOOK_EVERY_S: Final = 10.0
"""How often consumers without an engine are looked for."""
_NAMED: Final = 5
_MOMENT_S: Final = 0.005
"""How long an outcome waits for another operation that it can be sent with."""
_AGAIN_S: Final = 0.5
"""Pause after an operation that has failed."""


class KeptPort(ConsumerPort):
    """One consumer, as this engine sees it: what the keeper does for it."""

    stopping = False
    is_over = False
    """True once it holds no events, and takes no more."""

    @property
    @abstractmethod
    def next_beat(self) -> float:
        """When the keeper has to renew the hold. On the monotonic clock."""

    @property
    @abstractmethod
    def next_wake(self) -> float:
        """When the keeper has to wake the runtime; 0.0: not. On the monotonic clock."""

    @property
    @abstractmethod
    def problem(self) -> str | None:
        """A loss that was reported and not read yet, as text."""

    @property
    @abstractmethod
    def trouble(self) -> str | None:
        """Why its events wait, if Redis refuses what it asks for, as text."""

    @property
    @abstractmethod
    def lost(self) -> int:
        """Events that were gone before the consumer got them, as far as this engine has noticed."""

    @property
    @abstractmethod
    def has_outcomes(self) -> bool:
        """True if outcomes have not been sent yet."""

    @property
    @abstractmethod
    def has_failed(self) -> bool:
        """True if an operation has failed, and none of the keeper's was done since."""

    @abstractmethod
    def clear_problem(self) -> None:
        """A loss was read: report it no more."""

    @abstractmethod
    def wake(self) -> None:
        """Wake the runtime: there may be events."""

    @abstractmethod
    def keep(self) -> None:
        """Report what has ended, and that this engine is alive. Raises StorageError."""

    @abstractmethod
    def leave(self) -> None:
        """Report what has ended, and give everything else back: the engine closes. Raises StorageError."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    @abstractmethod
    def note_pause(self, why: str) -> None:
        """Record that it is paused, or continues ("")."""


class Keeper(Consumers):
    """The consumers of an engine, and the thread that keeps them."""

    def __init__(self) -> None:
        self._ports: list[KeptPort] = []
        self._bell = threading.Event()
        self._exclusive = Guard()
        self._closing = False
        self._next_work = 0.0
        """When `_maintain` is due. On the monotonic clock."""
        self._rests = False
        """True while the keeper sleeps until something is due, rather than for a moment."""
        self._alone: list[str] = []
        """Consumers from which no engine takes events."""
        self._thread: threading.Thread | None = None
        self._why_not: str | None = None

    @abstractmethod
    def _maintain(self) -> None:
        """Do what the stream needs, if it is due, and set `_next_work`. Raises StorageError."""

    @abstractmethod
    def _close_lines(self) -> None:
        """Close the connections."""

    @abstractmethod
    def note_arrivals(self) -> None:
        """Note that there may be new events. From any thread."""

    def ring(self) -> None:
        """Have the keeper check now."""
        self._bell.set()

    def nudge(self) -> None:
        """Note that a delivery has ended. The next operation within a moment also sends the outcome."""
        if self._rests:
            self._rests = False
            self._bell.set()

    def enlist(self, port: KeptPort) -> None:
        """Take care of a consumer."""
        if port not in self._ports:
            self._ports.append(port)
        self._start()
        self._bell.set()

    @exclusive
    def _start(self) -> None:
        if self._thread is None and not self._closing:
            self._thread = threading.Thread(target=self._run, name="scopestate-redis-consumers", daemon=True)
            self._thread.start()

    def problem(self) -> str | None:
        """Return what is wrong now, as text."""
        if self._why_not is not None:
            return f"durable triggers wait: {self._why_not}"
        for port in list(self._ports):
            if port.trouble is not None:
                return f"the events of consumer {port.name!r} wait: {port.trouble}"
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

    def states(self) -> list[tuple[str, str | None]]:
        """Return the consumers that this engine takes events from: other engines take care of the rest."""
        return [(port.name, port.paused()) for port in list(self._ports) if not port.stopping]

    # --------------------------------------------------------------------------------------------------- dead letters

    def replay(self, consumer: str | None, ids: Sequence[str] | None, *, reset: bool) -> int:
        return self._change_letters(consumer, ids, lambda names, numbers: names.replay(numbers, reset=reset))

    def purge(self, consumer: str | None, ids: Sequence[str] | None, *, before_ms: int | None) -> int:
        def step(names: Names, numbers: Sequence[int] | None) -> tuple[Any, ...]:
            if numbers is None and before_ms is not None:
                return names.purge_before(before_ms)
            return names.purge(numbers)

        return self._change_letters(consumer, ids, step)

    def count(self, consumer: str | None) -> int:
        found = [self.status(name) for name in (self.names() if consumer is None else [consumer])]
        return sum(status.dead for status in found if status is not None)

    @abstractmethod
    def _change_letters(
        self,
        consumer: str | None,
        ids: Sequence[str] | None,
        step: Callable[[Names, Sequence[int] | None], tuple[Any, ...]],
    ) -> int:
        """Run a step of `Names` for these letters; None: for all. Return how many have changed."""

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
            failure: StorageError | None = None
            steps: list[Callable[[], object]] = [partial(self._look_after, port) for port in list(self._ports)]
            for step in [*steps, self._maintain]:
                try:
                    step()
                except StorageError as error:
                    failure = error
                except Exception:
                    log.exception("keeping durable triggers in Redis up to date failed")
            if failure is not None and self._why_not is None:
                log.warning("%s; durable triggers wait for it", failure)
            self._why_not = None if failure is None else str(failure)
        self._end()

    def _pause_s(self) -> float:
        if self._why_not is not None:
            return _AGAIN_S
        now = time.monotonic()
        times = [self._next_work]
        for port in list(self._ports):
            times += [port.next_beat, port.next_wake] if port.next_wake else [port.next_beat]
        return max(min(times) - now, 0.0)

    def _look_after(self, port: KeptPort) -> None:
        now = time.monotonic()
        if port.has_outcomes or port.has_failed or port.stopping or now >= port.next_beat:
            port.keep()
        if port.next_wake and now >= port.next_wake:
            port.wake()
        if port.is_over:
            self._ports.remove(port)

    def _end(self) -> None:
        for port in list(self._ports):
            try:
                port.leave()
            except StorageError as error:
                log.warning("%s: the events that this engine holds go to other engines once their time is over", error)
            port.close()
        self._ports.clear()
        self._close_lines()
