"""Turns that run a function of the program, or must see the whole scope to know their keys.

Such a function may take any time, so it runs on its caller's thread, never on one that drives a connection. One command
(`Commit`) compares the values that it has read, and stores its changes. If a key has changed, it runs again; if it asks
for a key that was not read yet, it is stopped there, and runs again with that key.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections import deque
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, TypeVar

from scopestate.actors.callbacks import IN_CALLBACK, refuse_in_callback
from scopestate.errors import Conflict, ConnectionLost, KeyConflict, ReplyTimeout, StorageError, WouldDeadlock
from scopestate.ops.ranges import ALL, Count, DeleteRange, Entries, Keys, Pairs, ReadPage, State, Values
from scopestate.ops.transactions import Transact
from scopestate.ops.turns import Effects, Items, Turn
from scopestate.ops.writes import Modify, Once, unwrapped
from scopestate.persistence.redis.commands import MOST_REPEATS
from scopestate.persistence.redis.seen import NOTHING, EntryView, NotSeen
from scopestate.persistence.redis.transacting import Commit, Look, ReadRange, Replay, number_answer
from scopestate.signals import SLICE_S, certainly, wait_for

if TYPE_CHECKING:
    from scopestate.persistence.redis.scope import RedisScope

A = TypeVar("A")

_OF_FUNCTIONS: Final = frozenset({Modify, Transact, DeleteRange})
_HOLDER: Final = "holder"
_PAUSE_S: Final = (0.001, 0.064)
"""Longest pause after the first conflict, and after any; it is drawn at random from zero up."""


def has_function(turn: Turn[Any]) -> bool:
    """Return whether `Functions.run` runs a turn."""
    kind = type(turn)
    return kind in _OF_FUNCTIONS or (kind is Once and type(unwrapped(turn)) in _OF_FUNCTIONS)


class Functions:
    """Runs the functions of one scope, one at a time: those of one engine would only conflict with each other."""

    def __init__(self, scope: RedisScope, attempts: int) -> None:
        """`attempts`: how often a function is run at most because of conflicts."""
        self._scope = scope
        self._attempts = attempts
        self._claim: dict[str, list[int]] = {}
        self._waiting: deque[Any] = deque()
        """The locks of threads that wait for the claim, in order."""

    def run(self, turn: Turn[A], depth: int) -> A:
        """Run a turn, and wait until it is done.

        With an idempotency key it is started again if the connection was lost.

        Raises what its function raises; then nothing was stored. Raises Conflict if keys that it reads were changed
        elsewhere in every attempt.
        """
        if IN_CALLBACK:
            refuse_in_callback()
        ticket = [get_ident()]
        try:
            self._take(ticket)
            answer = self._repeatedly(turn, depth)
            self._give_back(ticket)
            return answer
        except BaseException:
            # Not `finally`: an interruption at its first step would leave the claim taken.
            certainly(lambda: self._give_back(ticket))
            raise

    def _repeatedly(self, turn: Turn[A], depth: int) -> A:
        for _ in range(MOST_REPEATS if type(turn) is Once else 0):
            try:
                return self._run(turn, depth)
            except StorageError as error:
                if not isinstance(error.__cause__, ConnectionLost):
                    raise
        return self._run(turn, depth)

    # ------------------------------------------------------------------------------------------------ one at a time

    def _take(self, ticket: list[int]) -> None:
        claim, timeout_s = self._claim, self._scope.call_timeout_s
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while claim.setdefault(_HOLDER, ticket) is not ticket:
            if claim.get(_HOLDER) == ticket:
                raise self._refuse_reentrance()
            lock = threading.Lock()
            lock.acquire()
            self._waiting.append(lock)
            if _HOLDER not in claim:
                continue  # given back in the meantime, and perhaps no lock was found
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise ReplyTimeout(self._scope.scope, timeout_s or 0.0)
            # From time to time in any case: an interrupted thread may have consumed the wake-up.
            wait_for(functools.partial(_acquire, lock), SLICE_S if left_s is None else min(left_s, SLICE_S))

    def _give_back(self, ticket: list[int]) -> None:
        if self._claim.get(_HOLDER) is ticket:
            del self._claim[_HOLDER]
        if self._waiting and _HOLDER not in self._claim:
            try:
                self._waiting.popleft().release()
            except IndexError:
                return

    def _refuse_reentrance(self) -> WouldDeadlock:
        return WouldDeadlock(
            f"a call of {self._scope.name} that runs a function was made within a signal handler that has interrupted "
            "another one: it would wait for itself; nothing was done: let the handler set a flag"
        )

    # ---------------------------------------------------------------------------------------------------- attempts

    def _run(self, turn: Turn[A], depth: int) -> A:
        scope, conflicts = self._scope, 0
        view = scope.view_of_seen()
        while True:
            effects, error = self._attempt(turn, view)
            if not view.missing and effects is not None:
                stored, answer = effects
                if view.replay is not None and not stored:
                    return _numbered(turn, answer, view.replay.revision)
                if not view.used and not stored:
                    return answer
                number = scope.call(Commit(view, stored), depth)
                if isinstance(number, Replay):
                    view = self._look(turn, view, depth)
                    continue
                if number is not None:
                    return _numbered(turn, answer, number)
                conflicts += 1
                if conflicts >= self._attempts:
                    raise self._conflict(view, conflicts)
                scope.pause(random.uniform(0, min(_PAUSE_S[0] * 2.0 ** min(conflicts, 16), _PAUSE_S[1])))
            elif error is not None and self._is_final(turn, view):
                raise error
            before, view = view, self._look(turn, view, depth)
            if error is not None and not before.missing and view.replay is None and _is_same(before, view):
                # Also an exception of a signal handler: it must not be lost because the function runs again.
                raise error

    def _is_final(self, turn: Turn[Any], view: EntryView) -> bool:
        """Return whether an exception is the answer: it was not caused by a value that may be old or was not read."""
        return not (view.missing or view.recalled or (type(turn) is Once and view.answers is None))

    def _attempt(self, turn: Turn[A], view: EntryView) -> tuple[Effects[A] | None, BaseException | None]:
        """Call `decide` of the turn. Returns its effects, or the exception that it raised."""
        try:
            rule = self._scope.rule
            return turn.decide(view) if rule.values is None else rule.values.decide(turn, view), None
        except (NotSeen, Exception) as error:  # noqa: BLE001 - of the program: see `_is_final`
            return None, error

    def _look(self, turn: Turn[Any], view: EntryView, depth: int) -> EntryView:
        """Return a view with the current state of everything that the last attempt has read, or asked for."""
        call = self._scope.call
        names = list(view.used)
        names += [name for name in view.missing if isinstance(name, str)]
        idempotency_key = turn.idempotency_key if isinstance(turn, Once) else None
        ranges = [*view.ranges, *[asked for asked in view.missing if isinstance(asked, tuple)]]
        needs_time = not names and (None in view.missing or not ranges)
        if names or needs_time or idempotency_key is not None:
            # Without a key, any name will do: the reply has the server's time.
            looked: EntryView = call(Look(tuple(names) or ("",), idempotency_key), depth)
            if not names:
                looked.known.clear()
        else:
            looked = self._scope.view_of_seen().without_recall()
        stamps = set()
        for within, counts in ranges:
            found = self._scope.read(ReadRange(within, "c" if counts else "e"), depth)
            looked.ranges[within, counts] = found.total if counts else found.names
            looked.known.update(found.known)
            looked.unchanged = found.unchanged
            stamps.add(found.unchanged)
        if len(stamps) > 1:
            looked.unchanged = "changed"  # they changed while they were read, so they match no state of the scope
        return looked

    def _conflict(self, view: EntryView, conflicts: int) -> Conflict:
        keys = tuple(view.used) or ("",)
        conflict = Conflict(self._scope.scope, [KeyConflict(place, key, None, 0) for place, key in enumerate(keys)])
        conflict.__cause__ = StorageError(f"a key that the function reads was changed elsewhere {conflicts} times")
        return conflict


def _is_same(before: EntryView, now: EntryView) -> bool:
    """Return whether everything that was read still has the same value."""
    return all(
        now.known.get(key, NOTHING)[0] == known[0]
        and before.is_lapsed(known) == now.is_lapsed(now.known.get(key, NOTHING))
        for key, known in before.used.items()
    )


def _acquire(lock: Any, slice_s: float) -> bool:
    return bool(lock.acquire(timeout=slice_s))


def _numbered(turn: Turn[A], answer: A, revision: int) -> A:
    """Return the answer with its revision. The result of a transaction's function is returned unchanged."""
    if revision and type(unwrapped(turn)) is not Transact:
        number_answer(answer, revision)
    return answer


