"""The owner of one connection: which thread drives it, and when.

The holder of its one claim does what `Pump` says. A caller that finds the owner idle leads: it does its own call on its
own thread, and no other. Every other caller puts its call into the mailbox of its scope, the scope into the owner's
inbox, and asks the I/O thread, which then pumps for all of them. An event loop drives on its own thread if it can.

The hand-over rule: a poster appends to the inbox, then reads the claim; the holder gives the claim back, then reads the
inbox. So one of the two sees the other. `tests/redis/test_owner_model.py` goes through every order.
"""

from __future__ import annotations

import _thread
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.turn import BUSY
from scopestate.errors import EngineClosed, NotConnected, ReplyTimeout, ScopestateError
from scopestate.inbox import Empty, Inbox
from scopestate.persistence.redis.calls import Call, Command
from scopestate.persistence.redis.connection import Broken, Connection, Refusal, Target
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.pump import AGAIN_S, NOT_BEGUN, Means, Pump, Routes
from scopestate.signals import certainly, join, wait_for

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from scopestate.persistence.redis.scope import RedisScope

log = logging.getLogger("scopestate.persistence.redis")

_HOLDER: Final = "holder"
_FEW: Final = 2
"""An event loop sends at once if so few calls went together the last time; else those of other tasks go along."""
_CLOSED: Final = "the engine is closed"


