"""What waits for the readers of shared events is woken, and not only found ready when its time limit is over.

The limits that would hide a lost wake-up are made longer than any test waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from event_engines import Engines, Seen, problems, set_patiently
from one_server import PATIENCE_S
from servers import Server, StartServer, wait_until

from scopestate import Engine
from scopestate.persistence.redis import events

NEVER_S = 3600.0


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps a reader waiting for an hour: no look in between finds what a wake-up has missed."""
    monkeypatch.setattr(events, "BLOCK_S", NEVER_S)


def reader_of(engine: Engine) -> Any:
    adapter: Any = engine._parts.backend
    return adapter.reader


class Waiting:
    """A thread that waits for an event of a reader, with a time limit that never comes."""

    def __init__(self, reader: Any, number: int, *, look: bool = False) -> None:
        self._over = threading.Event()
        self._reader = reader
        before = len(reader._waiting)

        def wait() -> None:
            reader.catch_up(number, reader.restarts, NEVER_S, look=look)
            self._over.set()

        threading.Thread(target=wait, name="test-waits", daemon=True).start()
        wait_until(lambda: len(reader._waiting) > before or self._over.is_set(), "a thread that waits")

    def ends(self) -> bool:
        return self._over.wait(PATIENCE_S)


@pytest.mark.usefixtures("no_looks")
def test_an_event_that_arrives_wakes_those_who_wait_for_it_and_no_others(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    seen = Seen(engine)
    reader = reader_of(engine)
    first, second, later = Waiting(reader, 1), Waiting(reader, 1), Waiting(reader, 2)

    engine.set("s", "k", 1)

    assert first.ends()
    assert second.ends()
    seen.wait_for_value(1)
    assert len(reader._waiting) == 1  # who has gone leaves nothing

    engine.set("s", "k", 2)

    assert later.ends()
    assert reader._waiting == []


@pytest.mark.usefixtures("no_looks")
def test_numbers_that_begin_anew_wake_those_who_wait_for_an_old_one(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    seen = Seen(engine)
    engine.set("s", "k", 1)
    seen.wait_for_value(1)
    waiting = Waiting(reader_of(engine), 100)

    valkey.ask("FLUSHALL")
    engine.set("s", "k", 2)

    assert waiting.ends()


@pytest.mark.usefixtures("no_looks")
def test_the_end_of_a_reader_wakes_those_who_wait_for_it(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    Seen(engine)
    waiting = Waiting(reader_of(engine), 100)

    engine.close()

    assert waiting.ends()


def test_a_look_that_finds_the_stream_unchanged_wakes_those_who_wait_for_one(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    seen = Seen(engine)
    engine.set("s", "k", 1)
    seen.wait_for_value(1)

    for _ in range(2):  # each wait has a look of its own
        assert Waiting(reader_of(engine), 1, look=True).ends()


def test_handlers_run_on_the_reader_s_own_threads_each_time(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    reader = reader_of(engine)
    threads: list[str] = []
    ran = threading.Semaphore(0)

    def note(_: object) -> None:
        threads.append(threading.current_thread().name)
        ran.release()

    engine.register_function("note", note)
    engine.register_trigger(function_id="note")
    for number in range(5):
        wait_until(lambda: not reader._is_away, "a reader with both of its threads")
        engine.set("s", "k", number)
        assert ran.acquire(timeout=PATIENCE_S)

    assert threads == ["scopestate-redis-events"] * 5


def test_a_server_that_stops_answering_shows_in_health_on_the_first_connection_and_on_later_ones(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server()
    engine = engines.open(server, call_timeout_ms=500, connect_timeout_ms=1000)
    seen = Seen(engine)
    for number in range(2):
        server.pause()
        wait_until(lambda: "events of other engines do not arrive" in problems(engine), "a problem")
        server.resume()
        set_patiently(engine, "s", "k", number)
        seen.wait_for_value(number)
        wait_until(lambda: engine.health().ok, lambda: problems(engine))


@pytest.mark.usefixtures("no_looks")
def test_a_reader_that_is_stopped_while_it_connects_does_not_read_on(
    valkey: Server, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines.open(valkey)
    Seen(engine)
    reader = reader_of(engine)
    dial = reader._target.dial

    def dial_and_stop() -> Any:
        connection = dial()
        reader._stopped.set()  # as `stop` does, which then finds the connection before
        return connection

    monkeypatch.setattr(reader._target, "dial", dial_and_stop)
    valkey.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    assert reader._ended.wait(PATIENCE_S)


def test_pauses_between_attempts_begin_anew_after_a_connection_that_worked(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server()
    engine = engines.open(server)
    seen = Seen(engine)
    backoff = reader_of(engine)._backoff
    unused = vars(backoff).copy()
    server.kill()
    wait_until(lambda: vars(backoff) != unused, "an attempt that failed")
    server.start()
    set_patiently(engine, "s", "k", "new")
    seen.wait_for_value("new")

    wait_until(lambda: vars(backoff) == unused, "a backoff that has begun anew")


def test_a_reader_that_gets_nothing_keeps_its_first_connection(valkey: Server, engines: Engines) -> None:
    """The server keeps it waiting for longer than a call may take."""
    engine = engines.open(valkey, call_timeout_ms=20)
    Seen(engine)
    reader = reader_of(engine)
    first = reader._connection
    assert first is not None

    for _ in range(2):
        assert Waiting(reader, 0, look=True).ends()

    assert reader._connection is first


def test_the_end_of_a_reader_does_not_wait_for_the_room_that_its_event_needs(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey, limits={"handler_mailbox": 1, "close_grace_ms": 50})
    writer = engines.open(valkey)
    seen = Seen(engine)
    seen.gate.clear()
    backlog: Any = engine._router.backlog
    for number in range(3):  # one is handled, one waits for it, and the reader waits with the third
        writer.set("s", "k", number)
    wait_until(lambda: bool(backlog._writers), "the reader that waits for room")
    reader = reader_of(engine)
    reader._join_s = NEVER_S
    stopped = threading.Event()

    def stop() -> None:
        reader.stop()
        stopped.set()

    threading.Thread(target=stop, name="test-stops", daemon=True).start()
    try:
        assert stopped.wait(PATIENCE_S)
        assert backlog._writers == {}
    finally:
        seen.gate.set()
    assert [event.new_value for event in seen.wait_for_count(2)] == [0, 1]
