"""For tests of programs: engines that can crash, on real threads or on a clock that the test moves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar, overload

import msgspec

from scopestate import typed_results
from scopestate.actors.callbacks import refuse_in_callback
from scopestate.actors.deterministic import START_S, DeterministicDispatcher
from scopestate.actors.functions import Function, is_async
from scopestate.config import Config, KvOptions, RedisOptions, from_mapping, load, validate
from scopestate.crashing import MortalDispatcher, end_deterministic, end_threads
from scopestate.engine import Engine
from scopestate.errors import Unsupported
from scopestate.opening import durable_mistakes
from scopestate.ops.changes import Change
from scopestate.ops.results import (
    CasResult,
    DeliveryFailure,
    EntryView,
    ModifyResult,
    SetResult,
    StateEvent,
    UpdateResult,
)
from scopestate.ops.value_types import value_type
from scopestate.persistence.sqlite.adapter import FileAdapter

if TYPE_CHECKING:
    from scopestate.aio import AioEngine

Source = str | os.PathLike[str] | Mapping[str, Any] | Config | None
"""A configuration: a file, a mapping of the same shape, a Config, or nothing (in memory)."""

V = TypeVar("V")

_ROUNDING_S: Final = 1e-6
"""Times of day in seconds are sums of floats: two that differ by less than this count as the same."""
NAMED: Final = 10
"""How many failures a message shows."""


def read_config(source: Source) -> Config:
    """Return the configuration. Raises ConfigError."""
    if isinstance(source, Config):
        validate(source)
        return source
    if source is None:
        return Config()
    return load(source) if isinstance(source, (str, os.PathLike)) else from_mapping(source)


class Engines:
    """Opens engines on real threads for a test, and ends them: with an orderly close, or by a crash.

    ::

        with Engines() as engines:
            engine = engines.open({"workers": [...]})
            engine.set("users", "ada", 1)
            engine = engines.crash(engine)           # as after SIGKILL, opened again

    Engines that are opened on one directory share it, as engines of several processes do. Methods may be called from
    any thread.
    """

    def __init__(self) -> None:
        self._opened: dict[Engine, tuple[Config, MortalDispatcher]] = {}
        self.failures: list[DeliveryFailure] = []
        """The events that were given up, or reached no handler. A test that expects them removes them."""

    def __repr__(self) -> str:
        return f"<Engines: {', '.join(map(repr, self._opened)) or 'none'}>"

    def open(self, config: Source = None) -> Engine:
        """Open an engine; without a configuration it is in memory. Raises ConfigError and StorageError.

        A file is not watched, and the signals of the process are left alone.
        """
        read = read_config(config)
        dispatcher = MortalDispatcher()
        engine = Engine(read, on_error=self._note, dispatcher=dispatcher, handle_sigterm=False)
        self._opened[engine] = read, dispatcher
        return engine

    def _note(self, failure: DeliveryFailure) -> None:
        if failure.final:
            self.failures.append(failure)

    def crash(self, engine: Engine, *, torn: bool = False) -> Engine:
        """End `engine` as SIGKILL ends its process, and return a new one with the same configuration.

        With `torn` it ends as by a power cut in the middle of a save: half of what was not saved yet is on the disk,
        and the new engine must ignore it. If everything was saved, nothing is torn.

        Writes that were not saved are lost, except in scopes with `durability: commit`; the events of durable triggers
        that no handler has finished are delivered again when the trigger is registered again. Functions and triggers of
        the program are gone; those of the configuration exist again. If other engines share its directory, either one
        of them or the new engine becomes the owner.

        The old engine refuses calls with EngineClosed, including calls that wait and calls of plain handlers, which
        keep running because threads cannot be ended. A write that waits for its commit raises EngineClosed or
        StorageError. Coroutine handlers of the old engine are cancelled. Call this on any thread, but not in a
        coroutine handler.

        Raises ValueError for an engine that is not open here, Unsupported for Redis, WouldDeadlock in the function of a
        `modify` or `transact`, and what `open` raises; with `torn` also Unsupported for an engine without files of its
        own: in memory, behind a bridge, or a follower.
        """
        refuse_in_callback()
        config, dispatcher = self._found(engine)
        if torn:
            _refuse_without_files(engine)
        if isinstance(config.adapter.config, RedisOptions):
            raise Unsupported("the crash of an engine on Redis", "end a process of your own by SIGKILL")
        del self._opened[engine]
        end_threads(engine, dispatcher, torn=torn)
        return self.open(config)

    def _found(self, engine: Engine) -> tuple[Config, MortalDispatcher]:
        found = self._opened.get(engine)
        if found is None or engine.closed:
            raise ValueError("crash takes an engine that was opened here, and that is open")
        return found

    def settle(self, timeout: float) -> None:
        """Wait until the events of all engines are handled. Failures are put into `failures`. Raises ReplyTimeout."""
        for engine, left_s in self._in_turn(timeout):
            engine.drain(timeout=left_s)

    async def settle_on_loop(self, timeout: float) -> None:  # noqa: ASYNC109 - as `AioEngine.drain`
        """As `settle`, on the running asyncio event loop, which may also run handlers."""
        for engine, left_s in self._in_turn(timeout):
            await engine.aio.drain(timeout=left_s)

    def _in_turn(self, timeout: float) -> Iterator[tuple[Engine, float]]:
        # Once for each engine: a handler of one may write to the next.
        deadline = time.monotonic() + timeout
        for _ in list(self._opened):
            for engine in list(self._opened):
                if not engine.closed:
                    yield engine, max(deadline - time.monotonic(), 0.0)

    def close(self) -> None:
        """Close the engines that are still open, the last opened first. This saves state and delivers events.

        Raises StorageError as `Engine.close`. The end of `with Engines() as engines:` does it.
        """
        while self._opened:
            self._opened.popitem()[0].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _OnClock(Engine):
    """An engine whose time a clock moves. It has no event loops, because these have their own time."""

    @property
    def aio(self) -> AioEngine:
        raise _no_loops("`engine.aio`")

    def refuse_coroutines(self) -> None:
        """Refuse coroutine handlers from now on, and at once if the configuration has any. Raises Unsupported."""
        functions = self._functions
        add = functions.add

        def add_plain(function: Function) -> None:
            if is_async(function.target):
                raise _no_loops(f"the coroutine function {function.function_id!r}")
            add(function)

        def get() -> NoReturn:
            raise _no_loops("a function that returns a coroutine")

        functions.add = add_plain  # type: ignore[method-assign]
        self._parts.loop_thread.get = get  # type: ignore[method-assign]
        for function in functions.all():
            if function.is_async:
                raise _no_loops(f"the coroutine function {function.function_id!r}")


def _no_loops(what: str) -> Unsupported:
    return Unsupported(
        f"{what} on a virtual clock",
        "event loops have their own clock: use `state_engine`, or `scopestate.testing.Engines`",
    )


class _Opened(msgspec.Struct, eq=False):
    """An engine on the clock."""

    engine: Engine
    config: Config
    dispatcher: DeterministicDispatcher
    store: FileAdapter | None
    began_s: float
    """The time of the clock when it was opened, in seconds."""


class VirtualClock:
    """Time for engines in memory and in files that passes only when the test says so.

    ::

        clock = VirtualClock()
        engine = clock.open()
        engine.set("sessions", "ada", 1, ttl=30)
        clock.advance(60)                        # runs what is due, in order, each at its own time
        assert engine.get("sessions", "ada") is None

    On such an engine nothing runs by itself: handlers, saves, expiry and retries run in `advance` and `run`, and in
    calls that wait for them (`drain`, `flush`, a write with `durability: commit`). Handlers run one at a time.
    Use it, and the engines, on the thread that made it. Coroutine handlers, `engine.aio`, Redis and a bridge are
    refused with Unsupported: event loops and other processes have their own time.
    """

    def __init__(self, start: datetime | None = None) -> None:
        """`start`: the time at which it begins, with a time zone; by default 2026-01-01 in UTC."""
        self._now_s = START_S if start is None else start.timestamp()
        self._opened: list[_Opened] = []
        self.failures: list[DeliveryFailure] = []
        """The events that were given up, or reached no handler. A test that expects them removes them."""

    @property
    def now(self) -> datetime:
        """The time that the engines see, in UTC."""
        return datetime.fromtimestamp(self._now_s, UTC)

    def __repr__(self) -> str:
        return f"<VirtualClock at {self.now:%Y-%m-%d %H:%M:%S}, {len(self._opened)} engines>"

    def open(self, config: Source = None) -> Engine:
        """Open an engine on this clock. Raises ConfigError, StorageError, and Unsupported for Redis and a bridge."""
        read = read_config(config)
        options = read.adapter.config
        if not isinstance(options, KvOptions):
            raise Unsupported(
                f"the adapter {read.adapter.name} on a virtual clock",
                "time passes in another process there: use the real clock",
            )
        for mistake in durable_mistakes(read):
            raise mistake
        # As in a process of its own that does not share its directory: sharing depends on real time.
        store = FileAdapter(options.file_path) if options.store_method == "file_based" else None
        dispatcher = DeterministicDispatcher(0, switch=0.0, busy=0.0, wall_s=self._now_s)
        try:
            engine = _OnClock(read, on_error=self._note, adapter=store, dispatcher=dispatcher, handle_sigterm=False)
            try:
                engine.refuse_coroutines()
            except Unsupported:
                engine.close()
                raise
        except BaseException:
            dispatcher.kill()
            if store is not None:
                store.close()
            raise
        self._opened.append(_Opened(engine, read, dispatcher, store, self._now_s))
        return engine

    def _note(self, failure: DeliveryFailure) -> None:
        if failure.final:
            self.failures.append(failure)

    def run(self) -> None:
        """Run everything that is due now, such as handlers of earlier writes. Raises as `advance`."""
        self.advance(0.0)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, and run everything that is due in that time, one after the other, each at its own time.

        If something that runs at 10 s makes more due at 20 s, that runs too if it is within `seconds`. When this
        returns, the handlers have ended. Raises ValueError for less than 0 seconds; and, after everything has run, an
        ExceptionGroup of the errors of handlers whose events were given up meanwhile. They stay in `failures`.
        """
        if not seconds >= 0:
            raise ValueError(f"advance takes seconds, 0 or more, not {seconds!r}: time does not go back")
        before = len(self.failures)
        self._pass(seconds)
        errors = [failure.error for failure in self.failures[before:]]
        if errors:
            raise BaseExceptionGroup(describe(self.failures[before:]), errors)

    def settle(self) -> None:
        """As `run`, but raise nothing: failures are put into `failures`."""
        self._pass(0.0)

    def _pass(self, seconds: float) -> None:
        self._live()
        until = self._now_s + seconds
        while True:
            self._catch_up()
            dues = [each.began_s + due for each in self._live() if (due := each.dispatcher.next_due()) is not None]
            if not dues or min(dues) > until:
                break
            self._now_s = max(self._now_s, min(dues))
        self._now_s = max(self._now_s, until)
        self._catch_up()

    def _catch_up(self) -> None:
        """Have each engine run what is due by now. All get the same time first: one may call the others."""
        while True:
            opened = self._live()
            for each in opened:
                there, due = self._now_s - each.began_s, each.dispatcher.next_due()
                if due is not None and abs(due - there) < _ROUNDING_S:
                    there = due  # otherwise a due time that rounding puts just after `there` would never be reached
                each.dispatcher.pass_to(there)
            if not sum([each.dispatcher.run_until_idle() for each in opened]):
                break

    def _live(self) -> list[_Opened]:
        self._opened = [each for each in self._opened if not each.engine.closed]
        for each in self._opened:
            # A call that waited, such as `drain`, may have let time pass for its engine.
            self._now_s = max(self._now_s, each.began_s + each.dispatcher.monotonic())
        return self._opened

    def crash(self, engine: Engine, *, torn: bool = False) -> Engine:
        """End `engine` as SIGKILL ends its process, and return a new one that has what had reached the disk.

        With `torn` it ends as by a power cut in the middle of a save, as in `Engines.crash`.

        Writes that were not saved are lost, except in scopes with `durability: commit`; the events of durable triggers
        that no handler has finished are delivered again when the trigger is registered again. The old engine runs no
        more handlers, writes nothing, and refuses calls with EngineClosed. Functions and triggers of the program are
        gone with it; those of the configuration exist again. Call it outside of handlers. Raises ValueError for an
        engine that is not open on this clock; with `torn` Unsupported for one without files.
        """
        found = next((each for each in self._live() if each.engine is engine), None)
        if found is None:
            raise ValueError("crash takes an engine that this clock has opened, and that is open")
        if torn:
            _refuse_without_files(engine)
        self._opened.remove(found)
        end_deterministic(engine, found.dispatcher, torn=torn)
        return self.open(found.config)

    def close(self) -> None:
        """Close the engines that are still open: save, and deliver events. Raises StorageError as `Engine.close`.

        The end of `with VirtualClock() as clock:` does it.
        """
        for each in self._live():
            each.engine.close()
        self._opened = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_without_files(engine: Engine) -> None:
    if not isinstance(engine._parts.backend.store, FileAdapter):
        raise Unsupported(
            "`torn=True` for an engine that has no files open",
            "crash the engine that owns the directory: `store_method: file_based`, and not a follower",
        )


