"""What goes to Redis for the calls of one scope, and what the replies mean to them. No threads, sockets or clocks.

An operation needs no line here: a turn says which keys it touches, and decides over their last seen values. What it
decides is stored if those keys still hold what it has seen (docs/design/0034-one-owner-for-each-connection.md).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from scopestate.actors.backlog import Limits
from scopestate.actors.containment import Log
from scopestate.actors.ports import NO_RULE
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.errors import ConnectionLost, DeserializationError, NotConnected, ScopestateError, StorageError
from scopestate.ops import turns
from scopestate.ops.results import SetResult
from scopestate.ops.turns import NO_DEADLINE, Change, Effects, Keep, NewDeadline, Turn, changes_in
from scopestate.ops.writes import Expire, Expired, Once, SetWith
from scopestate.persistence.redis.connection import Refusal, pack_text
from scopestate.persistence.redis.numbered import KEPT, SLOW, NumberedShape
from scopestate.persistence.redis.script import DONE, SKIPPED, Shape, explain, keys_of
from scopestate.persistence.redis.seen import BULKY, NOTHING, EntryView, Known, Seen, ValueView
from scopestate.persistence.redis.sidecar import NUMBER_BYTES, PLAIN_BYTES, deadline_in, number_text, revision_in
from scopestate.persistence.redis.transacting import (
    BuildIndex,
    Commit,
    Look,
    ReadRange,
    Replay,
    after_of,
    entry_for,
    idempotency_key_of,
    kept_in,
    kept_key,
    listed,
    number_answer,
    small_entry_for,
)

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from scopestate.persistence.redis.backend import RedisBackend
    from scopestate.persistence.redis.pump import Pump
    from scopestate.persistence.redis.scope import RedisScope

log = Log("scopestate.scope")

_PAUSE_S: Final = (0.001, 0.064)
"""Longest pause after the first conflict of a turn, and after any; it is drawn at random from zero up."""
_HOLD_S: Final = 0.02
_REST_S: Final = 0.004
"""How long an engine goes on updating a key that others update too, and how long it then leaves it to them. A caller
that pauses must read before it compares, and what it has read is old by then if another engine never rests.
"""
_RIVALRY_S: Final = 1.0
"""How long after its last conflict a key counts as one that others update too."""
_MOST_RIVALRIES: Final = 1024

MOST_REPEATS: Final = 3
"""How often a call with an idempotency key is sent once more after its connection was lost."""
_LOOKED: Final = 3
"""Parts of the script's reply to `l`."""
_MOST_CALLS: Final = 256
_MOST_BYTES: Final = 1 << 18
"""Calls in one command, and about how many bytes of values: Redis runs it as one step, and does nothing else then."""
_LARGEST_BYTES: Final = 512 << 20
"""The largest value that a server takes (`proto-max-bulk-len` by default). A larger one would cost the connection, and
with it the calls of everything else on it."""


class _OneStep(NamedTuple):
    """A turn that needs no read first: it wants only the value that it replaces."""

    entry: Callable[[Shape, Any], tuple[Any, ...]]
    """The turn's entry for the script."""
    after: Callable[[Any], bytes | None]
    """What the key holds afterwards."""
    answer: Callable[[Any, bytes | None, int], Any]
    """Its answer, made of the value before and the revision; `decide` says the same, and a test holds the two equal."""


_ONE_STEP: Final[dict[type[Any], _OneStep]] = {
    turns.Set: _OneStep(
        lambda shape, turn: shape.set_entry(turn.key, turn.data),
        lambda turn: turn.data,
        lambda turn, old, revision: SetResult(old, turn.data, revision=revision),
    ),
    turns.Delete: _OneStep(lambda shape, turn: ("d", turn.key), lambda turn: None, lambda turn, old, revision: old),
}
_READ_ALL: Final = frozenset({turns.List, turns.Items})
"""Turns that read the whole scope. Several of them share a command."""
_PLAIN: Final = frozenset({turns.Set, turns.Delete, turns.Update, turns.Get})
"""Turns on one key that need no more than its value. In a scope with a rule, writes need more."""


