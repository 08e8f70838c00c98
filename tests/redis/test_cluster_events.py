"""`events: shared` in a cluster: each event comes once and in order within its scope, or a loss is reported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cluster_load import Writers, replica_of, scopes_on_each
from event_engines import Engines, Seen, drain_chains, problems
from reliability.living import InThread
from servers import BINARIES, Cluster, Server, wait_until

from scopestate import Engine
from scopestate.errors import ConfigError, StorageError
from scopestate.persistence.redis import slots
from scopestate.persistence.redis.cluster_nodes import NodeReader
from scopestate.persistence.redis.connection import pack_text


@pytest.fixture(scope="module", params=BINARIES, ids=lambda binary: binary.name)
def replicated(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three primaries with replicas, of each server program. Each test has a prefix of its own in it."""
    with Cluster(request.param, replicas=True) as cluster:
        yield cluster


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"{abs(hash(request.node.name))}:"


def values_of(seen: Seen, scope: str) -> list[int]:
    return [event.new_value for event in list(seen.events) if event.scope == scope]


def all_were_seen(seen: Seen, writers: Writers) -> bool:
    return all(set(values_of(seen, scope)) >= set(done) for scope, done in writers.acknowledged.items())


def assert_each_once_and_in_order(seen: Seen, writers: Writers) -> None:
    for scope in writers.acknowledged:
        values = values_of(seen, scope)
        assert values == sorted(set(values)), f"scope {scope}: {values!r:.2000}"


def missed(engine: Engine) -> int:
    count: int = engine._parts.backend.counts()["events_missed"]  # type: ignore[attr-defined]
    return count


def reader_of(engine: Engine) -> Any:
    adapter: Any = engine._parts.backend
    return adapter.reader


# ------------------------------------------------------------------------------------------------- each, once, in order


def test_each_slot_has_a_tag_of_its_own_which_never_changes(cluster: Cluster) -> None:
    assert (slots.tags()[0], slots.tags()[5], slots.tags()[16383]) == ("1bz", "460", "hia")
    assert len(set(slots.tags())) == 16384
    for slot in range(0, 16384, 997):
        assert cluster.slot(f"scopestate:events:state:{{{slots.tags()[slot]}}}") == slot


@pytest.mark.parametrize("revisions", [False, True])
def test_every_engine_sees_the_writes_of_every_engine_on_all_servers(
    replicated: Cluster, engines: Engines, prefix: str, *, revisions: bool
) -> None:
    options: dict[str, Any] = {"key_prefix": prefix, "revisions": revisions}
    here = [engines.open(replicated.nodes[at], **options) for at in range(2)]
    there = engines.process(replicated.nodes[2], **options)
    seen = [Seen(engine) for engine in here]
    scopes = [scope for scopes in scopes_on_each(replicated, prefix, 2).values() for scope in scopes]

    def write(engine: Engine, name: str) -> None:
        for number in range(1, 21):
            for scope in scopes:
                engine.set(scope, name, number)

    threads = [
        InThread(lambda engine=engine, name=name: write(engine, name)) for name, engine in zip("ab", here, strict=True)
    ]
    there.write("there", 20)
    for thread in threads:
        thread.result()
    for engine in here:
        engine.drain(60)
    told = [there.read() for _ in range(20 + 40 * len(scopes))]

    for one in seen:
        events = one.wait_for_count(20 + 40 * len(scopes))
        for scope in scopes:
            mine = [event for event in events if event.scope == scope]
            for name in "ab":
                assert [event.new_value for event in mine if event.key == name] == list(range(1, 21))
            assert [event.revision for event in mine] == sorted({event.revision for event in mine})
            assert [[event.revision, event.scope, event.key, event.new_value] for event in mine] == [
                row for row in told if row[1] == scope
            ]
        assert values_of(one, "there") == list(range(1, 21))
    assert [missed(engine) for engine in here] == [0, 0]


