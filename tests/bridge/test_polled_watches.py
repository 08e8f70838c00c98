"""Watches of scopes in another engine: their cursors and marks say what those of a watch of one's own scopes say."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from second_engine import PATIENCE_S, OpenBridge, Serve

from scopestate import Engine
from scopestate.ops.changes import Change
from scopestate.polled_watching import MOST, PolledChanges

WATCHED = pytest.mark.parametrize("where", [{"scope": "s"}, {"scope_prefix": "s"}], ids=["one scope", "many scopes"])


@pytest.fixture
def here(serve: Serve, open_bridge: OpenBridge) -> Engine:
    """A bridge to the engine `there`."""
    return open_bridge(serve().url)


def read(changes: Any, count: int) -> list[Change]:
    return [changes.get(PATIENCE_S) for _ in range(count)]


def told(engine: Engine, where: dict[str, str], cursor: str, count: int) -> list[tuple[str, Any]]:
    """Return the first changes behind a cursor."""
    with engine.watch(**where, since=cursor) as changes:
        return [(change.key, change.value) for change in read(changes, count)]


def read_to_the_mark(changes: Any) -> Change:
    while (change := changes.get(PATIENCE_S)).kind != "synced":
        assert change.initial
    return change  # type: ignore[no-any-return]


@WATCHED
@pytest.mark.parametrize("keys", [3, MOST, MOST + 3])
def test_the_mark_behind_a_snapshot_stands_before_what_was_changed_while_it_was_read(
    there: Engine, here: Engine, where: dict[str, str], keys: int
) -> None:
    for number in range(keys):
        there.set("s", f"k{number:04}", number)
    with here.watch(**where, markers=True) as changes:
        first = changes.get(PATIENCE_S)
        there.set("s", "later", 1)
        there.set("s", "later", 2)
        mark = read_to_the_mark(changes)
        assert first.initial
        assert told(here, where, mark.cursor, 2) == [("later", 1), ("later", 2)]
        assert [change.value for change in read(changes, 2)] == [1, 2]


@WATCHED
def test_its_cursor_stands_before_what_was_not_read(there: Engine, here: Engine, where: dict[str, str]) -> None:
    for number in range(MOST + 1):
        there.set("s", f"k{number:04}", number)
    with here.watch(**where) as changes:
        read(changes, 1)
        for number in range(3):
            there.set("s", "later", number)
        read(changes, MOST)
        behind_snapshot = changes.cursor
        found = [(changes.get(PATIENCE_S).value, changes.cursor) for _ in range(3)]

    assert told(here, where, behind_snapshot, 3) == [("later", 0), ("later", 1), ("later", 2)]
    for value, cursor in found[:2]:
        assert told(here, where, cursor, 1) == [("later", value + 1)]


@WATCHED
def test_the_cursor_of_a_watch_that_nothing_was_read_of_is_where_it_began(
    there: Engine, here: Engine, where: dict[str, str]
) -> None:
    with here.watch(**where, snapshot=False) as changes:
        begin = changes.cursor
        for number in range(3):
            there.set("s", "k", number)
        with here.watch(**where, since=begin) as again:
            assert told(here, where, again.cursor, 1) == [("k", 0)]
            again.get(PATIENCE_S)
            assert told(here, where, again.cursor, 1) == [("k", 1)]
    with here.watch(**where) as changes:  # within the snapshot
        assert told(here, where, changes.cursor, 1) == [("k", 2)]


def test_with_latest_its_cursor_stands_before_the_first_key_that_waits(there: Engine, here: Engine) -> None:
    with here.watch("s", snapshot=False, prefix="wanted", latest=True) as changes:
        for number in range(4):
            there.set("s", "other", number)
            there.set("s", f"wanted{number % 2}", number)
        first = changes.get(PATIENCE_S)
        while first.value != 2:
            first = changes.get(PATIENCE_S)
        assert told(here, {"scope": "s"}, changes.cursor, 1) in ([("wanted1", 3)], [("other", 3)])


def test_a_progress_mark_stands_before_what_waits(there: Engine, here: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with here.watch("s", snapshot=False, markers=True) as changes:
        begin = changes.cursor
        monkeypatch.setattr("scopestate.polled_watching.PROGRESS_S", 0.0)
        look = changes._progress

        def answered_just_before() -> Change | None:
            # What has come since nothing was there to be read.
            there.set("s", "k", 1)
            assert isinstance(changes, PolledChanges)
            changes._take_in(changes._poll_now())
            return look()

        monkeypatch.setattr(changes, "_progress", answered_just_before)
        mark = changes.get(PATIENCE_S)
        assert mark.kind == "progress"
        assert mark.cursor == begin


def test_a_snapshot_that_just_fits_into_an_answer_ends_at_once(there: Engine, here: Engine) -> None:
    for number in range(MOST):
        there.set("s", str(number), number)
    with here.watch("s") as changes:
        read(changes, MOST)
        with pytest.raises(TimeoutError):
            changes.get(0)
        assert changes.wait_synced(0)


def test_waiting_for_the_snapshot_waits_until_it_was_read(there: Engine, here: Engine) -> None:
    there.set("s", "k", 1)
    there.set("s", "l", 1)
    with here.watch("s") as changes:
        assert not changes.wait_synced(0)
        read(changes, 2)
        reader = threading.Thread(target=lambda: [change.value for change in changes])
        reader.start()
        assert changes.wait_synced(PATIENCE_S)
        changes.close()
        reader.join(PATIENCE_S)
    with here.watch("s") as changes:
        changes.close()
        assert not changes.wait_synced(0)
    cursor = there.call("state::changes", {"scope": "s"})["cursor"]
    with here.watch("s", since=cursor) as changes:
        with pytest.raises(TimeoutError):
            changes.get(0)
        assert changes.wait_synced(0)


@pytest.mark.parametrize("waited_before", [False, True])
def test_a_read_that_does_not_wait_finds_what_was_changed_before(
    there: Engine, here: Engine, *, waited_before: bool
) -> None:
    with here.watch("s", snapshot=False) as changes:
        for number in range(20):
            if waited_before:  # and its poll is still under way
                with pytest.raises(TimeoutError):
                    changes.get(0.001)
            there.set("s", "k", number)
            assert changes.get(0).value == number
        with pytest.raises(TimeoutError):
            changes.get(0)


@pytest.mark.asyncio
async def test_a_task_that_does_not_wait_finds_what_was_changed_before(there: Engine, here: Engine) -> None:
    async with here.aio.watch("s", snapshot=False) as changes:
        for number in range(5):
            there.set("s", "k", number)
            assert (await changes.get(0)).value == number
        with pytest.raises(TimeoutError):
            await changes.get(0)


def test_a_read_that_does_not_wait_ends_soon_without_a_connection(
    there: Engine, serve: Serve, open_bridge: OpenBridge
) -> None:
    server = serve()
    here = open_bridge(server.url)
    with here.watch("s", snapshot=False) as changes:
        server.stop()
        with pytest.raises(TimeoutError):
            changes.get(0)
        serve(port=server.port)
        there.set("s", "k", 1)
        assert changes.get(PATIENCE_S).value == 1
