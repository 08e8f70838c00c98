"""Every error that scopestate raises, as one tree.

    ScopestateError                     catch this to catch them all
    |-- DeserializationError            invalid input: `deserialization_error`
    |   `-- InvalidValue                a value that JSON cannot hold; has the path inside the value
    |-- SchemaViolation                 a value that does not fit the type of its scope: `SCHEMA_VIOLATION`
    |-- ValueTooLarge                   the encoded value exceeds `max_value_bytes`: `VALUE_TOO_LARGE`
    |-- Conflict                        a key is not in the state that the write expected: `CONFLICT`
    |-- UpdateRefused                   an op did not fit, in a write that is all or nothing: `UPDATE_REFUSED`
    |-- BatchTooLarge                   a transaction over its limit of keys or bytes: `BATCH_TOO_LARGE`
    |-- IdempotencyMismatch             an idempotency key was used for another write: `IDEMPOTENCY_MISMATCH`
    |-- Unsupported                     the place where the scope is kept cannot do this: `UNSUPPORTED`
    |-- InvalidPageLimits               the size of a page is out of bounds: `INVALID_PAGE_LIMITS`
    |-- InvalidCursor                   a cursor that cannot be used here: `INVALID_CURSOR`
    |-- Compacted                       the changes after a cursor are no longer kept: `COMPACTED`
    |-- WatchOverrun                    a watch was read too slowly: `OVERRUN`; has the cursor to continue from
    |-- RowTooLarge                     one row is larger than a page may be: `ROW_TOO_LARGE`
    |-- SnapshotCapacity                no room for a snapshot to page through: `SNAPSHOT_CAPACITY`
    |-- MessageTooLarge                 a call or an answer over `max_message_bytes`: `MESSAGE_TOO_LARGE`
    |-- SerializationError              a function returned what JSON cannot hold: `serialization_error`
    |-- FunctionNotFound                no function has that id: `function_not_found`
    |-- FunctionFailed                  a registered function raised: `invocation_failed`
    |   `-- RemoteFailure               a function of a worker or of another engine failed: has the code that it sent
    |-- Forbidden                       the token of a connection does not allow it: `FORBIDDEN`
    |-- InvalidRegistration             a function or trigger that cannot be registered: `registration_error`
    |-- ConfigError                     the configuration is wrong: `CONFIG_ERROR`; names file, line and key
    |-- StorageError                    the store failed: `SET_ERROR`, `GET_ERROR`, ... or `STORAGE_ERROR`
    |   |-- StoreLocked                 another process holds the store
    |   |-- StoreUnusable               the directory cannot be used: unwritable, not a directory, another program's
    |   |-- UnsavableValue              the store cannot hold one value; the others are saved
    |   `-- StoreCorrupt                the database is damaged; it is never overwritten
    |-- NotConnected                    no connection in time; nothing was sent: `NOT_CONNECTED`
    |-- ConnectionLost                  the connection broke before the answer arrived: `CONNECTION_LOST`
    |-- CallTimeout                     no answer from the other side in time: `TIMEOUT`
    |-- Overloaded                      a bounded mailbox is full: `OVERLOADED`
    |-- ReplyTimeout                    no reply in time; the write may still be applied: `TIMEOUT`
    |-- WouldDeadlock                   the call could only wait for itself: `DEADLOCK`
    |-- HandlerTimeout                  a handler or condition ran longer than it may: `HANDLER_TIMEOUT`
    |-- EventLoopDetected               handlers kept firing each other: `EVENT_LOOP`
    |-- EventNotDelivered               an event that reached no handler: `EVENT_NOT_DELIVERED`
    `-- EngineClosed                    the engine is closed or closing: `ENGINE_CLOSED`
        `-- EngineForked                the engine was inherited through fork: `ENGINE_FORKED`

Each error has a `code`, which the wire protocol carries (docs/reference/semantics.md 2; docs/reference/protocol.md 4.4)
and clients compare. The text is for people: it says what is wrong, where, and what to do.

A call on a scope in Redis or behind a bridge raises StorageError with the code of its function, and NotConnected,
ConnectionLost, CallTimeout or RemoteFailure as its `__cause__`: the cause says whether a write may have been applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class ScopestateError(Exception):
    """Root of the tree. `code` is stable; the text may change between versions."""

    code: str = "SCOPESTATE_ERROR"


class DeserializationError(ScopestateError):
    """The input of a function is invalid: a missing field, a wrong type, an unknown op."""

    code = "deserialization_error"


class InvalidValue(DeserializationError):
    """JSON cannot hold this value. `path` is the place in it, such as `$.users[3].score`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem} - at `{self.path}`"


