"""What one connection can make the server hold, say or do is bounded: in number, in bytes, in log lines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from raw import PATIENCE_S, Deaf, RawWorker, masked
from reliability.living import until
from serving import OpenRaw, OpenServer, server_config
from websockets.exceptions import ConnectionClosed, InvalidStatus

from scopestate import Engine
from scopestate.errors import DeserializationError, MessageTooLarge, Overloaded, RemoteFailure, ReplyTimeout
from scopestate.server import channels
from scopestate.server import server as server_module
from scopestate.server.server import Server
from scopestate.wire import frames
from scopestate.wire.client import Client
from scopestate.wire.options import ClientOptions
from scopestate.wire.session import WorkerSession

MEBIBYTE = 1024 * 1024


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for a condition of the server."""
    until(true, "it never became true")


def only_worker(server: Server) -> Any:
    (worker,) = server._hub.workers.values()  # type: ignore[union-attr]  # it serves
    return worker


# -------------------------------------------------------------------------------------------------- answers, in bytes


def test_pipelined_reads_do_not_gather_more_than_one_connection_may_hold(server: Server, engine: Engine) -> None:
    engine.set("s", "k", "x" * MEBIBYTE)
    deaf = Deaf(server)
    deaf.send(b" " * 200_000)  # the read buffer grows, so that one read brings all that follows
    wait_until(lambda: server._connections.all()[0]._transport is not None)
    before = psutil.Process().memory_info().rss
    call = {"type": "invokefunction", "function_id": "state::get", "data": {"scope": "s", "key": "k"}}

    deaf.socket.sendall(b"".join(masked({**call, "invocation_id": str(uuid.uuid4())}) for _ in range(256)))
    (connection,) = server._connections.all()
    wait_until(lambda: connection._full)

    assert connection._socket.get_write_buffer_size() < 8 * MEBIBYTE
    assert connection._gathered_bytes == 0
    assert psutil.Process().memory_info().rss - before < 64 * MEBIBYTE
    deaf.socket.close()


def test_failing_calls_are_held_back_like_others(server: Server) -> None:
    deaf = Deaf(server)
    deaf.send(b" " * 200_000)
    name = "f" * 20_000  # an error names the function twice

    deaf.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):  # nothing more is read from it
        deaf.invoke_for_ever(name, {})
    (connection,) = server._connections.all()

    assert connection._full

    assert connection._socket.get_write_buffer_size() < 2 * MEBIBYTE
    deaf.socket.close()


def test_an_answer_that_no_message_can_hold_fails_its_call_alone(open_server: OpenServer, connect: OpenRaw) -> None:
    server = open_server(max_message_bytes=100_000)
    worker = connect(server)
    worker.register("mine")
    for number in range(3):
        worker.call("state::set", {"scope": "s", "key": str(number), "value": "x" * 40_000})

    error = worker.ask("state::list", {"scope": "s"})["error"]

    assert error["code"] == "MESSAGE_TOO_LARGE"
    assert "the call was carried out, but its answer takes 1201" in error["message"]
    assert "a message to this worker may take 100000: read less at once" in error["message"]
    assert len(worker.call("state::get", {"scope": "s", "key": "1"})) == 40_000
    update = {"scope": "s", "key": "1", "ops": [{"type": "append", "path": "", "value": "x" * 40_000}]}
    error = worker.ask("state::update", update)["error"]
    assert "the call was carried out" in error["message"]
    assert len(server.engine.get("s", "1")) == 80_000
    with pytest.raises(RemoteFailure, match="mine"):  # it is still there: this is its own error
        fail_mine(server, worker)
    assert only_worker(server).session.waiting == 0


def fail_mine(server: Server, worker: RawWorker) -> None:
    """Have the engine call the worker's function, which answers with an error of its own."""

    def answer() -> None:
        worker.answer(worker.take("mine"), error={"code": "MINE", "message": "mine"})

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        server.engine.call("mine", {})
    finally:
        thread.join(PATIENCE_S)


