"""The port between the runtime of durable triggers and a backend that keeps their events.

`actors/durable.py` runs the handlers: order, attempts, pauses, time limits. The backend remembers which
deliveries are over. Two backends implement it: the journal of a store (`actors/consumers.py`), whose consumers belong
to one engine, and a consumer group in Redis, which several engines share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import msgspec

from scopestate.errors import Unsupported
from scopestate.ops.plain import Plain
from scopestate.ops.results import StateEvent

if TYPE_CHECKING:
    from scopestate.actors.shared_consumer import SharedConsumer
    from scopestate.ops.triggers import Trigger

Verdict = Literal["done", "retry", "dead", "held"]
"""How an attempt ended. "held": given up, and the events after it in its order wait for a replay or a purge."""


BY_THE_PROGRAM: Final = "paused by the program"
"""Why a consumer is paused, if no other reason is given."""


class Held(msgspec.Struct, gc=False):
    """An event that a consumer has to handle."""

    event: StateEvent
    """With its position."""
    attempts: int = 0
    """Attempts that have begun, here or elsewhere, and count."""
    first_ms: int = 0
    """When the first one began, in milliseconds since the epoch; 0: there was none."""
    due_ms: int = 0
    """Not to be tried before this moment, in milliseconds since the epoch; 0: now."""
    error: str | None = None
    """The text of the last error."""
    cut_off: bool = False
    """True: the last attempt ended with its process."""
    blocked: bool = False
    """True: it was given up and holds back the events after it in its order, until it is replayed or purged."""


class HeldGroup(Held, gc=True):
    """Several events that are delivered as one: debounced, or in a list. They have one attempt and one outcome."""

    members: list[Held] = []
    """The events as they were fetched."""


def members_of(item: Held) -> list[Held]:
    """Return the events that a delivery acknowledges."""
    return item.members if isinstance(item, HeldGroup) else [item]


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """How an attempt ended."""

    position: int
    verdict: Verdict
    attempts: int = 0
    """Attempts that have begun and count, this one included if it does. Not needed for "done"."""
    first_ms: int = 0
    due_ms: int = 0
    """"retry": when the next attempt is due. The runtime that holds the event makes it itself."""
    error: str = ""
    """"retry", "dead", "held": the error as text."""
    traceback: str = ""
    """"dead", "held": where it was raised."""
    event: StateEvent | None = None
    """"dead", "held": the event, for the letter."""


class ConsumerStatus(Plain, msgspec.Struct, frozen=True):
    """One consumer: how far a durable trigger has come with its events."""

    name: str
    """The name that the trigger was given with `durable`."""
    lag_events: int
    """Events in the journal that it may still have to handle. Approximate: they are not compared with its filters."""
    lag_seconds: float
    """The age of the oldest of them; 0.0 if no event waits."""
    in_flight: int
    """Attempts that are running in this engine."""
    waiting: int
    """Events that this engine holds for it and that wait: for their turn, or for their next attempt."""
    dead: int
    """Its dead letters."""
    paused: str | None
    """Why it is paused; None if it is not."""
    trigger: str | None = None
    """The id of its trigger in this engine; None: no trigger has its name here, and its events are kept."""


class DeadLetter(Plain, msgspec.Struct, frozen=True):
    """An event that a durable trigger has given up."""

    json_fields: ClassVar[tuple[str, ...]] = (
        "id",
        "consumer",
        "event",
        "revision",
        "attempts",
        "first_ms",
        "died_ms",
        "error",
        "traceback",
        "replays",
    )

    id: str
    """Names the letter to `get`, `replay` and `purge`."""
    consumer: str
    event: StateEvent
    attempts: int
    """Attempts that were made."""
    first_ms: int
    """When the first one began, in milliseconds since the epoch."""
    died_ms: int
    """When it was given up, in milliseconds since the epoch."""
    error: str
    """The last error: its class and text."""
    traceback: str = ""
    """Where it was raised, if that is known."""
    replays: int = 0
    """How often it was replayed before, where that is counted: in Redis."""

    @property
    def revision(self) -> int:
        """The revision that the change gave to its key."""
        return self.event.revision

    @property
    def first_at(self) -> datetime:
        """When the first attempt began, in UTC."""
        return datetime.fromtimestamp(self.first_ms / 1000, UTC)

    @property
    def died_at(self) -> datetime:
        """When it was given up, in UTC."""
        return datetime.fromtimestamp(self.died_ms / 1000, UTC)


class ConsumerPort(ABC):
    """One consumer. Every method may be called from any thread. `fetch`, `began` and `flush` may wait for a disk or a
    connection, so they are called on worker threads only.

    Library errors never escape: a method that fails raises StorageError, and the runtime tries again later.
    """

    name: str
    notes_at_once: int = 1
    """How many attempts `began` is given together. All of them count if the process ends in one of them."""

    @abstractmethod
    def start(
        self,
        trigger: Trigger,
        wake: Callable[[], object],
        lost: Callable[[Sequence[int]], object],
        running: Callable[[], Mapping[int, int]],
    ) -> None:
        """Begin to take events. `wake()`: `fetch` may return something now; from any thread, and it is quick.

        `lost(positions)`: these are not this engine's any more: other engines have them, or their dead letters were
        purged. What has not begun is dropped; the rest ends, and its outcomes do not count.

        `running()` returns the attempts that are running: position -> number.
        """

    @abstractmethod
    def stop(self) -> None:
        """Take no more events: the trigger is gone or the engine closes. Outcomes are still taken. Idempotent."""

    @abstractmethod
    def fetch(self, most: int) -> list[Held]:
        """Return the next events, [] if there are none now; in the order in which they are handled.

        Events that do not match the trigger may be among them. Each event is returned once, until the engine ends.
        """

    @abstractmethod
    def began(self, attempts: Sequence[tuple[int, int]]) -> None:
        """Note attempts that are about to begin, as position and number. They count from then on, even if the process
        is killed."""

    @abstractmethod
    def ended(self, outcomes: Sequence[Outcome]) -> None:
        """Note how attempts ended. This need not be saved at once: if the process ends first, the events are delivered
        again."""

    def hand_over(self) -> list[Outcome]:
        """Return outcomes that only this engine has: another port takes over. The runtime gets no more calls."""
        return []

    def left_behind(self) -> list[Outcome]:
        """Return the outcomes that were noted since `hand_over`, each of them once. They are for the next port."""
        return []

    @abstractmethod
    def flush(self) -> None:
        """Return when what has ended is saved. Raises StorageError."""

    @abstractmethod
    def transaction(self, position: int, scope: str) -> Any:
        """Return what acknowledges `position` within a write to `scope`: the acks for its turn. Raises Unsupported."""

    def transaction_failed(self, position: int) -> None:  # noqa: B027 - a backend may have nothing to forget
        """The write that was to acknowledge it has failed, and nothing of it is left."""

    def is_acknowledged(self, position: int) -> bool:
        """Return whether a delivery is over, according to what `flush` has saved."""
        del position
        return False

    def mark(self) -> int:
        """Return a mark for `reached`: what is committed by now, as far as the backend can tell."""
        return 0

    def reached(self, mark: int) -> bool:
        """Return whether everything up to a mark was returned by `fetch`."""
        del mark
        return True

    @abstractmethod
    def pause(self, why: str) -> None:
        """Note that the runtime takes no events until `Consumers.resume`, and why."""

    def full(self, letters: int) -> bool:
        """Return whether it has as many dead letters as it may; the runtime then pauses it.

        If it returns False, it has reserved places for this many letters, all of one delivery. The last delivery may
        exceed the limit.
        """
        del letters
        return False

    def paused(self) -> str | None:
        """Return why it is paused; None if it is not. Cheap: asked before each fetch."""
        return None


class Consumers(ABC):
    """The consumers of one backend, with and without a trigger in this engine, and their dead letters.

    Every method may be called from any thread, and may wait for a disk or a connection. Raises StorageError.
    """

    @abstractmethod
    def open(self, name: str, trigger: Trigger) -> ConsumerPort:
        """Return the consumer with this name. A new one begins where the `start` of the trigger says."""

    def share(self, name: str, trigger: Trigger) -> SharedConsumer:
        """Return the object that divides a consumer's events among engines that reach it through this one; as `open`.

        Raises Unsupported where consumers are kept elsewhere.
        """
        raise Unsupported(
            f"the durable trigger {name!r} through a bridge",
            "the other engine does not keep its consumers itself: register it where they are kept",
        )

    def settle(self, names: Sequence[str], marks: Mapping[str, int], wait_s: float) -> dict[str, int]:
        """Wait until what these consumers have to handle now is handled, in whichever engine; not for what waits long.

        Returns those that are not done after `wait_s`, each with its mark, which the next call takes as `marks`.
        """
        return {}

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all consumers, in order."""

    def served_elsewhere(self) -> list[str]:
        """Return the consumers of which another engine takes events. It waits for nothing."""
        return []

    def states(self) -> list[tuple[str, str | None]]:
        """Return each consumer that is known without asking anywhere, with why it is paused (None: it is not)."""
        return []

    def problems(self) -> list[str]:
        """Return what is wrong with what keeps the events. It waits for nothing."""
        return []

    def limits_changed(self) -> None:  # noqa: B027 - a backend may have its own limits
        """The limits of the configuration have changed."""

    @abstractmethod
    def status(self, name: str) -> ConsumerStatus | None:
        """Return how far a consumer has come, even if it has no trigger here; None if no consumer has this name."""

    def statuses(self) -> list[ConsumerStatus]:
        """Return how far all consumers have come, in the order of their names."""
        found = [self.status(name) for name in self.names()]
        return [status for status in found if status is not None]  # one may have been forgotten just now

    @abstractmethod
    def pause(self, name: str, why: str) -> bool:
        """Note that a consumer is paused; False if no consumer has this name. Its events are kept."""

    @abstractmethod
    def resume(self, name: str) -> bool:
        """Note that a consumer is paused no longer; False if no consumer has this name."""

    @abstractmethod
    def forget(self, name: str) -> bool:
        """Remove a consumer, with what it was to handle and its dead letters; False if no consumer has this name."""

    # -------------------------------------------------------------------------------------------------- dead letters

    @abstractmethod
    def letters(self, consumer: str | None, limit: int, after: str | None) -> list[DeadLetter]:
        """Return dead letters, the oldest first: those after the one with the id `after`."""

    @abstractmethod
    def letter(self, letter_id: str) -> DeadLetter | None:
        """Return a letter; None if no letter has this id."""

    @abstractmethod
    def replay(self, consumer: str | None, ids: Sequence[str] | None, *, reset: bool) -> int:
        """Turn letters into deliveries, and return how many. `ids` None: all. Each one whole, or not.

        `reset`: attempts, times and errors start again; else the attempts continue, with one more.
        """

    @abstractmethod
    def purge(self, consumer: str | None, ids: Sequence[str] | None, *, before_ms: int | None) -> int:
        """Remove letters permanently; return how many. `ids` None: all, or those that died before `before_ms`."""

    @abstractmethod
    def count(self, consumer: str | None) -> int:
        """Return how many letters there are."""
