"""What the handler of a durable trigger receives and can raise, and when a failed delivery is tried again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import msgspec

from scopestate.errors import InvalidRegistration, Unsupported

if TYPE_CHECKING:
    from scopestate.ops.results import StateEvent

Errors = type[BaseException] | tuple[type[BaseException], ...]

LONGEST_S: Final = 366 * 86_400.0
"""The longest pause, in seconds. It keeps a mistake in units from reaching the timers."""
MOST_ATTEMPTS: Final = 1_000_000


def _is_within(value: object, least: float, most: float) -> bool:
    """Return whether `value`, which may be any object, is a number from `least` to `most`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


class Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often, and after which pauses, a failed delivery is tried again.

    The pause after attempt n is `first * factor ** (n - 1)` seconds, at most `longest`, varied at random by `jitter`.
    Raises InvalidRegistration for values that make no sense.
    """

    json_fields: ClassVar[tuple[str, ...]] = ("attempts", "first", "factor", "longest", "jitter")
    """The fields that a file or a worker can give."""

    attempts: int = 10
    """The number of attempts, including the first. If the last one fails, the delivery is given up. At least 1."""
    first: float = 1.0
    """Seconds between the first attempt and the second."""
    factor: float = 2.0
    """Each pause is this many times the one before; at least 1."""
    longest: float = 300.0
    """The longest pause, in seconds."""
    jitter: float = 0.2
    """Fraction of the pause by which it varies, up or down: 0.2 makes 10 s into 8 to 12 s. From 0 to 1."""
    on: Errors = Exception
    """Classes of errors after which the delivery is tried again. After any other error it is given up at once."""

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or not 1 <= self.attempts <= MOST_ATTEMPTS:
            raise InvalidRegistration(
                f"`attempts` of a retry is a whole number from 1 to {MOST_ATTEMPTS:,}, not {self.attempts!r:.40}"
            )
        for name, least, most in (
            ("first", 0.0, LONGEST_S),
            ("factor", 1.0, 1000.0),
            ("longest", 0.0, LONGEST_S),
            ("jitter", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not _is_within(value, least, most):
                raise InvalidRegistration(
                    f"`{name}` of a retry is a number from {least:g} to {most:,.0f}, not {value!r:.40}"
                )
        given: object = self.on  # whatever the program passed
        kinds = given if isinstance(given, tuple) else (given,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise InvalidRegistration(
                f"`on` of a retry is a class of exceptions, or a tuple of them, not {self.on!r:.80}"
            )

    def tries_again(self, attempt: int, error: BaseException) -> bool:
        """Return whether there is another attempt after number `attempt`, which has failed with `error`."""
        return attempt < self.attempts and isinstance(error, self.on)

    def pause_s(self, attempt: int, random: float) -> float:
        """Return the seconds between this attempt and the next. `random`: from 0 to 1, not included."""
        try:
            pause = min(self.first * self.factor ** (attempt - 1), self.longest)
        except OverflowError:
            pause = self.longest
        return min(pause * (1.0 + self.jitter * (2.0 * random - 1.0)), LONGEST_S)


_NUMBERS: Final = ("attempts", "first", "factor", "longest", "jitter")


def read_retry(given: object) -> Retry:
    """Return the `Retry` that a program, a file or a worker gives: an instance, or a mapping with its fields.

    Raises InvalidRegistration. A mapping cannot name `on`: it is for programs in Python.
    """
    if isinstance(given, Retry):
        return given
    if not isinstance(given, Mapping):
        raise InvalidRegistration(f"`retry` is a Retry, or an object with {', '.join(_NUMBERS)}")
    unknown = [str(name) for name in given if name not in _NUMBERS]
    if unknown:
        raise InvalidRegistration(
            f"`retry` has unknown field(s) {', '.join(sorted(unknown))[:80]}; known are {', '.join(_NUMBERS)}"
        )
    return Retry(**given)


class RetryLater(Exception):
    """Raised by the handler of a durable trigger: deliver this event again, after this many seconds.

    It does not count as a failed attempt: `Delivery.attempt` stays, and nothing is reported. The events after it, in
    the order of the trigger, wait for it.
    """

    def __init__(self, seconds: float) -> None:
        if not _is_within(seconds, 0, LONGEST_S):
            raise ValueError(f"RetryLater takes seconds, from 0 to {LONGEST_S:,.0f}, not {seconds!r:.40}")
        super().__init__(f"in {seconds:g} s")
        self.seconds = float(seconds)


class Discard(Exception):
    """Raised by the handler of a durable trigger: do not deliver this event again.

    It goes to the dead letters at once, with the reason, and the events after it are delivered, even with
    `on_giving_up="block"`. A handler that has nothing to do with an event returns instead.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = str(why)


