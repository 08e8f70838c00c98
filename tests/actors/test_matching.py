"""The table of triggers finds exactly the triggers that want an event, whatever came and went before."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scopestate.actors.backlog import Limits
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.functions import Functions
from scopestate.actors.loops import LoopThread
from scopestate.actors.router import EventRouter
from scopestate.actors.services import HandlerServices
from scopestate.actors.triggers import Prefixes, Watchers
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger

NAMES = ("", "a", "ab", "abc", "abd", "b", "ba", "cab")
VALUES = (None, b"1", b"1.0", b'{"a":1}', b'{"a":1,"b":2}', b'{"b":2,"a":1}', b'{"a":2}')

names = st.sampled_from(NAMES)
exact_or_prefix = st.one_of(
    st.fixed_dictionaries({}),
    st.fixed_dictionaries({"exact": names}),
    st.fixed_dictionaries({"prefix": names}),
)


@st.composite
def triggers(draw: st.DrawFn) -> Trigger:
    """Any trigger; one of few ids, so that some are replaced."""
    scope, key = draw(exact_or_prefix), draw(exact_or_prefix)
    kinds = draw(st.sampled_from([None, ("created",), ("updated", "deleted"), ("expired",)]))
    return Trigger(
        str(draw(st.integers(1, 6))),
        "f",
        scope=scope.get("exact"),
        scope_prefix=scope.get("prefix"),
        key=key.get("exact"),
        prefix=key.get("prefix"),
        events=kinds,
        only_if_changed=draw(st.booleans()),
        fields=draw(st.sampled_from([None, None, ("a",), ("b", "c")])),
    )


steps = st.one_of(
    st.tuples(st.just("register"), triggers()),
    st.tuples(st.just("unregister"), st.integers(1, 6)),
    st.tuples(st.just("hold"), names),
    st.tuples(st.just("forget"), names),
    st.tuples(st.just("feed"), names),
    st.tuples(st.just("write"), st.tuples(names, names, st.sampled_from(VALUES), st.sampled_from(VALUES))),
)


class Model:
    """A router, and beside it a list of the triggers that are registered."""

    def __init__(self) -> None:
        services = HandlerServices(
            DeterministicDispatcher(1), Functions(), Limits(), LoopThread("loop"), lambda failure: None
        )
        self.router = EventRouter(services)
        self.table = self.router.triggers
        self.registered: dict[str, Trigger] = {}
        """In order of registration: a trigger that is replaced by one for other keys goes to the end."""
        self.held: dict[str, Watchers] = {}
        self.fed: set[str | None] = set()
        self.table.is_fed = self.fed.__contains__

    def register(self, trigger: Trigger) -> None:
        before = self.registered.get(trigger.trigger_id)
        if before is not None and not all(
            getattr(before, name) == getattr(trigger, name) for name in ("scope", "key", "scope_prefix", "prefix")
        ):
            del self.registered[trigger.trigger_id]
        self.registered[trigger.trigger_id] = trigger
        self.table.register(trigger)

    def unregister(self, number: int) -> None:
        if self.registered.pop(str(number), None) is not None:
            self.table.unregister(str(number))

    def hold(self, scope: str) -> None:
        self.held[scope] = self.table.watch(scope)

    def forget(self, scope: str) -> None:
        if self.held.pop(scope, None) is not None:
            self.table.forget(scope)

    def feed(self, scope: str) -> None:
        if scope in self.held:
            self.fed ^= {scope}
            self.table.refeed(scope)

    def write(self, what: tuple[str, str, bytes | None, bytes | None]) -> None:
        scope, key, old, new = what
        kind: Any = "state:deleted" if new is None else "state:created" if old is None else "state:updated"
        event = StateEvent(kind, scope, key, old, new, 1)
        watch = self.held.get(scope)
        expected = [trigger.trigger_id for trigger in self.registered.values() if trigger.matches(event)]

        found = self._found(watch, event) if watch is not None else self._found(self.table.watchers(scope), event)

        assert found == expected
        # What a scope looks at before it prepares an event (actors/stretch.py, `_write`).
        table = self.table.watchers(scope) if watch is None else watch
        looks = key in table or None in table or key in table.anywhere or None in table.anywhere
        assert looks or not expected
        assert table.has_any() or not expected

    def _found(self, watch: Watchers, event: StateEvent) -> list[str]:
        prepared = self.router.prepare_late(event.scope, watch, event.key, event.old_json, event.new_json, 1, 0)
        handlers = prepared[0][0] if prepared else ()
        return [handler.trigger.trigger_id for handler in handlers if handler.trigger.differs(event)]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=5, max_size=40), st.sampled_from(VALUES), st.sampled_from(VALUES))
def test_the_table_finds_what_matches_in_order_of_registration(
    history: list[tuple[str, Any]], old: bytes | None, new: bytes | None
) -> None:
    model = Model()
    for name, argument in history:
        getattr(model, name)(argument)
    for scope in NAMES:
        for key in NAMES:
            model.write((scope, key, old, new))
    for number in range(1, 7):
        model.unregister(number)
    assert not any(watchers.groups for watchers in model.held.values())
    for scope in list(model.held):
        model.forget(scope)
    # Nothing is left behind.
    table = model.table
    assert not table._by_scope
    assert not table._by_scope_prefix
    assert not table._anywhere


@given(st.lists(st.tuples(st.sampled_from(["put", "pop"]), names)), names)
def test_prefixes_find_what_a_name_begins_with(history: list[tuple[str, str]], name: str) -> None:
    index: Prefixes[str] = Prefixes()
    model: dict[str, str] = {}
    for act, prefix in history:
        if act == "put":
            index.put(prefix, f"<{prefix}>")
            model[prefix] = f"<{prefix}>"
        else:
            index.pop(prefix)
            model.pop(prefix, None)

    fitting = sorted((prefix for prefix in model if name.startswith(prefix)), key=len)
    assert index.find(name) == [model[prefix] for prefix in fitting]
    assert index.get(name) == model.get(name)
    assert bool(index) == bool(model)
