"""Closing an engine: nothing acknowledged is lost, and every event is delivered or reported."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import pykka

from scopestate.actors.containment import Log
from scopestate.actors.router import Routed
from scopestate.actors.scope import Close
from scopestate.actors.snapshot import Flush
from scopestate.draining import drain
from scopestate.errors import EngineClosed, EngineForked, ReplyTimeout, StorageError, WouldDeadlock
from scopestate.signals import Guard

if TYPE_CHECKING:
    from scopestate.parts import Parts
    from scopestate.sharing import Sharing

log = Log("scopestate.engine")

LAST_SAVE_TRIES: Final = 3
HOOKS_S: Final = 1.5
"""Seconds for passing undelivered events to the program's hooks."""
LEFT_S: Final = 1.0
"""Shortest grace time in seconds, if events were already waited for when the interpreter began to exit."""
CATCH_UP_S: Final = 1.0
"""Seconds that the engine waits at its end for followers that read changes."""
NAMED: Final = 10
"""Number of triggers that the log names."""


class Closing:
    """Closes one engine, in stages that may be interrupted and repeated.

    1. Calls are refused, except those of handlers of events already fired. Calls of followers are no longer answered:
       they go to the next owner of the directory.
    2. Everything is saved: the process may have only a few seconds, and the handlers may take all of them.
    3. Those events are delivered, for at most `close_grace_ms`. The rest is reported as not delivered.
    4. Handlers are refused too, and their changes are saved. If that fails, `close()` raises and may be called again.
    5. The threads end, followers get their goodbye, and the backend is closed.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._turn = Guard()
        self._spent_s = 0.0
        self._delivered = False
        self.begun = False
        self.done = False

    def close(self, grace_s: float | None = None) -> None:
        """Close, or wait for the thread that does. Raises StorageError if the last save fails; then call it again.

        `grace_s` replaces `close_grace_ms`. Raises WouldDeadlock in a signal handler that has interrupted a turn, or
        this function, on the same thread.
        """
        if self._turn.is_mine():
            raise WouldDeadlock("this thread is already closing the engine, and was interrupted by a signal")
        self._turn.run(self._close, self._parts.limits.close_grace_s if grace_s is None else grace_s)

    def deliver_early(self) -> None:
        """Deliver the events fired so far, for as long as `close` would. Called while executors still take work."""
        if self.begun:
            return
        clock, grace_s = self._parts.dispatcher.monotonic, self._parts.limits.close_grace_s
        began = clock()
        try:
            drain(self._parts, grace_s, everywhere=False)
        except ReplyTimeout as error:
            log.debug("at the exit of the interpreter: %s", error)  # close() will report it
        self._spent_s = clock() - began

    def _close(self, grace_s: float) -> None:
        """Close. Every step may be repeated, because an interrupted close() is called again."""
        if self.done:
            return
        parts = self._parts
        sharing = parts.sharing
        if sharing is not None:
            sharing.end_following()
            if not self.begun:
                self._deliver_while_shared(sharing, grace_s)
        self.begun = True
        parts.end()
        parts.housekeeper.end()
        parts.residence.end()
        parts.expiry.end()
        if not self._delivered:
            if sharing is not None:
                sharing.hold(grace_s, handlers_may=True)
            self._refuse(handlers_may=True)
            self._save_first()
            self._deliver(max(grace_s - self._spent_s, min(grace_s, LEFT_S)))
            self._delivered = True
        if sharing is not None:
            sharing.hold(LEFT_S, handlers_may=False)
        self._refuse(handlers_may=False)
        parts.snapshot.stop_interval()
        self._save()
        self._let_followers_catch_up()
        parts.router.feed.end()
        parts.loop_thread.close()
        parts.dispatcher.close()
        if parts.backend.store is not None:
            parts.backend.store.clock_ms = parts.clock.now_ms()  # the next engine on the store continues from there
            parts.snapshot.note_positions()
        if sharing is not None:
            sharing.end()
        parts.backend.close()
        self.done = True

    def _let_followers_catch_up(self) -> None:
        """Wait briefly until callers that poll have got all changes: the next owner cannot give them these."""
        parts = self._parts
        if parts.sharing is None or not parts.sharing.has_followers():
            return
        parts.router.feed.number()
        deadline = parts.dispatcher.monotonic() + CATCH_UP_S
        while parts.polls_behind(CATCH_UP_S) and parts.dispatcher.monotonic() < deadline:
            self._pause(0.002)

    def _deliver_while_shared(self, sharing: Sharing, grace_s: float) -> None:
        """With followers, deliver the fired events before calls are refused: followers' calls continue until then.

        Events that are fired meanwhile are delivered afterwards.
        """
        if sharing.has_followers():
            began = self._parts.dispatcher.monotonic()
            self._drained(max(grace_s - self._spent_s, 0.0))
            self._spent_s += self._parts.dispatcher.monotonic() - began

    def _refuse(self, *, handlers_may: bool) -> None:
        directory = self._parts.directory
        directory.refuse(EngineClosed, handlers_may=handlers_may)
        for actor in list(directory.values()):
            actor.housekeep(Close(handlers_may))

    def _deliver(self, grace_s: float) -> None:
        parts = self._parts
        ends = parts.dispatcher.monotonic() + grace_s
        drained = self._drained(grace_s)
        arrivals = parts.backend.arrivals
        if arrivals is not None:
            arrivals.stop()
            if drained:
                # Events that have arrived from other engines since then. No more can arrive.
                self._drained(max(ends - parts.dispatcher.monotonic(), 0.0))
        if parts.consumers is not None:
            parts.consumers.stop()
        self._abandon()

    def _drained(self, grace_s: float) -> bool:
        try:
            drain(self._parts, grace_s, everywhere=False)
        except ReplyTimeout as error:
            log.error("closing without waiting any longer for handlers: %s", error)  # noqa: TRY400 - the text says it all
            return False
        except StorageError as error:
            log.debug("closing without the events that are not saved: %s", error)  # `_save` tries again
            return False
        return True

    def _abandon(self) -> None:
        """Report the undelivered events: to the hooks one by one, to the log in one line."""
        # If there are many events, the router may not have given all of them to handlers.
        with contextlib.suppress(pykka.Timeout):
            self._parts.router.ask(Routed()).get(timeout=HOOKS_S)
        handlers = self._parts.router.triggers.working()
        left = {handler: (handler.waiting(), len(handler.under_way())) for handler in handlers}
        left = {handler: (waiting, hangs) for handler, (waiting, hangs) in left.items() if waiting or hangs}
        if not left:
            return
        waiting = sum(count for count, _ in left.values())
        hanging = sum(hangs for _, hangs in left.values())
        named = ", ".join(
            f"{handler.trigger.trigger_id} ({handler.trigger.function_id})" for handler in list(left)[:NAMED]
        )
        log.error(
            "the engine closed before %d events were delivered and while %d were being handled; triggers: %s%s",
            waiting,
            hanging,
            named,
            f" and {len(left) - NAMED} more" if len(left) > NAMED else "",
        )
        # On a worker thread and with a time limit: a hook is code of the program.
        dispatcher = self._parts.dispatcher
        over = dispatcher.reply()

        def report() -> None:
            try:
                for handler in handlers:
                    handler.abandon("the engine closed before its turn came")
                for handler in handlers:
                    handler.abandon_under_way()
            finally:
                over.set()

        dispatcher.submit_program(report)
        try:
            over.get(timeout=HOOKS_S)
        except pykka.Timeout:
            log.error("the hooks for events that were not delivered did not end in %g s", HOOKS_S)  # noqa: TRY400 - as above

    def _save_first(self) -> None:
        if self._parts.backend.store is None:
            return
        try:
            self._parts.snapshot.ask(Flush()).get()
        except StorageError as error:
            log.debug("saving before events are delivered: %s", error)  # `_save` tries again

    def _save(self) -> None:
        snapshot = self._parts.snapshot
        for attempt in range(1, LAST_SAVE_TRIES + 1):
            try:
                snapshot.ask(Flush()).get()
                return
            except StorageError as error:
                if attempt == LAST_SAVE_TRIES:
                    raise StorageError(
                        f"the last save failed, {snapshot.waiting_scopes()} scopes are not on disk: {error}; they are "
                        "kept in memory: remove the cause and call close() again"
                    ) from error
                self._pause(0.05 * attempt)

    def _pause(self, delay_s: float) -> None:
        dispatcher = self._parts.dispatcher
        over = dispatcher.reply()
        dispatcher.call_later(delay_s, over.set)
        over.get()


def forked() -> EngineForked:
    """Return the error for a forked child that inherited the engine."""
    return EngineForked(
        "this engine was inherited through fork and belongs to the parent process: open one in each process, after "
        "the fork. gunicorn --preload: in the application's lifespan, or in the hook `post_worker_init`; "
        "multiprocessing and concurrent.futures: in the worker's `initializer`; os.fork: in the child"
    )
