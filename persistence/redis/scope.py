"""Scopes that live in Redis, where other engines write them too."""

from __future__ import annotations

import threading
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Housekeeping, Passivate, Ping, ScopeActor, Surroundings
from scopestate.actors.turn import BUSY
from scopestate.errors import ScopestateError, WouldDeadlock
from scopestate.ops.turns import Turn
from scopestate.persistence.redis.commands import Behind, Call, Command, ScopeCommands
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.persistence.redis.backend import RedisBackend
    from scopestate.persistence.redis.pump import Pump

log = Log("scopestate.scope")

_MAIN: Final = threading.main_thread()
"""The thread that runs signal handlers."""


class RedisScope(ScopeActor):
    """One scope in Redis (docs/design/0034-one-owner-for-each-connection.md).

    Its calls are checked here, on the thread of their callers. What becomes of them is the business of the owner of the
    connection that it uses: it alone takes calls from the mailbox, and uses `commands`, `listed` and `since`.
    """

    def __init__(self, scope: str, around: Surroundings, store: RedisBackend) -> None:
        super().__init__(scope, around)
        self._store = store
        self.commands = ScopeCommands(self, store, around.limits, self._changed)
        self.owner = store.owner_of(self.commands.hash_key)
        self.mailbox: list[Call] = self._mailbox
        self.listed = False
        """True while the owner has it among those to ask for a command."""
        self.since = 0.0
        """When it was listed. Seconds on the monotonic clock."""

    # --------------------------------------------------------------------------------------------- on a caller's thread

    def run(self, turn: Turn[Any]) -> Any:
        if self._passivated:
            return self._around.directory[self.scope].run(turn)
        call = self._admitted(turn, None, event_depth.get())
        self.owner.call(self, call, self._around.limits.call_timeout_s)
        if call.error is not None:
            raise call.error
        return call.answer

    def send(self, envelope: Envelope) -> None:
        # Always queued: the thread that sends an envelope may be an event loop's, which must not wait for Redis.
        self._refuse_own_turn()
        message, reply = envelope.message, envelope.reply_to
        if isinstance(message, Housekeeping):
            self._enqueue(envelope)
            return
        try:
            call = self._admitted(message, reply, envelope.depth)
        except (ScopestateError, HandlerFull) as error:
            reply.fail(error)
            return
        waiter = reply.loop_reply
        if waiter is not None and get_ident() != _MAIN.ident:
            call.loop = waiter.loop
        self.post(call)

    def housekeep_now(self, message: Housekeeping[Any]) -> Any:
        match message:
            case Passivate():
                return self.owner.passivate(lambda: self._housekeep(message))
            case Ping():
                return BUSY
            case _:  # flags are set, or nothing is done
                return self._housekeep(message)

    def _enqueue(self, item: Envelope) -> None:
        call = item if type(item) is Call else Call(Behind(), item.reply_to, 0)
        self._mailbox += (call,)
        if call.loop is None:
            self.owner.post(self)
        else:
            self.owner.post_on_loop(self, call.loop)

    def enter(self, call: Call) -> None:
        """Take a call whose caller waits for it. Raises Overloaded, and WouldDeadlock."""
        self._refuse_own_turn()
        if get_ident() == _MAIN.ident and self._store.is_held_here():
            raise self._would_deadlock()
        self.post(call)

    def _refuse_own_turn(self) -> None:
        if self.owner.is_held_here():
            raise self._would_deadlock()

    def _would_deadlock(self) -> WouldDeadlock:
        return WouldDeadlock(
            f"a signal handler has interrupted a call to Redis, and {self.name} needs the same connection: waiting for "
            "it here might never end; nothing was done: let the handler set a flag, or leave the call to another thread"
        )

    def _admitted(self, turn: Turn[Any], reply: ReplyTo | None, depth: int) -> Call:
        """Check a turn. Raises what refuses it: nothing was sent then."""
        self._refuse_if_closed(depth)
        call = Call(turn, reply, depth)
        if turn.writes:
            if not self._store.shares_events:
                for key in call.keys or ():
                    self._refuse_if_full(key, depth)
            elif depth:
                self._router.cascades.add()
        self.touched = True
        return call

    # ------------------------------------------------------------------------------------------- for the owner's holder

    @property
    def is_idle(self) -> bool:
        """True if a caller may lead: nothing waits here, and nothing is on its way."""
        commands = self.commands
        return not (self._mailbox or commands.command or commands.paused or self._passivated)

    def next_command(self, owner: Pump, over: list[Call]) -> Command | None:
        """Make the next command of the calls that wait."""
        self._batches += 1  # for `_refuse_bytes`
        mailbox = self.mailbox
        if self._passivated:
            calls = mailbox[:]
            del mailbox[: len(calls)]
            for call in calls:
                self._forward(call)
            return None
        if len(mailbox) != 1 or self.commands.paused:
            return self.commands.make(mailbox, owner.going_now(len(mailbox)), over)
        call = mailbox[0]
        del mailbox[0]
        return None if call.is_abandoned else self.commands.make_one(call, over)

    def _forward(self, envelope: Envelope) -> None:
        call: Any = envelope
        try:
            self._around.directory[self.scope]._enqueue(call)
        except ScopestateError as error:
            self.commands.give_up([call], error, self.owner.over)

    def _changed(self, call: Call, key: str, old: bytes | None, new: bytes | None) -> None:
        """Fire the event of a write, unless it comes from Redis."""
        if self._store.shares_events:
            return
        if self._shut:
            log.error(
                "%s: a write of key %r was answered after the engine closed; its event is not delivered",
                self.name,
                key,
            )
        else:
            self._fire(key, old, new, call.depth)

    # --------------------------------------------------------------------------------------------- waiting and leaving

    def has_waiting(self) -> bool:
        commands = self.commands
        busy = bool(self._mailbox or commands.command or commands.paused)
        return busy or self.owner.leads_for(self) or self.owner.is_held_here()

    def _is_needed(self) -> bool:
        return not self.is_idle
