"""The engine beside a plain model, in virtual time: revisions, conditions, deadlines, transactions and ranges."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import hypothesis.strategies as st
from effort import size
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from turns.model import Model, Refused

from scopestate import DELETE, KEEP, MISSING, Engine
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.scope import Passivate
from scopestate.config import from_mapping
from scopestate.errors import Conflict, IdempotencyMismatch, UpdateRefused
from scopestate.ops import Append, Increment, Remove
from scopestate.ops import Set as SetOp

RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "written": ({"ttl_ms": 4_000}, {"rule": (4_000, False)}),
    "created": ({"ttl_ms": 4_000, "ttl_from": "create"}, {"rule": (4_000, True)}),
    "strict": ({"strict": True}, {"strict": True}),
}
"""Scope -> its rule in the configuration, and in the model."""

SCOPES = st.sampled_from(list(RULES))
KEYS = st.sampled_from(["a", "aa", "b", "", "é", "\U0001f600"])
VALUES = st.one_of(st.none(), st.integers(-3, 3), st.sampled_from(["x", 1.0, [], {"n": 1}, [1, "y"]]))
OPS = st.lists(
    st.sampled_from([Increment("", 1), Append("", "y"), SetOp("", 5), SetOp("n", 2), Increment("n", 3), Remove("n")]),
    max_size=3,
)
ASKED = st.one_of(
    st.just(("", None)),
    st.sampled_from([("ttl", 500), ("ttl", 2_500), ("at", 0), ("at", 1_000), ("at", 6_000), ("keep", None)]),
)
"""A deadline: `at` in milliseconds from the beginning of the run, which may be over."""
EXPECTED = st.sampled_from(["none", "right", "stale", "absent"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), KEYS, VALUES),
        st.tuples(st.just("set"), KEYS, VALUES, ASKED),
        st.tuples(st.just("update"), KEYS, OPS),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("touch"), KEYS, st.sampled_from([("ttl", 500), ("ttl", 9_000), ("", None)])),
    ),
    max_size=5,
)
RANGES = st.fixed_dictionaries(
    {
        "prefix": st.sampled_from([None, "", "a", "é"]),
        "start": st.sampled_from([None, None, "a", "b"]),
        "after": st.sampled_from([None, None, "a"]),
        "end": st.sampled_from([None, None, "b", "z"]),
        "reverse": st.booleans(),
        "limit": st.sampled_from([None, None, 0, 1, 3]),
    }
)
SETTLE_S = 1.237
"""Virtual seconds after which what was due when they began has been removed: a clock that is set wakes no timer.

