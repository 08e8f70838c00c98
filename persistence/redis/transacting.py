"""Turns that write more than plain values, each as one entry of a script: what must be unchanged, and what to store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, final

import msgspec

from scopestate.ops.results import BatchResult, SetResults, StepResult, WriteResult
from scopestate.ops.turns import Change, Effects, Failure, Keep, Kept, NewDeadline, Range, Stored, Turn, View
from scopestate.ops.writes import Once
from scopestate.persistence.redis.seen import NOTHING, EntryView, Known, entry_in, keys_within
from scopestate.persistence.redis.sidecar import (
    KEPT_PREFIX,
    NUMBER_BYTES,
    PLAIN_BYTES,
    beside,
    digest_if_large,
    entry_of,
    number_text,
)

_FINGERPRINT_BYTES: Final = 16


class Look(Turn[EntryView], frozen=True):
    """Read some keys for a function of the program, all at one moment. The answer is a view of them."""

    function_id = "state::get-entry"
    failure = Failure("GET_ERROR", "Failed to get value")

    names: tuple[str, ...]
    idempotency_key: str | None = None
    """The answer that is kept under it is read too."""

    @property
    def keys(self) -> tuple[str, ...]:
        return self.names

    def decide(self, view: View) -> Effects[EntryView]:
        assert isinstance(view, EntryView)
        return (), view


class ReadRange(Turn["Listed | None"], frozen=True):
    """Read the keys within a range. The answer is None if the index of the keys must be made first."""

    function_id = "state::list_entries"
    failure = Failure("LIST_ERROR", "Failed to list values")

    within: Range
    kind: str
    """`k` keys, `v` with their values, `e` with their entries, `c` only how many there are."""

    @property
    def keys(self) -> None:
        return None


class Listed(NamedTuple):
    """The keys within a range."""

    now_ms: int
    unchanged: str
    """As `EntryView.unchanged`."""
    names: list[str]
    total: int
    known: dict[str, Known]
    """What was read of the keys. An entry is None if it was not."""


class BuildIndex(Turn[bytes], frozen=True):
    """One step of making the index of the keys. The answer is the cursor of the next one."""

    function_id = "state::list_entries"
    failure = Failure("LIST_ERROR", "Failed to list values")

    cursor: bytes

    @property
    def keys(self) -> None:
        return None


def listed(turn: ReadRange, reply: Any, data_of: Callable[[str, bytes], bytes | None]) -> Listed | None:
    """Return what the script has replied about a range. `data_of(key, raw)`: a value as JSON; None if it is not."""
    if reply == 0:
        return None
    now_ms, unchanged, is_all, *rest = reply
    within = turn.within
    if turn.kind == "c" and not is_all:
        count, gone = rest
        count -= sum(1 for field in gone if (name := _name_of(field)) is not None and within.holds(name))
        return Listed(now_ms, unchanged.decode(), [], count if within.limit is None else min(count, within.limit), {})
    fields, values, entries = rest
    names = [_name_of(field) for field in fields]
    known: dict[str, Known] = {}
    for name, raw, entry in itertools.zip_longest(names, values, entries):
        if name is None or raw is None:
            continue
        data = data_of(name, raw)
        if data is not None:
            known[name] = raw, data, entry
    found = [name for name in names if name is not None and (turn.kind in "kc" or name in known)]
    if is_all:
        found = keys_within(found, within)
    return Listed(now_ms, unchanged.decode(), found, len(found), known)


def _name_of(field: bytes) -> str | None:
    """Return a field as a key; None if it is not text, and so is no key."""
    try:
        return field.decode()
    except UnicodeDecodeError:
        return None


class Commit(Turn[Any], frozen=True):
    """Store what a function of the program has decided, if everything that it has read is unchanged.

    The answer is the number of the last change; None if something has changed; the answer that is kept, as `kept_in`
    reads it, if there is one.
    """

    function_id = "state::transaction"
    writes = True
    failure = Failure("UPDATE_ERROR", "Failed to commit transaction")

    view: EntryView
    """What the function has read."""
    stored: tuple[Stored, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.view.used)

    def size(self) -> int:
        return sum([len(one.after or b"") for one in self.stored if type(one) is Change])


@final
class Replay(msgspec.Struct, frozen=True):
    """What is kept under an idempotency key, and the revision that belongs into the answer."""

    kept: Kept
    revision: int
    """0: the answer stays as it is."""


def kept_in(reply: bytes) -> Replay:
    """Return what a script has kept."""
    behind = _FINGERPRINT_BYTES + NUMBER_BYTES
    return Replay(Kept(reply[:_FINGERPRINT_BYTES], reply[behind:]), int(reply[_FINGERPRINT_BYTES:behind]))


def kept_key(hash_key: bytes, idempotency_key: str) -> bytes:
    """Return the key of a kept answer."""
    return b"%b:%b" % (beside(KEPT_PREFIX, hash_key), idempotency_key.encode())


def idempotency_key_of(turn: Turn[Any]) -> str | None:
    """Return the idempotency key of a turn, or of the read that is made for it."""
    if isinstance(turn, Once | Look):
        return turn.idempotency_key
    if isinstance(turn, Commit):
        return next((one.idempotency_key for one in turn.stored if type(one) is Keep), None)
    return None


_FEW: Final = 50
"""Keys of a transaction that `COMMIT` does: it unpacks them."""


def small_entry_for(view: EntryView, stored: Sequence[Stored]) -> list[Any] | None:
    """Return the entry of a transaction for `COMMIT`; None if that cannot do it."""
    used = view.used
    if view.asked_time or view.unchanged or not used or len(used) > _FEW:
        return None
    looked: list[Any] = []
    for raw, _, entry in used.values():
        if raw is None:
            looked += ("", "")
        elif entry is None or len(entry) > PLAIN_BYTES:
            return None
        else:
            looked += (raw, entry[:NUMBER_BYTES])
    written: list[Any] = []
    for one in stored:
        if type(one) is not Change or one.after is None or one.expires_ms is not None:
            return None
        written += (one.key, one.after, digest_if_large(one.after))
    return ["q", str(len(used)), str(len(stored)), *used, *looked, *written]


def entry_for(view: EntryView, stored: Sequence[Stored], kept_index: int) -> list[Any]:
    """Return the script's entry that stores `stored` if everything that was looked at is unchanged.

    `kept_index`: the place of the key of the kept answer; 0 if there is none.
    """
    steps: list[Any] = []
    count = 0
    fingerprint = answer = b""
    for one in stored:
        if isinstance(one, Change):
            count += 1
            if one.after is not None:
                deadline = "" if one.expires_ms is None else str(one.expires_ms)
                steps += ("w", one.key, one.after, digest_if_large(one.after), deadline)
            else:
                steps += ("x" if one.expired else "r", one.key, "", "", "")
        elif isinstance(one, NewDeadline):
            count += 1
            steps += ("e", one.key, "", "", "" if one.expires_ms is None else str(one.expires_ms))
        else:
            fingerprint, answer = one.kept.fingerprint, one.kept.answer
    values = view.used
    entry: list[Any] = ["t", str(len(values)), str(count), str(kept_index or ""), fingerprint, answer]
    states: list[Any] = []
    for key, known in values.items():
        raw = known[0]
        if raw is None:
            states += (key, "0", "", "")
        else:
            states += (key, "2" if view.is_lapsed(known) else "1", raw, entry_in(known))
    entry += (view.unchanged, str(view.now_ms) if view.asked_time else "")
    return entry + states + steps


def after_of(one: Change | NewDeadline, number: int, before: Known) -> Known:
    """Return what is known of a key after a change with this number, or a new deadline."""
    if isinstance(one, NewDeadline):
        raw, data, _ = before
        entry = entry_in(before)[:PLAIN_BYTES]
        return raw, data, entry if one.expires_ms is None else b"%b%d" % (entry, one.expires_ms)
    if one.after is None:
        return NOTHING
    text = number_text(number)
    return one.after, one.after, text if one.expires_ms is None else entry_of(text, one.after, one.expires_ms)


def number_answer(answer: Any, revision: int) -> None:
    """Put a revision into the answer of a write: Redis gives it, after the turn was decided."""
    if isinstance(answer, BatchResult):
        _number_results(answer.results, revision - answer.revision)
    if isinstance(answer, WriteResult):
        # An object that the turn has just made, and that no other code has yet. A copy would cost 0.5 us.
        msgspec.structs.force_setattr(answer, "revision", revision)


def _number_results(results: Sequence[StepResult], more: int) -> None:
    """Add to the revisions of the results of a batch, whose changes take consecutive numbers."""
    if isinstance(results, SetResults):
        msgspec.structs.force_setattr(results, "last", results.last + more)
        return
    for one in results:
        if isinstance(one, WriteResult) and one.revision:  # else its key has not changed
            msgspec.structs.force_setattr(one, "revision", one.revision + more)
