"""How the calls of a bridge's scope are sent: by the caller itself, or by the connection's thread."""

from __future__ import annotations

import threading
from abc import abstractmethod
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from scopestate.actors.reply import Envelope
from scopestate.actors.scope import ScopeActor
from scopestate.actors.turn import HOLDER
from scopestate.ops.turns import Delete, Effects, Get, Set, Turn, Update
from scopestate.persistence.bridge.calls import RemoteCall, TurnCall
from scopestate.persistence.bridge.computed import is_computed
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.persistence.bridge.owner import BridgeConnectionOwner

_MAIN: Final = threading.main_thread()
"""The thread that runs signal handlers."""

A = TypeVar("A")

FREQUENT: Final = frozenset({Delete, Get, Set, Update})
"""Turns of one key that every engine can do."""


class Driven(Protocol):
    """Access to the connection owner, for callers that may drive the connection themselves."""

    @property
    def owner(self) -> BridgeConnectionOwner | None:
        """The connection owner; None: callers only pass on what is to be sent."""


class Late:
    """An answer whose caller was interrupted before it could process it, as a message to the scope."""

    __slots__ = ("call", "is_taken")

    def __init__(self, call: TurnCall) -> None:
        self.call = call
        self.is_taken = False


class LeadingScope(ScopeActor):
    """A scope whose caller sends its call and receives the answer on its own thread, if no other call is in progress.

    Then the call is in none of the tables of the scope: the caller has the claims of the connection and of the scope,
    so nothing can overtake it, and a signal cannot leave anything half done. If the answer takes long, the connection's
    thread continues with the call, and `_adopt` enters it into the tables, before any other. On the main thread, where
    signal handlers run, the call is only left as a message.
    """

    since = 0.0
    """Required by `connections.pump.Item`; a scope is not sent."""
    _driven: Driven

    # ------------------------------------------------------------------------------------------------ for the scope

    @abstractmethod
    def _is_free(self) -> bool:
        """True if no call of this scope is without an answer."""

    @abstractmethod
    def _refuse(self, turn: Turn[Any], depth: int) -> None:
        """Raise the error that refuses a turn, if there is one."""

    @abstractmethod
    def _remote_call(self, turn: Turn[Any], depth: int) -> RemoteCall:
        """Return the call that carries out a turn."""

    @abstractmethod
    def _outcome(self, turn: Turn[A], remote: RemoteCall) -> Effects[A] | Exception | None:
        """Return the outcome of a call: effects, or the error for its caller. None: it must be sent again."""

    @abstractmethod
    def _tell_changes(self, effects: Effects[Any], depth: int) -> None:
        """Fire the events of the changes."""

    @abstractmethod
    def _pass_on(self) -> None:
        """Give the waiting calls to the actor that has replaced this one."""

    @abstractmethod
    def _adopt(self, call: TurnCall, remote: RemoteCall) -> Any:
        """Return the message that enters a call into the tables: it was sent, and the connection's thread has it."""

    # ------------------------------------------------------------------------------------------------ on the caller's

    def run(self, turn: Turn[A]) -> A:
        owner = self._driven.owner
        if owner is None or (type(turn) not in FREQUENT and is_computed(turn)):
            return self.send_and_wait(turn)
        call = TurnCall(turn, event_depth.get())
        owner.call(self, call, self._around.limits.call_timeout_s)
        if call.error is not None:
            raise call.error
        answer: A = call.answer
        return answer

    def lead(self, call: TurnCall, owner: BridgeConnectionOwner) -> bool:
        """Do a call on this thread, which has the claim of the connection. False: it must be queued."""
        claim, me = self._claim, call.thread
        if claim or not self._is_free() or claim.setdefault(HOLDER, me) is not me:
            return False
        led = self._is_free() and self._lead_alone(call, owner)
        del claim[HOLDER]
        if self._mailbox:
            self.wake()
        return led

    def _lead_alone(self, call: TurnCall, owner: BridgeConnectionOwner) -> bool:
        turn, depth = call.message, call.depth
        self._refuse(turn, depth)
        self.touched = True
        remote = call.remote = self._remote_call(turn, depth)
        ended = owner.send_alone(remote)
        if ended is None:
            return False
        if not ended:
            self._mailbox.insert(0, self._adopt(call, remote))
            owner.leave_to_thread(remote, call)
            return True
        outcome = self._outcome(turn, remote)
        if outcome is None:
            return False
        if isinstance(outcome, Exception):
            call.error = outcome
        else:
            self._tell_changes(outcome, depth)
            call.answer = outcome[1]
        call.done = True
        return True

    def recover_led(self, call: TurnCall) -> None:
        """Recover from the interruption of a caller while it led. May be repeated."""
        remote = call.remote
        if remote is not None and remote.done and remote.error is None and not call.done:
            # The other engine has done it: its events must still be fired.
            late = call.late = call.late or Late(call)
            if not late.is_taken and late not in self._mailbox:
                self._mailbox.insert(0, late)
        if self._claim.get(HOLDER) is call.thread:
            del self._claim[HOLDER]
        if self._mailbox:
            self.wake_anyway()

    def _take_late(self, late: Late) -> None:
        late.is_taken = True
        call = late.call
        if call.remote is not None:
            outcome = self._outcome(call.message, call.remote)
            if isinstance(outcome, tuple):
                self._tell_changes(outcome, call.depth)

    def enter(self, call: TurnCall) -> None:
        """Queue a call whose caller waits for it. Raises Overloaded, and WouldDeadlock."""
        call.remote = None
        turn, mailbox = call.message, self._mailbox
        envelope = Envelope(turn, call)
        envelope.depth = call.depth
        if not (mailbox or self._claim or self._closed) and type(turn) in FREQUENT and self.mailbox_limit > 0:
            # As `post`, written inline, but without the flag that says that it is arranged: that saves time, and at
            # worst the next caller asks once more.
            self._largest = max(self._largest, turn.size())
            mailbox += (envelope,)
            owner = self._driven.owner
            if owner is None:
                self.wake()
            else:
                owner.post(self)
            if self._passivated:
                self._pass_on()
            return
        if self._closed:
            self.send(envelope)
            return
        # Not a turn on this thread: the connection's thread handles all waiting calls together.
        self._refuse_own_turn()
        self.post(envelope)
        if self._passivated:
            self._pass_on()

    def _may_turn_here(self) -> bool:
        """True if a turn may run on this thread: signals cannot interrupt it, or it only refuses."""
        return self._closed or self._driven.owner is None or get_ident() != _MAIN.ident

    # -------------------------------------------------------------------------------------------- on the connection's

    def _schedule(self) -> None:
        owner = self._driven.owner
        if owner is None:
            super()._schedule()
            return
        self._scheduled = True
        owner.post(self)

    def work_elsewhere(self) -> None:
        """Let the dispatcher's threads handle the waiting calls: the connection has ended."""
        if self._mailbox:
            self._dispatcher.schedule(self)
