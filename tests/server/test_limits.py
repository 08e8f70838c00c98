"""Slow readers, workers that never answer, floods, crowds: memory stays bounded and nobody else is harmed."""

from __future__ import annotations

import contextlib
import queue
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from raw import PATIENCE_S, Deaf
from serving import OpenRaw, server_config
from websockets.exceptions import ConnectionClosed, InvalidStatus

from scopestate import Engine
from scopestate.config import ServerConfig, from_mapping
from scopestate.errors import HandlerTimeout, RemoteFailure
from scopestate.ops.functions import BUILT_IN_IDS
from scopestate.server.server import Server

MEBIBYTE = 1024 * 1024


def memory() -> int:
    return psutil.Process().memory_info().rss


@pytest.fixture
def deaf(server: Server) -> Iterator[Deaf]:
    worker = Deaf(server)
    yield worker
    worker.socket.close()


def test_nothing_more_is_read_from_a_worker_that_does_not_read(deaf: Deaf, connect: OpenRaw, engine: Engine) -> None:
    engine.set("s", "big", "x" * MEBIBYTE)
    other = connect()
    before = memory()

    deaf.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):  # the server stops reading, so in the end sending waits
        deaf.invoke_for_ever("state::get", {"scope": "s", "key": "big"})

    assert memory() - before < 64 * MEBIBYTE
    assert other.call("state::get", {"scope": "s", "key": "none"}) is None


def test_a_worker_that_lets_too_much_wait_is_cut_off(connect: OpenRaw, caplog: pytest.LogCaptureFixture) -> None:
    with Engine() as engine, Server(engine, config=small(max_unsent_bytes=2 * MEBIBYTE)) as tight:
        deaf, caller, other = Deaf(tight), connect(tight), connect(tight)
        deaf.send({"type": "registerfunction", "id": "deaf.f"})
        while "deaf.f" not in {entry["name"] for entry in engine.functions()}:
            other.settle()

        before = memory()
        for _ in range(40):
            caller.invoke("deaf.f", "x" * MEBIBYTE)
        codes = {caller.receive()["error"]["code"] for _ in range(40)}

        assert codes <= {"invocation_stopped", "function_not_found"}
        assert "invocation_stopped" in codes
        assert memory() - before < 64 * MEBIBYTE
        assert other.call("state::list_groups", {}) == {"groups": []}
        assert "it reads too slowly" in caplog.text
        deaf.socket.close()


def small(**config: Any) -> ServerConfig:
    return server_config({"port": 0, **config})


def test_a_worker_that_never_answers_gets_its_callers_a_timeout(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=small(call_timeout_ms=200)) as hasty:
        silent, caller = connect(hasty), connect(hasty)
        silent.register("silent.f")

        error = caller.ask("silent.f", {})["error"]
        assert error == {"code": "TIMEOUT", "message": "function 'silent.f' did not answer within 0.2 s"}
        with pytest.raises(RemoteFailure) as caught:
            engine.call("silent.f", {})
        assert caught.value.code == "TIMEOUT"

        late = silent.take("silent.f")
        silent.answer(late, result="too late")
        silent.take("silent.f")
        silent.settle()
        assert caller.ask("state::list_groups", {})["result"] == {"groups": []}


def test_a_handler_that_never_answers_holds_up_nobody_else(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=small(max_waiting_events=1_000)) as strict:
        silent, busy = connect(strict), connect(strict)
        silent.register("silent.on")
        silent.trigger("silent.on", {"scope": "s"})
        busy.register("busy.on")
        busy.trigger("busy.on", {"scope": "s", "key": "last"})

        for number in range(2_000):
            engine.set("s", "k", number)
        engine.set("s", "last", 1)

        busy.answer(busy.take("busy.on"))
        code, reason = silent.closed_with()
        assert code == 1008
        assert "events wait for its function 'silent.on'" in reason
        engine.drain(timeout=PATIENCE_S)


def test_a_flood_of_registrations_is_closed_with_the_reason(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=small(max_registrations=100)) as strict:
        flooding, other = connect(strict), connect(strict)
        for number in range(101):
            flooding.send({"type": "registerfunction", "id": f"f{number}"})

        assert flooding.closed_with() == (1008, "more than 100 functions and triggers registered")
        assert other.call("state::list_groups", {}) == {"groups": []}
        while len(engine.functions()) > len(BUILT_IN_IDS):
            other.settle()


