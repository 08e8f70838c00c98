"""Observe the calls and the handlers of an engine: the basis for integrations that trace.

`observe(engine, observer)` makes each call of the program and each handler run within a context manager of the
observer. This costs nothing in an engine that is not observed: observing replaces the engine's methods and functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from scopestate.errors import ScopestateError
from scopestate.ops.deliveries import Delivery
from scopestate.ops.trace_context import TraceContext, TracedDepth, context_of
from scopestate.ops.turns import Turn
from scopestate.persistence.bridge.options import BridgeOptions
from scopestate.persistence.local import LocalBackend
from scopestate.persistence.redis.options import RedisOptions
from scopestate.wire.address import Address
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scopestate.actors.functions import Function
    from scopestate.engine import Engine
    from scopestate.ops.results import StateEvent

Place = Literal["local", "redis", "bridge"]
"""Where the scopes are: in this engine, in Redis, or in another engine (behind a bridge, or for a follower)."""

_CALLS: Final = ("set", "_set_with", "get", "delete", "update", "list", "list_groups", "_run")
"""The methods of `Engine` and `AioEngine` through which every call on state goes."""

_inside: Final[ContextVar[bool]] = ContextVar("scopestate_observed", default=False)
"""True within an observed call: calls that it makes itself are a part of it."""


class Observer(Protocol):
    """Makes the context managers of calls and handlers, on any thread. What it raises reaches the engine's caller."""

    def call(self, operation: str, scope: str | None, place: Place) -> AbstractContextManager[object]:
        """Return the context manager for a call. `operation` is the name of a state function, such as `set`."""

    def handler(
        self, function_id: str, events: Sequence[StateEvent], attempt: int, consumer: str | None
    ) -> AbstractContextManager[object]:
        """Return the context manager for one attempt of a handler, or of a condition.

        `events` has one event, or the events of a batch. `attempt` counts from 1. `consumer` is the name of a durable
        trigger.
        """

    def serve(self, function_id: str, context: TraceContext) -> Serving:
        """Return an observer of a call that came over the wire with a trace. Called on the server's event loop."""

    def origin(self) -> TraceContext | None:
        """Return the trace of the current call, or None. The events of the call carry it: see `origin_of`."""


def origin_of(event: StateEvent) -> TraceContext | None:
    """Return the trace of the call that fired an event, as `Observer.origin` returned it.

    That call may have been made in another process, or before a restart. None if it was not part of a trace.
    """
    return context_of(event.depth)


def place_of(engine: Engine) -> Place:
    """Return where the scopes are now. This changes when a follower becomes the owner."""
    parts = engine._parts
    if isinstance(parts.backend, LocalBackend):
        return "local"
    return "redis" if parts.sharing is None and parts.config.adapter.name == "redis" else "bridge"


class Serving(Protocol):
    """Observes one call that came over the wire, on the event loop of the server. Its methods raise nothing."""

    def attached(self) -> AbstractContextManager[object]:
        """Return a context manager in which the call begins. Tasks made there inherit its context variables."""

    def fail(self, error: Exception) -> None:
        """The call has failed. `end` follows."""

    def end(self) -> None:
        """The call is over. Called once."""


class Peer(NamedTuple):
    """The server that the calls of an engine go to."""

    address: str = ""
    """Host name, IP address, or path of a Unix socket. "" if it is not configured: for a follower, or with
    Sentinels."""
    port: int = 0
    """0 if the address is not a host."""
    database: str = ""
    """The number of the database of Redis; "" for another engine."""


def peer_of(engine: Engine) -> Peer:
    """Return the server that the configuration names. It stays the same while the engine is open."""
    options = engine._parts.config.adapter.config
    if isinstance(options, RedisOptions):
        server = options.server
        database = str(server.database or 0)
        if options.sentinels:
            return Peer(database=database)
        return Peer(server.unix_path or server.host, server.port, database)
    if isinstance(options, BridgeOptions):
        address = Address(options.bridge_url)
        return Peer(address.host, address.port) if address.path is None else Peer(address.path)
    return Peer()


def observe(engine: Engine, observer: Observer) -> None:
    """Observe the calls and the handlers of an engine from now on, until `unobserve`.

    May be called from any thread. Raises ScopestateError if the engine is already observed.
    """
    if "_run" in vars(engine):
        raise ScopestateError(f"{engine!r} is observed already: end that first")
    for doors, wrap in ((engine, _wrapped), (engine.aio, _wrapped_coroutine)):
        for name in _CALLS:
            method = getattr(doors, name, None)
            if method is not None:
                setattr(doors, name, wrap(engine, observer, name, method))
    engine._functions.observe(lambda function, given: _around_handler(observer, function, given))
    engine._observer = observer


def unobserve(engine: Engine) -> None:
    """Undo `observe` for an engine. Idempotent; calls that have begun are observed to their end."""
    engine._functions.observe(None)
    vars(engine).pop("_observer", None)
    for doors in (engine, engine.aio):
        for name in _CALLS:
            vars(doors).pop(name, None)


def _named(name: str, given: tuple[Any, ...]) -> tuple[str, str | None]:
    """Return the operation and the scope of a call of a method."""
    scope = given[0] if given and isinstance(given[0], str) else None
    if name != "_run":
        return "set" if name == "_set_with" else name, scope
    turn: Turn[Any] = given[1]
    function_id = getattr(turn, "function_id", None) or type(turn).__name__.lower()
    return str(function_id).rpartition("::")[2], scope


@contextmanager
def _around_call(engine: Engine, observer: Observer, name: str, given: tuple[Any, ...]) -> Iterator[None]:
    operation, scope = _named(name, given)
    with observer.call(operation, scope, place_of(engine)):
        before = event_depth.get()
        origin = observer.origin()
        depth = before if origin is None else TracedDepth.of(before, origin)
        of_inside, of_depth = _inside.set(True), event_depth.set(depth)
        try:
            yield
        finally:
            event_depth.reset(of_depth)
            _inside.reset(of_inside)


def _wrapped(engine: Engine, observer: Observer, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*given: Any, **options: Any) -> Any:
        if _inside.get():
            return method(*given, **options)
        with _around_call(engine, observer, name, given):
            return method(*given, **options)

    return call


def _wrapped_coroutine(
    engine: Engine, observer: Observer, name: str, method: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    @wraps(method)
    async def call(*given: Any, **options: Any) -> Any:
        if _inside.get():
            return await method(*given, **options)
        with _around_call(engine, observer, name, given):
            return await method(*given, **options)

    return call


@contextmanager
def _around_handler(observer: Observer, function: Function, given: tuple[Any, ...]) -> Iterator[None]:
    first = given[0]
    events: list[StateEvent] = first if isinstance(first, list) else [first]
    delivery = given[1] if len(given) > 1 and isinstance(given[1], Delivery) else None
    if delivery is None:
        # Each attempt gets the same event object. This is not a field, so that events that are not observed do not have
        # it.
        counts = vars(events[0]).setdefault("_attempts", {})
        attempt = counts[function.function_id] = counts.get(function.function_id, 0) + 1
    else:
        attempt = delivery.attempt
    token = _inside.set(False)  # it may run within a call, if one thread does everything
    try:
        with observer.handler(function.function_id, events, attempt, None if delivery is None else delivery.consumer):
            yield
    finally:
        _inside.reset(token)
