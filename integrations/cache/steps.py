"""Code that the plain and asyncio calls of a cache share: reading the engine's results, and parts of transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from scopestate.batch import Writes
from scopestate.integrations.cache.limits import ENTRY_BYTES, PAGE
from scopestate.integrations.cache.values import ABSENT, added, tag_of, value_of
from scopestate.ops.results import BatchResult, DeleteResult, EntryView, SetResult
from scopestate.ops.transactions import Transaction

A = TypeVar("A")

_SMALL: Final = 2**53


def pieces(items: Sequence[A]) -> Iterator[Sequence[A]]:
    """Yield the items a page at a time."""
    for begin in range(0, len(items), PAGE):
        yield items[begin : begin + PAGE]


def sizes_of(result: BatchResult) -> list[int]:
    """Return the size in bytes of each value that a batch has set."""
    return [len(one.new_json) for one in result.results if isinstance(one, SetResult)]


def taken(result: BatchResult, default: Any) -> Any:
    """Return the value of the key that a batch has deleted, or `default`."""
    (deleted,) = result.results
    assert isinstance(deleted, DeleteResult)
    return default if deleted.old_json is None else value_of(deleted.old_value)


def remove_unchanged(batch: Writes[Any], entries: Iterable[EntryView[Any]]) -> None:
    """Make a batch remove entries that have not changed since they were read."""
    for entry in entries:
        if entry.revision:  # 0: the place where the scope is kept has no revisions
            batch.check(entry.key, revision=entry.revision)
        batch.delete(entry.key)


def is_increment(delta: float, default: float | None) -> bool:
    """Return whether the op `increment` adds `delta`, if the value is a plain number."""
    return type(delta) is int and default == 0 and -_SMALL < delta < _SMALL


def adding(key: Any, name: str, delta: float, default: float | None) -> Callable[[Transaction[Any]], Any]:
    """Return a function for `transact` that adds to the number under a name, and returns what is then stored.

    It raises as `added` does.
    """

    def add(transaction: Transaction[Any]) -> Any:
        stored = added(key, transaction.get(name, ABSENT), delta, default)
        transaction.set(name, stored, keep_ttl=True)
        return stored

    return add


def has_tag(name: str) -> Callable[[EntryView[Any]], bool]:
    """Return a function that tells whether an entry has a tag."""
    return lambda entry: entry.json.startswith(b'{"~"') and tag_of(entry.value) == name


def expires_until(moment: float) -> Callable[[EntryView[Any]], bool]:
    """Return a function that tells whether an entry expires by a time, in seconds since the epoch."""
    return lambda entry: entry.expires_ms is not None and entry.expires_ms <= moment * 1000


def facts_of(entry: EntryView[Any] | None) -> tuple[Any, int | None] | None:
    """Return an entry as `with_facts` takes it."""
    return None if entry is None else (entry.value, entry.expires_ms)


def size_of(entry: EntryView[Any]) -> int:
    """Return about how many bytes an entry takes."""
    return len(entry.json) + len(entry.key) + ENTRY_BYTES
