"""Scopes in Redis, which other engines write too."""

from __future__ import annotations

import threading
import time
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.callbacks import IN_CALLBACK, refuse_in_callback
from scopestate.actors.containment import Log
from scopestate.actors.ports import NO_RULE
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.actors.scope import Housekeeping, Passivate, Ping, ScopeActor, Surroundings
from scopestate.actors.turn import BUSY
from scopestate.actors.wheel import NEVER
from scopestate.errors import ScopestateError, StorageError, Unsupported, WouldDeadlock
from scopestate.ops.ranges import DeleteRange, Entries, ReadPage, State
from scopestate.ops.transactions import Batch, DeliveryBatch, SetAll, Transact
from scopestate.ops.turns import Change, Delete, Get, Items, List, Set, Turn, Update
from scopestate.ops.writes import (
    CheckedUpdate,
    CompareAndSet,
    DeleteWith,
    Expire,
    GetEntry,
    Modify,
    Once,
    SetWith,
    Touch,
    Ttl,
    UpdateWith,
    unwrapped,
)
from scopestate.persistence.redis.calls import Behind, Call, Command
from scopestate.persistence.redis.commands import ScopeCommands
from scopestate.persistence.redis.functions import RANGED, Functions, has_function, read_range
from scopestate.persistence.redis.seen import EntryView
from scopestate.persistence.redis.transacting import BuildIndex, Listed, ReadRange
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.persistence.redis.backend import RedisBackend
    from scopestate.persistence.redis.owner import RedisConnectionOwner

log = Log("scopestate.scope")

_STEPS: Final = RANGED | {Modify, Transact, DeleteRange, Once}
"""Turns that take several commands, or may take several."""
_WITHOUT_REVISIONS: Final = frozenset({Set, Get, Delete, Update, List, Items, Behind})
"""Turns that need nothing but the hash. They are the frequent ones, so they are not checked further."""
_NEED_REVISIONS: Final = frozenset(
    {
        *(SetWith, UpdateWith, CheckedUpdate, DeleteWith, CompareAndSet, Modify, GetEntry, Ttl, Touch, Expire, Once),
        *(Batch, DeliveryBatch, SetAll, Transact, Entries, ReadPage, State, DeleteRange),
    }
)
_INDEX_ATTEMPTS: Final = 20
_MAIN: Final = threading.main_thread()
"""The thread that runs signal handlers."""


