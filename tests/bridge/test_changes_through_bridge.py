"""Watches through a bridge, and triggers here of what has changed while the bridge was away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from second_engine import PATIENCE_S, OpenBridge, Seen

from scopestate import Engine
from scopestate.errors import Compacted, EngineClosed, InvalidCursor, Unsupported
from scopestate.ops.results import DeliveryFailure
from scopestate.server.server import Server

Serve = Callable[..., Server]


@pytest.fixture
def there(nothing_left_behind: None) -> Iterator[Engine]:
    """The engine at the other end."""
    with Engine() as engine:
        yield engine


@pytest.fixture
def serve(there: Engine) -> Iterator[Serve]:
    """Serve the other engine, or another one; `serve(port=...)` again at the same address."""
    opened: list[Server] = []

    def start(engine: Engine = there, port: int = 0) -> Server:
        opened.append(Server(engine, port=port).start())
        return opened[-1]

    yield start
    for server in opened:
        server.stop()


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


def test_what_a_watch_through_a_bridge_cannot_do_is_refused(serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url)

    for arguments in ({}, {"scope_prefix": "s"}, {"scope": "s", "since": 3}):
        with pytest.raises(Unsupported):
            here.watch(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidCursor):
        here.watch("s", since="nonsense")


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


def test_a_durable_trigger_is_refused_by_name(serve: Serve, open_bridge: OpenBridge) -> None:
    here = open_bridge(serve().url)
    here.register_function("f", print)

    with pytest.raises(Unsupported, match="durable"):
        here.register_trigger(function_id="f", scope="s", durable="ship")
    assert here.triggers() == []
