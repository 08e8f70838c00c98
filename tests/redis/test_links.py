"""A connection goes on when its thread cannot be started, its own code fails, or its server stays away."""

from __future__ import annotations

import _thread
import threading
from typing import Any

import pytest
from opening import at_rest, open_at, owners_of, scope_of
from reliability.living import PATIENCE_S, InThread, until
from servers import Server, StartServer

from scopestate import Engine, messages
from scopestate.errors import ConnectionLost, EngineClosed, NotConnected, StorageError
from scopestate.ops import turns
from scopestate.persistence.connections import attempts
from scopestate.persistence.redis.calls import Call, Command
from scopestate.persistence.redis.connection import Connection
from scopestate.persistence.redis.owner import RedisConnectionOwner

NEVER_AGAIN = (30.0, 30.0)
"""Pauses between attempts to connect, longer than any test waits."""


def command_of(engine: Engine) -> Command:
    """A read of a key of `s`, as the scope's command under way."""
    commands = scope_of(engine).commands
    command = commands.make([Call(turns.Get("k"), None, 0)], 1, [])
    assert command is not None
    commands.command = command
    return command


def test_a_command_that_is_over_is_neither_sent_nor_taken_in_again(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An inbox may have it twice: a caller that was interrupted cannot know if it was posted, and posts it again."""
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 1)
        (owner, *_) = owners_of(engine)
        command = command_of(engine)
        owner.post(command)
        at_rest(engine)
        assert command.over
        (call,) = command.calls
        assert call.answer == b"1"
        call.answer = b"as it was"
        monkeypatch.setattr(Connection, "send", lambda *_: pytest.fail("it was sent again"))

        owner.post(command)
        at_rest(engine)

        assert call.answer == b"as it was"


def test_a_command_on_its_way_is_not_sent_for_its_second_copy(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    send = Connection.send

    def noting(self: Connection, data: bytes) -> None:
        sent.append(data)
        send(self, data)

    server = start_server()
    with open_at(server.url) as engine:
        engine.set("s", "k", 1)
        engine.get("s", "k")  # the server knows its script
        monkeypatch.setattr(Connection, "send", noting)
        server.pause()
        (owner, *_) = owners_of(engine)
        command = command_of(engine)
        owner.post(command)
        until(lambda: bool(sent), "nothing is sent")
        owner.post(command)
        server.resume()
        at_rest(engine)

        assert sent == [command.data]


def test_without_any_thread_for_a_connection_its_calls_fail_and_the_next_one_tries_again(
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


def test_an_owner_whose_thread_never_starts_can_be_closed(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = threading.Event()
    start = threading.Thread.start

    def never(self: threading.Thread) -> None:
        if self.name == "scopestate-redis":
            tried.set()
            raise RuntimeError("can't start new thread")
        start(self)

    engine = open_at(valkey.url)
    monkeypatch.setattr(threading.Thread, "start", never)
    (owner, *_) = owners_of(engine)
    owner.post(scope_of(engine))
    assert tried.wait(PATIENCE_S)
    engine.close()


def test_an_error_in_the_middle_gives_no_call_the_answer_of_another(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url) as engine:
        for number in range(4):
            engine.set(f"s{number}", "k", number)
        take_answers = RedisConnectionOwner._take_answers

        def failing(self: RedisConnectionOwner, connection: Any) -> None:
            monkeypatch.setattr(RedisConnectionOwner, "_take_answers", take_answers)
            raise MemoryError

        monkeypatch.setattr(RedisConnectionOwner, "_take_answers", failing)
        with pytest.raises(StorageError, match="an error in this engine") as caught:
            engine.ask(messages.Set("s0", "k", "new"), block=False).get(timeout=PATIENCE_S)
        assert type(caught.value.__cause__) is ConnectionLost
        replies = [engine.ask(messages.Get(f"s{number}", "k"), block=False) for number in range(1, 4)]
        assert [reply.get(timeout=PATIENCE_S) for reply in replies] == [1, 2, 3]
        at_rest(engine)


def test_a_call_waits_for_a_connection_no_longer_than_it_should(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    monkeypatch.setattr(attempts, "BACKOFF_S", NEVER_AGAIN)
    with open_at(server.url, connect_wait_ms=50) as engine:
        engine.set("s", "k", 1)
        server.kill()
        for _ in range(2):
            call = InThread(lambda: engine.set("s", "k", 2))
            with pytest.raises(StorageError) as caught:
                call.result()
        assert type(caught.value.__cause__) is NotConnected


def test_every_connection_is_made_again_by_itself(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, connect_wait_ms=10, pool_size=4) as engine:
        for number in range(8):
            engine.set(str(number), "k", 1)
        server.kill()
        lists = [InThread(lambda number=number: engine.list(str(number))) for number in range(8)]  # type: ignore[misc]
        for one in lists:
            with pytest.raises(StorageError):
                one.result()
        until(
            lambda: sum(owner.why_not is not None for owner in owners_of(engine)) > 1, "only one connection was tried"
        )
        assert not engine.health().ok
        server.start()
        until(lambda: engine.health().ok, "a connection is not made again")


def test_close_does_not_wait_for_a_server_that_does_not_answer(start_server: StartServer) -> None:
    """With limits that are longer than any test waits: what ends the wait is that the connection is shut."""
    hour_ms = 3_600_000
    server = start_server()
    engine = open_at(server.url, {"call_timeout_ms": hour_ms, "close_grace_ms": 1}, call_timeout_ms=hour_ms)
    engine.set("s", "k", 0)
    server.pause()
    under_way = engine.ask(messages.Set("s", "k", 1), block=False)
    until(lambda: owners_of(engine)[0].load() > 0, "nothing is on its way")

    InThread(engine.close).result()

    # EngineClosed if close() came before the call was sent.
    with pytest.raises((StorageError, EngineClosed), match="closed"):
        under_way.get(timeout=PATIENCE_S)


def test_a_connection_that_is_left_is_made_anew_once(valkey: Server) -> None:
    with open_at(valkey.url) as engine:
        engine.set("s", "k", 0)
        before = engine.stats().store["connects"]
        owners_of(engine)[0].leave()
        for number in range(5):
            engine.set("s", "k", number)
            engine.ask(messages.Set("s", "k", number), block=False).get(timeout=PATIENCE_S)

        assert engine.stats().store["connects"] == before + 1
