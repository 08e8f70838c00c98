"""The consumers of the other engine, for the durable triggers of an engine behind a bridge."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from scopestate.actors.consuming import ConsumerPort, Consumers, ConsumerStatus, DeadLetter
from scopestate.actors.containment import Log
from scopestate.errors import ScopestateError, StorageError
from scopestate.ops import handed
from scopestate.ops.consumer_functions import MOST_LETTERS
from scopestate.ops.triggers import Trigger
from scopestate.ops.values import prepare
from scopestate.persistence.bridge.deliveries import Line, RemotePort, ask
from scopestate.signals import Guard, exclusive, join

log = Log("scopestate.persistence.bridge")

_LAST_S: Final = 1.0
"""How long a closing engine waits for the last messages of the keeper."""
_MOMENT_S: Final = 0.003
"""How long an outcome waits for others that are reported with it."""
_AGAIN_S: Final = 0.1
"""Pause after the other engine did not answer."""
_REFUSED_S: Final = 5.0
"""Pause after it has refused a trigger that it had before."""


class Connection(Line, Protocol):
    """A connection to the other engine, with its loop."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> concurrent.futures.Future[None] | None:
        """Run a coroutine on the loop of the connection; None: the loop is closed."""

    def on_loop(self, work: Callable[[], object]) -> None:
        """Call `work()` on that loop, soon."""

    @property
    def connected(self) -> bool:
        """True while there is a connection."""


class _Status(msgspec.Struct):
    name: str
    lag_events: int
    lag_seconds: float
    in_flight: int
    waiting: int
    dead: int
    paused: str | None
    active: bool


class _Statuses(msgspec.Struct):
    consumers: list[_Status]


class _Letter(msgspec.Struct):
    id: str
    consumer: str
    error: str
    traceback: str
    attempts: int
    first_at: int
    died_at: int
    replays: int
    handed: handed.HandedEvent

    def letter(self) -> DeadLetter:
        return DeadLetter(
            self.id,
            self.consumer,
            self.handed.event(),
            self.attempts,
            self.first_at,
            self.died_at,
            self.error,
            self.traceback,
            self.replays,
        )


class _Letters(msgspec.Struct):
    letters: list[_Letter]
    next: str | None = None


prepare(_Statuses, _Letters)