class SchemaViolation(ScopestateError):
    """A value does not fit the type of its scope, or its schema. A write with it has changed nothing.

    `path` is the place in the value, such as `$.address.zip`, and `reason` says what is wrong there; `type_name` names
    the type. `written`: True if the value was to be written, False if it was found in the scope.
    """

    code = "SCHEMA_VIOLATION"

    def __init__(self, scope: str, key: str, path: str, reason: str, type_name: str, written: bool = True) -> None:
        super().__init__(scope, key, path, reason, type_name, written)
        self.scope = scope
        self.key = key
        self.path = path
        self.reason = reason
        self.type_name = type_name
        self.written = written

    def what_is_wrong(self) -> str:
        """Return which value does not fit, and why."""
        which = f"the value {'for' if self.written else 'of'} key {self.key!r} of scope {self.scope!r}"
        return f"{which} does not fit {self.type_name}: {self.reason} - at `{self.path}`"

    def __str__(self) -> str:
        if self.written:
            return f"{self.what_is_wrong()}; nothing was written"
        return f"{self.what_is_wrong()}; correct it, or read it with a typed handle that has `on_invalid`"


class ValueTooLarge(ScopestateError):
    """The encoded value is larger than `max_value_bytes`; nothing was written."""

    code = "VALUE_TOO_LARGE"

    def __init__(self, scope: str, key: str, size: int, limit: int) -> None:
        super().__init__(scope, key, size, limit)
        self.scope = scope
        self.key = key
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the value for key {self.key!r} of scope {self.scope!r} takes {self.size} bytes as JSON, "
            f"over the limit max_value_bytes = {self.limit}; nothing was written"
        )


@dataclass(frozen=True, slots=True)
class KeyConflict:
    """One key that is not in the state that a write expected."""

    index: int
    """Which check of a transaction failed, from 0; 0 for a write of one key."""
    key: str
    expected_revision: int | None
    """0: the key was expected not to exist. None: a value was expected, not a revision."""
    revision: int
    """The current revision. 0: the key does not exist."""


class Conflict(ScopestateError):
    """A key is not in the state that the write expected; nothing was written. Read it again, and decide again.

    `key`, `expected_revision` and `revision` are those of the first conflict; `conflicts` has all of them.
    """

    code = "CONFLICT"

    def __init__(self, scope: str, conflicts: Sequence[KeyConflict]) -> None:
        super().__init__(scope, conflicts)
        self.scope = scope
        self.conflicts = tuple(conflicts)
        first = self.conflicts[0]
        self.key = first.key
        self.expected_revision = first.expected_revision
        self.revision = first.revision

    def __str__(self) -> str:
        found = "does not exist" if self.revision == 0 else f"has revision {self.revision}"
        match self.expected_revision:
            case None:
                expected = "does not have the expected value and"
            case 0:
                expected = "was expected not to exist but"
            case revision:
                expected = f"was expected to have revision {revision} but"
        others = len(self.conflicts) - 1
        more = f" ({others} more keys have changed)" if others else ""
        return f"key {self.key!r} of scope {self.scope!r} {expected} {found}{more}; nothing was written"


class UpdateRefused(ScopestateError):
    """An op of an `update` did not fit, where the write is all or nothing; nothing was written.

    `errors` has one entry for each refused op, as in `UpdateResult.errors`, with `index`, the op's place in the
    transaction.
    """

    code = "UPDATE_REFUSED"

    def __init__(self, scope: str, errors: Sequence[Any]) -> None:
        super().__init__(scope, errors)
        self.scope = scope
        self.errors = tuple(errors)

    def __str__(self) -> str:
        first = self.errors[0]
        others = len(self.errors) - 1
        more = f" (and {others} more)" if others else ""
        return f"an op was refused with {first.code}: {first.message}{more}; nothing was written to {self.scope!r}"


class BatchTooLarge(ScopestateError):
    """A transaction has too many keys or bytes; nothing was written. Split it."""

    code = "BATCH_TOO_LARGE"

    def __init__(self, scope: str, size: int, limit: int, unit: str) -> None:
        super().__init__(scope, size, limit, unit)
        self.scope = scope
        self.size = size
        self.limit = limit
        self.unit = unit

    def __str__(self) -> str:
        return (
            f"a transaction on scope {self.scope!r} has {self.size} {self.unit}, over the limit of {self.limit}; "
            "nothing was written: split it"
        )


