"""The engine for asyncio: the same calls as coroutines."""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

import pykka

from scopestate.actors.backlog import HandlerFull, no_room
from scopestate.actors.callbacks import IN_CALLBACK, refuse_in_callback, run_callback
from scopestate.actors.loops import Deadlines, LoopReply
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.scope import ScopeActor
from scopestate.actors.snapshot import Flush
from scopestate.actors.turn import BUSY
from scopestate.aio_state import AioStateCalls
from scopestate.consumers import AioDeadLetters, AioEngineConsumers
from scopestate.draining import drain_steps
from scopestate.errors import Overloaded, ReplyTimeout
from scopestate.ops import checked, messages, polls, turns
from scopestate.ops.arguments import answer_of, delete_turn, set_turn, turn_of, update_turn
from scopestate.ops.functions import BUILT_IN, FLUSH, from_payload
from scopestate.ops.options import DeleteOptions, SetOptions, UpdateOptions, WatchOptions
from scopestate.ops.results import SetResult, T, UpdateResult
from scopestate.ops.turns import checked_name, refuse_size
from scopestate.ops.update_ops import AnyOp
from scopestate.ops.values import decode, encode
from scopestate.ops.writes import Durable
from scopestate.polled_watching import watch_later
from scopestate.snapshots import REFUSED
from scopestate.watch_settings import WatchSettings
from scopestate.watching import AioChanges

if TYPE_CHECKING:
    from scopestate.engine import Engine
    from scopestate.handles import AioScope, PlainAioScope
    from scopestate.typed_results import OnInvalid

A = TypeVar("A")


