"""Ranges in the order of UTF-8 bytes, pages, and the cursors of pages."""

from __future__ import annotations

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turns.stored import Stored

from scopestate.errors import DeserializationError, InvalidCursor
from scopestate.ops import ranges
from scopestate.ops.ranges import (
    MAX_DELETED,
    DeleteRange,
    Keys,
    ReadPage,
    checked_page,
    make_cursor,
    read_cursor,
)
from scopestate.ops.turns import Range, end_of_prefix

# Code points at the edges of UTF-8's lengths, and around the surrogates.
CHARACTERS = st.sampled_from("\0ab\x7f\x80é\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff")
NAMES = st.text(CHARACTERS, max_size=4)


@given(NAMES, NAMES)
def test_text_compares_as_its_utf8_bytes(one: str, other: str) -> None:
    assert (one < other) == (one.encode() < other.encode())


@given(NAMES, NAMES)
def test_the_end_of_a_prefix_is_above_all_that_begins_with_it_and_nothing_else(prefix: str, name: str) -> None:
    end = end_of_prefix(prefix)
    if end is not None:
        end.encode()  # no half of a surrogate pair
    assert name.startswith(prefix) == (name >= prefix and (end is None or name < end))


@given(NAMES, *[st.none() | NAMES] * 4)
def test_a_key_is_within_a_range_if_it_is_within_each_bound(
    key: str, prefix: str | None, start: str | None, after: str | None, end: str | None
) -> None:
    within = Range(prefix, start, after, end)
    assert within.holds(key) == (
        (prefix is None or key.startswith(prefix))
        and (start is None or key >= start)
        and (after is None or key > after)
        and (end is None or key < end)
    )


def test_bounds_mean_the_same_in_reverse() -> None:
    stored = Stored()
    stored.put(a=1, b=2, c=3, d=4)
    assert stored.run(Keys(Range(start="b", end="d"))) == ["b", "c"]
    assert stored.run(Keys(Range(start="b", end="d", reverse=True))) == ["c", "b"]
    assert stored.run(Keys(Range(after="b", limit=1, reverse=True))) == ["d"]


def test_a_limit_is_a_number_of_keys() -> None:
    assert Range(limit=0).checked().limit == 0
    with pytest.raises(DeserializationError, match="a limit is 0 or more, not -1"):
        Range(limit=-1).checked()
    assert checked_page(Range(limit=1)).limit == 1
    with pytest.raises(DeserializationError, match="a page has 1 key or more, not 0"):
        checked_page(Range(limit=0))


def test_a_range_larger_than_one_turn_may_delete_is_deleted_in_pieces() -> None:
    stored = Stored()
    stored.put(**{f"k{number:05}": number for number in range(MAX_DELETED + 5)}, other=1)

    first, events = stored.run_seeing(DeleteRange(Range(prefix="k")))
    assert (first.deleted, first.more, len(events)) == (MAX_DELETED, True, MAX_DELETED)
    assert first.revision == stored.revision
    assert stored.run(DeleteRange(Range(prefix="k"))).to_json() == {"deleted": 5, "more": False}
    assert list(stored.entries) == ["other"]


def test_keys_that_exist_all_the_while_come_exactly_once_while_others_come_and_go() -> None:
    for reverse in (False, True):
        stored = Stored()
        stored.put(**{f"k{number:03}": 1 for number in range(0, 100, 2)})
        seen: list[str] = []
        cursor, number = None, 0
        while True:
            page = stored.run(ReadPage(Range(limit=7, reverse=reverse), cursor))
            seen += [key for key, _ in page.entries]
            # Before, at and behind the place where the walk is.
            for step in range(6):
                number += 1
                new = f"k{(number * 37 + step) % 100:03}"
                if int(new[1:]) % 2:
                    stored.put(**{new: 1})
                    stored.entries.pop(f"k{(number * 13) % 100 | 1:03}", None)
            stored.entries.pop(seen[-1], None) if int(seen[-1][1:]) % 2 else None
            if page.done:
                break
            cursor = page.cursor
        always = [key for key in seen if int(key[1:]) % 2 == 0]
        assert always == sorted((f"k{number:03}" for number in range(0, 100, 2)), reverse=reverse)


