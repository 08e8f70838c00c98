"""What an engine needs of the place where its scopes live.

A `Backend` makes the scopes of an engine. Scopes that this engine alone writes are kept in memory and saved into a
`Store`; the backend of such scopes is `persistence.local.LocalBackend`. Where others write the same scopes, in Redis or
in another engine, the backend makes scopes of its own and there is no store. The `Options` of a backend are read from
the configuration.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, NamedTuple, Protocol

import msgspec

from scopestate.actors.journal import ConsumerChange, Journal
from scopestate.actors.value_rules import ValueRule
from scopestate.ops.results import StateEvent
from scopestate.ops.turns import Range, TtlRule

if TYPE_CHECKING:
    from scopestate.actors.consuming import Consumers
    from scopestate.actors.scope import ScopeActor, Surroundings
    from scopestate.errors import ScopestateError


Durability = Literal["memory", "interval", "commit"]
"""When a write is durable: never, after the next save, or when it is acknowledged."""


class WriteRule(msgspec.Struct, frozen=True):
    """What the configuration says about the writes of a scope."""

    ttl: TtlRule | None = None
    """The deadline of keys that are written without one; None: they have none."""
    strict: bool = False
    """True: an update with an op that is refused writes nothing."""
    values: ValueRule | None = None
    """What the values must fit."""

    @property
    def reads_plainly(self) -> bool:
        """True if values are read as they are stored: none is upgraded."""
        return self.values is None or self.values.versions is None

    @property
    def needs_entries(self) -> bool:
        """True if writes need more than values: the time, or whether an update is refused as a whole."""
        return self.ttl is not None or self.strict


NO_RULE: Final = WriteRule()


class Row(msgspec.Struct, frozen=True, gc=False):
    """What is stored under a key."""

    json: bytes
    """The value."""
    revision: int
    """The number of the write that changed it last."""
    created: int
    """The number of the write that created the key: its place in the order of its scope, and in the store."""
    expires_ms: int | None = None
    """When it expires, in milliseconds since the epoch; None: never."""


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The answer to a write with an idempotency key, kept for its repetitions."""

    fingerprint: bytes
    """A digest of what the write asked for."""
    answer: bytes
    """As the turn packed it."""
    time_ms: int
    """When the write was done, in milliseconds since the epoch."""


ANSWERS_KEPT_MS: Final = 24 * 60 * 60 * 1000
"""How many milliseconds an answer is kept, as long as its scope has no more answers than the next two limits allow."""
ANSWERS_OF_A_SCOPE: Final = 10_000
ANSWER_BYTES_OF_A_SCOPE: Final = 64 * 1024 * 1024
"""The oldest answers are dropped first. The newest one is kept, whatever its size."""


class ScopeState(msgspec.Struct):
    """One scope as it was saved, as the tables that a scope in memory has: nothing is made for each key.

    The caller that loads it may keep and change them.
    """

    values: dict[str, bytes]
    """key -> JSON, in the order of creation. Includes keys that have expired."""
    revisions: dict[str, int]
    """key -> the number of the write that changed it last."""
    created: dict[str, int]
    """key -> the number of the write that created it: its place in the order of its scope, and in the store."""
    deadlines: dict[str, int]
    """key -> when it expires, in milliseconds since the epoch; only keys that do."""
    revision: int
    """The number after which the scope continues; 0 for a scope that was never saved. It never decreases.

    The number of the last write saved; if the store was not closed cleanly, higher by the number of revisions that the
    scope may have assigned since.
    """
    answers: dict[str, Answer] = {}
    """idempotency key -> answer, the oldest first. May include answers older than `ANSWERS_KEPT_MS`."""
    due_ms: int | None = None
    """Of a state without its keys: no key has a deadline before this time. None: no key has one."""

    @classmethod
    def of(cls, rows: dict[str, Row], revision: int = 0, answers: dict[str, Answer] | None = None) -> ScopeState:
        """Return the state with these rows."""
        return cls(
            {key: row.json for key, row in rows.items()},
            {key: row.revision for key, row in rows.items()},
            {key: row.created for key, row in rows.items()},
            {key: row.expires_ms for key, row in rows.items() if row.expires_ms is not None},
            revision,
            answers or {},
        )

    @property
    def entries(self) -> dict[str, Row]:
        """key -> row, in the order of creation. For tools: it makes a row for each key."""
        revisions, created, deadline = self.revisions, self.created, self.deadlines.get
        return {key: Row(data, revisions[key], created[key], deadline(key)) for key, data in self.values.items()}


