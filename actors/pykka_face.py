"""What Pykka's refs, proxies and futures expect of an actor."""

from __future__ import annotations

import functools
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any, Final, Self

import pykka
from pykka.messages import ProxyCall, ProxyGetAttr, ProxySetAttr

from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.reply import Reply

log = Log("scopestate.actors")

PROXIES: Final = (ProxyCall, ProxyGetAttr, ProxySetAttr)
"""The messages of Pykka's proxies, each with the path of an attribute."""


class Stop:
    """Stop the actor. Answer: None."""


class Ref(pykka.ActorRef[Any]):
    """A ref whose `stop` sends a message of ours: Pykka's own is private to it."""

    def stop(self, *, block: bool = True, timeout: float | None = None) -> Any:
        """Stop the actor after its waiting messages. True if it was stopped, False if it had stopped before."""
        asked = self.ask(Stop(), block=False)

        def result(timeout_s: float | None) -> bool:
            try:
                asked.get(timeout=timeout_s)
            except pykka.ActorDeadError:
                return False
            return True

        stopped: Reply[bool] = Reply()
        stopped.set_get_hook(result)
        return stopped.get(timeout=timeout) if block else stopped


class _WhenAsked:
    """An attribute that is made when it is first read, and then kept in the instance."""

    def __init__(self, make: Callable[[Any], object]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, actor: Any, owner: type) -> Any:
        return self if actor is None else actor.__dict__.setdefault(self._name, self._make(actor))


class _Inbox:
    """The inbox as Pykka's refs see it."""

    def __init__(self, actor: PykkaFace) -> None:
        self._actor = actor

    def put(self, envelope: Any, /) -> None:
        """Take an envelope of Pykka; its future is one of ours, from `_create_future`."""
        self._actor.take_from_ref(envelope.message, envelope.reply_to)

    def empty(self) -> bool:
        return not self._actor.has_mail()


def _stopped_event(actor: PykkaFace) -> threading.Event:
    event = threading.Event()
    if actor._dead:
        event.set()
    return event


class PykkaFace(pykka.Actor):
    """The part of an actor that Pykka uses. The subclass decides how messages are queued and handled.

    Pykka's own `__init__` makes a uuid, an Event and a queue: 2 KB and 8 us, too much for each of 100,000 scopes.
    So it is not called, and the attributes that it would set are made when they are first read. Refused: `__getattr__`,
    which would make every attribute of every actor several times slower to read.
    """

    _dead = False

    actor_urn = _WhenAsked(lambda actor: uuid.uuid4().urn)
    actor_inbox = _WhenAsked(_Inbox)
    actor_stopped = _WhenAsked(_stopped_event)
    actor_ref = _WhenAsked(Ref)

    def __init__(self) -> None:
        """Do not call Pykka's constructor; see the class."""

    @property
    def name(self) -> str:
        """The name of this actor in messages and logs."""
        return type(self).__name__

    def take_from_ref(self, message: Any, reply: Reply[Any] | None) -> None:
        """Take a message from a Pykka ref; `reply` is None if it was told, not asked."""
        raise NotImplementedError

    def has_mail(self) -> bool:
        """True if messages wait."""
        raise NotImplementedError

    @classmethod
    def start(cls, *args: Any, **kwargs: Any) -> pykka.ActorRef[Self]:
        """Make an actor and return its ref; the arguments are those of the class.

        It is not entered into `pykka.ActorRegistry`, a list with O(n) removal: the host program's
        `ActorRegistry.stop_all()` must not stop an engine (docs/reference/functions-and-messages.md).
        """
        actor = cls(*args, **kwargs)
        try:
            actor.on_start()
        except Exception:  # noqa: BLE001 - an exception of the program's hook ends the actor, as in Pykka
            actor._note_failure()
        ref: pykka.ActorRef[Self] = actor.actor_ref
        return ref

    def stop(self) -> None:
        """Stop after the waiting messages."""
        self.actor_ref.tell(Stop())

    # Pykka's Actor is abstract: it requires these three methods.

    def _start_actor_loop(self) -> None:  # pragma: no cover - only Pykka's `start` calls it
        raise TypeError("an actor has no loop: its turns run on the threads that claim it")

    @staticmethod
    def _create_actor_inbox() -> Any:  # pragma: no cover - only Pykka's `__init__` calls it
        raise TypeError("an actor makes its inbox from itself")

    @staticmethod
    def _create_future() -> Reply[Any]:
        return Reply()

    def _receive(self, message: Any) -> Any:
        """Handle one message, within a turn."""
        if isinstance(message, Stop):
            return self._stop_now()
        if self._dead:
            raise pykka.ActorDeadError(f"{self} stopped before handling the message")
        if isinstance(message, PROXIES):
            return self._serve_proxy(message)
        return self.on_receive(message)

    def _serve_proxy(self, message: ProxyCall | ProxyGetAttr | ProxySetAttr) -> Any:
        *path, name = message.attr_path
        owner = functools.reduce(getattr, path, self)
        if isinstance(message, ProxySetAttr):
            return setattr(owner, name, message.value)
        attribute = getattr(owner, name)
        return attribute(*message.args, **message.kwargs) if isinstance(message, ProxyCall) else attribute

    def _stop_now(self) -> None:
        self._dead = True
        self.actor_stopped.set()
        try:
            self.on_stop()
        except BaseException as error:
            if is_from_outside(error):
                raise
            self._note_failure()

    def _fail(self) -> None:
        """Log the exception being handled and stop, as a Pykka actor does after a `tell` that raises."""
        self._note_failure()
        try:
            self.on_failure(*sys.exc_info())
        except BaseException as error:
            if is_from_outside(error):
                raise
            self._note_failure()

    def _note_failure(self) -> None:
        """Log the exception that is being handled, and mark the actor as stopped."""
        log.error("unhandled exception in %s", self.name, exc_info=sys.exc_info()[1])
        self._dead = True
        self.actor_stopped.set()