Not a round number, so that no deadline falls due in the very millisecond in which the waiting ends.
"""


class RevisedMachine(RuleBasedStateMachine):
    """Each call is made on the engine and on the model; nothing of the engine runs by itself in between."""

    durability: ClassVar[str | None] = None

    @initialize(seed=st.integers(0, 2**32))
    def open(self, seed: int) -> None:
        self.directory = tempfile.mkdtemp(prefix="scopestate-revised-")
        self.dispatcher = DeterministicDispatcher(seed, switch=0.0, busy=0.0)
        self.base = self.dispatcher.wall_ns() // 1_000_000
        self.wall_s = 0.0
        self.models = {scope: Model(now=self.base, **model) for scope, (_, model) in RULES.items()}
        self.seen: dict[str, list[tuple[str, str, Any, Any, int]]] = {scope: [] for scope in RULES}
        self.deadlines: dict[tuple[str, int], int | None] = {}
        """(scope, revision) -> the deadline of the key that expired with it."""
        self.engine = self.start()

    def start(self) -> Engine:
        kv: dict[str, Any] = {"save_interval_ms": 3_600_000}
        if self.durability is not None:
            kv |= {"store_method": "file_based", "file_path": self.directory, "durability": self.durability}
        worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
        rules = [{"prefix": scope, **rule} for scope, (rule, _) in RULES.items() if rule]
        config = from_mapping({"workers": [worker], "scopes": rules})
        engine = Engine(config, dispatcher=self.dispatcher, handle_sigterm=False)
        engine.register_function("test::note", self.note)
        engine.register_trigger(function_id="test::note")
        return engine

    def note(self, event: Any) -> None:
        kind = event.event_type.removeprefix("state:")
        self.seen[event.scope].append((kind, event.key, event.old_value, event.new_value, event.revision))
        self.deadlines[event.scope, event.revision] = event.expired_at

    # ------------------------------------------------------------------------------------------------- small parts

    def model(self, scope: str) -> Model:
        """The model of a scope, at the time that the engine has now."""
        found = self.models[scope]
        found.now = self.engine._parts.clock.now_ms()
        return found

    def asked(self, asked: tuple[str, Any]) -> tuple[dict[str, Any], tuple[str, Any]]:
        """Return a deadline as the engine takes it, and as the model does."""
        word, number = asked
        match word:
            case "ttl":
                return {"ttl": timedelta(milliseconds=number)}, asked
            case "at":
                moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=self.base + number)
                return {"expires_at": moment}, ("at", self.base + number)
            case "keep":
                return {"keep_ttl": True}, asked
        return {}, asked

    def expected(self, model: Model, key: str, word: str) -> int | None:
        now = model.revision_of(key)
        return {"none": None, "right": now, "stale": now + 7 if now == 0 else now - 1, "absent": 0}[word]

    def same(self, call: Any, of_model: Any) -> Any:
        """Make a call on both, and compare what they refuse. Returns both answers, or None if they have refused."""
        try:
            expected = of_model()
        except Refused as error:
            refused = error.args
        else:
            return call(), expected
        assert refusal_of(call) == refused
        return None

    # ------------------------------------------------------------------------------------------------------ writes

    @rule(scope=SCOPES, key=KEYS, value=VALUES, asked=ASKED, word=EXPECTED)
    def set_(self, scope: str, key: str, value: Any, asked: tuple[str, Any], word: str) -> None:
        model = self.model(scope)
        options, model_asked = self.asked(asked)
        revision = self.expected(model, key, word)
        both = self.same(
            lambda: self.engine.set(scope, key, value, if_revision=revision, **options),
            lambda: model.set(key, value, model_asked, revision),
        )
        if both:
            answer, expected = both
            assert exactly((answer.old_value, answer.new_value, answer.revision), expected)

    @rule(scope=SCOPES, key=KEYS, value=VALUES)
    def set_plainly(self, scope: str, key: str, value: Any) -> None:
        answer = self.engine.set(scope, key, value)
        expected = self.model(scope).set(key, value)
        assert exactly((answer.old_value, answer.new_value, answer.revision), expected)

    @rule(scope=SCOPES, key=KEYS, ops=OPS, asked=ASKED, word=EXPECTED, atomic=st.booleans())
    def update(self, scope: str, key: str, ops: Any, asked: tuple[str, Any], word: str, atomic: bool) -> None:
        model = self.model(scope)
        options, model_asked = self.asked(asked)
        revision = self.expected(model, key, word)
        both = self.same(
            lambda: self.engine.update(scope, key, ops, if_revision=revision, atomic=atomic, **options),
            lambda: model.update(key, ops, model_asked, revision, atomic),
        )
        if both:
            answer, expected = both
            codes = [error.code for error in answer.errors]
            assert exactly((answer.old_value, answer.new_value, codes, answer.revision), expected)

    @rule(scope=SCOPES, key=KEYS, word=EXPECTED)
    def delete(self, scope: str, key: str, word: str) -> None:
        model = self.model(scope)
        revision = self.expected(model, key, word)
        both = self.same(
            lambda: self.engine.delete(scope, key, if_revision=revision), lambda: model.delete(key, revision)
        )
        if both:
            answer, (old, _) = both
            assert exactly(answer, old)

    @rule(scope=SCOPES, key=KEYS, expected=VALUES, value=VALUES, right=st.booleans())
    def compare_and_set(self, scope: str, key: str, expected: Any, value: Any, right: bool) -> None:
        model = self.model(scope)
        if right:
            expected = model.value_of(key)
        answer = self.engine.compare_and_set(scope, key, MISSING if expected is None else expected, value)
        assert exactly((answer.swapped, answer.current), model.compare_and_set(key, expected, value))

    @rule(scope=SCOPES, key=KEYS, what=st.one_of(st.just(KEEP), st.just(DELETE), VALUES))
    def modify(self, scope: str, key: str, what: Any) -> None:
        model = self.model(scope)
        old = model.value_of(key)
        found: list[Any] = []

        def function(value: Any) -> Any:
            found.append(value)
            return what

        answer = self.engine.modify(scope, key, function, default="none")
        assert exactly(found, [old if model.alive(key) else "none"])
        if what is DELETE:
            if model.alive(key):
                model.remove(key)
        elif what is not KEEP:
            model.write(key, what, model.deadline(key, ("", None), update=True))
        assert exactly((answer.old_value, answer.new_value), (old, model.value_of(key)))

    @rule(scope=SCOPES, key=KEYS, asked=st.sampled_from([("ttl", 500), ("ttl", 9_000), ("", None)]))
    def touch(self, scope: str, key: str, asked: tuple[str, Any]) -> None:
        ttl = self.asked(asked)[0].get("ttl")
        assert self.engine.touch(scope, key, ttl=ttl) is self.model(scope).touch(key, asked)

    @rule(scope=SCOPES, checks=st.lists(st.tuples(KEYS, EXPECTED), max_size=2), steps=STEPS)
    def batch(self, scope: str, checks: list[tuple[str, str]], steps: list[tuple[Any, ...]]) -> None:
        model = self.model(scope)
        wanted = [(key, self.expected(model, key, word)) for key, word in checks if word != "none"]
        model_steps = [(*step[:3], self.asked(step[3])[1]) if len(step) == 4 else step for step in steps]

        def commit() -> Any:
            with self.engine.batch(scope) as batch:
                for key, revision in wanted:
                    batch.check(key, revision=revision)
                for step in steps:
                    self.do(batch, step)
            return batch.result

        both = self.same(commit, lambda: model.transaction(wanted, model_steps))  # type: ignore[arg-type]
        if both:
            answer, (results, revision) = both
            assert answer.revision == revision
            for one, expected in zip(answer.results, results, strict=True):
                found = getattr(one, "touched", None)
                if found is None and isinstance(expected, tuple):
                    found = one.old_value, one.new_value
                elif found is None:
                    found = one.old_value
                assert exactly(found, expected)

    @rule(scope=SCOPES, steps=STEPS, fails=st.booleans())
    def transact(self, scope: str, steps: list[tuple[Any, ...]], fails: bool) -> None:
        model = self.model(scope)
        model_steps = [(*step[:3], self.asked(step[3])[1]) if len(step) == 4 else step for step in steps]

        def work(tx: Any) -> list[str]:
            for step in steps:
                self.do(tx, step)
            if fails:
                raise ZeroDivisionError
            return list(tx.keys())

        def of_model() -> Any:
            model.transaction([], model_steps)
            return model.listed(None, None, None, None, False, None)

        if fails:
            try:
                self.engine.transact(scope, work)
            except (ZeroDivisionError, UpdateRefused):
                return
            raise AssertionError("it was committed")
        before = (model.revision, len(model.events))
        try:
            expected = of_model()
        except Refused:
            assert (model.revision, len(model.events)) == before
            try:
                self.engine.transact(scope, work)
            except UpdateRefused:
                return
            raise AssertionError("it was committed") from None
        assert self.engine.transact(scope, work) == expected

    def do(self, target: Any, step: tuple[Any, ...]) -> None:
        """One step of a transaction, on a batch or within the function of `transact`."""
        word, key, *rest = step
        match word:
            case "set":
                target.set(key, rest[0], **(self.asked(rest[1])[0] if len(rest) > 1 else {}))
            case "update":
                target.update(key, rest[0])
            case "delete":
                target.delete(key)
            case _:
                target.touch(key, ttl=self.asked(rest[0])[0].get("ttl"))

    @rule(scope=SCOPES, key=KEYS, value=VALUES, name=st.sampled_from(["i", "j"]))
    def set_once(self, scope: str, key: str, value: Any, name: str) -> None:
        model = self.model(scope)
        content = f"{key} {value!r}"
        both = self.same(
            lambda: self.engine.set(scope, key, value, idempotency_key=name),
            lambda: model.once(name, content, lambda: model.set(key, value)),
        )
        if both:
            answer, (expected, replayed) = both
            assert answer.replayed is replayed
            assert exactly((answer.old_value, answer.new_value, answer.revision), expected)

    @rule(scope=SCOPES, within=RANGES)
    def delete_range(self, scope: str, within: dict[str, Any]) -> None:
        bounds = {name: bound for name, bound in within.items() if name not in ("reverse", "limit")}
        if not any(bound is not None for bound in bounds.values()):
            bounds["prefix"] = ""  # to remove all keys it has to be said
        model = self.model(scope)
        found = model.listed(**{**bounds, "reverse": False, "limit": None})
        assert self.engine.delete_range(scope, **bounds) == model.delete_listed(found)

    # ------------------------------------------------------------------------------------------------------- reads

    @rule(scope=SCOPES, key=KEYS)
    def read(self, scope: str, key: str) -> None:
        model, engine = self.model(scope), self.engine
        slot = model.alive(key)
        entry = engine.entry(scope, key)
        if slot is None:
            assert entry is None
            assert engine.get(scope, key, "none") == "none"
            assert engine.ttl(scope, key) is None
            return
        assert entry is not None
        assert exactly((entry.value, entry.revision), (slot.value, slot.revision))
        assert exactly(engine.get(scope, key), slot.value)
        if slot.expires is None:
            assert (entry.expires_at, engine.ttl(scope, key)) == (None, None)
            return
        assert entry.expires_at is not None
        assert round(entry.expires_at.timestamp() * 1000) == slot.expires
        assert abs((engine.ttl(scope, key) or 0) * 1000 - (slot.expires - model.now)) < 1e-3

    @rule(scope=SCOPES, within=RANGES, page=st.integers(1, 4))
    def ranges(self, scope: str, within: dict[str, Any], page: int) -> None:
        model, engine = self.model(scope), self.engine
        expected = model.listed(**within)
        values = [model.slots[key].value for key in expected]
        assert engine.keys(scope, **within) == expected
        assert exactly(engine.values(scope, **within), values)
        assert exactly(engine.items(scope, **within), list(zip(expected, values, strict=True)))
        found = [(entry.key, entry.value, entry.revision) for entry in engine.entries(scope, **within)]
        assert exactly(found, [(key, model.slots[key].value, model.slots[key].revision) for key in expected])
        unlimited = {**within, "limit": None}
        walked = [e.key for p in engine.pages(scope, **{**unlimited, "limit": page}) for e in p.entries]
        assert walked == model.listed(**unlimited)
        counted = {name: within[name] for name in ("prefix", "start", "end")}
        assert engine.count(scope, **counted) == len(model.listed(**counted, after=None, reverse=False, limit=None))

    @rule(scope=SCOPES)
    def list_(self, scope: str) -> None:
        model = self.model(scope)
        values = [slot.value for key, slot in model.slots.items() if model.alive(key)]
        assert exactly(self.engine.list(scope), values)

    # ------------------------------------------------------------------------------------------------- time and life

    def settle(self) -> None:
        """Let a little time pass, in which everything that is due is removed, and every event handled."""
        self.dispatcher.advance(SETTLE_S)
        for scope in RULES:
            self.model(scope).expire_some(1_000_000)
        self.engine.drain(60)

    @rule(seconds=st.sampled_from([0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.dispatcher.advance(seconds)
        self.settle()

    @rule(seconds=st.sampled_from([-3_600.0, 2.0, 3_600.0]))
    def the_clock_is_set(self, seconds: float) -> None:
        """Backwards it changes nothing; forwards keys expire at once. Nobody has looked for them yet."""
        self.dispatcher.set_clock(seconds)

    @rule(seconds=st.sampled_from([2.0, 60.0]))
    def the_machine_sleeps(self, seconds: float) -> None:
        self.dispatcher.suspend(seconds)

    @rule()
    def events_arrived(self) -> None:
        self.settle()
        for scope, model in self.models.items():
            assert exactly(self.tied(scope, self.seen[scope]), self.tied(scope, model.events)), scope

    def tied(self, scope: str, events: list[tuple[str, str, Any, Any, int]]) -> list[Any]:
        """Return events with those together that are in no order: of keys that have expired at the same moment."""
        found: list[Any] = []
        for moment, group in itertools.groupby(events, lambda event: self.deadlines.get((scope, event[-1]))):
            together = list(group)
            if moment is None:
                found += together
            else:
                found.append((sorted(repr(event[:-1]) for event in together), [event[-1] for event in together]))
        return found

    @precondition(lambda self: self.durability is not None)
    @rule(scope=SCOPES)
    def passivate(self, scope: str) -> None:
        self.engine.flush()
        self.settle()
        self.engine.flush()
        if scope in self.engine._scopes:
            assert self.engine._scopes[scope].housekeep(Passivate()) is True

    @precondition(lambda self: self.durability is not None)
    @rule(settled=st.booleans())
    def restart(self, settled: bool) -> None:
        if settled:
            self.settle()
        self.engine.close()
        self.dispatcher = self.next_dispatcher()
        self.engine = self.start()
        self.settle()

    def next_dispatcher(self) -> DeterministicDispatcher:
        """One that begins at the time of day that the last one has ended at."""
        return DeterministicDispatcher(1, switch=0.0, busy=0.0, wall_s=self.dispatcher.wall_s())

    @invariant()
    def nothing_waits(self) -> None:
        """With `commit`, other turns run while a call waits for the disk: what is due then is removed there."""
        if getattr(self, "engine", None) and self.durability == "commit":
            self.settle()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.events_arrived()
            # It sets the time of day back, which is a problem that is told.
            assert [one for one in self.engine.health().problems if "time of day" not in one] == []
        finally:
            self.engine.close()
            shutil.rmtree(self.directory)


def refusal_of(call: Any) -> tuple[str, list[Any]]:
    """Make a call that the model refuses; return the code and the facts of the engine's refusal."""
    try:
        call()
    except Conflict as error:
        return error.code, [(one.key, one.expected_revision, one.revision) for one in error.conflicts]
    except UpdateRefused as error:
        return error.code, [(one.index, one.code) for one in error.errors]
    except IdempotencyMismatch as error:
        return error.code, []
    raise AssertionError("it was not refused")


def exactly(one: Any, other: Any) -> bool:
    """Return whether two values are the same and of the same types: 1, 1.0 and true differ."""
    return repr(one) == repr(other)


class IntervalMachine(RevisedMachine):
    durability = "interval"


class CommitMachine(RevisedMachine):
    durability = "commit"


SETTINGS = settings(
    max_examples=size(12, 40),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TestMemory = RevisedMachine.TestCase
TestMemory.settings = SETTINGS
TestInterval = IntervalMachine.TestCase
TestInterval.settings = SETTINGS
TestCommit = CommitMachine.TestCase
TestCommit.settings = SETTINGS