class ScopeChange(msgspec.Struct):
    """What changed in one scope since its last save; the newest content only."""

    scope: str
    revision: int
    """The number of the last write that it includes."""
    entries: dict[str, Row | None]
    """key -> its new row, or None for a deleted key. A key whose deadline alone has changed keeps its revision."""
    removed: list[int] = []
    """`created` of each deleted entry that may be in the store, even if its key exists again."""
    due_ms: int | None = None
    """When the first key of the scope expires; None if none does. Earlier than that does no harm."""
    answers: dict[str, Answer | None] = {}
    """idempotency key -> an answer to keep, or None for one that newer answers have displaced.

    May include answers that are too old; the store also removes those on its own, even of scopes that are not in
    memory.
    """
    log: Sequence[StateEvent] = ()
    """Its changes for the journal, in order: each since the last save, not just the newest of a key. They have their
    positions, and revisions up to `revision`. The journal keeps all fields of an event except those that belong to a
    trigger (`coalesced`, `metadata`)."""
    logged_since: int | None = None
    """Every change of the scope after this number is in `log`, or was in the `log` of an earlier save. None: changes
    may be missing. It is the revision before the first event of the scope that was entered since this engine began to
    log it without a gap."""
    acks: Sequence[tuple[int, int]] = ()
    """Consumer and position of deliveries that are over because of this change."""


class StoredKeys(ABC):
    """Reads parts of the scopes of a store. Every method may be called from any thread, beside `save`.

    Each call reads as of one moment, and raises `StorageError`.
    """

    @abstractmethod
    def begin(self, scope: str, most: int) -> ScopeState | None:
        """Return the state of a scope without its keys, if it has more than `most`; None: `Store.load` is quicker."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Make sure that keys can be read; False if that is not possible now. It may take seconds, once for a store."""

    @abstractmethod
    def at_one_moment(self, scope: str) -> tuple[StoredKeys, Callable[[], None]]:
        """Return an object of which all calls read the scope as it is now, and a function to be called when that ends.

        The object may be used until then, by one thread at a time. The function may be called again.
        """

    @abstractmethod
    def rows(self, scope: str, keys: Sequence[str]) -> dict[str, Row]:
        """Return what is saved under these keys, which are distinct; those that do not exist are left out."""

    @abstractmethod
    def keys(self, scope: str, within: Range, now_ms: int, besides: Container[str]) -> list[str]:
        """Return the keys within a range, in its order, at most `limit`.

        Without those of `besides`, and without those that have expired at `now_ms`.
        """

    @abstractmethod
    def entries(self, scope: str, within: Range, now_ms: int, besides: Container[str]) -> list[tuple[str, Row]]:
        """Return the keys that `keys` would return, each with its row."""

    @abstractmethod
    def count(self, scope: str, within: Range, now_ms: int, besides: Sequence[str]) -> int:
        """Return how many keys `keys` would return without a limit. The keys of `besides` are within the range."""

    @abstractmethod
    def each(self, scope: str, take: Callable[[str, Row], object]) -> None:
        """Call `take` for each key, in the order of creation; also for those that have expired."""

    @abstractmethod
    def due(self, scope: str, after: tuple[int, int], most: int) -> list[tuple[int, int, str]]:
        """Return the next keys with deadlines: (deadline, number of the write that created the key, key), in order.

        Those behind `after`, a deadline and such a number, and at most `most`.
        """


class Store(ABC):
    """What the scopes of one engine are saved in. Every method may be called from any thread.

    `load` and `scopes` may run concurrently with each other and with `save`; `save` runs in one thread at a time.
    Library errors never escape: each method raises `StorageError` or a subclass.
    """

    id: str = ""
    """Unique to the store and constant for its life: cursors of pages name it. "": each engine uses an id of its
    own."""
    largest_value: int = 0
    """Bytes of the largest value that it can hold; 0: no limit."""
    longest_name: int = sys.maxsize
    """Characters of the longest scope or key that it can hold."""
    clock_ms: int = 0
    """The time, in milliseconds since the epoch. The engine sets it before it saves, and each save stores it: when the
    store is opened, it is the time of the last save, or 0 if there was no save. It never goes back."""
    stored: StoredKeys | None = None
    """Reads parts of scopes; None: scopes are loaded whole."""
    journal: Journal | None = None
    """The journal; None if the store has no journal: then it never gets a `log`, `acks` or consumers."""

    @abstractmethod
    def load(self, scope: str) -> ScopeState:
        """Return what was saved for `scope`; empty with revision 0 if it was never saved."""

    @abstractmethod
    def scopes(self) -> list[str]:
        """Return the names of the scopes that hold at least one saved key, in no particular order."""

    @abstractmethod
    def save(self, batch: Sequence[ScopeChange], consumers: Sequence[ConsumerChange] = ()) -> None:
        """Write the batch in order, and what has changed of consumers, as one transaction.

        On return every change survives a power loss; if it raises, none of them was written. A scope may occur more
        than once; the later change is the newer one.
        """

    def keys_written(self) -> int:
        """Return how many keys the running or last save has written so far; 0 if that is not known."""
        return 0

    def problem(self) -> str | None:
        """Return what is wrong with the store, in words; None if all is well."""
        return None

    def due(self, limit: int) -> list[tuple[int, str]]:
        """Return up to `limit` scopes with the time at which their first key expires (ms), the earliest first."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Release the store, once everything is saved. Idempotent."""