def test_a_page_ends_at_its_bytes_but_has_one_entry_at_least() -> None:
    stored = Stored()
    stored.put(a="x" * 50, b="y", c="z")

    page = stored.run(ReadPage(Range(), None, max_bytes=10))
    assert [key for key, _ in page.entries] == ["a"]
    page = stored.run(ReadPage(Range(), page.cursor, max_bytes=10))
    assert [key for key, _ in page.entries] == ["b", "c"]
    assert page.done


def test_the_last_page_says_so_even_if_it_is_full() -> None:
    stored = Stored()
    assert stored.run(ReadPage(Range(limit=2))).done
    stored.put(a=1, b=2)
    page = stored.run(ReadPage(Range(limit=2)))
    assert (len(page.entries), page.done, page.cursor) == (2, True, None)


# --------------------------------------------------------------------------------------------------------- cursors


@given(NAMES, NAMES, NAMES, st.none() | NAMES, st.booleans(), st.none() | st.integers(1, 9))
def test_a_cursor_gives_back_its_key_whatever_the_size_of_the_next_page(
    store: str, scope: str, last: str, prefix: str | None, reverse: bool, limit: int | None
) -> None:
    cursor = make_cursor(store, scope, Range(prefix=prefix, reverse=reverse, limit=limit), last)

    assert set(cursor) <= set(string.ascii_letters + string.digits + "-_")
    assert read_cursor(cursor, store, scope, Range(prefix=prefix, reverse=reverse)) == last


def reason(cursor: str, store: str = "store", scope: str = "s", within: Range | None = None) -> str:
    with pytest.raises(InvalidCursor) as caught:
        read_cursor(cursor, store, scope, within or Range(prefix="a"))
    assert caught.value.code == "INVALID_CURSOR"
    assert caught.value.reason in str(caught.value)
    return caught.value.reason


CURSOR = make_cursor("store", "s", Range(prefix="a"), "abc")


def test_a_cursor_is_refused_with_its_reason_where_it_was_not_made_for() -> None:
    assert reason(CURSOR, store="other") == "another store"
    assert reason(CURSOR, scope="other") == "another scope"
    for within in (Range(), Range(prefix="ab"), Range(prefix="a", reverse=True), Range(prefix="a", start="ab")):
        assert reason(CURSOR, within=within) == "another range"


@pytest.mark.parametrize(
    "cursor", ["", "x", "é", "a b", "====", "AAAA", CURSOR[:-1], CURSOR + "A", CURSOR + "=", " " + CURSOR]
)
def test_what_is_no_cursor_is_refused_as_damaged(cursor: str) -> None:
    assert reason(cursor) == "damaged"


def test_any_changed_character_is_damage() -> None:
    for place, old in enumerate(CURSOR):
        for new in "Aa0-_Z":
            if new != old:
                assert reason(CURSOR[:place] + new + CURSOR[place + 1 :]) == "damaged"


def test_any_flipped_bit_of_its_bytes_is_damage() -> None:
    data = base64.urlsafe_b64decode(CURSOR + "=" * (-len(CURSOR) % 4))
    for place in range(len(data)):
        for bit in range(8):
            flipped = data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]
            assert reason(ranges._text_of(flipped)) == "damaged"


def with_checksum(body: bytes) -> str:
    return ranges._text_of(ranges._digest(body, 6) + body)


def test_a_cursor_of_a_later_version_is_refused_as_that() -> None:
    data = base64.urlsafe_b64decode(CURSOR + "=" * (-len(CURSOR) % 4))

    assert with_checksum(data[6:]) == CURSOR
    assert reason(with_checksum(b"\x02" + data[7:])) == "another version"
    assert reason(with_checksum(b"\x02 with other content")) == "another version"
    for body in (b"", b"\x01", b"\x01not msgpack"):
        assert reason(with_checksum(body)) == "damaged"


def test_a_cursor_of_a_walk_with_another_scope_is_refused_by_the_page() -> None:
    stored = Stored("other")
    with pytest.raises(InvalidCursor, match="made for another scope; begin again without a cursor"):
        stored.run(ReadPage(Range(prefix="a"), CURSOR))
