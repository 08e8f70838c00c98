"""`modify`, `transact` and checked updates over a bridge: read, compute here, and write if nothing has changed since.

The functions of the program run on this side, over values that were read one by one; the write names the revisions that
it relies on. If another write came in between, everything is repeated, a bounded number of times.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from scopestate.errors import Conflict, ScopestateError, StorageError, Unsupported
from scopestate.ops import Set as SetOp
from scopestate.ops.remote import Committing, KeysAt, KeysNow, Now, Recall, Recalled
from scopestate.ops.results import ModifyResult, UpdateResult
from scopestate.ops.transactions import Draft, Transact
from scopestate.ops.turns import Effects, Entry, PlainView, Range, Turn
from scopestate.ops.update_ops import UpdateOp
from scopestate.ops.values import decode, encode
from scopestate.ops.writes import CheckedUpdate, DeleteWith, Durable, GetEntry, Modify, Once, UpdateWith, unwrapped
from scopestate.signals import wait_for
from scopestate.wire.features import Needs

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.reply import Reply

T = TypeVar("T")

ATTEMPTS: Final = 60
"""How often a function is called at most, until no other write comes in between."""
_LONGEST_PAUSE_S: Final = 0.05

# ------------------------------------------------------------------------------------------------- where it is computed


class Waiter:
    """The outcome of one call, for a thread to wait for."""

    def __init__(self) -> None:
        self._arrived = threading.Event()
        self._result: bytes | None = None
        self._error: ScopestateError | None = None

    def done(self, result: bytes | None, error: ScopestateError | None) -> None:
        """Take the outcome."""
        self._result, self._error = result, error
        self._arrived.set()

    def get(self) -> bytes | None:
        """Wait; every call has a deadline, so this ends."""
        wait_for(self._arrived.wait)
        if self._error is not None:
            raise self._error
        return self._result


class Computation:
    """A `modify` or `transact` that may run now."""

    def __init__(
        self,
        work: Callable[[], Effects[Any]],
        deliver: Callable[[Effects[Any] | None, BaseException | None], object],
    ) -> None:
        """`deliver(effects, error)` takes what `work()` returns or raises; it may be called again with the same."""
        self._work = work
        self._deliver = deliver
        self._outcome: tuple[Effects[Any] | None, BaseException | None] | None = None

    def run(self) -> None:
        """Compute it on this thread."""
        effects: Effects[Any] | None = None
        error: BaseException | None = None
        try:
            effects = self._work()
        except BaseException as problem:  # noqa: BLE001 - the caller gets it
            error = problem
        self._outcome = effects, error
        self._deliver(effects, error)

    def give_up(self) -> None:
        """End it without its caller, which has gone, perhaps before it could deliver the outcome. May be repeated."""
        effects, error = self._outcome or (None, StorageError("the caller has stopped waiting"))
        self._deliver(effects, error)


class Here:
    """The reply to a caller that computes its turn on its own thread."""

    loop_reply = None

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.abandoned = False
        self.answer: Reply[Any] = dispatcher.reply()
        self._granted: Reply[Computation | None] = dispatcher.reply()

    def set(self, value: Any = None) -> None:
        """Deliver the answer."""
        self.answer.set(value)
        self._let_go()

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead."""
        self.answer.fail(error)
        self._let_go()

    def _let_go(self) -> None:
        if not self._granted.done:
            self._granted.set(None)

    def grant(self, computation: Computation) -> None:
        """Let this call compute now."""
        self._granted.set(computation)
        if self.abandoned:
            computation.give_up()

    def work_here(self, timeout_s: float | None) -> None:
        """Wait until this call may compute, and compute. Raises pykka.Timeout."""
        computation = self._granted.get(timeout=timeout_s)
        if computation is not None:
            computation.run()

    def give_up(self) -> None:
        """Note that the caller waits no longer. May be repeated."""
        self.abandoned = True
        if not self.answer.done and self._granted.done and (granted := self._granted.get()) is not None:
            granted.give_up()


# ---------------------------------------------------------------------------------------------------- what is computed

Ask = Callable[[Turn[Any]], Effects[Any]]
"""Runs a turn in another engine, and waits for it. Raises the error that it answers."""


def is_computed(turn: Turn[Any]) -> bool:
    """Return whether a turn calls a function of the program."""
    return isinstance(unwrapped(turn), _COMPUTED)


_COMPUTED: Final = (Modify, Transact, CheckedUpdate)
"""A tuple that is made only once, not at each call."""


def needs_of(turn: Turn[Any]) -> Needs:
    """Return what the write of a `modify` or `transact` needs: without it the function is not called."""
    durable = ("durable",) if isinstance(turn, Durable) else ()
    if isinstance(unwrapped(turn), Modify | CheckedUpdate):
        return Needs("state::update", ("if_revision", *durable))
    once = () if _idempotency_key(turn) is None else ("idempotency_key",)
    return Needs("state::transaction", ("checks", "if_revision", *once, *durable))


def compute(turn: Turn[Any], scope: str, limits: Limits, ask: Ask) -> Effects[Any]:
    """Do a `modify` or `transact`. Raises Conflict after the last attempt, and what the function raises."""
    core = unwrapped(turn)
    if isinstance(core, Modify):
        return _modify(core, _Found(scope, limits, ask), turn)
    if isinstance(core, CheckedUpdate):
        return _update(core, _Found(scope, limits, ask), turn)
    assert isinstance(core, Transact)
    return _transact(core, scope, limits, turn, ask)


