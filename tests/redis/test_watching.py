"""Watches over shared events: every change in order, each once, without a gap, from any engine, and resumable."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from event_engines import STREAM, Engines, set_patiently
from one_server import PATIENCE_S
from servers import Cluster, Server

from scopestate import Engine, ops
from scopestate.errors import Compacted, StorageError, Unsupported


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


def open_one(engines: Engines, server: Server, **options: Any) -> Engine:
    return engines.open(server, **{"revisions": True, **options})


def values(changes: Any, count: int) -> list[Any]:
    return [(change.key, change.value) for change in (changes.get(PATIENCE_S) for _ in range(count))]


def test_a_watch_begins_with_the_state_and_sees_every_change_of_every_engine(
    redis_server: Server, engines: Engines
) -> None:
    one, two = open_one(engines, redis_server), open_one(engines, redis_server)
    one.set("s", "a", 1)
    two.set("s", "b", 2)
    two.set("other", "a", 0)
    with one.watch("s") as changes:
        first = [changes.get(PATIENCE_S) for _ in range(2)]
        assert [(change.key, change.value, change.initial) for change in first] == [("a", 1, True), ("b", 2, True)]
        two.update("s", "a", [ops.Increment("", 5)])
        one.delete("s", "b")
        two.set("other", "a", 1)
        one.set("s", "c", None)
        found = [changes.get(PATIENCE_S) for _ in range(3)]
        assert [(change.kind, change.key, change.value) for change in found] == [
            ("put", "a", 6),
            ("delete", "b", None),
            ("put", "c", None),
        ]
        assert found[0].old_value == 1
        assert [change.revision for change in found] == sorted({change.revision for change in found})
        assert one.entry("s", "a").revision == found[0].revision  # type: ignore[union-attr]


def test_a_cursor_is_good_in_another_engine_and_in_one_that_starts_later(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    with one.watch("s", snapshot=False) as changes:
        for number in range(5):
            one.set("s", "k", number)
        assert values(changes, 2) == [("k", 0), ("k", 1)]
        cursor = changes.cursor
    with one.watch(snapshot=False) as many:
        one.set("s", "k", 5)
        one.set("t", "k", 6)
        assert values(many, 1) == [("k", 5)]
        many_cursor = many.cursor
    later = open_one(engines, valkey)
    with later.watch("s", since=cursor) as changes:
        assert values(changes, 4) == [("k", 2), ("k", 3), ("k", 4), ("k", 5)]
        one.set("s", "k", 7)
        assert values(changes, 1) == [("k", 7)]
    with later.watch(since=many_cursor) as many:
        assert values(many, 2) == [("k", 6), ("k", 7)]
    entry = one.entry("s", "k")
    assert entry is not None
    with later.watch("s", since=entry.revision) as changes:
        one.set("s", "k", 8)
        assert values(changes, 1) == [("k", 8)]


def test_a_transaction_is_told_as_one(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    with one.watch("s") as changes:
        with one.scope("s").batch() as batch:
            batch.set("a", 1)
            batch.set("b", 2)
            batch.set("c", 3)
        one.set("s", "d", 4)
        found = [changes.get(PATIENCE_S) for _ in range(4)]
    assert {change.transaction for change in found[:3]} == {found[2].revision}
    assert found[3].transaction == found[3].revision


def test_a_cursor_that_the_stream_no_longer_reaches_is_compacted_and_a_resync_goes_on(
    valkey: Server, engines: Engines
) -> None:
    one = open_one(engines, valkey, events_kept=10)
    with one.watch("s", snapshot=False) as changes, one.watch(snapshot=False) as many:
        one.set("s", "k", 0)
        values(changes, 1)
        values(many, 1)
        cursors = {"s": changes.cursor, None: many.cursor}
    later = open_one(engines, valkey, events_kept=10)
    for number in range(300):
        one.set("s", "k", number)
    later.close()
    later = open_one(engines, valkey, events_kept=10)
    for scope, cursor in cursors.items():
        with pytest.raises(Compacted) as compacted:
            later.watch(scope, since=cursor)
        assert compacted.value.reason == "trimmed"
        with later.watch(scope, since=cursor, on_compacted="resync") as changes:
            assert values(changes, 1) == [("k", 299)]


def test_a_cursor_of_a_database_that_was_flushed_is_of_another_store(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    one.set("s", "k", 1)
    with one.watch("s") as changes, one.watch(scope_prefix="s") as many:
        values(changes, 1)
        values(many, 1)
        one.set("s", "k", 2)
        values(changes, 1)
        values(many, 1)
        cursors = {"s": changes.cursor, None: many.cursor}
        valkey.ask("FLUSHALL")
        one.set("s", "k", 3)
        for watched in (changes, many):
            with pytest.raises(Compacted) as compacted:
                watched.get(PATIENCE_S)
            assert compacted.value.reason == "other store"
    assert cursors == {"s": changes.cursor, None: many.cursor}
    for scope, cursor in cursors.items():
        with pytest.raises(Compacted, match="another store"):
            one.watch(scope, since=cursor)
    with one.watch("s") as changes:
        assert values(changes, 1) == [("k", 3)]


def test_a_change_that_a_fail_over_has_lost_is_named(engines: Engines, start_server: Any) -> None:
    """What a replica does not have: the end of the stream, and the state with it."""
    server = start_server()
    one = open_one(engines, server)
    one.set("s", "k", 1)
    raw = redis.Redis.from_url(server.url)
    before = [(key, raw.dump(key)) for key in raw.keys("*")]
    with one.watch("s") as changes, one.watch() as many:
        values(changes, 1)
        values(many, 1)
        one.set("s", "k", 2)
        values(changes, 1)
        values(many, 1)
        cursors = {"s": changes.cursor, None: many.cursor}
        with raw.pipeline() as together:
            for key, dumped in before:
                together.restore(key, 0, dumped, replace=True)  # type: ignore[arg-type]
            together.execute()
        raw.close()
        server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        for watched in (changes, many):
            with pytest.raises(Compacted) as compacted:
                watched.get(PATIENCE_S)
            assert compacted.value.reason == "lost in a crash"
    one.set("s", "k", 3)
    for engine in (one, open_one(engines, server)):
        with pytest.raises(Compacted) as compacted:
            engine.watch(since=cursors[None])
        assert compacted.value.reason == "lost in a crash"


def test_events_that_were_trimmed_before_they_were_read_end_a_watch(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)
    with one.watch("s") as changes:
        one.set("s", "k", 1)
        values(changes, 1)
        valkey.ask("SET", "scopestate:count:state:", 100)
        one.set("s", "k", 2)
        with pytest.raises(Compacted) as compacted:
            changes.get(PATIENCE_S)
        assert compacted.value.reason == "trimmed"


def test_a_watch_on_an_event_loop(valkey: Server, engines: Engines) -> None:
    one = open_one(engines, valkey)

    async def run() -> list[Any]:
        await one.aio.set("s", "a", 1)
        async with one.aio.watch("s") as changes:
            found = [await changes.get(PATIENCE_S)]
            await one.aio.set("s", "b", 2)
            found.append(await changes.get(PATIENCE_S))
            cursor = changes.cursor
        await one.aio.set("s", "c", 3)
        async with one.aio.watch("s", since=cursor) as changes:
            found.append(await changes.get(PATIENCE_S))
        return [(change.key, change.value) for change in found]

    assert asyncio.run(run()) == [("a", 1), ("b", 2), ("c", 3)]


def test_what_cannot_be_watched_is_refused_by_name(valkey: Server, engines: Engines, cluster: Cluster) -> None:
    local = engines.open(valkey, events="local")
    with pytest.raises(Unsupported, match="events: shared"):
        local.watch("s")
    plain = engines.open(valkey)
    with pytest.raises(Unsupported, match="revisions: false"):
        plain.watch("s")
    clustered = engines.open(cluster.nodes[0], events="local", revisions=True)
    with pytest.raises(Unsupported, match="events: shared"):
        clustered.watch("s")


def test_a_server_that_is_gone_is_an_error_of_the_call(start_server: Any, engines: Engines) -> None:
    server = start_server()
    one = open_one(engines, server, connect_timeout_ms=2000, call_timeout_ms=2000, connect_wait_ms=2000)
    server.pause()
    try:
        with pytest.raises(StorageError):
            one.watch("s")
    finally:
        server.resume()
    set_patiently(one, "s", "k", 1)
    with one.watch("s") as changes:
        assert values(changes, 1) == [("k", 1)]


def test_many_changes_come_in_order_to_several_watches(valkey: Server, engines: Engines) -> None:
    one, two = open_one(engines, valkey), open_one(engines, valkey)
    with one.watch("s") as here, two.watch(scope_prefix="s") as there:
        for number in range(500):
            (one, two)[number % 2].set("s", f"k{number % 7}", number)
        for changes in (here, there):
            assert [value for _, value in values(changes, 500)] == list(range(500))
    assert int(valkey.ask("XLEN", STREAM)) >= 500
