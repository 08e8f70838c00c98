"""Many keys at once: lists, counts, pages, iterators and removal of ranges, in memory and in files."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from watching import Seen, in_thread

from scopestate import Engine, EntryView
from scopestate.errors import DeserializationError, InvalidCursor
from scopestate.handles import Scope
from tests.engine.conftest import OpenEngine

NAMES = ["", "a", "a1", "a2", "b", "é", "\uffff", "😀"]
"""In the order of their UTF-8 bytes."""


@pytest.fixture
def users(open_store: OpenEngine) -> Scope:
    found = open_store().scope("users")
    with found.batch() as b:
        for place in (3, 0, 7, 5, 1, 6, 4, 2):
            b.set(NAMES[place], place)
    return found


RANGES: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ({"prefix": "a"}, [1, 2, 3]),
    ({"prefix": ""}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ({"start": "a1", "end": "é"}, [2, 3, 4]),
    ({"after": "a1", "end": "é"}, [3, 4]),
    ({"after": "a1", "limit": 2}, [3, 4]),
    ({"reverse": True, "limit": 2}, [7, 6]),
    ({"reverse": True, "start": "a1", "end": "é"}, [4, 3, 2]),
    ({"reverse": True, "after": "a1", "prefix": "a"}, [3]),
    ({"prefix": "a", "start": "a", "after": "a", "end": "a2"}, [2]),
    ({"start": "é"}, [5, 6, 7]),
    ({"limit": 0}, []),
    ({"start": "b", "end": "a"}, []),
    ({"prefix": None, "limit": None}, [0, 1, 2, 3, 4, 5, 6, 7]),
]


@pytest.mark.parametrize(("within", "places"), RANGES)
def test_ranges_have_the_keys_in_order_of_their_bytes(within: Any, places: list[int], users: Scope) -> None:
    names = [NAMES[place] for place in places]

    assert users.keys(**within) == names
    assert users.items(**within) == list(users.iter(**within)) == list(zip(names, places, strict=True))
    assert users.values(**within) == places
    assert [(entry.key, entry.value) for entry in users.entries(**within)] == users.items(**within)
    bounds = {name: bound for name, bound in within.items() if name not in ("limit", "reverse")}
    if "limit" not in within:
        assert users.count(**bounds) == len(places)
    if within.get("limit") is None:
        walk = {name: option for name, option in within.items() if name != "limit"}
        assert [entry.key for page in users.pages(3, **walk) for entry in page.entries] == names


def test_entries_have_revisions_and_deadlines(users: Scope) -> None:
    users.set("b", "new", ttl=60)

    found = {entry.key: entry for entry in users.entries()}
    assert found["b"] == users.entry("b")
    assert found["b"].expires_at is not None
    assert found["a"].expires_at is None
    assert max(found.values(), key=lambda entry: entry.revision) is found["b"]
    assert "EntryView(key='a', value=1, revision=" in repr(found["a"])


def test_count_takes_bounds_only(users: Scope) -> None:
    with pytest.raises(TypeError, match="limit"):
        users.count(limit=3)  # type: ignore[call-arg]


def test_an_iterator_shows_one_moment(users: Scope) -> None:
    pairs = users.iter(prefix="a")
    users.delete_range(prefix="")

    assert list(pairs) == [("a", 1), ("a1", 2), ("a2", 3)]
    assert list(users.iter()) == []


def test_an_iterator_decodes_what_is_reached(users: Scope) -> None:
    first = next(users.iter(start="a"))
    assert first == ("a", 1)


# ----------------------------------------------------------------------------------------------------------- pages


def test_pages_come_one_by_one_with_a_cursor_to_go_on_from(users: Scope) -> None:
    pages = users.pages(3)
    first = next(pages)
    assert [entry.key for entry in first.entries] == NAMES[:3]
    assert first.done is False

    users.set("a1x", 9)  # behind the first page
    users.delete("b")
    rest = [entry.key for page in users.pages(100, cursor=first.cursor) for entry in page.entries]
    assert rest == ["a1x", "a2", *NAMES[5:]]
    assert [entry.key for page in pages for entry in page.entries] == rest


def test_the_last_page_is_done_and_an_empty_scope_has_one_page(users: Scope) -> None:
    pages = list(users.pages(4))
    assert [(len(page.entries), page.done) for page in pages] == [(4, False), (4, True)]
    assert pages[-1].cursor is None
    assert [page.entries for page in users._engine.pages("nothing")] == [()]


def test_a_cursor_that_is_not_of_this_walk_is_refused(users: Scope, open_engine: OpenEngine) -> None:
    engine = users._engine
    cursor = next(users.pages(3)).cursor
    assert cursor is not None
    engine.set("other", "k", 1)
    elsewhere = open_engine()
    elsewhere.set("users", "k", 1)
    for call, reason in (
        (lambda: users.pages(3, cursor=cursor[:-1]), "damaged"),
        (lambda: users.pages(3, cursor=""), "damaged"),
        (lambda: users.pages(3, cursor="é"), "damaged"),
        (lambda: users.pages(3, cursor=cursor, prefix="a"), "another range"),
        (lambda: users.pages(3, cursor=cursor, reverse=True), "another range"),
        (lambda: engine.pages("other", 3, cursor=cursor), "another scope"),
        (lambda: elsewhere.pages("users", 3, cursor=cursor), "another store"),
    ):
        with pytest.raises(InvalidCursor) as caught:
            next(call())
        assert caught.value.reason == reason
    with pytest.raises(DeserializationError, match="a cursor is a string"):
        users.pages(3, cursor=5)  # type: ignore[arg-type]


def test_a_cursor_outlives_the_engine_with_its_store(open_file_store: OpenEngine) -> None:
    with open_file_store() as engine:
        for name in "abcd":
            engine.set("users", name, name)
        cursor = next(engine.pages("users", 2)).cursor
    with open_file_store() as engine:
        assert [entry.key for page in engine.pages("users", 2, cursor=cursor) for entry in page.entries] == ["c", "d"]


def test_keys_that_exist_throughout_come_exactly_once_while_threads_write_around_them(engine: Engine) -> None:
    users = engine.scope("users")
    lasting = [f"k{number:04}" for number in range(0, 600, 3)]
    for name in lasting:
        users.set(name, 1)
    enough = threading.Event()

    def disturb(first: int) -> None:
        number = first
        while not enough.is_set():
            name = f"k{(number * 7) % 600:04}"
            number += 1
            if name not in lasting_set:
                users.set(name, 1)
                users.delete(f"k{(number * 11) % 600:04}x")
                users.set(f"k{(number * 13) % 600:04}x", 1)

    lasting_set = set(lasting)
    waits = [in_thread(lambda first=first: disturb(first)) for first in range(4)]
    try:
        for size in (1, 7, 50, 500):
            for reverse in (False, True):
                seen = [one.key for page in users.pages(size, reverse=reverse) for one in page.entries]
                assert seen == sorted(set(seen), reverse=reverse)
                assert lasting_set <= set(seen)
    finally:
        enough.set()
    for wait in waits:
        wait()


def test_asyncio_reads_pages_too(users: Scope) -> None:
    async def main() -> list[list[str]]:
        return [[entry.key for entry in page.entries] async for page in users.aio.pages(3, start="a")]

    assert asyncio.run(main()) == [["a", "a1", "a2"], ["b", "é", "\uffff"], ["😀"]]


# -------------------------------------------------------------------------------------------------------- removal


def test_a_range_is_deleted_with_an_event_for_each_key(engine: Engine) -> None:
    seen = Seen()
    users = engine.scope("users")
    with users.batch() as b:
        for name in NAMES:
            b.set(name, 1)
    engine.on_change(scope="users")(seen)

    assert users.delete_range(prefix="a") == 3
    assert users.delete_range(prefix="a") == 0
    events = seen.wait_for(3)
    engine.drain()
    assert [(event.event_type, event.key) for event in events] == [("state:deleted", name) for name in NAMES[1:4]]
    assert len(seen.events) == 3
    assert users.keys() == ["", *NAMES[4:]]
    assert users.delete_range(after="", end="é") == 1
    assert users.delete_range(prefix="") == 4
    assert users.keys() == []


def test_more_keys_than_a_transaction_holds_are_deleted_in_pieces(open_store: OpenEngine) -> None:
    users = open_store().scope("users")

    def fill() -> None:
        for first in range(0, 2500, 500):
            with users.batch() as b:
                for number in range(first, first + 500):
                    b.set(f"k{number:05}", number)

    fill()
    assert users.delete_range(prefix="k", idempotency_key="i") == 2500
    assert users.count() == 0
    fill()
    assert users.delete_range(prefix="k", idempotency_key="i") == 2500  # told again, and nothing done
    assert users.count() == 2500
    assert asyncio.run(users.aio.delete_range(start="k00100")) == 2400


def test_deleting_without_a_bound_is_refused(users: Scope) -> None:
    for options in ({}, {"prefix": None}, {"idempotency_key": "i"}):
        with pytest.raises(DeserializationError, match="give a bound"):
            users.delete_range(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="limit"):
        users.delete_range(prefix="a", limit=3)  # type: ignore[call-arg]
    assert users.count() == len(NAMES)


# ------------------------------------------------------------------------------------------------------- membership


def test_a_key_is_in_a_scope_or_not(users: Scope) -> None:
    users.set("null", None)

    assert "a" in users
    assert "null" in users
    assert "x" not in users
    assert 5 not in users
    with pytest.raises(TypeError, match="not iterable"):
        iter(users)  # type: ignore[call-overload]


def entries(users: Scope) -> Iterator[EntryView]:
    return (entry for page in users.pages() for entry in page.entries)


def test_keys_of_another_scope_are_not_among_them(users: Scope) -> None:
    users._engine.set("users2", "zzz", 1)
    users._engine.set("user", "zzz", 1)

    assert users.keys(start="zz", end="zzzz") == []
    assert "zzz" not in [entry.key for entry in entries(users)]
