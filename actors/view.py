"""What turns see of a scope in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.containment import is_from_outside
from scopestate.actors.index import READ_WITHIN_TURN, KeysApart, OrderedKeys
from scopestate.actors.ports import ANSWERS_KEPT_MS, Answer, WriteRule
from scopestate.actors.wheel import Wheel
from scopestate.errors import StorageError
from scopestate.ops.turns import Entry, Kept, Range, TtlRule, Turn

if TYPE_CHECKING:
    from scopestate.actors.dispatcher import Dispatcher
    from scopestate.actors.reply import ReplyTo
    from scopestate.actors.scope import Surroundings

_EVERY_KEY: Final = ("", True)
"""The lower bound of a range without one."""


class InMemory:
    """The view of a scope in which no key has a deadline, and for which there is no rule.

    Made when the scope is loaded, and used by all its turns: each sets `revision`, and `now` to None.
    """

    __slots__ = (
        "_clock",
        "_ordered",
        "_revisions",
        "_values",
        "answers",
        "get",
        "limits",
        "now",
        "revision",
        "scope",
        "store_id",
    )

    plain = True
    expiring = False
    strict = False
    ttl_rule: TtlRule | None = None

    def __init__(
        self,
        scope: str,
        around: Surroundings,
        ordered: OrderedKeys | KeysApart,
        values: dict[str, bytes],
        revisions: dict[str, int],
        answers: dict[str, Answer],
    ) -> None:
        """`ordered`: the keys of `values` in order."""
        self.scope = scope
        self.limits = around.limits
        self.store_id = around.store_id
        self.revision = 0
        """The number of the last change of the scope; it and `now` are set at the start of each turn."""
        self._clock = around.clock
        self._ordered = ordered
        self.now: int | None = None
        """The time, once the turn has asked for it."""
        self._values = values
        self._revisions = revisions
        self.answers = answers
        """idempotency key -> answer."""
        self.get: Callable[[str], bytes | None] = values.get
        """The dict's own method, because every turn calls it."""

    @property
    def now_ms(self) -> int:
        """Return the time; within one turn always that of the first call."""
        now = self.now
        if now is None:
            now = self.now = self._clock.now_ms()
        return now

    def entry(self, key: str) -> Entry | None:
        """Return what is stored under a key."""
        data = self._values.get(key)
        return None if data is None else Entry(data, self._revisions[key])

    def lapsed(self, key: str) -> Entry | None:
        """Nothing expires here."""
        return None

    def values(self) -> list[bytes]:
        """Return the JSON of all keys, in the order of creation."""
        return list(self._values.values())

    def items(self) -> list[tuple[str, bytes]]:
        """Return all keys with their JSON, in the order of creation. Raises TooLong."""
        self._ordered.check_length()
        # Not `list`, which would keep other threads waiting: it makes a tuple for each key, in one step.
        return [item for item in self._values.items()]  # noqa: C416 - see above

    def keys(self, within: Range) -> Iterable[str]:
        """Return the keys within a range, in its order. Raises TooLong."""
        return self._ordered.find(within, self._exists())

    def count(self, within: Range) -> int:
        """Return how many keys `keys` would yield. Raises TooLong."""
        if within.low() == _EVERY_KEY and within.high() is None:
            there = len(self._values) - self._count_expired()
            return there if within.limit is None else min(there, within.limit)
        return len(self._ordered.find(within, self._exists()))

    def _exists(self) -> Callable[[str], object]:
        """Return a function that tells whether a key exists."""
        return self._values.__contains__

    def _count_expired(self) -> int:
        """Return how many keys have expired and are still stored."""
        return 0

    def apart(self, around: Surroundings, ordered: OrderedKeys, looks_at: str) -> InMemory:
        """Return the same view of copies of `looks_at`, for reads outside of turns."""
        if looks_at == "keys" and not ordered.is_made():
            # A list of the keys is quicker to copy than the dict, and the index needs nothing else.
            names = ordered.apart(list(self._values))
            return KeysOnly(self.scope, around, names, {}, {}, {})
        values, revisions = self._values.copy(), self._revisions.copy() if looks_at == "entries" else {}
        view = InMemory(self.scope, around, ordered.apart(values), values, revisions, {})
        view.revision = self.revision
        return view

    def due(self, limit: int) -> Sequence[str]:
        """Nothing expires here."""
        return ()

    def kept(self, idempotency_key: str) -> Kept | None:
        """Return the answer that is kept under an idempotency key, if it is not too old."""
        answer = self.answers.get(idempotency_key)
        if answer is None or answer.time_ms + ANSWERS_KEPT_MS <= self.now_ms:
            return None
        return Kept(answer.fingerprint, answer.answer)


