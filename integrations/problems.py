"""Errors of an engine as HTTP answers: a status, and a body of `application/problem+json` (RFC 9457).

`STATUSES` is the table of them. The modules for Starlette, FastAPI and Litestar make exception handlers of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from scopestate.errors import (
    BatchTooLarge,
    CallTimeout,
    Compacted,
    Conflict,
    ConnectionLost,
    DeserializationError,
    EngineClosed,
    EngineForked,
    Forbidden,
    FunctionNotFound,
    IdempotencyMismatch,
    InvalidCursor,
    InvalidPageLimits,
    MessageTooLarge,
    NotConnected,
    Overloaded,
    RemoteFailure,
    ReplyTimeout,
    RowTooLarge,
    SchemaViolation,
    ScopestateError,
    SnapshotCapacity,
    StorageError,
    UnsavableValue,
    UpdateRefused,
    ValueTooLarge,
    WatchOverrun,
)

__all__ = ["MEDIA_TYPE", "SCHEMA", "STATUSES", "Problem", "problem_of"]

log = logging.getLogger("scopestate.integrations")

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 1
"""Seconds in `Retry-After`: about the time in which another process takes over a directory, or Redis is back."""

STATUSES: Final[Mapping[type[ScopestateError], tuple[int, str]]] = MappingProxyType(
    {
        Forbidden: (403, "Not allowed"),
        FunctionNotFound: (404, "No such function"),
        Conflict: (409, "The key has changed"),
        Compacted: (410, "The changes are not kept any more"),
        ValueTooLarge: (413, "The value is too large"),
        BatchTooLarge: (413, "The transaction is too large"),
        MessageTooLarge: (413, "The message is too large"),
        RowTooLarge: (422, "The page is too small for a row"),
        SchemaViolation: (422, "The value does not fit its type"),
        DeserializationError: (422, "The input does not fit"),
        UpdateRefused: (422, "An op does not fit the value"),
        IdempotencyMismatch: (422, "The idempotency key was used for another write"),
        InvalidCursor: (422, "The cursor cannot be used"),
        InvalidPageLimits: (422, "The size of the page is out of bounds"),
        UnsavableValue: (422, "The value cannot be saved"),
        Overloaded: (503, "Too many requests wait"),
        SnapshotCapacity: (503, "Too many snapshots are being read"),
        WatchOverrun: (503, "The watch was read too slowly"),
        ReplyTimeout: (503, "No answer in time"),
        CallTimeout: (503, "No answer in time"),
        NotConnected: (503, "The state cannot be reached"),
        ConnectionLost: (503, "The state cannot be reached"),
        StorageError: (503, "The state cannot be reached"),
        EngineClosed: (503, "The service ends"),
    }
)
"""Status and title of each error that becomes an answer. Any other error is a mistake of the program: status 500."""

SCHEMA: Final[dict[str, Any]] = {
    "title": "Problem",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string", "description": "Names the kind of problem: `urn:scopestate:` and the code."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What was wrong, for people."},
        "code": {"type": "string", "description": "What programs compare, such as `CONFLICT`."},
        "scope": {"type": "string"},
        "key": {"type": "string"},
    },
}
"""The JSON schema of a body. docs/how-to/web-frameworks.md has the additional members of each kind of problem."""

_FACTS: Final[Mapping[type[ScopestateError], tuple[str, ...]]] = MappingProxyType(
    {
        Conflict: ("scope", "key", "revision", "expected_revision", "conflicts"),
        Compacted: ("reason", "oldest"),
        ValueTooLarge: ("scope", "key", "size", "limit"),
        BatchTooLarge: ("scope", "size", "limit", "unit"),
        RowTooLarge: ("scope", "key", "size", "limit"),
        SchemaViolation: ("scope", "key", "path", "reason"),
        UpdateRefused: ("scope", "errors"),
        IdempotencyMismatch: ("scope",),
        InvalidCursor: ("reason",),
        UnsavableValue: ("scope", "key"),
        WatchOverrun: ("cursor",),
        ReplyTimeout: ("scope",),
        FunctionNotFound: ("function_id",),
        DeserializationError: ("path", "scope", "key", "errors"),
    }
)
"""Attributes of errors that become members of the body, if the error has them."""


class Problem(msgspec.Struct, frozen=True):
    """An error as an answer: `headers()` and `body()` of a response with `status`."""

    status: int
    title: str
    detail: str
    code: str
    facts: dict[str, Any] = {}
    """Further members of the body, such as `scope` and `key`."""

    def headers(self) -> dict[str, str]:
        """Return the headers: the media type, and with status 503 the time after which to try again."""
        always = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
        return always if self.status != 503 else {**always, "Retry-After": str(RETRY_AFTER_S)}

    def body(self) -> bytes:
        """Return the body, JSON in UTF-8."""
        given = {"title": self.title, "status": self.status, "detail": self.detail, "code": self.code}
        return msgspec.json.encode({"type": f"urn:scopestate:{self.code}", **given, **self.facts}, enc_hook=_plain)

    @property
    def close_code(self) -> int:
        """The code that closes a WebSocket: 1013 to try again later, otherwise 1008."""
        return 1013 if self.status == 503 else 1008


def problem_of(error: Exception, during: str = "") -> Problem | None:
    """Return the answer to an error of an engine; None if it stays an internal error, status 500.

    The text of an error with status 503 names files, hosts and processes. It is logged, with `during`, such as `GET
    /users/1`, and the answer has a text without them. `may_be_applied` says whether a write may have been made
    nevertheless: then it is only safe to send it again with the same idempotency key.
    """
    if isinstance(error, EngineForked):
        return None  # no later request to this worker can succeed, so the client must not try again
    if isinstance(error, SchemaViolation) and not error.written:
        return None  # the stored value is not the client's fault
    if isinstance(error.__cause__, RemoteFailure) and error.__cause__.code == Forbidden.code:
        error = Forbidden("the service may not do this where its state is kept")
    kind = next((kind for kind in type(error).__mro__ if kind in STATUSES), None)
    if kind is None or not isinstance(error, ScopestateError):
        return None
    status, title = STATUSES[kind]
    facts = {name: value for name in _facts_of(error) if (value := getattr(error, name, None)) is not None}
    if status != 503:
        return Problem(status, title, str(error), error.code, facts)
    log.warning("%sanswered with status 503: %s: %s", f"{during}: " if during else "", type(error).__name__, error)
    applied = _may_be_applied(error)
    detail = "Try again later, with the same idempotency key." if applied else "Nothing was done: try again later."
    return Problem(status, title, detail, error.code, {**facts, "may_be_applied": applied})


def _facts_of(error: ScopestateError) -> tuple[str, ...]:
    return next((_FACTS[kind] for kind in type(error).__mro__ if kind in _FACTS), ())


def _may_be_applied(error: BaseException) -> bool:
    """Return whether a write may have been made although it failed with this error."""
    if isinstance(error, ReplyTimeout):
        return True
    if isinstance(error, (CallTimeout, ConnectionLost)):
        return error.may_be_applied
    return error.__cause__ is not None and _may_be_applied(error.__cause__)


def _plain(value: object) -> object:
    """Return a fact as something that JSON can hold."""
    to_json = getattr(value, "to_json", None)
    return to_json() if to_json is not None else str(value)
