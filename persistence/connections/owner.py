"""The connection owner: which thread drives a connection, and when.

The holder of its one claim does the work of `Pump`. A caller that finds the connection owner idle *leads*: it does its
own call on its own thread, and no other. Every other caller posts its call to the inbox and wakes the I/O thread, which
then pumps for all of them. An event loop drives the connection on its own thread if it can.

The hand-over rule: a poster appends to the inbox, then reads the claim; the holder gives the claim back, then reads the
inbox. So one of the two sees the other. `tests/redis/test_owner_model.py` checks every order of these steps.

If answers may take long (`prompt` is False), no thread keeps the claim while it waits for one: a caller that leads
leaves its call to the I/O thread, which sleeps in such a way that both an answer and a request of another thread wake
it. A request is a token, and a byte for the bell if the thread does not wait for tokens: a poster puts the token, then
reads what the thread waits for; the thread records what it waits for, then reads the tokens.
"""

from __future__ import annotations

import _thread
import functools
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, cast

from scopestate.actors.turn import BUSY
from scopestate.errors import EngineClosed, NotConnected, ScopestateError
from scopestate.inbox import Empty, Inbox
from scopestate.persistence.connections.calls import Call
from scopestate.persistence.connections.connection import Broken, PatientConnection, T_Connection, Target
from scopestate.persistence.connections.pump import AGAIN_S, Means, Pump, T_Call, T_Item, TimeLimits
from scopestate.persistence.connections.watch import Watch
from scopestate.signals import certainly, join, wait_for

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

HOLDER: Final = "holder"
"""The one key of a claim."""
_FEW: Final = 2
"""An event loop sends at once if at most this many calls were sent together last time; else it waits for other
tasks."""
_CLOSED: Final = "the engine is closed"


