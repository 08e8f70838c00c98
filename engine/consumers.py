"""`engine.consumers()` and `engine.dead_letters()`: progress of durable triggers, and events that they gave up."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from scopestate.actors.consuming import BY_THE_PROGRAM, Consumers, ConsumerStatus, DeadLetter
from scopestate.errors import DeserializationError, InvalidRegistration, Unsupported
from scopestate.ops.turns import checked_name
from scopestate.ops.values import class_name

if TYPE_CHECKING:
    from scopestate.aio import AioEngine
    from scopestate.engine import Engine

A = TypeVar("A")


class _Access:
    """Access to the consumers of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __repr__(self) -> str:
        return f"<consumers of {self._engine!r}>"

    def _found(self) -> Consumers | None:
        self._engine._refuse_if_closed()
        return self._engine._parts.consumers

    def _consumers(self) -> Consumers:
        found = self._found()
        if found is None:
            raise Unsupported("this call", "this engine keeps no journal, so it has no consumers")
        return found

    def _list(self) -> list[ConsumerStatus]:
        found = self._found()
        return [] if found is None else found.statuses()

    def _act(self, name: str, action: Callable[[Consumers], bool]) -> None:
        checked_name("consumer", name)
        if not action(self._consumers()):
            raise InvalidRegistration(f"there is no consumer {name!r}; `engine.consumers()` lists them")

    def _pause(self, name: str, why: str) -> None:
        checked_name("reason", why)
        self._act(name, lambda consumers: consumers.pause(name, why))

    def _resume(self, name: str) -> None:
        self._act(name, lambda consumers: consumers.resume(name))

    def _forget(self, name: str) -> None:
        self._act(name, lambda consumers: consumers.forget(name))


class EngineConsumers(_Access):
    """The consumers of an engine. Iteration yields the status of each. Methods may be called from any thread.

    Each raises StorageError if the store or the connection fails.
    """

    def __iter__(self) -> Iterator[ConsumerStatus]:
        return iter(self._list())

    def __len__(self) -> int:
        return len(self._list())

    def __getitem__(self, name: str) -> ConsumerStatus:
        """Return the status of a consumer. Raises KeyError if no consumer has this name."""
        return {status.name: status for status in self._list()}[name]

    def pause(self, name: str, why: str = BY_THE_PROGRAM) -> None:
        """Begin no more deliveries until `resume`, also after a restart. Events are kept; running handlers finish.

        Raises InvalidRegistration if no consumer has this name. It need not have a trigger in this program.
        """
        self._pause(name, why)

    def resume(self, name: str) -> None:
        """Resume deliveries of a paused consumer. Raises as `pause`."""
        self._resume(name)

    def forget(self, name: str) -> None:
        """Remove a consumer with its waiting events and its dead letters. Raises as `pause`.

        If its trigger is registered here, the trigger continues as a new consumer, with the events from then on.
        """
        self._forget(name)


class AioEngineConsumers(_Access):
    """As `EngineConsumers`, for asyncio: `await engine.aio.consumers()` returns a list."""

    def __init__(self, aio: AioEngine) -> None:
        super().__init__(aio._engine)
        self._aio = aio

    def __await__(self) -> Generator[Any, Any, list[ConsumerStatus]]:
        return self._aio.elsewhere(self._list).__await__()

    async def pause(self, name: str, why: str = BY_THE_PROGRAM) -> None:
        """As `EngineConsumers.pause`."""
        await self._aio.elsewhere(lambda: self._pause(name, why))

    async def resume(self, name: str) -> None:
        """As `EngineConsumers.resume`."""
        await self._aio.elsewhere(lambda: self._resume(name))

    async def forget(self, name: str) -> None:
        """As `EngineConsumers.forget`."""
        await self._aio.elsewhere(lambda: self._forget(name))


