"""A link goes on when its thread cannot be started, its own code fails, or its server stays away."""

from __future__ import annotations

import _thread
import threading
from typing import Any

import pytest
from opening import at_rest, links_of, open_at
from reliability.living import PATIENCE_S, InThread, until
from servers import Server, StartServer

from scopestate import messages
from scopestate.errors import ConnectionLost, EngineClosed, NotConnected, StorageError
from scopestate.persistence.redis import attempts
from scopestate.persistence.redis.flight import Flight
from scopestate.persistence.redis.link import Link

NEVER_AGAIN = (30.0, 30.0)
"""Pauses between attempts to connect, longer than any test waits."""


def test_a_command_that_has_arrived_is_neither_sent_nor_refused_again() -> None:
    """A link may have it twice: a maker who was interrupted cannot know if it was put, and puts it again."""
    nowhere: Any = None
    landed: list[Flight] = []
    flight = Flight(("PING",), nowhere, lambda flight, _: landed.append(flight), [])
    flight.refuse(NotConnected("there is no server"), [])
    assert landed == [flight]

    assert flight.board([]) is None
    flight.refuse(NotConnected("there is still no server"), [])
    assert landed == [flight]


def test_a_command_on_its_way_is_not_refused_by_its_second_copy() -> None:
    nowhere: Any = None
    landed: list[Flight] = []
    flight = Flight(("PING",), nowhere, lambda flight, _: landed.append(flight), [])
    assert flight.board([]) is flight
    flight.refuse(NotConnected("there is no server"), [])
    assert landed == []


def test_without_any_thread_for_a_link_its_calls_fail_and_the_next_one_tries_again(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url) as engine:

        def refuse(*_: object) -> int:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", refuse)
            with pytest.raises(StorageError, match=r"can't start new thread; nothing was sent") as caught:
                engine.ask(messages.Set("s", "k", 2), block=False).get(timeout=PATIENCE_S)
            assert type(caught.value.__cause__) is NotConnected

        assert engine.ask(messages.Set("s", "k", 3), block=False).get(timeout=PATIENCE_S).new_value == 3


def test_a_thread_that_cannot_be_started_at_first_is_started_later(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    start = threading.Thread.start

    def sometimes(self: threading.Thread) -> None:
        if self.name == "scopestate-redis":
            tries.append(self.name)
            if len(tries) < 3:
                raise RuntimeError("can't start new thread")
        start(self)

    with open_at(valkey.url) as engine:
        monkeypatch.setattr(threading.Thread, "start", sometimes)
        assert engine.ask(messages.Set("s", "k", 1), block=False).get(timeout=PATIENCE_S).new_value == 1
    assert len(tries) == 3


def test_a_link_whose_thread_never_starts_can_be_closed(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()
    start = threading.Thread.start

    def never(self: threading.Thread) -> None:
        if self.name == "scopestate-redis":
            tried.set()
            raise RuntimeError("can't start new thread")
        start(self)

    engine = open_at(valkey.url)
    monkeypatch.setattr(threading.Thread, "start", never)
    (link, *_) = links_of(engine)
    link.put(Flight(("PING",), link, lambda *_: None, []))
    assert tried.wait(PATIENCE_S)
    engine.close()


def test_an_error_in_the_middle_gives_nobody_the_answer_of_another(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url) as engine:
        for number in range(4):
            engine.set(f"s{number}", "k", number)
        take_replies = Link._take_replies

        def failing(self: Link, connection: Any) -> None:
            monkeypatch.setattr(Link, "_take_replies", take_replies)
            raise MemoryError

        monkeypatch.setattr(Link, "_take_replies", failing)
        with pytest.raises(StorageError, match="an error in this engine") as caught:
            engine.ask(messages.Set("s0", "k", "new"), block=False).get(timeout=PATIENCE_S)
        assert type(caught.value.__cause__) is ConnectionLost
        replies = [engine.ask(messages.Get(f"s{number}", "k"), block=False) for number in range(1, 4)]
        assert [reply.get(timeout=PATIENCE_S) for reply in replies] == [1, 2, 3]
        at_rest(engine)


def test_who_waits_for_a_connection_waits_no_longer_than_he_should(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    monkeypatch.setattr(attempts, "_BACKOFF_S", NEVER_AGAIN)
    with open_at(server.url, connect_wait_ms=50) as engine:
        engine.set("s", "k", 1)
        server.kill()
        for _ in range(2):
            call = InThread(lambda: engine.set("s", "k", 2))
            with pytest.raises(StorageError) as caught:
                call.result()
        assert type(caught.value.__cause__) is NotConnected


def test_every_link_connects_again_by_itself(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, connect_wait_ms=10, pool_size=4) as engine:
        for number in range(8):
            engine.set(str(number), "k", 1)
        server.kill()
        lists = [InThread(lambda number=number: engine.list(str(number))) for number in range(8)]  # type: ignore[misc]
        for one in lists:
            with pytest.raises(StorageError):
                one.result()
        until(lambda: sum(link.why_not is not None for link in links_of(engine)) > 1, "only one link was tried")
        assert not engine.health().ok
        server.start()
        until(lambda: engine.health().ok, "a link does not connect again")


def test_close_does_not_wait_for_a_server_that_does_not_answer(start_server: StartServer) -> None:
    """With limits that are longer than any test waits: what ends the wait is that the connection is shut."""
    hour_ms = 3_600_000
    server = start_server()
    engine = open_at(server.url, {"call_timeout_ms": hour_ms, "close_grace_ms": 1}, call_timeout_ms=hour_ms)
    engine.set("s", "k", 0)
    server.pause()
    at_the_link = engine.ask(messages.Set("s", "k", 1), block=False)
    until(lambda: links_of(engine)[0].load() > 0, "nothing is on its way")

    InThread(engine.close).result()

    # EngineClosed if close() came before the call was sent.
    with pytest.raises((StorageError, EngineClosed), match="closed"):
        at_the_link.get(timeout=PATIENCE_S)


def test_a_connection_that_is_left_is_made_anew_once(valkey: Server) -> None:
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 0)
        before = engine.stats().store["connects"]
        links_of(engine)[0].leave()
        for number in range(5):
            engine.set("s", "k", number)
            engine.ask(messages.Set("s", "k", number), block=False).get(timeout=PATIENCE_S)

        assert engine.stats().store["connects"] == before + 1