class DeliveryRuntime(Protocol):
    """The engine's side of a delivery."""

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """See `Delivery.extend`."""

    def transaction(self, delivery: Delivery, scope: str) -> Any:
        """See `Delivery.transaction`."""


class _NoEngine:
    """The runtime of an example delivery."""

    def extend(self, delivery: Delivery, seconds: float) -> None:
        """There is no time limit."""

    def transaction(self, delivery: Delivery, scope: str) -> Any:
        """Refuse."""
        raise Unsupported(
            "the transaction of an example of a delivery", "have an engine deliver the event, as `state_store` does"
        )


class Delivery:
    """One attempt to have an event handled by a durable trigger: the second argument of its handler, if it takes two.

    Use it only while the handler runs. Its methods may be called from any thread.
    """

    __slots__ = ("_runtime", "attempt", "consumer", "event", "first_ms", "metadata", "position")

    def __init__(
        self,
        consumer: str,
        position: int,
        event: StateEvent,
        attempt: int,
        first_ms: int,
        metadata: Any,
        runtime: DeliveryRuntime,
    ) -> None:
        self.consumer = consumer
        """The name of the durable trigger."""
        self.position = position
        """The number of the event in the journal."""
        self.event = event
        self.attempt = attempt
        """1 for the first attempt. An attempt that was interrupted by the end of the process counts too."""
        self.first_ms = first_ms
        """When the first attempt began, in milliseconds since the epoch."""
        self.metadata = metadata
        """The `metadata` that the trigger was registered with."""
        self._runtime = runtime

    @classmethod
    def example(
        cls,
        event: StateEvent,
        *,
        consumer: str = "consumer",
        attempt: int = 1,
        position: int = 1,
        first_ms: int = 1_767_225_600_000,
        metadata: Any = None,
    ) -> Delivery:
        """Return a delivery made without an engine, for unit tests of a handler: `handle(event, delivery)`.

        `extend` checks its argument and does nothing; `transaction` raises Unsupported, as there is no scope to change.
        """
        return cls(consumer, position, event, attempt, first_ms, metadata, _NoEngine())

    @property
    def id(self) -> str:
        """An id such as "ship-orders:81234": the same for every attempt, and different for every other delivery."""
        return f"{self.consumer}:{self.position}"

    @property
    def first_at(self) -> datetime:
        """When the first attempt began, in UTC."""
        return datetime.fromtimestamp(self.first_ms / 1000, UTC)

    def extend(self, seconds: float) -> None:
        """Give this attempt `seconds` from now, instead of the rest of the trigger's `ack_wait`.

        Raises ValueError unless `seconds` is more than 0 and at most 366 days, and EngineClosed or Unsupported if the
        attempt has ended.
        """
        if not _is_within(seconds, 0, LONGEST_S) or not seconds:
            raise ValueError(f"extend takes seconds, more than 0 and at most {LONGEST_S:,.0f}, not {seconds!r:.40}")
        self._runtime.extend(self, float(seconds))

    def transaction(self, scope: str) -> Any:
        """Return a transaction on one scope that also acknowledges this delivery: both happen, or neither.

        `with delivery.transaction("stock") as tx:` or, in a coroutine, `async with`. `tx` has `get`, `set`, `update`,
        `delete` and `check`; it reads its own writes. The end of the block checks the keys that were read: if another
        writer has changed one, `Conflict` is raised, and a handler that does not catch it is called again a moment
        later. If the block raises, nothing is written and nothing is acknowledged. After the block the delivery is
        done: if the handler fails later, that is reported, but the event is not delivered again. Raises Unsupported for
        a second transaction of one delivery, and if the scope is not kept where the journal is.
        """
        return self._runtime.transaction(self, scope)

    def __repr__(self) -> str:
        return f"<Delivery {self.id!r}, attempt {self.attempt}>"