class KeysOnly(InMemory):
    """The view of a copy that has only the keys, all of which exist."""

    __slots__ = ()

    def count(self, within: Range) -> int:
        return len(self._ordered.find(within, self._exists()))

    def _exists(self) -> Callable[[str], object]:
        return id  # true of every object


class WithDeadlines(InMemory):
    """The view of a scope in which keys may expire, or which has a rule. Expired keys are absent."""

    __slots__ = ("_deadlines", "_expired", "_wheel", "expiring", "strict", "ttl_rule")

    plain = False

    def __init__(
        self,
        scope: str,
        around: Surroundings,
        ordered: OrderedKeys | KeysApart,
        values: dict[str, bytes],
        revisions: dict[str, int],
        answers: dict[str, Answer],
        deadlines: dict[str, int],
        wheel: Wheel,
    ) -> None:
        super().__init__(scope, around, ordered, values, revisions, answers)
        self._deadlines = deadlines
        self._wheel = wheel
        self._expired: bool | None = None
        """Whether some keys have expired; None: ask the wheel."""
        self.get = self._get_unexpired
        self.expiring = True
        self.strict = False
        self.ttl_rule: TtlRule | None = None

    def _get_unexpired(self, key: str) -> bytes | None:
        data = self._values.get(key)
        return None if data is None or self._is_expired(key) else data

    def _is_expired(self, key: str) -> bool:
        expires_ms = self._deadlines.get(key)
        return expires_ms is not None and expires_ms <= self.now_ms

    def entry(self, key: str) -> Entry | None:
        """Return what is stored under a key, unless it has expired."""
        data = self._values.get(key)
        if data is None:
            return None
        expires_ms = self._deadlines.get(key)
        if expires_ms is not None and expires_ms <= self.now_ms:
            return None
        return Entry(data, self._revisions[key], expires_ms)

    def lapsed(self, key: str) -> Entry | None:
        """Return the entry of a key that has expired and is still stored."""
        if key not in self._values or not self._is_expired(key):
            return None
        return Entry(self._values[key], self._revisions[key], self._deadlines[key])

    def values(self) -> list[bytes]:
        """Return the JSON of all keys that have not expired, in the order of creation."""
        if not self._some_expired():
            return list(self._values.values())
        self._ordered.check_length()
        return [data for key, data in self._values.items() if not self._is_expired(key)]

    def items(self) -> list[tuple[str, bytes]]:
        """Return all keys that have not expired with their JSON, in the order of creation. Raises TooLong."""
        if not self._some_expired():
            return super().items()
        self._ordered.check_length()
        return [item for item in self._values.items() if not self._is_expired(item[0])]

    def _some_expired(self) -> bool:
        """False if no key has expired. Filtering takes time, and keys that have expired are removed soon."""
        return self._wheel.next_due() <= self.now_ms if self._expired is None else self._expired

    def _count_expired(self) -> int:
        if not self._some_expired():
            return 0
        if len(self._deadlines) > READ_WITHIN_TURN:
            self._ordered.check_length()
        now_ms = self.now_ms
        return sum(1 for expires_ms in self._deadlines.values() if expires_ms <= now_ms)

    def _exists(self) -> Callable[[str], object]:
        if not self._some_expired():
            return self._values.__contains__
        return lambda key: key in self._values and not self._is_expired(key)

    def apart(self, around: Surroundings, ordered: OrderedKeys, looks_at: str) -> InMemory:
        if looks_at == "keys" and not self._some_expired():
            return super().apart(around, ordered, looks_at)
        values, revisions = self._values.copy(), self._revisions.copy() if looks_at == "entries" else {}
        deadlines = self._deadlines.copy()
        view = WithDeadlines(self.scope, around, ordered.apart(values), values, revisions, {}, deadlines, self._wheel)
        view.revision, view.now, view._expired = self.revision, self.now_ms, self._some_expired()
        return view

    def due(self, limit: int) -> Sequence[str]:
        """Return keys that have expired and are still stored, by deadline."""
        return self._wheel.due(self.now_ms, limit)


