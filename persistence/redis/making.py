"""Makes the commands for the calls of one scope: an entry for each call. Uses no threads and no sockets.

A new operation needs no code here. A turn says which keys it touches, and decides with their values as last seen. Its
changes are stored only if the keys still have those values (docs/design/0034-one-owner-for-each-connection.md).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.backlog import Limits
from scopestate.actors.ports import NO_RULE
from scopestate.errors import ScopestateError, StorageError, Unsupported
from scopestate.ops import turns
from scopestate.ops.results import SetResult
from scopestate.ops.trace_context import context_of
from scopestate.ops.transactions import DeliveryBatch
from scopestate.ops.turns import NO_DEADLINE, A, Change, Effects, NewDeadline, Turn, View, changes_in
from scopestate.ops.writes import Expire, SetWith
from scopestate.persistence.redis.calls import ONE_STEP, Behind, Call, Command, Pause
from scopestate.persistence.redis.consuming import absent_key
from scopestate.persistence.redis.numbered import NumberedShape, packed_set
from scopestate.persistence.redis.seen import BULKY, NOTHING, EntryView, Known, Seen, ValueView
from scopestate.persistence.redis.sidecar import NUMBER_BYTES, PLAIN_BYTES, revision_in
from scopestate.persistence.redis.transacting import (
    BuildIndex,
    Commit,
    Look,
    ReadRange,
    entry_for,
    idempotency_key_of,
    kept_key,
    small_entry_for,
)

if TYPE_CHECKING:
    from scopestate.persistence.redis.backend import RedisBackend
    from scopestate.persistence.redis.scope import RedisScope

_MOST_CALLS: Final = 256
_MOST_BYTES: Final = 1 << 18
"""The most calls in one command, and about how many bytes of values. While Redis runs it, it does nothing else."""
_LARGEST_BYTES: Final = 512 << 20
"""The largest value that a server accepts (the default of `proto-max-bulk-len`). With a larger one the server would
close the connection, and all other calls on it would fail."""
READ_ALL: Final = frozenset({turns.List, turns.Items})
"""Turns that read the whole scope. Several such calls share one command."""
_PLAIN: Final = frozenset({turns.Set, turns.Delete, turns.Update, turns.Get})
"""Turns on one key that need only its value. In a scope with a rule, writes need more."""


class CommandMaker:
    """Makes the commands of one scope, and holds back calls that must wait.

    Used only by the thread that has the claim of the connection owner. A scope has one command in flight at a time.
    Calls that arrive in the meantime go into the next command together, so calls take effect in the order in which they
    came, and many callers need few round trips.
    """

    def __init__(
        self, scope: RedisScope, store: RedisBackend, limits: Limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = scope.scope
        self.hash_key = store.shape.key_of(scope.scope)
        self.command: Command | None = None
        """The command in flight."""
        self.paused: dict[str, Pause] = {}
        """Key -> the pause that calls on it wait for."""
        self.pausing: list[Pause] = []
        """Pauses that have begun. The owner takes them from here, and ends each when it is due."""
        self.seen = Seen(scope.scope, store.note_misfit, store.note_fit)
        self.publishes = store.shares_events
        self.names = store.shape.names(self.hash_key)
        """The keys of the scope in Redis."""
        self._head_of_set = store.shape.head_of_set(self.names, self.name)
        self._numbers = store.shape.numbers
        self._has_deadlines = False
        """True once a key had a deadline, or keys were listed. From then on, all writes use the general script."""
        self._ahead_ms: float | None = None
        """How far the server's clock is ahead of this one, in milliseconds; None: not known. It differs by server."""
        self._limits = limits
        self._scope = scope
        self._store = store
        self._view = ValueView(scope.scope, limits)
        self._clock = clock
        self._whole_bytes: int | None = None
        """Approximate size of the whole scope in bytes; None: it was never read."""

    def make(self, queue: list[Call], most: int, ended: list[Call]) -> Command | None:
        """Take calls that can share a command from the front of `queue`, and return their command.

        None if there is nothing to send. Calls that end without being sent are added to `ended`.
        """
        making = _Making(self)
        taken = 0
        most = min(most, _MOST_CALLS)
        while taken < len(queue) and len(making.calls) < most and making.size < _MOST_BYTES:
            call = queue[taken]
            reply_to = call.reply_to
            if not (call.gave_up or (reply_to is not None and reply_to.abandoned)):
                keys = call.keys
                if keys is None or (not keys and type(call.message) is not Look):
                    # Must come after all earlier calls, on any key.
                    if self.paused or not making.may_end_with(call):
                        break
                    if keys is None:
                        making.whole = True
                        making.calls.append(call)
                    else:
                        if type(call.message) is not Behind:  # a transaction that does nothing
                            call.answer = call.message.decide(self._view)[1]
                        call.done = True
                        ended.append(call)
                elif making.whole:
                    break
                elif not (self.paused and self._waits(call, keys)) and not making.enter(call, keys):
                    ended.append(call)
            taken += 1
        del queue[:taken]
        return making.command() if making.calls else None

    def make_one(self, call: Call, ended: list[Call]) -> Command | None:
        """As `make`, for a single call: those of callers that lead, and most calls under load from many scopes."""
        keys = call.keys
        if not keys and type(call.message) is not Look:
            return self.make([call], 1, ended)
        assert keys is not None
        shape, names = self._store.shape, self.names
        kept: list[bytes] = []
        try:
            entry = self.entry(call, keys, {}, kept, alone=True)
        except Exception as error:  # noqa: BLE001 - as in `_Making.enter`
            call.fail(error)
            ended.append(call)
            return None
        calls = [call]
        if entry is not None:
            if (call.depth or type(call.depth) is not int) and self._store.shares_events:
                entry = ["p", _depth_text(call.depth), *entry]
            if kept or self._has_deadlines:
                parts = shape.write(names, self.name, entry, kept)
            else:
                parts = shape.write_one(names, self.name, tuple(entry))
                if self._head_of_set and entry[0] == "s":
                    data = packed_set(self._head_of_set, parts)
                    return Command(self._scope, parts, calls, (), bulk=self.seen.bulky, data=data)
            return Command(self._scope, parts, calls, (), bulk=self.seen.bulky)
        again = calls if call.message.writes else ()
        reads = self.reads(call, keys, kept)
        if len(reads) == 2 and reads[0] == "g":
            return Command(self._scope, shape.read(names, keys[0]), calls, again, bulk=self.seen.bulky)
        parts = shape.write(names, self.name, reads, kept)
        return Command(self._scope, parts, calls * call.awaited, again, bulk=self.seen.bulky)

    def entry(
        self, call: Call, keys: tuple[str, ...], known: dict[str, Known], kept: list[bytes], *, alone: bool = False
    ) -> Sequence[Any] | None:
        """Return the script's entry for a call; None if its keys must be read first, for its answer or for the entry.

        `known`: the values of keys after the entries before it. `kept`: the keys of kept answers that entries refer to.
        `alone`: it is the only entry, for `write_one`. Raises the error that refuses the call.
        """
        turn = call.message
        # `_needs_entries`, inlined.
        if self._numbers and (type(turn) not in _PLAIN or (turn.writes and self._scope.rule is not NO_RULE)):
            if alone and not (self._has_deadlines or self.publishes):
                entry = self._small_entry(call, keys)
                if entry is not None:
                    return entry
            return self._general_entry(call, keys, known, kept, alone=alone)
        one_step, rule = ONE_STEP.get(type(turn)), self._scope.rule
        if one_step is not None and (rule is NO_RULE or rule.reads_plainly):
            call.one_step = one_step
            call.sends_write = True
            after = one_step.after(turn)
            if rule.values is not None and after is not None:  # without revisions; with them it does not come here
                rule.values.check(keys[0], after)
            if after is None:
                known[keys[0]] = NOTHING
            else:
                if len(after) > _LARGEST_BYTES:
                    raise _too_large(keys[0], after)
                known[keys[0]] = (after, after, None)
            return one_step.entry(self._store.shape, turn)
        if turn.writes:
            looked, seen = call.looked, self.seen
            values: dict[str, Known] = {}
            for key in keys:
                value = known.get(key) or (looked and looked.get(key)) or seen.get(key)
                if value is None:
                    call.sends_write = False
                    break
                values[key] = value
            else:
                try:
                    return self._decide(call, values, known)
                except ScopestateError:
                    if looked is not None:
                        raise
                    call.sends_write = False  # the value that was seen may be outdated
        call.looked = {}
        call.awaited = len(keys)
        return None

    def _needs_entries(self, turn: Turn[Any]) -> bool:
        """Return whether a turn needs more than values: revisions, deadlines or the time."""
        if not self._numbers:
            return False
        return type(turn) not in _PLAIN or (turn.writes and self._scope.rule is not NO_RULE)

    def reads(self, call: Call, keys: tuple[str, ...], kept: list[bytes]) -> list[Any]:
        """Return the entries that read what a call needs."""
        if not self._needs_entries(call.message):
            return [part for key in keys for part in ("g", key)]
        reads: list[Any] = []
        if call.asks_kept:
            reads += ("o", str(self._kept_index(call.message, kept)))
        return reads + [part for key in keys for part in ("l", key)]

    def _kept_index(self, turn: Turn[Any], kept: list[bytes]) -> int:
        """Return the place in `kept` of the key of a turn's kept answer, from 1; 0 if it has no idempotency key."""
        idempotency_key = idempotency_key_of(turn)
        if idempotency_key is None:
            return 0
        kept.append(kept_key(self.hash_key, idempotency_key))
        return len(kept)

    def _small_entry(self, call: Call, keys: tuple[str, ...]) -> tuple[Any, ...] | None:
        """Return the entry of a set whose condition is met by the value that was seen; None for any other call."""
        turn, shape = call.message, self._store.shape
        if type(turn) is not SetWith or turn.if_revision is None or turn.deadline is not NO_DEADLINE:
            return None
        known = self.seen.get(keys[0])
        if known is None or known[2] is None or self._scope.rule is not NO_RULE or call.tries:
            return None
        raw, old, entry = known
        after = turn.data
        if raw is None:
            if turn.if_revision:
                return None
            swap = shape.swap_entry(turn.key, None, after)
        elif len(entry or b"") <= PLAIN_BYTES and revision_in(known[2]) == turn.if_revision:
            assert isinstance(shape, NumberedShape)
            swap = shape.swap_entry_of(turn.key, raw, known[2][:NUMBER_BYTES], after)
        else:
            return None
        if len(after) > _LARGEST_BYTES:
            raise _too_large(turn.key, after)
        call.effects = (Change(turn.key, old, after),), SetResult(old, after, detailed=True)
        call.view = None
        call.sends_write = True
        return swap

    def _general_entry(
        self, call: Call, keys: tuple[str, ...], known: dict[str, Known], kept: list[bytes], *, alone: bool
    ) -> Sequence[Any] | None:
        turn = call.message
        if type(turn) is Commit:
            call.view = turn.view
            return self._stored_entry(call, turn.view, (turn.stored, None), known, kept, alone=alone)
        if turn.writes and self._ahead_ms is not None:
            values: dict[str, Known] = {}
            is_fresh = call.looked is not None
            for key in keys:
                value = known.get(key)
                if value is None and call.looked is not None:
                    value = call.looked.get(key)
                else:
                    is_fresh = False
                if value is None:
                    is_fresh = False
                    value = self.seen.get(key)
                if value is None or value[2] is None:
                    break
                values[key] = value
            else:
                view = self._entry_view(values, call.now_ms if is_fresh else self._time_ms())
                try:
                    effects = self._decided(turn, view)
                except ScopestateError:
                    # The values that were seen may be outdated.
                    if is_fresh:
                        raise
                else:
                    call.view = view
                    return self._stored_entry(call, view, effects, known, kept, alone=alone)
        call.sends_write = False
        call.looked = {}
        call.asks_kept = idempotency_key_of(turn) is not None
        call.awaited = len(keys) + call.asks_kept
        return None

    def _stored_entry(
        self,
        call: Call,
        view: EntryView,
        effects: Effects[Any],
        known: dict[str, Known],
        kept: list[bytes],
        *,
        alone: bool,
    ) -> Sequence[Any]:
        call.effects = effects
        stored = effects[0]
        for one in stored:
            if type(one) is Change:
                if one.after is not None and len(one.after) > _LARGEST_BYTES:
                    raise _too_large(one.key, one.after)
                known[one.key] = NOTHING if one.after is None else (one.after, one.after, None)
            elif type(one) is NewDeadline:
                raw, data, _ = view.used[one.key]
                known[one.key] = raw, data, None
        call.sends_write = True
        if alone and not (self._has_deadlines or self.publishes):
            small = small_entry_for(view, stored)
            if small is not None:
                return small
        index = self._kept_index(call.message, kept)
        entry = entry_for(view, stored, index)
        turn = call.message
        if type(turn) is not DeliveryBatch:
            return entry
        if turn.fence.setdefault("won", "turn") != "turn":
            raise Unsupported("the transaction of a delivery", "its attempt has ended before its turn came")
        kept.append(absent_key(turn.acks[1]).encode())  # what the acknowledgement changes must not be moving
        return [*turn.acks, *entry]  # preceded by the acknowledgement of its delivery

    def _entry_view(self, known: dict[str, Known], now_ms: int) -> EntryView:
        return EntryView(self.name, self._store.store_id, self._limits, self._scope.rule, known, now_ms)

    def view_of_seen(self) -> EntryView:
        """Return a view of the values that were seen, which may be outdated. May be called from any thread."""
        now_ms = None if self._ahead_ms is None else self._time_ms()
        return EntryView(
            self.name, self._store.store_id, self._limits, self._scope.rule, {}, now_ms, recall=self.seen.get
        )

    def _time_ms(self) -> int:
        """Return the approximate time of the server, in milliseconds since the epoch."""
        assert self._ahead_ms is not None
        return int(self._clock() * 1000 + self._ahead_ms)

    def server_ms(self, otherwise: int) -> int:
        """Return the approximate time of the server; `otherwise` if it is not known."""
        return otherwise if self._ahead_ms is None else self._time_ms()

    def late_ms(self, deadline: int) -> int:
        """Return the milliseconds that have passed since a deadline, by the server's clock."""
        return 0 if self._ahead_ms is None else max(0, self._time_ms() - deadline)

    def note_time(self, server_ms: int) -> None:
        """Note the time of the server, as it was in a reply that has just arrived."""
        self._ahead_ms = server_ms - self._clock() * 1000

    def _decided(self, turn: Turn[A], view: View) -> Effects[A]:
        """Return what a turn decides, under the rule of the scope. Raises the error that refuses it."""
        values = self._scope.rule.values
        return turn.decide(view) if values is None or type(turn) is Look else values.decide(turn, view)

    def _decide(self, call: Call, values: dict[str, Known], known: dict[str, Known]) -> Sequence[Any]:
        view = self._view
        view.found = {key: value[1] for key, value in values.items()}
        call.effects = effects = self._decided(call.message, view)
        changes = changes_in(effects[0])
        for change in changes:
            if change.after is not None and len(change.after) > _LARGEST_BYTES:
                raise _too_large(change.key, change.after)
        call.sends_write = True
        if len(changes) == 1 and len(values) == 1 and (after := changes[0].after) is not None:
            ((key, (raw, _, _)),) = values.items()
            known[key] = (after, after, None)
            return self._store.shape.swap_entry(key, raw, after)
        for change in changes:
            known[change.key] = NOTHING if change.after is None else (change.after, change.after, None)
        return _stored(values, changes)

    def command_of(
        self, entries: list[Any], calls: list[Call], again: list[Call], kept: list[bytes], *, whole: bool
    ) -> Command:
        """Return the command of several entries, or of a read of the whole scope."""
        shape = self._store.shape
        if whole:
            turn = calls[0].message
            bulk = type(turn) in READ_ALL and (self._whole_bytes is None or self._whole_bytes > BULKY)
            return Command(self._scope, self._parts_of_whole(turn), calls, again, bulk=bulk)
        if len(entries) == 2 and entries[0] == "g":
            parts: tuple[Any, ...] = shape.read(self.names, entries[1])
        elif len(calls) == 1 and not (kept or self._has_deadlines or entries[0] == "p"):
            parts = shape.write_one(self.names, self.name, tuple(entries))
        else:
            parts = shape.write(self.names, self.name, entries, kept)
        return Command(self._scope, parts, calls, again, bulk=self.seen.bulky)

    def _parts_of_whole(self, turn: Turn[Any]) -> tuple[Any, ...]:
        shape = self._store.shape
        if isinstance(shape, NumberedShape):
            if type(turn) is ReadRange:
                return shape.read_range(self.names, turn.kind, turn.within)
            if type(turn) is BuildIndex:
                return shape.build_index(self.names, turn.cursor)
            if type(turn) is Expire:
                return shape.write(self.names, self.name, ("e", str(turn.limit)))
        return shape.read_all(self.names)

    def _waits(self, call: Call, keys: tuple[str, ...]) -> bool:
        """Make a call wait for the pause of one of its keys. Return False if none of its keys is paused."""
        pause = next((self.paused[key] for key in keys if key in self.paused), None)
        if pause is None:
            return False
        pause.calls.append(call)
        self._extend(pause, keys)
        return True

    def _extend(self, pause: Pause, keys: Iterable[str]) -> None:
        """Make later calls on `keys` wait for this pause too."""
        for key in keys:
            if self.paused.setdefault(key, pause) is pause:
                pause.keys.add(key)

    def resume(self, pause: Pause, queue: list[Call]) -> None:
        """End a pause: its calls go next. Calling this twice does no harm."""
        for key in pause.keys:
            if self.paused.get(key) is pause:
                del self.paused[key]
        calls, pause.calls = pause.calls, deque()
        queue[:0] = calls

    def _pause(self, call: Call, due: float, *, empty: bool = False) -> None:
        """Make a call wait, before the calls that already wait for its keys. `empty`: only those calls wait."""
        pause = Pause(due)
        for key in call.keys or ():
            other = self.paused.get(key)
            if other is not None and other is not pause:
                pause.calls.extend(other.calls)
                pause.keys |= other.keys
                other.calls.clear()
                for taken in other.keys:
                    self.paused[taken] = pause
        if not empty:
            pause.calls.appendleft(call)
        for key in call.keys or ():
            self.paused[key] = pause
            pause.keys.add(key)
        self.pausing.append(pause)


