"""The connection owner for Redis. Replies come in the order in which commands were sent."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Final, Protocol

from scopestate.errors import ConnectionLost, Overloaded, ReplyTimeout, ScopestateError, StorageError
from scopestate.persistence.connections.connection import NOT_ALL, Broken, Target
from scopestate.persistence.connections.owner import HOLDER, ConnectionOwner, arm
from scopestate.persistence.connections.pump import AGAIN_S, Means, TimeLimits
from scopestate.persistence.connections.watch import Watch
from scopestate.persistence.redis.calls import Call, Command, Pause
from scopestate.persistence.redis.connection import PASSING, Connection, Refusal, pack
from scopestate.persistence.redis.dialling import abort_dial
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.script import with_source
from scopestate.signals import certainly

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from scopestate.actors.loops import LoopReply
    from scopestate.persistence.redis.scope import RedisScope

_ELSEWHERE: Final = Refusal("ELSEWHERE another server has the key by now")
"""Used as the reply to a command that was not sent because this server cannot be reached."""
_POSTED: Final = 64
"""If a task cannot lead, this many further calls of tasks do not try: with several callers, the I/O thread is quicker
for all than calls that lead in between."""
_NOT_BEGUN: Final = PASSING | {"NOSCRIPT", "MOVED", "ASK", "READONLY", "ELSEWHERE"}
"""Refusals after which a command may be sent again."""


class Routes(Protocol):
    """Decides where a command is sent. May be called from any thread; never blocks."""

    moves: bool
    """True if keys move between servers."""

    def owner_of(self, hash_key: bytes) -> RedisConnectionOwner:
        """Return the owner for the small commands of a hash."""

    def via(self, command: Command) -> RedisConnectionOwner:
        """Return the owner that sends this command. A large command uses another connection."""

    def redirect(self, command: Command, refusal: Refusal) -> RedisConnectionOwner:
        """Return the owner that sends a command after MOVED or ASK, and set the command's `prefix`."""


