"""The actor of a scope with many keys, which are read from the store when a call needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeVar

from scopestate.actors.containment import Log
from scopestate.actors.index import OrderedKeys
from scopestate.actors.keyed_view import Keyed, keys_read
from scopestate.actors.local import WAYS, LocalScope
from scopestate.actors.ports import ScopeState, StoredKeys
from scopestate.actors.reply import Envelope
from scopestate.actors.scope import Housekeeping, ScopeActor, Surroundings
from scopestate.actors.stretch import NO_DEADLINES, Collected, remover
from scopestate.actors.turn import BUSY
from scopestate.actors.view import InMemory, Unexpired, WithDeadlines
from scopestate.actors.wheel import Wheel
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
_KEYS_OF_A_TURN: Final = 5
"""Loading this many keys takes about as long as one turn."""
_TURNS_OF_A_KEY: Final = 10
"""Reading a key from the store takes about as long as this many turns that read none."""
_FIRST_KEY: Final = Keys(Range(limit=1))
_NOTHING: Final[dict[str, None]] = {}


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

    docs/design/0081-scopes-larger-than-memory.md has the reasons.
    """

    __slots__ = ("_asked_whole", "_is_large", "_keyed", "_look_at", "_stored", "_turns", "_unsaved")

    def __init__(self, scope: str, around: Surroundings, stored: StoredKeys, *, gated: bool = False) -> None:
        """`stored` reads the keys of the store."""
        self._stored = stored
        self._keyed: Keyed | None = None
        """The view for turns while only a part is in memory; None: the whole scope is in memory, or nothing."""
        self._unsaved = _NOTHING
        """Keys that were collected and are not saved yet. The actor that saves replaces it by an empty dict."""
        self._is_large = False
        """True if the state that was read last is one without keys."""
        self._turns = 0
        self._look_at = FIRST_LOOK
        self._asked_whole = False
        super().__init__(scope, around, keeps=True, gated=gated)

    # -------------------------------------------------------------------------------------------------------- ways in

    def run_now(self, turn: Turn[A]) -> A:
        if self._gate is None and self._has_keys_of(turn):
            answer: A = self._if_idle(self.on_receive, turn)
            return answer
        return super().run_now(turn)

    def send(self, envelope: Envelope) -> None:
        if not self._has_keys_of(envelope.message):
            super().send(envelope)
        elif self._if_idle(self._handle, envelope) is BUSY:
            self._refuse_own_turn()
            self.post(envelope)

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
                brought = self.bring(keys)
            elif brought := keys_read(turn):
                keyed.begin(turn)
            else:
                self._load_whole()
                return self.on_receive(turn) if not self._closed else self._serve_handler(turn)
        except StorageError as error:
            raise turn.failed(error) from error
        self._count(brought)
        way = WAYS.get(type(turn))
        answer: A = self._decide(turn) if way is None else way(self, turn)
        return answer

    def _count(self, brought: int) -> None:
        """Count a turn that has read this many keys. Ask for the whole scope after many turns for its size."""
        self._turns += 1 + _TURNS_OF_A_KEY * brought
        if self._turns > self._look_at and not self._asked_whole and not self._closed:
            self._look_at = 2 * self._turns
            if self._is_worth_loading():
                self._asked_whole = True
                self._enqueue(Envelope(LoadWhole(), self._dispatcher.reply()))

    def _count_anew(self) -> None:
        self._turns, self._look_at, self._asked_whole = 0, FIRST_LOOK, False

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
        keyed = Keyed(
            self, self._around, self._stored, values, revisions, created, self._answers.kept, deadlines, wheel
        )
        self.readable = None
        # A stretch.
        self._values = values
        self._revisions = revisions
        self._created = created
        self._deadlines = deadlines
        self._wheel = wheel
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
        # A stretch.
        self._values = values
        self._revisions = revisions
        self._created = state.created
        self._deadlines = deadlines
        self._wheel = wheel
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
        self._unsaved = _NOTHING
        self._count_anew()
