"""Reading and removing by key: order, bounds, pages, and a scope as a mapping."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from places import LONG_AGO, Events, Place, lasting, together

from scopestate import Engine
from scopestate.engine import Scope
from scopestate.errors import DeserializationError, InvalidCursor, ScopestateError

ODD = [
    "", "\x00", " ", "A", "a", "a\x00", "a/b", "aa", "ab", "b", "z", "\x7f", "\x80", "é",
    "\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff", "{", "}{",
]  # fmt: skip
"""In no order."""


def by_bytes(keys: list[str]) -> list[str]:
    return sorted(keys, key=str.encode)


def fill(scope: Scope, keys: list[str]) -> None:
    for part in itertools.batched(keys, 500) if hasattr(itertools, "batched") else _batched(keys):
        with scope.batch() as batch:
            for key in part:
                batch.set(key, key)


def _batched(keys: list[str]) -> Iterator[list[str]]:
    for first in range(0, len(keys), 500):
        yield keys[first : first + 500]


# ------------------------------------------------------------------------------------------------- order and bounds


def test_an_empty_scope_has_no_keys(users: Scope) -> None:
    assert (users.keys(), users.items(), users.entries(), users.values(), users.count()) == ([], [], [], [], 0)
    assert [page.entries for page in users.pages()] in ([], [()])
    assert list(users.iter()) == []
    assert "a" not in users


def test_keys_come_in_the_order_of_their_utf8_bytes(users: Scope) -> None:
    for key in ODD:
        users.set(key, key)

    expected = by_bytes(ODD)
    assert users.keys() == expected
    assert users.keys(reverse=True) == expected[::-1]
    assert users.items() == [(key, key) for key in expected]
    assert users.values() == expected
    assert [(entry.key, entry.value) for entry in users.entries()] == [(key, key) for key in expected]
    assert list(users.iter()) == [(key, key) for key in expected]
    assert users.count() == len(ODD)
    assert all(key in users for key in ODD)


BOUNDS: list[dict[str, Any]] = [
    {"prefix": "a"},
    {"prefix": ""},
    {"prefix": "\ud7ff"},
    {"prefix": "\U0010ffff"},
    {"start": "aa"},
    {"after": "aa"},
    {"end": "aa"},
    {"start": "a", "end": "b"},
    {"after": "a", "end": "aa"},
    {"start": "a", "after": "a"},
    {"start": "b", "after": "a"},
    {"prefix": "a", "start": "aa"},
    {"prefix": "a", "end": "é"},
    {"prefix": "a", "start": "b"},
    {"start": "z", "end": "a"},
    {"start": "missing", "end": "\uffff"},
    {"limit": 0},
    {"limit": 3},
    {"limit": 10_000},
    {"prefix": "a", "limit": 2},
    {"after": "\ue000", "limit": 2},
]


@pytest.mark.parametrize("reverse", [False, True], ids=["up", "down"])
def test_bounds_mean_the_same_everywhere(users: Scope, reverse: bool) -> None:
    fill(users, ODD)

    for bounds in BOUNDS:
        expected = brute_force(ODD, **bounds, reverse=reverse)
        assert users.keys(**bounds, reverse=reverse) == expected, bounds
        assert [key for key, _ in users.items(**bounds, reverse=reverse)] == expected, bounds
        assert [entry.key for entry in users.entries(**bounds, reverse=reverse)] == expected, bounds
        assert users.values(**bounds, reverse=reverse) == expected, bounds
        limitless = {name: bound for name, bound in bounds.items() if name != "limit"}
        if "after" not in bounds:
            assert users.count(**limitless) == len(brute_force(ODD, **limitless)), bounds


def brute_force(
    keys: list[str],
    prefix: str | None = None,
    start: str | None = None,
    after: str | None = None,
    end: str | None = None,
    reverse: bool = False,
    limit: int | None = None,
) -> list[str]:
    found = [
        key
        for key in by_bytes(keys)
        if (prefix is None or key.startswith(prefix))
        and (start is None or key.encode() >= start.encode())
        and (after is None or key.encode() > after.encode())
        and (end is None or key.encode() < end.encode())
    ]
    return (found[::-1] if reverse else found)[:limit]


def test_keys_follow_every_write(users: Scope) -> None:
    """Also those that are made between two readings, in front, behind and in between."""
    for key in ("m", "a", "z", "k"):
        users.set(key, 1)
        assert users.keys() == by_bytes(users.keys())
        assert users.keys().count(key) == 1
    users.delete("m")
    assert users.keys() == ["a", "k", "z"]
    users.set("m", 1)
    users.delete("a")
    users.set("a", 1)
    users.update("b", [{"type": "increment", "path": "x", "by": 1}])
    users.modify("c", lambda _: 1)
    users.compare_and_set("d", None, 1)
    with users.batch() as batch:
        batch.delete("z")
        batch.set("y", 1)
    assert users.keys() == ["a", "b", "c", "d", "k", "m", "y"]
    assert users.count(prefix="m") == 1


def test_list_keeps_its_own_order(users: Scope, place: Place) -> None:
    for key in ("b", "a", "c"):
        users.set(key, key)
    users.keys()

    assert users.list() == (["b", "a", "c"] if place.facts.inserted_order else ["a", "b", "c"])


@pytest.mark.parametrize(
    "bounds",
    [
        {"limit": -1},
        {"limit": 10**30},
        {"limit": True},
        {"limit": 1.0},
        {"prefix": 1},
        {"start": b"a"},
        {"end": "\ud800"},
        {"after": ["a"]},
    ],
    ids=repr,
)
def test_bounds_that_are_none_are_refused(users: Scope, bounds: dict[str, Any]) -> None:
    users.set("a", 1)

    for read in (users.keys, users.items, users.entries, users.values):
        with pytest.raises(DeserializationError):
            read(**bounds)


def test_values_that_are_read_are_copies(users: Scope) -> None:
    users.set("a", {"n": [1]})
    for value in (users.values()[0], users.items()[0][1], users.entries()[0].value, next(iter(users.iter()))[1]):
        value["n"].append(2)
    assert users.get("a") == {"n": [1]}


def test_keys_that_are_no_text_are_in_no_scope(users: Scope) -> None:
    assert 1 not in users
    assert None not in users


# ----------------------------------------------------------------------------------------------------- delete_range


def test_a_range_is_deleted_with_an_event_for_each_key(users: Scope, events: Events) -> None:
    fill(users, ["a1", "a2", "b1", "b2", "c"])
    events.take()

    assert users.delete_range(prefix="b") == 2
    assert users.keys() == ["a1", "a2", "c"]
    assert users.delete_range(start="a2", end="c") == 1
    assert users.delete_range(prefix="none") == 0

    assert events.take() == [
        ("deleted", "b1", "b1", None),
        ("deleted", "b2", "b2", None),
        ("deleted", "a2", "a2", None),
    ]


def test_a_range_of_more_keys_than_a_transaction_is_deleted_in_pieces(users: Scope) -> None:
    fill(users, [f"k{number:05}" for number in range(2_300)] + ["other"])

    assert users.delete_range(prefix="k") == 2_300
    assert users.keys() == ["other"]


def test_a_whole_scope_is_deleted(users: Scope, engine: Engine) -> None:
    fill(users, ODD)

    assert users.delete_range(prefix="") == len(ODD)
    assert users.keys() == []
    assert engine.list_groups() == []


# ------------------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("limit", [1, 2, 7, 21, 500])
def test_pages_give_every_key_once(users: Scope, limit: int) -> None:
    fill(users, ODD)

    pages = list(users.pages(limit=limit))

    assert [entry.key for page in pages for entry in page.entries] == by_bytes(ODD)
    assert all(len(page.entries) <= limit for page in pages)
    assert [page.done for page in pages] == [False] * (len(pages) - 1) + [True]
    assert [page.cursor is None for page in pages] == [page.done for page in pages]


def test_pages_keep_to_their_bounds(users: Scope) -> None:
    fill(users, ODD)

    for bounds in ({"prefix": "a"}, {"start": "aa", "end": "é"}, {"reverse": True}, {"prefix": "a", "reverse": True}):
        found = [entry.key for page in users.pages(limit=2, **bounds) for entry in page.entries]  # type: ignore[arg-type]
        assert found == brute_force(ODD, **bounds), bounds  # type: ignore[arg-type]


def test_entries_of_pages_have_revisions_and_deadlines(users: Scope) -> None:
    revision = users.set("a", 1, ttl=60).revision

    entry = next(iter(users.pages())).entries[0]
    assert (entry.key, entry.value, entry.revision) == ("a", 1, revision)
    assert entry.expires_at is not None


def test_a_walk_is_continued_from_its_cursor(users: Scope) -> None:
    fill(users, list("abcdef"))
    first = next(iter(users.pages(limit=2)))
    users.delete("c")
    users.set("aa", 1)

    rest = [entry.key for page in users.pages(limit=3, cursor=first.cursor) for entry in page.entries]

    assert [entry.key for entry in first.entries] == ["a", "b"]
    assert rest == ["d", "e", "f"]


@lasting
def test_a_cursor_outlives_its_engine(place: Place) -> None:
    with place.open() as engine:
        users = engine.scope("users")
        fill(users, list("abc"))
        cursor = next(iter(users.pages(limit=2))).cursor
    with place.open() as engine:
        pages = engine.scope("users").pages(limit=2, cursor=cursor)
        assert [entry.key for page in pages for entry in page.entries] == ["c"]


def test_a_cursor_is_refused_where_it_does_not_belong(users: Scope, engine: Engine) -> None:
    fill(users, list("abc"))
    other = engine.scope("other")
    fill(other, list("abc"))
    cursor = next(iter(users.pages(limit=2))).cursor
    assert cursor is not None

    with pytest.raises(InvalidCursor, match="another scope") as caught:
        list(other.pages(limit=2, cursor=cursor))
    assert caught.value.code == "INVALID_CURSOR"
    with pytest.raises(InvalidCursor):
        list(users.pages(limit=2, prefix="a", cursor=cursor))


@pytest.mark.parametrize("damage", ["", "x", "a", "long", "cut", "changed", "é", "null"])
def test_a_damaged_cursor_is_refused(users: Scope, damage: str) -> None:
    fill(users, list("abc"))
    cursor = next(iter(users.pages(limit=1))).cursor
    assert cursor is not None
    middle = len(cursor) // 2
    changed = "A" if cursor[middle] != "A" else "B"
    damaged = {
        "long": cursor + "A",
        "cut": cursor[:-1],
        "changed": cursor[:middle] + changed + cursor[middle + 1 :],
        "null": cursor + "\x00",
    }.get(damage, damage)

    with pytest.raises(InvalidCursor, match="damaged"):
        list(users.pages(limit=1, cursor=damaged))


def test_a_cursor_of_another_store_is_refused(place: Place, tmp_path: Any) -> None:
    users = place.open().scope("users")
    fill(users, list("abc"))
    with Engine() as other:
        fill(other.scope("users"), list("abc"))
        cursor = next(iter(other.scope("users").pages(limit=1))).cursor

    with pytest.raises(InvalidCursor):
        list(users.pages(limit=1, cursor=cursor))


@pytest.mark.parametrize("limit", [0, -1, True, 1.0, "1", 10**30])
def test_a_page_has_one_key_at_least(users: Scope, limit: Any) -> None:
    with pytest.raises(ScopestateError):
        list(users.pages(limit=limit))


def test_keys_that_exist_throughout_come_once_while_threads_write_around_them(users: Scope) -> None:
    kept = [f"k{number:03}" for number in range(0, 200, 4)]
    fill(users, kept)
    stop = threading.Event()

    def disturb(number: int) -> None:
        keys = [f"k{at:03}" for at in range(number, 200, 4)]
        for key in itertools.cycle(keys):
            if stop.is_set():
                return
            if key in users:
                users.delete(key)
            else:
                users.set(key, number)

    def walk() -> None:
        try:
            for limit in (1, 3, 10, 50, 7):
                found = [entry.key for page in users.pages(limit=limit) for entry in page.entries]
                assert found == sorted(set(found))
                assert [key for key in found if key in kept] == kept
        finally:
            stop.set()

    together(walk, *[lambda number=number: disturb(number) for number in (1, 2, 3)])


def test_iter_shows_one_moment(users: Scope) -> None:
    fill(users, list("abc"))
    walk = iter(users.iter())
    first = next(walk)
    users.delete("b")
    users.set("d", 1)
    users.set("c", "new")

    assert [first, *walk] == [("a", "a"), ("b", "b"), ("c", "c")]


def test_iter_keeps_to_its_bounds(users: Scope) -> None:
    fill(users, ODD)

    assert list(users.iter(prefix="a")) == [(key, key) for key in brute_force(ODD, prefix="a")]


# ---------------------------------------------------------------------------------------------------------- mapping


def test_a_scope_is_a_mutable_mapping(users: Scope) -> None:
    view = users.mapping()
    assert isinstance(view, MutableMapping)

    view["b"] = 2
    view["a"] = {"n": 1}
    assert (len(view), list(view), "a" in view, "x" in view) == (2, ["a", "b"], True, False)
    assert dict(view) == {"a": {"n": 1}, "b": 2}
    assert view == {"a": {"n": 1}, "b": 2}
    assert view != {"a": {"n": 1}}
    assert (view["b"], view.get("b"), view.get("x"), view.get("x", 7)) == (2, 2, None, 7)
    assert list(view.keys()) == ["a", "b"]
    assert list(view.values()) == [{"n": 1}, 2]
    assert list(view.items()) == [("a", {"n": 1}), ("b", 2)]
    assert bool(view)


def test_a_mapping_raises_key_errors(users: Scope) -> None:
    view = users.mapping()

    with pytest.raises(KeyError, match="x"):
        view["x"]
    with pytest.raises(KeyError, match="x"):
        del view["x"]
    with pytest.raises(KeyError):
        view.pop("x")
    with pytest.raises(KeyError):
        view.popitem()
    assert not view


def test_a_mapping_does_what_dicts_do(users: Scope, events: Events) -> None:
    view, same = users.mapping(), {"a": 1}
    view["a"] = 1
    assert view.setdefault("a", 5) == same.setdefault("a", 5)
    assert view.setdefault("b", 5) == same.setdefault("b", 5)
    assert view.setdefault("none") is same.setdefault("none")
    assert view.pop("a") == same.pop("a")
    assert view.pop("a", "default") == same.pop("a", "default")
    view.update({"c": 3}, d=4)
    same.update({"c": 3}, d=4)
    view.update([("e", 5)])
    same.update([("e", 5)])
    view |= {"f": 6}
    same |= {"f": 6}
    del view["c"]
    del same["c"]
    assert dict(view) == same
    key, value = view.popitem()
    assert same.pop(key) == value
    assert dict(view) == same
    view.clear()
    assert dict(view) == {}
    assert users.keys() == []


def test_an_update_of_a_mapping_is_one_transaction(users: Scope, events: Events) -> None:
    with pytest.raises(ScopestateError):
        users.mapping().update({"a": 1, "b": {1, 2}})
    assert users.keys() == []
    users.mapping().update({"a": 1, "b": 2})

    numbers = [event.revision for event in events.wait_for(2)]
    assert numbers == [numbers[0], numbers[0] + 1]


def test_one_of_many_threads_sets_a_default(users: Scope) -> None:
    view = users.mapping()
    answers: list[Any] = []

    together(*[lambda number=number: answers.append(view.setdefault("a", number)) for number in range(6)])

    assert set(answers) == {users.get("a")}


def test_keys_of_a_mapping_that_are_no_text(users: Scope) -> None:
    view: Any = users.mapping()

    assert 1 not in view
    assert view.get(1) is None
    with pytest.raises((KeyError, DeserializationError)):
        view[1]
    with pytest.raises(DeserializationError):
        view[1] = 2


# ---------------------------------------------------------------------------------------------------- what is over


def test_keys_that_have_expired_are_in_no_range(users: Scope) -> None:
    fill(users, list("abc"))
    users.set("b", 1, expires_at=LONG_AGO)

    assert users.keys() == ["a", "c"]
    assert users.keys(reverse=True, limit=1) == ["c"]
    assert users.values() == ["a", "c"]
    assert [key for key, _ in users.items()] == ["a", "c"]
    assert [entry.key for entry in users.entries(start="b")] == ["c"]
    assert (users.count(), users.count(prefix="b")) == (2, 0)
    assert "b" not in users
    assert [entry.key for page in users.pages(limit=1) for entry in page.entries] == ["a", "c"]
    assert [key for key, _ in users.iter()] == ["a", "c"]
    assert (dict(users.mapping()), len(users.mapping())) == ({"a": "a", "c": "c"}, 2)
    assert sorted(users.list()) == ["a", "c"]
    assert users.transact(lambda tx: (tx.keys(), len(tx), "b" in tx)) == (["a", "c"], 2, False)
    assert users.delete_range(prefix="") == 2
