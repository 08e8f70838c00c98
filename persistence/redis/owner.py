"""The owner of one connection: whatever happens to it, and to the scopes whose commands go by it, happens here.

The holder of its one claim makes commands, sends, takes replies in and gives calls their answers. A caller that finds
the owner idle leads: it does its own call on its own thread, and no other. Every other caller puts its call into the
mailbox of its scope, the scope into the owner's inbox, and asks the I/O thread, which then pumps for all of them.

The hand-over rule: a poster appends to the inbox, then reads the claim; the holder gives the claim back, then reads the
inbox. So one of the two sees the other. `tests/redis/test_owner_model.py` goes through every order.
"""

from __future__ import annotations

import _thread
import functools
import heapq
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Protocol

from scopestate.actors.turn import BUSY
from scopestate.errors import ConnectionLost, EngineClosed, NotConnected, ReplyTimeout, ScopestateError, StorageError
from scopestate.inbox import Empty, Inbox
from scopestate.persistence.redis.commands import Call, Command, Pause
from scopestate.persistence.redis.connection import NOT_ALL, PASSING, Broken, Connection, Refusal, Target, pack
from scopestate.persistence.redis.dialling import Attempts
from scopestate.persistence.redis.script import with_source
from scopestate.persistence.redis.watching import Watch
from scopestate.signals import certainly, join, wait_for

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from scopestate.persistence.redis.scope import RedisScope

log = logging.getLogger("scopestate.persistence.redis")

_HOLDER: Final = "holder"
_AGAIN_S: Final = 0.05
"""Pause before a command that the server could not take just now is sent again."""
_ROUND_BYTES: Final = 1 << 20
"""What is sent in one piece before replies are read."""
_FITS: Final = 1 << 14
"""Bytes that a socket takes in without waiting. Answers do not wait for more than that to be sent."""
_FEW: Final = 2
"""An event loop sends at once if so few calls went together the last time; else those of other tasks go along."""
_MANY: Final = 48
"""Fewer than these go together in any case: two commands instead of one cost more than the wait."""
_PACE_S: Final = 5e-6
"""Approximate time between a caller's answer and its next call."""
_WORK_S: Final = 3e-6
"""Approximate time that a server needs for a command, or less."""

_CLOSED: Final = "the engine is closed"
_ELSEWHERE: Final = Refusal("ELSEWHERE another server has the key by now")
"""In the place of a reply, for a command that was not sent: this server cannot be reached."""
_NOT_BEGUN: Final = PASSING | {"NOSCRIPT", "MOVED", "ASK", "READONLY", "ELSEWHERE"}
"""Refusals after which a command may be sent again."""


class Routes(Protocol):
    """Which owner sends a command. From any thread; never blocks."""

    moves: bool
    """True if keys move between servers."""

    def owner_of(self, hash_key: bytes) -> Owner:
        """Return the owner for the small commands of a hash."""

    def via(self, command: Command) -> Owner:
        """Return the owner that sends this command: another one if it is large."""

    def redirect(self, command: Command, refusal: Refusal) -> Owner:
        """Return the owner that sends a command after MOVED or ASK, and set its `prefix`."""


