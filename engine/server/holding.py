"""Engines behind a bridge that take and handle events of consumers here (docs/reference/protocol.md 13.1)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from scopestate.actors.backlog import size_of
from scopestate.actors.consuming import Outcome
from scopestate.actors.durable_attempt import LONGEST_TEXT
from scopestate.actors.holders import Holder
from scopestate.errors import (
    ConfigError,
    Conflict,
    DeserializationError,
    Forbidden,
    InvalidRegistration,
    KeyConflict,
    ScopestateError,
    Unsupported,
)
from scopestate.ops import handed
from scopestate.ops.requests import Request
from scopestate.ops.transactions import Batch, DeliveryBatch
from scopestate.ops.values import json_words
from scopestate.reactive import read_trigger
from scopestate.server.durable import refuse_too_many

if TYPE_CHECKING:
    from scopestate.actors.consuming import Consumers, Held
    from scopestate.actors.shared_consumer import SharedConsumer
    from scopestate.ops.triggers import Trigger
    from scopestate.server.access import Access
    from scopestate.server.hub import Hub
    from scopestate.server.worker import Worker

CLAIM_S: Final = 2.0
"""Seconds that an engine whose connection is lost keeps the events that it is handling, as it may come back. If its
process was on this machine and has ended, it loses them at once."""
PATIENCE_S: Final = 2.0
"""An engine that is silent for this many seconds, or for the `ack_wait` of its trigger if that is longer, is
dismissed."""
LOOK_S: Final = 0.1
MOST_HOLDERS: Final = 1_000
"""Holders that one connection may have: one for each durable trigger."""
_MOST: Final = 256

_encode: Final = msgspec.json.Encoder().encode


class _Place:
    """One engine behind a bridge, at one consumer. On the server's event loop, except `wake` and `note_lost`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, shared: SharedConsumer, access: Access | None) -> None:
        self.shared = shared
        self.access = access
        self.holder: Holder
        self.worker: Worker | None = None
        """The connection on which it requests events."""
        self.pid = 0
        """The id of its process, if that is on this machine."""
        self.news = asyncio.Event()
        self.lost: list[int] = []
        self.paused: str | None = None
        """As it knows it."""
        self.stands_by = False
        """As it knows it."""
        self.heard_s = loop.time()
        self.takes = 0
        """How many of its calls wait for events."""
        self.is_joining = True
        """True until the consumer has accepted or refused it."""
        self._loop = loop
        self._woken = False

    def wake(self) -> None:
        """Note that there may be events for it. From any thread."""
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._woken = False
        self.news.set()

    def note_lost(self, positions: Sequence[int]) -> None:
        """Note that it no longer holds these events. From any thread."""
        self.lost.extend(positions)  # not `+=`, which would put back a list that was taken in the meantime
        self.wake()

    def take_lost(self) -> list[int]:
        """Return the lost positions that it was not told about."""
        lost = self.lost.copy()
        del self.lost[: len(lost)]
        return lost

    @property
    def is_held(self) -> bool:
        """Whether it is still a holder."""
        return self.shared.holder(self.holder.name) is self.holder and not self.shared.is_forgotten


