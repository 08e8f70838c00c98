"""The journal of a store, as the engine sees it: the saved changes, and how many of them each consumer has handled.

A change is entered into the journal in the transaction that saves the state (`ScopeChange.log`); what consumers have
done is saved by the same transactions (`ConsumerChange`). Positions number the changes of all scopes of a store; the
feed (`actors/feed.py`) assigns them, with gaps. docs/design/0045-the-journal-on-disk.md has the reasons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Literal, Protocol

import msgspec

from scopestate.ops.results import StateEvent

EPOCH_STEP: Final = 2**32
"""The positions of an epoch begin this far after the last one that the previous epoch has saved."""

MOST_EVENTS: Final = 1000
"""The most events that one call reads, unless it asks for another number."""
MOST_BYTES: Final = 1024 * 1024
"""The most bytes of keys and values in the events of one call, unless it asks for another number. At least one is
read."""

Gone = Literal["trimmed", "lost in a crash"]
"""Why the journal cannot tell what followed a position or a revision."""


class History(msgspec.Struct, frozen=True):
    """How many changes of a scope are kept although no consumer needs them. 0: no limit of that kind."""

    events: int = 100_000
    age_ms: int = 7 * 24 * 60 * 60 * 1000
    bytes: int = 64 * 1024 * 1024
    """Of keys and values, with `EVENT_OVERHEAD` for each change."""


EVENT_OVERHEAD: Final = 64
"""Bytes that are counted for a change in the journal, in addition to its key and its values."""


class JournalSize(msgspec.Struct, frozen=True):
    """What the journal holds. Reading it takes constant time."""

    events: int
    bytes: int
    oldest: int
    """The lowest position in the journal; 0 if it is empty."""
    newest: int
    """The highest position in the journal; 0 if it is empty."""


class Needed(msgspec.Struct, frozen=True):
    """Which part of the journal is kept for consumers."""

    events: int
    """Includes events that wait to be trimmed, except those of scopes with a history rule."""
    bytes: int
    done: dict[int, int]
    """The consumers that may need a part of it, by number -> the position up to which each is done."""
    wanted: dict[int, tuple[int, int]]
    """The same consumers -> how many events and bytes belong to scopes that each one wants."""
    groups: frozenset[frozenset[int]]
    """The numbers of consumers that may need the same events."""


class Pending(msgspec.Struct, frozen=True, gc=False):
    """A delivery that is not over, although later ones of its consumer are: it was begun, or waits for a retry."""

    position: int
    attempts: int = 0
    """Attempts that have begun."""
    first_ms: int = 0
    """When the first attempt began, in milliseconds since the epoch; 0: there was none."""
    due_ms: int = 0
    """When the next attempt is due; 0: now."""
    error: str | None = None
    """The error of the last attempt, as text."""
    held: bool = False
    """True: it was given up, and what follows in order waits until a caller replays or purges its dead letter."""


class Letter(msgspec.Struct, frozen=True):
    """An event that a consumer has given up: a dead letter."""

    id: int
    """0 in a letter that is not saved yet. The store numbers letters, and uses each number once."""
    consumer: int
    event: StateEvent
    """A copy, with its position: the journal may have forgotten it."""
    attempts: int
    first_ms: int
    """When the first attempt began, in milliseconds since the epoch."""
    died_ms: int
    """When it was given up."""
    error: str
    traceback: str = ""


class ConsumerChange(msgspec.Struct):
    """What has changed of a consumer since the last save. Applied in this order: `pending`, `acked`, `letters`, `done`.

    A change for a consumer that was forgotten is ignored.
    """

    consumer: int
    """Its number."""
    done: int = 0
    """Every delivery up to this position is over, except those that are pending. It never decreases."""
    acked: Sequence[int] = ()
    """Positions of deliveries that are over, in any order, including those above `done`. The delivery of a letter is
    over without being listed, unless `pending` says that it is held.
    """
    pending: Sequence[Pending] = ()
    """Deliveries that are not over, including those above `done`. Each replaces what was saved about it."""
    letters: Sequence[Letter] = ()
    """New dead letters."""
    over: Sequence[int] = ()
    """Positions of deliveries that are over, including those up to `done`: their attempts can be forgotten."""


class SavedConsumer(msgspec.Struct):
    """A consumer, as it was saved. The caller may keep and change it."""

    number: int
    """Never given to another consumer of the store."""
    name: str
    filter: str
    """The text that it was created with: the filters of its trigger, as JSON. The store does not interpret it."""
    created_ms: int
    paused: str | None
    """Why it is paused; None if it is not."""
    done: int
    """Every delivery up to this position is over, except those in `pending`."""
    acked: set[int]
    """Positions above `done` of deliveries that are over."""
    pending: dict[int, Pending]
    """position -> a delivery that is not over. The journal has its event."""
    begun: dict[int, int]
    """position -> the attempt that had begun when the engine ended, and whose outcome is not known.

    It counts as an attempt. Only those above the `attempts` of the delivery's `pending` are here.
    """
    dead: int
    """How many dead letters it has."""


class Rules(msgspec.Struct, frozen=True, weakref=True):
    """What the journal has to keep. The engine sets it, and may replace it at any time."""

    history: Callable[[str], History | None]
    """Returns the rule of a scope; None if it has none."""
    consumers: Callable[[str], Collection[int]]
    """Returns the numbers of the consumers that may need events of a scope."""


class Past(Protocol):
    """Where a watch reads changes after its cursor that are not in memory. May wait, and raises StorageError."""

    def read(self, after: int, upto: int | None = None, *, most: int = MOST_EVENTS) -> list[StateEvent]:
        """See `Journal`."""

    def read_scope(
        self, scope: str, after: int, upto: int | None = None, *, most: int = MOST_EVENTS
    ) -> list[StateEvent]:
        """See `Journal`."""

    def gone(self, epoch: int, position: int, *, scope: str | None = None, prefix: str = "") -> Gone | None:
        """See `Journal`."""

    def gone_in_scope(self, scope: str, revision: int) -> Gone | None:
        """See `Journal`."""

    def oldest(self, scope: str) -> tuple[int, int] | None:
        """See `Journal`."""


class Journal(ABC):
    """The journal of one store.

    Every method may be called from any thread; reads run concurrently with each other and with a save. Each method that
    changes something is one transaction: if the process is killed, all of it is done, or nothing. Library errors never
    escape: each method that uses the disk raises `StorageError` or a subclass, except `note_attempts`.
    """

    epoch: int
    """The epoch of this session. A cursor for many scopes names it."""
    first: int
    """The position after which this session continues. No change has it, and no earlier session has assigned it."""
    given: int
    """The last position that was assigned. The engine sets it before each save, and before the store is closed."""
    settled: int
    """Everything up to this position is saved by the next save, or already was. The engine sets it as it sets
    `given`."""
    behind: bool = False
    """True if more must be trimmed than one save may trim: call `trim` when there is nothing to save."""
    _rules: Callable[[], Rules | None] = staticmethod(lambda: None)

    @property
    def rules(self) -> Rules | None:
        """What to keep; None: everything.

        Assign it again when a rule has changed, or a consumer was added or removed.
        """
        return self._rules()

    @rules.setter
    def rules(self, rules: Rules | None) -> None:
        self._rules = lambda: rules

    def follow(self, rules: Callable[[], Rules | None]) -> None:
        """Call `rules` to learn what to keep. It must not refer to the engine, which the store may outlive."""
        self._rules = rules

    # ------------------------------------------------------------------------------------------------------- reading

    @abstractmethod
    def read(
        self, after: int, upto: int | None = None, *, most: int = MOST_EVENTS, most_bytes: int = MOST_BYTES
    ) -> list[StateEvent]:
        """Return the events after position `after`, up to `upto` included, in order; [] if there are no more."""

    @abstractmethod
    def read_scope(
        self, scope: str, after: int, upto: int | None = None, *, most: int = MOST_EVENTS, most_bytes: int = MOST_BYTES
    ) -> list[StateEvent]:
        """Return the events of a scope after the revision `after`, up to revision `upto` included, in order."""

    @abstractmethod
    def read_at(self, positions: Iterable[int]) -> list[StateEvent]:
        """Return the events at these positions in order, leaving out those that are not there."""

    @abstractmethod
    def gone(self, epoch: int, position: int, *, scope: str | None = None, prefix: str = "") -> Gone | None:
        """Return why `read(position)` would miss changes of a scope, or of those with a prefix; None if it would not.

        `epoch` is the one in which the position was assigned. "lost in a crash": a change up to the position was not
        saved before a session ended. "trimmed": a later change is not in the journal any more, or never was.
        """

    @abstractmethod
    def was_lost(self, epoch: int, position: int) -> bool:
        """Return whether `gone` says "lost in a crash". In constant time, without the disk."""

    @abstractmethod
    def newest(self, most: int) -> tuple[list[StateEvent], int]:
        """Return the newest events, in order, and the position after which every change is among them.

        At most `most` events, and fewer if they are large.
        """

    @abstractmethod
    def gone_in_scope(self, scope: str, revision: int) -> Gone | None:
        """As `gone`, for `read_scope(scope, revision)`. Revisions never repeat, so no epoch is needed."""

    @abstractmethod
    def size(self) -> JournalSize:
        """Return what is saved in the journal."""

    @abstractmethod
    def needed(self) -> Needed:
        """Return which part is kept for consumers. Takes microseconds for each scope that has changes."""

    @abstractmethod
    def oldest_of(self, consumer: int, upto: int, most: int) -> list[int]:
        """Return the positions of the oldest events that are kept for a consumer, up to `upto` included, in order.

        Events of deliveries that are held are left out.
        """

    @abstractmethod
    def count_behind(self, position: int) -> int:
        """Return how many events are after a position."""

    @abstractmethod
    def oldest(self, scope: str) -> tuple[int, int] | None:
        """Return revision and position of the oldest event of a scope; None if it has no events."""

    @abstractmethod
    def trim(self) -> None:
        """Remove a part of what is not needed any more. Saves do the same."""

    # ----------------------------------------------------------------------------------------------------- consumers

    @abstractmethod
    def consumers(self) -> list[SavedConsumer]:
        """Return the consumers, by name."""

    @abstractmethod
    def create_consumer(self, name: str, filter: str, done: int, now_ms: int) -> SavedConsumer:  # noqa: A002 - its name
        """Make a consumer for which every event up to the position `done` is over. ValueError if the name is taken."""

    @abstractmethod
    def change_filter(self, consumer: int, filter: str) -> None:  # noqa: A002 - as above
        """Replace the text of the filters of a consumer."""

    @abstractmethod
    def pause_consumer(self, consumer: int, why: str | None) -> None:
        """Record that a consumer is paused, and why; None: it is not."""

    @abstractmethod
    def skip(self, consumer: int, positions: Sequence[int], paused: str) -> None:
        """Drop for a consumer the events that `oldest_of` has returned, and record why it is paused."""

    @abstractmethod
    def forget_consumer(self, consumer: int) -> None:
        """Remove a consumer, with its deliveries and its dead letters.

        Changes of it that still wait for a save are then ignored.
        """

    @abstractmethod
    def note_attempts(self, attempts: Sequence[tuple[int, int, int]]) -> None:
        """Record attempts that are about to begin: consumer, position, and the number of the attempt, from 1.

        They survive the end of the process, but not of the machine: nothing is synced. Raises nothing: an attempt that
        cannot be recorded is logged, and is not counted after a crash.
        """

    # -------------------------------------------------------------------------------------------------- dead letters

    @abstractmethod
    def letters(
        self,
        consumer: int | None = None,
        *,
        after: int = 0,
        before_ms: int | None = None,
        most: int = 100,
        most_bytes: int = MOST_BYTES,
    ) -> list[Letter]:
        """Return dead letters with an id above `after`, by id; `before_ms`: those that died before. At least one."""

    @abstractmethod
    def letter(self, id: int) -> Letter | None:  # noqa: A002 - as the field
        """Return a dead letter; None if no letter has this id."""

    @abstractmethod
    def count_letters(self, consumer: int | None = None, *, before_ms: int | None = None) -> int:
        """Return how many dead letters there are."""

    @abstractmethod
    def replay(
        self, ids: Sequence[int] | None, consumer: int | None = None, *, reset: bool = True
    ) -> list[tuple[int, Pending]]:
        """Make pending deliveries of dead letters, and remove the letters. `ids` None: all, or all of a consumer.

        Returns the consumer and the delivery of each, by id; `read_at` reads the events: the journal has them again.
        With `reset`, attempts, times and error of a delivery are those of one that was never tried. Without it, the
        attempts continue. Letters that do not exist are left out.
        """

    @abstractmethod
    def purge(
        self, ids: Sequence[int] | None, consumer: int | None = None, *, before_ms: int | None = None
    ) -> tuple[int, list[tuple[int, int]]]:
        """Remove dead letters. `ids` None: all, those of a consumer, or those that died before a moment, only.

        Returns their number, and consumer and position of each delivery that was held: it is over now.
        """