def test_an_answer_of_exactly_the_limit_is_sent(open_server: OpenServer, connect: OpenRaw) -> None:
    server = open_server(max_message_bytes=100_000)
    server.engine.set("s", "k", "")
    worker = connect(server)
    frame = len(json.dumps(worker.ask("state::get", {"scope": "s", "key": "k"}), separators=(",", ":")))
    traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    longer = len(json.dumps(worker.ask("state::get", {"scope": "s", "key": "k"}, **traced), separators=(",", ":")))

    for extra, overhead in (({}, frame), (traced, longer)):
        server.engine.set("s", "k", "x" * (100_000 - overhead))
        assert "error" not in worker.ask("state::get", {"scope": "s", "key": "k"}, **extra)
        server.engine.set("s", "k", "x" * (100_001 - overhead))
        assert worker.ask("state::get", {"scope": "s", "key": "k"}, **extra)["error"]["code"] == "MESSAGE_TOO_LARGE"


def test_a_long_error_is_cut_instead_of_costing_the_connection(open_server: OpenServer, connect: OpenRaw) -> None:
    server = open_server(max_message_bytes=100_000)
    worker = connect(server)
    invocation_id = worker.invoke("f" * 99_700, {})

    answer = worker.receive()

    assert answer["invocation_id"] == invocation_id
    assert answer["error"]["code"] == "function_not_found"
    assert len(json.dumps(answer)) < 2_000


def test_a_worker_is_sent_no_more_than_it_said_it_takes(server: Server, connect: OpenRaw, engine: Engine) -> None:
    engine.set("s", "k", "x" * 60_000)
    small = connect(additional_headers={"Scopestate-Max-Message-Bytes": "50000"})
    other = connect()
    odd = connect(additional_headers={"Scopestate-Max-Message-Bytes": "a lot"})

    assert small.ask("state::get", {"scope": "s", "key": "k"})["error"]["code"] == "MESSAGE_TOO_LARGE"
    for worker in (other, odd):
        assert len(worker.call("state::get", {"scope": "s", "key": "k"})) == 60_000
        assert worker.socket.response.headers["Scopestate-Max-Message-Bytes"] == str(64 * MEBIBYTE)  # type: ignore[union-attr]


def test_a_call_or_an_event_too_large_for_a_worker_fails_alone(connect: OpenRaw) -> None:
    failures: list[Any] = []
    with Engine(on_error=failures.append) as engine, Server(engine, port=0) as server:
        small = connect(server, additional_headers={"Scopestate-Max-Message-Bytes": "50000"})
        caller = connect(server)
        small.register("small.f")
        small.trigger("small.f", {"scope": "s"})

        error = caller.ask("small.f", "x" * 60_000)["error"]
        engine.set("s", "k", "x" * 60_000)
        engine.drain(timeout=PATIENCE_S)
        engine.set("s", "k2", 2)

        assert error["code"] == "MESSAGE_TOO_LARGE"
        assert small.take("small.f")["data"]["key"] == "k2"
        wait_until(lambda: bool(failures))  # hooks run on their own
        assert [failure.error.code for failure in failures] == ["MESSAGE_TOO_LARGE"]
        assert caller.call("state::list_groups", {}) == {"groups": ["s"]}


@pytest.mark.asyncio
async def test_a_function_of_a_client_that_returns_too_much_fails_that_call_alone(open_server: OpenServer) -> None:
    server = open_server(max_message_bytes=100_000)
    async with Client(server.url) as client, Client(server.url) as caller:

        async def big(data: bytes) -> bytes:
            return b'"%b"' % (b"x" * 100_000)

        async def small(data: bytes) -> bytes:
            return b'"small"'

        client.register_function("big", big)
        client.register_function("small", small)
        await client.call("state::list_groups", {})

        with pytest.raises(RemoteFailure, match="was carried out, but its answer takes 100") as caught:
            await caller.call("big", {})
        assert caught.value.code == "MESSAGE_TOO_LARGE"
        assert await caller.call("small", {}) == "small"
        assert client.connections == 1


@pytest.mark.asyncio
async def test_a_client_sends_no_more_than_its_server_takes(open_server: OpenServer) -> None:
    server = open_server(max_message_bytes=100_000)
    async with Client(server.url) as client:
        early = asyncio.ensure_future(client.call("state::set", {"scope": "s", "key": "k", "value": "x" * 100_000}))
        with pytest.raises(MessageTooLarge, match="nothing was sent"):  # made before the server's limit was known
            await early
        with pytest.raises(MessageTooLarge, match="may take 100000; nothing was sent"):
            await client.call("state::set", {"scope": "s", "key": "k", "value": "x" * 100_000})
        await client.call("state::set", {"scope": "s", "key": "k", "value": "x" * 90_000})
        assert client.connections == 1
        assert len(client._calls or ()) == 0