class _Holder:
    """What holds a claim, if that is not a call."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = get_ident()


class Watch:
    """An event loop that waits for the replies of a connection itself. On the loop's thread, but for `end`.

    It has a file descriptor of its own for the connection's socket, so that any thread may close the connection while
    the loop still knows it: the system may give the number of a closed one to another socket at once.
    """

    def __init__(
        self, loop: AbstractEventLoop, connection: Connection, fd: int, drive: Callable[[Watch], None]
    ) -> None:
        """`drive(watch)` is called when there is something to receive."""
        self.loop = loop
        self.connection = connection
        self.thread = get_ident()
        """For the claim."""
        self.active = False
        """True while the loop waits for the connection."""
        self._drive = drive
        self._fd = os.dup(fd)
        self._is_soon = False
        self._checks = False

    def start(self, timeout_s: float, check: Callable[[Watch], None]) -> None:
        """Have the loop wait for replies, and call `check(watch)` in `timeout_s` seconds."""
        if not self.active and self._fd >= 0:
            self.loop.add_reader(self._fd, self._drive, self)
            self.active = True
        if not self._checks:
            self.check_later(timeout_s, check)

    def stop(self) -> None:
        """Let the loop wait no longer."""
        if self.active:
            self.active = False
            self.loop.remove_reader(self._fd)

    def call_soon(self, drive: Callable[[Watch], None]) -> None:
        """Call `drive(watch)` in the next round of the loop."""
        if not self._is_soon:
            self._is_soon = True
            self.loop.call_soon(self._now, drive)

    def check_later(self, timeout_s: float, check: Callable[[Watch], None]) -> None:
        """Call `check(watch)` in `timeout_s` seconds: one timer, not one for each command."""
        self._checks = True
        self.loop.call_later(timeout_s, self._check, check)

    def end(self) -> None:
        """Let go of the connection. From any thread; idempotent."""
        if get_ident() == self.thread:
            self._close()
            return
        try:
            self.loop.call_soon_threadsafe(self._close)
        except RuntimeError:
            self._close()  # the loop was closed, and knows no descriptor any more

    def __del__(self) -> None:
        """The loop has ended before it could let go."""
        if self._fd >= 0:
            os.close(self._fd)

    def _now(self, drive: Callable[[Watch], None]) -> None:
        self._is_soon = False
        drive(self)

    def _check(self, check: Callable[[Watch], None]) -> None:
        self._checks = False
        check(self)

    def _close(self) -> None:
        if self._fd >= 0:
            if not self.loop.is_closed():
                self.stop()
            fd, self._fd = self._fd, -1
            os.close(fd)


class Owner(Pump):
    """Drives one connection. From any thread; only `call`, `connect` and `close` block."""

    def __init__(
        self,
        target: Target,
        options: RedisOptions,
        means: Means,
        routes: Routes | None = None,
        *,
        fails_over: bool = False,
    ) -> None:
        super().__init__(target, options, means, routes, fails_over=fails_over)
        self._wake = means.wake
        self._claim: dict[str, Call | Watch | _Holder] = {}
        self._tokens: Inbox[None] = Inbox()
        """What wakes the I/O thread. One too many does no harm."""
        self._wanted = False
        """True while the I/O thread is about to take the claim: a caller that runs already would win each time."""
        self._led: Command | None = None  # what the caller that leads has sent, until it has taken the reply in
        self._watch: Watch | None = None
        self._thread: dict[str, threading.Thread] = {}
        self._begun = False

    def connect(self) -> None:
        """Connect now, on this thread. Raises NotConnected. For the start: nothing else uses the owner yet."""
        self._connection = self._attempts.connect()

    def load(self) -> int:
        """About how much it has to do: 0 if nothing."""
        return len(self._under_way) + len(self._inbox) + len(self._ready) + len(self._claim)

    def is_held_here(self) -> bool:
        """True if this thread holds the claim: then this code has interrupted it."""
        holder = self._claim.get(_HOLDER)
        return holder is not None and holder.thread == get_ident()

    def leads_for(self, scope: RedisScope) -> bool:
        """True while a caller does a call of this scope on its own thread."""
        led = self._led
        return led is not None and led.scope is scope

    def passivate(self, leave: Callable[[], bool]) -> bool:
        """Call `leave()` within the claim; BUSY if that is taken."""
        me = _Holder()
        if self._claim.setdefault(_HOLDER, me) is not me:
            return BUSY  # type: ignore[no-any-return]
        try:
            return leave()
        finally:
            self._give_back()

    # ---------------------------------------------------------------------------------------------------------- callers

    def call(self, scope: RedisScope, call: Call, timeout_s: float | None) -> None:
        """Have a call done, and wait until it has ended. Raises ReplyTimeout, and what the scope refuses it with."""
        claim = self._claim
        lock: Any = None
        try:
            led = False
            # A caller whose timeout is shorter than the connection's must not drive it.
            if not claim and not self._wanted and (timeout_s is None or timeout_s >= self._call_timeout_s):
                call.thread = get_ident()
                if claim.setdefault(_HOLDER, call) is call:
                    led = self._lead(scope, call)
                    self._give_back()
            if not led:
                lock = _arm(call)
                scope.enter(call)
            else:
                lock = call.lock
            if lock is None or wait_for(lambda slice_s: lock.acquire(timeout=slice_s), timeout_s):
                return
        except BaseException:
            certainly(functools.partial(self._recover, scope, call))
            raise
        call.gave_up = True
        raise ReplyTimeout(scope.scope, timeout_s or 0.0)

    def _lead(self, scope: RedisScope, call: Call) -> bool:
        """Do a call here. False: it must be queued. With `call.lock` set, it has gone to the I/O thread on the way."""
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
            # Looked at each time, for half a microsecond: whether a write that went into a dead connection was applied
            # cannot be known.
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
            if type(command.reply) is Refusal and command.reply.word in NOT_BEGUN:
                self._led = None
                command.deadline = self._clock() + self._call_timeout_s
                self._hand_over(command, call, self)
                return True
            commands.settle(command, queue, ended)
            self._led = None
            if not call.done and not queue:
                _arm(call)  # it pauses
            if commands.pausing:
                self._schedule(scope)
            if call.done or not queue:
                return True

    def _hand_over(self, command: Command, call: Call, via: Pump) -> None:
        """Leave a command that this caller cannot end itself to the I/O threads."""
        _arm(call)
        command.via = via
        command.scope.commands.command = command
        via.post(command)

    def _recover(self, scope: RedisScope, call: Call) -> None:
        """A caller was cut short, wherever it was. May be repeated."""
        call.gave_up = True
        if self._claim.get(_HOLDER) is call:  # not that of a call which this one has interrupted
            commands = scope.commands
            led = self._led
            if led is not None:
                if not led.over:
                    # Its reply may still come, and would be taken for another's.
                    connection, self._connection = self._connection, None
                    if connection is not None:
                        connection.close()
                    led.error = self._lost(Broken("the caller was interrupted"))
                    led.over = True
                commands.command = led
                self._inbox.append(led)
                self._led = None
            elif (command := commands.command) is not None:
                (command.via or self).post(command)  # a second copy counts for nothing
            for pause in dict.fromkeys(commands.paused.values()):
                self._push(pause.due, scope, pause)
            self._claim.pop(_HOLDER, None)
        else:
            self._inbox.append(scope)
        self._ask()

    # ----------------------------------------------------------------------------------------------- the hand-over rule

    def post(self, item: RedisScope | Command) -> None:
        """Have a scope's mailbox looked at, or a command sent or taken in, on the I/O thread. Never blocks."""
        self._inbox.append(item)
        if not self._claim and not self._wanted and (not self._begun or self._ended or self._tokens.empty()):
            self._ask()

    def _give_back(self) -> None:
        """The hand-over rule, the holder's half: first the claim, then what was posted meanwhile."""
        self._claim.pop(_HOLDER, None)
        if self._inbox or self._wanted or self._is_news:
            self._ask()

    def _ask(self) -> None:
        """Wake the I/O thread."""
        self._tokens.put(None)  # one C call, which a signal cannot cut in two
        if self._ended:
            self._refuse_late(EngineClosed(_CLOSED))
        elif self._wake is not None:
            self._wake(self)
        elif not self._begun:
            self._start()

    # ------------------------------------------------------------------------------------------------------ event loops

    def post_on_loop(self, scope: RedisScope, loop: AbstractEventLoop) -> None:
        """As `post`, on the thread of an event loop, which is not the main thread: it drives the connection if it can.

        Not on the main thread, where a signal handler could cut it short in the middle of other callers' calls.
        """
        watch = self._watch
        if watch is None or watch.loop is not loop or watch.connection is not self._connection:
            watch = self._new_watch(loop)
            if watch is None:
                self.post(scope)
                return
        self._inbox.append(scope)
        if self._claim or self._wanted:
            return  # the holder finds it
        if not self._tokens.empty() or (self._under_way and not watch.active):
            self._ask()  # the I/O thread has work in any case
        elif self._round > _FEW:
            watch.call_soon(self._drive)  # so that tasks that go on in this round of the loop go along
        else:
            self._drive(watch)

    def _new_watch(self, loop: AbstractEventLoop) -> Watch | None:
        """Return what lets this loop wait for the connection; None if it cannot now."""
        connection = self._connection
        if connection is None or self._under_way or self._wake is not None:
            return None
        fd = connection.plain_fd()
        if fd is None:
            return None
        before, self._watch = self._watch, Watch(loop, connection, fd, self._drive)
        if before is not None:
            before.end()
        return self._watch

    def _drive(self, watch: Watch) -> None:
        """Do what can be done without waiting; the loop calls this again when replies are there."""
        if watch is not self._watch or self._claim.setdefault(_HOLDER, watch) is not watch:
            watch.stop()
            if self._under_way:
                self._ask()  # the holder may be one that takes no replies, and then the I/O thread does
            return
        try:
            connection = self._connection
            if (
                connection is not watch.connection
                or self._leaving
                or self._unsent
                or any(type(item) is Command for item in list(self._inbox))
                or not (self._under_way or self._is_usable(connection))
            ):
                watch.stop()
                self._ask()  # not without waiting: for the I/O thread
                return
            self._pump_safely(waits=False, dials=False)
            if self._under_way:
                # For calls of its own tasks alone: the loop may end while other callers still wait for theirs.
                if watch is self._watch and all(
                    call.loop is watch.loop for sent in self._under_way for call in sent.calls
                ):
                    watch.start(self._call_timeout_s, self._check_age)
                else:
                    watch.stop()
                    self._ask()
            elif self._ready:
                self._ask()
        finally:
            self._give_back()

    def _check_age(self, watch: Watch) -> None:
        """Give the connection up if the server has not answered in time: the loop's part of a socket's timeout."""
        if watch is self._watch and self._claim.setdefault(_HOLDER, watch) is watch:
            try:
                if self._under_way and self._clock() - self._sent_at >= self._call_timeout_s:
                    self._lose(self._connection, Broken(f"no answer within {self._call_timeout_s:g} s"))
                    self._hand_out()
                elif self._under_way:
                    watch.check_later(self._call_timeout_s, self._check_age)
            finally:
                self._give_back()

    # --------------------------------------------------------------------------------------------------- the I/O thread

    def _start(self) -> None:
        try:
            # One C call, as in `actors.dispatcher.start_thread`: a signal cannot cut it in two.
            _thread.start_new_thread(self._begin, ())
            self._begun = True
        except RuntimeError as error:
            text = f"no thread for the connection to Redis at {self._target.address}: {error}; nothing was sent"
            self._refuse_late(NotConnected(text))  # the next call tries again

    def _begin(self) -> None:
        thread = threading.Thread(target=self.run, name="scopestate-redis", daemon=True)
        if self._thread.setdefault("thread", thread) is not thread:
            return
        while not self._ended:
            try:
                thread.start()
            except RuntimeError as error:
                log.error("no thread for the connection to Redis at %s: %s", self._target.address, error)  # noqa: TRY400
                time.sleep(AGAIN_S)
            else:
                return
        del self._thread["thread"]

    def run(self) -> None:
        """Pump whenever there is something to do, until `end`."""
        me = _Holder()
        taken = False
        while not self._ended:
            with suppress(Empty):
                # While the claim is taken, its holder wakes this thread when it gives it back.
                self._tokens.get_within(None if taken else self.due_in())
            self._wanted = True
            taken = self._claim.setdefault(_HOLDER, me) is not me
            if taken:
                continue
            self._wanted = False
            try:
                self._pump_safely(waits=True, dials=True)
            finally:
                self._give_back()

    def step(self) -> float | None:
        """Do what can be done without waiting for the server. Returns `due_in`. For an owner without an I/O thread."""
        me = _Holder()
        if self._claim.setdefault(_HOLDER, me) is me:
            try:
                self._pump_safely(waits=False, dials=True)
            finally:
                self._give_back()
        return self.due_in()

    # ---------------------------------------------------------------------------------------------------------- the end

    def end(self) -> None:
        """Take nothing new, and let no thread wait for the server any longer; `close` waits for them."""
        self._ended = True
        if (connection := self._connection) is not None:
            connection.shut()

    def close(self) -> None:
        """End the connection; calls that still wait are refused. Idempotent."""
        self.end()
        while (thread := self._thread.get("thread")) is not None:
            self._tokens.put(None)
            try:
                join(thread)
                break
            except RuntimeError:
                time.sleep(0.001)  # it is about to be started, or to be given up
        self._refuse_late(EngineClosed(_CLOSED), patient=True)
        if (connection := self._connection) is not None:
            connection.close()
        if (watch := self._watch) is not None:
            watch.end()

    def _refuse_late(self, error: ScopestateError, *, patient: bool = False) -> None:
        """Refuse everything that is here, unless the claim is taken: its holder does that then.

        `patient`: wait for the claim, and end what is under way as well.
        """
        me = _Holder()
        while self._claim.setdefault(_HOLDER, me) is not me:
            if not patient:
                self._tokens.put(None)
                return
            time.sleep(0.001)
        try:
            if patient:
                self._fail_under_way(Broken("the engine was closed"))
            while self._inbox or self._ready or (self._later and self._ended):
                self._collect()
                later, self._later = self._later, []
                for _, _, scope, item in later if self._ended else ():
                    self._resume(scope, item, 0.0)
                if not self._ended:
                    self._later = later
                self._refuse_waiting(error, float("-inf"))
            self._hand_out()
        finally:
            self._claim.pop(_HOLDER, None)
        if self._inbox:
            self._refuse_late(error, patient=patient)


def _arm(call: Call) -> Any:
    """Give a call the lock that its caller waits for."""
    lock = threading.Lock()
    lock.acquire()
    call.lock = lock
    return lock
