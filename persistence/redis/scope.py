"""Scopes that live in Redis, where other engines write them too."""

from __future__ import annotations

import threading
import time
from threading import get_ident
from typing import Any, Final

import pykka

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.containment import Log
from scopestate.actors.handler import NOBODY
from scopestate.actors.reply import Envelope, Reply, ReplyTo
from scopestate.actors.scope import Close, Housekeeping, Ping, ScopeActor, Surroundings
from scopestate.actors.turn import BUSY, HOLDER
from scopestate.errors import ReplyTimeout, ScopestateError, WouldDeadlock
from scopestate.ops.turns import Set, Turn
from scopestate.persistence.redis.calls import NEVER, Call, Known, tell
from scopestate.persistence.redis.flight import Flight
from scopestate.persistence.redis.flights import RedisFlights, Store
from scopestate.signals import certainly
from scopestate.wire.depth import event_depth

log = Log("scopestate.scope")

_FLIGHT_BYTES: Final = 1 << 18
"""Values in one command, about, at most: it runs in Redis as one step, which holds up everybody else there."""


class _Parked:
    """The answer of a turn that could not end on its caller's thread: he waits for this reply."""

    __slots__ = ("reply",)

    def __init__(self, reply: Reply[Any]) -> None:
        self.reply = reply