class IdempotencyMismatch(ScopestateError):
    """The idempotency key was used before, for a write with other content; nothing was written. Use a new key."""

    code = "IDEMPOTENCY_MISMATCH"

    def __init__(self, scope: str, idempotency_key: str) -> None:
        super().__init__(scope, idempotency_key)
        self.scope = scope
        self.idempotency_key = idempotency_key

    def __str__(self) -> str:
        return (
            f"the idempotency key {self.idempotency_key!r} was used for another write of scope {self.scope!r}; "
            "nothing was written: use a new key for a new write"
        )


class Unsupported(ScopestateError):
    """The place where the scope is kept cannot do what was asked for; nothing was sent or written.

    `feature` is what was asked for, such as `durable=True`; `reason` says why it is not possible there.
    """

    code = "UNSUPPORTED"

    def __init__(self, feature: str, reason: str) -> None:
        super().__init__(feature, reason)
        self.feature = feature
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.feature} is not supported: {self.reason}; nothing was done"


class InvalidPageLimits(ScopestateError):
    """The requested size of a page is out of bounds; nothing was read."""

    code = "INVALID_PAGE_LIMITS"


class InvalidCursor(ScopestateError):
    """A cursor of pages or of a watch that is damaged, or was made for something else. Begin without a cursor."""

    code = "INVALID_CURSOR"

    def __init__(self, reason: str, advice: str = "begin again without a cursor") -> None:
        super().__init__(reason, advice)
        self.reason = reason
        """`damaged`, `not text`, `no snapshot`, or `another` store, scope, range or version of scopestate."""
        self.advice = advice

    def __str__(self) -> str:
        problem = _CURSOR_PROBLEMS.get(self.reason, f"was made for {self.reason}")
        return f"the cursor {problem}; {self.advice}"


_CURSOR_PROBLEMS = {
    "damaged": "is damaged",
    "not text": "is not text",
    "no snapshot": "was used already, is too old, or belongs to another caller",
}


class Compacted(ScopestateError):
    """A watch cannot continue from a cursor: some changes after it are gone. Read the state, and start a new watch.

    `on_compacted="resync"` does both in one step.
    """

    code = "COMPACTED"

    def __init__(self, requested: str, reason: str, oldest: str | None = None) -> None:
        super().__init__(requested, reason, oldest)
        self.requested = requested
        """The cursor that was given."""
        self.reason = reason
        """`trimmed`: the changes are older than what is kept. `other store`: the cursor belongs to another store, or to
        an engine in memory that has ended. `lost in a crash`: the cursor belongs to a change that was never saved."""
        self.oldest = oldest
        """The oldest cursor from which a watch can continue now; None if that is not known. After a crash, for a watch
        of many scopes, it is after the changes that the watch has yielded, and leaves out the lost ones."""

    def __str__(self) -> str:
        why = _COMPACTED.get(self.reason, self.reason)
        return f"the watch cannot continue from its cursor: {why}; start a new watch with a snapshot"


_COMPACTED = {
    "trimmed": "some of the changes after it are no longer kept",
    "other store": "it was made by another store, or by an engine in memory that has ended",
    "lost in a crash": "its change was lost in a crash",
}


class WatchOverrun(ScopestateError):
    """More changes wait for a watch than its `buffer` allows. It has ended; nothing was skipped before its `cursor`."""

    code = "OVERRUN"

    def __init__(self, cursor: str, waiting: int) -> None:
        super().__init__(cursor, waiting)
        self.cursor = cursor
        """Where to continue: `since=error.cursor`."""
        self.waiting = waiting
        """How many changes waited."""

    def __str__(self) -> str:
        return (
            f"{self.waiting} changes wait for this watch, more than its buffer allows: read faster, ask for a larger "
            "`buffer`, or for `latest=True`; continue with `since=error.cursor`"
        )


class RowTooLarge(ScopestateError):
    """A row of a snapshot takes more bytes than a page may have. The cursor can be used again."""

    code = "ROW_TOO_LARGE"

    def __init__(self, scope: str, key: str, size: int, limit: int) -> None:
        super().__init__(scope, key, size, limit)
        self.scope = scope
        self.key = key
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the row of key {self.key!r} of scope {self.scope!r} takes {self.size} bytes, and a page may have "
            f"{self.limit}: ask for a larger `max_bytes`, or read only this key"
        )


