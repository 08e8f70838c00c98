"""Traces that leave the process: through a bridge, to the owner of a directory, through Redis, and after a restart."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from scopestate import Engine
from scopestate.errors import RemoteFailure
from scopestate.integrations.opentelemetry import instrument
from scopestate.ops.trace_context import TraceContext, TracedDepth
from scopestate.server import Server
from scopestate.wire.client import Client
from scopestate.wire.depth import event_depth

PATIENCE_S = 60.0


class Program:
    """The traces of one program. Two of them in a test stand for two processes."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.tracers.get_tracer("the program")

    def spans(self, kind: SpanKind) -> list[ReadableSpan]:
        return [one for one in self._exporter.get_finished_spans() if one.kind is kind]


@pytest.fixture
def programs() -> Iterator[tuple[Program, Program]]:
    made = Program(), Program()
    yield made
    for one in made:
        one.tracers.shutdown()


def worker(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": name, "config": options}}}]}


def in_directory(path: Path) -> dict[str, Any]:
    return worker("kv", {"store_method": "file_based", "file_path": str(path), "share": "auto"})


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


class Handler:
    """A handler whose end can be waited for."""

    def __init__(self, count: int = 1) -> None:
        self._left = count
        self._done = threading.Event()

    def __call__(self, event: Any) -> None:
        self._left -= 1
        if not self._left:
            self._done.set()

    def wait(self, *engines: Engine) -> None:
        assert self._done.wait(PATIENCE_S)
        for engine in engines:
            engine.drain(PATIENCE_S)


@pytest.fixture(params=["bridge", "follower"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """An engine that has the scopes, and one that calls it."""
    if request.param == "bridge":
        with Engine() as home, Server(home, port=0) as server:
            options = {"bridge_url": server.url, "events": "remote"}
            away = Engine.from_config(worker("bridge", options))
            yield home, away
            away.close()
    else:
        config = in_directory(tmp_path / "store")
        with Engine.from_config(config) as home, Engine.from_config(config) as away:
            yield home, away


def test_handlers_at_both_ends_are_linked_to_the_client_span_of_the_writer(
    pair: tuple[Engine, Engine], programs: tuple[Program, Program]
) -> None:
    handlers = Handler(), Handler()
    for engine, program, handler in zip(pair, programs, handlers, strict=True):
        engine.on_change(scope="orders", function_id="ship")(handler)
        instrument(engine, tracer_provider=program.tracers)
    away = programs[1]

    with away.tracer.start_as_current_span("request"):
        pair[1].set("orders", "k", 1)
    for handler in handlers:
        handler.wait(*pair)

    (client,) = away.spans(SpanKind.CLIENT)
    (served,) = programs[0].spans(SpanKind.SERVER)
    assert served.parent is not None
    assert served.parent.span_id == ids(client)[1]
    (here,), (there,) = (program.spans(SpanKind.CONSUMER) for program in programs)
    assert [(link.context.trace_id, link.context.span_id) for link in here.links] == [ids(served)]
    # The change that the bridge is told of comes from the server; the answer that a bridge takes, from its own call.
    assert {link.context.span_id for link in there.links} == {ids(served)[1]}
    assert here.links[0].context.is_remote


def test_the_write_of_the_owner_is_linked_in_the_other_engine(
    pair: tuple[Engine, Engine], programs: tuple[Program, Program]
) -> None:
    home, away = pair
    handler = Handler()
    away.on_change(scope="orders")(handler)
    for engine, program in zip(pair, programs, strict=True):
        instrument(engine, tracer_provider=program.tracers)

    with programs[0].tracer.start_as_current_span("request") as request:
        home.set("orders", "k", 1)
    handler.wait(home, away)

    (handled,) = programs[1].spans(SpanKind.CONSUMER)
    assert [link.context.span_id for link in handled.links] == [request.get_span_context().span_id]


def test_a_write_without_a_span_has_no_link_although_the_one_before_had_one(
    pair: tuple[Engine, Engine], programs: tuple[Program, Program]
) -> None:
    home, away = pair
    handler = Handler(2)
    home.on_change(scope="orders")(handler)
    end = instrument(away, tracer_provider=programs[1].tracers)
    instrument(home, tracer_provider=programs[0].tracers)
    away.set("orders", "k", 1)
    end()
    away.set("orders", "k", 2)
    handler.wait(home)

    assert [len(one.links) for one in programs[0].spans(SpanKind.CONSUMER)] == [1, 0]


def test_a_durable_trigger_of_a_follower_is_linked_to_the_writer_in_the_owner(
    tmp_path: Path, programs: tuple[Program, Program]
) -> None:
    config = in_directory(tmp_path / "store")
    handler = Handler()
    with Engine.from_config(config) as owner, Engine.from_config(config) as follower:
        follower.on_change(scope="orders", durable="ship")(handler)
        for engine, program in zip((owner, follower), programs, strict=True):
            instrument(engine, tracer_provider=program.tracers)
        with programs[0].tracer.start_as_current_span("request") as request:
            owner.set("orders", "k", 1)
        owner.flush()
        handler.wait(follower)

        (handled,) = programs[1].spans(SpanKind.CONSUMER)
        assert [link.context.span_id for link in handled.links] == [request.get_span_context().span_id]


def test_an_event_from_before_a_restart_is_linked_to_its_writer(
    tmp_path: Path, programs: tuple[Program, Program]
) -> None:
    config = in_directory(tmp_path / "store")
    before, after = programs
    handler = Handler()
    with Engine.from_config(config) as engine:
        engine.on_change(scope="orders", durable="ship")(Handler())
        engine.consumers().pause("ship")
        instrument(engine, tracer_provider=before.tracers)
        with before.tracer.start_as_current_span("request") as request:
            engine.set("orders", "k", 1)
    with Engine.from_config(config) as engine:
        instrument(engine, tracer_provider=after.tracers)
        engine.on_change(scope="orders", durable="ship")(handler)
        engine.consumers().resume("ship")
        handler.wait(engine)

        (handled,) = after.spans(SpanKind.CONSUMER)
        assert [link.context.span_id for link in handled.links] == [request.get_span_context().span_id]
        assert handled.parent is None


def test_what_the_server_does_for_a_call_is_within_the_trace_of_the_caller(
    programs: tuple[Program, Program], tmp_path: Path
) -> None:
    """A state function, one of the program that makes a span of its own, one that fails, and a write that waits."""
    home_program, away_program = programs
    config = worker("kv", {"store_method": "file_based", "file_path": str(tmp_path / "s"), "durability": "commit"})
    with Engine.from_config(config) as home, Server(home, port=0) as server:

        def double(payload: Any) -> Any:
            with home_program.tracer.start_as_current_span("work"):
                return payload["n"] * 2

        def fail(payload: Any) -> None:
            raise ValueError("secret")

        home.register_function("double", double)
        home.register_function("fail", fail)
        home.on_change(scope="orders")(Handler())
        instrument(home, tracer_provider=home_program.tracers)
        with Engine.from_config(worker("bridge", {"bridge_url": server.url})) as away:
            instrument(away, tracer_provider=away_program.tracers)
            away.set("orders", "k", 1)
            away.get("orders", "k")
            assert asyncio.run(_call(server.url, away_program, "double", {"n": 4})) == 8
            with pytest.raises(RemoteFailure):
                asyncio.run(_call(server.url, away_program, "fail", {}))
            with pytest.raises(RemoteFailure):
                asyncio.run(_call(server.url, away_program, "missing", {}))
        home.drain(PATIENCE_S)

    clients = [ids(one) for one in away_program.spans(SpanKind.CLIENT)]
    served = {one.name: one for one in home_program.spans(SpanKind.SERVER)}
    assert set(served) == {"state::set", "state::get", "double", "fail"}
    for name, caller in zip(("state::set", "state::get"), clients, strict=True):
        parent = served[name].parent
        assert parent is not None
        assert (parent.trace_id, parent.span_id) == caller
        assert parent.is_remote
    assert dict(served["double"].attributes or {}) == {"rpc.system": "scopestate", "rpc.method": "double"}
    (work,) = home_program.spans(SpanKind.INTERNAL)
    assert work.parent is not None
    assert work.parent.span_id == ids(served["double"])[1]
    assert (served["fail"].attributes or {})["error.type"] == "invocation_failed"
    assert "secret" not in served["fail"].to_json()
    (handled,) = home_program.spans(SpanKind.CONSUMER)
    assert [link.context.span_id for link in handled.links] == [ids(served["state::set"])[1]]


async def _call(url: str, program: Program, function_id: str, payload: Any) -> Any:
    """Call a function as a program does that is part of a trace."""
    client = Client(url)
    client.start()
    try:
        with program.tracer.start_as_current_span("request") as span:
            found = span.get_span_context()
            context = TraceContext(f"00-{found.trace_id:032x}-{found.span_id:016x}-01")
            event_depth.set(TracedDepth.of(0, context))
            return await client.call(function_id, payload)
    finally:
        await client.close()
