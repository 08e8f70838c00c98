"""End an engine of this process as SIGKILL ends a process, for tests (docs/design/0062-testing.md).

Threads cannot be ended from outside. What they still do has no effect on files, other engines or handlers.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import pykka

from scopestate import lifecycle
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.actors.ports import Backend
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.scope import Close, ScopeActor
from scopestate.actors.snapshot import Commit, Flush
from scopestate.actors.stretch import ScopeInMemory
from scopestate.actors.turn import BUSY
from scopestate.errors import EngineClosed, StorageError
from scopestate.persistence.sqlite.adapter import FileAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scopestate.actors.deterministic import DeterministicDispatcher
    from scopestate.actors.journal import ConsumerChange
    from scopestate.actors.ports import ScopeChange
    from scopestate.engine import Engine
    from scopestate.ops.results import DeliveryFailure
    from scopestate.parts import Parts

    Save = tuple[Sequence[ScopeChange], Sequence[ConsumerChange]]
    """What one save writes."""

SETTLE_S = 1.0
"""Seconds within which callers that wait for a commit are answered. For a scope that a function of the program holds
they wait longer."""


class MortalDispatcher(ThreadDispatcher):
    """The worker threads of an engine that a test may end at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self._muted = False
        self.over = False
        """True once nothing is delivered any more."""
        self.waiting: dict[Reply[Any], None] = {}
        """Replies without an outcome so far."""

    def reply(self) -> Reply[Any]:
        reply = _Reply(self)
        if self.over:
            reply.fail(EngineClosed())
        return reply

    def mute(self) -> None:
        """Begin no more handlers, hooks and other functions of the program."""
        self._muted = True

    def end_waits(self) -> None:
        """Make every thread that waits for the engine, now or later, get EngineClosed."""
        self.over = True
        for reply in list(self.waiting):
            reply.fail(EngineClosed())

    def _run_program(self, work: Callable[[], object]) -> None:
        if not self._muted:
            super()._run_program(work)


class _Reply(Reply[Any]):
    def __init__(self, dispatcher: MortalDispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        dispatcher.waiting[self] = None

    def _arrive(self, value: Any, error: BaseException | None) -> None:
        self._dispatcher.waiting.pop(self, None)
        try:
            super()._arrive(value, error)
        except RuntimeError:
            if not self._dispatcher.over:  # otherwise the crash was faster
                raise


def end_threads(engine: Engine, dispatcher: MortalDispatcher, *, torn: bool = False) -> None:
    """End an engine on real threads. Returns when its files are free and it can no longer change them.

    With `torn`, half of the unsaved changes are on the disk, and must be ignored. Call it on any thread that is not in
    a turn of the engine, nor in one of its coroutine handlers, which are cancelled.
    """
    parts, closing = engine._parts, engine._closing
    closing.begun = True
    dispatcher.mute()
    for handler in parts.router.triggers.handlers():
        handler.active = False  # no handler begins after those that run
        handler._services.report = handler._services.tell_hooks = _nothing
    if parts.sharing is not None:
        parts.sharing.end()  # no goodbye without `hold`, and before calls are refused: a dead process answers nothing
    parts.directory.refuse(EngineClosed)
    for actor in list(parts.directory.values()):
        _shut(actor)
    closing.done = True

    def save() -> None:
        with suppress(pykka.Timeout):
            parts.snapshot.ask(Flush()).get(timeout=SETTLE_S)

    _let_go_of_files(parts, _next_save(parts, save) if torn else None)
    parts.end()
    parts.housekeeper.end()
    parts.residence.end()
    parts.expiry.end()
    parts.snapshot.stop_interval()
    with suppress(pykka.Timeout, StorageError):
        # Event loops wait for commits too, and only the turns of the scopes know of them.
        parts.snapshot.ask(Commit()).get(timeout=SETTLE_S)
    parts.router.feed.end()
    parts.router.backlog.made_room()
    dispatcher.end_waits()
    parts.loop_thread.close()
    dispatcher.close()
    if parts.backend.store is None and type(parts.backend).leave is not Backend.leave:
        parts.backend.leave()  # without giving back the events that it was handling
    parts.backend.close()
    lifecycle.release(engine)


def end_deterministic(engine: Engine, dispatcher: DeterministicDispatcher, *, torn: bool = False) -> None:
    """End an engine on a clock that a test moves: waiting turns end where they are. `torn`: as in `end_threads`."""
    unsaved = _next_save(engine._parts, engine._parts.snapshot._save) if torn else None
    dispatcher.kill()
    engine._scopes.disown(EngineClosed)
    engine.disown()
    engine._forked = False
    engine._closing.begun = engine._closing.done = True
    engine._scopes.refuse(EngineClosed)
    engine._parts.loop_thread.close()
    _let_go_of_files(engine._parts, unsaved)
    lifecycle.release(engine)


def _shut(actor: ScopeActor) -> None:
    """Refuse every turn, and the writes of a turn in progress."""
    if isinstance(actor, ScopeInMemory):
        actor.refuse_commits(EngineClosed)
    if actor.housekeep_now(Close(handlers_may=False)) is BUSY:
        actor._enqueue(Envelope(Close(handlers_may=False), Reply()))  # after the turn


def _nothing(failure: DeliveryFailure) -> None:
    """Report nothing: in a process that has ended, the failure did not happen."""


def _next_save(parts: Parts, save: Callable[[], object]) -> Save | None:
    """Return what `save()` would write first; None: nothing. From now on saving fails."""
    found: list[Save] = []

    def take(
        changes: Sequence[ScopeChange], consumers: Sequence[ConsumerChange] = (), *_: object, **__: object
    ) -> None:
        found.append((changes, consumers))
        raise StorageError("the engine was crashed by a test while it saved this")

    parts.snapshot._write = take  # type: ignore[method-assign]  # as below
    with suppress(StorageError):
        save()
    return found[0] if found else None


def _let_go_of_files(parts: Parts, torn: Save | None) -> None:
    def gone(*_: object, **__: object) -> NoReturn:
        raise StorageError("the engine was crashed by a test: this was not saved")

    if isinstance(parts.backend.store, FileAdapter):
        parts.snapshot._write = gone  # type: ignore[method-assign]  # silently: the log would report a broken disk
        parts.backend.store.leave(torn)
