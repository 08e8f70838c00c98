"""The work on one connection and its calls, done by one thread at a time.

The holder of the claim (`owner.py`) sorts in the posted items, sends calls, receives answers and wakes callers.
"""

from __future__ import annotations

import heapq
import logging
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NamedTuple, Protocol, TypeVar

from scopestate.errors import NotConnected, ScopestateError
from scopestate.persistence.connections.attempts import Attempts, Backoff
from scopestate.persistence.connections.calls import Call
from scopestate.persistence.connections.connection import Broken, T_Connection, Target

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from scopestate.persistence.connections.owner import ConnectionOwner

AGAIN_S: Final = 0.05
"""Pause before a failed step is retried."""
PATIENCE_S: Final = 0.001
"""How long the claim is kept for an answer that may take long, so that calls posted meanwhile are sent together."""
_ROUND_BYTES: Final = 1 << 20
"""The most bytes that are sent in one piece before answers are read."""
_FITS: Final = 1 << 14
"""Bytes that a socket accepts without a wait. Callers are woken before more than that is sent."""
_MANY: Final = 48
"""Fewer calls than this are always sent together: two pieces instead of one cost more than the wait."""
_PACE_S: Final = 5e-6
"""Approximate time between a caller's answer and its next call."""
_WORK_S: Final = 3e-6
"""Approximate time that the other side needs for a call, or less."""


Deliver = Callable[[list[Any]], None]
"""Takes the outcomes of many calls at once."""


class Means(NamedTuple):
    """What connection owners need besides their targets; a test gives its own clock, randomness and threads."""

    deliver: Deliver
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform
    wake: Callable[[ConnectionOwner[Any, Any, Any]], object] | None = None
    """Called instead of waking an I/O thread. There is no such thread then: `ConnectionOwner.step` does its work."""


class TimeLimits(NamedTuple):
    """How long calls may take, in seconds."""

    call_s: float
    """From sending it to its answer."""
    connect_wait_s: float
    """How long it waits without a connection before it is refused."""


class Item(Protocol):
    """A posted item: a call, or an object that knows which calls wait."""

    since: float
    """When it began to wait for a connection. Seconds on the monotonic clock."""


T_Item = TypeVar("T_Item", bound=Item)
T_Call = TypeVar("T_Call", bound=Call)


