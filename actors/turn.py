"""Actors that own no thread: their turns run on the thread that claims them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from threading import get_ident
from typing import Any, ClassVar, Final, TypeVar

from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.dispatcher import Dispatcher
from scopestate.actors.pykka_face import PykkaFace
from scopestate.actors.reply import Envelope, Reply, ReplyTo, fail_if_open
from scopestate.errors import Overloaded, WouldDeadlock
from scopestate.signals import certainly

log = Log("scopestate.actors")

BUSY: Final[Any] = object()
"""Returned by `run_now` if the answer would need a wait."""

HOLDER: Final = "holder"
"""The one key of a claim; its value is the id of the thread that runs the turn."""

_POLL_S: Final = 0.0005

T = TypeVar("T")

_ARRANGING: Final[dict[int, int]] = {}
"""Thread id -> how many `arranging` blocks that thread is in."""


def arranging(action: Callable[[], object]) -> None:
    """Call `action()`, which sets a flag that says "this is arranged" and then arranges it.

    Between the two a finalizer or a signal handler may run on this thread and find the flag set. It must not rely
    on it: see `is_arranging`.
    """
    me = get_ident()
    outer = _ARRANGING.get(me, 0)
    _ARRANGING[me] = outer + 1
    try:
        action()
    finally:
        if outer:
            _ARRANGING[me] = outer
        else:
            _ARRANGING.pop(me, None)


def is_arranging() -> bool:
    """True in code that has interrupted this thread in the middle of `arranging`: a flag may be set too early."""
    return bool(_ARRANGING) and get_ident() in _ARRANGING


class TurnActor(PykkaFace):
    """A Pykka actor whose turns run on the thread that claims it: one turn at a time, and no thread of its own.

    The first thread that puts its id into the claim runs the turn. Every other thread leaves a message in the mailbox
    and continues, or waits for the reply. No lock is held while a turn runs (docs/design/0003-turns.md).

    Thread rules: every public method may be called from any thread; `on_receive` runs with the actor claimed.
    A turn that is interrupted from outside (KeyboardInterrupt, a signal handler that raises) gives the claim back, and
    waiting messages are still handled.
    """

    caller_runs: ClassVar[bool] = False
    """True: `run` on an idle actor happens on the caller's own thread. False: on the dispatcher's threads, always."""

    runs_program: ClassVar[bool] = False
    """True if its turns run code of the program, which may never return: the number of threads for them is limited."""

    mailbox_limit = sys.maxsize
    """Messages that may wait; one more is refused with `Overloaded`."""

    batch = 64
    """Messages that a worker thread handles for this actor before it serves others."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._claim = dispatcher.claim(self)
        self._mailbox: list[Any] = []
        self._scheduled = False
        self._direct = self.caller_runs
        """False while callers must queue: a message waits whose sender has continued, and whose later calls must not
        overtake it."""

    # ------------------------------------------------------------------------------------------------- sending

    def run(self, message: Any) -> Any:
        """Handle `message` on this thread if the actor is idle; else queue it and wait for the answer.

        Returns the answer or raises its error.
        """
        answer = self.run_now(message)
        return self.ask(message).get() if answer is BUSY else answer

    def run_now(self, message: Any) -> Any:
        """As `run`, but never wait: if the actor is busy, the message is not sent and BUSY is returned."""
        return self._if_idle(self.on_receive, message)

    def send(self, envelope: Envelope) -> None:
        """Take a message without waiting for it: it is handled on this thread if the actor is idle, else queued.

        The answer goes to its reply. Raises `Overloaded` if the mailbox is full and `WouldDeadlock` if this thread is
        running the actor's turn.
        """
        if self._if_idle(self._handle, envelope) is BUSY:
            self._refuse_own_turn()
            self.post(envelope)

    def _if_idle(self, work: Callable[[Any], Any], item: Any) -> Any:
        """Claim the actor and return `work(item)`; BUSY, with nothing done, if it would have to wait or overtake."""
        claim = self._claim
        if self._direct and not claim:
            me = get_ident()
            try:
                if claim.setdefault(HOLDER, me) == me:
                    answer = work(item)
                    del claim[HOLDER]
                    if self._mailbox:
                        self.wake()
                    return answer
            except BaseException:
                try:
                    certainly(self._recover)
                except BaseException:  # interrupted before it could begin; what is raised here may be a refusal
                    certainly(self._recover)
                    raise
                raise
        return BUSY

    def run_alone(self, work: Callable[[], T]) -> T:
        """Claim the actor, whatever waits in its mailbox, and return `work()`. Polls while a turn is running.

        Raises WouldDeadlock if this thread is in the middle of a turn of the actor.
        """
        self._refuse_own_turn()
        claim, me = self._claim, get_ident()
        try:
            while claim.setdefault(HOLDER, me) != me:
                over = self._dispatcher.reply()
                self._dispatcher.call_later(_POLL_S, over.set)
                over.get()
            return work()
        finally:
            certainly(self._recover)

    def ask(self, message: Any) -> Reply[Any]:
        """Queue `message` and return the future of its answer.

        Raises `Overloaded` if the mailbox is full and `WouldDeadlock` if this thread is running the actor's turn.
        """
        self._refuse_own_turn()
        reply = self._dispatcher.reply()
        self.post(Envelope(message, reply))
        return reply

    def tell(self, message: Any) -> None:
        """Queue `message`, without a wait for an answer. Raises `Overloaded` if the mailbox is full."""
        self.post(message)
        self.keep_order()

    def keep_order(self) -> None:
        """Make callers queue after the messages that wait now, whose sender's later calls must not overtake them.

        Called by the sender, after its message. Refused: callers that always queue if the mailbox is not empty. Under
        contention all of them would then wait for a worker thread, which costs ten times as much.
        """
        if self._mailbox:
            self._direct = False

    def post(self, item: Any) -> None:
        """Queue an envelope or a bare message, and make sure that it is handled."""
        mailbox = self._mailbox
        if len(mailbox) >= self.mailbox_limit:
            raise Overloaded(
                f"{len(mailbox)} messages already wait for {self.name}, as many as its limit allows; "
                "nothing was done: slow down, or raise the limit"
            )
        self._enqueue(item)

    def _enqueue(self, item: Any) -> None:
        """As `post`, without a limit: for the engine's own messages to its actors."""
        mailbox = self._mailbox
        try:
            mailbox += (item,)
            self.wake()
        except BaseException:
            certainly(self.wake_anyway)
            raise

    def withdraw(self, item: object) -> None:
        """Take `item` out of the mailbox, if it is still there. From any thread."""
        try:
            self._mailbox.remove(item)
        except ValueError:
            return  # its turn has come

    def wake(self) -> None:
        """Schedule the handling of the mailbox, unless that is arranged already."""
        if self._mailbox and not self._claim and (not self._scheduled or is_arranging()):
            self.wake_anyway()

    def wake_anyway(self) -> None:
        """Schedule the handling of the mailbox, for a `wake` that was interrupted.

        Calling it once too often does no harm.
        """
        arranging(self._schedule)

    def _schedule(self) -> None:
        # In this order: a worker may clear the flag as soon as the dispatcher knows.
        self._scheduled = True
        try:
            self._dispatcher.schedule(self)
        except BaseException:
            self._scheduled = False  # the dispatcher may not know; the next wake-up asks again
            raise

    def has_mail(self) -> bool:
        return bool(self._mailbox)

    def take_from_ref(self, message: Any, reply: Reply[Any] | None) -> None:
        if reply is None:
            self.tell(message)
        else:
            self._prepare(reply)
            self.send(Envelope(message, reply))
            self.keep_order()

    def _prepare(self, reply: Reply[Any]) -> None:
        """Give a reply that Pykka has made the waiting and the callbacks of the dispatcher's replies."""
        reply.waiter = self._dispatcher.waiter
        reply.submit_program = self._dispatcher.submit_program

    # ------------------------------------------------------------------------------------------------- running

    def run_batch(self) -> None:
        """Handle waiting messages, `batch` at most. For the dispatcher."""
        # Cleared before the mailbox is read: a message that is posted from here on schedules the actor again.
        self._scheduled = False
        me = get_ident()
        claim = self._claim
        if claim.setdefault(HOLDER, me) != me:
            return  # the holder looks into the mailbox when it is done
        try:
            self._drain_mailbox()
        finally:
            del claim[HOLDER]
            try:
                self.wake()
            except BaseException:
                certainly(self.wake_anyway)
                raise

    def _drain_mailbox(self) -> None:
        mailbox = self._mailbox
        # Before the mailbox is read: a sender that calls `keep_order` from here on has its message after this batch.
        ordered = self._direct != self.caller_runs
        self._direct = self.caller_runs
        batch = mailbox[: self.batch]
        # Only as many as were taken: more may have arrived since.
        del mailbox[: len(batch)]
        if ordered and mailbox:
            self._direct = False
        self._handle_all(batch, self._handle)

    def _handle_all(self, batch: list[Any], handle: Callable[[Any], None]) -> None:
        """Call `handle` for each; if something must pass through this thread, the rest of the batch stays queued."""
        begun = 0
        try:
            for item in batch:
                begun += 1
                try:
                    handle(item)
                except BaseException as error:
                    if is_from_outside(error):
                        raise
                    if type(item) is Envelope:
                        certainly(functools.partial(fail_if_open, item.reply_to, error))
                    log.exception("a turn of %s failed unexpectedly", self.name)
        finally:
            if begun < len(batch):
                self._mailbox[:0] = batch[begun:]

    def _refuse_own_turn(self) -> None:
        if self._claim.get(HOLDER) == get_ident():
            raise WouldDeadlock(
                f"this thread is in the middle of a turn of {self.name}; waiting for another one would never end"
            )

    def _handle(self, item: Any) -> None:
        """Run one turn and deliver its answer, as Pykka's loop does."""
        message: Any = item
        reply: ReplyTo | None = None
        if type(item) is Envelope:
            message, reply = item.message, item.reply_to
        if reply is not None and reply.abandoned:
            return
        try:
            answer = self._receive(message)
        except BaseException as error:
            if is_from_outside(error):
                raise
            # A signal handler may have raised it, after the write and before the router was woken.
            certainly(self._tell_again)
            if reply is not None:
                self._deliver_refusal(message, reply, error)
            else:
                self._fail()
        else:
            if reply is not None:
                self._answer(message, reply, answer)

    def _answer(self, message: Any, reply: ReplyTo, answer: Any) -> None:
        """Deliver the answer; an actor may hold it back until what it says is on disk."""
        reply.set(answer)

    def _deliver_refusal(self, message: Any, reply: ReplyTo, error: BaseException) -> None:
        """Deliver an error in place of an answer; an actor may hold it back as well."""
        reply.fail(error)

    def _recover(self) -> None:
        """Leave the actor usable after an exception has passed through a turn on this thread."""
        claim = self._claim
        if claim.get(HOLDER) == get_ident():
            del claim[HOLDER]
        if self._mailbox:
            self.wake_anyway()
        self._tell_again()

    def _tell_again(self) -> None:
        """Send again what a turn sends to other actors at its end, for a turn that was interrupted."""
