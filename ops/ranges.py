"""Turns that read or remove many keys in the order of their UTF-8 bytes, and the cursors of pages.

A page starts after the last key of the page before it. So its cursor needs no memory on the server and survives a
restart, and a key that exists during the whole walk is returned exactly once.
"""

from __future__ import annotations

import base64
from typing import Any, Final

import msgspec

from scopestate.errors import DeserializationError, InvalidCursor
from scopestate.ops.results import WriteResult
from scopestate.ops.turns import A, Change, Effects, Entry, Failure, Range, Turn, View, changes_of
from scopestate.ops.values import parse

MAX_DELETED: Final = 1_000
"""The most keys that one `DeleteRange` removes."""
PAGE_KEYS: Final = 500
"""Keys on a page if the caller names no limit."""
ALL: Final = Range()


class _Ranged(Turn[A], frozen=True):
    failure = Failure("LIST_ERROR", "Failed to list values")

    within: Range = ALL

    @property
    def keys(self) -> None:
        return None

    def call(self, scope: str) -> dict[str, Any]:
        return {"scope": scope, **msgspec.structs.asdict(self.within)}


class Keys(_Ranged[list[str]], frozen=True):
    """Read keys."""

    looks_at = "keys"
    function_id = "state::list_keys"

    def decide(self, view: View) -> Effects[list[str]]:
        return (), list(view.keys(self.within))

    def effects_of(self, result: bytes | None) -> Effects[list[str]]:
        return (), msgspec.json.decode(result or b"null", type=dict[str, list[str]])["keys"]


class _Listed(_Ranged[A], frozen=True):
    """A turn that reads keys with what is stored under them. Over a bridge, all such turns ask for entries."""

    function_id = "state::list_entries"

    def call(self, scope: str) -> dict[str, Any]:
        return {**super().call(scope), "_entries": True}


class Pairs(_Listed[list[tuple[str, bytes]]], frozen=True):
    """Read keys with their values as JSON."""

    looks_at = "values"

    def decide(self, view: View) -> Effects[list[tuple[str, bytes]]]:
        get = view.get
        pairs = [(key, get(key)) for key in view.keys(self.within)]
        return (), pairs  # type: ignore[return-value]  # keys of a view exist

    def effects_of(self, result: bytes | None) -> Effects[list[tuple[str, bytes]]]:
        return (), [(key, entry.json) for key, entry in _entries_of(result).entries]


class Values(_Listed[list[bytes]], frozen=True):
    """Read values as JSON, in the order of their keys."""

    looks_at = "values"

    def decide(self, view: View) -> Effects[list[bytes]]:
        get = view.get
        # Not `map`, which would hold the interpreter lock until all values are read.
        found = [get(key) for key in view.keys(self.within)]
        return (), found  # type: ignore[return-value]  # keys of a view exist

    def effects_of(self, result: bytes | None) -> Effects[list[bytes]]:
        return (), [entry.json for _, entry in _entries_of(result).entries]


class Entries(_Listed[list[tuple[str, Entry]]], frozen=True):
    """Read keys with what is stored under them."""

    def decide(self, view: View) -> Effects[list[tuple[str, Entry]]]:
        entry = view.entry
        found = [(key, entry(key)) for key in view.keys(self.within)]
        return (), found  # type: ignore[return-value]  # keys of a view exist

    def effects_of(self, result: bytes | None) -> Effects[list[tuple[str, Entry]]]:
        return (), list(_entries_of(result).entries)


class State(_Listed[tuple[int, list[tuple[str, Entry]]]], frozen=True):
    """Read the revision of the scope and its entries at the same moment: the start of a watch."""

    def decide(self, view: View) -> Effects[tuple[int, list[tuple[str, Entry]]]]:
        found = [] if self.within.limit == 0 else Entries(self.within).decide(view)[1]
        return (), (view.revision, found)


