"""Several writes to one scope in one step: `with users.batch() as b`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Self, Unpack

from msgspec import UNSET, UnsetType

from scopestate.errors import DeserializationError
from scopestate.ops import arguments
from scopestate.ops.arguments import step_deadline
from scopestate.ops.options import DeadlineOptions, WriteOptions
from scopestate.ops.results import BatchResult, T
from scopestate.ops.transactions import Check, DeleteStep, SetAll, SetStep, Step
from scopestate.ops.turns import Turn, checked_name, refuse_size
from scopestate.ops.update_ops import AnyOp
from scopestate.ops.values import encode

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits

_NOT_ENTERED: Final = 0
OVER: Final = -1


class Writes(Generic[T]):
    """Checks and writes of one scope, collected until the end of a `with` statement: it does all of them or none.

    Each call checks its arguments and encodes its value. Nothing is sent before the end of the block, and nothing at
    all if the block raises. Only the thread that has entered it may use it.
    """

    __slots__ = ("_checks", "_limits", "_options", "_owner", "_result", "_run", "_sets", "_steps", "scope")

    def __init__(self, run: Any, scope: str, limits: Limits, options: WriteOptions) -> None:
        """`run`: the `_run` of an engine, for the end of the block."""
        if options:
            arguments.asked(_NOTHING, call="batch()", **options)
        self.scope = scope
        self._run = run
        self._limits = limits
        self._options = options
        self._owner = _NOT_ENTERED
        """The id of the thread that has entered it, or one of the two numbers above, which no thread has as its id."""
        self._sets: dict[str, bytes] | None = {}
        """Plain sets of keys that are all different, as in most batches. None: the sets are among the steps."""
        self._steps: list[Step] = []
        self._checks: list[Check] = []
        self._result: BatchResult | None = None

    def __repr__(self) -> str:
        count = len(self._checks) + len(self._steps) + len(self._sets or ())
        return f"<batch of scope {self.scope!r}, {count} checks and writes>"

    def check(self, key: str, *, revision: int | None = None, absent: bool = False, value: object = UNSET) -> None:
        """Expect a key to have a revision, not to exist, or to have a value, else the whole batch raises Conflict.

        Give one of the three. Checks look at the scope as it is before the batch. Values are compared as in
        `compare_and_set`.
        """
        self._refuse_misuse()
        self._checks.append(arguments.check_of(key, revision=revision, absent=absent, value=value))

    def set(self, key: str, value: T, **options: Unpack[DeadlineOptions]) -> None:
        """As `Engine.set`, with `ttl`, `expires_at` and `keep_ttl`."""
        if self._owner != get_ident():
            self._refuse_misuse()
        data = encode(value)
        if type(key) is not str or not key.isascii():
            key = checked_name("key", key)
        limit = self._limits.max_value_bytes
        if limit:
            refuse_size(self.scope, key, data, limit)
        sets = self._sets
        if sets is None or options or key in sets:
            self._add(SetStep(key, data, step_deadline("set()", **options)))
        else:
            sets[key] = data

    def update(self, key: str, ops: Iterable[AnyOp], **options: Unpack[DeadlineOptions]) -> None:
        """As `Engine.update`, but an op that does not fit raises UpdateRefused at the end, and nothing is written."""
        self._refuse_misuse()
        self._add(arguments.update_step(key, ops, options))

    def delete(self, key: str) -> None:
        """Delete a key, if it exists; if not, no event fires."""
        self._refuse_misuse()
        self._add(DeleteStep(checked_name("key", key)))

    def touch(
        self,
        key: str,
        ttl: float | timedelta | UnsetType | None = UNSET,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        """As `Engine.touch`."""
        self._refuse_misuse()
        self._add(arguments.touch_step(key, ttl, expires_at))

    @property
    def result(self) -> BatchResult:
        """What was done, after the block: `revision` of the last change, and `results`, one for each call, in order."""
        if self._result is None:
            raise DeserializationError(
                "this batch has no result: its block "
                + ("has not ended" if self._owner != OVER else "or its commit raised, and nothing was written")
            )
        return self._result

    def _add(self, step: Step) -> None:
        if self._sets is not None:
            self._steps = [SetStep(key, data) for key, data in self._sets.items()]
            self._sets = None
        self._steps.append(step)

    def _enter(self) -> Self:
        if self._owner != _NOT_ENTERED:
            raise DeserializationError("this batch was entered before: make a new one for each `with` statement")
        self._owner = get_ident()
        return self

    def _turn(self) -> tuple[Turn[BatchResult], bool | None]:
        """Return the turn of the batch, and whether it is durable. After this nothing can be added."""
        if self._owner != get_ident():
            self._refuse_misuse()
        self._owner = OVER
        if self._sets and not self._checks:
            turn = SetAll(self._sets, self._limits.max_batch_bytes)
            turn.refuse_size(self.scope)
            return arguments.asked(turn, **self._options) if self._options else (turn, None)
        steps = self._steps if self._sets is None else [SetStep(key, data) for key, data in self._sets.items()]
        return arguments.batch_turn(self.scope, steps, self._checks, self._limits, **self._options)

    def _refuse_misuse(self) -> None:
        owner = self._owner
        if owner == get_ident():
            return
        if owner == _NOT_ENTERED:
            problem = "was not entered: use it as `with ...batch() as b`"
        elif owner == OVER:
            problem = "has ended: what is written to it now would be lost"
        else:
            problem = "belongs to the thread that entered it"
        raise DeserializationError(f"this batch {problem}")


_NOTHING: Final[Turn[Any]] = SetAll({})


class Batch(Writes[T], Generic[T]):
    """Checks and writes of one scope, carried out in one step at the end of a `with` statement, or not at all.

    >>> from scopestate import Engine, ops
    >>> engine = Engine()
    >>> with engine.batch("accounts") as b:
    ...     b.check("bob", absent=True)
    ...     b.set("ada", {"balance": 10})
    ...     b.set("bob", {"balance": 0})
    >>> [result.created for result in b.result.results]
    [True, True]
    >>> engine.close()

    The end of the block raises Conflict if a check fails, UpdateRefused if an op does not fit, BatchTooLarge, and what
    `Engine.set` raises; then nothing is written. Each key is written once, with one event, however many calls
    name it. Each call works on the result of the calls before it. An exception in the block reaches the caller, and
    nothing is written.
    """

    __slots__ = ()

    def __enter__(self) -> Self:
        return self._enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._owner = OVER
            return
        turn, durable = self._turn()
        self._result = self._run(self.scope, turn, durable)


class AioBatch(Writes[T], Generic[T]):
    """A `Batch` for `async with`: the calls within the block are plain calls, its end is awaited."""

    __slots__ = ()

    async def __aenter__(self) -> Self:
        return self._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._owner = OVER
            return
        turn, durable = self._turn()
        self._result = await self._run(self.scope, turn, durable)