class RedisConnectionOwner(ConnectionOwner["RedisScope | Command", Call, Connection]):
    """Drives one connection to Redis.

    Three kinds of things are posted: scopes with calls in their mailboxes, commands for this connection, and finished
    commands of this owner's scopes. A command is sent once. It is sent again only if the server said that it had not
    begun it.
    """

    peer = "Redis"
    log = logging.getLogger("scopestate.persistence.redis")
    thread_name = "scopestate-redis"
    prompt = True

    def __init__(
        self,
        target: Target[Connection],
        options: RedisOptions,
        means: Means,
        routes: Routes | None = None,
        *,
        fails_over: bool = False,
    ) -> None:
        """`routes`: given if there are other connections too.

        `fails_over`: another server may become the primary. So if a server is read-only, its connection is closed, and
        the target is dialled again.
        """
        super().__init__(target, TimeLimits(options.call_timeout_s, options.connect_wait_s), means)
        self._routes = routes
        self._moves = routes is not None and routes.moves
        self._fails_over = fails_over
        self._under_way: deque[Command] = deque()
        self._to_post = 0
        """How many of the next calls of tasks on the main thread are posted, although they might lead."""

    def leads_for(self, scope: RedisScope) -> bool:
        """True while a caller executes a call of this scope on its own thread."""
        led = self._led
        return led is not None and led.scope is scope

    # ---------------------------------------------------------------------------------------------------------- callers

    def _lead(self, scope: RedisScope, call: Call) -> bool:
        """Execute a call on this thread. False: queue it. With `call.lock` set, the I/O thread has taken it."""
        connection = self._connection
        if connection is None or self._leaving or self._under_way or self._inbox or self._ready or not scope.is_idle:
            return False
        commands = scope.commands
        queue: list[Call] = []
        ended: list[Call] = []
        while True:
            queue.clear()
            command = commands.make_one(call, ended)
            if command is None:
                return True
            if command.bulk or self._moves:
                via = self._routes.via(command) if self._routes is not None else self
                if via is not self:
                    self._hand_over(command, call, via)
                    return True
            # Checked each time, which takes half a microsecond, because it cannot be known whether a write to a dead
            # connection was applied.
            if connection.is_stale():
                self._drop_idle(connection)
                self._hand_over(command, call, self)
                return True
            command.address = connection.address
            self._led = command
            try:
                command.reply = connection.exchange(command.data)
            except Broken as error:
                self._forget(connection, error)
                command.error = self._lost(error)
            command.over = True
            if type(command.reply) is Refusal and command.reply.word in _NOT_BEGUN:
                self._led = None
                command.deadline = self._clock() + self._call_timeout_s
                self._hand_over(command, call, self)
                return True
            commands.settle(command, queue, ended)
            self._led = None
            if not call.done and not queue:
                arm(call)  # the call pauses
            if commands.pausing:
                self._schedule(scope)
            if call.done or not queue:
                return True

    def _hand_over(self, command: Command, call: Call, via: RedisConnectionOwner) -> None:
        """Pass a command that this caller cannot finish itself to the I/O threads."""
        arm(call)
        command.via = via
        command.scope.commands.command = command
        via.post(command)

    def _recover_led(self, scope: RedisScope, call: Call) -> None:
        commands = scope.commands
        led = self._led
        if led is not None:
            with suppress(ValueError):
                self._under_way.remove(led)  # that of a task may have got there
            if not led.over:
                # The reply may still arrive, and would be taken for that of another command.
                connection, self._connection = self._connection, None
                if connection is not None:
                    connection.close()
                self._unsent = b""
                led.error = self._lost(Broken("the caller was interrupted"))
                led.over = True
            commands.command = led
            self._inbox.append(led)
            self._led = None
        elif (command := commands.command) is not None:
            (command.via or self).post(command)  # a second copy is ignored
        for pause in dict.fromkeys(commands.paused.values()):
            self._push(pause.due, (scope, pause))

    def _queue(self, scope: RedisScope, call: Call) -> None:
        scope.enter(call)

    def _find_abandoned(self, scope: RedisScope, call: Call) -> None:
        self._inbox.append(scope)

    def _too_late(self, scope: RedisScope, timeout_s: float) -> ReplyTimeout:
        return ReplyTimeout(scope.scope, timeout_s)

    def _abort_attempt(self) -> None:
        thread = self._thread.get("thread")
        if thread is not None:
            abort_dial(thread)

    # ------------------------------------------------------------------------------------------------- what was posted

    def _sort_in(self, item: RedisScope | Command, now: float) -> None:
        if type(item) is not Command:
            if not item.listed and item.commands.command is None:  # `_list`, inlined
                item.listed = True
                item.since = now
                self._ready.append(item)
        elif item.over:
            if item.scope.owner is self:
                self._take(item)
        elif not item.begun:
            item.begun = True
            item.since = item.since or now
            self._ready.append(item)

    def _list(self, scope: RedisScope, now: float) -> None:
        """Put a scope on the list of those to ask for a command, unless it has a command in flight."""
        if not scope.listed and scope.commands.command is None:
            scope.listed = True
            scope.since = now
            self._ready.append(scope)

    def _resume(self, what: tuple[RedisScope, Pause] | Command, now: float) -> None:
        if type(what) is Command:
            self._pass_to(what.via or self, what)
        else:
            scope, pause = what
            scope.commands.resume(pause, scope.mailbox)
            self._list(scope, now)

    def _schedule(self, scope: RedisScope) -> None:
        """Schedule the end of the pauses that have begun."""
        pausing = scope.commands.pausing
        while pausing:
            pause = pausing[-1]
            self._push(pause.due, (scope, pause))
            pausing.pop()

    # -------------------------------------------------------------------------------------------- sending and receiving

    def _begin(self, item: RedisScope | Command, connection: Connection, now: float) -> bytes | None:
        command = item if type(item) is Command else self._next_of(item)
        if command is None:
            return None
        if not command.deadline:
            command.deadline = now + self._call_timeout_s
        command.address = connection.address
        self._round += len(command.calls)
        self._under_way.append(command)
        if command.prefix:
            command.skips = 1
            return command.prefix + command.data
        return command.data

    def _next_of(self, scope: RedisScope) -> Command | None:
        """Return the next command of a scope, if this connection sends it."""
        scope.listed = False
        command = scope.next_command(self, self.over)
        if command is not None:
            scope.commands.command = command
            if (command.bulk or self._moves) and self._routes is not None:
                command.since = scope.since
                via = self._routes.via(command)
                if via is not self:
                    self._pass_to(via, command)
                    return None
            command.begun = True
            command.via = self
        return command

    def _pass_to(self, via: RedisConnectionOwner, command: Command) -> None:
        command.via = via
        if via is self:
            command.begun = True
            command.since = command.since or self._clock()
            self._ready.append(command)
        else:
            via.post(command)

    def _take_answers(self, connection: Connection) -> None:
        under_way, next_reply = self._under_way, connection.next_reply
        while under_way:
            reply = next_reply()
            if reply is NOT_ALL:
                return
            command = under_way[0]
            if command.skips:
                command.skips -= 1
                continue
            under_way.popleft()
            command.reply = reply
            command.over = True
            if command.scope.owner is self:
                self._take(command)
            else:
                command.scope.owner.post(command)

    def _end(self, command: Command) -> None:
        """Pass a finished command to the owner of its scope."""
        command.over = True
        home = command.scope.owner
        if home is self:
            self._take(command)
        else:
            home.post(command)

    def _take(self, command: Command) -> None:
        """Handle a finished command of one of this owner's scopes, or send it again."""
        scope = command.scope
        commands = scope.commands
        if commands.command is not command:
            return  # a second copy
        if type(command.reply) is Refusal and not self._ended and self._sends_again(command, command.reply):
            return
        commands.command = None
        try:
            commands.settle(command, scope.mailbox, self.over)
        except Exception:
            self.log.exception("a scope failed to take in what Redis answered")
            error = StorageError("an error in this engine: whether it was applied is not known")
            commands.give_up([*command.calls, *command.again], error, self.over)
        if commands.pausing:
            self._schedule(scope)
        if scope.mailbox:
            self._list(scope, self._clock())

    # --------------------------------------------------------------------------------------------------------- refusals

    def _sends_again(self, command: Command, refusal: Refusal) -> bool:
        """Send a command again that the server has not begun. Returns False if the refusal is final."""
        word, now = refusal.word, self._clock()
        other, via, due = command.once_more(), command.via or self, now + AGAIN_S
        if word == "NOSCRIPT":
            other.data = pack(with_source(command.parts))
            due = now
        elif refusal is _ELSEWHERE and self._routes is not None:
            via, due = self._routes.via(other), now
        elif now >= command.deadline:
            return False
        elif self._routes is not None and self._moves and word in ("MOVED", "ASK"):
            # At once the first time, later with a pause: two servers may each redirect to the other for a while.
            due = due if command.not_before else now
            via = self._routes.redirect(other, refusal)
        elif self._fails_over and word in ("READONLY", "MASTERDOWN"):
            via.leave()
        elif word not in PASSING:
            return False
        other.via, other.not_before = via, due
        command.scope.commands.command = other
        if due > now:
            self._push(due, other)
        else:
            self._pass_to(via, other)
        return True

    def _refuse(self, item: RedisScope | Command, error: ScopestateError) -> None:
        if type(item) is Command:
            item.error = error
            self._end(item)
        else:
            scope = item
            scope.listed = False
            queue = scope.mailbox
            calls = queue[:]
            del queue[: len(calls)]
            scope.commands.give_up(calls, error, self.over)

    def _end_overdue(self, now: float) -> float | None:
        if not self._under_way:
            return None
        due = self._sent_at + self._call_timeout_s
        if due > now:
            return due
        # Replies come in order: if this one is missing, so are all later ones.
        self._lose(self._connection, Broken(f"no answer within {self._call_timeout_s:g} s"))
        return None

    # ----------------------------------------------------------------------------------------------------- event loops

    def call_for_task(self, scope: RedisScope, call: Call, waiter: LoopReply) -> None:
        """Do the call of a task on the main thread: its event loop waits for the reply itself if it is the only call.

        As a caller that leads, this does one call and no other, because a signal handler may raise here. So it is done
        only while nothing else is under way. A call that comes in the meantime is posted, and the I/O thread takes
        over. Raises the error that refuses the call.
        """
        try:
            if self._to_post:
                self._to_post -= 1
            elif self._under_way or self._inbox:
                self._to_post = _POSTED
            elif not self._claim and not self._wanted:  # else the I/O thread is just ending its work
                call.thread = get_ident()
                if self._claim.setdefault(HOLDER, call) is call:
                    led = self._lead_for_task(scope, call, waiter.loop)
                    self._give_back()
                    if led:
                        return
                    self._to_post = _POSTED
            scope.post(call)
        except Overloaded:
            raise
        except BaseException:
            certainly(partial(self._recover_call, scope, call, waiter))
            raise

    def _recover_call(self, scope: RedisScope, call: Call, waiter: LoopReply) -> None:
        """Recover from the interruption of a task that makes a call. May be repeated."""
        self._to_post = _POSTED
        watch = self._watch
        if watch is not None and watch.loop is waiter.loop:
            watch.stop()
        self._recover(scope, call)
        waiter.future.cancel()  # the task ends with what is being raised, and would leave any other error unread

    def _lead_for_task(self, scope: RedisScope, call: Call, loop: AbstractEventLoop) -> bool:
        connection = self._connection
        if connection is None or self._leaving or self._under_way or self._inbox or self._ready or not scope.is_idle:
            return False
        watch = self._watch_of(loop, self._drive_for_task)
        if watch is None:
            return False
        if connection.is_stale():
            self._drop_idle(connection)
            return False
        call.loop = loop
        self._send_led(scope, call, watch)
        return True

    def _send_led(self, scope: RedisScope, call: Call, watch: Watch) -> None:
        """Send the next command for the call of a task, whose event loop then waits for the reply."""
        commands, ended = scope.commands, list[Call]()
        command = commands.make_one(call, ended)
        if command is None:
            self._deliver([(call.reply_to, call.answer, call.error)])
            return
        if command.bulk or self._moves:
            via = self._routes.via(command) if self._routes is not None else self
            if command.bulk or via is not self:
                command.via = via
                commands.command = command
                via.post(command)
                return
        command.begun = True
        command.via = self
        command.address = watch.connection.address
        command.deadline = self._clock() + self._call_timeout_s
        self._led = command
        try:
            sent = watch.connection.send_now(command.data)
        except Broken as error:
            self._fail_led(command, error)
            return
        self._unsent = command.data[sent:]
        self._sent_at, self._round = self._clock(), 1
        commands.command = command
        self._under_way.append(command)
        self._led = None
        if self._unsent:
            self._ask()
        else:
            watch.start(AGAIN_S, self._check_led)

    def _drive_for_task(self, watch: Watch) -> None:
        """Receive the reply that a task waits for. On the main thread, when there is something to receive."""
        try:
            if watch is self._watch and self._claim.setdefault(HOLDER, watch) is watch:
                if not self._receive_for_task(watch):
                    watch.stop()
                    if self._under_way or self._ready:
                        self._ask()
                self._give_back()
            else:
                self._leave_to_holder(watch)
        except BaseException:
            certainly(partial(self._recover_task, watch))
            raise

    def _receive_for_task(self, watch: Watch) -> bool:
        """Receive the reply and tell the task. False: something else is under way too, so it is the I/O thread's."""
        under_way, connection = self._under_way, self._connection
        if connection is not watch.connection or len(under_way) != 1 or self._leaving or self._inbox or self._ready:
            return False
        command = under_way[0]
        scope, call = command.scope, command.calls[0]
        if call.loop is not watch.loop or scope.owner is not self or self._unsent:
            return False
        if not connection.readable():
            return True
        self._led = command
        try:
            connection.receive()
            reply = connection.next_reply()
        except Broken as error:
            under_way.clear()
            self._fail_led(command, error)
            return True
        if reply is NOT_ALL:
            self._led = None
            return True
        under_way.clear()
        command.reply = reply
        command.over = True
        if type(reply) is Refusal:
            self._inbox.append(command)
            self._led = None
            return True
        commands, queue, ended = scope.commands, list[Call](), list[Call]()
        commands.command = None
        commands.settle(command, queue, ended)
        if commands.pausing:
            self._schedule(scope)
        if call.done:
            self._deliver([(call.reply_to, call.answer, call.error)])
        elif queue and not call.is_abandoned:
            self._send_led(scope, call, watch)
        self._led = None
        if scope.mailbox:
            self._inbox.append(scope)
        return True

    def _fail_led(self, command: Command, error: Broken) -> None:
        """End a command whose connection was lost; the I/O thread tells its task."""
        connection = self._connection
        if connection is not None:
            self._forget(connection, error)
        command.error = self._lost(error)
        command.over = True
        command.scope.commands.command = command
        self._inbox.append(command)
        self._led = None

    def _check_led(self, watch: Watch) -> None:
        """Leave a reply that takes long to the I/O thread, which knows the time limits."""
        try:
            if watch is self._watch and self._under_way:
                if self._clock() - self._sent_at < AGAIN_S:
                    watch.check_later(AGAIN_S, self._check_led)
                else:
                    watch.stop()
                    self._ask()
        except BaseException:
            certainly(partial(self._recover_task, watch))
            raise

    def _recover_task(self, watch: Watch) -> None:
        """Leave what was interrupted on the event loop to the I/O thread. May be repeated."""
        if self._claim.get(HOLDER) is watch:
            led: Command | None = self._led
            if led is not None:
                self._recover_received(led)
            self._claim.pop(HOLDER, None)
        watch.stop()
        self._ask()

    def _recover_received(self, led: Command) -> None:
        scope, call = led.scope, led.calls[0]
        command = scope.commands.command
        if led.over and command is not None and command is not led:  # the next command of the call: another owner's
            (command.via or self).post(command)  # a second copy is ignored
            self._led = None
            return
        if led.over and command is None:  # `settle` has begun; if it were called again, an update might be done twice
            lost = self._lost(Broken("the event loop was interrupted"))
            scope.commands.give_up([call], lost, self.over)
            call.gave_up = True  # it may also wait in a pause
        if call.done and call not in self.over:
            self.over.append(call)  # its task may not have been told; a reply that was told already is left as it is
        self._recover_led(scope, call)

    def _may_drive(self, watch: Watch) -> bool:
        return not any(type(item) is Command for item in list(self._inbox)) and super()._may_drive(watch)

    def _is_of_loop(self, loop: AbstractEventLoop) -> bool:
        return all(call.loop is loop for sent in self._under_way for call in sent.calls)

    # ------------------------------------------------------------------------------------------------------ connections

    def _pass_on(self) -> None:
        """Called without a connection: pass what is ready to the servers that have the keys by now; the rest waits."""
        routes = self._routes
        if routes is None or not self._moves:
            return
        waiting = list(self._ready)
        self._ready.clear()
        for item in waiting:
            if type(item) is Command:
                if routes.via(item) is self:
                    self._ready.append(item)
                else:
                    item.reply = _ELSEWHERE
                    self._end(item)
            else:
                scope = item
                if routes.owner_of(scope.commands.hash_key) is self:
                    self._ready.append(scope)
                elif (command := self._next_of(scope)) is not None:
                    self._ready.append(command)

    def _fail_under_way(self, error: Broken) -> None:
        lost = self._lost(error)
        while self._under_way:
            command = self._under_way.popleft()
            command.error = lost
            self._end(command)

    def _lost(self, error: Broken) -> ConnectionLost:
        lost = ConnectionLost("a call", f"Redis at {self._target.address}", str(error))
        lost.__cause__ = error
        return lost
