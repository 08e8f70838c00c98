"""What happens to one connection, and to the scopes whose commands go by it: on one thread at a time.

The holder of the claim (`owner.py`) collects what was posted, sends commands, takes replies in and hands answers out.
"""

from __future__ import annotations

import heapq
import logging
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from scopestate.errors import ConnectionLost, NotConnected, ScopestateError, StorageError
from scopestate.persistence.redis.calls import Call, Command, Pause
from scopestate.persistence.redis.connection import NOT_ALL, PASSING, Broken, Connection, Refusal, Target, pack
from scopestate.persistence.redis.dialling import Attempts
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.script import with_source

if TYPE_CHECKING:
    from scopestate.persistence.redis.owner import Owner
    from scopestate.persistence.redis.scope import RedisScope

log = logging.getLogger("scopestate.persistence.redis")

AGAIN_S: Final = 0.05
"""Pause before something that did not work is tried again."""
_ROUND_BYTES: Final = 1 << 20
"""What is sent in one piece before replies are read."""
_FITS: Final = 1 << 14
"""Bytes that a socket takes in without waiting. Answers do not wait for more than that to be sent."""
_MANY: Final = 48
"""Fewer than these go together in any case: two commands instead of one cost more than the wait."""
_PACE_S: Final = 5e-6
"""Approximate time between a caller's answer and its next call."""
_WORK_S: Final = 3e-6
"""Approximate time that a server needs for a command, or less."""

_ELSEWHERE: Final = Refusal("ELSEWHERE another server has the key by now")
"""In the place of a reply, for a command that was not sent: this server cannot be reached."""
NOT_BEGUN: Final = PASSING | {"NOSCRIPT", "MOVED", "ASK", "READONLY", "ELSEWHERE"}
"""Refusals after which a command may be sent again."""


Deliver = Callable[[list[Any]], None]
"""Takes the outcomes of many calls at once."""


class Means(NamedTuple):
    """What owners need besides their servers; a test gives its own clock, randomness and threads."""

    deliver: Deliver
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform
    wake: Callable[[Owner], object] | None = None
    """Called instead of waking an I/O thread. The owner then has no such thread, and `Owner.step` does its work."""


class Routes(Protocol):
    """Where a command is sent. From any thread; never blocks."""

    moves: bool
    """True if keys move between servers."""

    def owner_of(self, hash_key: bytes) -> Owner:
        """Return the owner for the small commands of a hash."""

    def via(self, command: Command) -> Pump:
        """Return what sends this command: another connection if it is large."""

    def redirect(self, command: Command, refusal: Refusal) -> Pump:
        """Return what sends a command after MOVED or ASK, and set its `prefix`."""


class Pump(ABC):
    """One connection, and what is under way on it. For the holder of its claim, but for `post`, `leave` and properties.

    A command is sent once. It is sent again only if the server said that it had not begun it.
    """

    def __init__(
        self,
        target: Target,
        options: RedisOptions,
        means: Means,
        routes: Routes | None = None,
        *,
        fails_over: bool = False,
    ) -> None:
        """`routes`: where there is more than this connection.

        `fails_over`: another server may become the primary, so a read-only one is left and the target dialled anew.
        """
        self._target = target
        self._call_timeout_s = options.call_timeout_s
        self._connect_wait_s = options.connect_wait_s
        self._deliver = means.deliver
        self._routes = routes
        self._moves = routes is not None and routes.moves
        self._fails_over = fails_over
        self._clock = means.clock
        self._attempts = Attempts(target, means.clock, means.uniform)
        self._inbox: deque[RedisScope | Command] = deque()
        """Scopes with calls in their mailboxes; commands for this connection; commands of scopes here that are over.

        Any thread appends to it: see `Owner.post`.
        """
        self._ready: deque[RedisScope | Command] = deque()
        self._under_way: deque[Command] = deque()
        self._later: list[tuple[float, int, RedisScope | None, Pause | Command]] = []
        """A heap of what is due at some time."""
        self._pushed = 0
        self._is_news = False
        """True if the I/O thread must be woken when the claim is given back."""
        self.over: list[Call] = []
        """Calls that have ended, and whose callers do not know yet."""
        self._sent_at = 0.0
        self._round = 0  # calls that were sent together last
        self._unsent = b""
        """What did not fit into the socket of a thread that must not wait."""
        self._trip_s = float("inf")
        """Shortest round trip on this connection so far, without the server's own work."""
        self._connection: Connection | None = None
        self._leaving = False
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

    @abstractmethod
    def post(self, item: RedisScope | Command) -> None:
        """Have a scope's mailbox looked at, or a command sent or taken in, by the next holder. Never blocks."""

    def leave(self) -> None:
        """Dial anew before the next command, once the replies that are under way are here. Never blocks."""
        self._leaving = True

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

    # ---------------------------------------------------------------------------------------- one round after the other

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

    def _pass_to(self, via: Pump, command: Command) -> None:
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

    # --------------------------------------------------------------------------------------------------------- refusals

    def _sends_again(self, command: Command, refusal: Refusal) -> bool:
        """Send a command again that the server has not begun. False: the refusal is final."""
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

    # ------------------------------------------------------------------------------------------------------ connections

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