class RedisScope(ScopeActor):
    """One scope in Redis (docs/design/0034-one-owner-for-each-connection.md).

    Calls are checked here, on their callers' threads, and then handled by the owner of the connection that the scope
    uses. Only that owner takes calls from the mailbox, and uses `commands`, `listed` and `since`.
    """

    def __init__(self, scope: str, around: Surroundings, store: RedisBackend) -> None:
        super().__init__(scope, around)
        self._store = store
        self.commands = ScopeCommands(self, store, around.limits, self._changed)
        self.commands.note_due = self._note_due
        self.owner = store.owner_of(self.commands.hash_key)
        self.mailbox: list[Call] = self._mailbox
        self.listed = False
        """True while this scope is on the owner's list of scopes to ask for a command."""
        self.since = 0.0
        """When it was listed. Seconds on the monotonic clock."""
        self._numbers = store.shape.numbers
        self._functions = Functions(self, store.update_attempts)

    # --------------------------------------------------------------------------------------------- on a caller's thread

    def run(self, turn: Turn[Any]) -> Any:
        if self._passivated:
            return self._around.directory[self.scope].run(turn)
        if type(turn) in _STEPS and self._numbers:
            return self._run_steps(turn, event_depth.get())
        # `call`, inlined.
        call = self._admitted(turn, None, event_depth.get())
        self.owner.call(self, call, self._around.limits.call_timeout_s)
        if call.error is not None:
            raise call.error
        return call.answer

    def call(self, turn: Turn[Any], depth: int) -> Any:
        """Execute a turn by one command, and wait for its answer."""
        call = self._admitted(turn, None, depth)
        self.owner.call(self, call, self._around.limits.call_timeout_s)
        if call.error is not None:
            raise call.error
        return call.answer

    def _run_steps(self, turn: Turn[Any], depth: int) -> Any:
        """Execute a turn that takes several commands, or calls a function of the program."""
        if type(turn) in RANGED:
            return read_range(self, turn, depth)
        if has_function(turn):
            self._refuse_own_turn()
            return self._functions.run(turn, depth)
        return self.call(turn, depth)

    def read(self, turn: ReadRange, depth: int) -> Listed:
        """Read a range. Builds the index of the keys first if it does not exist."""
        for _ in range(_INDEX_ATTEMPTS):
            found: Listed | None = self.call(turn, depth)
            if found is not None:
                return found
            cursor = b""
            while (cursor := self.call(BuildIndex(cursor), depth)) not in (b"", b"0"):
                pass
        raise StorageError(
            f"the keys of {self.name} cannot be put in order: another program creates and deletes keys all the time; "
            "try again"
        )

    @property
    def call_timeout_s(self) -> float | None:
        """How long a caller waits for its answer."""
        return self._around.limits.call_timeout_s

    def view_of_seen(self) -> EntryView:
        """Return a view of the values that were seen, which may be outdated."""
        return self.commands.view_of_seen()

    def pause(self, seconds: float) -> None:
        """Wait on the caller's thread."""
        time.sleep(seconds)

    def send(self, envelope: Envelope) -> None:
        # Always queued: the thread that sends an envelope may be an event loop's, which must not wait for Redis.
        if self.owner.is_held_here():
            raise self._would_deadlock()
        message, reply = envelope.message, envelope.reply_to
        if isinstance(message, Housekeeping):
            self._enqueue(envelope)
            return
        if type(message) in _STEPS and self._numbers and (type(message) is not Once or has_function(message)):
            self._dispatcher.submit_program(lambda: self._answer(message, reply, envelope.depth))
            return
        try:
            call = self._admitted(message, reply, envelope.depth)
        except (ScopestateError, HandlerFull) as error:
            reply.fail(error)
            return
        waiter = reply.loop_reply
        if waiter is not None:
            if get_ident() == _MAIN.ident:
                self.owner.call_for_task(self, call, waiter)
                return
            call.loop = waiter.loop
        self.post(call)

    def note_cancelled(self) -> None:
        # Its event loop may be about to end, and would not receive the reply. So the I/O thread does.
        self.owner.post(self)

    def _answer(self, turn: Turn[Any], reply: ReplyTo, depth: int) -> None:
        """Execute a turn on a worker thread, and answer it."""
        token = event_depth.set(depth)
        try:
            reply.set(self.run(turn))
        except BaseException as error:  # noqa: BLE001 - whatever the function raises is the answer
            reply.fail(error)
        finally:
            event_depth.reset(token)

    def housekeep_now(self, message: Housekeeping[Any]) -> Any:
        match message:
            case Passivate():
                return self.owner.passivate(lambda: self._housekeep(message))
            case Ping():
                return BUSY
            case _:  # sets flags, or does nothing
                return self._housekeep(message)

    def next_due(self) -> int:
        due = self.commands.due_ms
        if due is None or not self._numbers:
            return NEVER
        clock = self._around.clock
        return clock.now_ms() + max(0, due - self.commands.server_ms(clock.now_ms()))

    def _note_due(self) -> None:
        """Called when a key gets an earlier deadline than all that are known."""
        self._around.expiry.expect(self.scope, self.next_due())

    def post(self, item: Envelope) -> None:
        # The method of the base class, inlined for the usual case, in which little waits: every queued call comes here.
        if type(item) is Call:
            limits, waiting, size = self._around.limits, len(self._mailbox), item.message.size()
            if size > self._largest:  # noqa: PLR1730 - `max` takes a tenth of the time of this method
                self._largest = size
            most_bytes = limits.scope_mailbox_bytes
            if waiting < limits.scope_mailbox and (not most_bytes or waiting * self._largest < most_bytes):
                self._enqueue(item)
                return
        super().post(item)

    def _enqueue(self, item: Envelope) -> None:
        if type(item) is Call:
            call = item
        elif type(item.message) is Expire:
            # Several engines may send this: the server removes each key once.
            call = Call(item.message, item.reply_to, 0)
            due_key = self.commands.due_key
            if due_key is not None and not self._store.shares_events:
                try:
                    self._refuse_if_full(due_key, 0)
                except HandlerFull as full:
                    item.reply_to.fail(full)
                    return
        else:
            call = Call(Behind(), item.reply_to, 0)
        self._mailbox += (call,)
        if call.loop is None:
            self.owner.post(self)
        else:
            self.owner.post_on_loop(self, call.loop)

    def enter(self, call: Call) -> None:
        """Accept a call whose caller waits for it. Raises Overloaded and WouldDeadlock."""
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
        """Check a turn, and return its call. If this raises, nothing was sent."""
        if self._closed:
            self._refuse_if_closed(depth)
        if IN_CALLBACK:
            refuse_in_callback()
        if not self._numbers and (type(turn) not in _WITHOUT_REVISIONS or (turn.writes and self.rule is not NO_RULE)):
            self._refuse_revisions(turn)
        call = Call(turn, reply, depth)
        if turn.writes:
            if not self._store.shares_events:
                if self._watch.has_any():
                    for key in call.keys or ():
                        self._refuse_if_full(key, depth)
            elif depth:
                self._router.cascades.add()
        self.touched = True
        return call

    def _refuse_revisions(self, turn: Turn[Any]) -> None:
        """Raise Unsupported if a turn needs the data that is kept beside the hash."""
        if type(turn) in _NEED_REVISIONS or (turn.writes and self.rule.needs_entries):
            asked = unwrapped(turn)
            raise Unsupported(
                "`delivery.transaction`" if isinstance(asked, DeliveryBatch) else type(asked).__name__,
                f"{self.name} is in Redis without revisions and deadlines (`revisions: false`)",
            )

    # ------------------------------------------------------------------------------------------- for the owner's holder

    @property
    def is_idle(self) -> bool:
        """True if a caller may lead: no call waits here, and no command is in flight."""
        commands = self.commands
        return not (self._mailbox or commands.command or commands.paused or self._passivated)

    def next_command(self, owner: RedisConnectionOwner, over: list[Call]) -> Command | None:
        """Return the next command for the calls that wait."""
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
        reply_to = call.reply_to
        if call.gave_up or (reply_to is not None and reply_to.abandoned):
            return None
        return self.commands.make_one(call, over)

    def _forward(self, envelope: Envelope) -> None:
        call: Any = envelope
        try:
            self._around.directory[self.scope]._enqueue(call)
        except ScopestateError as error:
            self.commands.give_up([call], error, self.owner.over)

    def _changed(self, call: Call, change: Change, number: int) -> None:
        """Fire the event of a write, unless events come from Redis. `number`: its revision; 0: it has none."""
        if self._store.shares_events:
            return
        if self._shut:
            log.error(
                "%s: a write of key %r was answered after the engine closed; its event is not delivered",
                self.name,
                change.key,
            )
        else:
            # Without revisions the events of this engine are numbered.
            self._sequence = number or self._sequence + 1
            if not self._watch.has_any():
                return
            deadline = change.expires_ms
            expired = (deadline, self.commands.late_ms(deadline)) if change.expired and deadline is not None else None
            router = self._router
            events = router.prepare_late(
                self.scope, self._watch, change.key, change.before, change.after, self._sequence, call.depth, expired
            )
            if events:
                router.publish(events)

    # --------------------------------------------------------------------------------------------- waiting and leaving

    def has_waiting(self) -> bool:
        commands = self.commands
        busy = bool(self._mailbox or commands.command or commands.paused)
        return busy or self.owner.leads_for(self) or self.owner.is_held_here()

    def _is_needed(self) -> bool:
        return not self.is_idle
