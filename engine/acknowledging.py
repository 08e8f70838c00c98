"""The transaction of a delivery: what it writes and the acknowledgement are saved together."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from scopestate.batch import OVER, Writes
from scopestate.errors import (
    BatchTooLarge,
    Conflict,
    EngineClosed,
    Overloaded,
    Unsupported,
    UpdateRefused,
    ValueTooLarge,
)
from scopestate.ops.apply import MISSING, apply
from scopestate.ops.results import EntryView
from scopestate.ops.transactions import Check, DeleteStep, DeliveryBatch, SetStep, Step, TouchStep, UpdateStep
from scopestate.ops.turns import checked_name
from scopestate.ops.values import decode, encode

if TYPE_CHECKING:
    from scopestate.actors.durable_attempt import Attempt
    from scopestate.engine import Engine


class _Reads(Writes):
    """Writes to one scope that also read it: what was read must not have changed by the end of the block."""

    __slots__ = ("_attempt", "_engine", "_found")

    def __init__(self, engine: Engine, attempt: Attempt, scope: str, run: Any) -> None:
        super().__init__(run, scope, engine._limits, {})
        self._sets = None  # steps and checks in any case
        self._engine = engine
        self._attempt = attempt
        self._found: dict[str, EntryView | None] = {}

    def _known(self, key: str) -> bool:
        """Return whether a key was read, set or deleted."""
        return key in self._found or any(step.key == key and not isinstance(step, UpdateStep) for step in self._steps)

    def _note(self, key: str, entry: EntryView | None) -> None:
        self._found[key] = entry
        self._checks.append(Check(key, 0 if entry is None else entry.revision))

    def _value(self, key: str, default: Any) -> Any:
        """Return the value of a key after the steps so far. Raises UpdateRefused for an op that does not fit."""
        entry = self._found.get(key)
        value: Any = MISSING if entry is None else entry.value
        for step in self._steps:
            if step.key == key:
                value = _after(value, step, self.scope)
        return default if value is MISSING else decode(encode(value))

    def _acknowledging(self) -> tuple[DeliveryBatch, int]:
        """Return the turn, and the position that it acknowledges."""
        self._turn()  # refuses what a batch refuses; after this nothing can be added
        attempt = self._attempt
        attempt.refuse_if_over()
        attempt.transaction_of = "open"
        try:
            acks = attempt.handler.port.transaction(attempt.position, self.scope)
        except Unsupported:
            attempt.transaction_of = "failed"  # another scope may be possible
            raise
        attempt.turn = turn = DeliveryBatch(
            tuple(self._steps), tuple(self._checks), max_bytes=self._limits.max_batch_bytes, acks=acks, fence={}
        )
        turn.refuse_size(self.scope)
        return turn, attempt.position

    def _done(self, turn: DeliveryBatch, position: int) -> None:
        if "changed" not in turn.fence:
            self._attempt.handler.port.transaction_failed(position)  # it is acknowledged like any other delivery
        self._attempt.transaction_of = "done"

    def _left(self) -> None:
        """Note that the block has raised: nothing is written."""
        self._owner = OVER
        self._attempt.transaction_of = "failed"


def _after(value: Any, step: Step, scope: str) -> Any:
    """Return a value as it is after a step."""
    match step:
        case SetStep(_, data):
            return decode(data)
        case UpdateStep(_, ops):
            changed, errors = apply(value, ops)
            if errors:
                raise UpdateRefused(scope, errors)
            return changed
        case DeleteStep():
            return MISSING
        case TouchStep():
            return value


class DeliveryTransaction(_Reads):
    """The `tx` of `with delivery.transaction(scope) as tx`: `get`, `set`, `update`, `delete`, `check`.

    The calls that write are those of a batch. Only the thread that has entered it may use it.
    """

    __slots__ = ()

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, with this transaction's changes; `default` if the key does not exist.

        The end of the block raises Conflict if another writer has changed the key by then.
        """
        self._refuse_misuse()
        key = checked_name("key", key)
        if not self._known(key):
            self._note(key, self._engine.entry(self.scope, key))
        return self._value(key, default)


class AioDeliveryTransaction(_Reads):
    """A `DeliveryTransaction` for `async with`: `get` is awaited, the calls that write are plain calls."""

    __slots__ = ()

    async def get(self, key: str, default: Any = None) -> Any:
        """As `DeliveryTransaction.get`."""
        self._refuse_misuse()
        key = checked_name("key", key)
        if not self._known(key):
            self._note(key, await self._engine.aio.entry(self.scope, key))
        return self._value(key, default)


class TransactionOfDelivery:
    """What `Delivery.transaction` returns, for `with` and for `async with`. It is entered once."""

    def __init__(self, engine: Engine, attempt: Attempt, scope: str) -> None:
        self._engine = engine
        self._attempt = attempt
        self._scope = scope
        self._plain: DeliveryTransaction | None = None
        self._aio: AioDeliveryTransaction | None = None

    def __enter__(self) -> DeliveryTransaction:
        self._attempt.open_transaction()
        self._plain = made = DeliveryTransaction(self._engine, self._attempt, self._scope, self._engine._run)
        made._enter()
        return made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        made = self._plain
        assert made is not None  # it was entered
        if kind is not None:
            made._left()
            return
        turn, position = made._acknowledging()
        try:
            self._engine._run(self._scope, turn)
        except BaseException as problem:
            _note_failure(made, position, problem)
            raise
        made._done(turn, position)

    async def __aenter__(self) -> AioDeliveryTransaction:
        self._attempt.open_transaction()
        self._aio = made = AioDeliveryTransaction(self._engine, self._attempt, self._scope, self._engine.aio._run)
        made._enter()
        return made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        made = self._aio
        assert made is not None  # it was entered
        if kind is not None:
            made._left()
            return
        turn, position = made._acknowledging()
        try:
            await self._engine.aio._run(self._scope, turn)
        except BaseException as problem:
            _note_failure(made, position, problem)
            raise
        made._done(turn, position)


def _note_failure(made: _Reads, position: int, problem: BaseException) -> None:
    """Note that the commit has raised. After a refusal nothing was written; otherwise it may have been, or still be."""
    attempt = made._attempt
    if isinstance(problem, REFUSED):
        attempt.handler.port.transaction_failed(position)
        attempt.transaction_of = "failed"
    else:
        attempt.transaction_of = "unknown"  # the runtime finds it out


REFUSED: Final = (Conflict, UpdateRefused, BatchTooLarge, ValueTooLarge, Overloaded, EngineClosed, Unsupported)
