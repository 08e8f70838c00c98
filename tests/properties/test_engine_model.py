"""The engine against a plain model: any order of calls, triggers, reloads, passivation and restarts (hypothesis)."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import defaultdict
from typing import Any, ClassVar

import hypothesis.strategies as st
import msgspec
from effort import size
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from linearizability.model import MISSING, ScopeModel, State, text_of
from stored import values_of

from scopestate import Engine, messages
from scopestate.actors.scope import Passivate
from scopestate.config import Config, TriggerConfig, from_mapping
from scopestate.persistence import FileAdapter

SCOPES = st.sampled_from(["a", "b", "", "../x", "ünï", "nul\x00", "x" * 300])
KEYS = st.sampled_from(["k", "l", "", "__proto__", "a/b", "é\u2028"])

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=4,
)

OPS = st.lists(
    st.one_of(
        st.tuples(st.just("increment"), st.integers(-1000, 1000)),
        st.tuples(st.just("append"), VALUES),
        st.tuples(st.just("set"), VALUES),
        st.tuples(st.just("merge"), st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9), max_size=2)),
    ),
    max_size=3,
)

WAYS = st.sampled_from(["method", "call", "ask", "future", "aio", "handle"])
"""The same function, through each front door."""

_ABSENT = object()


def wire_op(kind: str, operand: Any) -> dict[str, Any]:
    match kind:
        case "increment":
            return {"type": kind, "path": "", "by": operand}
        case "merge":
            return {"type": kind, "value": operand}
        case _:
            return {"type": kind, "path": "", "value": operand}


class EngineMachine(RuleBasedStateMachine):
    """State of the model: per scope its ordered content and the number of writes so far; per trigger the events due."""

    durability: ClassVar[str] = "interval"

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="scopestate-model-")
        self.model: dict[str, State] = {}
        self.writes: dict[str, int] = defaultdict(int)
        self.triggers: dict[str, tuple[str | None, str | None]] = {}
        self.configured: dict[str, tuple[str | None, str | None]] = {}
        self.due: dict[str, list[tuple[str, str, str, str, int]]] = defaultdict(list)
        self.seen: dict[str, list[tuple[str, str, str, str, int]]] = defaultdict(list)
        self.limits: dict[str, Any] = {}
        self.engine = self.start()

    def start(self) -> Engine:
        engine = Engine(self.config(), handle_sigterm=False)
        for trigger_id, (scope, key) in self.triggers.items():
            self.register(engine, trigger_id, scope, key)
        return engine

    def config(self) -> Config:
        kv = {
            "store_method": "file_based",
            "file_path": self.directory,
            "save_interval_ms": 3_600_000,
            "durability": self.durability,
        }
        worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
        functions = {f"test::{trigger_id}": self.noting(trigger_id) for trigger_id in self.configured}
        triggers = tuple(
            TriggerConfig(f"test::{trigger_id}", scope, key, id=trigger_id)
            for trigger_id, (scope, key) in self.configured.items()
        )
        config = from_mapping({"workers": [worker], "limits": self.limits, "functions": functions})
        return msgspec.structs.replace(config, triggers=triggers)

    def noting(self, trigger_id: str) -> Any:
        def note(event: Any) -> None:
            old = MISSING if event.old_json is None else text_of(event.old_value)
            new = MISSING if event.new_json is None else text_of(event.new_value)
            self.seen[trigger_id].append((event.scope, event.key, old, new, event.revision))

        return note

    def register(self, engine: Engine, trigger_id: str, scope: str | None, key: str | None) -> None:
        engine.register_function(f"test::{trigger_id}", self.noting(trigger_id))
        engine.register_trigger(function_id=f"test::{trigger_id}", scope=scope, key=key, trigger_id=trigger_id)

    # ------------------------------------------------------------------------------------------------------- calls

    def expect(self, scope: str, name: str, *arguments: Any) -> Any:
        """Let the model make the call; return its result, and note the event that is due."""
        state, result = ScopeModel.apply(self.model.get(scope, ()), name, arguments)
        self.model[scope] = state
        if name in ("set", "update", "delete"):
            self.writes[scope] += 1
            key = arguments[0]
            old, new = result if name != "delete" else (result, MISSING)
            for trigger_id, (its_scope, its_key) in {**self.triggers, **self.configured}.items():
                if its_scope in (None, scope) and its_key in (None, key):
                    self.due[trigger_id].append((scope, key, old, new, self.writes[scope]))
        return result

    def make(self, way: str, name: str, scope: str, *arguments: Any) -> Any:
        """Make a call through one of the doors; returns what the method of that name returns."""
        engine = self.engine
        match way:
            case "method":
                return getattr(engine, name)(scope, *arguments)
            case "handle":
                return getattr(engine.scope(scope), name)(*arguments)
            case "aio":
                return asyncio.run(getattr(engine.aio, name)(scope, *arguments))
        message = getattr(messages, name.capitalize())(scope, *arguments)
        if way == "ask":
            return engine.ask(message)
        if way == "future":
            return engine.ask(message, block=False).get(timeout=30)
        fields = dict(zip(("key", "ops" if name == "update" else "value"), arguments, strict=False))
        return engine.call(f"state::{name}", {"scope": scope, **fields})

    @staticmethod
    def written(result: Any) -> tuple[str, str]:
        """What a set or an update came to. A plain result of `call` cannot tell null from missing: both are null."""
        if isinstance(result, dict):
            return text_of(result["old_value"]), text_of(result["new_value"])
        return MISSING if result.created else text_of(result.old_value), text_of(result.new_value)

    @staticmethod
    def like(expected: Any, way: str) -> Any:
        old, new = expected
        return ("null" if way == "call" and old == MISSING else old), new

    @rule(scope=SCOPES, key=KEYS, value=VALUES, way=WAYS)
    def set_(self, scope: str, key: str, value: Any, way: str) -> None:
        result = self.make(way, "set", scope, key, value)

        assert self.written(result) == self.like(self.expect(scope, "set", key, text_of(value)), way)

    @rule(scope=SCOPES, key=KEYS, ops=OPS, way=st.sampled_from(["method", "call", "aio", "handle"]))
    def update(self, scope: str, key: str, ops: list[tuple[str, Any]], way: str) -> None:
        result = self.make(way, "update", scope, key, [wire_op(*op) for op in ops])

        assert self.written(result) == self.like(self.expect(scope, "update", key, tuple(ops)), way)

    @rule(scope=SCOPES, key=KEYS, way=WAYS)
    def get(self, scope: str, key: str, way: str) -> None:
        expected = self.expect(scope, "get", key)
        if way in ("method", "aio", "handle"):
            value = self.make(way, "get", scope, key, _ABSENT)
            assert (MISSING if value is _ABSENT else text_of(value)) == expected
        else:
            assert text_of(self.make(way, "get", scope, key)) == ("null" if expected == MISSING else expected)

    @rule(scope=SCOPES, key=KEYS, way=WAYS)
    def delete(self, scope: str, key: str, way: str) -> None:
        expected = self.expect(scope, "delete", key)

        assert text_of(self.make(way, "delete", scope, key)) == ("null" if expected == MISSING else expected)

    @rule(scope=SCOPES, way=WAYS)
    def list_(self, scope: str, way: str) -> None:
        assert tuple(map(text_of, self.make(way, "list", scope))) == self.expect(scope, "list")

    # ------------------------------------------------------------------------------------------------- the rest of life

    @rule(name=st.sampled_from(["t1", "t2"]), scope=st.none() | SCOPES, key=st.none() | KEYS)
    def register_trigger(self, name: str, scope: str | None, key: str | None) -> None:
        self.engine.drain(60)  # what waits for a trigger that moves elsewhere is dropped with it
        self.register(self.engine, name, scope, key)
        self.triggers[name] = (scope, key)

    @precondition(lambda self: self.triggers)
    @rule(data=st.data())
    def unregister_trigger(self, data: st.DataObject) -> None:
        self.engine.drain(60)
        name = data.draw(st.sampled_from(sorted(self.triggers)))
        next(handle for handle in self.engine.triggers() if handle.trigger_id == name).unregister()
        del self.triggers[name]

    @rule(
        depth=st.integers(1, 50),
        triggers=st.dictionaries(st.sampled_from(["c1", "c2"]), st.tuples(st.none() | SCOPES, st.none() | KEYS)),
    )
    def reload(self, depth: int, triggers: dict[str, tuple[str | None, str | None]]) -> None:
        self.engine.drain(60)
        self.limits = {"max_event_depth": depth, "passivate_after_ms": depth * 1_000_000}
        self.configured = triggers
        self.engine.reconfigure(self.config())

    @rule(scope=SCOPES)
    def passivate(self, scope: str) -> None:
        self.engine.flush()
        if scope in self.engine._scopes:
            assert self.engine._scopes[scope].housekeep(Passivate()) is True
            assert scope not in self.engine._scopes

    @rule()
    def flush(self) -> None:
        self.engine.flush()

        assert self.engine.stats().unsaved_scopes == 0

    @rule()
    def restart(self) -> None:
        self.engine.close()
        self.engine = self.start()

    @rule()
    def events_arrived(self) -> None:
        self.engine.drain(60)

        assert self.seen == self.due

    @invariant()
    def groups_are_the_scopes_that_hold_keys(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.list_groups() == sorted(scope for scope, state in self.model.items() if state)
            assert self.engine.health().ok

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.close()
        try:
            assert self.seen == self.due
            adapter = FileAdapter(self.directory)
            try:
                assert adapter.check() == []
                for scope, state in self.model.items():
                    saved = adapter.load(scope)
                    content = [(key, text_of(msgspec.json.decode(data))) for key, data in values_of(saved).items()]
                    assert tuple(content) == state
                    assert saved.revision == self.writes[scope]
            finally:
                adapter.close()
        finally:
            shutil.rmtree(self.directory)


class CommitMachine(EngineMachine):
    durability = "commit"


SETTINGS = settings(
    max_examples=size(20, 60),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TestInterval = EngineMachine.TestCase
TestInterval.settings = SETTINGS
TestCommit = CommitMachine.TestCase
TestCommit.settings = SETTINGS
