"""Watches, transactions and deadlines in a cluster: as on one server, for scopes of all servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from event_engines import Engines, Seen, problems
from one_server import PATIENCE_S
from servers import Cluster, Server, wait_until

from scopestate import Engine
from scopestate.errors import Compacted


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


def open_one(engines: Engines, cluster: Cluster, **options: Any) -> Engine:
    return engines.open(cluster.nodes[0], revisions=True, **options)


def values(changes: Any, count: int) -> list[Any]:
    return [(change.key, change.value) for change in (changes.get(PATIENCE_S) for _ in range(count))]


def one_on_each(cluster: Cluster) -> dict[Server, str]:
    """Return a scope of each primary."""
    found: dict[Server, str] = {}
    number = 0
    while len(found) < 3:
        scope = f"s{number}"
        found.setdefault(cluster.owner(f"state:{scope}"), scope)
        number += 1
    return found


def test_a_watch_begins_with_the_state_and_sees_every_change_of_every_engine_while_slots_move(
    cluster: Cluster, engines: Engines
) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    (source, moving), (to, staying), (_, third) = one_on_each(cluster).items()
    for scope in (moving, staying, third):
        one.set(scope, "k", 0)
    with two.watch(moving) as single, two.watch(scope_prefix="s") as many:
        assert values(single, 1) == [("k", 0)]
        assert values(many, 3) == [("k", 0)] * 3
        for number in range(1, 31):
            if number == 11:
                cluster.move_slot(cluster.slot(f"state:{moving}"), to)
            for scope in (moving, staying, third):
                one.set(scope, "k", number)
        assert [value for _, value in values(single, 30)] == list(range(1, 31))
        found = [many.get(PATIENCE_S) for _ in range(90)]
        for scope in (moving, staying, third):
            assert [change.value for change in found if change.scope == scope] == list(range(1, 31))
    cluster.move_slot(cluster.slot(f"state:{moving}"), source)


def test_a_cursor_of_one_scope_is_good_in_every_engine_and_after_a_restart(cluster: Cluster, engines: Engines) -> None:
    one = open_one(engines, cluster)
    for scope in one_on_each(cluster).values():
        with one.watch(scope, snapshot=False) as changes:
            for number in range(5):
                one.set(scope, "k", number)
            assert values(changes, 2) == [("k", 0), ("k", 1)]
            cursor = changes.cursor
        later = open_one(engines, cluster)
        one.set(scope, "k", 5)
        with later.watch(scope, since=cursor) as changes:
            assert values(changes, 4) == [("k", 2), ("k", 3), ("k", 4), ("k", 5)]
            later.set(scope, "k", 6)
            assert values(changes, 1) == [("k", 6)]


def test_a_cursor_of_many_scopes_is_good_in_its_engine_and_a_resync_goes_on_in_others(
    cluster: Cluster, engines: Engines
) -> None:
    one, other = open_one(engines, cluster), open_one(engines, cluster)
    first, second, third = one_on_each(cluster).values()
    with one.watch(snapshot=False) as many:
        one.set(first, "k", 1)
        assert values(many, 1) == [("k", 1)]
        cursor = many.cursor
    one.set(second, "k", 2)
    other.set(third, "k", 3)

    with one.watch(since=cursor) as many:
        assert sorted(values(many, 2)) == [("k", 2), ("k", 3)]
    with pytest.raises(Compacted):
        other.watch(since=cursor)
    with other.watch(since=cursor, on_compacted="resync") as many:
        assert sorted(values(many, 3)) == [("k", 1), ("k", 2), ("k", 3)]
        one.set(first, "k", 4)
        assert values(many, 1) == [("k", 4)]


def test_a_transaction_is_told_as_one_and_has_one_event_for_each_key(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    seen = Seen(two)
    for scope in one_on_each(cluster).values():
        with two.watch(scope, snapshot=False) as changes:

            def move(view: Any) -> None:
                view.set("from", view.get("from", 10) - 1)
                view.set("to", view.get("to", 0) + 1)

            one.transact(scope, move)
            found = [changes.get(PATIENCE_S) for _ in range(2)]
            assert [(change.key, change.value) for change in found] == [("from", 9), ("to", 1)]
            assert len({change.transaction for change in found}) == 1
    one.drain(PATIENCE_S)
    assert len(seen.wait_for_count(6)) == 6


def test_a_key_that_expires_fires_one_event_in_every_engine(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    seen = [Seen(engine) for engine in (one, two)]
    scopes = list(one_on_each(cluster).values())
    for scope in scopes:
        one.set(scope, "k", scope, ttl=0.2)
    for at in seen:
        events = at.wait_for_count(6)
        for scope in scopes:
            kinds = [event.event_type for event in events if event.scope == scope]
            assert kinds == ["state:created", "state:expired"]
    assert [one.get(scope, "k") for scope in scopes] == [None] * 3


def test_a_flush_of_one_server_ends_the_watches_of_its_scopes_and_no_others(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    (flushed, gone), (_, there), _ = one_on_each(cluster).items()
    for scope in (gone, there):
        one.set(scope, "k", 1)
    with two.watch(gone) as ended, two.watch(there) as going_on:
        assert values(ended, 1) == values(going_on, 1) == [("k", 1)]
        cursor = ended.cursor
        flushed.ask("FLUSHALL")
        wait_until(lambda: "has begun anew" in problems(two), lambda: problems(two))
        with pytest.raises(Compacted):
            ended.get(PATIENCE_S)
        one.set(there, "k", 2)
        assert values(going_on, 1) == [("k", 2)]
    one.set(gone, "k", 3)
    with pytest.raises(Compacted):
        open_one(engines, cluster).watch(gone, since=cursor)
