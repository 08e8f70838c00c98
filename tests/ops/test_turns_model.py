"""Any sequence of turns does what the plain model does: answers, events, revisions, deadlines, refusals."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from turns.model import Model, Refused
from turns.stored import Stored

from scopestate.errors import Conflict, IdempotencyMismatch, ScopestateError, UpdateRefused
from scopestate.ops import Append, Increment, Remove
from scopestate.ops import Set as SetOp
from scopestate.ops.ranges import Count, DeleteRange, Entries, Keys, Pairs, ReadPage, Values
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.transactions import (
    Batch,
    Check,
    DeleteStep,
    Draft,
    SetAll,
    SetStep,
    TouchStep,
    Transact,
    Transaction,
    UpdateStep,
)
from scopestate.ops.turns import Deadline, Delete, Get, Range, Set, TtlRule, Turn, Update
from scopestate.ops.values import decode, encode
from scopestate.ops.writes import (
    DELETE,
    KEEP,
    CompareAndSet,
    DeleteWith,
    Expire,
    GetEntry,
    Modify,
    Once,
    SetWith,
    Touch,
    Ttl,
    UpdateWith,
)

KEYS = st.sampled_from(["", "a", "aa", "ab", "b", "é", "\uffff", "\U00010000"])
PREFIXES = st.none() | KEYS
VALUES = st.sampled_from([None, 0, 1, 1.0, True, "x", [], {}, {"n": 1}, {"n": "text"}])
OPS = st.lists(
    st.sampled_from([Increment("n", 1), Append("n", "y"), SetOp("n", 1), Remove("n"), SetOp("", None)]), max_size=3
)
ASKED = st.one_of(
    st.just(("", None)),
    st.tuples(st.just("ttl"), st.integers(1, 100)),
    st.tuples(st.just("at"), st.integers(900, 1500)),
    st.just(("keep", None)),
)
TOUCHES = ASKED.filter(lambda asked: asked[0] != "keep")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, VALUES, ASKED),
        st.tuples(st.just("update"), KEYS, OPS),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("touch"), KEYS, TOUCHES),
    ),
    max_size=6,
)


def deadline(asked: tuple[str, Any]) -> Deadline:
    word, number = asked
    return {
        "": Deadline(),
        "ttl": Deadline(ttl_ms=number),
        "at": Deadline(expires_ms=number),
        "keep": Deadline(keep=True),
    }[word]


def step_of(step: tuple[Any, ...]) -> Any:
    match step:
        case ("set", key, value, asked):
            return SetStep(key, encode(value), deadline(asked))
        case ("update", key, ops):
            return UpdateStep(key, tuple(ops))
        case ("delete", key):
            return DeleteStep(key)
        case ("touch", key, asked):
            return TouchStep(key, deadline(asked))
    raise AssertionError(step)


def facts_of(error: ScopestateError) -> tuple[str, Any]:
    if isinstance(error, Conflict):
        return error.code, [(found.key, found.expected_revision, found.revision) for found in error.conflicts]
    if isinstance(error, UpdateRefused):
        return error.code, [(found.index, found.code) for found in error.errors]
    assert isinstance(error, IdempotencyMismatch), error
    return error.code, []


class Turns(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stored = Stored()
        self.model = Model()

    def both(self, turn: Turn[Any], wanted: Any, seen: Any = lambda answer: answer) -> None:
        """Run a turn, and the model's function: the same answer or refusal, the same events."""
        before = len(self.model.events)
        try:
            expected = ("answer", wanted())
        except Refused as refusal:
            expected = ("refused", *refusal.args)
        found: Any
        events: list[Any] = []
        revision, entries = self.stored.revision, dict(self.stored.entries)
        try:
            answer, events = self.stored.run_seeing(turn)
            found = ("answer", seen(answer))
        except ScopestateError as error:
            found = ("refused", *facts_of(error))
            assert (self.stored.revision, self.stored.entries) == (revision, entries)
        assert repr(found) == repr(expected)
        read = [
            (kind, key, None if old is None else decode(old), None if new is None else decode(new), number)
            for kind, key, old, new, number in events
        ]
        assert repr(read) == repr(self.model.events[before:])

    @initialize(rule=st.none() | st.tuples(st.integers(1, 100), st.booleans()), strict=st.booleans())
    def begin(self, rule: tuple[int, bool] | None, strict: bool) -> None:
        self.model.rule, self.model.strict = rule, strict
        self.stored.ttl_rule, self.stored.strict = None if rule is None else TtlRule(*rule), strict

    @rule(ms=st.integers(0, 120))
    def wait(self, ms: int) -> None:
        self.stored.now_ms += ms
        self.model.now += ms

    # ---- the reference's six

    @rule(key=KEYS, value=VALUES)
    def set(self, key: str, value: Any) -> None:
        self.both(
            Set(key, encode(value)),
            lambda: self.model.set(key, value),
            lambda done: (done.old_value, done.new_value, done.revision),
        )

    @rule(key=KEYS, ops=OPS)
    def update(self, key: str, ops: list[Any]) -> None:
        self.both(Update(key, tuple(ops)), lambda: self.model.update(key, ops), self.updated)

    @staticmethod
    def updated(done: UpdateResult) -> Any:
        return done.old_value, done.new_value, [error.code for error in done.errors], done.revision

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.both(Delete(key), lambda: self.model.delete(key)[0], lambda old: None if old is None else decode(old))

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        slot = self.model.alive(key)
        read = self.stored.run(Get(key))
        entry = self.stored.run(GetEntry(key))
        left = self.stored.run(Ttl(key))
        if slot is None:
            assert (read, entry, left) == (None, None, None)
        else:
            assert entry is not None
            assert entry.json == read == encode(slot.value)
            assert (entry.revision, entry.expires_ms) == (slot.revision, slot.expires)
            assert left == (None if slot.expires is None else slot.expires - self.model.now)

    # ---- conditional writes, deadlines

    def revision(self, key: str, guess: int) -> int | None:
        """Often the right one."""
        return None if guess == 0 else 0 if guess == 1 else guess if guess < 5 else self.model.revision_of(key)

    @rule(key=KEYS, value=VALUES, asked=ASKED, guess=st.integers(0, 9))
    def set_with(self, key: str, value: Any, asked: Any, guess: int) -> None:
        revision = self.revision(key, guess)
        self.both(
            SetWith(key, encode(value), revision, deadline(asked)),
            lambda: self.model.set(key, value, asked, revision),
            lambda done: (done.old_value, done.new_value, done.revision),
        )

    @rule(key=KEYS, ops=OPS, asked=ASKED, guess=st.integers(0, 9), atomic=st.booleans())
    def update_with(self, key: str, ops: list[Any], asked: Any, guess: int, atomic: bool) -> None:
        revision = self.revision(key, guess)
        self.both(
            UpdateWith(key, tuple(ops), revision, deadline(asked), atomic),
            lambda: self.model.update(key, ops, asked, revision, atomic),
            self.updated,
        )

    @rule(key=KEYS, guess=st.integers(0, 9))
    def delete_with(self, key: str, guess: int) -> None:
        revision = self.revision(key, guess)
        self.both(
            DeleteWith(key, revision),
            lambda: self.model.delete(key, revision),
            lambda done: (done.old_value, done.revision),
        )

    @rule(key=KEYS, expected=VALUES, value=VALUES, right=st.booleans())
    def compare_and_set(self, key: str, expected: Any, value: Any, right: bool) -> None:
        expected = self.model.value_of(key) if right else expected
        self.both(
            CompareAndSet(key, encode(expected), encode(value)),
            lambda: self.model.compare_and_set(key, expected, value),
            lambda done: (done.swapped, done.current),
        )

    @rule(key=KEYS, value=VALUES | st.sampled_from([KEEP, DELETE]))
    def modify(self, key: str, value: Any) -> None:
        def wanted() -> Any:
            old = self.model.value_of(key)
            if value is DELETE and self.model.alive(key) is not None:
                self.model.remove(key)
            elif value is not KEEP and value is not DELETE:
                self.model.write(key, value, self.model.deadline(key, ("", None), update=True))
            return old, self.model.value_of(key)

        given: list[Any] = []
        turn = Modify(key, lambda old: (given.append(old), value)[1], default="absent")
        there = self.model.alive(key) is not None
        before = self.model.value_of(key)
        self.both(turn, wanted, lambda done: (done.old_value, done.new_value))
        assert repr(given) == repr([before if there else "absent"])

    @rule(key=KEYS, asked=TOUCHES)
    def touch(self, key: str, asked: Any) -> None:
        self.both(Touch(key, deadline(asked)), lambda: self.model.touch(key, asked))

    @rule(limit=st.integers(1, 3))
    def expire(self, limit: int) -> None:
        self.both(Expire(limit), lambda: self.model.expire_some(limit), lambda answer: answer.keys)

    # ---- transactions

    @staticmethod
    def results(done: Any) -> Any:
        found: list[Any] = []
        for result in done.results:
            if isinstance(result, SetResult):
                found.append((result.old_value, result.new_value))
            else:
                found.append(result.old_value if hasattr(result, "old_value") else result.touched)
        return found, done.revision

    @rule(steps=STEPS, checked=st.lists(st.tuples(KEYS, st.integers(1, 9)), max_size=2))
    def batch(self, steps: list[Any], checked: list[Any]) -> None:
        checks = [(key, self.revision(key, guess) or 0) for key, guess in checked]
        self.both(
            Batch(tuple(map(step_of, steps)), tuple([Check(key, revision) for key, revision in checks])),
            lambda: self.model.transaction(checks, steps),
            self.results,
        )

    @rule(sets=st.dictionaries(KEYS, VALUES, max_size=5), idempotency_key=st.none() | st.sampled_from(["k", "l"]))
    def set_all(self, sets: dict[str, Any], idempotency_key: str | None) -> None:
        steps = [("set", key, value, ("", None)) for key, value in sets.items()]
        turn = SetAll({key: encode(value) for key, value in sets.items()})
        if idempotency_key is None:
            self.both(turn, lambda: self.model.transaction([], steps), self.results)
        else:
            self.both(
                Once(turn, idempotency_key),
                lambda: self.model.once(
                    idempotency_key, ("all", repr(sets)), lambda: self.model.transaction([], steps)
                ),
                lambda done: (self.results(done), done.replayed),
            )

    @rule(steps=STEPS, elsewhere=st.booleans())
    def transact(self, steps: list[Any], elsewhere: bool) -> None:
        steps = [step for step in steps if step[0] != "update"]  # refused ones raise at once, within the function

        def play(tx: Transaction) -> Any:
            results: list[Any] = []
            for step in steps:
                match step:
                    case ("set", key, value, asked):
                        draft = tx._draft
                        old = draft.set(key, encode(value), deadline(asked))
                        results.append((None if old is None else decode(old), value))
                        assert (key in tx and repr(tx[key]) == repr(value)) or asked[0] in ("at", "keep") or draft
                    case ("delete", key):
                        results.append(tx.delete(key))
                        assert key not in tx
                    case ("touch", key, asked):
                        results.append(tx._draft.touch(key, deadline(asked)))
            return results

        if elsewhere:
            # What a function has done, as a batch: the same changes.
            draft = Draft(self.stored)
            Transact(play).run(draft)
            self.both(draft.as_batch(10_000), lambda: self.model.transaction([], steps)[1], lambda done: done.revision)
        else:
            self.both(Transact(play), lambda: self.model.transaction([], steps)[0])

    @rule(key=KEYS, value=VALUES, idempotency_key=st.sampled_from(["i", "j"]))
    def set_once(self, key: str, value: Any, idempotency_key: str) -> None:
        self.both(
            Once(SetWith(key, encode(value)), idempotency_key),
            lambda: self.model.once(idempotency_key, ("set", key, repr(value)), lambda: self.model.set(key, value)),
            lambda done: ((done.old_value, done.new_value, done.revision), done.replayed),
        )

    @rule(steps=STEPS, idempotency_key=st.sampled_from(["i", "j"]))
    def batch_once(self, steps: list[Any], idempotency_key: str) -> None:
        self.both(
            Once(Batch(tuple(map(step_of, steps))), idempotency_key),
            lambda: self.model.once(idempotency_key, ("batch", repr(steps)), lambda: self.model.transaction([], steps)),
            lambda done: (self.results(done), done.replayed),
        )

    # ---- ranges

    @rule(
        prefix=PREFIXES,
        start=PREFIXES,
        after=PREFIXES,
        end=PREFIXES,
        reverse=st.booleans(),
        limit=st.none() | st.integers(0, 4),
    )
    def ranges(self, **bounds: Any) -> None:
        within = Range(**bounds)
        wanted = self.model.listed(**bounds)
        assert self.stored.run(Keys(within)) == wanted
        assert self.stored.run(Count(within)) == len(wanted)
        values = [encode(self.model.value_of(key)) for key in wanted]
        assert self.stored.run(Values(within)) == values
        assert self.stored.run(Pairs(within)) == list(zip(wanted, values, strict=True))
        assert [key for key, _ in self.stored.run(Entries(within))] == wanted

    @rule(prefix=PREFIXES, end=PREFIXES, reverse=st.booleans(), size=st.integers(1, 3), max_bytes=st.integers(0, 12))
    def pages(self, size: int, max_bytes: int, **bounds: Any) -> None:
        within = Range(**bounds, limit=size)
        wanted = self.model.listed(bounds["prefix"], None, None, bounds["end"], bounds["reverse"], None)
        found: list[str] = []
        cursor = None
        while True:
            page = self.stored.run(ReadPage(within, cursor, max_bytes))
            assert len(page.entries) <= size
            found += [key for key, _ in page.entries]
            cursor = page.cursor
            if page.done:
                break
            assert page.entries
        assert found == wanted

    @rule(prefix=PREFIXES, limit=st.none() | st.integers(0, 3), reverse=st.booleans())
    def delete_range(self, prefix: str | None, limit: int | None, reverse: bool) -> None:
        everything = self.model.listed(prefix, None, None, None, reverse, None)
        some = everything if limit is None else everything[:limit]
        self.both(
            DeleteRange(Range(prefix=prefix, limit=limit, reverse=reverse)),
            lambda: (self.model.delete_listed(some), len(some) < len(everything)),
            lambda done: (done.deleted, done.more),
        )

    # ---- what always holds

    @invariant()
    def the_same_state(self) -> None:
        assert self.stored.revision == self.model.revision
        assert {key: (entry.json, entry.revision, entry.expires_ms) for key, entry in self.stored.entries.items()} == {
            key: (encode(slot.value), slot.revision, slot.expires) for key, slot in self.model.slots.items()
        }
        assert [key for key, _ in self.stored.items()] == [key for key in self.model.slots if self.model.alive(key)]


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