class _Making:
    """One command for several calls, while it is being made."""

    def __init__(self, maker: CommandMaker) -> None:
        self._maker = maker
        self._entries: list[Any] = []
        self._known: dict[str, Known] = {}
        """Values of keys after the entries so far."""
        self._kept: list[bytes] = []
        """The keys of the kept answers that entries refer to."""
        self._held: set[str] = set()
        """Keys that this command only reads, and the keys of the calls that wait for these reads."""
        self._depth = 0
        self.calls: list[Call] = []
        self.again: list[Call] = []
        self.whole = False
        """True if every call is a read of the whole scope."""
        self.size = 0

    def may_end_with(self, call: Call) -> bool:
        """Return whether a call that names no keys may be part of this command."""
        if self.calls or self.again:
            return self.whole and type(call.message) in READ_ALL and type(self.calls[0].message) in READ_ALL
        return True

    def enter(self, call: Call, keys: tuple[str, ...]) -> bool:
        """Add a call on some keys; False if it has failed."""
        held, maker = self._held, self._maker
        if held and not held.isdisjoint(keys):
            held.update(keys)
            self.again.append(call)  # after a call that must read first
            return True
        try:
            entry = maker.entry(call, keys, self._known, self._kept)
        except Exception as error:  # noqa: BLE001 - even a bug: only its caller gets the error, and the other calls continue
            call.fail(error)
            return False
        if entry is None:
            if call.message.writes:
                held.update(keys)
                self.again.append(call)
            self._entries += maker.reads(call, keys, self._kept)
            self.calls += [call] * call.awaited
            return True
        if call.depth is not self._depth and maker.publishes:  # depths of two traces can be equal numbers
            self._depth = call.depth
            self._entries += ("p", _depth_text(call.depth))
        self._entries += entry
        self.size += call.message.size() if len(entry) > 6 else len(entry[-1])
        self.calls.append(call)
        return True

    def command(self) -> Command:
        """Return the command."""
        return self._maker.command_of(self._entries, self.calls, self.again, self._kept, whole=self.whole)


def _depth_text(depth: int) -> str:
    context = context_of(depth)
    return str(int(depth)) if context is None else f"{int(depth)} {context.text}"


def _stored(values: dict[str, Known], changes: tuple[Change, ...]) -> tuple[Any, ...]:
    """Return the script's entry that makes the changes if the keys still have `values`."""
    entry: list[Any] = ["t", str(len(values)), str(len(changes))]
    for key, (raw, _, _) in values.items():
        entry += (key, "0", "") if raw is None else (key, "1", raw)
    for change in changes:
        assert change.key in values, f"a turn changes {change.key!r}, which is not one of its keys"
        entry += (change.key, "0", "") if change.after is None else (change.key, "1", change.after)
    return tuple(entry)


def _too_large(key: str, data: bytes) -> StorageError:
    return StorageError(
        f"the value for key {key!r} takes {len(data)} bytes as JSON, and Redis takes {_LARGEST_BYTES} at most; nothing "
        "was written: split it over several keys"
    )