class SnapshotCapacity(ScopestateError):
    """There is no room for a snapshot to page through; nothing was read. Page by seek: `prefix: ""`."""

    code = "SNAPSHOT_CAPACITY"

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f'no snapshot: {self.problem}; pages of keys as they are now have no such limit: ask with `prefix: ""`'


class MessageTooLarge(ScopestateError):
    """A call or an answer is too large for one message between a server and a worker. The connection stays open."""

    code = "MESSAGE_TOO_LARGE"


class SerializationError(ScopestateError):
    """A function returned a value that JSON cannot hold."""

    code = "serialization_error"


class FunctionNotFound(ScopestateError):
    """No function is registered under this id."""

    code = "function_not_found"

    def __init__(self, function_id: str) -> None:
        super().__init__(function_id)
        self.function_id = function_id

    def __str__(self) -> str:
        name = self.function_id
        if len(name) > 500:  # a worker may send an id of megabytes, which the error would send back
            name = f"{name[:500]}... ({len(name)} characters)"
        return f"Function {name} not found"


class FunctionFailed(ScopestateError):
    """A registered function raised an exception, which is the `__cause__`."""

    code = "invocation_failed"

    def __init__(self, function_id: str, problem: str) -> None:
        super().__init__(function_id, problem)
        self.function_id = function_id
        self.problem = problem

    def __str__(self) -> str:
        return f"function {self.function_id!r} failed: {self.problem}"


class RemoteFailure(FunctionFailed):
    """A function of a worker or of another engine answered with an error: `code` and text are what it sent."""

    def __init__(self, function_id: str, code: str, message: str, stacktrace: str | None = None) -> None:
        super().__init__(function_id, message)
        self.args = (function_id, code, message, stacktrace)  # for pickle and copy
        self.code = code
        self.message = message
        self.stacktrace = stacktrace

    details: Mapping[str, Any] | None = None
    """The facts of the error, if scopestate sent it; see docs/reference/protocol.md, section 4.4."""

    def __str__(self) -> str:
        return self.message


class Forbidden(ScopestateError):
    """The token of a connection does not allow the request; nothing was done."""

    code = "FORBIDDEN"


class InvalidRegistration(ScopestateError):
    """A function or trigger cannot be registered; nothing was changed."""

    code = "registration_error"