class AioEngine(AioStateCalls):
    """The calls of an `Engine` as coroutines, from any number of event loops at once.

    A call on a scope that is idle and in memory is answered without suspending. A busy scope, one that must be loaded,
    a commit, a full handler, Redis and a bridge suspend the task; none of them blocks the event loop. If a task is
    cancelled while it waits, its call is withdrawn: nothing is written if the turn had not begun, or, in Redis and
    behind a bridge, if the call was not sent yet.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scopes = engine._scopes
        self._limits = engine._limits
        self._count_set = engine._count_set
        self._count_get = engine._count_get
        self._deadlines: dict[asyncio.AbstractEventLoop, Deadlines] = {}

    def __repr__(self) -> str:
        return f"<AioEngine of {self._engine!r}>"

    async def set(self, scope: str, key: str, value: object, **options: Unpack[SetOptions]) -> SetResult:
        """As `Engine.set`."""
        if IN_CALLBACK:
            refuse_in_callback()
        data = encode(value)
        limit = self._limits.max_value_bytes
        if limit:
            refuse_size(scope, key, data, limit)
        if type(key) is not str or not key.isascii():
            key = checked_name("key", key)
        if options:
            turn_with, durable = set_turn(key, data, options)
            return await self._run(scope, turn_with, durable)
        self._count_set()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        turn = turns.Set(key, data)
        try:
            answer = self._scopes[scope].run_now(turn)  # as in `_at_once`: one coroutine less for most writes
        except HandlerFull:
            return await self._run_when_room(scope, turn)
        return await self._run_later(scope, turn) if answer is BUSY else answer

    async def get(self, scope: str, key: str, default: Any = None) -> Any:
        """As `Engine.get`."""
        if IN_CALLBACK:
            refuse_in_callback()
        self._count_get()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        if type(key) is not str:
            key = checked_name("key", key)
        actor = self._scopes[scope]
        values = actor.readable
        if values is not None:
            actor.touched = True
            data = values.get(key)
            if data is not None and actor.readable is values:
                return decode(data)
        key = checked_name("key", key)  # as in `Engine.get`
        if values is None or actor.readable is not values:
            data = await self._at_once(scope, turns.Get(key))
        return default if data is None else decode(data)

    async def delete(self, scope: str, key: str, **options: Unpack[DeleteOptions]) -> Any:
        """As `Engine.delete`."""
        key = checked_name("key", key)
        if options:
            turn, durable = delete_turn(key, **options)
            return (await self._run(scope, turn, durable)).old_value
        data = await self._run(scope, turns.Delete(key))
        return None if data is None else decode(data)

    async def update(
        self, scope: str, key: str, ops: Iterable[AnyOp], **options: Unpack[UpdateOptions]
    ) -> UpdateResult:
        """As `Engine.update`."""
        if options:
            turn, durable = update_turn(checked_name("key", key), ops, **options)
            return await self._run(scope, turn, durable)
        return await self._run(scope, turns.Update(checked_name("key", key), checked(ops)))

    async def list(self, scope: str) -> builtins.list[Any]:
        """As `Engine.list`."""
        if IN_CALLBACK:
            refuse_in_callback()
        self._engine._tally["state::list"].add()
        scope = checked_name("scope", scope)
        everything = self._scopes[scope].values_now()
        if everything is None:
            everything = await self._at_once(scope, turns.List())
        return [decode(data) for data in everything]

    async def list_groups(self) -> builtins.list[str]:
        """As `Engine.list_groups`."""
        engine = self._engine
        if not engine._parts.backend.keeps or engine._forked:
            return engine.list_groups()  # nothing to wait for; a forked child, where no thread would run it, raises
        groups: list[str] = await _outcome(engine._parts.dispatcher.submit, engine.list_groups)
        return groups

    def watch(
        self, scope: str | None = None, scope_prefix: str | None = None, **options: Unpack[WatchOptions]
    ) -> AioChanges:
        """As `Engine.watch`, for `async with` and `async for`. It begins when it is entered or first read."""
        return watch_later(self._engine, WatchSettings(scope, scope_prefix, options))

    @overload
    def scope(self, scope: str) -> PlainAioScope: ...

    @overload
    def scope(self, scope: str, *, type: type[T], on_invalid: OnInvalid = "raise") -> AioScope[T]: ...

    @overload
    def scope(self, scope: str, *, type: Any, on_invalid: OnInvalid = "raise") -> AioScope: ...

    def scope(self, scope: str, *, type: Any = None, on_invalid: OnInvalid = "raise") -> AioScope[Any]:  # noqa: A002 - as there
        """As `Engine.scope`."""
        return self._engine.scope(scope, type=type, on_invalid=on_invalid).aio

    async def ask(self, message: messages.Message) -> Any:
        """As `Engine.ask`: send a message and wait for the answer."""
        if isinstance(message, messages.ListGroups):
            return await self.list_groups()
        turn, durable = turn_of(message, self._limits, run_callback)
        return answer_of(message, await self._run(message.scope, turn, durable))

    async def call(self, function_id: str, payload: object = None) -> Any:
        """As `Engine.call`. A plain function runs on a worker thread, a coroutine function on its event loop."""
        function = self._engine._functions.get(function_id)
        if not function.builtin or function.is_async:
            self._engine._refuse_if_closed()
            return await self._engine._caller.call_async(function, payload)
        row = BUILT_IN.get(function_id)
        if function_id == polls.FUNCTION_ID:
            self._engine._refuse_if_closed()
            self._engine._tally[function_id].add()
            return decode(await self._engine._polls.answer_later(payload))
        if row is None:
            return await self.elsewhere(partial(function.target, payload))
        fields = row.plain_fields(payload)
        if fields is not None:
            return row.plain(await getattr(self, row.method)(*fields))
        if row.read is None:
            from_payload(function_id, payload)
            return {"groups": await self.list_groups()}
        call = self._engine._builtin_call(function_id, payload)
        text = call.answer_at_hand()
        if text is not None:
            self._engine._refuse_if_closed()
            self._engine._tally[function_id].add()
        else:
            request = call.request
            try:
                text = call.answer(await self._run(request.scope, request.turn, request.durable))
            except REFUSED as error:
                text = call.refusal(error)
        return None if text is None else decode(text)

    async def elsewhere(self, work: Callable[[], A]) -> A:
        """Run `work()`, which may wait for a disk, on a worker thread; return its result, or raise what it raises."""
        self._engine._refuse_if_closed()  # in a forked child no thread would run it
        answer: A = await _outcome(self._engine._parts.dispatcher.submit, work)
        return answer

    def consumers(self) -> AioEngineConsumers:
        """As `Engine.consumers`; `await` it for a list."""
        return AioEngineConsumers(self)

    def dead_letters(self, consumer: str | None = None) -> AioDeadLetters:
        """As `Engine.dead_letters`."""
        return AioDeadLetters(self, consumer)

    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as the engine's own
        """As `Engine.drain`."""
        self._engine._refuse_if_drained()
        steps = drain_steps(self._engine._parts, timeout)
        outcome: Any = None
        error: pykka.Timeout | None = None
        try:
            while True:
                wanted, left_s = steps.send(outcome) if error is None else steps.throw(error)
                outcome, error = None, None
                try:
                    outcome = await (
                        _answer(wanted, left_s) if isinstance(wanted, Reply) else _on_thread(wanted, "scopestate-drain")
                    )
                except pykka.Timeout as late:
                    error = late
        except StopIteration:
            return
        finally:
            steps.close()

    async def flush(self) -> None:
        """As `Engine.flush`."""
        engine = self._engine
        engine._refuse_if_closed()
        engine._tally[FLUSH].add()
        backend = engine._parts.backend
        if backend.saves_elsewhere:
            await self.elsewhere(backend.flush)
        await engine._snapshot.ask(Flush())

    async def close(self) -> None:
        """As `Engine.close`. Handlers on this event loop can run until it is closed."""
        # Not on one of the engine's own workers, which end when it closes.
        await _on_thread(self._engine.close, "scopestate-close")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, scope: str, turn: turns.Turn[A], durable: bool | None = None) -> A:
        """As `Engine._run`, without blocking the event loop."""
        if IN_CALLBACK:
            refuse_in_callback()
        self._engine._tally[turn.function_id].add()
        if type(scope) is not str:
            scope = checked_name("scope", scope)
        if durable is not None:
            return await self._run_with(scope, turn, durable)
        return await self._at_once(scope, turn)

    async def _run_with(self, scope: str, turn: turns.Turn[A], durable: bool) -> A:
        turn = self._scopes[scope].with_durability(turn, durable)
        return await (self._run_later(scope, turn) if type(turn) is Durable else self._at_once(scope, turn))

    async def _at_once(self, scope: str, turn: turns.Turn[A]) -> A:
        """Run `turn` at once if the scope is idle and in memory; else wait without blocking the event loop."""
        try:
            answer = self._scopes[scope].run_now(turn)
        except HandlerFull:
            return await self._run_when_room(scope, turn)
        return await self._run_later(scope, turn) if answer is BUSY else answer

    async def _run_later(self, scope: str, turn: turns.Turn[A]) -> A:
        """Queue `turn` for its scope, and wait for the answer without blocking the event loop."""
        try:
            return await self._queued(self._scopes[scope], turn)
        except HandlerFull:
            return await self._run_when_room(scope, turn)

    async def _queued(self, actor: ScopeActor, turn: turns.Turn[A]) -> A:
        reply = LoopReply()
        actor.send(Envelope(turn, reply))
        timeout_s = self._limits.call_timeout_s
        answer: A
        deadlines = None
        if timeout_s is not None:
            deadlines = self._deadlines.get(reply.loop) or self._deadlines_of(reply.loop)
            deadlines.add(reply, timeout_s)
        try:
            answer = await reply.future
        except asyncio.CancelledError:
            actor.note_cancelled()
            if reply.expired:
                raise ReplyTimeout(actor.scope, timeout_s or 0.0) from None
            raise
        finally:
            if deadlines is not None:
                deadlines.remove(reply)
        return answer

    def _deadlines_of(self, loop: asyncio.AbstractEventLoop) -> Deadlines:
        for known in [known for known in self._deadlines if known.is_closed()]:
            self._deadlines.pop(known, None)
        return self._deadlines.setdefault(loop, Deadlines(loop))

    async def _run_when_room(self, scope: str, turn: turns.Turn[A]) -> A:
        """Wait until the full handler has caught up, then try again."""
        backlog, loop = self._engine._router.backlog, asyncio.get_running_loop()
        timeout_s = self._limits.call_timeout_s
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while True:
            room = LoopReply()
            backlog.when_room(room.set)
            try:
                return await self._queued(self._scopes[scope], turn)
            except HandlerFull as full:
                said = no_room(scope, full)
                left_s = None if deadline is None else deadline - loop.time()
                try:
                    async with asyncio.timeout(left_s):
                        await room.future
                except TimeoutError as error:
                    backlog.refused.add()
                    raise Overloaded(said) from error
            finally:
                backlog.stop_waiting(room.set)  # in any case: a cancelled task leaves nothing behind


# Nothing here runs on the event loop's default executor: it has few threads, which belong to the program, and if each
# of them waited for handlers, those handlers could not use `asyncio.to_thread`.


async def _answer(reply: Reply[Any], timeout_s: float | None) -> Any:
    """Wait for a reply. Raises pykka.Timeout."""
    waiter = LoopReply()
    reply.when_done(lambda _: waiter.set())
    try:
        async with asyncio.timeout(timeout_s):
            await waiter.future
    except TimeoutError as error:
        raise pykka.Timeout(f"no reply within {timeout_s} s") from error
    return reply.get()


async def _on_thread(work: Callable[[], Any], name: str) -> Any:
    """Run `work()` on a thread of its own, and wait for it: it may take long, and waits for other threads."""

    def start(run: Callable[[], object]) -> None:
        threading.Thread(target=run, name=name, daemon=True).start()

    return await _outcome(start, work)


async def _outcome(start: Callable[[Callable[[], object]], object], work: Callable[[], Any]) -> Any:
    """Have `start` run `work()` elsewhere, wait for it, and return its result or raise what it raises."""
    reply = LoopReply()
    # In the context of the caller: within a handler the work must see that, or it would wait for that handler.
    context = contextvars.copy_context()

    def run() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = context.run(work), None
        except BaseException as error:  # noqa: BLE001 - raised in the task that waits
            outcome = None, error
        reply.set(outcome)

    start(run)
    value, error = await reply.future
    if error is not None:
        raise error
    return value
