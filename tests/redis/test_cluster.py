"""A cluster of real servers: scopes live on all of them, slots move, and servers die."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opening import INCREMENT, open_at, owners_of
from reliability.living import InThread, until
from servers import Binary, Cluster, Server, StartServer

from scopestate import Engine
from scopestate.errors import ConfigError, EngineClosed, NotConnected, StorageError
from scopestate.ops.turns import Entry
from scopestate.persistence.redis.backend import RedisBackend
from scopestate.persistence.redis.options import RedisOptions


@pytest.fixture
def engine(cluster: Cluster) -> Iterator[Engine]:
    with open_at(cluster.urls[0]) as opened:
        yield opened


@pytest.fixture
def plain_engine(cluster: Cluster) -> Iterator[Engine]:
    with open_at(cluster.urls[0], revisions=False) as opened:
        yield opened


class Counting:
    """Threads that increment key "n" of their scopes, and count what was acknowledged."""

    def __init__(self, engine: Engine, scopes: list[str]) -> None:
        self.done = Counter[str]()
        self.errors: dict[str, list[StorageError]] = {scope: [] for scope in scopes}
        self._over = threading.Event()
        self._threads = [InThread(self._of(engine, scope)) for scope in scopes]
        self._scopes = scopes

    def _of(self, engine: Engine, scope: str) -> Callable[[], None]:
        def count() -> None:
            while not self._over.is_set():
                try:
                    engine.update(scope, "n", INCREMENT)
                except StorageError as error:
                    self.errors[scope].append(error)
                else:
                    self.done[scope] += 1

        return count

    def wait_for_more(self, count: int = 20) -> None:
        """Wait until each thread has counted on."""
        before = Counter(self.done)
        until(lambda: all(self.done[scope] >= before[scope] + count for scope in self._scopes), "calls that go through")

    def end(self) -> Counter[str]:
        self._over.set()
        for thread in self._threads:
            thread.result()
        return self.done


def _key(scope: str) -> str:
    return f"state:{scope}"


def _other(cluster: Cluster, owner: Server) -> Server:
    return next(node for node in cluster.nodes if node is not owner)


def _on_each(cluster: Cluster, each: int) -> dict[Server, list[str]]:
    """Return names of scopes by the server that owns them, `each` for every primary."""
    found: dict[Server, list[str]] = {node: [] for node in cluster.nodes[:3]}
    number = 0
    while any(len(scopes) < each for scopes in found.values()):
        scope = f"s{number}"
        scopes = found[cluster.owner(_key(scope))]
        if len(scopes) < each:
            scopes.append(scope)
        number += 1
    return found


def _adapter(engine: Engine) -> RedisBackend:
    adapter = engine._parts.backend
    assert type(adapter) is RedisBackend
    return adapter


def _redirections(server: Server) -> int:
    """How often a server said MOVED since CONFIG RESETSTAT."""
    stats = server.ask("INFO", "errorstats").get("errorstat_MOVED", {"count": 0})
    return int(stats["count"])


# ----------------------------------------------------------------------------------------------------- where scopes are


def test_every_call_works_on_scopes_of_all_servers(cluster: Cluster, engine: Engine) -> None:
    for scopes in _on_each(cluster, 5).values():
        for scope in scopes:
            assert engine.set(scope, "k", {"of": scope}).old_value is None
            assert engine.get(scope, "k") == {"of": scope}
            assert engine.update(scope, "n", INCREMENT).new_value == 1
            assert engine.update(scope, "n", INCREMENT).new_value == 2
            assert engine.list(scope) == [{"of": scope}, 2]
            assert engine.delete(scope, "k") == {"of": scope}
            assert engine.get(scope, "k") is None

    # Each with what is beside it.
    assert [node.ask("DBSIZE") for node in cluster.nodes] == [10, 10, 10]


def test_one_server_is_enough_to_find_the_others(cluster: Cluster) -> None:
    for node in cluster.nodes:
        with open_at(node.url) as engine:
            for number in range(20):
                engine.update(f"s{number}", "n", INCREMENT)

    assert [cluster.client().hget(_key(f"s{number}"), "n") for number in range(20)] == ["3"] * 20


@pytest.mark.parametrize(
    "scope", ["{a}b", "a{b}", "{}", "{}a", "{a", "a}", "{{a}}", "a{}{b}", "\u00e9{\u00fc}", "{a}{b}"]
)
def test_braces_in_the_name_of_a_scope_choose_its_server_as_they_do_for_everybody(
    cluster: Cluster, engine: Engine, scope: str
) -> None:
    engine.set(scope, "k", 1)
    engine.update(scope, "k", INCREMENT)

    assert cluster.owner(_key(scope)).ask("HGET", _key(scope), "k") == "2"
    assert engine.list_groups() == [scope]


def test_a_value_too_large_for_the_shared_connection_goes_to_the_right_server_too(
    cluster: Cluster, engine: Engine
) -> None:
    large = "x" * 300_000
    for scopes in _on_each(cluster, 2).values():
        for scope in scopes:
            engine.set(scope, "k", large)
            assert engine.get(scope, "k") == large


def test_groups_are_those_of_all_servers_each_once(cluster: Cluster, engine: Engine) -> None:
    scopes = sorted(scope for scopes in _on_each(cluster, 4).values() for scope in scopes)
    for scope in scopes:
        engine.set(scope, "k", 1)
    slot = cluster.slot(_key(scopes[0]))
    owner = cluster.owner(slot)
    cluster.begin_move(slot, _other(cluster, owner), keys=[_key(scopes[0])])
    while_half_moved = sorted(engine.list_groups())
    cluster.finish_move(slot)

    assert while_half_moved == scopes
    assert sorted(engine.list_groups()) == scopes


def test_a_server_of_a_cluster_without_slots_is_refused(start_server: StartServer) -> None:
    alone = start_server(extra=["cluster-enabled yes"])

    with pytest.raises(StorageError, match=rf"127.0.0.1:{alone.port} .*no server has any slots yet"):
        open_at(alone.url)


# ---------------------------------------------------------------------------------------------------- slots that move


def test_a_slot_that_moves_while_callers_write_loses_and_repeats_nothing(cluster: Cluster, engine: Engine) -> None:
    moving = "{one}"
    scopes = [moving, "{one}b", *(scopes[0] for scopes in _on_each(cluster, 1).values())]
    counting = Counting(engine, scopes)
    counting.wait_for_more()
    slot = cluster.slot(_key(moving))

    for _ in range(4):
        cluster.move_slot(slot, _other(cluster, cluster.owner(slot)))
        counting.wait_for_more()
    done = counting.end()

    assert counting.errors == {scope: [] for scope in scopes}
    assert {scope: engine.get(scope, "n") for scope in scopes} == dict(done)


def test_calls_on_keys_with_revisions_wait_until_their_slot_is_moved(cluster: Cluster, engine: Engine) -> None:
    """They concern several keys: a server of a slot that is half moved does not have all of these."""
    there, here, new = "{one}there", "{one}here", "{one}new"
    slot = cluster.slot(_key(there))
    for scope in (there, here):
        engine.set(scope, "k", scope)
    counting = Counting(engine, [there, here, new])
    counting.wait_for_more()

    cluster.begin_move(slot, _other(cluster, cluster.owner(slot)), keys=[_key(there)])
    waiting = InThread(lambda: engine.set(there, "k", "changed").old_value)
    cluster.finish_move(slot)

    assert waiting.result() == there
    counting.wait_for_more()
    done = counting.end()
    assert counting.errors == {there: [], here: [], new: []}
    assert {scope: engine.get(scope, "n") for scope in done} == dict(done)


def test_without_revisions_a_slot_that_is_half_moved_is_served_whole(cluster: Cluster, plain_engine: Engine) -> None:
    engine = plain_engine
    there, here, new = "{one}there", "{one}here", "{one}new"
    slot = cluster.slot(_key(there))
    source = cluster.owner(slot)
    to = _other(cluster, source)
    for scope in (there, here):
        engine.set(scope, "k", scope)
    counting = Counting(engine, [there, here])
    counting.wait_for_more()

    cluster.begin_move(slot, to, keys=[_key(there)])
    counting_new = Counting(engine, [new])
    counting_new.wait_for_more()
    counting.wait_for_more()
    assert engine.get(there, "k") == there
    assert engine.list(there)[0] == there
    assert engine.set(there, "k", "changed").old_value == there
    assert engine.delete(there, "k") == "changed"
    large = "x" * 300_000
    engine.set(there, "large", large)
    assert engine.get(there, "large") == large
    assert (source.ask("CLUSTER COUNTKEYSINSLOT", slot), to.ask("CLUSTER COUNTKEYSINSLOT", slot)) == (1, 2)
    cluster.finish_move(slot)
    counting.wait_for_more()
    done = counting.end() + counting_new.end()

    assert counting.errors | counting_new.errors == {there: [], here: [], new: []}
    assert {scope: engine.get(scope, "n") for scope in (there, here, new)} == dict(done)
    assert {to.ask("HGET", _key(scope), "n") for scope in done} == {str(count) for count in done.values()}


def test_a_moved_slot_is_asked_for_in_vain_only_once(cluster: Cluster, engine: Engine) -> None:
    scope = "{one}"
    slot = cluster.slot(_key(scope))
    source = cluster.owner(slot)
    engine.set(scope, "n", 0)
    cluster.move_slot(slot, _other(cluster, source))
    source.ask("CONFIG RESETSTAT")

    for _ in range(5):
        engine.update(scope, "n", INCREMENT)
        engine.update("{one}other", "n", INCREMENT)

    assert _redirections(source) == 1
    assert engine.get(scope, "n") == 5


def test_what_is_read_and_saved_past_the_scopes_follows_its_slot(cluster: Cluster, plain_engine: Engine) -> None:
    """As `store export` and `store import` do."""
    engine = plain_engine
    adapter = _adapter(engine)
    there, here = "{one}there", "{one}here"
    slot = cluster.slot(_key(there))
    engine.set(there, "k", 1)
    engine.set(here, "k", 2)
    cluster.begin_move(slot, _other(cluster, cluster.owner(slot)), keys=[_key(there)])

    half_moved = [adapter.read(scope)["k"].json for scope in (there, here)]
    adapter.write({there: {"k": Entry(b"3", 0)}})
    cluster.finish_move(slot)
    adapter.write({here: {"k": Entry(b"4", 0)}})
    moved = [adapter.read(scope)["k"].json for scope in (there, here)]

    assert half_moved == [b"1", b"2"]
    assert moved == [b"3", b"4"]


# ----------------------------------------------------------------------------------------------------- servers that die


def test_a_primary_that_dies_is_replaced_and_nobody_else_loses_a_count(server_binary: Binary) -> None:
    with Cluster(server_binary, replicas=True) as cluster, open_at(cluster.urls[0]) as engine:
        by_server = _on_each(cluster, 2)
        scopes = [scope for scopes in by_server.values() for scope in scopes]
        counting = Counting(engine, scopes)
        counting.wait_for_more()

        dead = cluster.kill_primary(_key(scopes[0]))
        cluster.wait_for_takeover(dead)
        counting.wait_for_more()
        done = counting.end()

        hit = by_server[dead]
        for scope in scopes:
            if scope not in hit:
                assert counting.errors[scope] == []
                assert engine.get(scope, "n") == done[scope]
        # What was acknowledged and not yet with the replica is gone, which is how Redis replicates. But each error says
        # that nobody knows, and each of them can only be about the one call that was under way.
        for scope in hit:
            assert len(counting.errors[scope]) <= 1
            assert all("a write may have been applied" in str(error) for error in counting.errors[scope])
            assert engine.get(scope, "n") <= done[scope] + len(counting.errors[scope])
            before = engine.get(scope, "n")
            assert engine.update(scope, "n", INCREMENT).new_value == before + 1
        assert sorted(engine.list_groups()) == sorted(scopes)
        assert engine.health().ok is True


def test_who_waits_for_a_dead_primary_goes_on_at_its_replica_and_nothing_is_sent_twice() -> None:
    with Cluster(replicas=True) as cluster, open_at(cluster.urls[1], connect_wait_ms=20_000) as engine:
        scope = "s"
        large = "x" * 300_000
        engine.set(scope, "n", 0)
        engine.set(scope, "large", large)
        dead = cluster.owner(_key(scope))
        cluster.wait_until_replicated()
        dead.kill()
        waiting = [InThread(lambda: engine.update(scope, "n", INCREMENT).new_value) for _ in range(8)]
        reading = [InThread(lambda: engine.get(scope, "large")) for _ in range(2)]
        elsewhere = InThread(lambda: engine.update("{one}other", "n", INCREMENT).new_value)

        assert sorted(thread.result() for thread in waiting) == list(range(1, 9))
        assert [thread.result() for thread in reading] == [large] * 2
        assert elsewhere.result() == 1
        assert engine.get(scope, "n") == 8


def test_a_primary_without_a_replica_fails_its_calls_in_time_and_serves_again_when_it_is_back() -> None:
    with (
        Cluster(extra=["cluster-require-full-coverage no"]) as cluster,
        open_at(cluster.urls[0], connect_wait_ms=300, call_timeout_ms=1000) as engine,
    ):
        by_server = _on_each(cluster, 1)
        for scopes in by_server.values():
            engine.set(scopes[0], "n", 0)
        dead, (lost,) = next((server, scopes) for server, scopes in by_server.items() if server is not cluster.nodes[0])
        dead.kill()

        begun = time.monotonic()
        errors = [_error_of(lambda: engine.update(lost, "n", INCREMENT)) for _ in range(2)]
        took_s = time.monotonic() - begun

        assert took_s < 20  # not connect_wait_ms again and again
        assert f"127.0.0.1:{dead.port}" in errors[1]
        assert "nothing was sent" in errors[1]
        assert engine.health().ok is False
        assert f"127.0.0.1:{dead.port}" in engine.health().problems[0]
        assert [
            engine.update(scopes[0], "n", INCREMENT).new_value for scopes in by_server.values() if scopes != [lost]
        ] == [
            1,
            1,
        ]

        dead.start()
        cluster.wait_until_ok()
        until(lambda: not _error_of(lambda: engine.update(lost, "n", INCREMENT)), "the server that is back")
        assert engine.health().ok is True


def test_a_copy_of_a_scope_from_a_cluster_that_is_down_is_not_called_a_write() -> None:
    with Cluster() as cluster, open_at(cluster.urls[0]) as engine:
        scope = _on_each(cluster, 1)[cluster.nodes[0]][0]
        engine.set(scope, "k", 1)
        cluster.nodes[2].kill()
        until(lambda: cluster.nodes[0].ask("CLUSTER INFO")["cluster_state"] == "fail", "a cluster that is down")

        with pytest.raises(StorageError) as failed:
            _adapter(engine).read(scope)

        assert "was not ready for it (CLUSTERDOWN" in str(failed.value)
        assert "written" not in str(failed.value)


def _error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (StorageError, EngineClosed) as error:
        return str(error)
    return ""


def test_a_primary_that_hangs_is_replaced() -> None:
    with (
        Cluster(replicas=True) as cluster,
        open_at(cluster.urls[0], call_timeout_ms=1000, connect_timeout_ms=1000) as engine,
    ):
        scope = "s"
        engine.set(scope, "n", 0)
        hung = cluster.owner(_key(scope))
        hung.pause()

        first = _error_of(lambda: engine.update(scope, "n", INCREMENT))
        until(lambda: not _error_of(lambda: engine.update(scope, "n", INCREMENT)), "the replica")

        assert "no answer within 1 s" in first
        assert "a write may have been applied" in first
        hung.resume()


class _Counted:
    """A lock that counts who has come to it."""

    def __init__(self) -> None:
        self.came: list[None] = []
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.came.append(None)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_of_many_who_lose_their_server_one_asks_for_the_map_though_nobody_answers(
    cluster: Cluster, plain_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = plain_engine  # one with revisions looks for keys that have expired, and reads the map for that
    asked: list[tuple[Any, ...]] = []
    answer = threading.Event()

    def ask(options: RedisOptions, *where: Any) -> list[Any]:
        asked.append(where)
        assert answer.wait(20.0)
        raise NotConnected("nobody is there")

    servers: Any = _adapter(engine)._servers
    reading = servers._reading = _Counted()
    monkeypatch.setattr("scopestate.persistence.redis.cluster.slots_of", ask)

    waiting = [InThread(servers.refresh) for _ in range(6)]
    until(lambda: len(reading.came) == len(waiting) and bool(asked), "those who want the map")
    answer.set()
    for thread in waiting:
        thread.result()

    each_node_and_the_address = len(cluster.nodes) + 1
    assert len(asked) == each_node_and_the_address
    servers.refresh()
    assert len(asked) == 2 * each_node_and_the_address


def test_closing_ends_the_wait_for_a_dead_primary() -> None:
    with Cluster() as cluster, open_at(cluster.urls[0], connect_wait_ms=60_000) as engine:
        scope = next(scopes[0] for node, scopes in _on_each(cluster, 1).items() if node is not cluster.nodes[0])
        cluster.kill_primary(_key(scope))
        waiting = [InThread(lambda: _error_of(lambda: engine.set(scope, "k", 1))) for _ in range(3)]
        until(lambda: any(owner.why_not for owner in owners_of(engine)), "a call that waits")

        begun = time.monotonic()
        _adapter(engine).close()

        assert [thread.result() for thread in waiting] == ["the engine is closed"] * 3
        assert _error_of(lambda: engine.get(scope, "k")) == "the engine is closed"
        assert time.monotonic() - begun < 30  # not the connect_wait_ms of 60 s


# ------------------------------------------------------------------------------------------------------------ opening


def test_it_opens_while_a_primary_is_down() -> None:
    with Cluster(extra=["cluster-require-full-coverage no"]) as cluster:
        by_server = _on_each(cluster, 1)
        cluster.nodes[0].kill()
        with pytest.raises(StorageError, match=f"127.0.0.1:{cluster.nodes[0].port}.*refused"):
            open_at(cluster.urls[0])
        with open_at(cluster.urls[1]) as engine:
            for node in cluster.nodes[1:]:
                engine.set(by_server[node][0], "k", 1)


def test_a_database_is_refused_because_clusters_have_only_one(cluster: Cluster) -> None:
    with pytest.raises(ConfigError) as refused:
        open_at(cluster.urls[0], database=2)

    assert refused.value.key == "adapter.config.database"
    assert "only database 0" in str(refused.value)


def test_a_server_that_is_in_no_cluster_is_one_server(start_server: StartServer) -> None:
    with open_at(start_server().url) as engine:
        assert len({owner.address for owner in owners_of(engine)}) == 1