class Behind(Turn[None], frozen=True):
    """Answered when every call that came before has ended; touches no key."""

    @property
    def keys(self) -> tuple[str, ...]:
        return ()


@final
class Call(Envelope):
    """One call from its admission to its end. `message` is its turn."""

    # Defaults of the class, not of each instance: most calls need none of them.

    done = False
    answer: Any = None
    error: Exception | None = None
    lock: Any = None
    """Held until the call has ended, if a thread waits for that."""
    thread = 0
    """The thread that leads for it, if one does."""
    gave_up = False
    """Its caller waits no longer. Only a flag: a call that was not sent is skipped, nothing else depends on it."""
    tries = 0
    """Attempts that failed because a key was changed elsewhere."""
    effects: Effects[Any] | None = None
    """What the turn has decided, if that was before it was sent."""
    one_step: _OneStep | None = None
    """How it is done otherwise."""
    looked: dict[str, Known] | None = None
    """What its keys held when they were read for it."""
    awaited = 0
    """Replies to such reads that are still to come."""
    loop: AbstractEventLoop | None = None
    """The event loop whose thread sends it, if that may drive the connection."""
    sends_write = False
    """True if the command that it is part of may write for it."""
    view: EntryView | None = None
    """What a turn has decided over that needs more than values."""
    now_ms = 0
    """The server's time at the last read for it."""
    asks_kept = False
    """True until the answer that is kept for it is here, the first of the replies that are awaited."""
    replay: Replay | None = None
    """That answer."""
    repeats = 0
    """How often its command was lost and it was sent again, as its idempotency key allows."""

    def __init__(self, turn: Any, reply_to: ReplyTo | None, depth: int) -> None:
        self.message = turn
        self.keys: tuple[str, ...] | None = turn.keys
        self.reply_to: ReplyTo | None = reply_to  # type: ignore[assignment]  # None: its caller does it, or has a lock
        self.depth = depth

    @property
    def is_abandoned(self) -> bool:
        """True if the answer would reach no caller."""
        return self.gave_up or (self.reply_to is not None and self.reply_to.abandoned)

    def fail(self, error: Exception) -> None:
        """End it with an error, worded for what it wanted."""
        turn = self.message
        if isinstance(error, ConnectionLost):
            worded = ConnectionLost(turn.function_id, error.url, error.problem, may_be_applied=self.sends_write)
            worded.__cause__ = error.__cause__
            error = worded
        if isinstance(error, (ConnectionLost, NotConnected, StorageError, DeserializationError)):
            failure = turn.failed(error)
            failure.__cause__ = error
            error = failure
        self.error = error
        self.done = True


@final
class Pause:
    """Calls that wait for a time, because a key that the first of them writes was changed elsewhere."""

    __slots__ = ("calls", "due", "keys")

    def __init__(self, due: float) -> None:
        self.calls: deque[Call] = deque()
        self.due = due
        """Seconds on the monotonic clock."""
        self.keys: set[str] = set()
        """Keys that they touch: later calls on these wait behind them."""


@final
class Command:
    """One command on its way to Redis and back. The owner of its scope alone decides what becomes of it."""

    # Defaults of the class, not of each instance.

    reply: Any = None
    """What Redis answered, a Refusal included."""
    error: ScopestateError | None = None
    """Why there is no reply: NotConnected (nothing was sent), ConnectionLost (it may have been done)."""
    over = False
    """True once there is a reply or an error."""
    begun = False
    """True once an owner has it: a second copy in an inbox counts for nothing."""
    deadline = 0.0
    """When it is given up if the server refuses to begin it. Seconds on the monotonic clock; set when first sent."""
    not_before = 0.0
    """When it was due to be sent again the last time."""
    since = 0.0
    """When it began to wait for a connection."""
    prefix = b""
    """A command that must come right before it: `ASKING`, after a redirection."""
    skips = 0
    """Replies to that which are still to come."""
    address = ""
    """The server that it was sent to."""
    via: Pump | None = None
    """What sends it."""

    def __init__(
        self, scope: RedisScope, parts: tuple[Any, ...], calls: list[Call], again: Sequence[Call], *, bulk: bool
    ) -> None:
        self.scope = scope
        self.parts = parts
        self.data = pack_text(parts)
        self.calls = calls
        """Those whose entries they are, one for each reply of the script."""
        self.again = again
        """Those that only read in this one, and those that must stay behind them, in order."""
        self.bulk = bulk or len(self.data) > BULKY
        """True if it, or its reply, is large: it must not hold up the others."""

    def once_more(self) -> Command:
        """Return the same command to be sent another time: the server has said that it did not begin this one."""
        other = Command.__new__(Command)
        other.__dict__.update(self.__dict__)
        other.reply, other.over, other.begun, other.skips = None, False, False, 0
        return other


