"""The trace of a call reaches what the call causes: events, deliveries to workers, other engines."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import pytest
from raw import PATIENCE_S
from serving import OpenRaw

from scopestate import Engine
from scopestate.observing import origin_of
from scopestate.ops.trace_context import TraceContext, TracedDepth
from scopestate.server.server import Server
from scopestate.wire.client import Client
from scopestate.wire.depth import depth_in, event_depth

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
OTHER = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def seen(engine: Engine) -> queue.Queue[Any]:
    """What a handler of the program gets."""
    events: queue.Queue[Any] = queue.Queue()
    engine.on_change(scope="s")(events.put)
    return events


def test_an_event_has_the_trace_of_the_call_of_a_worker(connect: OpenRaw, seen: queue.Queue[Any]) -> None:
    worker = connect()
    worker.call("state::set", {"scope": "s", "key": "1", "value": 1}, traceparent=PARENT, tracestate="a=1")
    worker.call("state::set", {"scope": "s", "key": "2", "value": 1})
    worker.call("state::set", {"scope": "s", "key": "3", "value": 1}, traceparent=PARENT, baggage="scopestate-depth=2")

    first, second, third = (seen.get(timeout=PATIENCE_S) for _ in range(3))
    assert origin_of(first) == TraceContext(PARENT, "a=1")
    assert origin_of(second) is None
    assert (origin_of(third), third.depth) == (TraceContext(PARENT), 2)


@pytest.mark.parametrize(
    "bad", ["tp", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "x" * 100_000, PARENT + "\u0000", PARENT.upper()]
)
def test_a_bad_header_is_ignored_and_the_call_is_made(connect: OpenRaw, seen: queue.Queue[Any], bad: str) -> None:
    worker = connect()
    worker.call("state::set", {"scope": "s", "key": "1", "value": 1}, traceparent=bad, tracestate="\u0000" * 1000)
    event = seen.get(timeout=PATIENCE_S)
    assert (event.key, origin_of(event)) == ("1", None)


@pytest.mark.parametrize("condition", [False, True], ids=["plain", "condition"])
def test_a_delivery_to_a_worker_has_the_trace_of_the_writer(connect: OpenRaw, *, condition: bool) -> None:
    worker, writer = connect(), connect()
    worker.register("on")
    config: dict[str, Any] = {"scope": "s"}
    if condition:
        worker.register("asks")
        config["condition_function_id"] = "asks"
    worker.trigger("on", config)
    for number, fields in enumerate([{"traceparent": PARENT, "tracestate": "a=1"}, {}]):
        writer.call("state::set", {"scope": "s", "key": "k", "value": number}, **fields)
        if condition:
            worker.answer(worker.take("asks"), result=True)
        call = worker.take("on")
        worker.answer(call)
        assert {name: call[name] for name in ("traceparent", "tracestate") if name in call} == fields
        assert depth_in(call["baggage"]) == 1


def test_a_batch_names_a_trace_only_if_all_its_events_have_it(connect: OpenRaw) -> None:
    worker, writer = connect(), connect()
    worker.register("on")
    worker.trigger("on", {"scope": "s", "batch": 2, "batch_wait": PATIENCE_S})
    for first, second, expected in ((PARENT, PARENT, PARENT), (PARENT, OTHER, None)):
        for key, header in (("a", first), ("b", second)):
            writer.call("state::set", {"scope": "s", "key": key, "value": 1}, traceparent=header)
        call = worker.take("on")
        worker.answer(call)
        assert call.get("traceparent") == expected


@pytest.mark.asyncio
async def test_calls_of_a_client_carry_the_trace_of_the_running_code(server: Server, seen: queue.Queue[Any]) -> None:
    client = Client(server.url)
    context = TraceContext(PARENT, 'a="1"')
    handled: asyncio.Queue[int] = asyncio.Queue()

    async def handler(payload: bytes) -> bytes:
        handled.put_nowait(event_depth.get())
        return b"null"

    client.register_function("on", handler)
    client.register_trigger("state", "on", {"scope": "s"})
    client.start()
    try:
        token = event_depth.set(TracedDepth.of(0, context))
        await client.call("state::set", {"scope": "s", "key": "k", "value": 1})
        event_depth.reset(token)
        depth = await asyncio.wait_for(handled.get(), PATIENCE_S)
    finally:
        await client.close()

    assert origin_of(seen.get(timeout=PATIENCE_S)) == context
    assert isinstance(depth, TracedDepth)
    assert (depth, depth.context) == (1, context)
