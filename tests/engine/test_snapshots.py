"""Snapshots that callers page through: their pages, their limits, and how the room for them is shared."""

from __future__ import annotations

from typing import Any

import pytest

from scopestate.errors import InvalidCursor, RowTooLarge, SnapshotCapacity
from scopestate.ops.requests import SNAPSHOT_ROWS, PageLimits
from scopestate.ops.values import decode
from scopestate.snapshots import LIFETIME_S, MOST, MOST_BYTES, Caller, Snapshots


class PlayedClock:
    """A dispatcher, as far as snapshots need one."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, Any]] = []

    def monotonic(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Any) -> None:
        self._timers.append((self.now + delay_s, callback))

    def go_on(self, seconds: float) -> None:
        self.now += seconds
        for due, callback in self._timers:
            if due <= self.now:
                callback()


@pytest.fixture
def clock() -> PlayedClock:
    return PlayedClock()


@pytest.fixture
def snapshots(clock: PlayedClock) -> Snapshots:
    return Snapshots(clock)  # type: ignore[arg-type]  # as far as it is used


def rows(count: int, data: bytes = b"1") -> list[tuple[str, bytes]]:
    return [(f"k{number:05}", data) for number in range(count)]


def begin(
    snapshots: Snapshots, caller: Caller, found: list[tuple[str, bytes]], limit: int = 1, size: int = 1000
) -> Any:
    return decode(snapshots.first_page(caller, "s", PageLimits(limit, size, None), found))


def go_on(snapshots: Snapshots, caller: Caller, cursor: str, limit: int = 1, size: int = 1000) -> Any:
    page = snapshots.next_page(caller, "s", PageLimits(limit, size, cursor))
    assert page is not None
    return decode(page)


def test_pages_have_each_row_once_and_keep_to_both_limits(snapshots: Snapshots) -> None:
    me, found = Caller(), rows(100, b'"' + b"x" * 30 + b'"')
    page = begin(snapshots, me, found, limit=7, size=256)
    seen = page["entries"]
    while not page["done"]:
        assert page["total"] == 100
        page = go_on(snapshots, me, page["next_cursor"], limit=7, size=256)
        assert page["offset"] == len(seen)
        assert 1 <= len(page["entries"]) <= 5  # of 44 bytes each
        seen += page["entries"]
    assert [key for key, _ in seen] == [key for key, _ in found]
    assert len(snapshots) == 0


def test_a_scope_that_fits_into_one_page_holds_no_room(snapshots: Snapshots) -> None:
    assert begin(snapshots, Caller(), rows(3), limit=3) == {
        "entries": [["k00000", 1], ["k00001", 1], ["k00002", 1]],
        "next_cursor": None,
        "done": True,
        "offset": 0,
        "total": 3,
    }
    assert begin(snapshots, Caller(), [])["done"]
    assert len(snapshots) == 0


def test_a_cursor_lives_for_120_seconds_from_its_page_on(snapshots: Snapshots, clock: PlayedClock) -> None:
    me = Caller()
    cursor = begin(snapshots, me, rows(4))["next_cursor"]
    clock.go_on(LIFETIME_S - 1)
    cursor = go_on(snapshots, me, cursor)["next_cursor"]
    clock.go_on(LIFETIME_S - 1)
    cursor = go_on(snapshots, me, cursor)["next_cursor"]
    clock.go_on(LIFETIME_S)
    assert len(snapshots) == 0  # its memory is free without another call
    with pytest.raises(InvalidCursor) as caught:
        go_on(snapshots, me, cursor)
    assert caught.value.reason == "no snapshot"


def test_a_snapshot_is_refused_if_it_alone_is_too_large(snapshots: Snapshots) -> None:
    with pytest.raises(SnapshotCapacity, match="more than 100000 keys"):
        begin(snapshots, Caller(), rows(SNAPSHOT_ROWS + 1))
    with pytest.raises(SnapshotCapacity, match=f"may hold {MOST_BYTES}"):
        begin(snapshots, Caller(), rows(7, b'"' + b"x" * 10_000_000 + b'"'), limit=1000)
    assert len(begin(snapshots, Caller(), rows(SNAPSHOT_ROWS))["entries"]) == 1


def test_a_row_that_is_too_large_is_named(snapshots: Snapshots) -> None:
    with pytest.raises(RowTooLarge) as caught:
        begin(snapshots, Caller(), rows(2, b'"' + b"x" * 500 + b'"'), size=256)
    assert (caught.value.key, caught.value.size, caught.value.limit) == ("k00000", 513, 256)
    assert len(snapshots) == 0


def test_the_number_of_snapshots_is_shared_fairly(snapshots: Snapshots) -> None:
    greedy, modest = Caller("greedy"), Caller("modest")
    cursors = [begin(snapshots, greedy, rows(2))["next_cursor"] for _ in range(MOST)]
    with pytest.raises(SnapshotCapacity):
        begin(snapshots, greedy, rows(2))
    mine = [begin(snapshots, modest, rows(2))["next_cursor"] for _ in range(MOST // 2)]
    with pytest.raises(SnapshotCapacity):
        begin(snapshots, modest, rows(2))
    with pytest.raises(SnapshotCapacity):
        begin(snapshots, greedy, rows(2))
    assert len(snapshots) == MOST
    assert all(go_on(snapshots, modest, cursor)["done"] for cursor in mine)
    with pytest.raises(InvalidCursor):
        go_on(snapshots, greedy, cursors[0])  # the oldest of the greedy one went
    assert go_on(snapshots, greedy, cursors[-1])["done"]


def test_the_bytes_of_snapshots_are_shared_fairly(snapshots: Snapshots) -> None:
    large = rows(3, b'"' + b"x" * 10_000_000 + b'"')
    greedy, modest, small = Caller("greedy"), Caller("modest"), Caller("small")
    first = begin(snapshots, greedy, large, size=20_000_000)["next_cursor"]
    begin(snapshots, greedy, large, size=20_000_000)
    begin(snapshots, small, rows(2))
    with pytest.raises(SnapshotCapacity, match="bytes"):
        begin(snapshots, greedy, large, size=20_000_000)
    assert begin(snapshots, modest, large, size=20_000_000)["next_cursor"]
    with pytest.raises(InvalidCursor):
        go_on(snapshots, greedy, first, size=20_000_000)
    assert len(snapshots) == 3


def test_of_two_callers_that_would_hold_the_same_the_one_that_asks_is_refused(snapshots: Snapshots) -> None:
    callers = {Caller("a"): 6, Caller("b"): 5, Caller("c"): 5}
    for caller, count in callers.items():
        for _ in range(count):
            begin(snapshots, caller, rows(2))
    _, asking, _ = callers
    with pytest.raises(SnapshotCapacity):
        begin(snapshots, asking, rows(2))
    assert len(snapshots) == MOST
