"""One durable trigger of an engine behind a bridge: a port to a consumer that the other engine has."""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from scopestate.actors.consuming import ConsumerPort, Held, Outcome
from scopestate.actors.containment import Log
from scopestate.actors.shared_consumer import ENDED, standing_by
from scopestate.errors import (
    CallTimeout,
    ConfigError,
    ConnectionLost,
    EngineClosed,
    Forbidden,
    FunctionNotFound,
    InvalidRegistration,
    NotConnected,
    RemoteFailure,
    ScopestateError,
    StorageError,
    Unsupported,
)
from scopestate.ops import handed
from scopestate.ops.triggers import Trigger
from scopestate.signals import Guard, exclusive
from scopestate.wire.refusals import refusal_of

log = Log("scopestate.persistence.bridge")

_MOST: Final = 256
_MOST_OUTCOMES: Final = 1000
"""The most outcomes in one message."""
_PATIENCE_S: Final = 2.0
"""As `server.holding.PATIENCE_S`: an engine that sends nothing for this long may be dismissed."""
_MOMENT_S: Final = 0.02
_AGAIN_S: Final = 2.0
"""Pause after the other engine has refused to give events."""
AWAY: Final = (CallTimeout, ConnectionLost, NotConnected, EngineClosed)
"""The other engine does not answer."""

_encode: Final = msgspec.json.Encoder().encode
_BY_CODE: Final[dict[str, Callable[[str], ScopestateError]]] = {
    ConfigError.code: ConfigError,
    Forbidden.code: Forbidden,
    InvalidRegistration.code: InvalidRegistration,
}


class Line(Protocol):
    """A connection to the other engine."""

    def call_and_wait(self, function_id: str, payload: bytes) -> bytes | None:
        """Call and wait for the result, on a thread of its own. Raises the error of the call."""

    def read_now(self, function_id: str, payload: bytes) -> bytes | None:
        """As `call_and_wait`, for a read-only function: it is called again if the connection was lost."""

    async def call_on_loop(self, function_id: str, payload: bytes, timeout_s: float | None = None) -> bytes | None:
        """As `call_and_wait`, on the loop of the connection."""


def ask(line: Line, function_id: str, asked: Any, kind: type[Any], *, reads: bool = False) -> Any:
    """Call a function of the other engine.

    Raises StorageError if it does not answer, else the error that it raises there. `reads`: the function is read-only.
    """
    call = line.read_now if reads else line.call_and_wait
    try:
        return msgspec.json.decode(call(function_id, _encode(asked)) or b"null", type=kind)
    except msgspec.DecodeError as error:
        raise StorageError(f"the answer of {function_id} cannot be read: {error}") from error
    except RemoteFailure as failure:
        if failure.code == EngineClosed.code:
            raise StorageError(f"{function_id} via bridge: {failure}") from EngineClosed(str(failure))
        raise error_of(failure) from failure
    except AWAY as error:
        raise StorageError(f"{function_id} via bridge: {error}") from error


def error_of(failure: RemoteFailure) -> ScopestateError:
    """Return the error that the other engine has raised."""
    if failure.code == FunctionNotFound.code:
        return Unsupported(
            "a durable trigger through a bridge", "the engine at the other end is iii, or an older scopestate"
        )
    known = refusal_of(failure)
    if known is not None:
        return known
    make = _BY_CODE.get(failure.code)
    return StorageError(f"remote error ({failure.code}): {failure}") if make is None else make(str(failure))