class Count(_Ranged[int], frozen=True):
    """Count keys."""

    looks_at = "keys"
    function_id = "state::count"

    def decide(self, view: View) -> Effects[int]:
        return (), view.count(self.within)

    def effects_of(self, result: bytes | None) -> Effects[int]:
        return (), msgspec.json.decode(result or b"null", type=dict[str, int])["count"]


class Deleted(WriteResult, frozen=True, eq=False):
    """Result of `DeleteRange`."""

    deleted: int
    """The number of keys that were removed."""
    more: bool
    """True if keys are left in the range: the turn removes at most MAX_DELETED."""
    removed: tuple[tuple[str, bytes], ...] = ()
    """These keys with the values that they had, as JSON; empty for a repetition."""

    def to_json(self) -> dict[str, Any]:
        """The result as it goes over the wire."""
        return self._with_details({"deleted": self.deleted, "more": self.more})


class DeleteRange(_Ranged[Deleted], frozen=True):
    """Remove the first MAX_DELETED keys of a range, or all if there are fewer. All of these are removed, or none."""

    function_id = "state::delete-range"
    writes = True
    failure = Failure("DELETE_ERROR", "Failed to delete values")

    def decide(self, view: View) -> Effects[Deleted]:
        limit = MAX_DELETED if self.within.limit is None else min(self.within.limit, MAX_DELETED)
        found = list(view.keys(msgspec.structs.replace(self.within, limit=limit + 1)))
        changes: list[Change] = []
        for key in found[:limit]:
            changes += changes_of(view, key, view.entry(key), None)
        removed = tuple([(one.key, one.before) for one in changes if one.before is not None])
        answer = Deleted(len(changes), len(found) > limit, removed, revision=view.revision + len(changes))
        return tuple(changes), answer

    def call(self, scope: str) -> dict[str, Any]:
        within = self.within
        everything = within.prefix is within.start is within.after is within.end is None
        return {**super().call(scope), "prefix": "" if everything else within.prefix, "_existed": True}

    def effects_of(self, result: bytes | None) -> Effects[Deleted]:
        told = _decode_deleted(result or b"null")
        removed = tuple([(key, parse(bytes(value))) for key, value in told.removed])
        answer = Deleted(
            told.deleted,
            told.more,
            removed,
            revision=told.revision,
            detailed=told.revision != 0,
            replayed=told.replayed,
        )
        return tuple([Change(key, value, None) for key, value in removed]), answer

    def pack(self, answer: Deleted) -> bytes:
        return super().pack(msgspec.structs.replace(answer, removed=()))

    def unpack(self, kept: bytes) -> Deleted:
        return msgspec.structs.replace(msgspec.msgpack.decode(kept, type=Deleted), replayed=True)


class _Deleted(msgspec.Struct):
    deleted: int
    more: bool
    revision: int = 0
    replayed: bool = False
    removed: list[tuple[str, msgspec.Raw]] = []


_decode_deleted: Final = msgspec.json.Decoder(_Deleted).decode


# ---------------------------------------------------------------------------------------------------------- pages


class Page(msgspec.Struct, frozen=True):
    """Some entries of a range, in order."""

    entries: tuple[tuple[str, Entry], ...]
    cursor: str | None
    """Where the next page begins; None: this is the last page."""

    @property
    def done(self) -> bool:
        """True if this is the last page."""
        return self.cursor is None


class ReadPage(_Listed[Page], frozen=True):
    """Read one page of a range. `within.limit` is the size of the page."""

    cursor: str | None = None
    """The cursor of the page before; None: the first page."""
    max_bytes: int = 0
    """The most bytes of JSON on the page, unless its only entry is larger; 0: no limit."""

    def decide(self, view: View) -> Effects[Page]:
        within = self.within
        limit = PAGE_KEYS if within.limit is None else within.limit
        if self.cursor is not None:
            within = behind(within, read_cursor(self.cursor, view.store_id, view.scope, within))
        entries: list[tuple[str, Entry]] = []
        size, more = 0, False
        for key in view.keys(msgspec.structs.replace(within, limit=limit + 1)):
            entry = view.entry(key)
            if entry is None:
                continue
            size += len(entry.json)
            more = len(entries) == limit or bool(self.max_bytes and entries and size > self.max_bytes)
            if more:
                break
            entries.append((key, entry))
        cursor = make_cursor(view.store_id, view.scope, self.within, entries[-1][0]) if more else None
        return (), Page(tuple(entries), cursor)

    def call(self, scope: str) -> dict[str, Any]:
        # The cursor comes from the other engine, and contains the id of its store.
        return {**super().call(scope), "_by_page": True, "cursor": self.cursor, "max_bytes": self.max_bytes}

    def effects_of(self, result: bytes | None) -> Effects[Page]:
        return (), _entries_of(result)