def test_an_engine_sees_what_is_written_after_it_has_opened_and_nothing_before(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    first = engines.open(replicated.nodes[0], key_prefix=prefix)
    scopes = [scopes[0] for scopes in scopes_on_each(replicated, prefix, 1).values()]
    for scope in scopes:
        first.set(scope, "k", "before")
    second = engines.open(replicated.nodes[0], key_prefix=prefix)
    seen = Seen(second)
    for scope in [*scopes, "new"]:
        first.set(scope, "k", "after")

    events = seen.wait_for_count(len(scopes) + 1)

    assert {(event.scope, event.new_value) for event in events} == {(scope, "after") for scope in [*scopes, "new"]}


def test_an_engine_without_triggers_follows_the_events_of_all_slots(cluster: Cluster, engines: Engines) -> None:
    writer, idle = engines.open(cluster.nodes[0]), engines.open(cluster.nodes[1])
    before = idle._router.feed.position
    for number in range(60):
        writer.set(f"s{number}", "k", number)
    assert reader_of(idle).catch_up(60) is None
    assert idle._router.feed.position == before + 60
    seen = Seen(idle)
    writer.set("s1", "k", "last")
    assert [event.new_value for event in seen.wait_for_count(1)] == ["last"]
    assert missed(idle) == 0


def test_drain_waits_for_the_own_writes_in_all_slots_and_for_what_handlers_cause(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    engine = engines.open(replicated.nodes[0], key_prefix=prefix)
    drain_chains(engine)
    seen = Seen(engine)
    for number in range(100):
        engine.set(f"of{number}", "k", number)
    engine.drain(60)

    assert len(seen.events) == 100


# ------------------------------------------------------------------------------------------------------ slots that move


def test_no_event_is_lost_or_comes_twice_while_slots_move(replicated: Cluster, engines: Engines, prefix: str) -> None:
    writer, reader = [engines.open(replicated.nodes[0], key_prefix=prefix, revisions=True) for _ in range(2)]
    seen = Seen(reader)
    by_server = scopes_on_each(replicated, prefix, 1)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    moving = replicated.slot(prefix + scopes[0])
    writers = Writers(writer, scopes)
    writers.wait_for_more()

    for at in (1, 2, 0):
        replicated.move_slot(moving, list(by_server)[at])
        writers.wait_for_more()
    writers.end()
    writer.drain(60)

    wait_until(lambda: all_were_seen(seen, writers), lambda: problems(reader))
    assert_each_once_and_in_order(seen, writers)
    assert writers.uncertain == {scope: [] for scope in scopes}
    assert missed(reader) == 0
    assert reader.health().ok


def test_an_event_that_was_not_read_before_its_slot_has_moved_comes_from_the_other_server(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    writer = engines.open(replicated.nodes[0], key_prefix=prefix)
    reader = engines.open(replicated.nodes[0], key_prefix=prefix, limits={"handler_mailbox": 1})
    seen = Seen(reader)
    seen.gate.clear()
    by_server = scopes_on_each(replicated, prefix, 1)
    (source, (scope,)), (to, _), *_ = by_server.items()
    for number in range(10):
        writer.set(scope, "k", number)
    assert seen.entered.wait(30)

    replicated.move_slot(replicated.slot(prefix + scope), to)
    writer.set(scope, "k", 10)
    seen.gate.set()

    seen.wait_for_value(10)
    assert values_of(seen, scope) == list(range(11))
    replicated.move_slot(replicated.slot(prefix + scope), source)


# ------------------------------------------------------------------------------------------- connections and servers


def test_events_come_once_when_the_connections_of_readers_are_cut_under_load(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    writer, reader = [engines.open(replicated.nodes[0], key_prefix=prefix) for _ in range(2)]
    seen = Seen(reader)
    scopes = [scope for scopes in scopes_on_each(replicated, prefix, 2).values() for scope in scopes]
    writers = Writers(writer, scopes)
    for _ in range(5):
        for node in [node for node in replicated.nodes if node.ask("ROLE")[0] == "master"]:
            node.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        writers.wait_for_more(5)
    writers.end()
    writer.drain(60)

    wait_until(lambda: all_were_seen(seen, writers), lambda: problems(reader))
    assert_each_once_and_in_order(seen, writers)
    assert missed(reader) == 0


def test_events_go_on_at_a_replica_that_takes_over_by_command(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    writer, reader = [engines.open(replicated.nodes[0], key_prefix=prefix) for _ in range(2)]
    seen = Seen(reader)
    by_server = scopes_on_each(replicated, prefix, 1)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    writers = Writers(writer, scopes)
    writers.wait_for_more()
    before = next(iter(by_server))
    replica = replica_of(replicated, before)

    replica.ask("CLUSTER", "FAILOVER")
    wait_until(lambda: replica.ask("ROLE")[0] == "master", "the replica")
    replicated.wait_until_ok()
    writers.wait_for_more()
    writers.end()
    writer.drain(60)

    wait_until(lambda: all_were_seen(seen, writers), lambda: problems(reader))
    assert_each_once_and_in_order(seen, writers)
    assert missed(reader) == 0


def test_a_primary_that_dies_under_load_costs_no_event_in_silence_and_the_others_go_on(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    by_server = scopes_on_each(replicated, prefix, 1)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    survivors = list(by_server)[1:]
    writer, reader = [
        engines.open(survivors[0], key_prefix=prefix, connect_wait_ms=30_000, connect_timeout_ms=1000) for _ in range(2)
    ]
    seen = Seen(reader)
    writers = Writers(writer, scopes)
    writers.wait_for_more()

    dead = replicated.kill_primary(prefix + scopes[0])
    counts = {scope: len(values_of(seen, scope)) for scope in scopes}
    wait_until(
        lambda: all(len(values_of(seen, scope)) > counts[scope] + 5 for scope in scopes[1:]), "events of the others"
    )
    replicated.wait_for_takeover(dead)
    writers.wait_for_more()
    writers.end()
    last = {scope: writers.acknowledged[scope][-1] for scope in scopes}

    wait_until(
        lambda: all(last[scope] in values_of(seen, scope) for scope in scopes),
        lambda: f"{last} {[values_of(seen, scope)[-3:] for scope in scopes]} {problems(reader)}",
    )
    assert_each_once_and_in_order(seen, writers)
    lost = {scope: set(writers.acknowledged[scope]) - set(values_of(seen, scope)) for scope in scopes}
    assert not any(lost[scope] for scope in scopes[1:])
    if lost[scopes[0]]:
        assert "lost its end" in problems(reader)
    reader_ends_at(reader, dead)
    dead.start()
    replicated.wait_until_ok()


def reader_ends_at(engine: Engine, server: Server) -> None:
    """Wait until no connection is tried to a server that has no slots any more."""
    wait_until(
        lambda: server.port not in [pool.target.where[1] for pool in reader_of(engine)._nodes], "the end of a reader"
    )


def test_a_flush_of_one_server_is_reported_and_events_go_on(cluster: Cluster, engines: Engines) -> None:
    writer, reader = [engines.open(cluster.nodes[0]) for _ in range(2)]
    seen = Seen(reader)
    by_server = scopes_on_each(cluster, "state:", 1)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    for number in range(3):
        for scope in scopes:
            writer.set(scope, "k", number)
    seen.wait_for_count(9)

    next(iter(by_server)).ask("FLUSHALL")
    wait_until(lambda: "has begun anew" in problems(reader), lambda: problems(reader))
    for scope in scopes:
        writer.set(scope, "k", "behind it")
    writer.drain(60)

    assert [event.new_value for event in seen.wait_for_count(12)[9:]] == ["behind it"] * 3


def test_events_that_are_trimmed_before_they_were_read_are_counted(cluster: Cluster, engines: Engines) -> None:
    for node in cluster.nodes:
        node.ask("CONFIG SET", "stream-node-max-entries", 4)
    try:
        writer = engines.open(cluster.nodes[0], events_kept=5)
        reader = engines.open(cluster.nodes[0], limits={"handler_mailbox": 1})
        seen = Seen(reader)
        seen.gate.clear()
        for number in range(300):
            writer.set("s", "k", number)
        seen.gate.set()
        seen.wait_for_value(299)
    finally:
        for node in cluster.nodes:
            node.ask("CONFIG SET", "stream-node-max-entries", 100)

    assert missed(reader) > 0
    assert len(seen.events) + missed(reader) == 300
    assert "were trimmed from the stream" in problems(reader)


def test_what_is_published_at_a_server_that_was_down_at_the_opening_is_reported(engines: Engines) -> None:
    with Cluster(extra=["cluster-require-full-coverage no"]) as cluster:
        by_server = scopes_on_each(cluster, "state:", 1)
        down = cluster.nodes[2]
        down.kill()
        writer, reader = [
            engines.open(cluster.nodes[0], connect_timeout_ms=5000, connect_wait_ms=30_000) for _ in range(2)
        ]
        seen = Seen(reader)
        for server, (scope,) in by_server.items():
            if server is not down:
                writer.set(scope, "k", 1)
        seen.wait_for_count(2)
        assert f"127.0.0.1:{down.port}" in problems(reader)

        down.start()
        cluster.wait_until_ok()
        wait_until(lambda: "could not be reached when the engine was opened" in problems(reader), "the report")
        writer.set(by_server[down][0], "k", 2)

        assert seen.wait_for_count(3)[2].new_value == 2
        wait_until(lambda: "do not arrive" not in problems(reader), "a reader at each server")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_prefix_with_a_brace_is_refused_because_it_would_part_a_scope_from_its_events(cluster: Cluster) -> None:
    with Engines() as engines, pytest.raises(ConfigError) as refused:
        engines.open(cluster.nodes[0], key_prefix="{app}:")

    assert refused.value.key == "adapter.config.key_prefix"
    assert "leave `{` out of the prefix" in str(refused.value)


def test_a_user_that_may_not_track_keys_is_refused_at_the_opening(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.ask("ACL", "SETUSER", "limited", "on", ">pw", "~*", "&*", "+@all", "-client|tracking")
    try:
        with (
            Engines() as engines,
            pytest.raises(StorageError, match=r"which `events: shared` needs in a cluster.*NOPERM"),
        ):
            engines.open(cluster.nodes[0], username="limited", password="pw")
    finally:
        for node in cluster.nodes:
            node.ask("ACL", "DELUSER", "limited")


def test_an_announcement_behind_a_reply_is_taken_in(cluster: Cluster, engines: Engines) -> None:
    """The server sends both together, so the socket does not become readable for the announcement."""
    engine = engines.open(cluster.nodes[0])
    reader = reader_of(engine)
    slot = cluster.slot("state:s")
    node = NodeReader(reader, reader.servers.pool_of(slot))
    try:
        node.open([])
        connection: Any = node._connection
        stream = reader.keys[slot][0]
        node._exchange(connection, [pack_text(("SET", stream, "1")), pack_text(("DEL", stream))], 2)
        if connection.readable():
            connection.receive()
        node._bring(connection)
        assert slot in node._due
    finally:
        node.stop()
