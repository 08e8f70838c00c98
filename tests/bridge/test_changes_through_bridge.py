"""Watches through a bridge, and triggers here of what has changed while the bridge was away."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from queue import Queue
from typing import Any

import pytest
from second_engine import PATIENCE_S, OpenBridge, Seen, Serve

from scopestate import Engine, StateEvent
from scopestate.errors import Compacted, EngineClosed, InvalidCursor, StorageError
from scopestate.ops.results import DeliveryFailure


def test_a_watch_tells_what_others_change(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url)
    there.set("s", "a", 1)
    with here.watch("s") as changes:
        first = changes.get(PATIENCE_S)
        assert (first.key, first.value, first.initial) == ("a", 1, True)
        there.set("s", "a", None)
        here.set("s", "b", 2)
        there.delete("s", "a")
        found = [changes.get(PATIENCE_S) for _ in range(3)]
        cursor = found[0].cursor

    assert [(one.kind, one.key, one.value, one.old_value) for one in found] == [
        ("put", "a", None, 1),
        ("put", "b", 2, None),
        ("delete", "a", None, None),
    ]
    assert [one.revision for one in found] == [2, 3, 4]
    with here.watch("s", since=cursor) as again:
        assert [again.get(PATIENCE_S).key for _ in range(2)] == ["b", "a"]
        with pytest.raises(TimeoutError):
            again.get(0.01)


def test_many_scopes_keys_and_marks(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url)
    with here.watch(scope_prefix="sh", prefix="k", snapshot=False, events=["created"]) as changes:
        for scope, key in (("shop", "k1"), ("other", "k1"), ("shop", "x"), ("shop", "k1"), ("shed", "k2")):
            there.set(scope, key, 0)
        assert [(one.scope, one.key) for one in (changes.get(PATIENCE_S), changes.get(PATIENCE_S))] == [
            ("shop", "k1"),
            ("shed", "k2"),
        ]
    with here.watch("shop", markers=True) as marked:
        assert [marked.get(PATIENCE_S).kind for _ in range(3)] == ["put", "put", "synced"]


def test_a_watch_goes_on_after_a_lost_connection(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    server = serve()
    here = open_bridge(server.url)
    with here.watch("s", snapshot=False) as changes:
        there.set("s", "k", 1)
        assert changes.get(PATIENCE_S).value == 1
        server.stop()
        there.set("s", "k", 2)
        serve(port=server.port)
        assert changes.get(PATIENCE_S).value == 2


def test_a_watch_of_another_store_is_compacted_or_begins_anew(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    server = serve()
    here = open_bridge(server.url)
    there.set("s", "old", 1)
    with here.watch("s") as changes, here.watch("s", on_compacted="resync", known=["old"]) as anew:
        assert changes.get(PATIENCE_S).key == anew.get(PATIENCE_S).key == "old"
        server.stop()
        with Engine() as other:
            other.set("s", "new", 1)
            again = serve(other, port=server.port)
            with pytest.raises(Compacted, match="another store"):
                changes.get(PATIENCE_S)
            found = [anew.get(PATIENCE_S), anew.get(PATIENCE_S)]
            again.stop()

    assert [(one.kind, one.key, one.initial) for one in found] == [("put", "new", True), ("delete", "old", True)]


def test_a_watch_begins_with_many_scopes_and_behind_a_revision(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    here = open_bridge(serve().url)
    with there.watch("s0"):  # so that its changes are kept
        there.set("other", "k", 0)
        for number in range(3):
            there.set(f"s{number}", "k", number)
            there.set("s0", "more", number)
    with here.watch(scope_prefix="s") as changes:
        found = [changes.get(PATIENCE_S) for _ in range(4)]
        assert [(one.scope, one.key, one.value) for one in found] == [
            ("s0", "k", 0),
            ("s0", "more", 2),
            ("s1", "k", 1),
            ("s2", "k", 2),
        ]
        assert all(one.initial for one in found)
        there.set("s3", "k", 3)
        assert changes.get(PATIENCE_S).scope == "s3"
    with here.watch("s0", since=2) as changes:
        assert [changes.get(PATIENCE_S).revision for _ in range(2)] == [3, 4]
    with pytest.raises(InvalidCursor):
        here.watch("s", since="nonsense")


def test_a_watch_of_many_scopes_begins_anew_with_deletes_of_what_is_gone(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    server = serve()
    here = open_bridge(server.url)
    there.set("a", "old", 1)
    there.set("b", "kept", 1)
    with here.watch(on_compacted="resync") as changes:
        assert [changes.get(PATIENCE_S).scope for _ in range(2)] == ["a", "b"]
        server.stop()
        with Engine() as other:
            other.set("b", "kept", 2)
            again = serve(other, port=server.port)
            found = [changes.get(PATIENCE_S), changes.get(PATIENCE_S)]
            again.stop()

    assert [(one.kind, one.scope, one.key, one.initial) for one in found] == [
        ("put", "b", "kept", True),
        ("delete", "a", "old", True),
    ]


def test_closing_ends_a_watch_that_waits(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url)
    changes = here.watch("s", snapshot=False)
    ended: list[Any] = []

    def read() -> None:
        try:
            changes.get(PATIENCE_S)
        except EngineClosed as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    here.close()
    reader.join(PATIENCE_S)

    assert len(ended) == 1


@pytest.mark.asyncio
async def test_a_watch_for_asyncio(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url)
    async with here.aio.watch("s", snapshot=False) as changes:
        there.set("s", "k", 1)
        assert (await changes.get(PATIENCE_S)).value == 1
    begin = await here.aio.call("state::changes", {"scope": "s"})
    there.set("s", "k", 2)
    found = await here.aio.call("state::changes", {"scope": "s", "cursor": begin["cursor"], "wait_ms": 10_000})
    assert [change["value"] for change in found["changes"]] == [2]


# ------------------------------------------------------------------------------------------------------ triggers


def test_what_has_changed_while_the_bridge_was_away_fires_here(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    server, seen = serve(), Seen()
    here = open_bridge(server.url, events="remote")
    here.on_change(scope="s")(seen)
    here.set("s", "k", 0)
    seen.wait_for(1)
    server.stop()
    for number in range(1, 21):
        there.set("s", "k", number)
    there.delete("s", "k")
    there.delete("s", "never there")
    serve(port=server.port)

    events = seen.wait_for(23)
    assert [event.new_value for event in events] == [*range(21), None, None]
    assert [event.old_value for event in events] == [None, *range(21), None]
    assert here.health().ok


def test_changes_that_are_gone_are_reported(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    server, seen, failures = serve(), Seen(), []
    here = open_bridge(server.url, events="remote")
    reported = threading.Event()

    @here.on_error
    def note(failure: DeliveryFailure) -> None:
        failures.append(failure)
        reported.set()

    here.on_change(scope="s", function_id="seen")(seen)
    here.set("s", "k", 1)
    seen.wait_for(1)
    server.stop()
    with Engine() as other:
        again = serve(other, port=server.port)
        assert reported.wait(PATIENCE_S)
        other.set("s", "k", 2)
        assert [event.new_value for event in seen.wait_for(2)] == [1, 2]
        assert "other store" in here.health().problems[0]
        again.stop()

    assert [(one.function_id, type(one.error), one.final) for one in failures] == [("seen", Compacted, True)]


def test_each_gap_is_reported_however_soon_it_follows_another(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    server, seen = serve(), Seen()
    here = open_bridge(server.url, events="remote")
    reported: Queue[DeliveryFailure] = Queue()
    here.on_error(reported.put)
    here.on_change(scope="s")(seen)
    here.set("s", "k", 0)
    seen.wait_for(1)
    with Engine() as one, Engine() as two, Engine() as three:
        for number, other in enumerate((one, two, three), 1):
            server.stop()
            other.set("s", "k", "not told")
            server = serve(other, port=server.port)
            assert type(reported.get(timeout=PATIENCE_S).error) is Compacted
            other.set("s", "k", number)
            assert seen.wait_for(number + 1)[-1].new_value == number
        here.close()
        server.stop()
    assert reported.empty()


def test_a_bridge_that_was_too_slow_goes_on_with_what_is_changed_from_then_on(
    there: Engine, serve: Serve, open_bridge: OpenBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.actors.feed.RING_EVENTS", 100)
    here = open_bridge(serve().url, events="remote", limits={"handler_mailbox": 10})
    reported: Queue[DeliveryFailure] = Queue()
    here.on_error(reported.put)
    go_on, values = threading.Event(), []

    @here.on_change(scope="s")
    def handle(event: StateEvent) -> None:
        values.append(event.new_value)
        assert go_on.wait(PATIENCE_S)

    there.set("s", "k", 0)
    for number in range(1, 5_001):
        there.set("s", "k", number)
    go_on.set()
    assert type(reported.get(timeout=PATIENCE_S).error) is Compacted
    here.drain(PATIENCE_S)
    there.set("s", "k", "last")
    here.drain(PATIENCE_S)

    assert values[-1] == "last"
    assert values[:-1] == sorted(set(values[:-1]))  # each once, in order
    assert reported.empty()


# ------------------------------------------------------------------------------------------------ events for triggers


def test_an_event_says_all_that_it_says_in_the_other_engine(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    here = open_bridge(serve().url, events="remote")
    near, far = Seen(), Seen()
    here.on_change(scope="s")(near)
    there.on_change(scope="s")(far)
    here.set("s", "a", 1, ttl=3600)
    there.set("s", "a", None)
    with here.scope("s").batch() as batch:
        batch.set("a", 2)
        batch.set("b", 3)
    here.delete("s", "no such key")
    here.set("s", "b", 4, expires_at=datetime(2001, 1, 1, tzinfo=UTC))

    assert [told(event) for event in near.wait_for(7)] == [told(event) for event in far.wait_for(7)]


def told(event: StateEvent) -> tuple[Any, ...]:
    """Return everything that an event has, apart from its position, which a bridge does not tell."""
    whole = {name: getattr(event, name) for name in StateEvent.__struct_fields__ if name != "position"}
    return (*whole.items(), event.existed)


def test_drain_waits_for_the_events_of_what_was_written(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url, events="remote")
    seen = Seen()
    here.on_change(scope="s")(seen)
    for number in range(20):
        (here if number % 2 else there).set("s", "k", number)
        here.drain(PATIENCE_S)
        assert [event.new_value for event in seen.events] == list(range(number + 1))


def test_drain_says_that_the_other_engine_is_away(serve: Serve, open_bridge: OpenBridge) -> None:
    server = serve()
    here = open_bridge(server.url, events="remote", connect_wait_ms=50, limits={"close_grace_ms": 1})
    here.on_change(scope="s")(Seen())
    here.set("s", "k", 1)
    server.stop()

    with pytest.raises(StorageError, match="events of the other engine do not arrive"):
        here.drain(PATIENCE_S)


def test_without_a_trigger_nothing_is_asked_of_the_other_engine(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    here = open_bridge(serve().url, events="remote")
    here.set("s", "k", 1)
    here.drain(PATIENCE_S)
    assert there.stats().calls["state::changes"] == 0

    seen = Seen()
    here.on_change(scope="s")(seen)
    there.set("s", "k", 2)
    here.drain(PATIENCE_S)
    assert [event.new_value for event in seen.events] == [2]
    assert there.stats().calls["state::changes"] > 0


def test_a_trigger_that_comes_after_all_others_have_gone_is_told_from_then_on(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    here = open_bridge(serve().url, events="remote", call_timeout_ms=2_000)
    polls = here._parts.backend._events  # type: ignore[attr-defined]
    for number in range(3):
        seen = Seen()
        here.register_function("test::seen", seen)
        trigger = here.register_trigger(function_id="test::seen", scope="s")
        there.set("s", "k", number)
        assert [event.new_value for event in seen.wait_for(1)] == [number]
        trigger.unregister()
        there.set("s", "k", "unheard")
        deadline = time.monotonic() + PATIENCE_S
        while polls.cursor is not None:
            assert time.monotonic() < deadline, "it still asks for changes"
            time.sleep(0.001)


def test_only_what_triggers_are_about_is_asked_for(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url, events="remote")
    feed = there._router.feed
    here.on_change(scope="a")(Seen())
    assert [feed.is_wanted(scope) for scope in ("a", "ab", "b")] == [True, False, False]

    here.on_change(scope_prefix="a")(Seen())
    assert [feed.is_wanted(scope) for scope in ("a", "ab", "b")] == [True, True, False]

    here.on_change()(Seen())
    assert feed.is_wanted(None)


def test_a_trigger_hears_of_its_scope_from_its_registration_on(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    here = open_bridge(serve().url, events="remote")
    with there.watch(snapshot=False):  # so that the changes of all scopes are kept
        quiet, late, wide = Seen(), Seen(), Seen()
        here.on_change(scope="quiet")(quiet)
        there.set("late", "k", "before")
        here.on_change(scope="late")(late)
        there.set("late", "k", 1)
        there.set("laterals", "k", "before")
        here.drain(PATIENCE_S)  # or a new trigger may hear of what is told to the others just now
        here.on_change(scope_prefix="late")(wide)
        there.set("laterals", "k", 2)
        there.set("late", "k", 3)
        there.set("quiet", "k", 4)
        there.set("other", "k", 5)
        here.drain(PATIENCE_S)

    assert [event.new_value for event in quiet.events] == [4]
    assert [event.new_value for event in late.events] == [1, 3]
    assert [event.new_value for event in wide.events] == [2, 3]


def test_triggers_on_more_scopes_than_are_named_in_a_poll(there: Engine, serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url, events="remote")
    seen = Seen()
    for number in range(40):
        here.on_change(scope=f"s{number}")(seen)
        there.set(f"s{number}", "k", number)
    here.drain(PATIENCE_S)

    assert [event.new_value for event in seen.events] == list(range(40))
    assert there._router.feed.is_wanted(None)


def test_triggers_that_come_and_go_while_much_changes_miss_nothing(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    here = open_bridge(serve().url, events="remote")
    ended = threading.Event()
    whole = Seen()
    here.on_change(scope="s0")(whole)

    def write() -> None:
        number = 0
        while not ended.is_set():
            there.set(f"s{number % 3}", "k", number)
            number += 1
            if number % 50 == 0:
                time.sleep(0.001)  # the ring holds 100,000 changes

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for round_ in range(8):
            seen = Seen()
            name = f"test::{round_}"
            here.register_function(name, seen)
            trigger = here.register_trigger(function_id=name, scope=f"s{1 + round_ % 2}")
            values = [event.new_value for event in seen.wait_for(20)]
            trigger.unregister()
            assert values == list(range(values[0], values[0] + 3 * len(values), 3))
    finally:
        ended.set()
        writer.join()
    here.drain(PATIENCE_S)
    values = [event.new_value for event in whole.events]
    assert values == list(range(0, values[-1] + 1, 3))
    assert there.get("s0", "k") == values[-1]
