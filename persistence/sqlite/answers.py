"""Kept answers to calls with an idempotency key: written with the rows of their scope, and removed after a day."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from scopestate.actors.ports import ANSWERS_KEPT_MS, Answer
from scopestate.errors import StorageError
from scopestate.persistence.sqlite.database import primary_code
from scopestate.persistence.sqlite.statements import Write, ladder

log = logging.getLogger("scopestate.persistence.file")

_PAGE_ANSWERS = 500
_AT_ONCE = 1000
"""Answers that one save removes because of their age. The next save removes more."""

# REPLACE, so that a key that is used again after a day comes after the others.
_KEEP = ladder(
    "REPLACE INTO answers (scope, token, time, request, answer) VALUES",
    "(?, ?, ?, ?, ?)",
    "",
)
# Refused: `WHERE (scope, token) IN (VALUES ...)`, for which SQLite reads the whole table.
_DROP = ladder(
    "WITH gone (scope, token) AS (VALUES",
    "(?, ?)",
    ") DELETE FROM answers WHERE id IN (SELECT answers.id FROM gone CROSS JOIN answers USING (scope, token))",
)
# Ids rise with time, nearly: the condition decides, the window only says where to look.
_DROP_OLD = "DELETE FROM answers WHERE id IN (SELECT id FROM answers ORDER BY id LIMIT :at_once) AND time <= :latest"
_OLDEST = "SELECT time FROM answers ORDER BY id LIMIT 1"

_OF_SCOPE = "FROM answers WHERE scope = (SELECT number FROM scopes WHERE scope = :scope) AND token > :after"
# As one text, like a page of rows. No idempotency key is empty.
_PAGE = (
    "SELECT json_group_array(json_array(id, token, time, hex(request), hex(answer)))"  # noqa: S608 - constants
    f" FROM (SELECT id, token, time, request, answer {_OF_SCOPE} ORDER BY token LIMIT :limit)"
)
_PLAIN = f"SELECT id, token, time, request, answer {_OF_SCOPE} ORDER BY token LIMIT :limit"

_decode_page = msgspec.json.Decoder(list[tuple[int, str, int, str, str]]).decode


class AnswerWriter:
    """Writes kept answers into one database. One thread at a time."""

    def __init__(self) -> None:
        self._looks_ms = 0
        """When the oldest answer becomes too old; 0 if that must be looked up."""

    def forget(self) -> None:
        """A transaction was rolled back."""
        self._looks_ms = 0

    def write(
        self, connection: sqlite3.Connection, answers: Iterable[tuple[int, Mapping[str, Answer | None]]], room: int
    ) -> None:
        """Write what changed: the number of a scope, and its answers. `room`: bytes that a row can hold."""
        kept, dropped = Write(connection, _KEEP, 5), Write(connection, _DROP, 2)
        seen: set[int] = set()
        for scope, changed in answers:
            if scope in seen:
                # The later change of a scope is the newer one.
                kept.flush()
                dropped.flush()
                seen.clear()
            seen.add(scope)
            for token, answer in changed.items():
                if answer is None:
                    dropped.add((scope, token), len(token))
                    continue
                size = 4 * len(token) + len(answer.fingerprint) + len(answer.answer)
                if size > room:
                    log.warning(
                        "the answer for the idempotency key %.80r takes %d bytes, more than a row can hold (%d): it is "
                        "kept in memory only, and a repetition after a restart is done again",
                        token,
                        size,
                        room,
                    )
                    continue
                kept.add((scope, token, answer.time_ms, answer.fingerprint, answer.answer), size)
        kept.flush()
        dropped.flush()

    def drop_old(self, connection: sqlite3.Connection, now_ms: int) -> None:
        """Remove answers that are too old, of all scopes. Looks for them only when there are some."""
        if now_ms < self._looks_ms:
            return
        latest = now_ms - ANSWERS_KEPT_MS
        oldest = connection.execute(_OLDEST).fetchall()
        if oldest and oldest[0][0] <= latest:
            connection.execute(_DROP_OLD, {"at_once": _AT_ONCE, "latest": latest})
            oldest = connection.execute(_OLDEST).fetchall()
        # None of those that are written from now on is too old earlier.
        self._looks_ms = (oldest[0][0] if oldest else now_ms) + ANSWERS_KEPT_MS


HAS_ANSWERS = "EXISTS (SELECT 1 FROM answers WHERE answers.scope = (SELECT number FROM scopes WHERE scope = :scope))"


def read_answers(connection: sqlite3.Connection, scope: str) -> dict[str, Answer]:
    """Return the kept answers of a scope, the oldest first. The caller has a transaction.

    Raises StorageError for one that is damaged, and library errors.
    """
    try:
        found = sorted((time_ms, id_, token, answer) for id_, token, time_ms, answer in _answers(connection, scope))
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise StorageError(
            f"a row of the table `answers` for scope {scope!r} is damaged ({error}); was the database edited? Delete "
            "it with the sqlite3 tool: the call of its idempotency key is then done again if it is repeated"
        ) from error
    return {token: answer for _, _, token, answer in found}


def _answers(connection: sqlite3.Connection, scope: str) -> Iterator[tuple[int, str, int, Answer]]:
    after, limit = "", _PAGE_ANSWERS
    while True:
        asked: dict[str, str | int] = {"scope": scope, "after": after, "limit": limit}
        try:
            ((text,),) = connection.execute(_PAGE, asked).fetchall()
        except sqlite3.DataError as error:
            if primary_code(error) != sqlite3.SQLITE_TOOBIG:
                raise
            if limit > 1:
                limit = max(1, limit // 8)
                continue
            rows = [_read_plain(connection, asked)]
        else:
            rows = [
                (id_, token, time_ms, Answer(bytes.fromhex(request), bytes.fromhex(answer), time_ms))
                for id_, token, time_ms, request, answer in _decode_page(text)
            ]
        yield from rows
        if len(rows) < limit:
            return
        after, limit = rows[-1][1], min(_PAGE_ANSWERS, limit * 2)


def _read_plain(connection: sqlite3.Connection, asked: dict[str, str | int]) -> tuple[int, str, int, Answer]:
    """Read one answer of any size."""
    before = connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 0x7FFFFFFF)
    try:
        ((id_, token, time_ms, request, answer),) = connection.execute(_PLAIN, asked).fetchall()
    finally:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)
    return id_, token, time_ms, Answer(request, answer, time_ms)
