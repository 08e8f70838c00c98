"""Traces of an engine for OpenTelemetry: client spans for calls that leave the process, consumer spans for handlers.

Needs the extra `otel`, which is the API alone: the program chooses the SDK and its exporters.

    from scopestate.integrations.opentelemetry import instrument
    uninstrument = instrument(engine)

Names and attributes follow the stable semantic conventions for database clients, and the conventions for messaging. No
attribute has a value, nor a key unless `keys=True` is given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import Token
from functools import partial
from typing import Any, Final

try:
    from opentelemetry import context as contexts
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
except ImportError as error:
    raise ImportError("scopestate.integrations.opentelemetry needs: pip install 'scopestate[otel]'") from error

from scopestate import __version__
from scopestate.engine import Engine
from scopestate.errors import ScopestateError
from scopestate.observing import Peer, Place, observe, origin_of, peer_of, unobserve
from scopestate.ops.deliveries import RetryLater
from scopestate.ops.results import StateEvent
from scopestate.ops.trace_context import TraceContext, read_context

__all__ = ["instrument", "uninstrument"]

log = logging.getLogger("scopestate.integrations")

SCHEMA: Final = "https://opentelemetry.io/schemas/1.28.0"
BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Bucket boundaries of the histogram, in seconds, as the conventions advise."""


def instrument(
    engine: Engine,
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    keys: bool = False,
) -> Callable[[], None]:
    """Trace the calls and the handlers of an engine from now on; return a function that ends that.

    The providers default to the global ones. With `keys`, the spans of handlers have the keys of their events. May be
    called from any thread. Raises ScopestateError if the engine is already instrumented. An exception of a tracer, a
    meter or an exporter is logged; only its span is lost.
    """
    observe(engine, _Tracer(peer_of(engine), tracer_provider, meter_provider, keys=keys))
    return partial(unobserve, engine)


def uninstrument(engine: Engine) -> None:
    """Undo `instrument`. Does nothing if the engine is not instrumented."""
    unobserve(engine)


class _Tracer:
    """Makes a span of each call and each handler."""

    def __init__(
        self, peer: Peer, tracers: trace.TracerProvider | None, meters: metrics.MeterProvider | None, *, keys: bool
    ) -> None:
        self._tracer = trace.get_tracer("scopestate", __version__, tracers, SCHEMA)
        self._durations = metrics.get_meter("scopestate", __version__, meters, SCHEMA).create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=BUCKETS_S,
        )
        self._keys = keys
        self._peer: dict[str, Any] = {
            name: value
            for name, value in (
                ("server.address", peer.address),
                ("server.port", peer.port),
                ("db.namespace", peer.database),
            )
            if value
        }

    @contextmanager
    def call(self, operation: str, scope: str | None, place: Place) -> Iterator[None]:
        if place == "local":  # a plain function call: its events are linked to the writer's own span
            yield
            return
        counted: dict[str, Any] = {
            "db.system.name": "redis" if place == "redis" else "scopestate",
            "db.operation.name": operation,
            **self._peer,
        }
        attributes = counted if scope is None else {**counted, "db.collection.name": scope}
        name = operation if scope is None else f"{operation} {scope}"
        began = time.perf_counter()
        try:
            with self._span(name, SpanKind.CLIENT, attributes, (), None):
                yield
        except BaseException as error:
            counted["error.type"] = _type_of(error)
            raise
        finally:
            with _contained():
                self._durations.record(time.perf_counter() - began, counted)

    def handler(
        self, function_id: str, events: Sequence[StateEvent], attempt: int, consumer: str | None
    ) -> AbstractContextManager[None]:
        scopes = {event.scope for event in events}
        scope = next(iter(scopes)) if len(scopes) == 1 else None
        attributes: dict[str, Any] = {
            "messaging.system": "scopestate",
            "messaging.operation.name": "handle",
            "messaging.operation.type": "process",
            "scopestate.function_id": function_id,
            "scopestate.attempt": attempt,
        }
        if scope is not None:
            attributes["messaging.destination.name"] = scope
        if consumer is not None:
            attributes["messaging.consumer.group.name"] = consumer
        if len(events) > 1:
            attributes["messaging.batch.message_count"] = len(events)
        else:
            attributes["scopestate.event_type"] = events[0].event_type
        if self._keys:
            attributes["scopestate.keys"] = [event.key for event in events]
        links = tuple(Link(_span_context(origin)) for event in events if (origin := origin_of(event)) is not None)
        return self._span(f"handle {function_id}", SpanKind.CONSUMER, attributes, links, Context())

    def serve(self, function_id: str, context: TraceContext) -> _Served:
        span: Span | None = None
        with _contained():
            parent = trace.set_span_in_context(trace.NonRecordingSpan(_span_context(context)), Context())
            attributes = {"rpc.system": "scopestate", "rpc.method": function_id}
            span = self._tracer.start_span(function_id, parent, SpanKind.SERVER, attributes)
        return _Served(span)

    def origin(self) -> TraceContext | None:
        with _contained():
            found = trace.get_current_span().get_span_context()
            if found.is_valid:
                return read_context(
                    f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}",
                    found.trace_state.to_header(),
                )
        return None

    @contextmanager
    def _span(
        self, name: str, kind: SpanKind, attributes: dict[str, Any], links: Sequence[Link], parent: Context | None
    ) -> Iterator[None]:
        span: Span | None = None
        token: Token[Context] | None = None
        with _contained():
            span = self._tracer.start_span(name, parent, kind, attributes, links)
            token = contexts.attach(trace.set_span_in_context(span, parent))
        try:
            yield
        except BaseException as error:
            if span is not None:
                with _contained():
                    _fail(span, error)
            raise
        finally:
            if token is not None:
                with _contained():
                    contexts.detach(token)
            if span is not None:
                with _contained():
                    span.end()


class _Served:
    """The server span of one call; the span is None if the tracer has raised."""

    def __init__(self, span: Span | None) -> None:
        self._span = span

    @contextmanager
    def attached(self) -> Iterator[None]:
        token: Token[Context] | None = None
        if self._span is not None:
            with _contained():
                token = contexts.attach(trace.set_span_in_context(self._span, Context()))
        try:
            yield
        finally:
            if token is not None:
                with _contained():
                    contexts.detach(token)

    def fail(self, error: Exception) -> None:
        if self._span is not None:
            with _contained():
                _fail(self._span, error)

    def end(self) -> None:
        if self._span is not None:
            with _contained():
                self._span.end()


def _span_context(context: TraceContext) -> SpanContext:
    _, trace_id, span_id, flags = context.traceparent.split("-")
    state = TraceState.from_header([context.tracestate]) if context.tracestate else None
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)), state)


def _fail(span: Span, error: BaseException) -> None:
    if isinstance(error, RetryLater):  # the handler asks for it
        span.set_attribute("scopestate.retry_later", True)
        return
    span.set_attribute("error.type", _type_of(error))
    # Not the text of the error, nor its traceback: they may have keys and values.
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))


def _type_of(error: BaseException) -> str:
    """Return the code of an error of the engine, or the name of its class."""
    code = getattr(error, "code", None) if isinstance(error, ScopestateError) else None
    return code if isinstance(code, str) else f"{type(error).__module__}.{type(error).__qualname__}"


@contextmanager
def _contained() -> Iterator[None]:
    """Log exceptions of a tracer: they must not reach the program."""
    try:
        yield
    except Exception:
        log.exception("a span, or a measurement, was lost")
