"""What goes to Redis for the calls of one scope, and what the replies mean to them. No threads, sockets or clocks.

An operation needs no line here: a turn says which keys it touches, and decides over their last seen values. What it
decides is stored if those keys still hold what it has seen (docs/design/0034-one-owner-for-each-connection.md).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from scopestate.actors.backlog import Limits
from scopestate.actors.containment import Log
from scopestate.actors.reply import Envelope, ReplyTo
from scopestate.errors import ConnectionLost, DeserializationError, NotConnected, ScopestateError, StorageError
from scopestate.ops import turns
from scopestate.ops.results import SetResult
from scopestate.ops.turns import Change, Effects, PlainView, Turn, changes_in
from scopestate.ops.values import parse
from scopestate.persistence.redis.connection import Refusal, pack_text
from scopestate.persistence.redis.script import DONE, SKIPPED, explain, keys_of

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

_MOST_CALLS: Final = 256
_MOST_BYTES: Final = 1 << 18
"""Calls in one command, and about how many bytes of values: Redis runs it as one step, and does nothing else then."""
_LARGEST_BYTES: Final = 512 << 20
"""The largest value that a server takes (`proto-max-bulk-len` by default). A larger one would cost the connection, and
with it the calls of everything else on it."""
BULKY: Final = 1 << 16
"""A command or value of this many bytes is sent separately, so that it delays no other scope."""
_MOST_KEYS_SEEN: Final = 1024
_MOST_BYTES_SEEN: Final = 1 << 22

Known = tuple[bytes | None, bytes | None]
"""The value of a key: as it is in Redis, and as scopestate writes it. They differ if another program wrote it."""
NOTHING: Final[Known] = (None, None)


class _OneStep(NamedTuple):
    """A turn that needs no read first: it wants only the value that it replaces."""

    entry: Callable[[Any], tuple[Any, ...]]
    """The turn's entry for the script."""
    after: Callable[[Any], bytes | None]
    """What the key holds afterwards."""
    answer: Callable[[Any, bytes | None], Any]
    """Its answer, made of the value before; `decide` says the same, and a test holds the two equal."""


_ONE_STEP: Final[dict[type[Any], _OneStep]] = {
    turns.Set: _OneStep(
        lambda turn: ("s", turn.key, turn.data), lambda turn: turn.data, lambda turn, old: SetResult(old, turn.data)
    ),
    turns.Delete: _OneStep(lambda turn: ("d", turn.key), lambda turn: None, lambda turn, old: old),
}


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


class Seen:
    """Key -> its last seen value; other engines may have changed it since. Used within the scope's turn."""

    def __init__(
        self, scope: str, note_misfit: Callable[[str, str, str], object], note_fit: Callable[[str, str], object]
    ) -> None:
        self._scope = scope
        self._note_misfit = note_misfit
        self._note_fit = note_fit
        self._misfits: set[str] = set()
        """Names that were reported as not UTF-8 or not holding JSON, until they are valid again."""
        self._keys: dict[str, Known] = {}
        self._bytes = 0
        self.bulky = False
        """True once a large value was seen."""
        self.get = self._keys.get

    def look(self, key: str, found: bytes | None) -> Known:
        """Note the value of a key and return it. Raises DeserializationError if it is not JSON."""
        if found is None:
            self.remember(key, NOTHING)
            return NOTHING
        return found, self.valid(key, found)

    def valid(self, key: str, raw: bytes, otherwise: bytes | None = None) -> bytes:
        """Return a value of Redis as scopestate writes it.

        If it is not JSON, return `otherwise` if that is given, or raise DeserializationError.
        """
        seen = self._keys.get(key)
        if seen is not None and raw == seen[0]:
            return seen[1]  # type: ignore[return-value]  # both are None, or neither
        try:
            data = parse(raw)
        except DeserializationError as error:
            self.forget(key)
            self.note_misfit(key, str(error))
            if otherwise is not None:
                return otherwise
            raise DeserializationError(
                f"what Redis holds for key {key!r} of scope {self._scope!r} is not JSON: {error}; set or delete the key"
            ) from error
        self.remember(key, (raw, raw if data == raw else data))
        return data

    def remember(self, key: str, known: Known) -> None:
        """Note the value of a key."""
        raw, keys = known[0], self._keys
        if key not in keys:  # those in `keys` are valid
            self._misfits.discard(key)
            self._note_fit(self._scope, key)
        size = 0 if raw is None else len(raw)
        if size >= BULKY:
            self.bulky = True
        self._bytes += size
        if self._bytes > _MOST_BYTES_SEEN or len(keys) > _MOST_KEYS_SEEN:
            # Refused: dropping only the oldest. That is more code, and saves one read in a thousand updates.
            keys.clear()
            self._bytes = size
        if size <= _MOST_BYTES_SEEN:
            keys[key] = known

    def note_misfit(self, name: str, problem: str) -> None:
        """Report a field of the hash that is not UTF-8 or does not hold JSON."""
        self._misfits.add(name)
        self._note_misfit(self._scope, name, problem)

    def note_gone(self, present: Collection[str]) -> None:
        """Withdraw the reports of names that are no longer in the hash; `present` has all of its names."""
        for name in self._misfits.difference(present):
            self._misfits.discard(name)
            self._note_fit(self._scope, name)

    def forget(self, key: str) -> None:
        """Forget the value of a key: it is unknown."""
        self._keys.pop(key, None)


