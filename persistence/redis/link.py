"""A connection that many scopes share: who finds it idle drives it, else a thread does that for everybody."""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any, Final

from scopestate.errors import ConnectionLost, EngineClosed, NotConnected, ScopestateError
from scopestate.inbox import Empty
from scopestate.persistence.redis.attempts import Attempts
from scopestate.persistence.redis.connection import NOT_ALL, Broken, Connection, Refusal, Target, pack
from scopestate.persistence.redis.desk import Desk, Passenger
from scopestate.persistence.redis.flight import Flight
from scopestate.persistence.redis.script import with_source
from scopestate.signals import join

log = logging.getLogger("scopestate.persistence.redis")

_HOLDER: Final = "holder"
_AGAIN_S: Final = 0.05
"""Pause before a command that the server could not take just now is sent again."""
_ROUND_BYTES: Final = 1 << 20
"""What is put on the way in one piece before anybody looks for replies."""
_FITS: Final = 1 << 14
"""Bytes that a socket takes in without waiting. Answers do not wait for more than that to be sent."""
_MANY: Final = 48
"""Who are fewer go together in any case: two commands for one cost more than the wait."""
_PACE_S: Final = 5e-6
"""What a caller needs, about, from his answer to his next call."""
_WORK_S: Final = 3e-6
"""What a server needs for a command, about, or less."""

_CLOSED: Final = "the engine is closed"

PASSING: Final = frozenset({"LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN"})
"""Refusals of a server that will take the command later. It has not begun it."""