@pytest.mark.asyncio
async def test_a_server_sends_no_more_than_a_client_takes(server: Server, engine: Engine) -> None:
    engine.set("s", "k", "x" * 60_000)
    async with Client(server.url, ClientOptions(max_message_bytes=50_000)) as client:
        with pytest.raises(RemoteFailure, match="may take 50000"):
            await client.call("state::get", {"scope": "s", "key": "k"})
        assert await client.call("state::list_groups", {}) == {"groups": ["s"]}
        assert client.connections == 1


# ------------------------------------------------------------------------------------------------ calls, and their ends


def test_void_calls_count_for_max_calls(open_server: OpenServer, connect: OpenRaw) -> None:
    server = open_server(max_calls=5)
    slow, caller = connect(server), connect(server)
    slow.register("slow.f")

    for _ in range(8):
        caller.invoke("slow.f", {}, action={"type": "void"})
    caller.settle()
    executing = [slow.take("slow.f") for _ in range(5)]
    slow.settle()  # there is no sixth
    assert caller.ask("state::list_groups", {})["error"]["code"] == "OVERLOADED"
    for call in executing:
        slow.answer(call)
    slow.settle()

    assert caller.call("state::list_groups", {}) == {"groups": []}
    sessions = [worker.session for worker in server._hub.workers.values()]  # type: ignore[union-attr]
    assert [(one.waiting, len(one.executing)) for one in sessions] == [(0, 0)] * 2


def test_every_call_gives_its_place_back(open_server: OpenServer, connect: OpenRaw) -> None:
    server = open_server(max_calls=3, call_timeout_ms=1000)
    caller, other = connect(server), connect(server)
    other.register("other.f")
    server.engine.register_function("program.fails", lambda payload: 1 / 0)
    server.engine.register_function("program.works", lambda payload: 1)
    place = {"scope": "s", "key": "k"}

    for _ in range(10):
        caller.ask("state::get", place)
        caller.ask("state::set", {**place, "value": 1})
        caller.ask("state::get", {})  # does not fit
        caller.ask("no such function", {})
        caller.ask("program.fails", {})
        caller.ask("program.works", {})
        caller.ask("engine::workers::list", {})
        caller.invoke("state::get", place, action={"type": "void"})
        caller.invoke("no such function", place, action={"type": "void"})
        caller.invoke("program.fails", place, action={"type": "void"})
        caller.ask("state::get", place, action={"type": "enqueue", "queue": "q"})
    caller.ask("other.f", {})  # times out
    caller.invoke("other.f", {})
    for _ in range(2):
        call = other.take("other.f")
    other.answer(call, result=1)
    assert caller.receive().get("result") == 1

    assert server.status().calls >= 100
    for worker in server._hub.workers.values():  # type: ignore[union-attr]
        wait_until(lambda worker=worker: worker.session.waiting == 0)
        assert not worker.session.executing
        assert not worker.issued
    assert not server._hub._deadlines  # type: ignore[union-attr]


def test_a_worker_that_leaves_leaves_no_entry(server: Server, connect: OpenRaw, engine: Engine) -> None:
    leaving, staying = connect(), connect()
    leaving.register("f")
    leaving.trigger("f", {"scope": "s"})
    leaving.send({"type": "registertriggertype", "id": "mine", "description": "d"})
    leaving.call("engine::channels::create", {})
    staying.invoke("f", {})
    leaving.take("f")

    leaving.cut()
    assert staying.receive()["error"]["code"] == "invocation_stopped"
    wait_until(lambda: server.status().workers == 1)

    hub: Any = server._hub
    assert not hub.triggers.all()
    assert hub.triggers.types() == []
    assert len(hub.offered) == 0
    assert not hub.triggers._handlers
    assert not hub._deadlines
    assert len(hub.channels) == 0
    assert not hub.channels._of_owner
    (worker,) = hub.workers.values()
    assert (worker.session.waiting, worker.issued) == (0, {})


def test_long_function_ids_are_not_kept(server: Server, connect: OpenRaw) -> None:
    worker = connect()
    frames._call_heads.clear()
    frames._answer_heads.clear()

    for number in range(20):
        worker.ask(f"{number}" + "x" * MEBIBYTE, {})
        worker.ask(f"short {number}", {})
    for number in range(2 * frames._MOST_HEADS):
        WorkerSession("w").execute(f"f{number}", frames.NULL, print)

    assert sum(map(len, frames._answer_heads)) < 10_000
    assert len(frames._call_heads) <= frames._MOST_HEADS


