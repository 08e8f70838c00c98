"""The trace of a write is in its event for every engine that shares the events, and for durable triggers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from event_engines import STREAM, Engines, Seen, config
from one_server import PATIENCE_S
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from servers import Server

from scopestate import Conflict, Engine, Retry, StateEvent, ops
from scopestate.config.loader import from_mapping
from scopestate.integrations.opentelemetry import instrument
from scopestate.observing import Peer, origin_of, peer_of
from scopestate.ops.trace_context import TraceContext, TracedDepth
from scopestate.wire.depth import event_depth

TRACE = "0af7651916cd43dd8448eb211c80319c"
FIRST = TraceContext(f"00-{TRACE}-b7ad6b7169203331-01", "a=1,b=2 3")
SECOND = TraceContext(f"00-{TRACE}-00f067aa0ba902b7-00")


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


@contextmanager
def traced(context: TraceContext | None, depth: int = 0) -> Iterator[None]:
    token = event_depth.set(TracedDepth.of(depth, context))
    try:
        yield
    finally:
        event_depth.reset(token)


@pytest.mark.parametrize("revisions", [True, False])
def test_every_engine_sees_the_trace_of_a_write(redis_server: Server, engines: Engines, *, revisions: bool) -> None:
    writer, other = (engines.open(redis_server, revisions=revisions) for _ in range(2))
    seen = [Seen(writer), Seen(other)]
    for number, (context, depth) in enumerate([(FIRST, 0), (None, 0), (SECOND, 3), (None, 2)]):
        with traced(context, depth):
            writer.set("orders", str(number), number)
    for one in seen:
        events = one.wait_for_count(4)
        assert [(origin_of(event), event.depth) for event in events] == [
            (FIRST, 0), (None, 0), (SECOND, 3), (None, 2),
        ]  # fmt: skip


@pytest.mark.parametrize("revisions", [True, False])
def test_writes_that_are_sent_together_keep_their_traces(
    redis_server: Server, engines: Engines, *, revisions: bool
) -> None:
    writer = engines.open(redis_server, revisions=revisions)
    seen = Seen(writer)
    together = threading.Barrier(8)

    def write(of: int) -> None:
        together.wait(PATIENCE_S)
        for number in range(30):
            context = TraceContext(f"00-{TRACE}-{of + 1:08x}{number:08x}-01") if of % 2 else None
            with traced(context):
                writer.set("orders", f"{of}", number)

    threads = [threading.Thread(target=write, args=(of,)) for of in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for event in seen.wait_for_count(8 * 30):
        of, number = int(event.key), event.new_value
        expected = TraceContext(f"00-{TRACE}-{of + 1:08x}{number:08x}-01") if of % 2 else None
        assert origin_of(event) == expected


def test_a_durable_trigger_of_another_engine_gets_the_trace(redis_server: Server, engines: Engines) -> None:
    def open_one() -> Engine:
        return engines.open(redis_server, revisions=True)

    seen: dict[tuple[str, int], TraceContext | None] = {}
    both = threading.Event()

    def handle(event: StateEvent, delivery: Any) -> None:
        seen[event.key, delivery.attempt] = origin_of(event)
        if len(seen) == 3:
            both.set()
        if event.key == "traced" and delivery.attempt == 1:
            raise ValueError

    with Engine.from_config(config(redis_server, revisions=True)) as first:
        first.on_change(scope="orders", durable="ship")(handle)
    writer, other = open_one(), open_one()
    with traced(FIRST):
        writer.set("orders", "traced", 1)
    writer.set("orders", "plain", 1)
    other.on_change(scope="orders", durable="ship", retry=Retry(first=0.001))(handle)
    assert both.wait(PATIENCE_S), seen
    assert seen == {("traced", 1): FIRST, ("traced", 2): FIRST, ("plain", 1): None}


def test_an_entry_has_a_trace_only_if_the_write_had_one(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    engine.set("orders", "plain", 1)
    with traced(FIRST):
        engine.set("orders", "traced", 1)
    plain, with_trace = (entry[1] for entry in valkey.ask("XRANGE", STREAM, "-", "+"))
    assert set(with_trace) - set(plain) == {"t"}
    assert with_trace["t"] == FIRST.text


def test_a_trace_that_is_not_one_is_ignored(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    seen = Seen(engine)
    engine.set("orders", "first", 1)
    valkey.ask("INCR", "scopestate:count:state:")
    valkey.ask("XADD", STREAM, "*", "n", "2", "s", "orders", "k", "odd", "v", "1", "t", b"\xff\x00")
    events = seen.wait_for_count(2)
    assert [(event.key, origin_of(event)) for event in events] == [("first", None), ("odd", None)]


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    made = InMemorySpanExporter()
    yield made
    made.shutdown()


def test_calls_are_client_spans_that_name_the_server_and_handlers_are_linked_to_them(
    redis_server: Server, engines: Engines, exporter: InMemorySpanExporter
) -> None:
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    writer, other = engines.open(redis_server, revisions=True), engines.open(redis_server, revisions=True)
    seen = Seen(other)
    for engine in (writer, other):
        instrument(engine, tracer_provider=tracers)
    with pytest.raises(Conflict), tracers.get_tracer("the program").start_as_current_span("request"):
        writer.set("orders", "secret-key", "secret-value")
        writer.update("orders", "secret-key", [ops.Set("", 2)])
        writer.keys("orders")
        writer.set("orders", "secret-key", 1, if_absent=True)
    seen.wait_for_count(2)
    other.drain(PATIENCE_S)

    spans = exporter.get_finished_spans()
    calls = [one for one in spans if one.kind is SpanKind.CLIENT]
    assert [one.name for one in calls] == ["set orders", "update orders", "list_keys orders", "set orders"]
    host, port = redis_server.url.removeprefix("redis://").split(":")
    for one in calls:
        found = dict(one.attributes or {})
        assert found.pop("error.type", None) == ("CONFLICT" if one is calls[3] else None)
        assert found == {
            "db.system.name": "redis",
            "db.namespace": "0",
            "db.operation.name": one.name.split()[0],
            "db.collection.name": "orders",
            "server.address": host,
            "server.port": int(port),
        }
    handled = [one for one in spans if one.kind is SpanKind.CONSUMER]
    assert [[link.context.span_id for link in one.links] for one in handled] == [
        [one.context.span_id] for one in calls[:2] if one.context
    ]
    assert "secret" not in "".join(one.to_json() for one in calls + handled)


@pytest.mark.parametrize(
    ("options", "peer"),
    [
        ({"redis_url": "unix:///run/redis.sock?db=3"}, Peer("/run/redis.sock", 0, "3")),
        ({"redis_url": "rediss://user:secret@db.example:7000/2", "database": 4}, Peer("db.example", 7000, "4")),
        ({"sentinels": ["sentinel.example:26379"]}, Peer("", 0, "0")),
    ],
)
def test_the_server_is_named_without_its_login(options: dict[str, Any], peer: Peer) -> None:
    worker = {"name": "iii-state", "config": {"adapter": {"name": "redis", "config": options}}}
    engine: Any = SimpleNamespace(_parts=SimpleNamespace(config=from_mapping({"workers": [worker]})))
    assert peer_of(engine) == peer
