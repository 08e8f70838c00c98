"""Inputs and results of the functions for consumers and dead letters, for the schemas and for reading inputs.

`engine/consumer_functions.py` has the functions themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from scopestate.errors import DeserializationError, InvalidPageLimits
from scopestate.ops.requests import convert
from scopestate.ops.values import json_type, prepare

T = TypeVar("T")

_Name = Annotated[str, Meta(description="The consumer: the `durable` name of its trigger")]
_Consumer = Annotated[str | None, Meta(description="Only letters of this consumer")]
_Ids = Annotated[tuple[str, ...] | None, Meta(description="The ids of the letters, at most 1,000")]
_Every = Annotated[bool, Meta(description="All letters, or all of `consumer`, in place of `ids`")]

MOST_LETTERS: Final = 1_000


# ------------------------------------------------------------------------------------------------------------- inputs


class ConsumersInput(msgspec.Struct, frozen=True):
    """List the consumers of durable triggers, with how far each has come."""


class PauseInput(msgspec.Struct, frozen=True):
    """Pause a consumer: its events are kept, and no delivery begins until it is resumed."""

    name: _Name
    why: Annotated[str, Meta(description="Shown in the list and by `health()`", max_length=1_000)] = ""


class ResumeInput(msgspec.Struct, frozen=True):
    """Resume a consumer that is paused."""

    name: _Name


class ForgetInput(msgspec.Struct, frozen=True):
    """Remove a consumer, with the events that wait for it and its dead letters."""

    name: _Name


class LettersInput(msgspec.Struct, frozen=True):
    """List dead letters: events that a consumer has given up."""

    consumer: _Consumer = None
    limit: Annotated[int, Meta(description="At most this many, 1 to 1,000")] = 100
    after: Annotated[str | None, Meta(description="Only those after the letter with this id")] = None


class LetterInput(msgspec.Struct, frozen=True):
    """Return a dead letter; null if there is none with this id."""

    id: str


class ReplayInput(msgspec.Struct, frozen=True):
    """Have dead letters delivered again."""

    ids: _Ids = None
    all: _Every = False
    consumer: _Consumer = None
    reset: Annotated[bool, Meta(description="False: keep the number of their attempts")] = True


class PurgeInput(msgspec.Struct, frozen=True):
    """Remove dead letters permanently."""

    ids: _Ids = None
    all: _Every = False
    consumer: _Consumer = None
    before: Annotated[
        int | None, Meta(description="Only those given up before this time, in milliseconds since the epoch")
    ] = None


class CountInput(msgspec.Struct, frozen=True):
    """Count dead letters."""

    consumer: _Consumer = None


prepare(ConsumersInput, PauseInput, ResumeInput, ForgetInput)
prepare(LettersInput, LetterInput, ReplayInput, PurgeInput, CountInput)


# ------------------------------------------------------------------------------------------------------------ results


class ConsumerFound(msgspec.Struct):
    """One consumer."""

    name: str
    lag_events: Annotated[int, Meta(description="Approximate number of events that wait for it in the journal")]
    lag_seconds: Annotated[float, Meta(description="Age of the oldest of them")]
    in_flight: Annotated[int, Meta(description="Attempts that are running in this engine")]
    waiting: Annotated[int, Meta(description="Events that this engine holds for it")]
    dead: Annotated[int, Meta(description="Its dead letters")]
    paused: Annotated[str | None, Meta(description="Why it is paused; null if it is not")]
    active: Annotated[bool, Meta(description="False: no trigger has this name now, and its events are kept")]


class ConsumersFound(msgspec.Struct):
    """Result of `engine::consumers::list`."""

    consumers: list[ConsumerFound]


class ConsumerDone(msgspec.Struct):
    """Result of what is done to a consumer."""

    done: Annotated[bool, Meta(description="False: there is no consumer of this name")]


class LetterFound(msgspec.Struct):
    """One dead letter."""

    id: str
    consumer: str
    event: Annotated[dict[str, Any], Meta(description="The event as its function gets it")]
    revision: Annotated[int, Meta(description="The revision that the change gave to its key")]
    error: Annotated[str, Meta(description="The last error")]
    traceback: str
    attempts: Annotated[int, Meta(description="Attempts that were made")]
    first_at: Annotated[int, Meta(description="When the first began, in milliseconds since the epoch")]
    died_at: Annotated[int, Meta(description="When it was given up, in milliseconds since the epoch")]
    replays: Annotated[int, Meta(description="How often it was replayed before")]


class LettersFound(msgspec.Struct):
    """Result of `engine::dead-letters::list`."""

    letters: list[LetterFound]
    next: Annotated[str | None, Meta(description="`after` of the next call; null: there are no more")]


class LettersReplayed(msgspec.Struct):
    """Result of `engine::dead-letters::replay`."""

    replayed: int


class LettersPurged(msgspec.Struct):
    """Result of `engine::dead-letters::purge`."""

    purged: int


class LettersCounted(msgspec.Struct):
    """Result of `engine::dead-letters::count`."""

    count: int


def read_input(payload: object, kind: type[T]) -> T:
    """Read an input; if it is absent or null, it is read as `{}`. Raises DeserializationError and InvalidPageLimits."""
    if payload is None:
        payload = {}
    if not isinstance(payload, Mapping):
        raise DeserializationError(f"expected an object, got {json_type(payload)}")
    given = convert(payload, kind)
    match given:
        case LettersInput(limit=limit) if not 1 <= limit <= MOST_LETTERS:
            raise InvalidPageLimits(f"`limit` is from 1 to {MOST_LETTERS}, not {limit}")
        case ReplayInput(ids=ids, all=everything) | PurgeInput(ids=ids, all=everything):
            by_time = isinstance(given, PurgeInput) and given.before is not None
            if (ids is not None) == (everything or by_time):
                more = ", `before`" if isinstance(given, PurgeInput) else ""
                raise DeserializationError(f"name the letters by `ids`{more} or `all: true`")
            if ids is not None and len(ids) > MOST_LETTERS:
                raise DeserializationError(f"`ids` has {len(ids)} letters, and a call takes {MOST_LETTERS}")
    return given


class ConsumerFunction(NamedTuple):
    """One of these functions."""

    function_id: str
    given: type[Any]
    """Its input. The docstring is the description of the function."""
    response: Any
    """The type of its result."""


CONSUMER_FUNCTIONS: Final = tuple(
    ConsumerFunction(*row)
    for row in (
        ("engine::consumers::list", ConsumersInput, ConsumersFound),
        ("engine::consumers::pause", PauseInput, ConsumerDone),
        ("engine::consumers::resume", ResumeInput, ConsumerDone),
        ("engine::consumers::forget", ForgetInput, ConsumerDone),
        ("engine::dead-letters::list", LettersInput, LettersFound),
        ("engine::dead-letters::get", LetterInput, LetterFound | None),
        ("engine::dead-letters::replay", ReplayInput, LettersReplayed),
        ("engine::dead-letters::purge", PurgeInput, LettersPurged),
        ("engine::dead-letters::count", CountInput, LettersCounted),
    )
)