class Deliveries:
    """Function id -> the function, for the engines behind bridges. On the server's event loop only."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._places: dict[tuple[str, str], _Place] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._gives = True
        self.by_id: dict[str, Callable[[Raw, Worker], Awaitable[bytes]]] = {
            handed.JOIN: self._join,
            handed.TAKE: self._take,
            handed.NOTE: self._note,
            handed.DRAIN: self._drain,
        }

    @property
    def _consumers(self) -> Consumers:
        consumers = self._hub.engine._parts.consumers
        if consumers is None:
            raise ConfigError("the other engine has no store that outlives it, so it has no durable triggers")
        return consumers

    @staticmethod
    def _name(worker: Worker, name: str) -> str:
        return name if worker.access is None else worker.access.consumer(name)

    async def _elsewhere(self, worker: Worker, work: Callable[[], Any]) -> Any:
        async with worker.slow:
            return await self._hub.engine.aio.elsewhere(work)

    # --------------------------------------------------------------------------------------------- coming and going

    async def _join(self, data: Raw, worker: Worker) -> bytes:
        asked = _read(handed.JOIN, data, handed.Join)
        name = self._name(worker, asked.consumer)
        trigger = read_trigger(asked.function_id, asked.trigger_id, {**asked.config, "durable": name})
        _check_rights(worker.access, trigger)
        consumers = self._consumers

        def begin() -> SharedConsumer:
            refuse_too_many(consumers, worker.access, name)
            return consumers.share(name, trigger)

        shared = await self._elsewhere(worker, begin)
        place = _Place(self._hub.loop, shared, worker.access)
        now_s = self._hub.engine._parts.dispatcher.monotonic
        place.holder = Holder(asked.holder, trigger, asked.since_ms, place.wake, place.note_lost, now_s)
        before = self._places.get((name, asked.holder))
        if before is None and sum(one.worker is worker for one in self._places.values()) >= MOST_HOLDERS:
            raise InvalidRegistration(f"this connection takes events for {MOST_HOLDERS} durable triggers already")
        self._places[name, asked.holder] = place
        if self._hub.workers.get(worker.worker_id) is worker:  # otherwise its connection was lost in the meantime
            place.worker = worker
        place.paused = shared.source.paused()

        def join() -> list[int]:
            while (found := place.shared.join(place.holder, asked.held)) is None:
                place.shared = consumers.share(name, trigger)
            return found

        try:
            lost = await self._elsewhere(worker, join)
        finally:
            place.is_joining = False
        if before is not None:
            before.news.set()  # a call that waits there would get no more news
        self._look_later()
        return _encode(handed.Joined(lost, place.paused))

    def _place(self, worker: Worker, consumer: str, holder: str) -> _Place | None:
        place = self._places.get((self._name(worker, consumer), holder))
        if place is None or place.access is not worker.access:
            return None
        place.heard_s = self._hub.loop.time()
        return place if place.is_held else None

    def disconnect(self, worker: Worker) -> None:
        """Note that the connection of a worker is lost: it may come back in a moment, or its process is gone."""
        for place in self._places.values():
            if place.worker is worker:
                place.worker = None
                place.pid = 0 if self._hub.public else worker.metadata.get("pid") or 0
                place.heard_s = self._hub.loop.time()
                place.news.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._look_later()

    def _look_later(self) -> None:
        if self._timer is None and self._places:
            away = any(place.worker is None for place in self._places.values())
            self._timer = self._hub.loop.call_later(LOOK_S if away else PATIENCE_S / 4, self._look)

    def _look(self) -> None:
        """Dismiss the engines that are gone, or silent."""
        self._timer = None
        now_s = self._hub.loop.time()
        for key, place in list(self._places.items()):
            patience_s = max(place.holder.trigger.ack_wait, PATIENCE_S)
            silent_s = 0.0 if place.takes else now_s - place.heard_s
            if place.is_joining:
                continue
            if not place.is_held:
                del self._places[key]
            elif silent_s > (CLAIM_S if place.worker is None else patience_s) or _is_gone(place):
                del self._places[key]
                self._hub.log.warning(
                    "consumer %r: the events that a follower was handling go to another engine: %s",
                    key[0],
                    "its connection was lost" if place.worker is None else f"it sent nothing for {silent_s:.3g} s",
                )
                self._hub.spawn(self._dismiss(place))
        self._look_later()

    async def _dismiss(self, place: _Place) -> None:
        with suppress(ScopestateError):  # the engine is closing
            await self._hub.engine.aio.elsewhere(lambda: place.shared.leave(place.holder.name))

    def hold(self) -> None:
        """Give no more events, as the engine closes and another one continues. Waiting calls are answered."""
        self._gives = False
        for place in self._places.values():
            place.news.set()

    def close(self) -> None:
        """The server stops."""
        if self._timer is not None:
            self._timer.cancel()
        for place in self._places.values():
            place.news.set()
        self._places.clear()

    # ------------------------------------------------------------------------------------------------------- taking

    async def _take(self, data: Raw, worker: Worker) -> bytes:
        asked = _read(handed.TAKE, data, handed.Take)
        place = self._place(worker, asked.consumer, asked.holder)
        if place is None:
            name = self._name(worker, asked.consumer)
            gone = self._places.pop((name, asked.holder), None)
            return _encode(handed.Taken(gone=True, forgotten=gone is not None and gone.shared.is_forgotten))
        place.worker = worker
        place.takes += 1
        try:
            return _encode(await self._taken(place, asked, worker))
        finally:
            place.takes -= 1
            place.heard_s = self._hub.loop.time()

    async def _taken(self, place: _Place, asked: handed.Take, worker: Worker) -> handed.Taken:
        loop = self._hub.loop
        ends_s = loop.time() + min(asked.wait_ms, handed.LONGEST_WAIT_MS) / 1000
        found: list[Held] = []
        while True:
            place.news.clear()
            _check_rights(worker.access, place.holder.trigger)
            if not place.is_held or place.worker is not worker:
                return handed.Taken(gone=True, forgotten=place.shared.is_forgotten)
            most = min(asked.most, _MOST)
            if most > 0 and self._gives:
                found = await self._elsewhere(worker, partial(place.shared.fetch, place.holder, most))
            paused, left_s = place.shared.source.paused(), ends_s - loop.time()
            news = paused != place.paused or place.holder.stands_by != place.stands_by
            if found or place.lost or news or left_s <= 0 or not self._gives:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await place.news.wait()
        place.paused, place.stands_by = paused, place.holder.stands_by
        lost = place.take_lost()
        sent = _as_many_as_fit(found)
        if len(sent) < len(found):
            place.shared.keep(place.holder, found[len(sent) :])
        return handed.Taken([_handed(item) for item in sent], lost, paused, stands_by=place.stands_by)

    # ------------------------------------------------------------------------------------------------------ outcomes

    async def _note(self, data: Raw, worker: Worker) -> bytes:
        asked = _read(handed.NOTE, data, handed.Note)
        place = self._place(worker, asked.consumer, asked.holder)
        if place is None:
            return _encode(handed.Noted([position for position, _ in asked.began], is_holder=False))
        if asked.flush or asked.letters or asked.leave or asked.resolve is not None:
            noted: handed.Noted = await self._elsewhere(worker, lambda: self._noted(place, asked))
        else:
            noted = self._noted(place, asked)  # it does not use the disk, and switching threads takes longer
        return _encode(noted)

    @staticmethod
    def _noted(place: _Place, asked: handed.Note) -> handed.Noted:
        shared, holder = place.shared, place.holder
        noted = handed.Noted()
        if asked.ended:
            shared.ended(holder, [_outcome(one) for one in asked.ended])
        if asked.began:
            noted.gone = shared.began(holder, asked.began, asked.serial)
        if asked.flush:
            shared.source.flush()
        if asked.resolve is not None:
            noted.acknowledged = shared.resolve(holder, *asked.resolve)
        if asked.letters:
            noted.full = shared.source.full(asked.letters)
        if asked.leave:
            shared.retire(holder.name)
        return noted

    def acknowledging(self, request: Request, told: Any, worker: Worker) -> Request:
        """Return the request for a transaction that acknowledges a delivery. Raises Unsupported and Conflict."""
        try:
            consumer, holder, position, serial = msgspec.convert(told, tuple[str, str, int, int])
        except msgspec.ValidationError as error:
            raise DeserializationError(f"`_delivery`: {json_words(error)}") from error
        place, batch = self._place(worker, consumer, holder), request.turn
        if type(batch) is not Batch:
            raise Unsupported("a transaction of a delivery", "with `_delivery` it takes no idempotency key")
        if place is None:
            # The previous owner of the store has given this event. Its next attempt, if there is one, acknowledges
            # here.
            raise Conflict(request.scope, (KeyConflict(0, next(iter(batch.keys), ""), None, 0),))
        fence = place.shared.fence(place.holder, position, serial)
        acks = place.shared.source.transaction(position, request.scope)
        turn = DeliveryBatch(batch.steps, batch.checks, batch.if_revision, batch.max_bytes, acks, fence)
        return request._replace(turn=turn)

    # ------------------------------------------------------------------------------------------------------- waiting

    async def _drain(self, data: Raw, worker: Worker) -> bytes:
        asked = _read(handed.DRAIN, data, handed.Drain)
        consumers, wait_s = self._consumers, min(asked.wait_ms, 1000) / 1000
        whole = {self._name(worker, name): name for name in asked.consumers}
        marks = {self._name(worker, name): mark for name, mark in asked.marks.items()}
        left = await self._elsewhere(worker, lambda: consumers.settle(list(whole), marks, wait_s))
        return _encode(handed.Drained({whole[name]: mark for name, mark in left.items()}))


def _is_gone(place: _Place) -> bool:
    """Return whether the process of an engine whose connection was lost has ended."""
    if place.worker is not None or not place.pid or sys.platform == "win32":
        return False
    try:
        os.kill(place.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # the process belongs to another user
    return False


def _outcome(told: handed.HandedOutcome) -> Outcome:
    # The texts are as long as the other engine makes them, and are kept with the event.
    texts = {"error": told.error[:LONGEST_TEXT], "traceback": told.traceback[-LONGEST_TEXT:]}
    return Outcome(**{**msgspec.structs.asdict(told), **texts})


def _as_many_as_fit(found: list[Held]) -> list[Held]:
    size = 0
    for count, item in enumerate(found):
        size += size_of(item.event)
        if size > handed.MOST_BYTES and count:
            return found[:count]
    return found


def _handed(item: Held) -> handed.HandedEvent:
    return handed.HandedEvent.of(
        item.event,
        attempts=item.attempts,
        first_ms=item.first_ms,
        due_ms=item.due_ms,
        error=item.error,
        cut_off=item.cut_off,
        blocked=item.blocked,
    )


def _check_rights(access: Access | None, trigger: Trigger) -> None:
    if access is None:
        return
    if access.own_consumer(trigger.durable or "") is None:
        raise Forbidden(f"the token of this connection does not have the consumer {trigger.durable!r}")
    access.check_watch(trigger.scope, trigger.scope_prefix)


def _read(function_id: str, data: Raw, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(bytes(data) or b"null", type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DeserializationError(f"Failed to deserialize input for {function_id}: {json_words(error)}") from error