class _Holder:
    """The holder of a claim that is not a call."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = get_ident()


class Bell:
    """Wakes a thread that waits for a socket. From any thread, except `silence`."""

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._there.setblocking(False)
        self.fd: int = self._here.fileno()
        """A descriptor that is readable once `ring` was called."""

    def ring(self) -> None:
        """Wake the thread, now or when it begins to wait."""
        with suppress(OSError):  # it was rung many times, or closed
            self._there.send(b"\0")

    def silence(self) -> None:
        """Forget the calls of `ring` so far."""
        with suppress(OSError):
            self._here.recv(4096)

    def close(self) -> None:
        """Close it. Idempotent."""
        self._here.close()
        self._there.close()


class ConnectionOwner(Pump[T_Item, T_Call, T_Connection]):
    """Drives one connection. From any thread; only `call`, `connect` and `close` block."""

    def __init__(
        self,
        target: Target[T_Connection],
        limits: TimeLimits,
        means: Means,
        backoff_s: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(target, limits, means, backoff_s)
        self._wake = means.wake
        self._claim: dict[str, Call | Watch | _Holder] = {}
        self._tokens: Inbox[None] = Inbox()
        """Tokens that wake the I/O thread. An extra one does no harm."""
        self._bell: Bell | None = None
        self._at_socket = False
        """True while the I/O thread waits for the connection and the bell, not for tokens alone."""
        self._wanted = False
        """True while the I/O thread is about to take the claim: otherwise a running caller would win each time."""
        self._led: Any = None
        """What the leading caller has sent, until it has received the answer."""
        self._watch: Watch | None = None
        self._thread: dict[str, threading.Thread] = {}
        self._begun = False

    def connect(self) -> None:
        """Connect now, on this thread. Raises NotConnected. For the start, when nothing else uses the owner yet."""
        self._connection = self._attempts.connect()

    def try_now(self) -> None:
        """If there is no connection, try to connect now instead of after the pause that follows a failure."""
        self._attempts.hasten()
        self._ask()

    def load(self) -> int:
        """Return approximately how much it has to do: 0 if nothing."""
        return len(self._under_way) + len(self._inbox) + len(self._ready) + len(self._claim)

    def is_held_here(self) -> bool:
        """True if this thread holds the claim: then the current code has interrupted it."""
        holder = self._claim.get(HOLDER)
        return holder is not None and holder.thread == get_ident()

    def passivate(self, leave: Callable[[], bool]) -> bool:
        """Call `leave()` with the claim held; BUSY if it is taken."""
        me = _Holder()
        if self._claim.setdefault(HOLDER, me) is not me:
            return BUSY  # type: ignore[no-any-return]
        try:
            return leave()
        finally:
            self._give_back()

    # ---------------------------------------------------------------------------------------------------------- callers

    @abstractmethod
    def _lead(self, home: Any, call: T_Call) -> bool:
        """Do a call here.

        False: it must be queued; if `call.lock` is set, it was left to the I/O thread. Only if there is a connection,
        and no call is in progress or waits.
        """

    @abstractmethod
    def _recover_led(self, home: Any, call: T_Call) -> None:
        """Leave the call of an interrupted leading caller to the I/O thread, or end it. May be repeated."""

    @abstractmethod
    def _queue(self, home: Any, call: T_Call) -> None:
        """Queue a call for the next holder, and `post`. Raises the error that refuses it."""

    @abstractmethod
    def _find_abandoned(self, home: Any, call: T_Call) -> None:
        """Make the holder see that the call of an interrupted caller, which does not lead, needs no answer.

        May be repeated.
        """

    @abstractmethod
    def _too_late(self, home: Any, timeout_s: float) -> Exception:
        """Return the error for a caller whose time is over."""

    def call(self, home: Any, call: T_Call, timeout_s: float | None) -> None:
        """Do a call, and wait until it has ended.

        Raises ReplyTimeout, and the error that refuses the call. `home`: what the call belongs to, such as its scope.
        """
        claim = self._claim
        lock: Any = None
        try:
            led = False
            # A caller whose timeout is shorter than the connection's must not drive it, if it would wait that long.
            may_wait = timeout_s is None or timeout_s >= self._call_timeout_s or not self.prompt
            if not claim and not self._wanted and not self._under_way and may_wait:
                call.thread = get_ident()
                if claim.setdefault(HOLDER, call) is call:
                    led = self._lead(home, call)
                    self._give_back()
            if not led:
                lock = arm(call)
                self._queue(home, call)
            else:
                lock = call.lock
            if lock is None or wait_for(lambda slice_s: lock.acquire(timeout=slice_s), timeout_s):
                return
        except BaseException:
            certainly(functools.partial(self._recover, home, call))
            raise
        call.gave_up = True
        raise self._too_late(home, timeout_s or 0.0)

    def _recover(self, home: Any, call: T_Call) -> None:
        """Recover from the interruption of a caller, wherever it was. May be repeated."""
        call.gave_up = True
        if self._claim.get(HOLDER) is call:  # not the claim of a call that this one has interrupted
            self._recover_led(home, call)
            self._claim.pop(HOLDER, None)
        else:
            self._find_abandoned(home, call)
        self._ask()

    def _leave_to_thread(self, call: T_Call) -> None:
        """Let the I/O thread wait for the answer, and this caller for its call. With the caller's claim held."""
        arm(call)
        self._is_news = True

    # ----------------------------------------------------------------------------------------------- the hand-over rule

    def post(self, item: T_Item) -> None:
        """Pass an item to the I/O thread. Never blocks."""
        self._inbox.append(item)
        if not self._claim and not self._wanted and (not self._begun or self._ended or self._tokens.empty()):
            self._ask()

    def _give_back(self) -> None:
        """Give the claim back, then check what was posted in the meantime: the holder's half of the hand-over rule."""
        self._claim.pop(HOLDER, None)
        if self._inbox or self._wanted or self._is_news:
            self._ask()

    def _ask(self) -> None:
        """Wake the I/O thread."""
        self._tokens.put(None)  # one C call, which a signal cannot interrupt
        if self._at_socket and self._bell is not None:
            self._bell.ring()
        if self._ended:
            self._refuse_late(EngineClosed(_CLOSED))
        elif self._wake is not None:
            self._wake(self)
        elif not self._begun:
            self._start()

    # ------------------------------------------------------------------------------------------------------ event loops

    def post_on_loop(self, item: T_Item, loop: AbstractEventLoop) -> None:
        """As `post`, on the thread of an event loop, which is not the main thread: it drives the connection if it can.

        Not on the main thread, where a signal handler could interrupt it in the middle of other callers' calls.
        """
        watch = self._watch_of(loop, self._drive)
        if watch is None:
            self.post(item)
            return
        self._inbox.append(item)
        if self._claim or self._wanted:
            return  # the holder finds it
        if not self._tokens.empty() or (self._under_way and not watch.active):
            self._ask()  # the I/O thread has work in any case
        elif self._round > _FEW:
            watch.call_soon(self._drive)  # so that the calls of tasks that run in this round of the loop are included
        else:
            self._drive(watch)

    def _watch_of(self, loop: AbstractEventLoop, drive: Callable[[Watch], None]) -> Watch | None:
        """Return the watch that lets this loop wait for the connection; None if it cannot now.

        `drive(watch)` is called when there is something to receive.
        """
        watch, connection = self._watch, self._connection
        if watch is not None and watch.connection is connection and watch.loop is loop and watch.thread == get_ident():
            return watch
        if connection is None or self._under_way or self._wake is not None:
            return None
        fd = connection.plain_fd()
        if fd is None:
            return None
        try:
            watch = Watch(loop, connection, fd, drive)
        except OSError:  # another thread, which has the claim, has just closed it
            return None
        if connection is not self._connection:
            watch.end()
            return None
        before, self._watch = self._watch, watch
        if before is not None:
            before.end()
        return watch if self._watch is watch else None  # another loop may have come in between

    def _may_drive(self, watch: Watch) -> bool:
        """True if an event loop can do all waiting work without blocking. Protocols may add conditions."""
        connection = self._connection
        return (
            connection is not None
            and connection is watch.connection
            and not self._leaving
            and not self._unsent
            and bool(self._under_way or self._is_usable(connection))
        )

    def _drive(self, watch: Watch) -> None:
        """Do what can be done without waiting; the loop calls this again when answers are there."""
        if watch is not self._watch or self._claim.setdefault(HOLDER, watch) is not watch:
            self._leave_to_holder(watch)
            return
        try:
            if not self._may_drive(watch):
                watch.stop()
                self._ask()  # it would block, so it is left to the I/O thread
                return
            self._pump_safely(waits=False, dials=False)
            if self._under_way:
                # Only for calls of its own tasks: the loop may end while other callers still wait for their answers.
                if watch is self._watch and self._is_of_loop(watch.loop):
                    watch.start(self._call_timeout_s, self._check_age)
                else:
                    watch.stop()
                    self._ask()
            elif self._ready:
                self._ask()
        finally:
            self._give_back()

    def _leave_to_holder(self, watch: Watch) -> None:
        """Let the holder of the claim take the answers; or the I/O thread, if the holder may not."""
        watch.stop()
        if self._under_way:
            self._ask()

    def _check_age(self, watch: Watch) -> None:
        """End overdue calls: the event loop's part of enforcing time limits, which the I/O thread does otherwise."""
        if watch is self._watch and self._claim.setdefault(HOLDER, watch) is watch:
            try:
                now, connection = self._clock(), self._connection
                if self._under_way and connection is not None and connection.readable():
                    watch.check_later(AGAIN_S, self._check_age)  # as `_is_late`: the answer may have come in time
                    return
                self._overdue_at = due = self._end_overdue(now)
                self._hand_out()
                if due is not None:
                    watch.check_later(max(0.0, due - now), self._check_age)
                if self._ready:
                    self._ask()
            finally:
                self._give_back()

    # --------------------------------------------------------------------------------------------------- the I/O thread

    def _start(self) -> None:
        try:
            # One C call, as in `actors.dispatcher.start_thread`: a signal cannot interrupt it.
            _thread.start_new_thread(self._begin_thread, ())
            self._begun = True
        except RuntimeError as error:
            text = f"no thread for the connection to {self.peer} at {self._target.address}: {error}; nothing was sent"
            self._refuse_late(NotConnected(text))  # the next call tries again

    def _begin_thread(self) -> None:
        thread = threading.Thread(target=self.run, name=self.thread_name, daemon=True)
        if self._thread.setdefault("thread", thread) is not thread:
            return
        while not self._ended:
            try:
                thread.start()
            except RuntimeError as error:
                self.log.error(  # noqa: TRY400 - a traceback would add nothing
                    "no thread for the connection to %s at %s: %s", self.peer, self._target.address, error
                )
                time.sleep(AGAIN_S)
            else:
                return
        del self._thread["thread"]

    def run(self) -> None:
        """Pump whenever there is something to do, until `end`."""
        if not self.prompt:
            self._bell = Bell()
        me = _Holder()
        taken = False
        while not self._ended:
            # While the claim is taken, its holder wakes this thread when it gives it back.
            self._sleep(None if taken else self.due_in(), taken=taken)
            self._wanted = True
            taken = self._claim.setdefault(HOLDER, me) is not me
            if taken:
                continue
            self._wanted = False
            try:
                self._pump_safely(waits=True, dials=True)
            finally:
                self._is_news = False  # this thread checks it anyway
                self._give_back()
        # Items that were posted meanwhile were left to this thread, which will not take the claim any more.
        self._wanted = False
        if self._inbox:
            self._ask()

    def _sleep(self, wait_s: float | None, *, taken: bool) -> None:
        """Wait for a token, and also for an answer if one may come for which no other thread waits."""
        connection, bell = self._connection, self._bell
        if bell is None or connection is None or taken or not self._under_way:
            with suppress(Empty):
                self._tokens.get_within(wait_s)
            return
        self._at_socket = True
        if self._tokens.empty():
            cast("PatientConnection", connection).wait(wait_s, bell.fd)
        self._at_socket = False
        bell.silence()
        with suppress(Empty):
            self._tokens.get_nowait()

    def step(self) -> float | None:
        """Do the work that needs no wait for an answer. Returns `due_in`. For an owner without an I/O thread."""
        me = _Holder()
        if self._claim.setdefault(HOLDER, me) is me:
            try:
                self._pump_safely(waits=False, dials=True)
            finally:
                self._give_back()
        return self.due_in()

    # ---------------------------------------------------------------------------------------------------------- the end

    def end(self) -> None:
        """Accept nothing new, and let no thread wait for an answer any longer; `close` waits for these threads."""
        self._ended = True
        self._abort_attempt()
        if (connection := self._connection) is not None:
            connection.shut()

    @abstractmethod
    def _abort_attempt(self) -> None:
        """End the attempt to connect that is in progress, if there is one. From any thread."""

    def close(self) -> None:
        """End the connection; calls that still wait are refused. Idempotent."""
        self.end()
        while (thread := self._thread.get("thread")) is not None:
            self._tokens.put(None)
            if (bell := self._bell) is not None:
                bell.ring()
            try:
                while not join(thread, AGAIN_S):
                    self._abort_attempt()  # it may just have begun
                break
            except RuntimeError:
                time.sleep(0.001)  # it is about to be started or abandoned
        self._refuse_late(EngineClosed(_CLOSED), patient=True)
        if (connection := self._connection) is not None:
            connection.close()
        if (watch := self._watch) is not None:
            watch.end()
        if (bell := self._bell) is not None:
            bell.close()

    def _refuse_late(self, error: ScopestateError, *, patient: bool = False) -> None:
        """Refuse everything that waits, unless the claim is taken: then its holder does that.

        `patient`: wait for the claim, and also end the calls in progress.
        """
        me = _Holder()
        while self._claim.setdefault(HOLDER, me) is not me:
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
                for _, _, what in later if self._ended else ():
                    self._resume(what, 0.0)
                if not self._ended:
                    self._later = later
                self._refuse_waiting(error, float("-inf"))
            self._hand_out()
        finally:
            self._claim.pop(HOLDER, None)
        if self._inbox:
            self._refuse_late(error, patient=patient)


def arm(call: Call) -> Any:
    """Give a call the lock that its caller waits for."""
    lock = threading.Lock()
    lock.acquire()
    call.lock = lock
    return lock