class _Letters(_Access):
    def __init__(self, engine: Engine, consumer: str | None) -> None:
        super().__init__(engine)
        self._consumer = None if consumer is None else checked_name("consumer", consumer)

    def __repr__(self) -> str:
        whose = "all" if self._consumer is None else repr(self._consumer)
        return f"<dead letters of {whose} in {self._engine!r}>"

    def _page(self, limit: int, after: str | None) -> builtins.list[DeadLetter]:
        if type(limit) is not int or limit < 1:
            raise DeserializationError(f"`limit` is a whole number of 1 or more, not {limit!r:.40}")
        if after is not None:
            checked_name("letter's id", after)
        found = self._found()
        return [] if found is None else found.letters(self._consumer, limit, after)

    def _one(self, letter_id: str) -> DeadLetter | None:
        checked_name("letter's id", letter_id)
        found = self._found()
        letter = None if found is None else found.letter(letter_id)
        return letter if letter is None or self._consumer in (None, letter.consumer) else None

    def _replay(self, ids: Iterable[str] | None, *, every: bool, reset: bool) -> int:
        chosen = _chosen("replay()", ids, chosen_otherwise=every, otherwise="`all=True`")
        return self._consumers().replay(self._consumer, chosen, reset=reset)

    def _purge(self, ids: Iterable[str] | None, *, every: bool, before: datetime | None) -> int:
        before_ms = None
        if before is not None:
            if not isinstance(before, datetime):
                raise DeserializationError(f"`before` is a datetime with a time zone, not {class_name(before)}")
            if before.tzinfo is None:
                raise DeserializationError(f"`before` is a datetime with a time zone; {before} has none")
            before_ms = int(before.timestamp() * 1000)
        otherwise = every or before is not None
        chosen = _chosen("purge()", ids, chosen_otherwise=otherwise, otherwise="`before`, or `all=True`")
        return self._consumers().purge(self._consumer, chosen, before_ms=before_ms)

    def _count(self) -> int:
        found = self._found()
        return 0 if found is None else found.count(self._consumer)


def _chosen(
    call: str, ids: Iterable[str] | None, *, chosen_otherwise: bool, otherwise: str
) -> builtins.list[str] | None:
    """Return the ids that a call names; None if another argument chooses. Without any argument nothing is chosen."""
    if (ids is None) != chosen_otherwise:
        raise DeserializationError(f"{call} takes the ids of letters, or {otherwise}")
    if ids is None:
        return None
    chosen = [ids] if isinstance(ids, str) else builtins.list(ids)
    for one in chosen:
        if not isinstance(one, str):
            raise DeserializationError(f"the id of a dead letter is a string, not {class_name(one)}")
        checked_name("letter's id", one)
    return chosen


class DeadLetters(_Letters):
    """The events that durable triggers have given up: of one consumer, or of all. Usable from any thread.

    Each raises StorageError if the store or the connection fails.
    """

    def list(self, limit: int = 100, after: str | None = None) -> builtins.list[DeadLetter]:
        """Return at most `limit` letters, the oldest first: those after the one with the id `after`."""
        return self._page(limit, after)

    def get(self, letter_id: str) -> DeadLetter | None:
        """Return one letter; None if no letter has this id."""
        return self._one(letter_id)

    def replay(self, ids: Iterable[str] | None = None, *, all: bool = False, reset: bool = True) -> int:  # noqa: A002 - as it is called
        """Have letters delivered again, all or none even if the process is killed; return their number.

        A letter that holds back later events of its lane is delivered first; others come after the events that wait
        now. With `reset`, attempts and times start again; without it the attempts are counted further, so one failure
        may make it a dead letter again.
        """
        return self._replay(ids, every=all, reset=reset)

    def purge(
        self,
        ids: Iterable[str] | None = None,
        *,
        all: bool = False,  # noqa: A002 - as it is called
        before: datetime | None = None,
    ) -> int:
        """Remove letters permanently, all or none; return their number.

        `before` chooses those given up before that time.

        Events that a letter held back are then delivered.
        """
        return self._purge(ids, every=all, before=before)

    def count(self) -> int:
        """Return how many letters there are."""
        return self._count()


class AioDeadLetters(_Letters):
    """As `DeadLetters`, for asyncio."""

    def __init__(self, aio: AioEngine, consumer: str | None) -> None:
        super().__init__(aio._engine, consumer)
        self._aio = aio

    async def list(self, limit: int = 100, after: str | None = None) -> builtins.list[DeadLetter]:
        """As `DeadLetters.list`."""
        return await self._aio.elsewhere(lambda: self._page(limit, after))

    async def get(self, letter_id: str) -> DeadLetter | None:
        """As `DeadLetters.get`."""
        return await self._aio.elsewhere(lambda: self._one(letter_id))

    async def replay(self, ids: Iterable[str] | None = None, *, all: bool = False, reset: bool = True) -> int:  # noqa: A002 - as it is called
        """As `DeadLetters.replay`."""
        return await self._aio.elsewhere(lambda: self._replay(ids, every=all, reset=reset))

    async def purge(
        self,
        ids: Iterable[str] | None = None,
        *,
        all: bool = False,  # noqa: A002 - as it is called
        before: datetime | None = None,
    ) -> int:
        """As `DeadLetters.purge`."""
        return await self._aio.elsewhere(lambda: self._purge(ids, every=all, before=before))

    async def count(self) -> int:
        """As `DeadLetters.count`."""
        return await self._aio.elsewhere(self._count)