class RedisScopeActor(ScopeActor):
    """One scope in Redis (docs/design/0030-redis.md).

    It has one command on its way at a time, and what comes meanwhile goes out as the next one, all together: so calls
    take effect in the order in which they came, and many callers cost few round trips. A caller who finds the scope
    idle sends and waits on his own thread; for everybody else the link's thread does it, where a turn only makes a
    command or takes a reply in. The claim stays taken while a command is on its way.
    """

    batch = 256

    def __init__(self, scope: str, around: Surroundings, store: Store) -> None:
        super().__init__(scope, around)
        self._store = store
        self._flights = RedisFlights(scope, store, around.limits, self._landed, self._changed)
        self._lanes = self._flights.lanes
        self._own: Flight | None = None
        """The flight of the caller who runs a turn now."""
        self._alarm = 0.0
        """When the link's thread is next called because a lane is due. Seconds on the monotonic clock."""
        self.since = 0.0
        """When the oldest of those who wait came, about. For the link."""

    def has_waiting(self) -> bool:
        return bool(self._lanes) or super().has_waiting()

    # ---------------------------------------------------------------------------------------------- the caller's turn

    def housekeep(self, message: Housekeeping[Any]) -> Any:
        if isinstance(message, Close):
            # It sets two flags. Behind a call that waits for Redis, close() would wait for Redis too.
            self._housekeep(message)
            if self._lanes:
                self.wake_anyway()  # the alarm ends with the engine
            return None
        return super().housekeep(message)

    def housekeep_now(self, message: Housekeeping[Any]) -> Any:
        answer = super().housekeep_now(message)
        if self._lanes:
            self.wake_anyway()  # a wake-up for a lane that was due may have been turned away during this turn
        return answer

    def run(self, turn: Turn[Any]) -> Any:
        if self._lanes or self._mailbox:
            # With those who wait: all of them go out together. A caller who took every turn that he finds free would
            # keep the link's thread from it, since he has the interpreter already.
            return self._run_queued(turn)
        answer = self._if_idle(self.on_receive, turn)
        if answer is BUSY:
            return self._run_queued(turn)
        if self._lanes:
            try:
                self.wake_anyway()  # only now that the turn is over: it would be turned away before
            except BaseException:
                certainly(self.wake_anyway)
                raise
        if type(answer) is _Parked:
            return self._wait_for(answer.reply)
        return answer

    def _run_queued(self, turn: Turn[Any]) -> Any:
        self._refuse_within_a_call()
        return super().run(turn)

    def on_receive(self, turn: Any) -> Any:
        """A turn on the thread of a caller, who waits here for Redis."""
        if self._passivated:
            return self._around.directory[self.scope].run(turn)
        call = self._admitted(turn, None, event_depth.get())
        if self._lanes or self._mailbox:  # since `run` has looked
            call.reply = reply = self._dispatcher.reply()
            self._mailbox += (call,)
            return _Parked(reply)
        self.touched = True
        self._fly(call)
        if call.error is not None:
            raise call.error
        if not call.done:
            call.reply = reply = self._dispatcher.reply()
            return _Parked(reply)
        return call.answer

    def _fly(self, call: Call) -> None:
        """Send a call and wait until it is done, or must be tried again later."""
        timeout_s = self._around.limits.call_timeout_s
        known: dict[str, Known] = {}
        while True:
            flight = self._flights.make([call], known)
            if flight is None:
                return
            self._own = flight
            if not flight.link.fly(flight, timeout_s):
                raise ReplyTimeout(self.scope, timeout_s or 0.0)
            self._flights.take_in(flight)
            self._own = None
            if call.done:
                return
            lane = self._lanes[call.turn.key]
            if lane.due > 0.0:
                return
            # It has looked, and knows now what to work on.
            del self._lanes[call.turn.key]
            known = {call.turn.key: lane.known} if lane.known is not None else {}

    def _wait_for(self, reply: Reply[Any]) -> Any:
        timeout_s = self._around.limits.call_timeout_s
        try:
            self._refuse_within_a_call()
            return reply.get(timeout=timeout_s)
        except pykka.Timeout as error:
            reply.abandoned = True
            raise ReplyTimeout(self.scope, timeout_s or 0.0) from error
        except WouldDeadlock:
            reply.abandoned = True
            raise

    def _refuse_within_a_call(self) -> None:
        """For a signal handler: it has interrupted its thread at a connection, and what waits here may need that.

        Only the main thread handles signals.
        """
        if get_ident() == threading.main_thread().ident and self._store.is_at_a_link():
            raise WouldDeadlock(
                f"a signal handler has interrupted a call to Redis, and {self.name} is busy: waiting for it here might "
                "never end; nothing was done: let the handler set a flag, or leave the call to another thread"
            )

    def _recover(self) -> None:
        """A caller's turn was cut short, maybe while its command was on the way."""
        self._store.recover()
        claim, me, flight = self._claim, get_ident(), self._own
        if flight is not None and flight.maker == me:
            # Before it is left: from then on the link's thread may take the reply in, and give the claim back.
            if claim.get(HOLDER) == me:
                claim[HOLDER] = NOBODY
            if flight.leave():
                if not flight.queued:
                    flight.link.put(flight)  # in case that was cut short
                # No call between these lines: somebody else may have the turn by now.
                if self._own is flight:
                    self._own = None
                return
            claim[HOLDER] = me
        if claim.get(HOLDER) == me:
            self._own = None
            if flight is not None and not flight.told and (flight.reply is not None or flight.error is not None):
                # In front: what waits may wait for what it says. Only who holds the claim takes from there.
                self._mailbox[:0] = (flight,)
            else:
                self._flights.end_looks()
        super()._recover()
        if self._lanes:
            self.wake_anyway()

    # ------------------------------------------------------------------------------------------------------ queueing

    def send(self, envelope: Envelope) -> None:
        # Always queued: whoever sends an envelope may be an event loop's thread, which must not wait for Redis.
        self._refuse_own_turn()
        self.post(envelope)

    def _schedule(self) -> None:
        self._scheduled = True
        self.since = time.monotonic()
        self._store.link(self._flights.hash_key).put(self)

    # --------------------------------------------------------------------------------------------- on a link's thread

    def board(self, outcomes: list[Any]) -> Flight | None:
        """Make the next command of what waits."""
        # Cleared before the mailbox is read: whoever posts from here on schedules anew.
        self._scheduled = False
        claim = self._claim
        me = get_ident()
        if claim.setdefault(HOLDER, me) != me:
            return None  # the holder looks into the mailbox when it is done
        flight = None
        try:
            flight = self._next_flight(outcomes)
        finally:
            if flight is None:
                if self._lanes:
                    self._arrange_lanes()
                del claim[HOLDER]
                if not self._lanes:
                    self.wake()
                elif self._alarm <= time.monotonic():
                    self.wake_anyway()  # the alarm may have come to another thread, which was turned away
            else:
                claim[HOLDER] = NOBODY
        return flight

    def _landed(self, flight: Flight, outcomes: list[Any]) -> None:
        """A flight that nobody waits for has landed."""
        self._claim[HOLDER] = get_ident()
        try:
            self._flights.take_in(flight)
            tell(flight.calls, outcomes)
        finally:
            del self._claim[HOLDER]
            if self._lanes:
                self.wake_anyway()
            else:
                self.wake()

    def refuse(self, error: ScopestateError, outcomes: list[Any]) -> None:
        """There is no connection: fail everybody who waits."""
        self._scheduled = False
        claim = self._claim
        me = get_ident()
        if claim.setdefault(HOLDER, me) != me:
            return
        try:
            mailbox = self._mailbox
            waiting = mailbox[:]
            del mailbox[: len(waiting)]
            calls = [call for call in (self._call_of(item, outcomes) for item in waiting) if call is not None]
            # Behind the mailbox: a flight in it that has landed puts its calls into lanes.
            calls = [*(call for lane in self._lanes.values() for call in lane.calls), *calls]
            self._lanes.clear()
            self._flights.give_up(calls, error)
            tell(calls, outcomes)
        finally:
            del claim[HOLDER]
            if self._lanes:
                self.wake_anyway()
            else:
                self.wake()

    def _next_flight(self, outcomes: list[Any]) -> Flight | None:
        """Take from the lanes that are due, and from the mailbox, what goes together, and make its command."""
        calls: list[Call] = []
        known: dict[str, Known] = {}
        lanes, mailbox = self._lanes, self._mailbox
        if lanes:
            self._flights.take_from_lanes(calls, known)
        if len(mailbox) == 1 and not calls and not lanes:
            self._take_one(calls, outcomes)
        else:
            self._take_many(calls, outcomes)
        if not mailbox:
            self._direct = True
        if not calls:
            return None
        self.touched = True
        flight = self._flights.make(calls, known)
        if flight is None or len(flight.calls) != len(calls):
            tell(calls, outcomes)  # some have failed already
        return flight

    def _take_one(self, calls: list[Call], outcomes: list[Any]) -> None:
        """Take the only message: under load from many scopes, that is how most are."""
        item = self._mailbox[0]
        del self._mailbox[:1]
        call = self._call_of(item, outcomes)
        if call is not None:
            calls.append(call)

    def _take_many(self, calls: list[Call], outcomes: list[Any]) -> None:
        """Take from the mailbox what goes together with `calls`."""
        lanes, mailbox = self._lanes, self._mailbox
        link = self._store.link(self._flights.hash_key)
        most = min(len(calls) + link.going_now(len(mailbox)), self.batch)
        whole = False
        taken = size = 0
        for item in mailbox:
            message = item.message if type(item) is Envelope else item.turn if type(item) is Call else None
            on_all = isinstance(message, Turn) and message.keys is None
            if on_all or isinstance(message, Ping):
                # Behind everything that came before, on whatever key.
                if lanes or (calls and not (whole and on_all)):
                    break
            elif whole or len(calls) >= most or size >= _FLIGHT_BYTES:
                break
            taken += 1
            call = self._call_of(item, outcomes)
            if call is None:
                continue
            if on_all:
                whole = True
            elif lanes and call.turn.key in lanes:
                lanes[call.turn.key].calls.append(call)
                continue
            elif type(call.turn) is Set:
                size += len(call.turn.data)
            calls.append(call)
        del mailbox[:taken]

    def _call_of(self, item: Any, outcomes: list[Any]) -> Call | None:
        """Return the call that a mailbox item stands for; None if it is refused, over, or none."""
        kind = type(item)
        if kind is Call:
            return item  # type: ignore[no-any-return]
        if kind is Flight:
            # Its caller was interrupted before he had taken it in.
            self._flights.take_in(item)
            tell(item.calls, outcomes)
            return None
        message, reply = item.message, item.reply_to
        if reply.abandoned:
            return None
        try:
            if isinstance(message, Housekeeping):
                reply.set(self._housekeep(message))
            elif self._passivated:
                self._forward(item)
            else:
                return self._admitted(message, reply, item.depth)
        except (ScopestateError, HandlerFull) as error:
            reply.fail(error)
        except Exception as error:
            log.exception("%s could not take a message", self.name)  # a bug, which must not hang its sender
            reply.fail(error)
        return None

    # ------------------------------------------------------------------------------------------------ within the turn

    def _admitted(self, turn: Turn[Any], reply: ReplyTo | None, depth: int) -> Call:
        """Check a turn. Raises what refuses it: nothing was sent then."""
        self._refuse_if_closed(depth)
        if turn.writes:
            if not self._store.shares_events:
                for key in turn.keys or ():
                    self._refuse_if_full(key, depth)
            elif depth:
                self._router.note_cascade()
        return Call(turn, reply, depth)

    def _changed(self, call: Call, old: bytes | None, new: bytes | None) -> None:
        """Fire the event of a write, unless it comes from Redis."""
        if self._store.shares_events:
            return
        if self._shut:
            log.error(
                "%s: a write of key %r was answered after the engine closed; its event is not delivered",
                self.name,
                call.turn.key,
            )
        else:
            self._fire(call.turn.key, old, new, call.depth)

    def _arrange_lanes(self) -> None:
        """See that the link's thread comes back when a lane is due.

        Called there alone, so nobody is told to come while somebody else has the turn, who would not look at lanes.
        """
        if self._shut:
            self._flights.end_pauses()
        due = min(lane.due for lane in self._lanes.values())
        if due == NEVER:
            self._flights.end_looks()  # nothing is on its way that would end them
            due = 0.0
        now = time.monotonic()
        if due <= now:
            self.wake_anyway()
        elif not now < self._alarm <= due:
            self._alarm = due
            self._dispatcher.call_later(due - now, self.wake_anyway)

    # --------------------------------------------------------------------------------------------------------- leaving

    def _is_needed(self) -> bool:
        return bool(self._lanes) or super()._is_needed()
