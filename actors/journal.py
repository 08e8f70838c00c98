"""The journal of a store, as the engine sees it: the saved changes, and how far each consumer has come with them.

A change is entered into the journal in the transaction that saves the state (`ScopeChange.log`); what consumers have
done is saved by the same transactions (`ConsumerChange`). Positions number the changes of all scopes of a store, by the
object that feeds them (`actors/feed.py`); they have gaps. docs/design/0045-the-journal-on-disk.md has the reasons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Literal, Protocol

import msgspec

from scopestate.ops.results import StateEvent

EPOCH_STEP: Final = 2**32
"""The positions of an epoch begin so far behind those that the epoch before it has saved."""

MOST_EVENTS: Final = 1000
"""Events that one call reads, if it says nothing else."""
MOST_BYTES: Final = 1024 * 1024
"""Bytes that the events of one call take, if it says nothing else: of their keys and values. At least one is read."""

Gone = Literal["trimmed", "lost in a crash"]
"""Why the journal cannot tell what followed a position or a revision."""


class History(msgspec.Struct, frozen=True):
    """How many changes of a scope are kept although no consumer needs them. 0: no limit of that kind."""

    events: int = 100_000
    age_ms: int = 7 * 24 * 60 * 60 * 1000
    bytes: int = 64 * 1024 * 1024
    """Of keys and values, with `EVENT_OVERHEAD` for each change."""


EVENT_OVERHEAD: Final = 64
"""Bytes that a change in the journal is counted with, beside its key and its values."""


class JournalSize(msgspec.Struct, frozen=True):
    """What the journal holds. In constant time."""

    events: int
    bytes: int
    oldest: int
    """The lowest position that is there; 0 if it is empty."""
    newest: int
    """The highest one; 0 if it is empty."""


class Needed(msgspec.Struct, frozen=True):
    """What of the journal is kept for consumers."""

    events: int
    """Those that wait to be trimmed count too, but of scopes with a history rule."""
    bytes: int
    done: dict[int, int]
    """The consumers that may need some of it, by number -> up to where each is done."""
    wanted: dict[int, tuple[int, int]]
    """The same consumers -> how much of it is of scopes that each wants: events, bytes."""
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
    """0 in a letter that is to be saved. The store numbers letters; a number is given once."""
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
    """Every delivery up to this position is over, except those that are pending. It never goes back."""
    acked: Sequence[int] = ()
    """Positions of deliveries that are over, in any order, also above `done`.

    That of a letter is over by itself, unless `pending` says that it is held.
    """
    pending: Sequence[Pending] = ()
    """Deliveries that are not over, each in place of what was saved of it; also above `done`."""
    letters: Sequence[Letter] = ()
    """New dead letters."""
    over: Sequence[int] = ()
    """Positions of deliveries that are over, those that `done` says included: their attempts need not be known."""


class SavedConsumer(msgspec.Struct):
    """A consumer, as it was saved. The caller may keep and change it."""

    number: int
    """Never given to another consumer of the store."""
    name: str
    filter: str
    """The text that it was made with: what its trigger asks for, as JSON. The store does not read it."""
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
    """position -> the attempt that had begun when the engine ended, and of which nothing more is known.

    It counts as an attempt. Only those above the `attempts` of the delivery's `pending` are here.
    """
    dead: int
    """How many dead letters it has."""


class Rules(msgspec.Struct, frozen=True, weakref=True):
    """What the journal has to keep. The engine gives it, and may give other ones at any time."""

    history: Callable[[str], History | None]
    """Returns the rule of a scope; None if it has none."""
    consumers: Callable[[str], Collection[int]]
    """Returns the numbers of the consumers that may need events of a scope."""


class Past(Protocol):
    """Where a watch reads the changes behind its cursor that are not in memory. May wait, and raises StorageError."""

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
    """The journal of one store. Every method may be called from any thread; reads run beside each other and a save.

    Each method that changes something is one transaction: killed at any moment, all of it is done, or nothing. Library
    errors never escape: each method that uses the disk raises `StorageError` or a subclass, except `note_attempts`.
    """

    epoch: int
    """The epoch of this session. A cursor for many scopes names it."""
    first: int
    """The position behind which this session goes on. It is that of no change, and no earlier session has given it."""
    given: int
    """The last position that was given. The engine sets it before each save, and before the store is closed."""
    settled: int
    """Everything up to this position is saved by the next save, or was before. The engine sets it as `given`."""
    behind: bool = False
    """True if more is to be trimmed than one save may do: call `trim` when there is nothing to save."""
    _rules: Callable[[], Rules | None] = staticmethod(lambda: None)

    @property
    def rules(self) -> Rules | None:
        """What to keep; None: everything. Assign it again when a rule has changed or a consumer has come or gone."""
        return self._rules()

    @rules.setter
    def rules(self, rules: Rules | None) -> None:
        self._rules = lambda: rules

    def follow(self, rules: Callable[[], Rules | None]) -> None:
        """Have `rules` called for what to keep. It must not refer to the engine: the store may be all that is left."""
        self._rules = rules

    # ------------------------------------------------------------------------------------------------------- reading

    @abstractmethod
    def read(
        self, after: int, upto: int | None = None, *, most: int = MOST_EVENTS, most_bytes: int = MOST_BYTES
    ) -> list[StateEvent]:
        """Return the events behind position `after`, up to `upto` included, in order; [] if there are no more."""

    @abstractmethod
    def read_scope(
        self, scope: str, after: int, upto: int | None = None, *, most: int = MOST_EVENTS, most_bytes: int = MOST_BYTES
    ) -> list[StateEvent]:
        """Return the events of a scope behind the revision `after`, up to revision `upto` included, in order."""

    @abstractmethod
    def read_at(self, positions: Iterable[int]) -> list[StateEvent]:
        """Return the events at these positions, as far as they are there, in order."""

    @abstractmethod
    def gone(self, epoch: int, position: int, *, scope: str | None = None, prefix: str = "") -> Gone | None:
        """Return why `read(position)` would miss changes of a scope, or of those with a prefix; None if it would not.

        `epoch` is the one in which the position was given. "lost in a crash": a change up to the position was not saved
        before a session ended. "trimmed": a later change is not in the journal any more, or never was.
        """

    @abstractmethod
    def was_lost(self, epoch: int, position: int) -> bool:
        """Return whether `gone` says "lost in a crash". In constant time, without the disk."""

    @abstractmethod
    def newest(self, most: int) -> tuple[list[StateEvent], int]:
        """Return the newest events, in order, and the position behind which every change is among them.

        So many at most, and fewer if they are large.
        """

    @abstractmethod
    def gone_in_scope(self, scope: str, revision: int) -> Gone | None:
        """As `gone`, for `read_scope(scope, revision)`. Revisions never repeat, so no epoch is needed."""

    @abstractmethod
    def size(self) -> JournalSize:
        """Return what is saved in the journal."""

    @abstractmethod
    def needed(self) -> Needed:
        """Return what of it is kept for consumers. It takes microseconds for each scope that has changes."""

    @abstractmethod
    def oldest_of(self, consumer: int, upto: int, most: int) -> list[int]:
        """Return the positions of the oldest events that are kept for a consumer, up to `upto` included, in order.

        Those of its deliveries that are held are left out.
        """

    @abstractmethod
    def count_behind(self, position: int) -> int:
        """Return how many events are behind a position."""

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
        """Keep another text for what a consumer asks for."""

    @abstractmethod
    def pause_consumer(self, consumer: int, why: str | None) -> None:
        """Note that a consumer is paused, and why; None: it is not."""

    @abstractmethod
    def skip(self, consumer: int, positions: Sequence[int], paused: str) -> None:
        """Have a consumer lose what `oldest_of` has returned, and note why it is paused."""

    @abstractmethod
    def forget_consumer(self, consumer: int) -> None:
        """Remove a consumer, with its deliveries and its dead letters. What waits for a save of it is ignored then."""

    @abstractmethod
    def note_attempts(self, attempts: Sequence[tuple[int, int, int]]) -> None:
        """Note attempts that are about to begin: consumer, position, and the number of the attempt, from 1 on.

        They survive the end of the process, not that of the machine: nothing is synced. It raises nothing: what cannot
        be noted is logged, and counts as one attempt less after such an end.
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
        With `reset` a delivery begins anew: attempts, times and error are as of one that was never tried. Without, its
        attempts go on. Letters that are not there are left out.
        """

    @abstractmethod
    def purge(
        self, ids: Sequence[int] | None, consumer: int | None = None, *, before_ms: int | None = None
    ) -> tuple[int, list[tuple[int, int]]]:
        """Remove dead letters. `ids` None: all, those of a consumer, or those that died before a moment, only.

        Returns how many, and consumer and position of each delivery that was held: it is over now.
        """
