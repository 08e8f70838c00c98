"""The actor of a scope with many keys, which are read from the store when a call needs them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final, TypeVar

from scopestate.actors.containment import Log
from scopestate.actors.index import OrderedKeys, TooLong
from scopestate.actors.keyed_view import Changes, Keyed, KeyedApart, is_long, is_of_everything, keys_read
from scopestate.actors.local import WAYS, LocalScope
from scopestate.actors.ports import ScopeState, StoredKeys
from scopestate.actors.reply import Envelope
from scopestate.actors.scope import Housekeeping, ScopeActor, Surroundings
from scopestate.actors.stretch import NO_DEADLINES, Collected, part, remover
from scopestate.actors.view import Apart, InMemory, Unexpired, WithDeadlines
from scopestate.actors.wheel import NEVER, Wheel
from scopestate.errors import StorageError
from scopestate.ops.ranges import Keys
from scopestate.ops.turns import Range, Turn
from scopestate.wire.depth import event_depth

A = TypeVar("A")

log = Log("scopestate.persistence")

LOADED_WHOLE: Final = 4_000
"""A scope with at most this many keys is loaded whole at its first call, in about 5 ms; turns then need no store."""
FIRST_LOOK: Final = 1_000
"""After this many turns, and each time their number has doubled, the engine looks whether loading the whole scope takes
less time than the turns have taken. Afterwards turns are as quick as those of a small scope."""
LISTS: Final = 3
"""The whole scope is loaded when all of it has been listed this often."""
_KEYS_OF_A_TURN: Final = 5
"""Loading this many keys takes about as long as one turn."""
_TURNS_OF_A_KEY: Final = 10
"""Reading a key from the store takes about as long as this many turns that read none."""
_FIRST_KEY: Final = Keys(Range(limit=1))
_NO_ORDER: Final = OrderedKeys({}, lambda: 0)
_NOTHING: Final[dict[str, None]] = {}

_ENTRY_BYTES: Final = 165
"""About what a key of 16 characters and its numbers take in memory, beside its value and its places in the tables."""
_SAMPLE: Final = 16
_SAMPLED_FROM: Final = 20_000
"""Samples are taken among so many values at either end of the table: that takes 0.1 ms at most."""
_STEP: Final = 7919
_WEIGHT: Final = 0.25
"""How much a sample counts in the mean of all of them."""
_GONE_AT_ONCE: Final = 10_000
"""Keys that leave memory in one turn, in a few milliseconds."""
_REST: Final = 4
"""After a search of the whole table that has not found enough, the next one begins after so many times its length."""
_ROOM_BYTES: Final = 300
"""Bytes of a table for each of its keys: a dict that only grows takes at most half of that."""
_SMALL_TABLE: Final = 1 << 16
_ALL: Final = (NEVER, 0)
_DUE_AT_ONCE: Final = 1000
"""Deadlines that are read together, in a few milliseconds."""
_SOON_MS: Final = 60_000
"""Keys that expire within this time stay in memory, where they are needed then."""


class Shed(Housekeeping[int], frozen=True):
    """Some keys are to leave memory. Answer: about how many bytes they have taken."""

    bytes: int


class LoadWhole(Housekeeping[None], frozen=True):
    """Load the whole scope: it is used so often that this is worth the time."""


class KeyedScope(LocalScope):
    """A scope of which all keys, or only those that were needed so far, are in memory.

    A scope with many keys begins with no key in memory. Before a turn, the keys that it touches are read from the store
    into the tables. Then the turn runs as on a scope in memory, on a view that reads other keys if it needs them. While
    only a part is in memory, `_view` is None, so that every turn and every reader goes through `_without_values`. The
    tables have everything that differs from the store, and a copy of some of the rest:

    - A key in `_values` is current.
    - A key that is not in `_values`, but in `_dirty` or `_unsaved`, is deleted.
    - Any other key is as the store has it.

    `_deadlines` may also have keys that are not in `_values`: those that expire next.

    docs/design/0081-scopes-larger-than-memory.md has the reasons.
    """

    __slots__ = (
        "_asked_whole",
        "_behind",
        "_hand",
        "_is_large",
        "_kept",
        "_keyed",
        "_lists",
        "_look_at",
        "_mean",
        "_recent",
        "_searched_s",
        "_skip",
        "_stored",
        "_turns",
        "_unsaved",
        "is_shedding",
        "rests_until_s",
    )

    def __init__(self, scope: str, around: Surroundings, stored: StoredKeys, *, gated: bool = False) -> None:
        """`stored` reads the keys of the store."""
        self._stored = stored
        self._keyed: Keyed | None = None
        """The view for turns while only a part is in memory; None: the whole scope is in memory, or nothing."""
        self._unsaved = _NOTHING
        """Keys that were collected and are not saved yet. The actor that saves replaces it by an empty dict."""
        self._behind = _ALL
        """A deadline, and the number of the write that created its key: what the store has up to here is in memory."""
        self._is_large = False
        """True if the state that was read last is one without keys."""
        self._turns = 0
        self._look_at = FIRST_LOOK
        self._lists = 0
        self._asked_whole = False
        self._recent: dict[str, None] = {}
        """Keys that were used since the search for keys that may leave memory has begun at the first key."""
        self._kept: dict[str, None] = {}
        """Those that were used between its beginning before that and this one."""
        self._hand = -1
        """Where it goes on: a place in the table of values; -1: it begins anew."""
        self._searched_s = 0.0
        """When it has begun at the first key."""
        self.is_shedding = False
        """True while it goes on in the next turns."""
        self.rests_until_s = 0.0
        """When the next search may begin, by the dispatcher's clock."""
        self._mean = 0.0
        """The mean size of the values in samples."""
        self._skip = 0
        """Where the last sample began."""
        super().__init__(scope, around, keeps=True, gated=gated)

    # -------------------------------------------------------------------------------------------------------- ways in

    def _has_keys_of(self, turn: object) -> bool:
        """True if a part of the scope is in memory that has all keys of the turn. May be called from any thread."""
        values = self._values
        if self._keyed is None or values is None or not isinstance(turn, Turn) or (keys := turn.keys) is None:
            return False
        dirty, unsaved = self._dirty or _NOTHING, self._unsaved
        return all(key in values or key in dirty or key in unsaved for key in keys)

    def holds_keys(self) -> bool | None:
        if self._keyed is None:
            return super().holds_keys()
        return bool(self.run(_FIRST_KEY))

    # ---------------------------------------------------------------------------------------------------------- turns

    def _without_values(self, turn: Turn[A]) -> A:
        if self._keyed is None:
            if not self._closed and not self._passivated:
                self._load(turn)
                if self._keyed is None:
                    return self.on_receive(turn)
            else:
                return super()._without_values(turn)
        if self._closed:
            self._refuse_if_closed(event_depth.get())
        return self._run_by_key(turn)

    def _serve_handler(self, turn: Turn[A]) -> A:
        if self._left is None:
            self._refuse_if_closed(event_depth.get())
            self._load(turn)
            if self._keyed is not None:
                return self._run_by_key(turn)
            self._left = self._values
        return super()._serve_handler(turn)

    def _run_by_key(self, turn: Turn[A]) -> A:
        keyed, keys = self._keyed, turn.keys
        assert keyed is not None  # the caller has checked
        try:
            if keys is not None:
                keyed.begin(None)
                if self._around.limits.max_resident_bytes:
                    self._note_used(keys)
                brought = self.bring(keys)
            elif is_long(turn) and not self._closed:
                raise TooLong  # it reads outside of turns
            else:
                brought = keys_read(turn)
                keyed.begin(turn)
        except StorageError as error:
            raise turn.failed(error) from error
        self._count(brought)
        way = WAYS.get(type(turn))
        try:
            answer: A = self._decide(turn) if way is None else way(self, turn)
        except StorageError as error:
            if error.code != StorageError.code:
                raise
            raise turn.failed(error) from error  # it was reading the store
        return answer

    def _apart(self, turn: Turn[Any]) -> Any:
        keyed, values, wheel = self._keyed, self._values, self._wheel
        if keyed is None or values is None or wheel is None or self._closed or self._passivated:
            return super()._apart(turn)
        # First: what is saved in between is among the copies, and in the store.
        changed = self.changed()
        tables = [part(table, changed) for table in (self._revisions, self._created, self._deadlines)]
        revisions, created, deadlines = tables
        around, changes = self._around, Changes(self.scope, changed)
        copies = part(values, changed)
        try:
            stored, end = self._stored.at_one_moment(self.scope)
        except StorageError as error:
            raise turn.failed(error) from error
        view = KeyedApart(changes, around, stored, copies, revisions, created, self._answers.kept, deadlines, wheel)
        view.begin(turn)
        view.revision, view.now = self._sequence, around.clock.now_ms()
        if is_of_everything(turn):
            self._count_list()
        return Apart(turn, view, self.rule, end)

    def _count_list(self) -> None:
        """Count a list of the whole scope, and ask for the whole scope if it is not the first one."""
        self._lists += 1
        if self._lists == LISTS and not self._asked_whole and not self._around.limits.max_resident_bytes:
            self._asked_whole = True
            self._enqueue(Envelope(LoadWhole(), self._dispatcher.reply()))

    def _note_used(self, keys: Iterable[str]) -> None:
        """Note that keys were used again, if they are in memory: they leave it later than others."""
        values, recent = self._values, self._recent
        assert values is not None  # within a turn
        for key in keys:
            if key in values:
                recent[key] = None
        if len(recent) > 2 * len(values) + _SAMPLE:
            self._recent = {}  # most of them were deleted

    def _count(self, brought: int) -> None:
        """Count a turn that has read this many keys. Ask for the whole scope after many turns for its size."""
        self._turns += 1 + _TURNS_OF_A_KEY * brought
        limited = self._around.limits.max_resident_bytes
        if self._turns > self._look_at and not self._asked_whole and not self._closed and not limited:
            self._look_at = 2 * self._turns
            if self._is_worth_loading():
                self._asked_whole = True
                self._enqueue(Envelope(LoadWhole(), self._dispatcher.reply()))

    def _count_anew(self) -> None:
        self._turns, self._look_at, self._lists, self._asked_whole = 0, FIRST_LOOK, 0, False

    def _is_worth_loading(self) -> bool:
        try:
            return self._stored.begin(self.scope, int(_KEYS_OF_A_TURN * self._turns)) is None
        except StorageError:
            return False  # this turn does not need the store

    def bring(self, keys: Iterable[str]) -> int:
        """Read keys that are not in memory. Returns how many those were. Within a turn. Raises StorageError."""
        values, dirty, unsaved = self._values, self._dirty or _NOTHING, self._unsaved
        assert values is not None  # within a turn
        missing = [key for key in keys if key not in values and key not in dirty and key not in unsaved]
        if not missing:
            return 0
        rows = self._stored.rows(self.scope, list(dict.fromkeys(missing)))
        if rows:
            new = {key: row.json for key, row in rows.items()}
            numbers = {key: row.revision for key, row in rows.items()}
            first = {key: row.created for key, row in rows.items()}
            times = {key: row.expires_ms for key, row in rows.items() if row.expires_ms is not None}
            revisions, created, deadlines = self._revisions, self._created, self._deadlines
            if times:
                self._place_all(times)
            take_back = remover((values, new), (revisions, new), (created, new), (deadlines, new))
            # A stretch, as in `actors/stretch.py`.
            try:
                revisions |= numbers
                created |= first
                deadlines |= times
                values |= new
            except MemoryError:
                take_back()
                raise
        return len(missing)

    def bring_due(self, now_ms: int) -> int:
        """Read the next deadlines, if those in memory may not be the first. All up to the returned time are there.

        Within a turn. Raises StorageError.
        """
        wheel, deadlines = self._wheel, self._deadlines
        if self._behind[0] > now_ms or (wheel is not None and wheel.next_due() < self._behind[0]):
            return self._behind[0]
        found = self._stored.due(self.scope, self._behind, _DUE_AT_ONCE)
        values, changed = self._values or _NOTHING, self.changed()
        times = {key: ms for ms, _, key in found if not (key in values or key in changed or key in deadlines)}
        if times:
            self._place_all(times)
        behind = found[-1][:2] if len(found) == _DUE_AT_ONCE else _ALL
        # A stretch.
        deadlines |= times
        self._behind = behind
        return behind[0]

    def drop_deadlines(self, keys: Iterable[str]) -> None:
        """Drop the deadlines of keys that do not exist: the store was changed by another program. Within a turn."""
        gone = [*keys]
        remover((self._deadlines, gone))()
        if self._wheel is not None:
            self._wheel.forget_all(gone)

    def next_due(self) -> int:
        behind_ms = self._behind[0]  # first: what is read from the store moves from here into the wheel
        return min(behind_ms, super().next_due())

    def changed(self) -> dict[str, None]:
        """Return the keys that may differ from the store, deleted ones too. Within a turn."""
        changed = {**self._unsaved, **(self._dirty or _NOTHING)}
        if self.pinned:
            changed.update(dict.fromkeys(self._values or ()))  # some of these may be nowhere else
        return changed

    # ------------------------------------------------------------------------------------------------ parts, and all

    def _read(self) -> ScopeState:
        state = self._stored.begin(self.scope, LOADED_WHOLE)
        self._is_large = state is not None
        return super()._read() if state is None else state

    def _have(self, state: ScopeState) -> None:
        if not self._is_large:
            super()._have(state)
            return
        values, revisions, created = dict[str, bytes](), dict[str, int](), dict[str, int]()
        deadlines = dict[str, int]()
        wheel = Wheel(deadlines)
        keyed = self._part_view(values, revisions, created, deadlines, wheel)
        behind = _ALL if state.due_ms is None else (state.due_ms, 0)
        self.readable = None
        # A stretch.
        self._values = values
        self._revisions = revisions
        self._created = created
        self._deadlines = deadlines
        self._wheel = wheel
        self._behind = behind
        self._timed_view = keyed
        self._keyed = keyed

    def _load_whole(self) -> None:
        """Load the whole scope into memory. Within a turn. Raises StorageError."""
        state = self._whole()
        values, revisions, deadlines = state.values, state.revisions, state.deadlines or NO_DEADLINES
        around = self._around
        ordered = OrderedKeys(values, self._creations_now)
        view = InMemory(self.scope, around, ordered, values, revisions, self._answers.kept)
        wheel = unexpired = timed = None
        if deadlines:
            wheel = Wheel(deadlines)
            wheel.fill(around.clock.now_ms())
            unexpired = Unexpired(values, deadlines, wheel, around.clock.now_ms, lambda: self._sequence)
            timed = WithDeadlines(self.scope, around, ordered, values, revisions, self._answers.kept, deadlines, wheel)
        closed = self._closed
        self._count_anew()
        self._recent, self._kept, self._hand = {}, {}, -1
        # A stretch.
        self._values = values
        self._revisions = revisions
        self._created = state.created
        self._deadlines = deadlines
        self._wheel = wheel
        self._behind = _ALL
        self._unexpired = unexpired
        self._timed_view = timed
        self._ordered = ordered
        if closed:
            self._left = values
        else:
            self._view = view
        self._keyed = None
        # The stretch has ended.
        self._allow_reading()

    def _whole(self) -> ScopeState:
        """Return the state in the store, changed by everything that differs from it in memory."""
        store, values = self._around.store, self._values
        assert store is not None  # it is kept
        assert values is not None  # within a turn
        changed = self.changed()
        state = store.load(self.scope)
        gone = [key for key in changed if key not in values and key in state.values]
        new: list[tuple[int, str]] = []
        for key, data in values.items():
            place = self._created[key]
            if state.created.get(key) == place:
                state.values[key], state.revisions[key] = data, self._revisions[key]
                if key in self._deadlines:
                    state.deadlines[key] = self._deadlines[key]
                else:
                    state.deadlines.pop(key, None)
            else:
                new.append((place, key))
                if key in state.values:
                    gone.append(key)
        for key in gone:
            for table in (state.values, state.revisions, state.created, state.deadlines):
                table.pop(key, None)
        for place, key in sorted(new):
            state.values[key], state.revisions[key], state.created[key] = values[key], self._revisions[key], place
            if key in self._deadlines:
                state.deadlines[key] = self._deadlines[key]
        return state

    # ---------------------------------------------------------------------------------------------- leaving memory

    def resident_bytes(self) -> int:
        """Return about how much memory the keys and values take. From any thread."""
        values = self._values
        if not values:
            return 0
        start = self._skip = (self._skip + _STEP) % min(len(values), _SAMPLED_FROM)
        try:
            sample = list(islice(values.values(), start, start + _SAMPLE))
            sample += islice(reversed(values.values()), start, start + _SAMPLE)
        except RuntimeError:  # a key came or went in between
            sample = []
        if sample:
            found = sum(map(len, sample)) / len(sample)
            self._mean = self._mean + _WEIGHT * (found - self._mean) if self._mean else found
        return len(values) * (_ENTRY_BYTES + round(self._mean)) + self._table_bytes(values)

    def unsaved_count(self) -> int:
        """Return how many keys have changes that no save has begun with. From any thread."""
        return len(self._dirty or _NOTHING)

    def _table_bytes(self, values: dict[str, bytes]) -> int:
        # `_revisions` and `_created` are as large as `_values`.
        return 3 * sys.getsizeof(values) + sys.getsizeof(self._recent) + sys.getsizeof(self._kept)

    def _shed(self, wanted: int) -> int:
        """Let keys leave memory, which the store has as they are. Within a turn."""
        self.is_shedding = False
        values = self._values
        if values is None or self._closed or self._passivated or self.pinned:
            return 0
        if self._keyed is None and (self._is_saving() or not self._become_part()):
            return 0
        if self._hand < 0:
            self._searched_s = self._dispatcher.monotonic()
        gone = self._choose()
        each = _ENTRY_BYTES + self._table_bytes(values) // max(1, len(values))
        size = each * len(gone) + sum([len(values[key]) for key in gone])
        if gone:
            deadlines = self._deadlines
            timed = [key for key in gone if key in deadlines]
            for key in timed:
                self._behind = min(self._behind, (deadlines[key], 0))  # first: they are read again from there
            # One step, as it is written in C.
            remover((values, gone), (self._revisions, gone), (self._created, gone), (deadlines, timed))()
            if timed:
                self._wheel.forget_all(timed)  # type: ignore[union-attr]  # there are deadlines
                self._expect()  # another thread may have looked at the wheel in between
        if size < wanted and self._hand >= 0:
            self._enqueue(Envelope(Shed(wanted - size), self._dispatcher.reply()))
            self.is_shedding = True
        else:
            if self._hand < 0:
                now_s = self._dispatcher.monotonic()
                self.rests_until_s = now_s + _REST * (now_s - self._searched_s)
            self._shrink_tables()
        return size

    def _is_saving(self) -> bool:
        """True if the scope is whole and some of its keys are being saved: which ones is not known."""
        return self._saving or (self._gate is not None and self._gate.is_waiting())

    def _shrink_tables(self) -> None:
        """Copy the tables if they have room for many more keys than there are. Within a turn.

        A dict from which keys are removed keeps its size.
        """
        values = self._values
        assert values is not None  # within a turn
        if sys.getsizeof(values) <= max(_SMALL_TABLE, _ROOM_BYTES * len(values)):
            return
        try:
            values, revisions, created = values.copy(), self._revisions.copy(), self._created.copy()
            keyed = self._part_view(values, revisions, created, self._deadlines, self._wheel)
        except MemoryError:
            return  # the tables stay as they are
        # A stretch.
        self._values = values
        self._revisions = revisions
        self._created = created
        self._timed_view = keyed
        self._keyed = keyed

    def _choose(self) -> list[str]:
        """Return keys that may leave memory. The search goes on where it has ended.

        It passes the keys that were used since it has begun at the first key the last time: so they stay if they are
        used again before it comes back.
        """
        values, dirty, unsaved, deadlines = self._values, self._dirty or _NOTHING, self._unsaved, self._deadlines
        assert values is not None  # within a turn
        if self._hand < 0:
            self._kept, self._recent, self._hand = self._recent, {}, 0
        kept, recent, soon_ms = self._kept, self._recent, self._around.clock.now_ms() + _SOON_MS
        looked_at = list(islice(values, self._hand, self._hand + _GONE_AT_ONCE))
        gone = [
            key
            for key in looked_at
            if not (key in kept or key in recent or key in dirty or key in unsaved)
            and deadlines.get(key, NEVER) > soon_ms
        ]
        self._hand = self._hand + len(looked_at) - len(gone) if len(looked_at) == _GONE_AT_ONCE else -1
        return gone

    def _become_part(self) -> bool:
        """Go on as a scope of which a part is in memory, which is all of it at first. Within a turn."""
        values = self._values
        assert values is not None  # the caller has looked
        if not self._stored.is_ready():
            return False
        deadlines = self._deadlines if self._deadlines is not NO_DEADLINES else {}
        wheel = self._wheel if self._wheel is not None else Wheel(deadlines)
        keyed = self._part_view(values, self._revisions, self._created, deadlines, wheel)
        self.readable = None  # before keys can be missed
        self._count_anew()
        self._unsaved, self._recent, self._hand = _NOTHING, {}, -1
        # A stretch.
        self._deadlines = deadlines
        self._wheel = wheel
        self._unexpired = None
        self._timed_view = keyed
        self._ordered = _NO_ORDER
        self._keyed = keyed
        self._view = None
        return True

    def _part_view(
        self,
        values: dict[str, bytes],
        revisions: dict[str, int],
        created: dict[str, int],
        deadlines: dict[str, int],
        wheel: Wheel | None,
    ) -> Keyed:
        """Return the view for turns while these tables are what is in memory."""
        assert wheel is not None  # of a scope of which a part is in memory
        return Keyed(self, self._around, self._stored, values, revisions, created, self._answers.kept, deadlines, wheel)

    def _allow_reading(self) -> None:
        if self._keyed is None:
            super()._allow_reading()

    def _begin_deadlines(self) -> None:
        if self._keyed is None:
            super()._begin_deadlines()

    def _hold(self, values: dict[str, bytes] | None) -> None:
        self._keyed = None
        super()._hold(values)

    # --------------------------------------------------------------------------------------------- saving and leaving

    def _housekeep(self, message: Housekeeping[Any]) -> Any:
        if isinstance(message, Shed):
            return self._shed(message.bytes)
        if not isinstance(message, LoadWhole):
            return super()._housekeep(message)
        if self._keyed is not None and not self._closed:
            try:
                self._load_whole()
            except StorageError as error:
                log.warning("scope %r is not loaded whole, which is tried again: %s", self.scope, error)
                self._count_anew()
        return None

    def _close(self, handlers_may: bool) -> None:
        if self._keyed is None:
            super()._close(handlers_may)
        else:
            ScopeActor._close(self, handlers_may)  # handlers continue to use the part

    def collect(self) -> Collected | None:
        if self._keyed is not None and self._dirty:
            # Noted before the collection: until it is saved, a deleted key must not be read from the store.
            self._unsaved = {**self._unsaved, **self._dirty}
        return super().collect()

    def saved(self, sequence: int) -> None:
        super().saved(sequence)
        self._unsaved = _NOTHING

    def _forget(self) -> None:
        super()._forget()
        self._unsaved, self._behind = _NOTHING, _ALL
        self._count_anew()
        self._recent, self._kept, self._hand = {}, {}, -1