class Pump(ABC, Generic[T_Item, T_Call, T_Connection]):
    """One connection, and the calls in progress on it.

    For the holder of its claim, except `post`, `leave` and properties.

    What differs between protocols is in the abstract methods. None of them may wait.
    """

    peer: ClassVar[str]
    """The name of the other side in messages; "at" and its address may follow."""
    log: ClassVar[logging.Logger]
    level: int = logging.WARNING
    """The log level of messages about lost and new connections."""
    thread_name: ClassVar[str]
    """The name of its I/O thread."""
    prompt: ClassVar[bool]
    """True: the other side answers at once and in order, so no answer in time means that the connection is broken.

    False: an answer may take any time, and others may come before it. Then no thread keeps the claim for longer than
    `PATIENCE_S` while it waits for one.
    """

    def __init__(
        self,
        target: Target[T_Connection],
        limits: TimeLimits,
        means: Means,
        backoff_s: tuple[float, float] | None = None,
    ) -> None:
        """`backoff_s`: the shortest and the longest pause between attempts to connect; None: BACKOFF_S."""
        self._target = target
        self._call_timeout_s, self._connect_wait_s = limits
        self._deliver = means.deliver
        self._clock = means.clock
        backoff = Backoff(means.uniform, backoff_s)
        self._attempts = Attempts(target, self.peer, self.log, means.clock, backoff, self.level)
        self._inbox: deque[T_Item] = deque()
        """Posted items. Any thread appends to it: see `ConnectionOwner.post`."""
        self._ready: deque[T_Item] = deque()
        """Items to send, in order."""
        self._under_way: Collection[Any] = deque()
        """Calls that were sent, and whose answers are still to come. Each protocol has a container that suits it."""
        self._later: list[tuple[float, int, Any]] = []
        """A heap of items with the times at which they are due."""
        self._pushed = 0
        self._is_news = False
        """True if the I/O thread must be woken when the claim is given back."""
        self.over: list[T_Call] = []
        """Calls that have ended, and whose callers were not woken yet."""
        self._sent_at = 0.0
        self._round = 0
        """How many calls were last sent together."""
        self._overdue_at: float | None = None
        """When the first time limit of the calls in progress ends. Known while the claim is free; only if not
        `prompt`."""
        self._unsent = b""
        """Bytes that did not fit into the socket, from a thread that must not wait."""
        self._trip_s = float("inf")
        """The shortest round trip on this connection so far, excluding the work of the other side."""
        self._connection: T_Connection | None = None
        self._leaving = False
        self._ended = False
        self.serves = True
        """False: its target is no longer needed, so it is not a problem if it cannot be reached."""

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
    def post(self, item: T_Item) -> None:
        """Pass an item to the next holder. Never blocks."""

    def leave(self) -> None:
        """Dial again before the next call, once all outstanding answers have arrived. Never blocks."""
        self._leaving = True

    def due_in(self) -> float | None:
        """Return in how many seconds there is work even if nothing is posted and no answer comes; None: never.

        Such work is the end of a pause or of a time limit, the next attempt to connect, and the refusal of a call that
        has waited too long.
        """
        self._is_news = False
        now = self._clock()
        waits: list[float] = []
        if self._later:
            waits.append(self._later[0][0] - now)
        if (overdue_at := self._overdue_at) is not None:
            waits.append(overdue_at - now)
        ready = list(self._ready)
        if ready or self.why_not is not None:
            waits.append(self._attempts.due - now)
        if ready:
            waits.append(min(item.since for item in ready) + self._connect_wait_s - now)
        return max(min(waits), 0.0) if waits else None

    # ----------------------------------------------------------------------------------------- what protocols differ in

    @abstractmethod
    def _sort_in(self, item: T_Item, now: float) -> None:
        """Take a posted item. If something must be sent for it, append it to `_ready`, with `since` set."""

    @abstractmethod
    def _begin(self, item: T_Item, connection: T_Connection, now: float) -> bytes | None:
        """Return the bytes to send for an item of `_ready`, and record that it is in progress; None: nothing to send.

        Adds the number of calls to `_round`.
        """

    @abstractmethod
    def _take_answers(self, connection: T_Connection) -> None:
        """Process the received bytes. Calls that have ended are appended to `over`."""

    @abstractmethod
    def _fail_under_way(self, error: Broken) -> None:
        """End the calls in progress on a lost connection, or put them into `_ready` again.

        No answer can come any more.
        """

    @abstractmethod
    def _end_overdue(self, now: float) -> float | None:
        """End calls that have waited too long for their answers.

        Return when the next time limit ends; None: no call has one.
        """

    @abstractmethod
    def _refuse(self, item: T_Item, error: ScopestateError) -> None:
        """End the calls of an item, of which nothing was sent."""

    @abstractmethod
    def _is_of_loop(self, loop: AbstractEventLoop) -> bool:
        """True if all calls in progress were made by tasks of this event loop."""

    def _resume(self, what: Any, now: float) -> None:
        """Handle an item that was given to `_push` and is now due."""
        raise NotImplementedError

    def _pass_on(self) -> None:
        """Without a connection: pass on calls that need not wait for one. By default all of them wait."""

    # ---------------------------------------------------------------------------------------- one round after the other

    def _pump_safely(self, *, waits: bool, dials: bool) -> None:
        try:
            self._pump(waits=waits, dials=dials)
        except Exception:
            self.log.exception("the connection to %s at %s failed", self.peer, self._target.address)
            # It is unknown whether the calls in progress were sent: answers that come now would be assigned to the
            # wrong calls.
            self._lose(self._connection, Broken("an error in this engine"))
        finally:
            self._hand_out()

    def _pump(self, *, waits: bool, dials: bool) -> None:
        """Send what is ready and receive answers, until nothing is left or there is no connection.

        `waits`: wait for answers (only shortly if they may take long), and until all is sent. `dials`: connect if there
        is no connection.
        """
        ready, under_way, prompt = self._ready, self._under_way, self.prompt
        while not self._ended:
            if self._inbox:
                self._collect()
            if self._later:
                self._end_those_due()
            if not ready and not under_way and self.why_not is None:
                self._overdue_at = None
                return
            connection = self._connection
            if not under_way and (connection is None or not self._is_usable(connection)):
                self._hand_out()
                self._overdue_at = None
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
                # Only now: the other side then works while callers take their answers.
                self._hand_out()
                if under_way:
                    if not prompt:
                        if not self._is_late(connection):
                            self._overdue_at = self._end_overdue(self._clock())
                            if self.over:
                                continue
                        if not self._is_answered(connection, waits=waits):
                            return
                    elif not waits and not connection.readable():
                        return
                    connection.receive()
                    if alone:
                        trip_s = self._clock() - self._sent_at - len(under_way) * _WORK_S
                        self._trip_s = min(self._trip_s, trip_s)
                    self._take_answers(connection)
            except Broken as error:
                self._lose(connection, error)

    def _is_late(self, connection: Any) -> bool:
        """True if a time limit is over, but there are answers that this thread has not received yet.

        They may have come in time: the machine may have stopped this process, or not let this thread run.
        """
        overdue_at = self._overdue_at
        return overdue_at is not None and overdue_at <= self._clock() and bool(connection.readable())

    def _is_answered(self, connection: Any, *, waits: bool) -> bool:
        """True if there is something to receive; with `waits`, wait for it a moment."""
        return bool(connection.wait(PATIENCE_S, None) if waits else connection.readable())

    def _collect(self) -> None:
        inbox, now, sort_in = self._inbox, self._clock(), self._sort_in
        for _ in range(len(inbox)):
            sort_in(inbox.popleft(), now)

    def _end_those_due(self) -> None:
        later, now = self._later, self._clock()
        while later and later[0][0] <= now:
            self._resume(heapq.heappop(later)[2], now)

    def _push(self, due: float, what: Any) -> None:
        """Call `_resume(what, now)` at `due`."""
        self._pushed += 1
        heapq.heappush(self._later, (due, self._pushed, what))
        self._is_news = True

    # -------------------------------------------------------------------------------------------- sending and receiving

    def going_now(self, waiting: int) -> int:
        """Return how many of the waiting calls are sent next.

        Of many calls, one half: while the other side works on it, the previous callers take their answers, and their
        next calls are sent with the other half. If all were sent together, callers and the other side would take turns
        waiting. Not if the network takes most of the time: then the other half would wait for it twice
        (docs/design/0030-redis.md).
        """
        if waiting < _MANY or self._trip_s > waiting * _PACE_S:
            return waiting
        return waiting // 2

    def _send(self, connection: T_Connection, *, waits: bool) -> None:
        ready, begin = self._ready, self._begin
        pieces: list[bytes] = []
        size = self._round = 0
        now = self._clock()
        left = len(ready) - self.going_now(len(ready))
        while len(ready) > left and size < _ROUND_BYTES:
            piece = begin(ready.popleft(), connection, now)
            if piece is not None:
                pieces.append(piece)
                size += len(piece)
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

    def _hand_out(self) -> None:
        """Tell callers that their calls have ended. Wakes each event loop only once."""
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
                self.log.exception("answers from %s could not be delivered", self.peer)

    def _refuse_waiting(self, error: ScopestateError, after_s: float) -> None:
        """Refuse items that have waited at least this long."""
        now = self._clock()
        waiting = list(self._ready)
        self._ready.clear()
        for item in waiting:
            if item.since + after_s - now > 0:  # computed as in `due_in`, or it might ask for this without end
                self._ready.append(item)
            else:
                self._refuse(item, error)
        self._hand_out()

    # ------------------------------------------------------------------------------------------------------ connections

    def _is_usable(self, connection: T_Connection) -> bool:
        if self._leaving:
            return False
        if not connection.is_stale():
            return True
        self._drop_idle(connection)
        return False

    def _drop_idle(self, connection: T_Connection) -> None:
        """Drop a connection that the other side has closed while it was idle: no call is lost."""
        self.log.info("%s at %s had closed an idle connection", self.peer, self._target.address)
        connection.close()
        self._connection = None

    def _reconnected(self) -> T_Connection | None:
        """Connect; if that fails, refuse the items that have waited long enough, and record when to try again."""
        self._leaving = False
        self._trip_s = float("inf")
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._attempts.why_not is not None or not self.serves:
            self._pass_on()
            if not self._ready and self.why_not is None:
                return None
        if self._clock() >= self._attempts.due:
            try:
                self._connection = connection = self._attempts.connect()
            except NotConnected as error:
                if self._ended:
                    return None  # the attempt was aborted; `close` refuses what waits
                self._attempts.note_failure(error)
                self._pass_on()
            else:
                if self._ended:
                    connection.shut()  # `end` may have been called before it was set
                return connection
        refused = NotConnected(f"{self._attempts.why_not}; nothing was sent")
        self._refuse_waiting(refused, self._connect_wait_s)
        return None

    def _lose(self, connection: T_Connection | None, error: Broken) -> None:
        if connection is not None:
            self._forget(connection, error)
        self._fail_under_way(error)

    def _forget(self, connection: T_Connection, error: Broken) -> None:
        self.log.log(self.level, "lost the connection to %s at %s: %s", self.peer, connection.address, error)
        if not self.prompt:
            connection.shut()  # this wakes the I/O thread, which may wait for it
        connection.close()
        self._connection, self._unsent = None, b""