def test_a_flood_of_garbage_is_closed_with_the_reason(connect: OpenRaw) -> None:
    flooding, other = connect(), connect()

    with contextlib.suppress(ConnectionClosed):  # it may be told while it is still sending
        for _ in range(5_000):
            flooding.send("garbage")

    assert flooding.closed_with() == (1008, "more than 1000 malformed or refused messages")
    assert other.call("state::list_groups", {}) == {"groups": []}


def test_a_flood_of_calls_leaves_the_others_their_turn(server: Server, connect: OpenRaw, engine: Engine) -> None:
    engine.set("s", "k", 1)
    flooding, other = connect(), connect()
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            for _ in range(500):
                flooding.invoke("state::get", {"scope": "s", "key": "k"})
            for _ in range(500):
                flooding.receive()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(200):
            assert other.call("state::get", {"scope": "s", "key": "k"}) == 1
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the limit of open files: 1024 is usual, and one process holds both ends of each connection here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= 4096, f"the hard limit of open files is {hard}; 4096 are needed"
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_idle_connections(
    server: Server, connect: OpenRaw, engine: Engine, request: pytest.FixtureRequest
) -> None:
    crowd = []
    for _ in range(1_000):
        crowd.append(Deaf(server))
        request.addfinalizer(crowd[-1].socket.close)
    worker = connect()
    worker.register("on")
    worker.trigger("on", {"scope": "s"})

    engine.set("s", "k", 1)
    worker.answer(worker.take("on"))
    assert server.status().workers == 1_001

    for idle in crowd:
        idle.socket.close()
    while server.status().workers > 1:
        worker.settle()


def test_more_connections_than_allowed_are_answered_503(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=small(max_connections=2)) as strict:
        first, _ = connect(strict), connect(strict)
        with pytest.raises(InvalidStatus, match="503"):
            connect(strict)
        assert first.call("state::list_groups", {}) == {"groups": []}


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([(0xC1, b"{}")], 1002),  # a reserved bit
        ([(0x80, b"{}")], 1002),  # a continuation of nothing
        ([(0x01, b"{"), (0x81, b"}")], 1002),  # a message within a message
        ([(0x83, b"")], 1002),  # an opcode that does not exist
        ([(0x09, b"")], 1002),  # a ping in pieces
        ([(0x81, b"\xff")], 1007),
        ([(0x01, b"\xc3"), (0x80, b"\x28")], 1007),
    ],
)
def test_broken_frames_close_with_the_code_that_the_rfc_names(
    server: Server, connect: OpenRaw, frames: list[tuple[int, bytes]], code: int
) -> None:
    broken, other = Deaf(server), connect()

    for opcode, payload in frames:
        broken.send(payload, opcode)

    assert closing_code(broken.socket) == code
    assert other.call("state::list_groups", {}) == {"groups": []}
    broken.socket.close()


def closing_code(from_server: socket.socket) -> int:
    """Read frames until the close frame; return its code."""
    stream = from_server.makefile("rb")
    while True:
        opcode, size = stream.read(2)
        if size == 126:
            size = int.from_bytes(stream.read(2), "big")
        payload = stream.read(size)
        if opcode == 0x88:
            return int.from_bytes(payload[:2], "big")


def test_a_character_in_two_fragments_is_text(server: Server) -> None:
    split = Deaf(server)
    ping = '{"type":"ping","é":1}'.encode()
    where = ping.index("é".encode()) + 1

    split.send(ping[:where], 0x01)
    split.send(ping[where:], 0x80)

    stream = split.socket.makefile("rb")
    messages = [stream.read(stream.read(2)[1]) for _ in range(2)]
    assert messages[1] == b'{"type":"pong"}'
    split.socket.close()


def test_calls_wait_for_a_store_without_holding_up_others(connect: OpenRaw, tmp_path: Any) -> None:
    store = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(tmp_path), "durability": "commit"}}
    config = {"workers": [{"name": "iii-state", "config": {"adapter": store}}]}
    with Engine.from_config(config) as engine, Server(engine, port=0) as server:
        worker = connect(server)
        events: queue.Queue[Any] = queue.Queue()
        engine.on_change(scope="s")(events.put)

        ids = [worker.invoke("state::set", {"scope": "s", "key": f"k{n}", "value": n}) for n in range(100)]
        answers = {answer["invocation_id"]: answer for answer in (worker.receive() for _ in ids)}

        assert set(answers) == set(ids)
        assert all("error" not in answer for answer in answers.values())
        assert worker.call("state::list", {"scope": "s"}) == list(range(100))
        assert [events.get(timeout=PATIENCE_S).new_value for _ in range(100)] == list(range(100))


