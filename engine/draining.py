"""Wait until events have been handled."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pykka

from scopestate.actors.functions import running_loop
from scopestate.actors.lanes import Barrier
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.scope import Ping
from scopestate.actors.snapshot import Commit, Flush
from scopestate.errors import ReplyTimeout, WouldDeadlock
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.turn import TurnActor
    from scopestate.parts import Parts


Wait = tuple[Reply[Any] | Callable[[], object], float | None]
"""What a step waits for, and for how many seconds at most: an answer, or a call that blocks its thread."""
LONGEST_LOOK_S: Final = 1.0
"""Seconds for which a wait for other engines holds a worker thread."""
Steps = Generator[Wait, Any, None]


def drain(parts: Parts, timeout: float | None, *, everywhere: bool = True) -> None:
    """Block this thread until every event fired so far has been handled, and every event that those handlers fired.

    `everywhere`: also wait for events of durable triggers that other engines are handling.
    """
    steps = drain_steps(parts, timeout, everywhere=everywhere)
    outcome: Any = None
    error: pykka.Timeout | None = None
    while True:
        try:
            wanted, left_s = steps.send(outcome) if error is None else steps.throw(error)
        except StopIteration:
            return
        outcome, error = None, None
        try:
            outcome = wanted.get(timeout=left_s) if isinstance(wanted, Reply) else wanted()
        except pykka.Timeout as late:
            error = late


def drain_steps(parts: Parts, timeout: float | None, *, everywhere: bool = True) -> Steps:
    """Yield what to wait for, one step after another. For threads and for event loops.

    A barrier goes through the router and every handler, after the waiting events. A handler may fire an event after the
    barrier, so this is repeated until no handler has fired in two rounds in a row: the second barrier comes after
    everything that a handler had begun to fire when the first one started. Before that, it waits for events that come
    through Redis: those of this engine's own writes. A durable trigger there may have given some of them to another
    engine, which may still be handling them.
    """
    if event_depth.get():
        raise WouldDeadlock("drain() in a handler would wait for that handler to end")
    parts.router._refuse_own_turn()
    deadline = None if timeout is None else parts.dispatcher.monotonic() + timeout
    quiet_rounds = 0
    while quiet_rounds < 2:
        fired = parts.router.cascades.value()
        yield from _finish_turns(parts, deadline, timeout)
        if parts.backend.arrivals is not None:
            arrivals, left_s = parts.backend.arrivals, _left(parts, deadline)
            if not (yield lambda arrivals=arrivals, left_s=left_s: arrivals.catch_up(left_s), left_s):  # type: ignore[misc]  # mypy cannot infer a default argument
                raise ReplyTimeout(
                    "", timeout or 0.0, behind="(all: events of this engine's own writes have not arrived)"
                )
        if everywhere:
            yield from _settle_consumers(parts, deadline, timeout)
        handlers = parts.router.triggers.working()
        if not handlers:
            return
        reply = parts.dispatcher.reply()
        barrier = Barrier(handlers, reply)
        parts.router.tell(barrier)
        try:
            yield reply, _left(parts, deadline)
        except pykka.Timeout as error:
            behind = ", ".join(barrier.missing()[:10])
            raise ReplyTimeout("", timeout or 0.0, behind) from error
        finally:
            if not reply.done:
                parts.router.withdraw(barrier)  # the wait has timed out or was cancelled
        quiet_rounds = quiet_rounds + 1 if parts.router.cascades.value() == fired else 0


def refuse_on_loop_of_handlers(parts: Parts, name: str) -> None:
    """Raise WouldDeadlock if this thread runs an event loop that some handler needs, and `name()` would block it."""
    loop = running_loop()
    if loop is None:
        return
    here = {function.function_id for function in parts.functions.all() if function.is_async and function.loop is loop}
    for handler in parts.router.triggers.handlers() if here else ():
        trigger = handler.trigger
        if trigger.function_id in here or trigger.condition_function_id in here:
            raise WouldDeadlock(
                f"the handler {trigger.function_id!r} of trigger {trigger.trigger_id!r} runs on the event loop of this "
                f"thread, which {name}() would block while it waits for that handler: "
                f"use `await engine.aio.{name}()` here"
            )


def _finish_turns(parts: Parts, deadline: float | None, timeout: float | None) -> Steps:
    """Wait for the messages that scopes have taken, and for commits that hold events back."""
    for actor in list(parts.directory.values()):
        if actor.has_waiting():
            actor._refuse_own_turn()
            # Not a read, which a closing scope refuses. If the mailbox is full, waiting matters even more.
            yield from _behind(actor, Ping(), parts, deadline, ReplyTimeout(actor.scope, timeout or 0.0))
    durable = parts.router.triggers.durable.members  # their events are fired when they are on disk
    if durable or parts.snapshot.has_open_commits():
        late = ReplyTimeout("", timeout or 0.0, behind="(all: a commit has not ended)")
        parts.snapshot._refuse_own_turn()
        yield from _behind(parts.snapshot, Flush() if durable else Commit(), parts, deadline, late)


def _settle_consumers(parts: Parts, deadline: float | None, timeout: float | None) -> Steps:
    """Wait for events of durable triggers that other engines handle: followers of this one, or the one it follows."""
    consumers = parts.consumers
    names = [] if consumers is None else consumers.served_elsewhere()
    left: dict[str, int] = {}
    while names and consumers is not None:
        left_s = _left(parts, deadline)
        wait_s = LONGEST_LOOK_S if left_s is None else min(left_s, LONGEST_LOOK_S)
        left = yield partial(consumers.settle, names, left, wait_s), left_s
        names = list(left)
        if names and deadline is not None and parts.dispatcher.monotonic() >= deadline:
            raise ReplyTimeout("", timeout or 0.0, behind=f"(consumers {', '.join(names[:10])}, in other engines)")


def _behind(actor: TurnActor, message: object, parts: Parts, deadline: float | None, late: ReplyTimeout) -> Steps:
    """Queue `message` and wait until it was handled. Raises `late` after the deadline."""
    reply = parts.dispatcher.reply()
    envelope = Envelope(message, reply)
    actor._enqueue(envelope)
    try:
        yield reply, _left(parts, deadline)
    except pykka.Timeout as error:
        raise late from error
    finally:
        if not reply.done:
            reply.abandoned = True
            actor.withdraw(envelope)


def _left(parts: Parts, deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - parts.dispatcher.monotonic(), 0.0)