def read_range(scope: RedisScope, turn: Any, depth: int) -> Any:
    """Run a turn that reads keys in order."""
    kind = _KINDS[type(turn)]
    if kind == "v" and turn.within == ALL:
        # Python sorts the keys, not the server, which would do nothing else for seconds with 1 M keys.
        items = scope.call(Items(), depth)
        return items if type(turn) is Pairs else [data for _, data in items]
    view = scope.view_of_seen().without_recall()
    if type(turn) is State:
        # Its revision and its entries are of one moment. Without entries, any read returns the revision.
        entries = turn.within.limit != 0
        found = scope.read(ReadRange(turn.within if entries else ALL, "e" if entries else "c"), depth)
        view = scope.view_of_seen().without_recall(found.now_ms)
        view.revision = int(found.unchanged.partition(":")[0] or 0)
        view.ranges[turn.within, False] = found.names
        view.known.update(found.known)
    while True:
        try:
            values = scope.rule.values
            return turn.decide(view)[1] if values is None else values.decide(turn, view)[1]
        except NotSeen:
            # Once for most turns, but all ranges of a turn must be of one moment.
            (asked,) = view.missing
            assert isinstance(asked, tuple)
            found = scope.read(ReadRange(asked[0], kind), depth)
            view = scope.view_of_seen().without_recall(found.now_ms)
            view.ranges[asked] = found.total if asked[1] else found.names
            view.known.update(found.known)


_KINDS: Final[dict[type[Any], str]] = {
    Keys: "k",
    Count: "c",
    Pairs: "v",
    Values: "v",
    Entries: "e",
    ReadPage: "e",
    State: "e",
}
RANGED: Final = frozenset(_KINDS)
"""Turns that `read_range` does."""
