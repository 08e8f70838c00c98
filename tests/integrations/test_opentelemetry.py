"""Traces of an engine, as OpenTelemetry's own SDK gets them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from scopestate import Conflict, Engine, Retry, RetryLater, ScopestateError
from scopestate.integrations.opentelemetry import instrument, uninstrument
from scopestate.observing import peer_of
from scopestate.server import Server

PATIENCE_S = 60.0


class Traces:
    """A tracer and a meter that keep what they get."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.tracers.get_tracer("the program")

    def of(self, engine: Engine, **options: Any) -> Any:
        return instrument(engine, tracer_provider=self.tracers, meter_provider=self.meters, **options)

    def spans(self, kind: SpanKind | None = None) -> list[ReadableSpan]:
        return [one for one in self.exporter.get_finished_spans() if kind is None or one.kind is kind]

    def durations(self) -> dict[tuple[str, ...], int]:
        """Return how often each operation was measured, by operation and error."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {
            (str(point.attributes["db.operation.name"]), str(point.attributes.get("error.type", ""))): point.count
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
            if metric.name == "db.client.operation.duration" and metric.unit == "s"
        }


@pytest.fixture
def traces() -> Iterator[Traces]:
    made = Traces()
    yield made
    made.tracers.shutdown()
    made.meters.shutdown()


@pytest.fixture
def remote() -> Iterator[Engine]:
    """An engine whose scopes are in another one."""
    with Engine() as other, Server(other, port=0) as server:
        options = {"bridge_url": server.url}
        config = {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "bridge", "config": options}}}]}
        with Engine.from_config(config) as engine:
            yield engine


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_calls_that_leave_the_process_are_client_spans_by_the_database_conventions(
    remote: Engine, traces: Traces
) -> None:
    traces.of(remote)
    with traces.tracer.start_as_current_span("request") as request:
        remote.set("orders", "secret-key", "secret-value")
        remote.scope("orders").get("secret-key")
        remote.keys("orders")
        with pytest.raises(Conflict):
            remote.set("orders", "secret-key", 2, if_absent=True)
        with remote.batch("orders") as batch:
            batch.set("a", 1)
        remote.list_groups()

    spans = traces.spans(SpanKind.CLIENT)

    assert [one.name for one in spans] == [
        "set orders", "get orders", "list_keys orders", "set orders", "transaction orders", "list_groups",
    ]  # fmt: skip
    assert attributes(spans[0]) == {
        "db.system.name": "scopestate",
        "db.operation.name": "set",
        "db.collection.name": "orders",
        "server.address": "127.0.0.1",
        "server.port": peer_of(remote).port,
    }
    assert peer_of(remote).port > 0
    assert all(one.parent is not None and one.parent.span_id == request.get_span_context().span_id for one in spans)
    assert [one.status.status_code for one in spans] == [StatusCode.UNSET] * 3 + [StatusCode.ERROR] + [
        StatusCode.UNSET
    ] * 2
    assert attributes(spans[3])["error.type"] == "CONFLICT"
    assert "secret" not in "".join(one.to_json() for one in spans)
    assert traces.durations()["set", ""] == 1
    assert traces.durations()["set", "CONFLICT"] == 1


def test_asyncio_calls_are_spans_too_each_in_its_task(remote: Engine, traces: Traces) -> None:
    traces.of(remote)

    async def request(number: int) -> None:
        with traces.tracer.start_as_current_span(f"request {number}"):
            await remote.aio.set("orders", f"k{number}", number)
            assert await remote.aio.get("orders", f"k{number}") == number

    async def main() -> None:
        await asyncio.gather(*[request(number) for number in range(5)])

    asyncio.run(main())

    parents = {one.context.span_id: one.name for one in traces.spans(SpanKind.INTERNAL) if one.context}
    of = [(parents[one.parent.span_id], one.name) for one in traces.spans(SpanKind.CLIENT) if one.parent]
    assert sorted(of) == sorted((f"request {n}", f"{what} orders") for n in range(5) for what in ("set", "get"))


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "asyncio"])
def test_a_handler_is_a_consumer_span_linked_to_its_writer(traces: Traces, *, is_async: bool) -> None:
    with Engine() as engine:

        def handle(event: Any) -> None:
            with traces.tracer.start_as_current_span("work"):
                if event.scope == "orders":
                    engine.set("stock", "secret-key", 1)

        async def handle_later(event: Any) -> None:
            await asyncio.sleep(0)
            with traces.tracer.start_as_current_span("work"):
                if event.scope == "orders":
                    await engine.aio.set("stock", "secret-key", 1)

        engine.on_change(function_id="ship")(handle_later if is_async else handle)
        traces.of(engine)
        with traces.tracer.start_as_current_span("request") as request:
            engine.set("orders", "secret-key", "secret-value")
        engine.drain(PATIENCE_S)

        first, second = sorted(traces.spans(SpanKind.CONSUMER), key=lambda one: one.start_time or 0)
        work = {one.parent.span_id: one for one in traces.spans() if one.name == "work" and one.parent}
        assert first.name == "handle ship"
        assert attributes(first) == {
            "messaging.system": "scopestate",
            "messaging.operation.name": "handle",
            "messaging.operation.type": "process",
            "messaging.destination.name": "orders",
            "scopestate.function_id": "ship",
            "scopestate.event_type": "state:created",
            "scopestate.attempt": 1,
        }
        assert first.parent is None
        assert [link.context.span_id for link in first.links] == [request.get_span_context().span_id]
        assert first.context is not None
        within = work[first.context.span_id].context
        assert within is not None
        assert [link.context.span_id for link in second.links] == [within.span_id]
        assert traces.spans(SpanKind.CLIENT) == []
        assert "secret" not in "".join(one.to_json() for one in traces.spans())


def test_the_link_is_to_the_writer_also_if_another_thread_makes_the_write(traces: Traces) -> None:
    writers = 8
    with Engine() as engine:
        engine.on_change(scope="orders")(lambda event: None)
        traces.of(engine, keys=True)
        together = threading.Barrier(writers)

        def write(number: int) -> None:
            together.wait(PATIENCE_S)
            for turn in range(50):
                with traces.tracer.start_as_current_span(f"{number}-{turn}"):
                    engine.set("orders", f"{number}-{turn}", turn)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        engine.drain(PATIENCE_S)

    names = {one.context.span_id: one.name for one in traces.spans(SpanKind.INTERNAL) if one.context}
    handled = traces.spans(SpanKind.CONSUMER)
    assert len(handled) == writers * 50
    for one in handled:
        assert [names[link.context.span_id] for link in one.links] == list(attributes(one)["scopestate.keys"])


def test_each_attempt_is_a_span_and_failures_are_seen(traces: Traces) -> None:
    config = {"limits": {"handler_attempts": 3, "handler_backoff_ms": 1}}
    with Engine.from_config(config) as engine:

        @engine.on_change(scope="orders", function_id="ship")
        def ship(event: Any) -> None:
            if attempts.append(1) or len(attempts) < 3:
                raise ValueError("secret-text")

        attempts: list[int] = []
        traces.of(engine)
        engine.set("orders", "k", 1)
        engine.drain(PATIENCE_S)

    spans = traces.spans(SpanKind.CONSUMER)
    assert [attributes(one)["scopestate.attempt"] for one in spans] == [1, 2, 3]
    assert [attributes(one).get("error.type") for one in spans] == ["builtins.ValueError", "builtins.ValueError", None]
    assert [one.status.status_code for one in spans] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert "secret" not in "".join(one.to_json() for one in spans)


@pytest.mark.parametrize("takes_delivery", [False, True], ids=["event", "event-delivery"])
def test_durable_triggers_have_their_consumer_and_attempt(
    tmp_path: Path, traces: Traces, *, takes_delivery: bool
) -> None:
    options = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    config = {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}
    calls: list[Any] = []
    third = threading.Event()

    def ship(event: Any) -> None:
        calls.append(event)
        if len(calls) == 3:
            third.set()
        if len(calls) == 1:
            raise RetryLater(0.001)  # which is no failure, and no further attempt
        if len(calls) == 2:
            raise ValueError

    def ship_delivery(event: Any, delivery: Any) -> None:
        assert delivery.consumer == "ship"
        ship(event)

    with Engine.from_config(config) as engine:
        traces.of(engine)
        engine.on_change(scope="orders", durable="ship", retry=Retry(first=0.001))(
            ship_delivery if takes_delivery else ship
        )
        with traces.tracer.start_as_current_span("request") as request:
            engine.set("orders", "k", 1)
        engine.flush()
        assert third.wait(PATIENCE_S)
        engine.drain(PATIENCE_S)

        spans = traces.spans(SpanKind.CONSUMER)
        assert [attributes(one)["scopestate.attempt"] for one in spans] == [1, 1, 2]
        assert [attributes(one)["messaging.consumer.group.name"] for one in spans] == ["ship"] * 3
        assert [attributes(one).get("scopestate.retry_later") for one in spans] == [True, None, None]
        assert [attributes(one).get("error.type") for one in spans] == [None, "builtins.ValueError", None]
        assert [[link.context.span_id for link in one.links] for one in spans] == [
            [request.get_span_context().span_id]
        ] * 3


def test_a_batch_is_one_span_with_a_link_for_each_writer(traces: Traces) -> None:
    with Engine() as engine:
        engine.on_change(scope="orders", batch=3, batch_wait=PATIENCE_S)(lambda events: None)
        traces.of(engine)
        for number in range(3):
            with traces.tracer.start_as_current_span("request"):
                engine.set("orders", str(number), number)
        engine.drain(PATIENCE_S)

    (span,) = traces.spans(SpanKind.CONSUMER)
    assert attributes(span)["messaging.batch.message_count"] == 3
    assert {link.context.span_id for link in span.links} == {
        one.context.span_id for one in traces.spans(SpanKind.INTERNAL) if one.context
    }


def test_it_ends_and_may_begin_again(remote: Engine, traces: Traces) -> None:
    before = dict(vars(remote))
    target = remote._functions
    remote.register_function("f", lambda event: None)
    plain = target.get("f").target
    end = traces.of(remote)
    with pytest.raises(ScopestateError, match="observed already"):
        traces.of(remote)
    assert target.get("f").target is not plain
    end()
    end()

    assert target.get("f").target is plain
    assert {name for name in vars(remote) if name not in before} <= {"_aio"}
    remote.set("orders", "k", 1)
    assert traces.spans() == []
    traces.of(remote)
    remote.set("orders", "k", 1)
    uninstrument(remote)
    remote.set("orders", "k", 1)
    assert [one.name for one in traces.spans()] == ["set orders"]


class Raises(SpanProcessor):
    """Raises where it can."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("for the test")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("for the test")


def test_a_tracer_that_raises_costs_only_its_span(
    remote: Engine, traces: Traces, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[str] = []
    remote.on_change(scope="orders")(lambda event: handled.append(event.key))
    traces.tracers.add_span_processor(Raises())
    traces.of(remote)

    assert remote.set("orders", "k", 1).new_value == 1
    assert remote.get("orders", "k") == 1
    remote.drain(PATIENCE_S)

    assert handled == ["k"]
    assert remote.stats().failures == 0
    assert "a span, or a measurement, was lost" in caplog.text


def test_functions_that_are_called_by_id_are_not_handlers(traces: Traces) -> None:
    with Engine() as engine:
        engine.register_function("double", lambda payload: payload["n"] * 2)
        traces.of(engine)
        assert engine.call("double", {"n": 4}) == 8
        engine.unregister_function("double")
    assert traces.spans() == []
