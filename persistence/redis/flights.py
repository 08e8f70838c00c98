"""What goes to Redis for the calls on a scope, and what its replies mean to them. No threads and no sockets."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from scopestate.actors.containment import Log
from scopestate.actors.limits import Limits
from scopestate.errors import DeserializationError, ScopestateError, StorageError, ValueTooLarge
from scopestate.ops import MISSING, apply, turns
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.values import decode, encode_plain
from scopestate.persistence.redis.calls import NEVER, NOTHING, Call, Known, Lane, contended
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.flight import Flight
from scopestate.persistence.redis.link import Link
from scopestate.persistence.redis.refusals import explain
from scopestate.persistence.redis.script import DONE, SKIPPED, Shape, keys_of
from scopestate.persistence.redis.seen import BULKY, Seen

log = Log("scopestate.scope")

_PAUSE_S: Final = (0.001, 0.064)
"""Longest pause after the first conflict of an update, and after any; it is drawn at random from zero up."""
_HOLD_S: Final = 0.02
_REST_S: Final = 0.004
"""How long an engine goes on updating a key that others update too, and how long it then lets them. Who pauses must
look before it compares, and what it saw is old by then if another goes on without a rest: it might never come through.
"""
_RIVALRY_S: Final = 1.0
"""How long after its last conflict a key counts as one that others update too."""
_MOST_RIVALRIES: Final = 1024

_LARGEST_BYTES: Final = 512 << 20
"""The largest value that a server takes (`proto-max-bulk-len` by default). A larger one would cost the connection, and
with it the calls of everybody else on it."""


class Store(Protocol):
    """What scopes need of the Redis adapter. From any thread; never blocks."""

    shape: Shape
    update_attempts: int
    shares_events: bool
    """True if Redis reports every change, those made through here included: then answers fire no events."""

    def link(self, hash_key: bytes) -> Link:
        """By which the commands of a hash go."""

    def bulk_link(self, hash_key: bytes) -> Link:
        """By which its large ones go."""

    def recover(self) -> None:
        """Let go of every link that this thread holds."""

    def is_at_a_link(self) -> bool:
        """True if this thread holds a link: then it runs a signal handler, which has interrupted it there."""

    def note_attempt(self) -> object:
        """Count an attempt to publish an update."""

    def note_conflict(self) -> object:
        """Count an attempt that found the key changed by somebody else."""

    def note_published(self, number: int) -> None:
        """Note the number of an event that this engine has published."""

    def note_misfit(self, scope: str, key: str, problem: str) -> None:
        """Note something in Redis that is no key and value of ours."""

    def note_fit(self, scope: str, key: str) -> None:
        """Note that it is gone, or well again."""


class RedisFlights:
    """Makes the commands of one scope and takes their replies in. Used within the scope's turn.

    An update is computed here, from what its key held when it was last seen, and stored if the key still holds that. If
    not, it goes into a lane, to be tried again after a random pause; later calls on that key wait behind it.
    """

    def __init__(
        self,
        scope: str,
        store: Store,
        limits: Limits,
        landed: Callable[[Flight, list[Any]], None],
        changed: Callable[[Call, bytes | None, bytes | None], None],
    ) -> None:
        """`landed`: what a flight calls. `changed(call, old, new)` is called for each write, in their order."""
        self.hash_key = store.shape.key_of(scope)
        self.lanes: dict[str, Lane] = {}
        """Key -> the calls on it that wait."""
        self._scope = scope
        self._store = store
        self._limits = limits
        self._landed = landed
        self._changed = changed
        self._rivalries: dict[str, tuple[float, float]] = {}
        """Key that others update too -> when to rest next (0: not set yet), and when it is over."""
        self._seen = Seen(scope, store.note_misfit, store.note_fit)

    def take_from_lanes(self, calls: list[Call], known: dict[str, Known]) -> None:
        """Move the calls of the lanes that are due to `calls`, and what was just seen of their keys to `known`."""
        now = time.monotonic()
        for key, lane in [(key, lane) for key, lane in self.lanes.items() if lane.due <= now]:
            del self.lanes[key]
            if lane.known is not None:
                known[key] = lane.known
            calls += [call for call in lane.calls if call.reply is None or not call.reply.abandoned]

    def make(self, calls: list[Call], known: dict[str, Known]) -> Flight | None:
        """Make the command for calls that go together; None if each of them has failed before it could be sent.

        `calls`: reads of the whole scope only, or none of those. `known`: what keys held a moment ago, for updates.
        """
        store, hash_key = self._store, self.hash_key
        turn = calls[0].turn
        kind = type(turn)
        if turn.keys is None:
            return Flight(("HGETALL", hash_key), store.bulk_link(hash_key), self._landed, calls)
        link = store.bulk_link(hash_key) if self._seen.bulky else store.link(hash_key)
        if kind is turns.Get and len(calls) == 1:
            return Flight(("HGET", hash_key, turn.key), link, self._landed, calls)
        entries: list[Any] = []
        flying: list[Call] = []
        depth = 0
        for call in calls:
            turn = call.turn
            kind, key = type(turn), turn.key
            if self.lanes and key in self.lanes:
                self.lanes[key].calls.append(call)  # behind an update that looks first
                continue
            if call.depth != depth and store.shares_events:
                depth = call.depth
                entries += ("p", str(depth))
            if kind is turns.Set:
                if len(turn.data) > _LARGEST_BYTES:
                    call.fail(_too_large(key, turn.data))
                    continue
                entries += ("s", key, turn.data)
                known[key] = (turn.data, turn.data)
            elif kind is turns.Update:
                if not self._enter_update(call, entries, known):
                    continue
            elif kind is turns.Delete:
                entries += ("d", key)
                known[key] = NOTHING
            else:
                entries += ("g", key)
            flying.append(call)
        if not flying:
            return None
        flight = Flight(store.shape.write(hash_key, self._scope, entries), link, self._landed, flying)
        if len(flight.command) > BULKY:
            flight.link = store.bulk_link(hash_key)
        return flight

    def _enter_update(self, call: Call, entries: list[Any], known: dict[str, Known]) -> bool:
        """Add an update: what the ops make of the value, or a look if that is not known. False: it failed."""
        key = call.turn.key
        before = known.get(key) or self._seen.get(key)
        if before is None:
            entries += ("g", key)
            self.lanes[key] = Lane(due=NEVER)  # until the look is back
            call.after = None
            return True
        raw, call.before = before
        try:
            value, problems = apply(MISSING if call.before is None else decode(call.before), call.turn.ops)
            data = encode_plain(value)
            limit = self._limits.max_value_bytes
            if limit and len(data) > limit:
                raise ValueTooLarge(self._scope, key, len(data), limit)
            if len(data) > _LARGEST_BYTES:
                raise _too_large(key, data)
        except ScopestateError as error:
            call.fail(error)
            return False
        call.after, call.problems = data, tuple(problems) if problems else ()
        entries += ("n", key, data) if raw is None else ("c", key, raw, data)
        known[key] = (data, data)
        return True

    # ----------------------------------------------------------------------------------------------- taking replies in

    def take_in(self, flight: Flight) -> None:
        """Give every call of the flight its answer, or put it into its lane, to be tried again."""
        calls: list[Call] = flight.calls
        reply = flight.reply
        flight.told = True
        if flight.error is not None:
            self.give_up(calls, flight.error)
        elif type(reply) is Refusal:
            self._refuse(calls, reply, flight)
        elif calls[0].turn.keys is None:
            self._finish_whole(calls, reply)
        elif type(reply) is list:
            for call, found in zip(calls, reply, strict=False):
                self._finish(call, found)
            if len(reply) > len(calls) and reply[-1]:
                self._store.note_published(reply[-1])
        else:
            self._finish(calls[0], reply)  # HGET

    def end_pauses(self) -> None:
        """The engine closes, and no timer will tell when a pause is over: whoever pauses goes on at once."""
        for lane in self.lanes.values():
            if lane.due != NEVER:
                lane.due = 0.0

    def end_looks(self) -> None:
        """Those who look at keys were cut short, and nothing is on its way: who waits behind them looks for himself."""
        for lane in self.lanes.values():
            if lane.due == NEVER:
                lane.due = 0.0

    def give_up(self, calls: Iterable[Call], error: ScopestateError) -> None:
        """Fail the calls."""
        for call in calls:
            turn = call.turn
            call.fail(error)
            if turn.writes:
                self._seen.forget(turn.key)
                lane = self.lanes.get(turn.key)
                if lane is not None and lane.due == NEVER:
                    lane.due = 0.0  # those behind it look for themselves

    def _refuse(self, calls: list[Call], refusal: Refusal, flight: Flight) -> None:
        """Fail the calls of a command that the server refuses: reads and writes are told what concerns them."""
        address, parts = flight.link.address, flight.parts
        writes = [call for call in calls if call.turn.writes]
        if writes:
            self.give_up(writes, explain(refusal, address, *keys_of(parts)))
        if len(writes) < len(calls):
            reads = [call for call in calls if not call.turn.writes]
            self.give_up(reads, explain(refusal, address, self.hash_key, nothing=""))

    def _finish(self, call: Call, found: Any) -> None:
        """Take in what the script, or HGET, says of one call."""
        turn = call.turn
        kind, key = type(turn), turn.key
        if type(found) is int and found == SKIPPED:
            self._lane(key, 0.0, keep=True).calls.append(call)  # behind the update that failed
        elif kind is turns.Set:
            # A value that is not JSON reads as null here, and is gone: docs/semantics.md, section 7.
            old = None if found is None else self._seen.valid(key, found, otherwise=b"null")
            self._seen.remember(key, (turn.data, turn.data))
            call.answer = SetResult(old, turn.data)
            call.done = True
            self._changed(call, old, turn.data)
        elif kind is turns.Update:
            self._finish_update(call, found)
        elif kind is turns.Delete:
            call.answer = old = None if found is None else self._seen.valid(key, found, otherwise=b"null")
            self._seen.remember(key, NOTHING)
            call.done = True
            self._changed(call, old, None)
        else:
            try:
                call.answer = self._seen.look(key, found)[1]
                call.done = True
            except DeserializationError as error:
                call.fail(error)

    def _finish_update(self, call: Call, found: Any) -> None:
        key = call.turn.key
        if call.after is None:
            lane = self._lane(key, 0.0)
            try:
                lane.known = self._seen.look(key, found)
                lane.calls.appendleft(call)
            except DeserializationError as error:
                call.fail(error)
            return
        self._store.note_attempt()
        if type(found) is int and found == DONE:
            self._seen.remember(key, (call.after, call.after))
            call.answer = UpdateResult(call.before, call.after, call.problems)
            call.done = True
            self._changed(call, call.before, call.after)
            if self._rivalries and key in self._rivalries:
                self._rest(key)
            return
        self._store.note_conflict()
        self._seen.forget(key)
        call.tries += 1
        now = time.monotonic()
        if len(self._rivalries) >= _MOST_RIVALRIES:
            self._rivalries.clear()
        self._rivalries[key] = (0.0, now + _RIVALRY_S)
        longest_s = min(_PAUSE_S[0] * 2.0 ** min(call.tries - 1, 32), _PAUSE_S[1])
        # Later calls on this key were skipped, and follow into the same lane.
        lane = self._lane(key, now + random.uniform(0, longest_s))
        if call.tries < self._store.update_attempts:
            lane.calls.appendleft(call)
        else:
            call.fail(contended(self._scope, key, call.tries))

    def _lane(self, key: str, due: float, *, keep: bool = False) -> Lane:
        """Return the lane of a key, due then; what waits in it stays."""
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(due)
        elif not keep:
            lane.due = due
        return lane

    def _rest(self, key: str) -> None:
        """After an update of a key that others update too: let them, from time to time."""
        now = time.monotonic()
        rest_at, over_at = self._rivalries[key]
        if now > over_at:
            del self._rivalries[key]
        elif rest_at == 0.0:
            self._rivalries[key] = (now + _HOLD_S, over_at)
        elif now > rest_at and key not in self.lanes:
            self._rivalries[key] = (0.0, over_at)
            self._seen.forget(key)  # it has to look afterwards
            self.lanes[key] = Lane(due=now + _REST_S)

    def _finish_whole(self, calls: list[Call], reply: list[bytes]) -> None:
        items: list[tuple[str, bytes]] = []
        misfits: list[str] = []
        for field, raw in zip(reply[::2], reply[1::2], strict=True):
            try:
                key = field.decode()
                items.append((key, self._seen.valid(key, raw)))
            except UnicodeDecodeError:
                misfits.append(repr(field))
                self._seen.note_misfit(repr(field), "the key is not UTF-8")
            except DeserializationError as error:
                misfits.append(key)
                log.error("a list of scope %r leaves a key out: %s", self._scope, error)  # noqa: TRY400 - it says all
        # By key, in the order of its UTF-8 bytes, which is that of code points: Redis keeps no order of its own.
        items.sort()
        self._seen.note_gone(misfits)
        for call in calls:
            call.answer = list(items) if type(call.turn) is turns.Items else [value for _, value in items]
            call.done = True


def _too_large(key: str, data: bytes) -> StorageError:
    return StorageError(
        f"the value for key {key!r} takes {len(data)} bytes as JSON, and Redis takes {_LARGEST_BYTES} at most; nothing "
        "was written: split it over several keys"
    )
