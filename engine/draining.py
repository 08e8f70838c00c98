"""Waiting until events have been handled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pykka

from scopestate.actors.functions import running_loop
from scopestate.actors.handler import Barrier
from scopestate.actors.reply import Envelope
from scopestate.actors.snapshot import Commit
from scopestate.actors.turns import Ping
from scopestate.errors import ReplyTimeout, WouldDeadlock
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.parts import Parts


def drain(parts: Parts, timeout: float | None) -> None:
    """Wait until every event fired so far, and every event fired by handling those, has been handled.

    A barrier goes through the router and every handler, behind the events that are there. A handler that fires an event
    may put it behind the barrier, so rounds go on until two in a row saw no handler fire: the second one is behind
    whatever a handler had begun to fire when the first one started. Events that come by way of Redis are waited for
    first: with `delivery: each` those of this engine's own writes; with `one`, if there is a trigger here, until some
    engine of the group has taken them, which may still handle them when this one is done.
    """
    if event_depth.get():
        raise WouldDeadlock("drain() in a handler would wait for that very handler to end")
    deadline = None if timeout is None else parts.dispatcher.monotonic() + timeout
    quiet_rounds = 0
    while quiet_rounds < 2:
        fired = parts.router.fired_by_handlers()
        _finish_turns(parts, deadline, timeout)
        if parts.arrivals is not None and not parts.arrivals.catch_up(_left(parts, deadline)):
            raise ReplyTimeout("", timeout or 0.0, behind="(all: events of this engine have not come back from Redis)")
        handlers = parts.router.working()
        if not handlers:
            return
        reply = parts.dispatcher.reply()
        barrier = Barrier(handlers, reply)
        parts.router.tell(barrier)
        try:
            reply.get(timeout=_left(parts, deadline))
        except pykka.Timeout as error:
            behind = ", ".join(barrier.missing()[:10])
            parts.router.withdraw(barrier)
            raise ReplyTimeout("", timeout or 0.0, behind) from error
        quiet_rounds = quiet_rounds + 1 if parts.router.fired_by_handlers() == fired else 0


def refuse_on_loop_of_handlers(parts: Parts, name: str) -> None:
    """Raise WouldDeadlock if this thread runs an event loop that some handler needs, and `name()` would block it."""
    loop = running_loop()
    if loop is None:
        return
    here = {function.function_id for function in parts.functions.all() if function.is_async and function.loop is loop}
    for handler in parts.router.handlers() if here else ():
        trigger = handler.trigger
        if trigger.function_id in here or trigger.condition_function_id in here:
            raise WouldDeadlock(
                f"the handler {trigger.function_id!r} of trigger {trigger.trigger_id!r} runs on the event loop of this "
                f"very thread, which {name}() would block while it waits for that handler: "
                f"use `await engine.aio.{name}()` here"
            )


def _finish_turns(parts: Parts, deadline: float | None, timeout: float | None) -> None:
    """Let messages that were told, not asked, run, and commits that hold events back come through."""
    for actor in list(parts.directory.values()):
        if actor.has_waiting():
            actor._refuse_own_turn()
            reply = parts.dispatcher.reply()
            # Not a read: a closing scope refuses those, and a full mailbox is the more reason to wait.
            ping = Envelope(Ping(), reply)
            actor._enqueue(ping)
            try:
                reply.get(timeout=_left(parts, deadline))
            except pykka.Timeout as error:
                reply.abandoned = True
                actor.withdraw(ping)
                raise ReplyTimeout(actor.scope, timeout or 0.0) from error
    if parts.snapshot.has_open_commits():
        try:
            parts.snapshot.ask(Commit()).get(timeout=_left(parts, deadline))
        except pykka.Timeout as error:
            raise ReplyTimeout("", timeout or 0.0, behind="(all: a commit is still under way)") from error


def _left(parts: Parts, deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - parts.dispatcher.monotonic(), 0.0)