def _modify(turn: Modify, view: _Found, outer: Turn[Any]) -> Effects[ModifyResult]:
    for again in _attempts():
        view.forget()
        before = view.entry(turn.key)
        changes, answer = turn.decide(view)
        if not changes:
            return (), answer
        revision = 0 if before is None else before.revision
        write: Turn[Any]
        if answer.new_json is None:
            write = DeleteWith(turn.key, revision)
        else:
            # An update, not a set: it treats the deadline of the key as `modify` does.
            ops: tuple[UpdateOp, ...] = (SetOp("", decode(answer.new_json)),)
            write = UpdateWith(turn.key, ops, revision)
        try:
            stored, told = view.ask(_wrapped(write, outer))
        except Conflict as conflict:
            again(conflict)
            continue
        return stored, ModifyResult(answer.old_json, answer.new_json, revision=told.revision, replayed=told.replayed)
    raise AssertionError("the last attempt has raised")


def _update(turn: CheckedUpdate, view: _Found, outer: Turn[Any]) -> Effects[UpdateResult]:
    if _idempotency_key(outer) is not None:
        raise Unsupported(
            "`idempotency_key` of an update with a typed handle",
            "the value is checked on this side, and the other engine would see another write each time; use `transact`",
        )
    for again in _attempts():
        view.forget()
        before = view.entry(turn.key)
        turn.decide(view)  # raises if the turn is refused
        try:
            return view.ask(_wrapped(turn.unchecked(0 if before is None else before.revision), outer))
        except Conflict as conflict:
            if turn.if_revision is not None:
                raise
            again(conflict)
    raise AssertionError("the last attempt has raised")


def _transact(turn: Transact[T], scope: str, limits: Limits, outer: Turn[Any], ask: Ask) -> Effects[T]:
    idempotency_key = _idempotency_key(outer)
    if idempotency_key is not None:
        # The function must not be called again: it might refuse because of its own first run.
        _, kept = ask(Recall(idempotency_key))
        if kept.found:
            return (), decode(kept.answer)
    for again in _attempts():
        draft = Draft(_Found(scope, limits, ask))
        answer = turn.run(draft)
        draft.refuse_size(turn.max_bytes)
        batch = draft.as_batch(turn.max_bytes)
        if not batch.steps and not idempotency_key and len(batch.checks) + (batch.if_revision is not None) < 2:
            return (), answer  # everything it read was current at one moment
        batch.refuse_size(scope)
        write: Turn[Any] = batch if idempotency_key is None else Committing(batch, encode(answer))
        try:
            stored, told = ask(_wrapped(write, outer))
        except Conflict as conflict:
            again(conflict)
            continue
        return stored, decode(told.answer) if isinstance(told, Recalled) else answer
    raise AssertionError("the last attempt has raised")


def _attempts() -> Iterator[Callable[[Conflict], object]]:
    """Yield, for each attempt, a function that takes its conflict: it waits briefly, or raises after the last one."""
    for attempt in range(ATTEMPTS):

        def again(conflict: Conflict, attempt: int = attempt) -> None:
            if attempt == ATTEMPTS - 1:
                raise conflict
            if attempt:
                time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, 0.001 * 2**attempt)))

        yield again


def _idempotency_key(turn: Turn[Any]) -> str | None:
    while isinstance(turn, Durable | Once):
        if isinstance(turn, Once):
            return turn.idempotency_key
        turn = turn.turn
    return None


def _wrapped(turn: Turn[Any], outer: Turn[Any]) -> Turn[Any]:
    """Return a turn with the idempotency key and the durability of the turn that it carries out."""
    match outer:
        case Durable(turn=inner):
            return Durable(_wrapped(turn, inner))
        case Once(turn=inner, idempotency_key=key):
            return Once(_wrapped(turn, inner), key)
        case _:
            return turn


class _Found(PlainView):
    """The part of another engine's scope that was read so far."""

    def __init__(self, scope: str, limits: Limits, ask: Ask) -> None:
        self.scope = scope
        self.limits = limits
        self.ask = ask
        self._entries: dict[str, Entry | None] = {}
        self._revision: int | None = None
        self._now_ms: int | None = None

    def forget(self) -> None:
        """Forget what was read, so that it is read again."""
        self._entries.clear()

    @property
    def revision(self) -> int:  # type: ignore[override]  # known once keys were listed
        """The number of the last change of the scope when keys were first listed."""
        return self._revision or 0

    @property
    def now_ms(self) -> int:  # type: ignore[override]  # asked for
        """The other engine's clock, by which keys expire."""
        if self._now_ms is None:
            _, self._now_ms = self.ask(Now())
        return self._now_ms

    def entry(self, key: str) -> Entry | None:
        """Return what is stored under a key, or None if it does not exist."""
        if key not in self._entries:
            _, self._entries[key] = self.ask(GetEntry(key))
        return self._entries[key]

    def get(self, key: str) -> bytes | None:
        """Return the JSON of a key, or None if it does not exist."""
        entry = self.entry(key)
        return None if entry is None else entry.json

    def keys(self, within: Range) -> Iterable[str]:
        """Return the keys within a range. The commit fails if the scope has changed since the first listing."""
        listed: KeysNow
        _, listed = self.ask(KeysAt(within))
        if self._revision is None:
            self._revision = listed.revision
        return listed.keys

    def count(self, within: Range) -> int:
        """Return the number of keys within a range."""
        return sum(1 for _ in self.keys(within))

    def values(self) -> list[bytes]:
        """Not used by these functions."""
        raise NotImplementedError

    def items(self) -> list[tuple[str, bytes]]:
        """Not used by these functions."""
        raise NotImplementedError