class _View(PlainView):
    """What a turn sees of its scope: keys that were read. Used again for each turn."""

    __slots__ = ("found", "limits", "scope")

    def __init__(self, scope: str, limits: Limits) -> None:
        self.scope = scope
        self.limits = limits
        self.found: Mapping[str, bytes | None] = {}

    def get(self, key: str) -> bytes | None:
        return self.found[key]

    def values(self) -> list[bytes]:
        return [data for data in self.found.values() if data is not None]

    def items(self) -> list[tuple[str, bytes]]:
        return [(key, data) for key, data in self.found.items() if data is not None]


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
        changed: Callable[[Call, str, bytes | None, bytes | None], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        """`changed(call, key, old, new)` is called for each key that was written, in the order of the writes."""
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
        self._scope = scope
        self._store = store
        self._view = _View(scope.scope, limits)
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
                if not keys:
                    # Behind everything that came before, on whatever key.
                    if self.paused or not making.may_end_with(keys):
                        break
                    if keys is None:
                        making.whole = True
                        making.calls.append(call)
                    else:
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
        if not keys:
            return self.make([call], 1, ended)
        shape, hash_key = self._store.shape, self.hash_key
        try:
            entry = self.entry(call, keys, {})
        except Exception as error:  # noqa: BLE001 - as in `_Making.enter`
            call.fail(error)
            ended.append(call)
            return None
        calls = [call]
        if entry is not None:
            if call.depth and self._store.shares_events:
                entry = ("p", str(call.depth), *entry)
            return Command(self._scope, shape.write(hash_key, self.name, entry), calls, (), bulk=self.seen.bulky)
        again = calls if call.message.writes else ()
        if len(keys) == 1:
            return Command(self._scope, ("HGET", hash_key, keys[0]), calls, again, bulk=self.seen.bulky)
        reads = [part for key in keys for part in ("g", key)]
        parts = shape.write(hash_key, self.name, reads)
        return Command(self._scope, parts, calls * len(keys), again, bulk=self.seen.bulky)

    def entry(self, call: Call, keys: tuple[str, ...], known: dict[str, Known]) -> tuple[Any, ...] | None:
        """Return the script's entry that does a call; None if its keys must be read, for its answer or for that entry.

        `known`: what keys hold after the entries before it. Raises what refuses the call.
        """
        turn = call.message
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
                known[keys[0]] = (after, after)
            return one_step.entry(turn)
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

    def _decide(self, call: Call, values: dict[str, Known], known: dict[str, Known]) -> tuple[Any, ...]:
        view = self._view
        view.found = {key: value[1] for key, value in values.items()}
        call.effects = effects = call.message.decide(view)
        changes = changes_in(effects[0])
        for change in changes:
            if change.after is not None and len(change.after) > _LARGEST_BYTES:
                raise _too_large(change.key, change.after)
        call.sends_write = True
        if len(changes) == 1 and len(values) == 1 and (after := changes[0].after) is not None:
            ((key, (raw, _)),) = values.items()
            known[key] = (after, after)
            return ("n", key, after) if raw is None else ("c", key, raw, after)
        for change in changes:
            known[change.key] = NOTHING if change.after is None else (change.after, change.after)
        return _stored(values, changes)

    def command_of(self, entries: list[Any], calls: list[Call], again: list[Call], *, whole: bool) -> Command:
        """Return the command of several entries, or of a read of the whole scope."""
        if whole:
            bulk = self._whole_bytes is None or self._whole_bytes > BULKY
            return Command(self._scope, ("HGETALL", self.hash_key), calls, again, bulk=bulk)
        if len(entries) == 2 and entries[0] == "g":
            parts: tuple[Any, ...] = ("HGET", self.hash_key, entries[1])
        else:
            parts = self._store.shape.write(self.hash_key, self.name, entries)
        return Command(self._scope, parts, calls, again, bulk=self.seen.bulky)

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
            self.give_up(command.calls, command.error, ended)
        elif type(reply) is Refusal:
            self._refuse(command, reply, ended)
        elif command.calls[0].keys is None:
            self._finish_whole(command.calls, reply, ended)
        elif type(reply) is list:
            for call, found in zip(command.calls, reply, strict=False):
                self._finish(call, found, ended)
            if len(reply) > len(command.calls) and reply[-1]:
                self._store.note_published(reply[-1])
        else:
            self._finish(command.calls[0], reply, ended)  # HGET
        if command.again:
            queue[:0] = [call for call in command.again if not call.done]

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
        if call.done:
            call.awaited = max(call.awaited - 1, 0)  # a key of it could not be read; or this was cut short before
        elif type(found) is int and found == SKIPPED:
            self._skip(call)
        elif call.one_step is not None:
            (key,) = call.keys  # type: ignore[misc]  # it has one
            # A value that is not JSON reads as null here, and is gone: docs/semantics.md, section 7.
            old = None if found is None else self.seen.valid(key, found, otherwise=b"null")
            after = call.one_step.after(call.message)
            call.answer = call.one_step.answer(call.message, old)
            self._remember(key, after)
            call.done = True
            ended.append(call)
            self._changed(call, key, old, after)
        elif call.awaited:
            self._finish_read(call, found, ended)
        else:
            self._store.note_attempt()
            if type(found) is int and found == DONE:
                self._finish_decided(call, ended)
            else:
                self._conflict(call, ended)

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
        changes, call.answer = changes_in(effects[0]), effects[1]
        for change in changes:
            self._remember(change.key, change.after)
        call.done = True
        ended.append(call)
        for change in changes:
            self._changed(call, change.key, change.before, change.after)
        if self._rivalries:
            self._rest(call.keys or ())

    def _remember(self, key: str, after: bytes | None) -> None:
        self.seen.remember(key, NOTHING if after is None else (after, after))
        if after is not None and self._whole_bytes is not None:
            self._whole_bytes += len(after)

    def _finish_read(self, call: Call, found: Any, ended: list[Call]) -> None:
        """One key of a call was read. With the last of them a read has its answer, and a write may be decided."""
        looked, keys = call.looked, call.keys or ()
        call.awaited -= 1
        if looked is None:
            return
        key = keys[0] if len(keys) == 1 else next(key for key in keys if key not in looked)
        turn = call.message
        try:
            looked[key] = self.seen.look(key, found)
            if call.awaited or turn.writes:
                return
            view = self._view
            view.found = {key: known[1] for key, known in looked.items()}
            _, call.answer = turn.decide(view)
            call.done = True
        except ScopestateError as error:
            call.fail(error)
        ended.append(call)

    def _conflict(self, call: Call, ended: list[Call]) -> None:
        """A key was changed elsewhere: read it anew after a pause, or give up."""
        self._store.note_conflict()
        call.tries += 1
        call.looked = None
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
        self._pause(call, now + draw(0, longest_s), empty=gives_up)
        if gives_up:
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

    def _finish_whole(self, calls: list[Call], reply: list[bytes], ended: list[Call]) -> None:
        items: list[tuple[str, bytes]] = []
        misfits: list[str] = []
        size = 0
        for field, raw in zip(reply[::2], reply[1::2], strict=True):
            size += len(raw)
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
        self._held: set[str] = set()
        """Keys that are read first in this command, and those of the calls that wait for that."""
        self._depth = 0
        self.calls: list[Call] = []
        self.again: list[Call] = []
        self.whole = False
        """True if it is a read of the whole scope, for each of the calls."""
        self.size = 0

    def may_end_with(self, keys: tuple[str, ...] | None) -> bool:
        """Whether a call that concerns no key in particular may be part of this command."""
        return (self.whole and keys is None) or not (self.calls or self.again)

    def enter(self, call: Call, keys: tuple[str, ...]) -> bool:
        """Add a call on some keys; False if it has failed."""
        held, commands = self._held, self._commands
        if held and not held.isdisjoint(keys):
            held.update(keys)
            self.again.append(call)  # behind one that reads first
            return True
        try:
            entry = commands.entry(call, keys, self._known)
        except Exception as error:  # noqa: BLE001 - a bug as well: its caller gets it, and the others go on
            call.fail(error)
            return False
        if entry is None:
            if call.message.writes:
                held.update(keys)
                self.again.append(call)
            for key in keys:
                self._entries += ("g", key)
                self.calls.append(call)
            return True
        if call.depth != self._depth and commands.publishes:
            self._depth = call.depth
            self._entries += ("p", str(self._depth))
        self._entries += entry
        self.size += len(entry[-1])
        self.calls.append(call)
        return True

    def command(self) -> Command:
        """Return the command."""
        return self._commands.command_of(self._entries, self.calls, self.again, whole=self.whole)


def _stored(values: dict[str, Known], changes: tuple[Change, ...]) -> tuple[Any, ...]:
    """Return the script's entry that makes the changes if the keys still hold `values`."""
    entry: list[Any] = ["t", str(len(values)), str(len(changes))]
    for key, (raw, _) in values.items():
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
