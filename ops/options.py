"""The options of calls, and the checks made on them before anything is sent or written."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Any, Literal, NoReturn, TypedDict

from scopestate.errors import DeserializationError
from scopestate.ops.results import EventName
from scopestate.ops.turns import LAST_REVISION, Range, checked_name


class WriteOptions(TypedDict, total=False):
    """Options of every write."""

    durable: bool | None
    """True: return when the write is on disk. Raises Unsupported if the engine does not save the scope itself, which is
    so for scopes kept in memory only and for Redis. False is refused for scopes with durability `commit`; in other
    scopes it means the same as None."""
    idempotency_key: str | None
    """1 to 255 characters. A repetition with the same key gets the first answer and changes nothing, for 24 hours."""


class DeadlineOptions(TypedDict, total=False):
    """When the key of a write expires: at most one of these. If none is given, the call says what happens."""

    ttl: float | timedelta | None
    """This many seconds from now; more than 0, rounded up to whole milliseconds."""
    expires_at: datetime | None
    """The deadline, a datetime with a time zone. If it has passed, the key expires at once."""
    keep_ttl: bool
    """True: the key keeps the deadline that it has, if any."""


class DeleteOptions(WriteOptions, total=False):
    """Options of `delete`."""

    if_revision: int | None
    """Only if the key has this revision, else Conflict is raised. 0: only if it does not exist."""


class SetOptions(WriteOptions, DeadlineOptions, total=False):
    """Options of `set`."""

    if_revision: int | None
    """Only if the key has this revision, else Conflict is raised. 0: only if it does not exist."""
    if_absent: bool
    """True: only if the key does not exist, the same as `if_revision=0`."""


class UpdateOptions(SetOptions, total=False):
    """Options of `update`. Without a deadline option the key keeps its deadline, unless the scope has a `ttl` rule."""

    atomic: bool
    """True: raise UpdateRefused if an op does not fit, and write nothing."""


class Bounds(TypedDict, total=False):
    """Some of the keys of a scope. Without a bound: all of them."""

    prefix: str | None
    """Keys that begin with this."""
    start: str | None
    """The first key; included."""
    after: str | None
    """Only keys after this one; not included."""
    end: str | None
    """Only keys before this one; not included."""


class RangeOptions(Bounds, total=False):
    """Some of the keys of a scope, in the order of their UTF-8 bytes. The bounds mean the same with `reverse`."""

    reverse: bool
    """True: the largest key first."""
    limit: int | None
    """At most this many keys."""


class PageOptions(Bounds, total=False):
    """The walk through pages of a scope. The bounds mean the same with `reverse`."""

    reverse: bool
    """True: the largest key first."""
    cursor: str | None
    """Continue after the page that returned this cursor; use the same bounds."""


def refuse_unknown(call: str, unknown: Iterable[str], known: Any) -> NoReturn:
    """Raise TypeError for a keyword argument that a call does not take; `known`: the TypedDict of what it takes."""
    import difflib  # noqa: PLC0415 - for an error

    name, names = next(iter(unknown)), sorted(known.__optional_keys__)
    close = difflib.get_close_matches(name, names, 1)
    advice = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(names)}"
    raise TypeError(f"{call} got an unexpected keyword argument {name!r}: {advice}")


def checked_flag(name: str, given: object) -> bool:
    """Return a bool. Raises DeserializationError for anything else."""
    if type(given) is not bool:
        raise DeserializationError(f"`{name}` is True or False, not {given!r:.40}")
    return given


class _Pages(RangeOptions, total=False):
    cursor: str | None


class _DeleteRange(Bounds, WriteOptions, total=False):
    pass


_TAKES = {"pages()": _Pages, "count()": Bounds, "delete_range()": _DeleteRange}
"""The options that each call on a range takes, for error messages. Calls not listed take RangeOptions."""


def range_of(
    call: str = "keys()",
    /,
    prefix: str | None = None,
    start: str | None = None,
    after: str | None = None,
    end: str | None = None,
    reverse: bool = False,
    limit: int | None = None,
    **unknown: object,
) -> Range:
    """Return the range with these bounds. Raises DeserializationError. `call` names the method, for an error."""
    if unknown:
        refuse_unknown(call, unknown, _TAKES.get(call, RangeOptions))
    return Range(
        None if prefix is None else checked_name("prefix", prefix),
        None if start is None else checked_name("start", start),
        None if after is None else checked_name("after", after),
        None if end is None else checked_name("end", end),
        reverse if reverse is False else checked_flag("reverse", reverse),
        limit if limit is None else checked_limit("limit", limit),
    )


def bounded(
    call: str,
    /,
    prefix: str | None = None,
    start: str | None = None,
    after: str | None = None,
    end: str | None = None,
    **unknown: object,
) -> Range:
    """Return the range with these bounds, for calls without `reverse` and `limit`. `call`: as in `range_of`."""
    if unknown:
        refuse_unknown(call, unknown, _TAKES[call])
    return range_of(call, prefix, start, after, end)


def checked_limit(name: str, limit: object, least: int = 0) -> int | None:
    """Return the largest number of keys asked for. Raises DeserializationError."""
    if limit is None or (type(limit) is int and least <= limit <= LAST_REVISION):
        return limit
    raise DeserializationError(f"`{name}` is a whole number of keys from {least} to {LAST_REVISION}, not {limit!r:.40}")


def checked_revision(revision: object, *, if_absent: bool = False) -> int | None:
    """Return the revision that a write expects, 0 for `if_absent`. Raises DeserializationError."""
    if if_absent is not False:
        checked_flag("if_absent", if_absent)
    if revision is None:
        return 0 if if_absent else None
    if type(revision) is not int or not 0 <= revision <= LAST_REVISION:
        raise DeserializationError(f"a revision is a whole number from 0 to {LAST_REVISION}, not {revision!r:.40}")
    if if_absent and revision != 0:
        raise DeserializationError("`if_revision` and `if_absent` contradict each other: give one of them")
    return revision


def refuse_unbounded(within: Range) -> None:
    """Raise DeserializationError for a range without bounds, which would remove every key by mistake."""
    if within.prefix is within.start is within.after is within.end is None:
        raise DeserializationError('give a bound, such as `prefix`: `prefix=""` removes every key of the scope')


class WatchOptions(TypedDict, total=False):
    """Options of a watch: which changes it yields, where it starts, and what happens if those changes are gone."""

    key: str | None
    """Only this key."""
    prefix: str | None
    """Only keys that begin with this."""
    events: Collection[EventName] | None
    """Only changes of these kinds; None: all. Entries of a snapshot come in any case."""
    snapshot: bool
    """True (default): begin with the existing entries, each with `initial` true, unless `since` is given."""
    since: str | int | None
    """A cursor: continue after it, with everything that has changed since. For one scope, a revision works too."""
    values: bool
    """False: without the values, which saves memory and decoding."""
    latest: bool
    """True: of the waiting changes, keep only the newest of each key. A slow reader then never overruns the buffer."""
    buffer: int
    """How many changes may wait to be read; one more raises WatchOverrun. Default: 10,000."""
    on_compacted: Literal["raise", "resync"]
    """What happens if the changes after `since` are gone: Compacted is raised, or the watch begins with a snapshot."""
    known: Iterable[str] | Iterable[tuple[str, str]]
    """With `resync`: the keys that the caller has. If the watch is of many scopes: pairs of scope and key.

    Keys that no longer exist are yielded as deletes, after the snapshot.
    """
    markers: bool
    """True: yield marks too: `synced` after the snapshot, and `progress` now and then while nothing else changes."""
