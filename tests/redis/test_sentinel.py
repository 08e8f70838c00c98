"""A primary that real Sentinels replace while the engine writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from opening import INCREMENT, open_at, owners_of
from reliability.living import InThread, Seen, until
from servers import VALKEY, Binary, Sentinel, SentinelSetup, Server, StartServer, wait_until

from scopestate import Engine
from scopestate.errors import StorageError
from scopestate.persistence.redis.dialling import Server as OneServer
from scopestate.persistence.redis.options import RedisAddress, RedisOptions
from scopestate.persistence.redis.servers import Primary

URL = "redis://localhost"
SCOPES = ("a", "b", "c", "d")


@pytest.fixture
def setup() -> Iterator[SentinelSetup]:
    with SentinelSetup() as started:
        yield started


@pytest.fixture
def setup_of_each(server_binary: Binary) -> Iterator[SentinelSetup]:
    """As `setup`, for each server program of this machine."""
    with SentinelSetup(server_binary) as started:
        yield started


def _open(setup: SentinelSetup, url: str = URL, **redis: Any) -> Engine:
    return _open_with(setup.sentinels, setup.name, url, **redis)


def _open_with(sentinels: Sequence[Sentinel], service: str, url: str = URL, **redis: Any) -> Engine:
    names = [f"127.0.0.1:{sentinel.port}" for sentinel in sentinels]
    return open_at(url, sentinels=names, sentinel_service=service, **redis)


class Writing:
    """A thread for each scope that increments its key "n" until `end`, and keeps the errors."""

    def __init__(self, engine: Engine) -> None:
        self.done = dict.fromkeys(SCOPES, 0)
        self.errors: list[str] = []
        self._over = threading.Event()
        self._threads = [InThread(self._of(engine, scope)) for scope in SCOPES]

    def _of(self, engine: Engine, scope: str) -> Callable[[], None]:
        def write() -> None:
            while not self._over.is_set():
                try:
                    engine.update(scope, "n", INCREMENT)
                except StorageError as error:
                    self.errors.append(str(error))
                else:
                    self.done[scope] += 1

        return write

    def wait_for_more(self) -> None:
        before = dict(self.done)
        until(lambda: all(self.done[scope] >= before[scope] + 20 for scope in SCOPES), "calls that go through")

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.result()


def _value(server: Server, scope: str) -> int:
    return int(server.ask("HGET", f"state:{scope}", "n") or 0)


def _counts_exactly(engine: Engine, primary: Server) -> bool:
    """Whether what is acknowledged now is all there, on the server that is the primary now."""
    before = [_value(primary, scope) for scope in SCOPES]
    for _ in range(10):
        for scope in SCOPES:
            engine.update(scope, "n", INCREMENT)
    return [_value(primary, scope) for scope in SCOPES] == [count + 10 for count in before]


def _tell_what_happened(errors: list[str]) -> bool:
    """Whether each error says that a write may have been applied, or that it was not; READONLY says neither."""
    return all(
        ("a write may have been applied" in error or "nothing was" in error) and "read-only" not in error
        for error in errors
    )


def _until_it_writes_to(primary: Server) -> None:
    before = {scope: _value(primary, scope) for scope in SCOPES}
    until(lambda: all(_value(primary, scope) > before[scope] for scope in SCOPES), f"writes on {primary}")


_LAME_AT_NEW = {"lame": ">pw ~* &* +@all"}
_LAME_AT_OLD = {"lame": ">pw ~* &* +@all -replicaof -slaveof"}
"""A user of a Sentinel that cannot make the old primary a replica: it stays a primary for good."""


def _fail_over_to(new: Server, sentinel: Sentinel) -> None:
    wait_until(lambda: sentinel.ask("SENTINEL FAILOVER", "svc"), lambda: sentinel.log)
    wait_until(lambda: new.ask("ROLE")[0] == "master", lambda: sentinel.log)


# --------------------------------------------------------------------------------------------------------- fail-over


def test_it_writes_to_the_server_that_the_sentinels_name(setup: SentinelSetup) -> None:
    with _open(setup) as engine:
        assert engine.set("s", "k", {"a": 1}).old_value is None
        assert engine.update("s", "n", INCREMENT).new_value == 1
        assert engine.list("s") == [{"a": 1}, 1]
        assert engine.list_groups() == ["s"]

        assert setup.primary().ask("HGET", "state:s", "n") == "1"
        assert {owner.address for owner in owners_of(engine)} == {f"127.0.0.1:{setup.primary().port}"}


def test_a_fail_over_on_request_is_followed_though_the_old_primary_still_takes_writes(setup: SentinelSetup) -> None:
    with _open(setup) as engine:
        writing = Writing(engine)
        writing.wait_for_more()

        old = setup.primary()
        new = setup.fail_over()
        _until_it_writes_to(new)
        # It has not been told yet, which takes the sentinels ten seconds: nobody would notice by an error.
        assert old.ask("ROLE")[0] == "master"
        writing.wait_for_more()
        writing.end()

        assert _tell_what_happened(writing.errors), writing.errors
        assert _counts_exactly(engine, new)
        assert {owner.address for owner in owners_of(engine)} == {f"127.0.0.1:{new.port}"}
        assert engine.health().ok is True


def test_a_killed_primary_is_replaced_and_the_engine_goes_on_by_itself(setup_of_each: SentinelSetup) -> None:
    setup = setup_of_each
    with _open(setup) as engine:
        writing = Writing(engine)
        writing.wait_for_more()

        new = setup.kill_primary()
        _until_it_writes_to(new)
        writing.end()

        # A call that was under way when the server died, for each of the scopes; all others have waited.
        assert len(writing.errors) <= len(SCOPES), writing.errors
        assert _tell_what_happened(writing.errors), writing.errors
        assert _counts_exactly(engine, new)
        assert engine.health().ok is True


def test_a_primary_that_was_made_a_replica_is_left_without_an_error(setup: SentinelSetup) -> None:
    with _open(setup) as engine:
        writing = Writing(engine)
        writing.wait_for_more()
        old = setup.primary()
        new = setup.replica()

        # As the sentinels do it in the end, but before they know: until then there is no primary.
        old.ask("REPLICAOF", "127.0.0.1", new.port)
        setup.fail_over()
        _until_it_writes_to(new)
        writing.end()

        assert _tell_what_happened(writing.errors), writing.errors
        assert _counts_exactly(engine, new)


def test_who_waits_for_events_of_others_is_told_of_a_fail_over_too(setup: SentinelSetup) -> None:
    with _open(setup, events="shared") as there, _open(setup, events="shared") as here:
        seen = Seen()
        here.on_change(scope="s")(seen.__call__)
        there.set("s", "k", 1)
        seen.wait_for(1)

        new = setup.fail_over()
        writing = Writing(there)
        _until_it_writes_to(new)
        writing.end()
        there.set("s", "last", 1)
        until(lambda: any(event.key == "last" for event in seen.wait_for(1)), "the event")

        # Sooner than the old primary is told that it is none.
        assert setup.nodes[0].ask("ROLE")[0] == "master"


def test_who_waits_for_events_does_not_go_back_by_the_word_of_a_sentinel_that_has_heard_nothing(
    start_server: StartServer,
) -> None:
    # One that may not subscribe hears nothing from the others.
    deaf_user = {"deaf": ">pw ~* &* +@all -subscribe -psubscribe -publish"}
    old = start_server(users=_LAME_AT_OLD | deaf_user)
    new = start_server(users=_LAME_AT_NEW | deaf_user, replica_of=old)
    with (
        Sentinel(VALKEY, "svc", old, quorum=1, down_after_ms=60_000, user="deaf") as deaf,
        Sentinel(VALKEY, "svc", old, quorum=1, down_after_ms=60_000, user="lame") as leader,
        _open_with([deaf, leader], "svc", events="shared") as there,
        _open_with([deaf, leader], "svc", events="shared") as here,
    ):
        seen = Seen()
        here.on_change(scope="s")(seen.__call__)
        there.set("s", "k", 1)
        seen.wait_for(1)

        _fail_over_to(new, leader)
        writing = Writing(there)
        _until_it_writes_to(new)
        writing.end()
        there.set("s", "last", 1)
        until(lambda: any(event.key == "last" for event in seen.wait_for(1)), "the event")

        assert deaf.ask("SENTINEL GET-MASTER-ADDR-BY-NAME", "svc")[1] == old.port
        assert old.ask("ROLE")[0] == "master"


def test_a_connection_that_was_made_to_the_old_primary_too_late_is_cut_too(start_server: StartServer) -> None:
    old = start_server(users=_LAME_AT_OLD)
    new = start_server(users=_LAME_AT_NEW, replica_of=old)
    with (
        Sentinel(VALKEY, "svc", old, quorum=1, down_after_ms=60_000, user="lame") as leader,
        _open_with([leader], "svc") as engine,
    ):
        adapter: Any = engine._parts.backend
        visited = adapter._servers.primaries()[0]
        before = visited.dial()
        _fail_over_to(new, leader)
        until(before.is_stale, "a connection that is cut")

        late = OneServer(RedisOptions(), RedisAddress(*old.address)).dial()
        visited._dialled.add(late)

        until(late.is_stale, "a second one that is cut")
        before.close()
        late.close()


def test_sentinels_that_were_set_up_anew_and_count_from_zero_are_believed(start_server: StartServer) -> None:
    first, second = start_server(), start_server()
    with (
        Sentinel(VALKEY, "svc", first, quorum=1, down_after_ms=60_000, epoch=7) as sentinel,
        _open_with([sentinel], "svc") as engine,
    ):
        engine.set("s", "k", 1)

        sentinel.stop()
        sentinel.watch(second)
        sentinel.start()
        until(lambda: engine.get("s", "k") is None, "the primary that they name now")


def test_without_a_primary_calls_fail_in_time_and_say_who_was_asked(setup: SentinelSetup) -> None:
    with _open(setup, connect_wait_ms=300, connect_timeout_ms=2000) as engine:
        engine.set("s", "k", 1)
        for sentinel in setup.sentinels:
            sentinel.kill()
        engine.set("s", "k", 2)
        assert engine.health().ok is True  # without sentinels it stays where it is
        for node in setup.nodes:
            node.kill()

        begun = time.monotonic()
        with pytest.raises(StorageError) as failed:
            engine.set("s", "k", 3)

        assert time.monotonic() - begun < 20
        text = str(failed.value)
        assert "nothing was sent" in text
        assert repr(setup.name) in text
        assert all(f"127.0.0.1:{sentinel.port}" in text for sentinel in setup.sentinels)
        assert repr(setup.name) in engine.health().problems[0]


# ----------------------------------------------------------------------------------------------------------- opening


def test_without_any_sentinel_it_does_not_open_and_names_them(setup: SentinelSetup) -> None:
    for sentinel in setup.sentinels:
        sentinel.kill()

    with pytest.raises(StorageError) as refused:
        _open(setup, "redis://:sesame-7@localhost", sentinel_password="open-9")

    text = str(refused.value)
    assert all(f"127.0.0.1:{sentinel.port}" in text for sentinel in setup.sentinels)
    assert repr(setup.name) in text
    assert "sesame-7" not in text
    assert "open-9" not in text


def test_sentinels_that_hang_do_not_hold_the_start_up_longer_than_its_time(
    setup: SentinelSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sentinel in setup.sentinels:
        sentinel.pause()
    waits: list[float] = []
    ask = Primary.ask

    def noted(primary: Primary, sentinel: tuple[str, int], patience_s: float) -> tuple[str, int]:
        waits.append(patience_s)
        return ask(primary, sentinel, patience_s)

    monkeypatch.setattr(Primary, "ask", noted)

    with pytest.raises(StorageError, match=setup.name):
        _open(setup, connect_timeout_ms=1000)

    assert len(waits) == len(setup.sentinels)
    assert sum(waits) <= 1.0  # all of them share the time


def test_one_sentinel_that_answers_is_enough(setup: SentinelSetup) -> None:
    setup.sentinels[0].pause()
    setup.sentinels[1].kill()

    # The one that hangs gets its share of the time, and no more.
    with _open(setup, connect_timeout_ms=12_000) as engine:
        engine.set("s", "k", 1)
        assert engine.get("s", "k") == 1


def test_a_sentinel_that_names_a_replica_is_not_believed(start_server: StartServer, server_binary: Binary) -> None:
    primary = start_server(server_binary)
    replica = start_server(server_binary, replica_of=primary)
    with (
        Sentinel(server_binary, "svc", replica, quorum=1, down_after_ms=60_000) as stale,
        Sentinel(server_binary, "svc", primary, quorum=1, down_after_ms=60_000) as current,
    ):
        with pytest.raises(StorageError, match=rf"127.0.0.1:{replica.port}, which is a replica now"):
            _open_with([stale], "svc")
        with _open_with([stale, current], "svc") as engine:
            engine.set("s", "n", 1)

        assert primary.ask("HGET", "state:s", "n") == "1"


def test_a_service_that_the_sentinels_do_not_know_is_named() -> None:
    with SentinelSetup(sentinels=1) as setup, pytest.raises(StorageError, match="does not know the service 'other'"):
        _open_with(setup.sentinels, "other")


def test_servers_and_sentinels_have_passwords_of_their_own() -> None:
    with SentinelSetup(sentinels=1, password="sesame-7") as setup:
        setup.sentinels[0].ask("ACL", "SETUSER", "default", "resetpass", ">open-9")
        with _open(setup, "redis://:sesame-7@localhost", sentinel_password="open-9") as engine:
            engine.set("s", "k", 1)
            assert engine.get("s", "k") == 1

        for url, sentinel_password, who in (
            ("redis://:sesame-7@localhost", "wrong-1", setup.sentinels[0]),
            ("redis://:wrong-1@localhost", "open-9", setup.nodes[0]),
        ):
            with pytest.raises(StorageError, match=f"127.0.0.1:{who.port}.*password") as refused:
                _open(setup, url, sentinel_password=sentinel_password)
            for secret in ("sesame-7", "open-9", "wrong-1"):
                assert secret not in str(refused.value)


def test_the_database_is_that_of_the_primary_only() -> None:
    with SentinelSetup(VALKEY, sentinels=1) as setup, _open(setup, "redis://localhost/3") as engine:
        engine.set("s", "k", 1)

        assert setup.nodes[0].client(db=3).hget("state:s", "k") == "1"