class RemoteConsumers(Consumers):
    """The consumers that the other engine has. Those of triggers that are registered here take events from it."""

    def __init__(self, line: Connection, longest_wait_s: float) -> None:
        self._line = line
        self._longest_wait_s = min(longest_wait_s, handed.LONGEST_WAIT_MS / 1000)
        self._ports: dict[str, RemotePort] = {}
        self._taking: set[str] = set()
        self._exclusive = Guard()
        self._bell = threading.Event()
        self._rests = False
        """True while the keeper sleeps until it is woken."""
        self._closing = False
        self._thread: threading.Thread | None = None

    # --------------------------------------------------------------------------------------------------- the triggers

    def open(self, name: str, trigger: Trigger) -> ConsumerPort:
        since_ms = time.time_ns() // 1_000_000
        port = self._ports.get(name)
        if port is None:
            port = RemotePort(name, self._line, trigger, since_ms, self._longest_wait_s)
            port.ring, port.nudge = self._ring, self._nudge
        port.join(trigger, since_ms)
        self._enlist(port)
        return port

    @exclusive
    def _enlist(self, port: RemotePort) -> None:
        if self._closing:
            return
        self._ports[port.name] = port
        if port.name not in self._taking:
            self._taking.add(port.name)
            self._line.spawn(port.take_on())
        if self._thread is None:
            keeper = threading.Thread(target=self._run, name="scopestate-bridge-consumers", daemon=True)
            keeper.start()
            self._thread = keeper

    @exclusive
    def _keeper(self) -> threading.Thread | None:
        """Return the keeper's thread, which has started. Once this side is closing, no other one is started."""
        return self._thread

    def _ring(self) -> None:
        self._rests = False
        self._bell.set()

    def _nudge(self) -> None:
        if self._rests:
            self._ring()

    def _run(self) -> None:
        pause_s: float | None = None
        while not self._closing:
            self._rests = True
            # Changes from before `_rests` was set have not woken this thread.
            if pause_s is not None or not any(port.has_to_say for port in self._awake()):
                self._bell.wait(pause_s)
            self._bell.clear()
            if not self._closing:
                time.sleep(_MOMENT_S)
            self._rests = False
            pause_s = None
            for port in self._awake():
                pause_s = self._keep(port) or pause_s

    def _awake(self) -> list[RemotePort]:
        return [port for port in list(self._ports.values()) if not port.is_over]

    def _keep(self, port: RemotePort) -> float | None:
        """Return after how many seconds to check again; None: when woken."""
        if port.has_to_say:
            try:
                port.keep()
            except StorageError as error:
                log.debug("consumer %r: %s", port.name, error)
                return _AGAIN_S
            except ScopestateError as error:
                if port.problem is None:
                    log.error("consumer %r does not continue: %s", port.name, error)  # noqa: TRY400 - the text says it all
                port.problem = f"consumer {port.name!r} gets no events: {error}"
                return _REFUSED_S
            except Exception as error:
                # This thread serves the other consumers too.
                if port.problem is None:
                    log.exception("consumer %r does not continue", port.name)
                port.problem = f"consumer {port.name!r} gets no events: {error!r}"
                return _REFUSED_S
        if port.is_joined and not port.stopping:
            self._line.on_loop(port.go_on)
        return _AGAIN_S if port.stopping and not port.is_over else None

    def close(self) -> None:
        """Report what has ended, and give back what this engine holds, if there is a connection. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._bell.set()
        keeper = self._keeper()
        if keeper is not None and not join(keeper, _LAST_S):
            return  # it waits for a connection
        for port in list(self._ports.values()):
            port.stopping = True
            if self._line.connected and port.is_joined:
                try:
                    port.keep()
                except ScopestateError as error:
                    log.warning(
                        "consumer %r: the events that this engine holds go to other engines a moment later: %s",
                        port.name,
                        error,
                    )

    async def end(self) -> None:
        """Take no more events. On the loop; `join` follows when calls that wait have failed."""
        self._closing = True
        self._bell.set()
        tasks = [port.taking for port in list(self._ports.values()) if port.taking is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def join(self) -> None:
        """Wait for the end of the keeper's thread."""
        keeper = self._keeper()
        if keeper is not None:
            join(keeper)

    # ------------------------------------------------------------------------------------------------- what they say

    def states(self) -> list[tuple[str, str | None]]:
        """Return the consumers that this engine takes events of: other engines take care of the rest."""
        return [(port.name, port.paused()) for port in list(self._ports.values()) if not port.stopping]

    def served_elsewhere(self) -> list[str]:
        """Return the consumers of the triggers here: which events other engines handle is not known here."""
        return [port.name for port in self._awake() if not port.stopping]

    def problems(self) -> list[str]:
        return [port.problem for port in self._awake() if port.problem is not None]

    def statuses(self) -> list[ConsumerStatus]:
        found: _Statuses = ask(self._line, "engine::consumers::list", {}, _Statuses, reads=True)
        return [
            ConsumerStatus(
                one.name, one.lag_events, one.lag_seconds, one.in_flight, one.waiting, one.dead, one.paused, None
            )
            for one in found.consumers
        ]

    def names(self) -> list[str]:
        return [one.name for one in self.statuses()]

    def status(self, name: str) -> ConsumerStatus | None:
        return next((one for one in self.statuses() if one.name == name), None)

    def settle(self, names: Sequence[str], marks: Mapping[str, int], wait_s: float) -> dict[str, int]:
        for name in names:
            if (port := self._ports.get(name)) is not None:
                port.be_joined()  # otherwise the other engine does not know which events are handled here
        asked = handed.Drain(list(names), int(wait_s * 1000), dict(marks))
        drained: handed.Drained = ask(self._line, handed.DRAIN, asked, handed.Drained, reads=True)
        return drained.left

    def _done(self, function_id: str, **fields: Any) -> bool:
        return bool(ask(self._line, function_id, fields, dict[str, bool])["done"])

    def pause(self, name: str, why: str) -> bool:
        done = self._done("engine::consumers::pause", name=name, why=why)
        return self._noted(name, why, done=done)

    def resume(self, name: str) -> bool:
        done = self._done("engine::consumers::resume", name=name)
        return self._noted(name, None, done=done)

    def _noted(self, name: str, why: str | None, *, done: bool) -> bool:
        port = self._ports.get(name)
        if port is not None and done:
            port.note_pause(why)
        return done

    def forget(self, name: str) -> bool:
        return self._done("engine::consumers::forget", name=name)

    # --------------------------------------------------------------------------------------------------- dead letters

    def letters(self, consumer: str | None, limit: int, after: str | None) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        while len(found) < limit:
            most = min(limit - len(found), MOST_LETTERS)
            asked = {"consumer": consumer, "limit": most, "after": after, "_handed": True}
            page: _Letters = ask(self._line, "engine::dead-letters::list", asked, _Letters, reads=True)
            found += [one.letter() for one in page.letters]
            after = page.next
            if after is None:
                break
        return found

    def letter(self, letter_id: str) -> DeadLetter | None:
        asked = {"id": letter_id, "_handed": True}
        found: _Letter | None = ask(self._line, "engine::dead-letters::get", asked, _Letter | None, reads=True)  # type: ignore[arg-type]  # a type for msgspec
        return None if found is None else found.letter()

    def replay(self, consumer: str | None, ids: Sequence[str] | None, *, reset: bool) -> int:
        return self._change("replay", "replayed", consumer, ids, {"reset": reset})

    def purge(self, consumer: str | None, ids: Sequence[str] | None, *, before_ms: int | None) -> int:
        return self._change("purge", "purged", consumer, ids, {} if before_ms is None else {"before": before_ms})

    def _change(
        self, what: str, answered: str, consumer: str | None, ids: Sequence[str] | None, more: dict[str, Any]
    ) -> int:
        parts: list[dict[str, Any]]
        if ids is None:
            parts = [{} if "before" in more else {"all": True}]
        else:
            parts = [{"ids": ids[at : at + MOST_LETTERS]} for at in range(0, len(ids), MOST_LETTERS)]
        count = 0
        for part in parts:
            asked = {"consumer": consumer, **part, **more}
            count += ask(self._line, f"engine::dead-letters::{what}", asked, dict[str, int])[answered]
        return count

    def count(self, consumer: str | None) -> int:
        asked = {"consumer": consumer}
        return int(ask(self._line, "engine::dead-letters::count", asked, dict[str, int], reads=True)["count"])
