"""What must be true of an engine, checked against plain lists and dicts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence

import msgspec

from scopestate.ops.results import StateEvent

Items = tuple[tuple[str, bytes], ...]
"""The keys and values of a scope, in insertion order."""


class Violation(AssertionError):
    """Something happened that scopestate promises not to do."""


class Write(msgspec.Struct, eq=False):
    """One write that a scope has made."""

    sequence: int
    key: str
    old: bytes | None
    new: bytes | None
    at: float
    place: int
    """Index of the state that it made."""
    dropped: bool = False
    """Rolled back, because its commit failed."""
    claimed: bool = False
    """A caller got an answer for this write."""


class State(msgspec.Struct, eq=False):
    """A scope between two writes."""

    sequence: int
    items: Items
    dropped: bool = False


class History:
    """Everything that one scope did in the life of one engine."""

    def __init__(self, scope: str, durability: str, items: Items, sequence: int) -> None:
        self.scope = scope
        self.durability = durability
        self.writes: list[Write] = []
        """In order, without those that were rolled back."""
        self.states = [State(sequence, items)]
        self.base = sequence

    def now(self) -> State:
        """The scope as it is now."""
        return self.states[-1]

    def write(self, sequence: int, key: str, old: bytes | None, new: bytes | None, at: float) -> Write:
        """Note a write. It must continue the history."""
        before = self.now()
        if sequence != before.sequence + 1:
            raise Violation(f"{self.scope}: write {sequence} comes after write {before.sequence}")
        values = dict(before.items)
        if values.get(key) != old:
            raise Violation(f"{self.scope}: write {sequence} of {key!r} found {old!r}, there was {values.get(key)!r}")
        if new is None:
            values.pop(key, None)
        else:
            values[key] = new
        write = Write(sequence, key, old, new, at, len(self.states))
        self.writes.append(write)
        self.states.append(State(sequence, tuple(values.items())))
        return write

    def forget(self) -> None:
        """Remove the write that was noted last: it was refused after all, and nothing was changed."""
        self.writes.pop()
        self.states.pop()

    def rewind(self, items: Items, sequence: int) -> list[Write]:
        """Go back to the durable state; return the writes that were undone."""
        undone = [write for write in self.writes if write.sequence > sequence]
        for write in undone:
            write.dropped = True
        for state in self.states:
            if state.sequence > sequence:
                state.dropped = True
        self.writes = [write for write in self.writes if write.sequence <= sequence]
        self.states.append(State(sequence, items))
        return undone

    def at(self, sequence: int) -> State | None:
        """The scope after write number `sequence`, as it stands after rollbacks."""
        for state in reversed(self.states):
            if state.sequence == sequence and not state.dropped:
                return state
        return None


class Watcher:
    """What one trigger has been called with, and what comes next."""

    def __init__(self, trigger_id: str, matches: Callable[[Write, str], bool], tries: Callable[[Write], int]) -> None:
        self.trigger_id = trigger_id
        self.matches = matches
        self.tries = tries
        """How often the handler is called for a write: more than once if it fails and is tried again."""
        self.places: dict[str, int] = {}
        """Scope -> how many of its writes were handled."""
        self.calls: dict[str, int] = {}
        """Scope -> the number of calls so far for its next write."""

    def called(self, event: StateEvent, history: History, attempts: int) -> None:
        """Check one call: it must be for the next matching write, with none left out and none repeated."""
        scope = event.scope
        place = self.places.get(scope, 0)
        writes = history.writes
        while place < len(writes) and not self.matches(writes[place], scope):
            place += 1
        if place == len(writes) or not _describes(event, writes[place]):
            expected = writes[place] if place < len(writes) else "no event"
            raise Violation(f"{self.trigger_id}: expected {expected} of {scope}, was called with {event!r}")
        calls = self.calls.get(scope, 0) + 1
        if calls >= min(self.tries(writes[place]), attempts):
            place, calls = place + 1, 0
        self.places[scope], self.calls[scope] = place, calls

    def missing(self, history: History, up_to: int) -> Write | None:
        """The first write, up to number `up_to`, that the handler was not called for and should have been."""
        for write in history.writes[self.places.get(history.scope, 0) :]:
            if write.sequence <= up_to and self.matches(write, history.scope):
                return write
        return None


class Model:
    """The expected state of one engine, from its start to its end."""

    def __init__(
        self,
        clock: Callable[[], float],
        durable: Callable[[str], tuple[Items, int]],
        durability_of: Callable[[str], str],
        watchers: list[Watcher],
    ) -> None:
        self._clock = clock
        self._durable = durable
        self._durability_of = durability_of
        self.watchers = {watcher.trigger_id: watcher for watcher in watchers}
        self.histories: dict[str, History] = {}
        self.by_id: dict[int, Write] = {}
        """Id in the written value -> the write. Every write of a value has an id of its own."""
        self.groups: dict[int, set[int]] = {}
        """Id -> the ids that are written together with it, or not at all."""
        self.refused: set[int] = set()
        self.senders: dict[int, str] = {}
        """Id -> its sender. The ids of a sender rise, so those of its writes to one scope must rise too."""
        self._latest: dict[tuple[str, str], int] = {}
        self.failed_save_at = -1.0
        self.failed_loads = 0
        self.attempts = 1
        self._problem: Exception | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep errors from inside the engine for `raise_problem`, because the engine's code may only log them."""
        try:
            yield
        except Exception as error:
            self._problem = self._problem or error
            raise

    def raise_problem(self) -> None:
        """Raise the first error, if any."""
        if self._problem is not None:
            raise self._problem

    def history(self, scope: str) -> History:
        """The scope's history; it begins with what was durable when the engine was opened."""
        history = self.histories.get(scope)
        if history is None:
            durability = self._durability_of(scope)
            items, sequence = ((), 0) if durability == "memory" else self._durable(scope)
            history = self.histories[scope] = History(scope, durability, items, sequence)
        return history

    def durable_sequence(self, history: History) -> int:
        """The number of the last write of the scope that may be visible outside."""
        if history.durability == "commit":
            return self._durable(history.scope)[1]
        return history.now().sequence

    # --------------------------------------------------------------------------------------------- what happens

    def wrote(self, scope: str, sequence: int, key: str, old: bytes | None, new: bytes | None) -> None:
        """A scope is about to write."""
        if new is not None and len(self.groups.get(id_of(new), ())) > 1:
            raise Violation(
                f"{scope}: message {id_of(new)} is written by itself, and not with {self.groups[id_of(new)]}"
            )
        self._wrote(scope, sequence, key, old, new)

    def _wrote(self, scope: str, sequence: int, key: str, old: bytes | None, new: bytes | None) -> None:
        write = self.history(scope).write(sequence, key, old, new, self._clock())
        if new is None:
            return
        number = id_of(new)
        if number in self.by_id:
            raise Violation(f"{scope}: message {number} was handled twice")
        if number in self.refused:
            raise Violation(f"{scope}: message {number} was refused and is written all the same")
        self.by_id[number] = write
        sender = self.senders.get(number)
        if sender is not None:
            latest = self._latest.get((sender, scope), 0)
            if number < latest:
                raise Violation(f"{scope}: message {number} of {sender} was overtaken by its later message {latest}")
            self._latest[sender, scope] = number

    def wrote_together(
        self, scope: str, sequence: int, changes: Sequence[tuple[str, bytes | None, bytes | None]]
    ) -> None:
        """A scope is about to write several keys as one; `sequence` is that of the first write."""
        together = {id_of(new) for _, _, new in changes if new is not None}
        for number in together:
            if not self.groups.get(number, together) <= together:
                raise Violation(f"{scope}: of the messages {self.groups[number]} only {together} are written")
        history = self.history(scope)
        for place, (key, old, new) in enumerate(changes):
            if place:
                history.now().dropped = True
            self._wrote(scope, sequence + place, key, old, new)

    def refuse_write(self, scope: str, count: int = 1) -> None:
        """The writes that were announced last were refused inside their turn."""
        history = self.history(scope)
        for _ in range(count):
            new = history.writes[-1].new
            history.forget()
            if new is not None:
                del self.by_id[id_of(new)]

    def rolled_back(self, scope: str) -> None:
        """A commit of the scope failed: it is as it is on disk."""
        for write in self.history(scope).rewind(*self._durable(scope)):
            if write.claimed:
                raise Violation(f"{scope}: write {write.sequence} was acknowledged and is rolled back")

    def note_failed_save(self) -> None:
        """A save failed."""
        self.failed_save_at = self._clock()

    def note_failed_load(self) -> None:
        """A load failed."""
        self.failed_loads += 1

    # --------------------------------------------------------------------------------------------------- checks

    def check_load(self, scope: str, items: Items, sequence: int) -> None:
        """A scope was loaded from disk: no write of it may be missing."""
        now = self.history(scope).now()
        if (now.items, now.sequence) != (items, sequence):
            raise Violation(f"{scope}: loaded {items} at {sequence}, but it had {now.items} at {now.sequence}")

    def check_saved(self, scope: str, items: Items, sequence: int) -> None:
        """Check that the disk has the scope as it was after one of its writes."""
        history = self.history(scope)
        if history.durability == "memory":
            raise Violation(f"{scope} is for memory only and was saved")
        state = history.at(sequence)
        if state is None or state.items != items:
            raise Violation(f"{scope}: saved {items} as write {sequence}, which made {state}")

    def check_memory(self, scope: str, items: Items, sequence: int) -> None:
        """Check that a scope in memory is the result of its writes."""
        now = self.history(scope).now()
        if (now.items, now.sequence) != (items, sequence):
            raise Violation(f"{scope}: in memory {items} at {sequence}, expected {now.items} at {now.sequence}")

    def check_age(self, bound_s: float) -> None:
        """Check that nothing is unsaved for longer than the interval while saving works."""
        for history in self.histories.values():
            if history.durability == "interval":
                saved = self._durable(history.scope)[1]
                for write in history.writes:
                    if write.sequence > saved:
                        since = max(write.at, self.failed_save_at)
                        if self._clock() - since > bound_s:
                            raise Violation(f"{history.scope}: {write} is unsaved for {self._clock() - since:.3f} s")
                        break

    def check_call(self, trigger_id: str, event: StateEvent) -> None:
        """A handler is called."""
        history = self.history(event.scope)
        if event.revision > self.durable_sequence(history):
            raise Violation(f"{trigger_id} is told of write {event.revision} of {event.scope}, which is not durable")
        watcher = self.watchers.get(trigger_id)
        if watcher is not None:
            watcher.called(event, history, self.attempts)
        elif not any(_describes(event, write) for write in history.writes):
            raise Violation(f"{trigger_id} is told of {event!r}, which {event.scope} never did")

    def check_events_done(self, up_to: dict[str, int]) -> None:
        """Check that every handler was called for every write, up to the given write of each scope."""
        for watcher in self.watchers.values():
            for scope, sequence in up_to.items():
                missing = watcher.missing(self.history(scope), sequence)
                if missing is not None:
                    raise Violation(f"{watcher.trigger_id} was never called for {missing} of {scope}")

    def check_all_saved(self, up_to: dict[str, int]) -> None:
        """Check that everything up to the given write of each scope is durable."""
        for scope, sequence in up_to.items():
            if self.history(scope).durability != "memory" and self._durable(scope)[1] < sequence:
                raise Violation(f"{scope}: write {sequence} is not durable, only {self._durable(scope)[1]} is")

    def sequences(self) -> dict[str, int]:
        """Scope -> number of its last write that may be visible outside."""
        return {scope: self.durable_sequence(history) for scope, history in self.histories.items()}


def visible(model: Model, history: History, since: int) -> Iterator[State]:
    """The states that a call may have seen: from state number `since`, when it began, to the state now."""
    durable = model.durable_sequence(history)
    return (state for state in history.states[since:] if state.sequence <= durable and not state.dropped)


def id_of(data: bytes) -> int:
    """The id in a value."""
    number: int = json.loads(data)["id"]
    return number


def _describes(event: StateEvent, write: Write) -> bool:
    return (event.revision, event.key, event.old_json, event.new_json) == (
        write.sequence,
        write.key,
        write.old,
        write.new,
    )