# -------------------------------------------------------------------------------------------------------- log lines


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("scopestate")]


@pytest.mark.parametrize(
    "refused",
    [
        {"type": "registerfunction", "id": "x" * 60_000},
        {"type": "registerfunction", "id": "x" * 60_000, "invocation": {"url": "http://x"}},
        {"type": "registertrigger", "id": "x" * 300, "trigger_type": "y" * 300, "function_id": "f", "config": {}},
        {"type": "registertriggertype", "id": "state", "description": "x" * 60_000},
        {"type": "x" * 60_000},
    ],
)
def test_refused_registrations_fill_no_log_and_end_the_connection(
    open_server: OpenServer, connect: OpenRaw, caplog: pytest.LogCaptureFixture, refused: dict[str, Any]
) -> None:
    tokens = ["admin", {"token": "guest", "functions": [], "registers": [], "read": [], "write": []}]
    server = open_server(auth={"tokens": tokens})
    guest = connect(server, additional_headers={"Authorization": "Bearer guest"})

    with contextlib.suppress(ConnectionClosed):
        for _ in range(1_500):
            guest.send(refused)

    assert guest.closed_with() == (1008, "more than 1000 malformed or refused messages")
    lines = lines_of(caplog)
    assert 0 < len(lines) < 20
    assert sum(map(len, lines)) < 20_000


def test_connections_without_a_token_fill_no_log(open_server: OpenServer, caplog: pytest.LogCaptureFixture) -> None:
    server = open_server(auth={"tokens": ["admin"]})
    for _ in range(50):
        stranger = RawWorker(server.url, greeted=False)
        assert stranger.closed_with()[0] == 1008
        stranger.close()
    assert 0 < len(lines_of(caplog)) < 20


def test_workers_that_come_register_and_leave_are_logged(
    server: Server, connect: OpenRaw, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "scopestate"):
        worker = connect()
        worker.register("f")
        worker.trigger("f", {"scope": "s"}, id="t1")
        worker.cut()
        wait_until(lambda: server.status().workers == 0)

    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", f"worker {worker.worker_id} connected from 127.0.0.1") in said
    assert ("DEBUG", f"worker {worker.worker_id} registered function 'f'") in said
    assert ("DEBUG", f"worker {worker.worker_id} registered trigger 't1' of type 'state'") in said
    assert ("INFO", f"worker {worker.worker_id} left; it had 1 functions and 0 calls in progress") in said


# --------------------------------------------------------------------------------------------------------- channels


def end_of(server: Server, ref: dict[str, str]) -> RawWorker:
    path = f"/ws/channels/{ref['channel_id']}?key={ref['access_key']}&dir={ref['direction']}"
    return RawWorker(server.url, path=path, greeted=False)


def test_a_thousand_channels_are_as_quick_to_make_as_a_few(server: Server, connect: OpenRaw) -> None:
    workers = [connect() for _ in range(8)]
    took = []
    for worker in workers:  # each may have 1,000; the eighth begins with 7,000 in the server's table
        before = time.process_time()  # of the server too, which other programs do not change
        for _ in range(1_000):
            worker.call("engine::channels::create", {})
        took.append(time.process_time() - before)
        assert worker.ask("engine::channels::create", {})["error"]["code"] == "OVERLOADED"
    assert min(took[4:]) < 5 * min(took[:4])
    assert len(server._channels) == 8_000  # type: ignore[arg-type]  # it serves