class _Entries(msgspec.Struct):
    entries: list[tuple[str, _Stored]]
    next_cursor: str | None = None


class _Stored(msgspec.Struct):
    value: msgspec.Raw
    revision: int
    expires_at: int | None = None


_decode_entries: Final = msgspec.json.Decoder(_Entries).decode


def _entries_of(result: bytes | None) -> Page:
    """Return the page in another engine's answer to `_entries`."""
    told = _decode_entries(result or b"null")
    entries = [(key, Entry(parse(bytes(one.value)), one.revision, one.expires_at)) for key, one in told.entries]
    return Page(tuple(entries), told.next_cursor)


def checked_page(within: Range) -> Range:
    """Return the range of a page. Raises DeserializationError if the page could hold no key."""
    if within.limit is not None and within.limit < 1:
        raise DeserializationError(f"a page has 1 key or more, not {within.limit}")
    return within


def behind(within: Range, last: str) -> Range:
    """Return the part of a range that comes after `last`, the last key of a page."""
    if within.reverse:
        return msgspec.structs.replace(within, end=last)
    return msgspec.structs.replace(within, after=last)


class _Cursor(msgspec.Struct, frozen=True, array_like=True):
    store: bytes
    scope: bytes
    within: bytes
    last: str


_VERSION: Final = b"\x01"
_CHECKSUM_BYTES: Final = 6
_cursor: Final = msgspec.msgpack.Decoder(_Cursor)


def make_cursor(store: str, scope: str, within: Range, last: str) -> str:
    """Return the cursor of the page after the key `last`: opaque text for URLs, guarded against damage."""
    body = _VERSION + msgspec.msgpack.encode(
        _Cursor(_digest(store, 8), _digest(scope, 8), _digest(_bounds(within), 4), last)
    )
    return _text_of(_digest(body, _CHECKSUM_BYTES) + body)


def read_cursor(cursor: str, store: str, scope: str, within: Range) -> str:
    """Return the last key of the previous page. Raises InvalidCursor if the cursor was not made for this walk."""
    try:
        data = base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise InvalidCursor("damaged") from None
    checksum, body = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    # base64 ignores some bits: without the last comparison, different texts would be the same cursor.
    if not body or checksum != _digest(body, _CHECKSUM_BYTES) or _text_of(data) != cursor:
        raise InvalidCursor("damaged")
    # Every version begins with the checksum and its own number.
    if body[:1] != _VERSION:
        raise InvalidCursor("another version")
    try:
        found = _cursor.decode(body[1:])
    except msgspec.DecodeError:
        raise InvalidCursor("damaged") from None
    if found.store != _digest(store, 8):
        raise InvalidCursor("another store")
    if found.scope != _digest(scope, 8):
        raise InvalidCursor("another scope")
    if found.within != _digest(_bounds(within), 4):
        raise InvalidCursor("another range")
    return found.last


def _text_of(data: bytes) -> str:
    """Return bytes as text that needs no escaping in a URL."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bounds(within: Range) -> bytes:
    """Return what all pages of a walk have in common: everything but the size of the page."""
    return msgspec.msgpack.encode((within.prefix, within.start, within.after, within.end, within.reverse))


def _digest(content: str | bytes, size: int) -> bytes:
    import hashlib  # noqa: PLC0415 - it loads OpenSSL

    data = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=size).digest()