class Apart:
    """A turn that only reads, and copies of what it reads: it can be decided later, outside of the scope."""

    __slots__ = ("_end", "_rule", "_turn", "_view")

    def __init__(
        self, turn: Turn[Any], view: InMemory, rule: WriteRule, end: Callable[[], object] = lambda: None
    ) -> None:
        """`end` is called when the copies are not needed any more."""
        self._turn = turn
        self._view = view
        self._rule = rule
        self._end = end

    def answer(self) -> Any:
        """Return the answer as of the moment at which the copies were made. Once. Raises what the turn raises."""
        values = self._rule.values
        try:
            _, answer = self._turn.decide(self._view) if values is None else values.decide(self._turn, self._view)
        except StorageError as error:
            raise self._turn.failed(error) from error
        finally:
            self._end()
        return answer

    def drop(self) -> None:
        """The answer is not needed any more."""
        self._end()


class AnswerApart:
    """A reply whose answer may take long to compute: then a worker thread computes it."""

    loop_reply = None

    def __init__(self, reply: ReplyTo, dispatcher: Dispatcher) -> None:
        self._reply = reply
        self._dispatcher = dispatcher

    @property
    def abandoned(self) -> bool:
        """As of the reply."""
        return self._reply.abandoned

    @property
    def done(self) -> bool:
        """As of the reply."""
        return getattr(self._reply, "done", False)

    def set(self, value: Any = None) -> None:
        """Deliver the answer, or have a worker thread compute it."""
        if type(value) is Apart:
            self._dispatcher.submit(partial(self._make, value))
        else:
            self._reply.set(value)

    def fail(self, error: BaseException) -> None:
        """Deliver an error instead."""
        self._reply.fail(error)

    def _make(self, apart: Apart) -> None:
        if self._reply.abandoned:
            apart.drop()
            return
        try:
            answer = apart.answer()
        except BaseException as error:
            self._reply.fail(error)
            if is_from_outside(error):
                raise
        else:
            self._reply.set(answer)


class Unexpired(Mapping[str, bytes]):
    """The values of a scope for reads without a turn if keys have deadlines: `get` checks the deadline of its key.

    Thread rules: any thread, even while another thread changes the scope. A reader gets the state of one moment between
    the start and the end of the call: the number of the last change is the same before and after.
    """

    def __init__(
        self,
        values: dict[str, bytes],
        deadlines: dict[str, int],
        wheel: Wheel,
        now_ms: Callable[[], int],
        number: Callable[[], int],
    ) -> None:
        """`number` returns the number of the last change."""
        self._values = values
        self._deadlines = deadlines
        self._wheel = wheel
        self._now_ms = now_ms
        self._number = number

    def get(self, key: str, default: object = None) -> bytes | None:  # type: ignore[override]  # no default is needed
        """Return the JSON of a key, or None if it does not exist or has expired."""
        while True:
            number = self._number()
            data = self._values.get(key)
            expires_ms = self._deadlines.get(key)
            if self._number() == number:
                break
        if data is None or expires_ms is None or expires_ms > self._now_ms():
            return data
        return None

    def everything(self) -> list[bytes] | None:
        """Return all values; None if some have expired, because then only a turn can tell which."""
        number = self._number()
        values = list(self._values.values())
        # Nothing has expired now, and nothing was removed since, so nothing had expired when the list was made.
        return values if self._wheel.next_due() > self._now_ms() and self._number() == number else None

    def __getitem__(self, key: str) -> bytes:
        data = self.get(key)
        if data is None:
            raise KeyError(key)
        return data

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in list(self._values) if key in self])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None