class RemotePort(ConsumerPort):
    """One consumer of the other engine, as this engine sees it.

    The other engine gives each event to one of the engines that ask, and this engine holds it until its outcome is
    reported. A poll waits at the other engine for events. The start of an attempt is reported by a call that is
    answered before the handler runs; outcomes are reported with it, or a moment later by the keeper.
    """

    notes_at_once = 16

    def __init__(self, name: str, line: Line, trigger: Trigger, since_ms: int, longest_wait_s: float) -> None:
        self.name = name
        self._line = line
        self._holder = str(uuid.uuid4())
        self._trigger = trigger
        self._since_ms = since_ms
        self._longest_wait_s = longest_wait_s
        self._wake: Callable[[], object] = _nothing
        self._lost: Callable[[Sequence[int]], object] = _nothing
        self.ring: Callable[[], object] = _nothing
        """Makes the keeper check at once."""
        self.nudge: Callable[[], object] = _nothing
        """Makes the keeper check in a moment."""
        self._saying = threading.Lock()
        """Held during one call, so that reports are sent in order. On worker threads and the keeper's."""
        self._arrived: deque[Held] = deque()
        self._held: dict[int, int] = {}
        """Position -> the attempt that is running, or 0."""
        self._serials: dict[int, int] = {}
        """Position -> the number of the message that reported the start of its attempt."""
        self._numbers = itertools.count(1)
        self._outcomes: list[Outcome] = []
        self._exclusive = Guard()
        """Held briefly, to change `_held` and `_outcomes`."""
        self._is_left = False
        self._left_behind: list[Outcome] = []
        self._paused: str | None = None
        self._joined = asyncio.Event()
        """Set while the other engine knows this one. On the loop."""
        self.is_joined = False
        self._start = trigger.start
        self.stopping = False
        self.is_over = False
        """True once it takes no events, and holds none."""
        self.problem: str | None = None
        self.taking: asyncio.Task[None] | None = None
        """Runs `take_on`."""

    # ------------------------------------------------------------------------------------------------- for the runtime

    def join(self, trigger: Trigger, since_ms: int) -> None:
        """Begin to take events, or take them for another trigger.

        Raises what the other engine raises. If it does not answer, this is retried once there is a connection.
        """
        self._trigger, self._since_ms, self._start = trigger, since_ms, trigger.start
        with self._saying:
            try:
                self._join()
            except StorageError as error:
                self._note_away(error)

    def start(
        self,
        trigger: Trigger,
        wake: Callable[[], object],
        lost: Callable[[Sequence[int]], object],
        running: Callable[[], Mapping[int, int]],
    ) -> None:
        self._wake, self._lost = wake, lost
        self.stopping = self.is_over = False
        wake()
        self.ring()

    def stop(self) -> None:
        self.stopping = True
        self._wake = _nothing
        self._lost(self._forget_idle())
        self.ring()

    @exclusive
    def _forget_idle(self) -> list[int]:
        """Forget the events that have not begun, and return their positions."""
        self._arrived.clear()
        idle = [position for position, attempt in self._held.items() if not attempt]
        self._forget(idle)
        return idle

    def fetch(self, most: int) -> list[Held]:
        found: list[Held] = []
        while self._arrived and len(found) < most:
            try:
                found.append(self._arrived.popleft())
            except IndexError:  # it was just taken back
                break
        return found

    def began(self, attempts: Sequence[tuple[int, int]]) -> None:
        with self._saying:
            serial = next(self._numbers)
            begun, gone = self._begin(attempts, serial)
            try:
                if begun:
                    gone += self._say(began=begun, serial=serial).gone
            except StorageError as error:
                if not isinstance(error.__cause__, AWAY):
                    self._begin([(position, 0) for position, _ in begun], 0)
                    raise
                # They are safe there, and are delivered again by the engine that answers next.
                log.debug("consumer %r: attempts could not be recorded: %s", self.name, error)
                gone += [position for position, _ in begun]
        if gone:
            self._forget(gone)
            self._lost(gone)

    @exclusive
    def _begin(self, attempts: Sequence[tuple[int, int]], serial: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Record attempts as running. Returns them, and the positions of those that were forgotten before."""
        begun = [(position, attempt) for position, attempt in attempts if position in self._held]
        for position, attempt in begun:
            self._held[position], self._serials[position] = attempt, serial
        return begun, [position for position, _ in attempts if position not in self._held]

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        # Not `_saying`: a handler's thread must not wait for the other engine here.
        if self._note_ended(outcomes):
            self.nudge()

    @exclusive
    def _note_ended(self, outcomes: Sequence[Outcome]) -> bool:
        """Record how attempts have ended. False: another port continues."""
        if self._is_left:
            self._left_behind += outcomes
            return False
        for one in outcomes:
            if one.position in self._held:
                self._outcomes.append(one)
                if one.verdict in ("done", "dead"):
                    self._held.pop(one.position, None)
                    self._serials.pop(one.position, None)
                else:
                    self._held[one.position] = 0
        return True

    @exclusive
    def hand_over(self) -> list[Outcome]:
        self._wake = self._lost = _nothing
        self._is_left = True
        told, self._outcomes = self._outcomes, []
        return told

    @exclusive
    def left_behind(self) -> list[Outcome]:
        told, self._left_behind = self._left_behind, []
        return told

    @exclusive
    def take_outcomes(self) -> list[Outcome]:
        """Return the outcomes that are not reported yet, and forget them."""
        told, self._outcomes = self._outcomes, []
        return told

    def flush(self) -> None:
        with self._saying:
            self._say(flush=True)

    def transaction(self, position: int, scope: str) -> Any:
        serial = self._serials.get(position)
        if serial is None or position not in self._held:
            raise StorageError(f"delivery {self.name}:{position} is no longer this engine's: it took too long")
        return ((self.name, self._holder, position, serial),)

    def is_acknowledged(self, position: int) -> bool:
        try:
            with self._saying:
                return self._say(resolve=(position, self._serials.get(position, 0))).acknowledged
        except ScopestateError as error:
            log.debug("the outcome of a transaction of %s:%d is not known: %s", self.name, position, error)
            return False  # if it has happened, the next attempt does not belong to this engine

    def full(self, letters: int) -> bool:
        try:
            with self._saying:
                return self._say(letters=letters).full
        except ScopestateError:
            return False

    def pause(self, why: str) -> None:
        asked = {"name": self.name, "why": why}
        ask(self._line, "engine::consumers::pause", asked, dict)
        self.note_pause(why)

    def paused(self) -> str | None:
        return self._paused

    def note_pause(self, why: str | None) -> None:
        """Record that it is paused, or continues."""
        before, self._paused = self._paused, why
        if before is not None and why is None:
            self._wake()

    # ---------------------------------------------------------------------------------------------- under the lock

    def _join(self) -> None:
        """Report to the other engine what this one holds, and learn what it has lost. Raises as `ask`."""
        config = {**self._trigger.options(), "start": self._start}
        trigger = self._trigger
        asked = handed.Join(
            self.name,
            self._holder,
            trigger.trigger_id,
            trigger.function_id,
            config,
            self._since_ms,
            self._held_and_ended(),
        )
        joined = ask(self._line, handed.JOIN, asked, handed.Joined)
        lost = set(joined.lost)
        self._paused, self.problem, self.is_joined = joined.paused, None, True
        if lost:
            self._forget(lost)
            self._lost(list(lost))
        self.ring()

    @exclusive
    def _held_and_ended(self) -> list[tuple[int, int, int]]:
        """Return the events held here, and those ended but not reported, as `SharedConsumer.join` takes them."""
        held = {one.position: ENDED for one in self._outcomes}
        held.update((position, attempt or held.get(position, 0)) for position, attempt in self._held.items())
        return [(position, attempt, self._serials.get(position, 0)) for position, attempt in held.items()]

    def _say(self, **fields: Any) -> handed.Noted:
        """Report what has ended, and the given fields. Raises StorageError."""
        for tries_left in (2, 1, 0):
            try:
                if not self.is_joined:
                    if self.stopping:
                        raise StorageError(f"consumer {self.name!r}: this engine has left it")
                    self._join()
                sent = self._outcomes[:_MOST_OUTCOMES]
                ended = [_said(one) for one in sent]
                asked = handed.Note(self.name, self._holder, ended, **fields)
                noted: handed.Noted = ask(self._line, handed.NOTE, asked, handed.Noted)
            except StorageError as error:
                self._note_away(error)
                if tries_left and isinstance(error.__cause__, ConnectionLost):
                    continue  # it may be sent twice
                raise
            if noted.is_holder or self.stopping:
                self._forget_told(sent)
                return noted
            self.is_joined = False
        raise StorageError(f"consumer {self.name!r}: the other engine does not keep this one as a holder")

    @exclusive
    def _forget_told(self, sent: Sequence[Outcome]) -> None:
        over = set(map(id, sent))
        self._outcomes = [one for one in self._outcomes if id(one) not in over]

    def _note_away(self, error: StorageError) -> None:
        self.is_joined = False
        self.problem = f"consumer {self.name!r} gets no events: {error}"

    def be_joined(self) -> None:
        """Wait until the other engine knows what this one holds. Raises StorageError if it does not answer."""
        with self._saying:
            if not (self.is_joined or self.stopping):
                self._join()

    def keep(self) -> None:
        """Send the reports that are due. On the keeper's thread. Raises StorageError."""
        with self._saying:
            if not self.is_joined and not (self.stopping and self._has_told_all()):
                self._join()
            if self.stopping:
                if self.is_joined:
                    self._say(leave=True)
                self.is_over = self._has_told_all()
            elif self._outcomes:
                self._say()

    @exclusive
    def _has_told_all(self) -> bool:
        """Return whether no attempt is running, and all outcomes were reported."""
        return not self._outcomes and not any(self._held.values())

    @property
    def has_to_say(self) -> bool:
        """True if there is something for `keep` to do."""
        return bool(self._outcomes) or self.stopping or not self.is_joined

    # ---------------------------------------------------------------------------------------------------- on the loop

    async def take_on(self) -> None:
        """Take events until this engine closes."""
        self.taking = asyncio.current_task()
        while True:
            if not self.is_joined or self.stopping:
                self._joined.clear()
                if not self.is_joined or self.stopping:
                    await self._joined.wait()
                continue
            try:
                taken = await self._take()
            except AWAY as error:
                self._note_away(StorageError(str(error)))
                self.ring()
            except (ScopestateError, msgspec.DecodeError) as error:
                if isinstance(error, RemoteFailure) and error.code == EngineClosed.code:  # another port continues
                    self._note_away(StorageError(str(error)))
                    await asyncio.sleep(_MOMENT_S)
                    self.ring()
                    continue
                self.problem = f"consumer {self.name!r} gets no events: {error}"
                log.error("%s", self.problem)  # noqa: TRY400 - the text says it all
                self.is_joined = False
                await asyncio.sleep(_AGAIN_S)
                self.ring()
            else:
                self._take_in(taken)

    def go_on(self) -> None:
        """Wake `take_on` to check whether it is joined. On the loop."""
        self._joined.set()

    async def _take(self) -> handed.Taken:
        patience_s = max(self._trigger.ack_wait, _PATIENCE_S)
        wait_s = min(patience_s / 4, self._longest_wait_s)
        most = max(_MOST - len(self._arrived), 0)
        asked = handed.Take(self.name, self._holder, most, int(wait_s * 1000))
        text = await self._line.call_on_loop(handed.TAKE, _encode(asked), wait_s + 2 * self._longest_wait_s)
        return msgspec.json.decode(text or b"null", type=handed.Taken)

    def _take_in(self, taken: handed.Taken) -> None:
        if taken.gone:
            self._begin_anew(forgotten=taken.forgotten)
            return
        if taken.lost:
            self._forget(taken.lost)
            gone = set(taken.lost)
            for item in [item for item in self._arrived.copy() if item.event.position in gone]:
                try:
                    self._arrived.remove(item)
                except ValueError:
                    continue  # it was just fetched
            self._lost(taken.lost)
        self._exclusive.run(self._arrive, taken.events)
        self.note_pause(taken.paused)
        self.problem = standing_by(self.name) if taken.stands_by else None
        if taken.events:
            self._wake()

    def _arrive(self, events: Sequence[handed.HandedEvent]) -> None:
        if self.stopping:
            return  # they go to other engines once this one has reported that it leaves
        for one in events:
            self._held[one.position] = 0
            item = Held(one.event(), one.attempts, one.first_ms, one.due_ms, one.error, one.cut_off, one.blocked)
            self._arrived.append(item)

    def _begin_anew(self, *, forgotten: bool) -> None:
        """Start again with an engine that does not know this one: it has been replaced, or has dismissed this one."""
        self.is_joined = False
        if forgotten:
            log.warning(
                "consumer %r was forgotten in another engine, and starts again because its trigger is here", self.name
            )
            held = list(self._held)
            self._arrived.clear()
            self.take_outcomes()
            self._forget(held)
            self._lost(held)
            self._start = "now"
        self.ring()

    @exclusive
    def _forget(self, positions: Sequence[int] | set[int]) -> None:
        for position in positions:
            self._held.pop(position, None)
            self._serials.pop(position, None)
        gone = set(positions)
        # Outcomes are still reported: they count if the event turns out to belong to this engine.
        self._outcomes = [one for one in self._outcomes if one.position not in gone or one.verdict in ("done", "dead")]


def _said(one: Outcome) -> handed.HandedOutcome:
    return handed.HandedOutcome(
        one.position, one.verdict, one.attempts, one.first_ms, one.due_ms, one.error or "", one.traceback
    )


def _nothing(*_: Any) -> None:
    """Do nothing: there is no runtime."""