class _Holder:
    """What holds a claim, if that is not a call."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = get_ident()


class Owner:
    """Drives one connection. Every method may be called from any thread; none but `call`, `connect` and `close` blocks.

    A command is sent once. It is sent again only if the server said that it had not begun it.
    """

    def __init__(
        self,
        target: Target,
        *,
        call_timeout_s: float,
        connect_wait_s: float,
        deliver: Callable[[list[Any]], None],
        routes: Routes | None = None,
        fails_over: bool = False,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
        wake: Callable[[Owner], object] | None = None,
    ) -> None:
        """`deliver` takes the outcomes of many calls at once. `routes`: where there is more than this owner.

        `fails_over`: another server may become the primary, so a read-only one is left and the target dialled anew.
        `wake`: called instead of waking an I/O thread: there is none, and `step` does its work.
        """
        self._target = target
        self._call_timeout_s = call_timeout_s
        self._connect_wait_s = connect_wait_s
        self._deliver = deliver
        self._routes = routes
        self._moves = routes is not None and routes.moves
        self._fails_over = fails_over
        self._clock = clock
        self._wake = wake
        self._claim: dict[str, Call | Watch | _Holder] = {}
        self._inbox: deque[RedisScope | Command] = deque()
        """Scopes with calls in their mailboxes; commands for this connection; commands of scopes here that are over."""
        self._tokens: Inbox[None] = Inbox()
        """What wakes the I/O thread. One too many does no harm."""
        self._wanted = False
        """True while the I/O thread is about to take the claim: a caller that runs already would win each time."""
        # From here on: for the holder alone.
        self._ready: deque[RedisScope | Command] = deque()
        self._under_way: deque[Command] = deque()
        self._later: list[tuple[float, int, RedisScope | None, Pause | Command]] = []
        """A heap of what is due at some time."""
        self._pushed = 0
        self._is_news = False
        """True if the I/O thread must be woken when the claim is given back."""
        self.over: list[Call] = []
        """Calls that have ended, and whose callers do not know yet."""
        self._led: Command | None = None  # what the caller that leads has sent, until it has taken the reply in
        self._sent_at = 0.0
        self._round = 0  # calls that were sent together last
        self._unsent = b""
        """What did not fit into the socket of a thread that must not wait."""
        self._watch: Watch | None = None
        self._trip_s = float("inf")
        """Shortest round trip on this connection so far, without the server's own work."""
        self._connection: Connection | None = None
        self._leaving = False
        self._attempts = Attempts(target, clock, uniform)
        self._thread: dict[str, threading.Thread] = {}
        self._begun = False
        self._ended = False
        self.serves = True
        """False: its server is not needed any more, so it is not a problem if that cannot be reached."""

    @property
    def address(self) -> str:
        """For messages."""
        return self._target.address

    @property
    def connects(self) -> int:
        """Connections made so far."""
        return self._attempts.successes

    @property
    def why_not(self) -> str | None:
        """Why there is no connection, if the last attempt failed."""
        return self._attempts.why_not if self.serves else None

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

    # ------------------------------------------------------------------------------------------------------- any thread

    def connect(self) -> None:
        """Connect now, on this thread. Raises NotConnected. For the start: nothing else uses the owner yet."""
        self._connection = self._attempts.connect()

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

    def post(self, item: RedisScope | Command) -> None:
        """Have a scope's mailbox looked at, or a command sent or taken in, on the I/O thread. Never blocks."""
        self._inbox.append(item)
        if not self._claim and not self._wanted and (not self._begun or self._ended or self._tokens.empty()):
            self._ask()

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
                watch.start(self._call_timeout_s, self._check_age)
                if watch is not self._watch:
                    self._ask()  # another loop has put its own in the place of this one, which waits no longer
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

    def passivate(self, leave: Callable[[], bool]) -> bool:
        """Call `leave()` within the claim; BUSY if that is taken."""
        me = _Holder()
        if self._claim.setdefault(_HOLDER, me) is not me:
            return BUSY  # type: ignore[no-any-return]
        try:
            return leave()
        finally:
            self._give_back()

    def leave(self) -> None:
        """Dial anew before the next command, once the replies that are under way are here. Never blocks."""
        self._leaving = True

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

    def _ask(self) -> None:
        """Wake the I/O thread."""
        self._tokens.put(None)  # one C call, which a signal cannot cut in two
        if self._ended:
            self._refuse_late(EngineClosed(_CLOSED))
        elif self._wake is not None:
            self._wake(self)
        elif not self._begun:
            self._start()

    def _give_back(self) -> None:
        """The hand-over rule, the holder's half: first the claim, then what was posted meanwhile."""
        self._claim.pop(_HOLDER, None)
        if self._inbox or self._wanted or self._is_news:
            self._ask()

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

    # ----------------------------------------------------------------------------------------- on the caller's thread

    def _lead(self, scope: RedisScope, call: Call) -> bool:
        """Do a call here. False: it must be queued. With `call.lock` set, it has gone to the I/O thread on the way."""
        connection = self._connection
        if connection is None or self._leaving or self._under_way or self._inbox or self._ready or not scope.is_idle:
            return False
        commands, queue, ended = scope.commands, list[Call](), list[Call]()
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
            if type(command.reply) is Refusal and command.reply.word in _NOT_BEGUN:
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

    def _hand_over(self, command: Command, call: Call, via: Owner) -> None:
        """Leave a command that this caller cannot end itself to the I/O threads."""
        _arm(call)
        command.via = via
        command.scope.commands.command = command
        via.post(command)

    # ------------------------------------------------------------------------------------------------- the I/O thread

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
                time.sleep(_AGAIN_S)
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

    def due_in(self) -> float | None:
        """Return in how many seconds something must be done though nothing is posted and no reply comes; None: never.

        That is the end of a pause, the next attempt to connect, and the refusal of a call that has waited too long.
        """
        self._is_news = False
        now = self._clock()
        waits: list[float] = []
        if self._later:
            waits.append(self._later[0][0] - now)
        ready = list(self._ready)
        if ready or self.why_not is not None:
            waits.append(self._attempts.due - now)
        if ready:
            waits.append(min(item.since for item in ready) + self._connect_wait_s - now)
        return max(min(waits), 0.0) if waits else None

    def _pump_safely(self, *, waits: bool, dials: bool) -> None:
        try:
            self._pump(waits=waits, dials=dials)
        except Exception:
            log.exception("the connection to Redis at %s failed", self._target.address)
            # What was under way may have been sent or not: replies that come now would be taken for others.
            self._lose(self._connection, Broken("an error in this engine"))
        finally:
            self._hand_out()

    def _pump(self, *, waits: bool, dials: bool) -> None:
        """Send what is ready and take replies in, until nothing is left or there is no connection.

        `waits`: for replies, and until all is sent. `dials`: if there is no connection.
        """
        ready, under_way = self._ready, self._under_way
        while not self._ended:
            if self._inbox:
                self._collect()
            if self._later:
                self._end_those_due()
            if not ready and not under_way and self.why_not is None:
                return
            connection = self._connection
            if not under_way and (connection is None or not self._is_usable(connection)):
                self._hand_out()
                self._is_news = not dials
                connection = self._reconnected() if dials else None
                if connection is None:
                    return
            assert connection is not None
            alone = not under_way
            try:
                if self._unsent:
                    unsent, self._unsent = self._unsent, b""
                    connection.send(unsent)
                if ready and not self._leaving:
                    self._send(connection, waits=waits)
                # Only now: the server has work to do while callers take their answers.
                self._hand_out()
                if under_way:
                    if not waits and not connection.readable():
                        return
                    connection.receive()
                    if alone:
                        trip_s = self._clock() - self._sent_at - len(under_way) * _WORK_S
                        self._trip_s = min(self._trip_s, trip_s)
                    self._take_replies(connection)
            except Broken as error:
                self._lose(connection, error)

    def _collect(self) -> None:
        inbox, ready = self._inbox, self._ready
        now = self._clock()
        for _ in range(len(inbox)):
            item = inbox.popleft()
            if type(item) is not Command:
                self._list(item, now)
            elif item.over:
                if item.scope.owner is self:
                    self._take(item)
            elif not item.begun:
                item.begun = True
                item.since = item.since or now
                ready.append(item)

    def _list(self, scope: RedisScope, now: float) -> None:
        """Have a scope asked for its next command, unless it has one on its way."""
        if not scope.listed and scope.commands.command is None:
            scope.listed = True
            scope.since = now
            self._ready.append(scope)

    def _end_those_due(self) -> None:
        later, now = self._later, self._clock()
        while later and later[0][0] <= now:
            _, _, scope, item = heapq.heappop(later)
            self._resume(scope, item, now)

    def _resume(self, scope: RedisScope | None, item: Pause | Command, now: float) -> None:
        if type(item) is Command:
            self._pass_to(item.via or self, item)
        elif scope is not None:
            scope.commands.resume(item, scope.mailbox)
            self._list(scope, now)

    def _push(self, due: float, scope: RedisScope | None, item: Pause | Command) -> None:
        self._pushed += 1
        heapq.heappush(self._later, (due, self._pushed, scope, item))
        self._is_news = True

    def _schedule(self, scope: RedisScope) -> None:
        """See that the pauses that have begun end."""
        pausing = scope.commands.pausing
        while pausing:
            pause = pausing[-1]
            self._push(pause.due, scope, pause)
            pausing.pop()

    # -------------------------------------------------------------------------------------------- sending and receiving

    def going_now(self, waiting: int) -> int:
        """Return how many of those that wait go next.

        Of many one half: while the server works on these, the callers before them take their answers, and their next
        calls go with the rest. All together they would wait for the server, and it for them. Not if the way to the
        server is what takes the time: then the other half would wait for it twice (docs/design/0030-redis.md).
        """
        if waiting < _MANY or self._trip_s > waiting * _PACE_S:
            return waiting
        return waiting // 2

    def _send(self, connection: Connection, *, waits: bool) -> None:
        ready, under_way = self._ready, self._under_way
        pieces: list[bytes] = []
        size = count = 0
        now = self._clock()
        left = len(ready) - self.going_now(len(ready))
        while len(ready) > left and size < _ROUND_BYTES:
            item = ready.popleft()
            command = item if type(item) is Command else self._next_of(item)
            if command is None:
                continue
            if not command.deadline:
                command.deadline = now + self._call_timeout_s
            if command.prefix:
                command.skips = 1
                pieces.append(command.prefix)
            command.address = connection.address
            pieces.append(command.data)
            size += len(command.data)
            count += len(command.calls)
            under_way.append(command)
        self._round = count
        if size > _FITS:
            self._hand_out()
        if pieces:
            self._sent_at = self._clock()
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if waits:
                connection.send(data)
            elif (sent := connection.send_now(data)) < len(data):
                self._unsent = data[sent:]
                self._is_news = True

    def _next_of(self, scope: RedisScope) -> Command | None:
        """Return the next command of a scope, if it goes by this connection."""
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

    def _pass_to(self, via: Owner, command: Command) -> None:
        command.via = via
        if via is self:
            command.begun = True
            command.since = command.since or self._clock()
            self._ready.append(command)
        else:
            via.post(command)

    def _take_replies(self, connection: Connection) -> None:
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
        """A command is over: the owner of its scope takes it in."""
        command.over = True
        home = command.scope.owner
        if home is self:
            self._take(command)
        else:
            home.post(command)

    def _take(self, command: Command) -> None:
        """Take a command of one of this owner's scopes in, or send it again."""
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
            log.exception("a scope failed to take in what Redis answered")
            error = StorageError("an error in this engine: whether it was applied is not known")
            commands.give_up([*command.calls, *command.again], error, self.over)
        if commands.pausing:
            self._schedule(scope)
        if scope.mailbox:
            self._list(scope, self._clock())

    def _hand_out(self) -> None:
        """Tell callers that their calls have ended, each event loop being woken one time only."""
        if not self.over:
            return
        over, self.over = self.over, []
        outcomes: list[Any] = []
        for call in over:
            lock = call.lock
            if lock is not None:
                call.lock = None
                lock.release()
            elif call.reply_to is not None:
                outcomes.append((call.reply_to, call.answer, call.error))
        if outcomes:
            try:
                self._deliver(outcomes)
            except Exception:
                log.exception("answers from Redis could not be delivered")

    # ------------------------------------------------------------------------------------------------------- refusals

    def _sends_again(self, command: Command, refusal: Refusal) -> bool:
        """Send a command again that the server has not begun. False: the refusal is final."""
        word, now = refusal.word, self._clock()
        other, via, due = command.once_more(), command.via or self, now + _AGAIN_S
        if word == "NOSCRIPT":
            other.data = pack(with_source(command.parts))
            due = now
        elif refusal is _ELSEWHERE and self._routes is not None:
            via, due = self._routes.via(other), now
        elif now >= command.deadline:
            return False
        elif self._routes is not None and self._moves and word in ("MOVED", "ASK"):
            # At once the first time. But two servers that take each other for the owner must not keep us busy.
            due = due if command.not_before else now
            via = self._routes.redirect(other, refusal)
        elif self._fails_over and word in ("READONLY", "MASTERDOWN"):
            via.leave()
        elif word not in PASSING:
            return False
        other.via, other.not_before = via, due
        command.scope.commands.command = other
        if due > now:
            self._push(due, None, other)
        else:
            self._pass_to(via, other)
        return True

    def _refuse_waiting(self, error: ScopestateError, after_s: float) -> None:
        """Refuse what has waited that long."""
        now = self._clock()
        waiting, self._ready = list(self._ready), self._ready
        self._ready.clear()
        for item in waiting:
            if item.since + after_s - now > 0:  # as `due_in` computes it, or it might call for this without end
                self._ready.append(item)
            elif type(item) is Command:
                item.error = error
                self._end(item)
            else:
                scope = item
                scope.listed = False
                queue = scope.mailbox
                calls = queue[:]
                del queue[: len(calls)]
                scope.commands.give_up(calls, error, self.over)
        self._hand_out()

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

    # --------------------------------------------------------------------------------------------------- connections

    def _is_usable(self, connection: Connection) -> bool:
        if self._leaving:
            return False
        if not connection.is_stale():
            return True
        self._drop_idle(connection)
        return False

    def _drop_idle(self, connection: Connection) -> None:
        """The server has closed it while nothing used it: nothing was under way, so nothing is lost."""
        log.info("Redis at %s had closed an idle connection", self._target.address)
        connection.close()
        self._connection = None

    def _reconnected(self) -> Connection | None:
        """Connect; if that fails, refuse what has waited long enough and note when to try again."""
        self._leaving = False
        self._trip_s = float("inf")
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._moves and (self._attempts.why_not is not None or not self.serves):
            self._pass_on()
            if not self._ready and self.why_not is None:
                return None
        if self._clock() >= self._attempts.due:
            try:
                self._connection = connection = self._attempts.connect()
            except NotConnected as error:
                self._attempts.note_failure(error)
                self._pass_on()
            else:
                if self._ended:
                    connection.shut()  # `end` may have come before it was here
                return connection
        refused = NotConnected(f"{self._attempts.why_not}; nothing was sent")
        self._refuse_waiting(refused, self._connect_wait_s)
        return None

    def _pass_on(self) -> None:
        """Without a connection: give what is ready to the servers that have the keys by now; the rest waits on."""
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

    def _lose(self, connection: Connection | None, error: Broken) -> None:
        if connection is not None:
            self._forget(connection, error)
        self._fail_under_way(error)

    def _forget(self, connection: Connection, error: Broken) -> None:
        log.warning("lost the connection to Redis at %s: %s", connection.address, error)
        connection.close()
        self._connection, self._unsent = None, b""

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


def _arm(call: Call) -> Any:
    """Give a call the lock that its caller waits for."""
    lock = threading.Lock()
    lock.acquire()
    call.lock = lock
    return lock