class ScopeCommands:
    """Makes the commands of one scope and takes their replies in. Used by the holder of its owner's claim.

    A scope has one command on its way at a time, and what comes meanwhile goes out as the next one, all together: so
    calls take effect in the order in which they came, and many callers cost few round trips.
    """

    def __init__(
        self,
        scope: RedisScope,
        store: RedisBackend,
        limits: Limits,
        changed: Callable[[Call, Change, int], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        """`changed(call, change, number)` is called for each change, in order. 0: changes have no number."""
        self.name = scope.scope
        self.hash_key = store.shape.key_of(scope.scope)
        self.command: Command | None = None
        """The one on its way."""
        self.paused: dict[str, Pause] = {}
        """Key -> the pause that calls on it wait for."""
        self.pausing: list[Pause] = []
        """Pauses that have begun; the owner takes them from here, and ends each in time."""
        self.seen = Seen(scope.scope, store.note_misfit, store.note_fit)
        self.publishes = store.shares_events
        self.names = store.shape.names(self.hash_key)
        """The keys of the scope in Redis."""
        self._numbers = store.shape.numbers
        self._has_deadlines = False
        """True once a key had a deadline, or keys were listed: then all writes go by the script for those."""
        self._ahead_ms: float | None = None
        """How far the server's clock is ahead of this one; None: not known. Servers of a cluster differ."""
        self.due_ms: int | None = None
        """The next deadline that is known of, in milliseconds by the server's clock."""
        self.due_key: str | None = None
        """The key that it belongs to, if that is known."""
        self.note_due: Callable[[], object] = lambda: None
        """Called when a key has an earlier deadline than those before."""
        self._number = 0
        """The number of the next change of the command that is taken in."""
        self._limits = limits
        self._scope = scope
        self._store = store
        self._view = ValueView(scope.scope, limits)
        self._changed = changed
        self._clock = clock
        self._uniform = uniform
        self._rivalries: dict[str, tuple[float, float]] = {}
        """Key that others update too -> when to rest next (0: not set yet), and when it is over."""
        self._whole_bytes: int | None = None
        """About how many bytes the whole scope has; None: never read."""

    # ------------------------------------------------------------------------------------------------- making commands

    def make(self, queue: list[Call], most: int, ended: list[Call]) -> Command | None:
        """Take calls from the front of `queue` that go together, and return their command.

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
                    # Behind everything that came before, on whatever key.
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
        """As `make`, for a call that goes alone: those of callers that lead, and most under load from many scopes."""
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
            if call.depth and self._store.shares_events:
                entry = ["p", str(call.depth), *entry]
            if kept or self._has_deadlines:
                parts = shape.write(names, self.name, entry, kept)
            else:
                parts = shape.write_one(names, self.name, tuple(entry))
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
        """Return the script's entry that does a call; None if its keys must be read, for its answer or for that entry.

        `known`: what keys hold after the entries before it. `kept`: the keys of kept answers that entries name.
        `alone`: it is the only entry, for `write_one`. Raises what refuses the call.
        """
        turn = call.message
        # As `_needs_entries`, written out.
        if self._numbers and (type(turn) not in _PLAIN or (turn.writes and self._scope.rule is not NO_RULE)):
            if alone and not (self._has_deadlines or self.publishes):
                entry = self._small_entry(call, keys)
                if entry is not None:
                    return entry
            return self._general_entry(call, keys, known, kept, alone=alone)
        one_step = _ONE_STEP.get(type(turn))
        if one_step is not None:
            call.one_step = one_step
            call.sends_write = True
            after = one_step.after(turn)
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
                return self._decide(call, values, known)
        call.looked = {}
        call.awaited = len(keys)
        return None

    def _needs_entries(self, turn: Turn[Any]) -> bool:
        """Return whether a turn needs more than values: revisions, deadlines, the time."""
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
        """Return the place of the key of a turn's kept answer, from 1; 0 if it has no idempotency key."""
        idempotency_key = idempotency_key_of(turn)
        if idempotency_key is None:
            return 0
        kept.append(kept_key(self.hash_key, idempotency_key))
        return len(kept)

    def _small_entry(self, call: Call, keys: tuple[str, ...]) -> tuple[Any, ...] | None:
        """Return the entry of a set on a condition that what was seen fulfils; None for everything else."""
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
                    effects = turn.decide(view)
                except ScopestateError:
                    # It may be what was seen that is old.
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
        return entry_for(view, stored, index)

    def _entry_view(self, known: dict[str, Known], now_ms: int) -> EntryView:
        return EntryView(self.name, self._store.store_id, self._limits, self._scope.rule, known, now_ms)

    def view_of_seen(self) -> EntryView:
        """Return a view of what was seen, which may be old. From any thread."""
        now_ms = None if self._ahead_ms is None else self._time_ms()
        return EntryView(
            self.name, self._store.store_id, self._limits, self._scope.rule, {}, now_ms, recall=self.seen.get
        )

    def _time_ms(self) -> int:
        """About the time of the server, in milliseconds since the epoch."""
        assert self._ahead_ms is not None
        return int(self._clock() * 1000 + self._ahead_ms)

    def server_ms(self, otherwise: int) -> int:
        """Return about the time of the server, `otherwise` if it is not known."""
        return otherwise if self._ahead_ms is None else self._time_ms()

    def late_ms(self, deadline: int) -> int:
        """Return how late it is for a deadline, in milliseconds by the server's clock."""
        return 0 if self._ahead_ms is None else max(0, self._time_ms() - deadline)

    def note_time(self, server_ms: int) -> None:
        """Note the time of the server, which has just said it."""
        self._ahead_ms = server_ms - self._clock() * 1000

    def _decide(self, call: Call, values: dict[str, Known], known: dict[str, Known]) -> Sequence[Any]:
        view = self._view
        view.found = {key: value[1] for key, value in values.items()}
        call.effects = effects = call.message.decide(view)
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
            bulk = type(turn) in _READ_ALL and (self._whole_bytes is None or self._whole_bytes > BULKY)
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
        """Put a call behind the pause of one of its keys; False if none of them pauses."""
        pause = next((self.paused[key] for key in keys if key in self.paused), None)
        if pause is None:
            return False
        pause.calls.append(call)
        self._extend(pause, keys)
        return True

    def _extend(self, pause: Pause, keys: Iterable[str]) -> None:
        """Later calls on `keys` wait for this pause too."""
        for key in keys:
            if self.paused.setdefault(key, pause) is pause:
                pause.keys.add(key)

    def resume(self, pause: Pause, queue: list[Call]) -> None:
        """A pause is over: its calls go next. Once too often does no harm."""
        for key in pause.keys:
            if self.paused.get(key) is pause:
                del self.paused[key]
        calls, pause.calls = pause.calls, deque()
        queue[:0] = calls

    # ----------------------------------------------------------------------------------------------- taking replies in

    def settle(self, command: Command, queue: list[Call], ended: list[Call]) -> None:
        """Give the calls of a command that is over their answers. Those that must go again are put in front."""
        reply = command.reply
        if command.error is not None:
            self.give_up(
                [call for call in command.calls if not self._repeats(call, command.error, queue)], command.error, ended
            )
        elif type(reply) is Refusal:
            self._refuse(command, reply, ended)
        elif command.calls[0].keys is None:
            self._finish_whole(command.calls, reply, ended)
        elif type(reply) is list:
            # Not changed: a reply is taken in once more if that was interrupted.
            if self._numbers:
                self._number = int(reply[-1] or b"0")
            for call, found in zip(command.calls, reply, strict=False):
                self._finish(call, found, ended)
            if self.publishes and (last := reply[len(command.calls)]):
                self._store.note_published(last)
        else:
            self._finish(command.calls[0], reply, ended)  # of one key
        if command.again:
            queue[:0] = [call for call in command.again if not call.done]

    def _repeats(self, call: Call, error: ScopestateError, queue: list[Call]) -> bool:
        """Send a call once more that may have been applied, if its idempotency key allows that."""
        if (
            type(error) is not ConnectionLost
            or call.done
            or call.is_abandoned
            or not isinstance(call.message, Once)
            or call.repeats >= MOST_REPEATS
        ):
            return False
        call.repeats += 1
        call.looked = call.effects = None
        call.awaited = 0
        for key in call.keys or ():
            self.seen.forget(key)
        if call not in queue:
            queue.insert(0, call)
        return True

    def give_up(self, calls: Iterable[Call], error: Exception, ended: list[Call]) -> None:
        """Fail the calls; nothing is known of the keys that they write."""
        for call in calls:
            if call.done:
                continue
            if type(call.message) is Behind:
                call.done = True  # what came before has ended, with the same error
            else:
                call.fail(error)
            ended.append(call)
            if call.message.writes:
                for key in call.keys or ():
                    self.seen.forget(key)

    def _refuse(self, command: Command, refusal: Refusal, ended: list[Call]) -> None:
        """Fail the calls of a command that the server refuses: reads and writes are told what concerns them."""
        address, parts = command.address, command.parts
        writes = [call for call in command.calls if call.message.writes]
        if writes:
            keys = keys_of(parts) if parts[0] == "EVALSHA" else (self.hash_key,)
            self.give_up(writes, explain(refusal, address, *keys), ended)
        if len(writes) < len(command.calls):
            self.give_up(command.calls, explain(refusal, address, self.hash_key, nothing=""), ended)

    def _finish(self, call: Call, found: Any, ended: list[Call]) -> None:
        """Take in what the script, or HGET, says of one entry."""
        if type(found) is list and len(found) == _LOOKED:
            self._note_look(found)
        if call.done:
            call.awaited = max(call.awaited - 1, 0)  # a key of it could not be read; or this was cut short before
        elif type(found) is int and found == SKIPPED:
            self._skip(call)
        elif type(found) is int and found == SLOW:
            self._has_deadlines = True  # or an index
            call.looked = None
            self._pause(call, 0.0)
        elif call.one_step is not None:
            self._finish_one_step(call, found, ended)
        elif call.awaited:
            self._finish_read(call, found, ended)
        else:
            self._store.note_attempt()
            if type(found) is list and len(found) == _LOOKED:
                found = None  # taken in before, when that was cut short: read again
            if type(found) is list:
                if found[0] == KEPT:
                    self._finish_replay(call, found[1], ended)
                    return
                # The key had a value whose deadline had passed: it was removed first.
                (key,) = call.keys  # type: ignore[misc]  # it has one
                self._expired(call, key, found)
                found = DONE
            if type(found) is int and found == DONE:
                self._finish_decided(call, ended)
            else:
                self._conflict(call, ended)

    def _finish_one_step(self, call: Call, found: Any, ended: list[Call]) -> None:
        assert call.one_step is not None
        (key,) = call.keys  # type: ignore[misc]  # it has one
        if type(found) is list:
            self._expired(call, key, found)
            found = None
        # A value that is not JSON reads as null here, and is gone: docs/semantics.md, section 7.
        old = None if found is None else self.seen.valid(key, found, otherwise=b"null")
        after = call.one_step.after(call.message)
        number = self._take_number()
        call.answer = call.one_step.answer(call.message, old, number)
        self._remember(key, after, number)
        call.done = True
        ended.append(call)
        self._changed(call, Change(key, old, after), number)

    def _note_look(self, found: list[Any]) -> None:
        """Take in what the reply to `l` has beside the value."""
        _, entry, now_ms = found
        self.note_time(now_ms)
        if entry:
            if self._number and revision_in(entry) == self._number:
                self._number += 1  # the script has just given it, since another program had written the value
            if (deadline := deadline_in(entry)) is not None:
                self._expect(deadline)

    def _take_number(self) -> int:
        """Return the number of the next change that the script has made; 0 if changes have none."""
        number = self._number
        if number:
            self._number = number + 1
        return number

    def _expired(self, call: Call, key: str, found: list[bytes]) -> None:
        """A value was removed because its deadline had passed."""
        raw, deadline = found
        old = self.seen.valid(key, raw, otherwise=b"null")
        self._has_deadlines = True
        self._changed(call, Change(key, old, None, int(deadline), True), self._take_number())

    def _finish_replay(self, call: Call, kept: bytes, ended: list[Call]) -> None:
        """An earlier call with the same idempotency key has done it."""
        replay = kept_in(kept)
        if type(call.message) is Commit:
            call.answer = replay
        else:
            view = self._entry_view({}, 0)
            view.answers = {call.message.idempotency_key: replay.kept}
            try:
                _, call.answer = call.message.decide(view)
            except ScopestateError as error:
                call.fail(error)
                ended.append(call)
                return
            if replay.revision:
                number_answer(call.answer, replay.revision)
        call.done = True
        ended.append(call)

    def _skip(self, call: Call) -> None:
        """An entry before it, on one of its keys, has failed: it waits behind that."""
        reads = call.awaited
        call.awaited = max(reads - 1, 0)
        if reads and (call.looked is None or call.message.writes):
            return  # it waits already, or goes again in any case
        call.looked = None
        if not self._waits(call, call.keys or ()):
            self._pause(call, 0.0)  # the call that failed has been given up

    def _finish_decided(self, call: Call, ended: list[Call]) -> None:
        effects = call.effects
        assert effects is not None
        stored, call.answer = effects
        call.done = True
        ended.append(call)
        told: list[tuple[Change, int]] = []
        number = 0
        for one in stored:
            if isinstance(one, Change):
                number = self._take_number()
                told.append((one, number))
            if isinstance(one, Keep):
                continue
            if call.view is None:
                assert isinstance(one, Change)
                # The deadline of an updated key is not known; a set on a condition has none.
                self._remember(one.key, one.after, number if type(call.message) is SetWith else 0)
            else:
                before = call.view.used.get(one.key, NOTHING)
                known = after_of(one, number, before)
                if one.expires_ms is not None and (isinstance(one, NewDeadline) or one.after is not None):
                    self._expect(one.expires_ms)
                self.seen.remember(one.key, known)
        if type(call.message) is Commit:
            call.answer = number
        elif told:
            number_answer(call.answer, number)
        for change, at in told:
            self._changed(call, change, at)
        if self._rivalries:
            self._rest(call.keys or ())

    def _remember(self, key: str, after: bytes | None, number: int) -> None:
        """Note what a plain write has stored. `number`: that of a write that has left the key without a deadline."""
        entry = number_text(number) if number else None
        self.seen.remember(key, NOTHING if after is None else (after, after, entry))
        if after is not None and self._whole_bytes is not None:
            self._whole_bytes += len(after)

    def _finish_read(self, call: Call, found: Any, ended: list[Call]) -> None:
        """One key of a call was read. With the last of them a read has its answer, and a write may be decided."""
        looked, keys = call.looked, call.keys or ()
        call.awaited -= 1
        if looked is None:
            return
        turn = call.message
        try:
            if call.asks_kept:
                call.asks_kept = False
                if found is not None:
                    if type(turn) is Look:
                        call.replay = kept_in(found)
                    else:
                        self._finish_replay(call, found, ended)
                        return
            else:
                key = keys[0] if len(keys) == 1 else next(key for key in keys if key not in looked)
                if type(found) is list:
                    raw, entry, call.now_ms = found
                    looked[key] = self.seen.look(key, raw, entry)
                else:
                    looked[key] = self.seen.look(key, found)
            if call.awaited or turn.writes:
                return
            if self._needs_entries(turn):
                view = self._entry_view(looked, call.now_ms)
                if type(turn) is Look:
                    view.replay = call.replay
                    if turn.idempotency_key is not None:
                        view.answers = {turn.idempotency_key: None if call.replay is None else call.replay.kept}
                _, call.answer = turn.decide(view)
            else:
                self._view.found = {key: known[1] for key, known in looked.items()}
                _, call.answer = turn.decide(self._view)
            call.done = True
        except ScopestateError as error:
            call.fail(error)
        ended.append(call)

    def _conflict(self, call: Call, ended: list[Call]) -> None:
        """A key was changed elsewhere: read it anew after a pause, or give up."""
        self._store.note_conflict()
        call.tries += 1
        call.looked = None
        is_commit = type(call.message) is Commit
        now = self._clock()
        if len(self._rivalries) >= _MOST_RIVALRIES:
            self._rivalries.clear()
        for key in call.keys or ():
            self.seen.forget(key)
            self._rivalries[key] = (0.0, now + _RIVALRY_S)
        longest_s = min(_PAUSE_S[0] * 2.0 ** min(call.tries - 1, 32), _PAUSE_S[1])
        # Later calls on its keys were skipped, and wait for the same pause.
        draw = self._uniform or random.uniform
        gives_up = call.tries >= self._store.update_attempts
        self._pause(call, now if is_commit else now + draw(0, longest_s), empty=gives_up or is_commit)
        if is_commit:
            call.done = True  # the caller decides again
            ended.append(call)
        elif gives_up:
            call.fail(_contended(self.name, call.keys or (), call.tries))
            ended.append(call)

    def _pause(self, call: Call, due: float, *, empty: bool = False) -> None:
        """Let the call wait, in front of whatever waits for its keys already. `empty`: only the others wait."""
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

    def _rest(self, keys: tuple[str, ...]) -> None:
        """After a write of a key that others update too: leave it to them, from time to time."""
        now = self._clock()
        for key in keys:
            if key not in self._rivalries:
                continue
            rest_at, over_at = self._rivalries[key]
            if now > over_at:
                del self._rivalries[key]
            elif rest_at == 0.0:
                self._rivalries[key] = (now + _HOLD_S, over_at)
            elif now > rest_at and key not in self.paused:
                self._rivalries[key] = (0.0, over_at)
                self.seen.forget(key)  # it must be read afterwards
                pause = self.paused[key] = Pause(now + _REST_S)
                pause.keys.add(key)
                self.pausing.append(pause)

    def _finish_whole(self, calls: list[Call], reply: Any, ended: list[Call]) -> None:
        call = calls[0]
        turn = call.message
        if type(turn) in _READ_ALL or not self._numbers:
            self._finish_all(calls, reply, ended)
            return
        if type(turn) is ReadRange:
            call.answer = listed(turn, reply, self._data_of)
        elif type(turn) is Expire:
            self._number = int(reply[-1] or b"0")
            if self.publishes and reply[1]:
                self._store.note_published(reply[1])
            call.answer = self._finish_sweep(call, reply[0])
        else:
            call.answer = reply
        call.done = True
        ended.append(call)

    def _data_of(self, key: str, raw: bytes) -> bytes | None:
        """Return a value as JSON; None if it is not JSON, which is reported."""
        try:
            return self.seen.valid(key, raw)
        except DeserializationError as error:
            log.error("a list of scope %r leaves a key out: %s", self.name, error)  # noqa: TRY400 - it says all
            return None

    def _finish_sweep(self, call: Call, swept: list[Any]) -> Expired:
        """Take in what was removed because its deadline had passed."""
        now_ms, due_key, due, *gone = swept
        self.note_time(now_ms)
        for field, raw, deadline in zip(gone[::3], gone[1::3], gone[2::3], strict=True):
            key = field.decode(errors="replace")
            self._expired(call, key, [raw, deadline])
            self.seen.forget(key)
        self.due_ms = int(float(due)) if due else None
        self.due_key = due_key.decode(errors="replace") if due else None
        return Expired(len(gone) // 3, max(0, now_ms - int(gone[2])) if gone else 0)

    def _expect(self, deadline: int) -> None:
        """Note that a key has this deadline."""
        self._has_deadlines = True
        if self.due_ms is None or deadline < self.due_ms:
            self.due_ms, self.due_key = deadline, None
            self.note_due()

    def _finish_all(self, calls: list[Call], reply: list[Any], ended: list[Call]) -> None:
        lapsed: set[bytes] = set()
        if self._numbers:
            now_ms, gone, reply = reply
            self.note_time(now_ms)
            lapsed.update(gone)
        items: list[tuple[str, bytes]] = []
        misfits: list[str] = []
        size = 0
        for field, raw in zip(reply[::2], reply[1::2], strict=True):
            size += len(raw)
            if field in lapsed:
                continue
            try:
                key = field.decode()
                items.append((key, self.seen.valid(key, raw)))
            except UnicodeDecodeError:
                misfits.append(repr(field))
                self.seen.note_misfit(repr(field), "the key is not UTF-8")
            except DeserializationError as error:
                misfits.append(key)
                log.error("a list of scope %r leaves a key out: %s", self.name, error)  # noqa: TRY400 - it says all
        # By key, in the order of its UTF-8 bytes, which is that of code points: Redis keeps no order of its own.
        items.sort()
        self._whole_bytes = size
        self.seen.note_gone(misfits)
        view = self._view
        view.found = dict(items)
        for call in calls:
            _, call.answer = call.message.decide(view)
            call.done = True
            ended.append(call)


class _Making:
    """One command for several calls while it is made."""

    def __init__(self, commands: ScopeCommands) -> None:
        self._commands = commands
        self._entries: list[Any] = []
        self._known: dict[str, Known] = {}
        """What keys hold after the entries so far."""
        self._kept: list[bytes] = []
        """The keys of the kept answers that entries name."""
        self._held: set[str] = set()
        """Keys that are read first in this command, and those of the calls that wait for that."""
        self._depth = 0
        self.calls: list[Call] = []
        self.again: list[Call] = []
        self.whole = False
        """True if it is a read of the whole scope, for each of the calls."""
        self.size = 0

    def may_end_with(self, call: Call) -> bool:
        """Whether a call that concerns no key in particular may be part of this command."""
        if self.calls or self.again:
            return self.whole and type(call.message) in _READ_ALL and type(self.calls[0].message) in _READ_ALL
        return True

    def enter(self, call: Call, keys: tuple[str, ...]) -> bool:
        """Add a call on some keys; False if it has failed."""
        held, commands = self._held, self._commands
        if held and not held.isdisjoint(keys):
            held.update(keys)
            self.again.append(call)  # behind one that reads first
            return True
        try:
            entry = commands.entry(call, keys, self._known, self._kept)
        except Exception as error:  # noqa: BLE001 - a bug as well: its caller gets it, and the others go on
            call.fail(error)
            return False
        if entry is None:
            if call.message.writes:
                held.update(keys)
                self.again.append(call)
            self._entries += commands.reads(call, keys, self._kept)
            self.calls += [call] * call.awaited
            return True
        if call.depth != self._depth and commands.publishes:
            self._depth = call.depth
            self._entries += ("p", str(self._depth))
        self._entries += entry
        self.size += call.message.size() if len(entry) > 6 else len(entry[-1])
        self.calls.append(call)
        return True

    def command(self) -> Command:
        """Return the command."""
        return self._commands.command_of(self._entries, self.calls, self.again, self._kept, whole=self.whole)


def _stored(values: dict[str, Known], changes: tuple[Change, ...]) -> tuple[Any, ...]:
    """Return the script's entry that makes the changes if the keys still hold `values`."""
    entry: list[Any] = ["t", str(len(values)), str(len(changes))]
    for key, (raw, _, _) in values.items():
        entry += (key, "0", "") if raw is None else (key, "1", raw)
    for change in changes:
        assert change.key in values, f"a turn changes {change.key!r}, which is not one of its keys"
        entry += (change.key, "0", "") if change.after is None else (change.key, "1", change.after)
    return tuple(entry)


def _contended(scope: str, keys: tuple[str, ...], tries: int) -> StorageError:
    names = " or ".join(repr(key) for key in keys)
    return StorageError(
        f"key {names} of scope {scope!r} was changed elsewhere during each of {tries} attempts to update it; nothing "
        "was written: try again, or raise update_attempts"
    )


def _too_large(key: str, data: bytes) -> StorageError:
    return StorageError(
        f"the value for key {key!r} takes {len(data)} bytes as JSON, and Redis takes {_LARGEST_BYTES} at most; nothing "
        "was written: split it over several keys"
    )