def test_the_server_has_a_bound_on_channels(server: Server, connect: OpenRaw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_CHANNELS", 3)
    one, two = connect(), connect()
    for worker in (one, one, two):
        worker.call("engine::channels::create", {})
    assert two.ask("engine::channels::create", {})["error"]["code"] == "OVERLOADED"
    one.cut()
    wait_until(lambda: len(server._channels) == 1)  # type: ignore[arg-type]
    two.call("engine::channels::create", {})


def test_the_channels_of_one_worker_share_a_bound_in_bytes(
    server: Server, connect: OpenRaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "OWNER_BYTES", MEBIBYTE)
    owner = connect()
    refs = [owner.call("engine::channels::create", {"buffer_size": 1_000}) for _ in range(4)]
    writers = [end_of(server, ref["writer"]) for ref in refs]
    for writer in writers:
        writer.send(b"x" * 400_000)
    wait_until(lambda: server._channels._bytes == {owner.worker_id: 1_600_000})  # type: ignore[union-attr]
    more = threading_send(writers[0], b"y" * 400_000, 40)  # held back: it ends when the reader has come

    reader = end_of(server, refs[0]["reader"])
    assert reader.socket.recv(timeout=PATIENCE_S) == b"x" * 400_000
    for _ in range(40):
        assert reader.socket.recv(timeout=PATIENCE_S) == b"y" * 400_000
    more.join(PATIENCE_S)
    assert server._channels._bytes == {owner.worker_id: 1_200_000}  # type: ignore[union-attr]
    for end in (*writers, reader):
        end.cut()  # `close` would wait ten seconds for the answers of ends that the server does not read
    owner.cut()


def threading_send(end: RawWorker, message: bytes, count: int) -> threading.Thread:
    """Send from another thread: sending waits as soon as the server reads no more."""

    def send() -> None:
        for _ in range(count):
            end.send(message)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_channel_that_is_idle_or_incomplete_ends(
    server: Server, connect: OpenRaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "TTL_S", 1.0)
    monkeypatch.setattr(channels, "IDLE_S", 0.2)
    worker = connect()
    half = end_of(server, worker.call("engine::channels::create", {})["reader"])
    assert half.closed_with() == (1012, "its other end never connected")
    monkeypatch.setattr(channels, "TTL_S", 3.0)  # when it is over, the channel has been idle for longer than it may
    refs = worker.call("engine::channels::create", {})
    writer, reader = end_of(server, refs["writer"]), end_of(server, refs["reader"])
    writer.send("hello")
    assert reader.socket.recv(timeout=PATIENCE_S) == "hello"
    assert reader.closed_with() == (1012, "nothing went through it for 0.2 s")
    assert writer.closed_with()[0] == 1012
    assert len(server._channels) == 0  # type: ignore[arg-type]
    with pytest.raises(InvalidStatus, match="404"):
        end_of(server, refs["reader"])
    for end in (half, writer, reader):
        end.close()


# ------------------------------------------------------------------------------------------ calls in progress, in bytes


def held_bytes(server: Server) -> int:
    return server._hub._held_bytes  # type: ignore[union-attr]  # it serves


def test_calls_that_wait_are_bounded_in_bytes_for_each_worker(connect: OpenRaw) -> None:
    go_on = threading.Event()
    with Engine() as engine, Server(engine, config=server_config({"port": 0, "max_call_bytes": 100_000})) as server:
        engine.register_function("wait", lambda payload: go_on.wait(PATIENCE_S))
        engine.set("s", "k", 1)
        greedy, other = connect(server), connect(server)
        ids = [greedy.invoke("wait", "x" * 40_000) for _ in range(3)]

        error = greedy.ask("state::get", {"scope": "s", "key": "k"})["error"]

        assert error["code"] == "OVERLOADED"
        assert "3 calls of this worker are in progress, with 1200" in error["message"]
        assert other.call("state::get", {"scope": "s", "key": "k"}) == 1
        go_on.set()
        assert {greedy.receive()["invocation_id"] for _ in ids} == set(ids)
        assert greedy.call("state::get", {"scope": "s", "key": "k"}) == 1
        assert held_bytes(server) == 0


def test_calls_that_wait_are_bounded_in_bytes_for_all_workers(connect: OpenRaw) -> None:
    go_on = threading.Event()
    with Engine() as engine, Server(engine, config=server_config({"port": 0, "max_call_bytes": 50_000})) as server:
        engine.register_function("wait", lambda payload: go_on.wait(PATIENCE_S))
        workers = [connect(server) for _ in range(5)]
        ids = [worker.invoke("wait", "x" * 45_000, action={"type": "void"}) for worker in workers[:4]]
        wait_until(lambda: held_bytes(server) > 180_000)

        error = workers[4].ask("wait", "x" * 45_000)["error"]

        assert error["code"] == "OVERLOADED"
        assert "the calls of all workers that are in progress hold 180" in error["message"]
        assert len(ids) == 4
        go_on.set()
        wait_until(lambda: held_bytes(server) == 0)
        assert workers[4].call("wait", "x" * 45_000) is True


@pytest.mark.parametrize("end", ["answer", "caller leaves", "executor leaves"])
def test_a_call_that_another_worker_executes_does_not_hold_its_input(connect: OpenRaw, end: str) -> None:
    with Engine() as engine, Server(engine, config=server_config({"port": 0, "max_call_bytes": 50_000})) as server:
        executor, caller = connect(server), connect(server)
        executor.register("f")
        for number in range(1, 4):
            caller.invoke("f", "x" * 40_000, baggage="b=" + "x" * 10_000)
            executor.take("f")
            assert number * 10_000 < held_bytes(server) < number * 11_000
        (session,) = (worker.session for worker in server._hub.workers.values() if worker.issued)  # type: ignore[union-attr]
        assert session.held_bytes == held_bytes(server)

        if end == "answer":
            for invocation_id in list(session_ids(server)):
                executor.send({"type": "invocationresult", "invocation_id": invocation_id, "function_id": "f"})
        elif end == "caller leaves":
            caller.close()
        else:
            executor.close()

        wait_until(lambda: held_bytes(server) == 0)


def test_calls_beyond_the_bytes_that_may_wait_are_refused_although_answers_repeat_the_baggage(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=server_config({"port": 0, "max_call_bytes": 1_000_000})) as server:
        executor, caller = connect(server), connect(server)
        executor.register("f")
        baggage = "b=" + "x" * 60_000
        # Sent while the answers are read: they are as large as the calls, and a caller that reads none is cut off.
        sending = threading.Thread(target=lambda: [caller.invoke("f", 1, baggage=baggage) for _ in range(100)])
        sending.start()

        answers = [caller.receive() for _ in range(100 - 17)]  # the 17th is the one that reaches the limit

        assert {answer["error"]["code"] for answer in answers} == {"OVERLOADED"}
        assert {answer["baggage"] for answer in answers} == {baggage}
        sending.join(PATIENCE_S)
        for _ in range(17):
            executor.answer(executor.take("f"), result=2)
        assert [caller.receive()["result"] for _ in range(17)] == [2] * 17
        assert caller.call("engine::functions::list", {})["functions"]


def test_the_id_of_a_function_that_is_not_there_is_not_repeated_whole(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=server_config({"port": 0})) as server:
        error = connect(server).ask("f" * 1_000_000, 1)["error"]

    assert error["code"] == "function_not_found"
    assert error["message"] == f"Function {'f' * 500}... (1000000 characters) not found"


def session_ids(server: Server) -> list[str]:
    return [found for worker in server._hub.workers.values() for found in worker.session.executing]  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------- silent workers


@pytest.mark.parametrize("sizes", [[1] * 10, [60, 60, 60, 60, 5], [30, 200, 5, 5]])
@pytest.mark.parametrize("when_full", ["block", "reject", "drop_oldest"])
@pytest.mark.parametrize(
    "bound",
    [
        {"handler_mailbox": 3},
        {"handler_mailbox_bytes": 100},
        {"handler_mailbox": 3, "handler_mailbox_bytes": 100},
        {"events_bytes": 100},
    ],
)
def test_a_silent_worker_is_cut_off_however_small_the_mailbox_is(
    monkeypatch: pytest.MonkeyPatch, connect: OpenRaw, when_full: str, bound: dict[str, int], sizes: list[int]
) -> None:
    monkeypatch.setattr(server_module, "LOOK_S", 0.05)
    limits = {**bound, "handler_when_full": when_full, "call_timeout_ms": 100}
    with (
        Engine.from_config({"limits": limits}, on_error=lambda failure: None) as engine,
        Server(engine, port=0) as server,
    ):
        silent, other = connect(server), connect(server)
        silent.register("silent")
        silent.trigger("silent", {})
        left = threading.Event()

        def write() -> None:
            number = 0
            while not left.is_set():
                with contextlib.suppress(Overloaded, ReplyTimeout):
                    engine.set("s", str(number), "x" * sizes[number % len(sizes)])
                number += 1
                left.wait(0.001 if number > 100 else 0)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            code, reason = silent.closed_with()
        finally:
            left.set()
            writer.join(PATIENCE_S)

        assert code == 1008
        assert "events wait for its function 'silent'" in reason
        assert reason.endswith("the most allowed, and it does not answer")
        assert other.call("state::set", {"scope": "s", "key": "k", "value": 1})
        engine.set("s", "k", 2)


def test_a_slow_worker_that_answers_is_not_silent(connect: OpenRaw) -> None:
    config = {"limits": {"handler_mailbox": 5, "handler_when_full": "drop_oldest"}}
    with Engine.from_config(config, on_error=lambda failure: None) as engine, Server(engine, port=0) as server:
        slow = connect(server)
        slow.register("slow")
        slow.trigger("slow", {})
        (handler,) = server._hub.triggers._handlers.values()  # type: ignore[union-attr]  # it serves
        for number in range(4):
            engine.set("s", "k", number)
        call = slow.take("slow")
        wait_until(lambda: handler.depth() == 3)
        assert (handler.silent_s(1000.0), handler.silent_s(1010.0)) == (0.0, 0.0)  # there is room
        engine.set("s", "k", 4)
        engine.set("s", "k", 5)
        wait_until(lambda: handler.depth() == 5)
        assert (handler.silent_s(1020.0), handler.silent_s(1049.0)) == (0.0, 29.0)

        slow.answer(call, error={"code": "MINE", "message": "an error is an answer, too"})
        call = slow.take("slow")
        engine.set("s", "k", 6)
        wait_until(lambda: handler.depth() == 5)
        assert (handler.silent_s(1050.0), handler.silent_s(1060.0)) == (0.0, 10.0)
        slow.answer(call)
        slow.take("slow")
        assert handler.silent_s(1070.0) == 0.0


def test_a_call_that_times_out_is_no_answer_of_a_silent_worker(connect: OpenRaw) -> None:
    limits = {"handler_mailbox": 5, "handler_when_full": "reject", "call_timeout_ms": 300}
    with (
        Engine.from_config({"limits": limits}, on_error=lambda failure: None) as engine,
        Server(engine, config=server_config({"port": 0, "call_timeout_ms": 20})) as server,
    ):
        silent = connect(server)
        silent.register("silent")
        silent.trigger("silent", {})
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                engine.set("s", "k", 1)
                stop.wait(0.001)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert silent.closed_with()[1].endswith("the most allowed, and it does not answer")
        finally:
            stop.set()
            writer.join(PATIENCE_S)


@pytest.mark.parametrize("triggers", [1, 4])
def test_the_events_that_wait_for_one_worker_are_bounded_in_bytes(connect: OpenRaw, triggers: int) -> None:
    with Engine() as engine, Server(engine, config=server_config({"port": 0, "max_waiting_bytes": MEBIBYTE})) as server:
        silent, other = connect(server), connect(server)
        silent.register("silent")
        for number in range(triggers):
            silent.trigger("silent", {"scope": f"s{number}"})
        for number in range(64):  # with four triggers, 16 events of up to 40 KB for each: none is too much alone
            engine.set(f"s{number % triggers}", "k", str(number % 10) * 20_000)

        code, reason = silent.closed_with()

        assert code == 1008
        assert "bytes wait for its functions" in reason
        assert other.call("state::list_groups", {})["groups"]
        engine.drain(timeout=PATIENCE_S)


def test_many_small_events_may_wait_though_one_large_one_did(connect: OpenRaw) -> None:
    with Engine() as engine, Server(engine, config=server_config({"port": 0, "max_waiting_bytes": MEBIBYTE})) as server:
        slow = connect(server)
        slow.register("slow")
        slow.trigger("slow", {"scope": "s"})
        engine.set("s", "first", 0)
        engine.set("s", "large", "x" * 300_000)
        for number in range(1_000):
            engine.set("s", "small", number)

        for _ in range(1_002):
            slow.answer(slow.take("slow"))
        engine.drain(timeout=PATIENCE_S)
        assert server.status().workers == 1


# ------------------------------------------------------------------------------------------------------ large updates


def test_an_update_of_many_ops_on_a_large_value_holds_up_no_event(connect: OpenRaw, engine: Engine) -> None:
    seen: queue.Queue[Any] = queue.Queue()
    engine.on_change(scope="mine")(seen.put)
    engine.set("s", "k", "x" * 20_000_000)
    worker = connect()
    ops = [{"type": "append", "path": "", "value": "y"}] * 5_000

    began = time.process_time()
    worker.invoke("state::update", {"scope": "s", "key": "k", "ops": ops}, action={"type": "void"})
    engine.set("mine", "k", 1)
    seen.get(timeout=PATIENCE_S)
    worker.settle()

    # A copy of the value for each op takes more than ten seconds, idle.
    assert time.process_time() - began < 5.0
    assert len(engine.get("s", "k")) == 20_005_000


def test_an_update_of_too_many_ops_is_refused(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    ops = [{"type": "increment", "path": "n", "by": 1}] * 10_001
    error = worker.ask("state::update", {"scope": "s", "key": "k", "ops": ops})["error"]
    assert error["code"] == "deserialization_error"
    assert "an update has at most 10000 ops, found 10001: send several updates - at `$.ops`" in error["message"]
    with pytest.raises(DeserializationError, match="at most 10000 ops"):
        engine.update("s", "k", ops)
    assert engine.get("s", "k") is None


@pytest.mark.parametrize("ended_by", ["writer", "reader", "both cut", "owner"])
def test_whichever_end_leaves_first_nothing_is_kept_of_a_channel(
    server: Server, connect: OpenRaw, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    monkeypatch.setattr(channels, "MAX_PER_WORKER", 1)
    table: Any = server._channels
    owner = connect()
    for _ in range(3):
        refs = owner.call("engine::channels::create", {"buffer_size": 2})
        assert owner.ask("engine::channels::create", {})["error"]["code"] == "OVERLOADED"
        if ended_by == "owner":
            owner.cut()
            wait_until(lambda: len(table) == 0)
            owner = connect()
            assert (table._by_id, table._of_owner, table._bytes) == ({}, {}, {})
            continue
        writer = end_of(server, refs["writer"])
        sent = [b"%d" % number for number in range(5)]
        more = [threading_send(writer, message, 1) for message in sent[:2]]
        for thread in more:
            thread.join(PATIENCE_S)
        wait_until(lambda: sum(table._bytes.values()) == 2)
        reader = end_of(server, refs["reader"])
        assert sorted(reader.socket.recv(timeout=PATIENCE_S) for _ in range(2)) == sent[:2]
        wait_until(lambda: table._bytes == {})
        if ended_by == "writer":
            writer.send(sent[2])
            writer.close()
            assert reader.socket.recv(timeout=PATIENCE_S) == sent[2]
            assert reader.closed_with()[0] == 1000
        elif ended_by == "reader":
            reader.close()
            assert writer.closed_with()[0] == 1000
        else:
            writer.cut()
            reader.cut()
        wait_until(lambda: len(table) == 0)
        assert (table._by_id, table._of_owner, table._bytes) == ({}, {}, {})
        for end in (writer, reader):
            end.close()


def test_what_waits_for_a_reader_that_never_comes_is_given_back_when_the_channel_ends(
    server: Server, connect: OpenRaw
) -> None:
    table: Any = server._channels
    owner = connect()
    refs = [owner.call("engine::channels::create", {}) for _ in range(2)]
    writers = [end_of(server, ref["writer"]) for ref in refs]
    for writer in writers:
        writer.send(b"x" * 1000)
    wait_until(lambda: table.bytes_of(owner.worker_id) == 2000)

    reader = end_of(server, refs[0]["reader"])
    assert reader.socket.recv(timeout=PATIENCE_S) == b"x" * 1000
    wait_until(lambda: table.bytes_of(owner.worker_id) == 1000)
    server.stop()

    assert (table._by_id, table._of_owner, table._bytes) == ({}, {}, {})
    for end in (*writers, reader):
        end.close()


def test_a_channel_holds_exactly_its_buffer_before_the_writer_is_held_back(server: Server, connect: OpenRaw) -> None:
    table: Any = server._channels
    for wanted, given in ((1, 1), (3, 3), (0, 1), (10**6, channels.MAX_BUFFER), (None, channels.DEFAULT_BUFFER)):
        owner = connect()
        refs = owner.call("engine::channels::create", {"buffer_size": wanted})
        channel = table._by_id[refs["writer"]["channel_id"]]
        assert channel.buffer_size == given
        if given > 3:
            owner.cut()
            continue
        writer = end_of(server, refs["writer"])
        for number in range(1, given + 1):
            assert not channel.writer._full
            writer.send(b"%d" % number)
            wait_until(lambda channel=channel, number=number: len(channel.waiting) == number)
        assert channel.writer._full
        reader = end_of(server, refs["reader"])
        for number in range(1, given + 1):
            assert reader.socket.recv(timeout=PATIENCE_S) == b"%d" % number
        wait_until(lambda channel=channel: not channel.writer._full)
        for end in (writer, reader):
            end.close()
        owner.cut()