class Arrivals(Protocol):
    """Events that other engines fire, on their way to the handlers of this one."""

    def catch_up(self, timeout_s: float | None) -> bool:
        """Wait until the events of this engine's own writes are here; False if that took longer than `timeout_s`.

        Raises StorageError if they cannot come now.
        """

    def stop(self) -> None:
        """Take no more events; those that are here may still be handled. Idempotent."""


class ChangeSource(ABC):
    """The changes of scopes that are kept in another engine, by its `state::changes`. From any thread."""

    longest_wait_ms: int
    """How long a poll may wait for a change."""

    @abstractmethod
    def poll(self, asked: Mapping[str, Any], done: Callable[[bytes | None, ScopestateError | None], object]) -> None:
        """Send a poll, and return at once; `done` gets the answer as JSON, or the error. Raises EngineClosed."""

    @abstractmethod
    def poll_now(self, asked: Mapping[str, Any]) -> bytes:
        """Send a poll and wait for its answer, not on the thread of an event loop. Raises what the poll raises."""

    def hand_over(self, to: ChangeSource) -> None:
        """Let another source answer all further polls, and those that were begun since the backend has left."""
        raise NotImplementedError


class Backend(ABC):
    """Where the scopes of one engine live. Every method may be called from any thread.

    `scopestate.opening` makes it from the configuration; no other part of the engine asks which one it is. A backend
    states what it can do by these methods and attributes; callers do not probe for other ones.
    """

    keeps: bool = True
    """True if the state outlives the engine."""
    store: Store | None = None
    """The store that the engine saves its scopes in; None if they are kept elsewhere, or not at all."""
    largest_value: int = 0
    """Bytes of the largest value that a scope can hold; 0: no limit."""
    longest_name: int = sys.maxsize
    """Characters of the longest scope or key."""
    consumers: Consumers | None = None
    """Keeps the events of durable triggers if they are not in the journal of `store`; None: nothing does."""
    saves_elsewhere: bool = False
    """True if `flush` may wait."""
    changes: ChangeSource | None = None
    """Where watches of its scopes get their changes from; None: from the writes of this engine."""
    arrivals: Arrivals | None = None
    """Delivers events of other engines; None if every event comes from a write through this engine."""
    unwatchable: str | None = None
    """Why the scopes cannot be watched; None: they can be."""
    call_elsewhere: Callable[[str, bytes], bytes | None] | None = None
    """Calls a read-only function of the engine that has the scopes, by its id and with JSON, and waits for the result;
    None: no other engine has them. Raises the error of the call."""
    catch_up: Callable[[], object] | None = None
    """Waits until every change that was made by now is in the feed; it may wait for a server, and may raise
    StorageError. None: the router's turns enter them."""

    @abstractmethod
    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Return a new actor for `scope`. The directory calls it, for one scope at a time."""

    @abstractmethod
    def scopes(self) -> list[str]:
        """Return the names of the scopes that hold a key, in no particular order. Raises StorageError.

        Scopes in this engine's memory may be missing.
        """

    def durability(self, scope: str) -> Durability:
        """Return when this engine saves the writes of a scope; `memory` if it does not save them."""
        del scope
        return "memory"

    def start(self, around: Surroundings) -> None:  # noqa: B027 - most have nothing to start
        """Begin to take events from elsewhere: the engine is complete and its configured triggers are registered."""

    def listen(self, *, wait: bool = True) -> None:  # noqa: B027 - as above
        """Take events from elsewhere also for a newly registered trigger that is not durable.

        With `wait=False` it returns at once, and the events begin a little later: for event loops.
        """

    def flush(self) -> None:  # noqa: B027 - as above
        """Wait until what was acknowledged is on disk, where that is not in `store`. Raises StorageError."""

    def counts(self) -> dict[str, int]:
        """Return what the backend counts, for `Stats.store`."""
        return {}

    def problem(self) -> str | None:
        """Return a description of the current problem, for `Health.problems`; None if all is well."""
        return None

    def leave(self) -> str | None:
        """Stop, because another backend takes over the scopes.

        On return everything that was begun has its outcome. Returns the cursor after which no change has fired a
        trigger here; None: no triggers are to be fired.

        Calls that were not begun wait in the scopes, which send nothing any more. Idempotent. It may wait, so not on a
        thread of the backend. Only for a backend whose scopes can leave (`ScopeActor.can_leave`).
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Release what the backend holds. Idempotent. In a forked child it does nothing."""


Wait = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
"""Milliseconds, at most one day. Keeps typing errors (or nanoseconds) away from timers, which overflow at much larger
values."""


class Mistake(NamedTuple):
    """A problem of an option. `item` is the index if it is an entry of a list."""

    key: str
    problem: str
    item: int | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The options of a backend: `config:` of an adapter, which the configuration file is read into."""

    removed: ClassVar[dict[str, str]] = {}
    """Options of earlier versions, with what to write instead."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield the mistakes that the types do not show. An option at its default is never one."""
        return iter(())

    def refuse_server(self, host: str, port: int) -> None:
        """Raise ConfigError if the options name a server of this engine, at that address, as another engine."""

    def described(self) -> str:
        """Describe where the state is kept, without passwords."""
        raise NotImplementedError