class ConfigError(ScopestateError):
    """The configuration is wrong. `file`, `line` (from 1) and `key` say where; each is None if unknown."""

    code = "CONFIG_ERROR"

    def __init__(
        self, problem: str, *, file: str | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.file = file
        self.line = line
        self.key = key

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        where = ", ".join(part for part in (place, f"key `{self.key}`" if self.key else "") if part)
        return f"{where}: {self.problem}" if where else self.problem


class StorageError(ScopestateError):
    """The store failed, or Redis, or the engine behind a bridge.

    `code` is that of the function that failed, such as `SET_ERROR`, or `STORAGE_ERROR` outside of a call.
    """

    code = "STORAGE_ERROR"

    def __init__(self, problem: str, *, code: str = "STORAGE_ERROR") -> None:
        super().__init__(problem)
        self.problem = problem
        self.code = code

    def __str__(self) -> str:
        return self.problem


class StoreLocked(StorageError):
    """Another engine holds the store. The text names its process.

    `pid` and `host` identify the process; None if unknown. `alone` says why that engine does not share the directory;
    None if it does.
    """

    def __init__(
        self, problem: str, *, pid: int | None = None, host: str | None = None, alone: str | None = None
    ) -> None:
        super().__init__(problem)
        self.pid = pid
        self.host = host
        self.alone = alone


class StoreUnusable(StorageError):
    """The directory cannot be used as a store: unwritable, not a directory, or the database of another program."""


class StoreCorrupt(StorageError):
    """The database is damaged. It is never overwritten.

    `quarantined` is the path to which it was moved when it was opened; None if it was left in its place.
    """

    def __init__(self, problem: str, *, quarantined: str | None = None) -> None:
        super().__init__(problem)
        self.quarantined = quarantined


class UnsavableValue(StorageError):
    """The store cannot hold one value. All other values can be saved.

    `key` is None if no value of `scope` can be saved.
    """

    def __init__(self, problem: str, scope: str, key: str | None) -> None:
        super().__init__(problem)
        self.args = (problem, scope, key)  # for pickle and copy
        self.scope = scope
        self.key = key


class NotConnected(ScopestateError):
    """There was no connection in time. Nothing was sent, so nothing was written."""

    code = "NOT_CONNECTED"


class ConnectionLost(ScopestateError):
    """The connection broke after the call was sent and before its answer arrived: a write may have been applied.

    `may_be_applied` is false for a call that changes nothing.
    """

    code = "CONNECTION_LOST"

    def __init__(self, function_id: str, url: str, problem: str, *, may_be_applied: bool = True) -> None:
        super().__init__(function_id, url, problem)
        self.function_id = function_id
        self.url = url
        self.problem = problem
        self.may_be_applied = may_be_applied

    def __str__(self) -> str:
        return f"the connection to {self.url} was lost during {self.function_id} ({self.problem}); " + (
            "a write may have been applied: read the key before retrying"
            if self.may_be_applied
            else "nothing was changed"
        )


class CallTimeout(ScopestateError):
    """No answer arrived in time. If `sent` is false, nothing was sent.

    `may_be_applied` is true if the call was sent and may change something. `about` has more about the other engine, if
    known.
    """

    code = "TIMEOUT"

    def __init__(
        self, function_id: str, waited_s: float, sent: bool, about: str = "", *, may_be_applied: bool = True
    ) -> None:
        super().__init__(function_id, waited_s, sent, about)
        self.function_id = function_id
        self.waited_s = waited_s
        self.sent = sent
        self.about = about
        self.may_be_applied = sent and may_be_applied

    def __str__(self) -> str:
        text = f"no answer to {self.function_id} within {self.waited_s:g} s; "
        if not self.sent:
            text = f"{self.function_id} could not be sent within {self.waited_s:g} s; nothing was sent"
        elif not self.may_be_applied:
            text += "nothing was changed"
        elif self.function_id.startswith("state::"):
            text += "a write may have been applied: read the key before retrying"
        else:
            text += "it may have been done"
        return f"invocation timed out: {text}" + (f"; {self.about}" if self.about else "")


class Overloaded(ScopestateError):
    """A bounded mailbox is full. The call was refused and nothing was written: slow down, or try again later."""

    code = "OVERLOADED"


class ReplyTimeout(ScopestateError):
    """No reply in time. A write may still be applied later."""

    code = "TIMEOUT"

    def __init__(self, scope: str, waited_s: float, behind: str = "") -> None:
        super().__init__(scope, waited_s, behind)
        self.scope = scope
        self.waited_s = waited_s
        self.behind = behind
        """The triggers that `drain` was still waiting for, each as `id (function id)`; empty for a call."""

    def __str__(self) -> str:
        if self.behind:
            return f"not drained within {self.waited_s:g} s: events are not yet handled for trigger(s) {self.behind}"
        return (
            f"scope {self.scope!r} sent no reply within {self.waited_s:g} s; "
            "a write may still be applied: read the key before retrying"
        )


class WouldDeadlock(ScopestateError):
    """The call would have to wait for the thread that makes it; nothing was done."""

    code = "DEADLOCK"


class HandlerTimeout(ScopestateError):
    """A handler or condition exceeded its time limit; a plain function may still be running.

    `option` names the limit: `handler_timeout_ms`, or `ack_wait` of a durable trigger.
    """

    code = "HANDLER_TIMEOUT"

    def __init__(self, function_id: str, timeout_s: float, option: str = "handler_timeout_ms") -> None:
        super().__init__(function_id, timeout_s, option)
        self.function_id = function_id
        self.timeout_s = timeout_s
        self.option = option

    def __str__(self) -> str:
        return f"function {self.function_id!r} did not end within {self.timeout_s:g} s ({self.option})"


class EventLoopDetected(ScopestateError):
    """Handlers fired each other up to the depth `max_event_depth`. The event was not delivered."""

    code = "EVENT_LOOP"


class EventNotDelivered(ScopestateError):
    """The event reached no handler: it was dropped by a full mailbox, or still waiting when the engine closed."""

    code = "EVENT_NOT_DELIVERED"


class EngineClosed(ScopestateError):
    """The engine is closed or closing; nothing was written."""

    code = "ENGINE_CLOSED"

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "the engine is closed; open a new one"


class EngineForked(EngineClosed):
    """The engine was inherited through fork: its threads and its store belong to the parent process."""

    code = "ENGINE_FORKED"