class Link:
    """A connection to one server. Every method may be called from any thread; none but `fly` and `close` blocks.

    `fly` on an idle link sends and waits on the caller's own thread: no hand-over, which would cost more than the round
    trip. When somebody else is at it, what comes goes into a queue, and the link's thread sends all that waits together
    and tells everyone who has a reply. Replies come in the order of the commands, so a queue is all it needs to know.

    A command is sent once. It is sent again only if the server said that it has not begun it.
    """

    def __init__(
        self,
        target: Target,
        *,
        call_timeout_s: float,
        connect_wait_s: float,
        deliver: Callable[[list[Any]], None],
        redirect: Callable[[Flight, Refusal | None], Link] | None = None,
        fails_over: bool = False,
    ) -> None:
        """`deliver` takes the outcomes that passengers leave, many at once. `redirect` says by which link a command
        goes that the server refuses because of its key; or, without a refusal, while the server cannot be reached. It
        sets `flight.link` too. `fails_over`: another server may become the primary, so a read-only one
        is left and the target dialled anew.
        """
        self._target = target
        self._call_timeout_s = call_timeout_s
        self._connect_wait_s = connect_wait_s
        self._desk = desk = Desk(deliver)
        self._redirect = redirect
        self._fails_over = fails_over
        self._claim: dict[str, int] = {}
        self._ready = desk.ready
        self._wanted = False
        self._boarding: deque[Passenger] = deque()
        self._under_way: deque[Flight] = deque()
        self._later: list[Flight] = []
        self._sent_at = 0.0
        self._trip_s = float("inf")
        """Shortest way to the server and back on this connection, as far as is known: without the server's own work."""
        self._connection: Connection | None = None
        self._leaving = False
        self._attempts = Attempts(target)
        self._thread: dict[str, threading.Thread] = {}
        self._begun = False
        self._ended = False
        self.serves = True
        """False: nobody needs its server any more, and it is no problem that it cannot be reached."""

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
        return len(self._under_way) + len(self._boarding) + self._ready.qsize() + len(self._claim)

    def going_now(self, waiting: int) -> int:
        """Return how many of those who wait go next.

        Of many one half: while the server does theirs, the others take their answers, and come again to go with the
        rest. All together they would wait for the server, and it for them. Not if the way to the server is what takes
        the time: then the other half would wait for it twice (docs/design/0030-redis.md).
        """
        if waiting < _MANY or self._trip_s > waiting * _PACE_S:
            return waiting
        return waiting // 2

    # ----------------------------------------------------------------------------------------------------- callers

    def connect(self) -> None:
        """Connect now, on this thread. Raises NotConnected. For the start: nobody else uses the link yet."""
        self._connection = self._attempts.connect()

    def put(self, passenger: Passenger) -> None:
        """Have the passenger asked for its command soon, on the link's thread. Never blocks."""
        self._ready.put(passenger)
        if not self._begun:
            try:
                # One C call, as in `actors.dispatcher.start_thread`: a signal cannot cut it in two.
                _thread.start_new_thread(self._begin, ())
                self._begun = True
            except RuntimeError as error:
                text = f"no thread for the link to Redis at {self._target.address}: {error}; nothing was sent"
                self._desk.refuse_late(NotConnected(text))  # the next one tries again
        if self._ended:
            self._desk.refuse_late(EngineClosed(_CLOSED))

    def fly(self, flight: Flight, timeout_s: float | None) -> bool:
        """Send the flight and wait until it has landed; False if that took longer than `timeout_s`.

        Blocks, so not on an event loop's thread.
        """
        claim = self._claim
        goes_on_by = self
        # Who cannot wait as long as the connection does must not be the one that waits at it.
        if not claim and (timeout_s is None or timeout_s >= self._call_timeout_s):
            me = get_ident()
            # Not if the link's thread waits for it: who has the interpreter already would take it away each time.
            wanted = self._wanted
            if self._connection is not None and not wanted and claim.setdefault(_HOLDER, me) == me:
                sent_again_by = self._fly_alone(flight)
                del claim[_HOLDER]
                if self._wanted:
                    self._ready.put(None)
                if sent_again_by is None:
                    return True
                goes_on_by = sent_again_by
        elif claim and claim.get(_HOLDER) == get_ident():
            # A signal handler has interrupted this very thread at the link, which nobody can drive until it returns.
            self._fly_apart(flight)
            return True
        flight.expect()
        flight.since = time.monotonic()
        goes_on_by.put(flight)
        flight.queued = True
        return flight.wait(timeout_s)

    def leave(self) -> None:
        """Dial anew before the next command, once the replies that are under way are here. Never blocks."""
        self._leaving = True

    def recover(self) -> None:
        """After an exception has come through `fly` from outside: let go of the link if this thread holds it."""
        if self._claim.get(_HOLDER) == get_ident():
            # A reply may still be on its way, which the next one would take for its own.
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            self._claim.pop(_HOLDER, None)
            self._ready.put(None)
        elif self._wanted:
            self._ready.put(None)  # it may have let go of the link, and told nobody

    def is_held_here(self) -> bool:
        """True if this thread holds the link."""
        return self._claim.get(_HOLDER) == get_ident()

    def end(self) -> None:
        """Take nothing new, and have whoever waits for the server wait no longer; `close` waits for them."""
        self._ended = True
        if (connection := self._connection) is not None:
            connection.shut()

    def close(self) -> None:
        """End the link; what still waits is refused. Idempotent."""
        self.end()
        connection = self._connection
        while (thread := self._thread.get("thread")) is not None:
            self._ready.put(None)
            try:
                join(thread)
                break
            except RuntimeError:
                time.sleep(0.001)  # it is about to be started, or to be given up
        self._refuse_all()
        if connection is not None:
            connection.close()

    # ----------------------------------------------------------------------------------------- on the caller's thread

    def _fly_alone(self, flight: Flight) -> Link | None:
        """Send and receive; if it must go through a queue, return the link that has it."""
        connection = self._connection
        if connection is None or not self._is_usable(connection):
            return self
        try:
            reply = connection.exchange(flight.command)
        except Broken as error:
            self._lose(connection, error)
            flight.error = self._lost(error)
            return None
        if type(reply) is Refusal:
            goes_on_by = self._sends_again(flight, reply)
            if goes_on_by is not None:
                return goes_on_by
        flight.reply = reply
        return None

    def _fly_apart(self, flight: Flight) -> None:
        try:
            connection = self._attempts.connect()
        except NotConnected as error:
            flight.error = error
            return
        try:
            reply = connection.exchange(flight.command)
            if type(reply) is Refusal and reply.word == "NOSCRIPT":
                reply = connection.exchange(pack(with_source(flight.parts)))
            flight.reply = reply
        except Broken as error:
            flight.error = self._lost(error)
        finally:
            connection.close()

    # ---------------------------------------------------------------------------------------------- the link's thread

    def _begin(self) -> None:
        thread = threading.Thread(target=self._run, name="scopestate-redis", daemon=True)
        if self._thread.setdefault("thread", thread) is not thread:
            return
        while not self._ended:
            try:
                thread.start()
            except RuntimeError as error:
                log.error("no thread for the link to Redis at %s: %s", self._target.address, error)  # noqa: TRY400
                time.sleep(_AGAIN_S)
            else:
                return
        del self._thread["thread"]

    def _run(self) -> None:
        me = get_ident()
        taken = False
        while not self._ended:
            self._wait_for_work(taken)
            # First this, then the look: who lets go of the link meanwhile sees that it is wanted.
            self._wanted = True
            taken = self._claim.setdefault(_HOLDER, me) != me
            if taken:
                continue
            self._wanted = False
            try:
                self._drive()
            except Exception:
                log.exception("the link to Redis at %s failed", self._target.address)
                # What was on its way may have been sent or not: replies that come now would be taken for others.
                if (connection := self._connection) is not None:
                    self._lose(connection, Broken("an error in this engine"))
                self._fail_under_way(Broken("an error in this engine"))
            finally:
                self._desk.hand_out()
                del self._claim[_HOLDER]
        self._refuse_all()

    def _wait_for_work(self, taken: bool) -> None:
        """Wait until somebody comes, or something is due; while the link is taken, until it is free.

        Due is what must be sent again, the next attempt to connect, and the refusal of who has waited too long.
        """
        waits: list[float] = []
        if not taken:
            now = time.monotonic()
            waits = [flight.not_before - now for flight in self._later]
            if self._boarding or self.why_not is not None:
                waits.append(self._attempts.due - now)
            if self._boarding:
                waits.append(min(passenger.since for passenger in self._boarding) + self._connect_wait_s - now)
        try:
            passenger = self._ready.get_within(max(min(waits), 0.0) if waits else None)
        except Empty:
            return
        if passenger is not None:
            self._boarding.append(passenger)

    def _drive(self) -> None:
        """Send what waits and take replies in, until nothing is left or there is no connection."""
        desk, ready, boarding, under_way = self._desk, self._ready, self._boarding, self._under_way
        while not self._ended:
            if not ready.empty():
                desk.collect(boarding)
            if self._later:
                self._call_those_due()
            if not boarding and not under_way and self.why_not is None:
                return
            connection = self._connection
            if not under_way and (connection is None or self._leaving or not self._is_usable(connection)):
                desk.hand_out()
                connection = self._reconnected()
                if connection is None:
                    return
            assert connection is not None
            alone = not under_way
            try:
                if boarding and not self._leaving:
                    self._send_round(connection)
                # Only now: the server has work to do while callers take their answers.
                desk.hand_out()
                if under_way:
                    connection.receive()
                    if alone:
                        trip_s = time.monotonic() - self._sent_at - len(under_way) * _WORK_S
                        self._trip_s = min(self._trip_s, trip_s)
                    self._take_replies(connection)
            except Broken as error:
                self._lose(connection, error)
                self._fail_under_way(error)

    def _send_round(self, connection: Connection) -> None:
        boarding, under_way = self._boarding, self._under_way
        commands: list[bytes] = []
        size = 0
        now = time.monotonic()
        left = len(boarding) - self.going_now(len(boarding))
        while len(boarding) > left and size < _ROUND_BYTES:
            passenger = boarding.popleft()
            flight = self._desk.board(passenger)
            if flight is None:
                continue
            if flight.link is not self:
                self._hand_on(flight, flight.link)
                continue
            if flight.not_before > now:
                flight.away = False
                self._later.append(flight)
                continue
            if not flight.deadline:
                flight.deadline = now + self._call_timeout_s
            if flight.prefix:
                flight.skips = 1
                commands.append(flight.prefix)
            commands.append(flight.command)
            size += len(flight.command)
            under_way.append(flight)
        if size > _FITS:
            self._desk.hand_out()
        if commands:
            self._sent_at = time.monotonic()
            connection.send(commands[0] if len(commands) == 1 else b"".join(commands))

    def _take_replies(self, connection: Connection) -> None:
        under_way, next_reply = self._under_way, connection.next_reply
        while under_way:
            reply = next_reply()
            if reply is NOT_ALL:
                return
            flight = under_way[0]
            if flight.skips:
                flight.skips -= 1
                continue
            goes_on_by = self._sends_again(flight, reply) if type(reply) is Refusal else None
            under_way.popleft()
            if goes_on_by is not None:
                self._hand_on(flight, goes_on_by)
                continue
            flight.reply = reply
            self._desk.tell(flight)

    def _hand_on(self, flight: Flight, link: Link) -> None:
        flight.away = False
        flight.since = flight.since or time.monotonic()  # one that was made right here has not waited yet
        link.put(flight)

    def _call_those_due(self) -> None:
        now = time.monotonic()
        due = [flight for flight in self._later if flight.not_before <= now]
        if due:
            self._later = [flight for flight in self._later if flight.not_before > now]
            self._boarding.extendleft(reversed(due))

    # ----------------------------------------------------------------------------------------------------- refusals

    def _sends_again(self, flight: Flight, refusal: Refusal) -> Link | None:
        """Deal with the refusal of a command that the server has not begun: return the link by which it goes again."""
        word = refusal.word
        now = time.monotonic()
        if not flight.deadline:
            flight.deadline = now + self._call_timeout_s
        if word == "NOSCRIPT":
            flight.command = pack(with_source(flight.parts))
            return self
        if now >= flight.deadline:
            return None
        if self._redirect is not None and word in ("MOVED", "ASK"):
            # At once the first time. But two servers that take each other for the owner must not keep us busy.
            flight.not_before = now + _AGAIN_S if flight.not_before else now
            return self._redirect(flight, refusal)
        if self._fails_over and word in ("READONLY", "MASTERDOWN"):
            self._leaving = True
        elif word not in PASSING:
            return None
        flight.not_before = now + _AGAIN_S
        return self

    # --------------------------------------------------------------------------------------------------- connections

    def _is_usable(self, connection: Connection) -> bool:
        if self._leaving:
            return False
        # Looked at each time, for half a microsecond: of a write that goes into a dead connection nobody can say if it
        # was applied.
        if not connection.is_stale():
            return True
        # The server has closed it while nobody used it: nothing was under way, so nothing is lost.
        log.info("Redis at %s had closed an idle connection", self._target.address)
        connection.close()
        self._connection = None
        return False

    def _reconnected(self) -> Connection | None:
        """Connect; if that fails, refuse those who have waited long enough and note when to try again."""
        self._leaving = False
        self._trip_s = float("inf")
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if time.monotonic() >= self._attempts.due:
            try:
                self._connection = connection = self._attempts.connect()
            except NotConnected as error:
                self._attempts.note_failure(error)
                if self._redirect is not None:
                    self._go_elsewhere(self._redirect)
            else:
                return connection
        refused = NotConnected(f"{self._attempts.why_not}; nothing was sent")
        self._refuse_waiting(refused, time.monotonic() - self._connect_wait_s)
        return None

    def _go_elsewhere(self, redirect: Callable[[Flight, Refusal | None], Link]) -> None:
        """Have those go by other links whose keys other servers have by now; the others wait on."""
        waiting, self._boarding = self._boarding, deque()
        for passenger in waiting:
            since = passenger.since
            flight = self._desk.board(passenger)
            if flight is not None:
                flight.since, flight.deadline = since, 0.0
                self._hand_on(flight, redirect(flight, None))

    def _lose(self, connection: Connection, error: Broken) -> None:
        log.warning("lost the connection to Redis at %s: %s", connection.address, error)
        connection.close()
        self._connection = None

    def _lost(self, error: Broken) -> ConnectionLost:
        lost = ConnectionLost("a call", f"Redis at {self._target.address}", str(error))
        lost.__cause__ = error
        return lost

    def _fail_under_way(self, error: Broken) -> None:
        lost = self._lost(error)
        while self._under_way:
            flight = self._under_way.popleft()
            flight.error = lost
            self._desk.tell(flight)

    def _refuse_waiting(self, error: ScopestateError, before: float) -> None:
        """Refuse those who have waited since `before` or longer."""
        waiting, self._boarding = self._boarding, deque()
        for passenger in waiting:
            if passenger.since > before:
                self._boarding.append(passenger)
                continue
            self._desk.refuse(passenger, error)
        self._desk.hand_out()

    def _refuse_all(self) -> None:
        self._fail_under_way(Broken("the engine was closed"))
        self._desk.collect(self._boarding)
        self._boarding.extend(self._later)
        self._later = []
        self._refuse_waiting(EngineClosed(_CLOSED), float("inf"))