@overload
def typed(example: StateEvent[Any], kind: type[V]) -> StateEvent[V | None]: ...
@overload
def typed(example: Change[Any], kind: type[V]) -> Change[V | None]: ...
@overload
def typed(example: EntryView[Any], kind: type[V]) -> EntryView[V]: ...
@overload
def typed(example: UpdateResult[Any], kind: type[V]) -> UpdateResult[V]: ...
@overload
def typed(example: SetResult[Any], kind: type[V]) -> SetResult[V]: ...
@overload
def typed(example: ModifyResult[Any], kind: type[V]) -> ModifyResult[V]: ...
@overload
def typed(example: CasResult[Any], kind: type[V]) -> CasResult[V]: ...
def typed(example: Any, kind: type[V]) -> Any:
    """Return an example as a typed scope's handle gives it: `typed(StateEvent.example(new_value={...}), User)`.

    Its values are objects of `kind`; one that does not fit raises SchemaViolation when it is read.
    """
    return typed_results.typed(
        example, typed_results.Reader(getattr(example, "scope", "scope"), value_type(kind), "raise")
    )


def describe(failures: list[DeliveryFailure]) -> str:
    """Describe for people which events were not delivered, and why."""
    lines = ["1 event was not handled:" if len(failures) == 1 else f"{len(failures)} events were not handled:"]
    for failure in failures[:NAMED]:
        event, error = failure.event, failure.error
        lines.append(
            f"  {event.event_type} {event.scope}/{event.key} at {failure.trigger_id} ({failure.function_id}), "
            f"attempt {failure.attempt}: {type(error).__name__}: {error}"
        )
    if len(failures) > NAMED:
        lines.append(f"  and {len(failures) - NAMED} more")
    return "\n".join(lines)
