"""The cursors of watches: opaque text that says where a watch continues."""

from __future__ import annotations

import binascii
from base64 import b64decode, urlsafe_b64encode
from typing import Final

import msgspec

from scopestate.errors import InvalidCursor
from scopestate.ops.changes import Change


class ScopeCursor(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """A place after one revision of one scope. Revisions never repeat, so it is valid for the life of the store."""

    store: str
    scope: str
    revision: int | None
    """None: before the snapshot."""

    def text(self) -> str:
        """Return the cursor as text."""
        return _text_of(self)


class ManyCursor(msgspec.Struct, frozen=True, array_like=True, tag="m"):
    """A place after one position, of many scopes. Changes lost in a crash had positions of an earlier epoch."""

    store: str
    epoch: int
    position: int | None
    """None: before the snapshot."""

    def text(self) -> str:
        """Return the cursor as text."""
        return _text_of(self)


class ScopeCursors(msgspec.Struct, frozen=True, gc=False):
    """Makes the cursors of the changes of one scope."""

    store: str
    scope: str

    def cursor_of(self, change: Change) -> str:
        """Return the cursor after a change."""
        return self.at(None if change.initial else change.revision)

    def at(self, revision: int | None) -> str:
        """Return the cursor after a revision; None: before the snapshot."""
        return ScopeCursor(self.store, self.scope, revision).text()


class ManyCursors(msgspec.Struct, frozen=True, gc=False):
    """Makes the cursors of the changes of many scopes."""

    store: str
    epoch: int

    def cursor_of(self, change: Change) -> str:
        """Return the cursor after a change."""
        return self.at(None if change.initial else change.position)

    def at(self, position: int | None) -> str:
        """Return the cursor after a position; None: before the snapshot."""
        return ManyCursor(self.store, self.epoch, position).text()


_VERSION: Final = b"\x01"
_decode: Final = msgspec.msgpack.Decoder(ScopeCursor | ManyCursor).decode


def _text_of(cursor: ScopeCursor | ManyCursor) -> str:
    body = _VERSION + msgspec.msgpack.encode(cursor)
    return urlsafe_b64encode(binascii.crc32(body).to_bytes(4, "big") + body).rstrip(b"=").decode()


def cursor_before(text: str) -> str:
    """Return the cursor before a change, from the one after it. Raises InvalidCursor."""
    found = read_cursor(text)
    if isinstance(found, ScopeCursor):
        return ScopeCursor(found.store, found.scope, max((found.revision or 0) - 1, 0)).text()
    return ManyCursor(found.store, found.epoch, max((found.position or 0) - 1, 0)).text()


def cursor_of_snapshot(text: str) -> str:
    """Return the cursor before the snapshot, from another one of the same watch. Raises InvalidCursor."""
    found = read_cursor(text)
    if isinstance(found, ScopeCursor):
        return ScopeCursor(found.store, found.scope, None).text()
    return ManyCursor(found.store, found.epoch, None).text()


def read_start(text: str) -> ScopeCursor | ManyCursor:
    """Return the cursor at which a durable trigger begins. Raises InvalidCursor, which names the other valid values."""
    try:
        return read_cursor(text)
    except InvalidCursor as error:
        advice = 'as `start` give "now", "earliest", or the whole cursor of a watch'
        raise InvalidCursor(error.reason, advice) from None


def read_cursor(text: object) -> ScopeCursor | ManyCursor:
    """Return the cursor that a text stands for. Raises InvalidCursor."""
    if not isinstance(text, str):
        raise InvalidCursor("not text")
    try:
        data = b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
        checksum, body = data[:4], data[4:]
        if checksum != binascii.crc32(body).to_bytes(4, "big") or not body:
            raise InvalidCursor("damaged")
        if body[:1] != _VERSION:
            raise InvalidCursor("another version")
        found: ScopeCursor | ManyCursor = _decode(body[1:])
    except ValueError:  # msgspec's errors are ValueErrors
        raise InvalidCursor("damaged") from None
    if found.text() != text:
        raise InvalidCursor("damaged")  # base64 ignores some bits, so another text decodes to the same bytes
    return found
