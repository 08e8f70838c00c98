"""Handlers in workers that fire each other are cut at `max_event_depth`, as those in the process are."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from effort import size
from raw import PATIENCE_S, RawWorker
from sdks import SDKS
from serving import OpenRaw, OpenSdk

from scopestate import Engine
from scopestate.errors import EventLoopDetected
from scopestate.server.server import Server
from scopestate.wire.client import Client
from scopestate.wire.depth import depth_in, event_depth, with_depth

MOST = 20


class Looping:
    """An engine with a low `max_event_depth`, its server, and what is reported."""

    def __init__(self) -> None:
        self.failures: queue.Queue[Any] = queue.Queue()
        self.engine = Engine.from_config({"limits": {"max_event_depth": MOST}}, on_error=self.failures.put)
        self.server = Server(self.engine, port=0).start()

    def cut(self) -> Any:
        """Wait for the report of a loop that was cut; return it."""
        failure = self.failures.get(timeout=PATIENCE_S)
        assert isinstance(failure.error, EventLoopDetected), failure
        return failure


@pytest.fixture
def looping() -> Iterator[Looping]:
    made = Looping()
    yield made
    made.server.stop()
    made.engine.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("workers", [1, 2])
async def test_handlers_of_clients_that_fire_each_other_are_cut(looping: Looping, workers: int) -> None:
    ran: list[Any] = []
    clients = [Client(looping.server.url) for _ in range(workers)]

    def handler(own: Client, scope: str) -> Any:
        async def on(data: bytes) -> bytes:
            ran.append(scope)
            await asyncio.sleep(0)  # the depth is that of the task, not of the moment
            await own.call("state::set", {"scope": scope, "key": "k", "value": len(ran)})
            return b"null"

        return on

    for number, client in enumerate(clients):
        client.start()
        client.register_function(f"on{number}", handler(client, f"s{(number + 1) % workers}"))
        client.register_trigger("state", f"on{number}", {"scope": f"s{number}"})
        await client.call("state::list_groups", {})
    await clients[0].call("state::set", {"scope": "s0", "key": "k", "value": 0})

    failure = await asyncio.to_thread(looping.cut)
    assert failure.event.depth == MOST + 1
    assert len(ran) == MOST + 1
    for client in clients:
        await client.close()
    assert event_depth.get() == 0


def answer_with_writes(worker: RawWorker, count: int, **fields: Any) -> None:
    """Handle `count` events, each with a write before the answer."""
    for number in range(count):
        event = worker.take("on")
        fields = {name: event[name] for name in ("baggage",) if name in event and fields}
        worker.call("state::set", {"scope": "s", "key": "k", "value": number}, **fields)
        worker.answer(event)


@pytest.mark.parametrize("carries", [True, False])
def test_a_worker_of_any_kind_is_cut(looping: Looping, connect: OpenRaw, *, carries: bool) -> None:
    worker = connect(looping.server)
    worker.register("on")
    worker.trigger("on", {"scope": "s"})
    looping.engine.set("s", "k", -1)

    answer_with_writes(worker, MOST + 1, **({"baggage": "yes"} if carries else {}))

    assert looping.cut().event.depth == MOST + 1
    looping.engine.set("s", "k", -1)  # what comes from outside begins at 0 again
    assert depth_in(worker.take("on")["baggage"]) == 1


@pytest.mark.parametrize("ours", [True, False])
def test_only_the_calls_of_workers_that_do_not_carry_the_depth_are_guessed_at(
    looping: Looping, connect: OpenRaw, *, ours: bool
) -> None:
    header = {"additional_headers": {"Scopestate-Max-Message-Bytes": "1000000"}} if ours else {}
    worker, depths = connect(looping.server, **header), []

    def note(event: Any) -> None:
        depths.append(event.depth)

    looping.engine.on_change(scope="t")(note)
    worker.register("on")
    worker.trigger("on", {"scope": "s"})
    looping.engine.set("s", "k", -1)
    event = worker.take("on")
    worker.call("state::set", {"scope": "t", "key": "1", "value": 1})
    worker.call("state::set", {"scope": "t", "key": "2", "value": 1}, baggage=f"a=b, {event['baggage']};p=1")
    worker.call("state::set", {"scope": "t", "key": "3", "value": 1}, baggage="scopestate-depth=5")
    worker.answer(event)
    worker.call("state::set", {"scope": "t", "key": "4", "value": 1}, baggage="scopestate-depth=x")
    worker.call("state::set", {"scope": "t", "key": "5", "value": 1})
    looping.engine.drain(timeout=PATIENCE_S)

    assert depths == [0 if ours else 1, 1, 5, 0, 0]


def test_the_depth_goes_on_through_calls_of_other_workers_and_of_the_program(
    looping: Looping, connect: OpenRaw
) -> None:
    first, second = connect(looping.server), connect(looping.server)
    seen: queue.Queue[int] = queue.Queue()
    looping.engine.register_function("program.writes", lambda data: looping.engine.set("t", "program", 1) and None)
    looping.engine.on_change(scope="t")(lambda event: seen.put(event.depth))
    first.register("on")
    first.trigger("on", {"scope": "s"})
    second.register("other")
    looping.engine.set("s", "k", 1)
    event = first.take("on")

    first.invoke("other", {}, baggage="a=b")
    call = second.take("other")
    assert call["baggage"] == "a=b,scopestate-depth=1"
    second.call("state::set", {"scope": "t", "key": "other", "value": 1})
    second.answer(call)
    assert first.receive()["type"] == "invocationresult"
    first.call("program.writes", {})
    first.answer(event)

    assert [seen.get(timeout=PATIENCE_S) for _ in range(2)] == [1, 1]


def test_a_function_called_by_a_handler_of_the_program_knows_how_deep_it_is(looping: Looping, connect: OpenRaw) -> None:
    worker = connect(looping.server)
    worker.register("f")

    @looping.engine.on_change(scope="s")
    def handler(event: Any) -> None:
        looping.engine.call("f", {})

    looping.engine.set("s", "k", 1)
    call = worker.take("f")
    assert call["baggage"] == "scopestate-depth=1"
    worker.answer(call)
    looping.engine.drain(timeout=PATIENCE_S)
    thread = threading.Thread(target=looping.engine.call, args=("f", {}))
    thread.start()
    call = worker.take("f")
    assert "baggage" not in call
    worker.answer(call)
    thread.join(PATIENCE_S)


def test_a_bridge_carries_the_depth_both_ways_and_cuts_its_own_handlers(server: Server) -> None:
    adapter = {"name": "bridge", "config": {"bridge_url": server.url, "events": "remote"}}
    failures: queue.Queue[Any] = queue.Queue()
    config = {
        "workers": [{"name": "iii-state", "config": {"adapter": adapter}}],
        "limits": {"max_event_depth": MOST},
    }
    depths = []
    with Engine.from_config(config, on_error=failures.put) as bridge:

        @bridge.on_change(scope="s")
        def handler(event: Any) -> None:
            depths.append(event.depth)
            bridge.set("s", "k", len(depths))

        bridge.set("s", "k", 0)
        failure = failures.get(timeout=PATIENCE_S)
    assert isinstance(failure.error, EventLoopDetected), failure
    assert failure.event.depth == MOST + 1
    assert depths == list(range(MOST + 1))
    assert failures.empty()


@pytest.mark.timeout(600)  # the first use of an SDK installs it
@pytest.mark.parametrize(
    ("sdk", "telemetry"),  # in the suite, every other one: old and new, of either language, one with and one without
    [
        (sdk, telemetry)
        for place, sdk in enumerate(SDKS)
        for telemetry in (False, True)[place % size(2, 1) :: size(2, 1)]
    ],
)
def test_handlers_on_the_official_sdks_are_cut(
    looping: Looping, start_sdk: OpenSdk, sdk: str, *, telemetry: bool
) -> None:
    worker = start_sdk(sdk, looping.server, telemetry=telemetry)
    worker.do("register", id="on", answer="call", value="state::delete")  # of a missing key, too, is an event
    worker.do("trigger", name="t", type="state", function_id="on", config={"scope": "s"})
    worker.settle()

    looping.engine.set("s", "k", 1)

    failure = looping.cut()
    assert failure.event.depth == MOST + 1
    assert [worker.received()["key"] for _ in range(MOST + 1)] == ["k"] * (MOST + 1)


def test_the_entry_is_read_among_others_and_added_to_them() -> None:
    assert depth_in(None) == depth_in("") == depth_in("a=scopestate-depth=3") == 0
    assert depth_in("scopestate-depth=3") == depth_in("a=b , scopestate-depth = 3;x=y,c=d") == 3
    assert depth_in("scopestate-depth=-3") == depth_in("scopestate-depth=99999999999") == 0
    assert depth_in("xscopestate-depth=3") == 0
    assert with_depth(None, 2) == with_depth("", 2) == "scopestate-depth=2"
    assert with_depth("a=b", 2) == "a=b,scopestate-depth=2"
    assert with_depth("scopestate-depth=7,a=b", 2) == "scopestate-depth=7,a=b"