def test_a_worker_that_reads_nothing_is_cut_off_in_the_end(
    server: Server, deaf: Deaf, connect: OpenRaw, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.set("s", "big", "x" * 3 * MEBIBYTE)
    other = connect()
    for _ in range(3):
        deaf.invoke("state::get", {"scope": "s", "key": "big"})
    looked = threading.Event()

    def look() -> None:
        for connection in server._connections.all():
            connection.look_for_progress()
        looked.set()

    assert server._loop is not None
    while server.status().workers > 1:  # what a timer does every 15 seconds
        other.settle()
        looked.clear()
        server._loop.call_soon_threadsafe(look)
        assert looked.wait(PATIENCE_S)

    assert "it reads nothing, although" in caplog.text
    assert other.call("state::list_groups", {}) == {"groups": ["s"]}


def test_a_failed_delivery_to_a_worker_is_reported_and_tried_again(connect: OpenRaw) -> None:
    reports: queue.Queue[Any] = queue.Queue()
    config = {"limits": {"handler_attempts": 3, "handler_backoff_ms": 1}}
    with Engine.from_config(config, on_error=reports.put) as engine, Server(engine, port=0) as server:
        worker = connect(server)
        worker.register("on")
        worker.trigger("on", {})
        engine.set("s", "k", 1)
        engine.set("s", "k", 2)

        for attempt in (1, 2):
            worker.answer(worker.take("on"), error={"code": "MY_CODE", "message": "not yet"})
            report = reports.get(timeout=PATIENCE_S)
            assert (report.attempt, report.final, report.error.code) == (attempt, False, "MY_CODE")
        for value in (1, 2):
            call = worker.take("on")
            assert call["data"]["new_value"] == value
            worker.answer(call)

        engine.drain(timeout=PATIENCE_S)
        assert engine.stats().deliveries == 2
        assert engine.stats().retries == 2


def test_a_handler_in_a_worker_that_runs_too_long_is_reported(connect: OpenRaw) -> None:
    reports: queue.Queue[Any] = queue.Queue()
    with (
        Engine.from_config({"limits": {"handler_timeout_ms": 50}}, on_error=reports.put) as engine,
        Server(engine, port=0) as server,
    ):
        worker = connect(server)
        worker.register("on")
        worker.trigger("on", {})
        engine.set("s", "k", 1)
        worker.take("on")

        report = reports.get(timeout=PATIENCE_S)
        assert isinstance(report.error, HandlerTimeout)
        engine.reconfigure(from_mapping({"limits": {"handler_timeout_ms": 60_000}}))
        engine.set("s", "k", 2)
        call = worker.take("on")
        assert call["data"]["new_value"] == 2
        worker.answer(call)
        engine.drain(timeout=PATIENCE_S)
        assert engine.stats().timeouts == 1


def test_functions_of_the_program_behind_a_workers_trigger_may_block_and_fail(connect: OpenRaw) -> None:
    reports: queue.Queue[Any] = queue.Queue()
    handled: queue.Queue[Any] = queue.Queue()
    entered, go_on = threading.Event(), threading.Event()
    with Engine(on_error=reports.put) as engine, Server(engine, port=0) as server:

        @engine.register_function("app.slow")
        def slow(event: Any) -> None:
            entered.set()
            assert go_on.wait(PATIENCE_S)
            handled.put(event["key"])

        @engine.register_function("app.async")
        async def later(event: Any) -> None:
            handled.put(event["key"])

        @engine.register_function("app.fails")
        def fails(event: Any) -> None:
            raise ValueError(event["key"])

        worker = connect(server)
        worker.trigger("app.slow", {"key": "slow"})
        worker.trigger("app.async", {"key": "async"})
        worker.trigger("app.fails", {"key": "fails"})

        engine.set("s", "slow", 1)
        assert entered.wait(PATIENCE_S)
        assert worker.call("state::get", {"scope": "s", "key": "slow"}) == 1  # the event loop is free
        engine.set("s", "async", 1)
        assert handled.get(timeout=PATIENCE_S) == "async"
        go_on.set()
        assert handled.get(timeout=PATIENCE_S) == "slow"
        worker.call("state::set", {"scope": "s", "key": "fails", "value": 1})
        assert isinstance(reports.get(timeout=PATIENCE_S).error, ValueError)
