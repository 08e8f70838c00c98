"""Keys expire at their deadline: in virtual time, whatever happens to clocks, scopes, handlers and stores."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from forking import beside_threads

from scopestate import Engine
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.config import AdapterConfig, Config, KvOptions, LimitsConfig, ScopeRule
from scopestate.errors import Conflict, StorageError, UpdateRefused
from scopestate.ops.results import StateEvent
from scopestate.ops.writes import Expire

Open = Callable[..., Engine]


class World:
    """Engines on one store, one after another, in virtual time."""

    def __init__(self, directory: Path, durability: str) -> None:
        self.directory, self.durability = directory, durability
        self.dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
        self.seen: list[StateEvent] = []
        self.engine: Engine = None  # type: ignore[assignment]  # until it is opened

    def open(self, rules: tuple[ScopeRule, ...] = (), watch: bool = True, **limits: Any) -> Engine:
        kv = KvOptions()
        if self.durability != "memory":
            kv = KvOptions("file_based", str(self.directory), 1000, self.durability)  # type: ignore[arg-type]
        config = Config(AdapterConfig("kv", kv), scopes=rules, limits=LimitsConfig(**limits))
        self.engine = Engine(config, dispatcher=self.dispatcher, handle_sigterm=False)
        if watch:
            self.engine.on_change()(self.seen.append)
        return self.engine

    def end(self) -> None:
        """Close the engine, and let a new process begin at the same time of day."""
        self.engine.close()
        wall_s = self.dispatcher.wall_s()
        self.dispatcher = DeterministicDispatcher(1, switch=0, busy=0, wall_s=wall_s)

    def told(self) -> list[tuple[str, str, int]]:
        """Return (kind, key, revision) of the events since the last call."""
        told = [(event.event_type.removeprefix("state:"), event.key, event.revision) for event in self.seen]
        self.seen.clear()
        return told


@pytest.fixture(params=["memory", "interval", "commit"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "store", request.param)
    yield world
    world.engine.close()


@pytest.fixture(params=["interval", "commit"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "store", request.param)
    yield world
    world.engine.close()


def test_a_key_is_absent_from_its_deadline_on_and_its_event_follows(world: World) -> None:
    engine = world.open()
    engine.set("s", "a", 1, ttl=10)
    engine.set("s", "b", 2)
    world.dispatcher.advance(9.999)
    assert engine.get("s", "a") == 1
    world.told()

    world.dispatcher._now += 0.001  # nothing has run at the deadline yet
    assert engine.get("s", "a") is None
    assert engine.list("s") == [2]
    assert world.told() == []
    world.dispatcher.advance(0.05)

    [event] = world.seen
    assert (event.event_type, event.key, event.old_value, event.new_value) == ("state:expired", "a", 1, None)
    assert (event.revision, event.late_ms) == (3, 0)
    assert engine.stats().expired == 1


# --------------------------------------------------------------------------------------------------- in which order


@pytest.mark.parametrize("swept", [False, True])
def test_a_key_that_is_set_again_after_its_deadline_expires_first_and_is_created_then(
    world: World, swept: bool
) -> None:
    engine = world.open()
    engine.set("s", "a", 1, ttl=10)
    engine.set("s", "b", 2)
    pass_time(world, 10, swept=swept)

    result = engine.set("s", "a", 3)
    world.dispatcher.advance(2)

    assert (result.created, result.old_value) == (True, None)
    assert world.told() == [("created", "a", 1), ("created", "b", 2), ("expired", "a", 3), ("created", "a", 4)]
    assert engine.list("s") == [2, 3]  # created anew, so it is the last
    assert engine.ttl("s", "a") is None


@pytest.mark.parametrize("swept", [False, True])
def test_every_write_finds_an_expired_key_absent(world: World, swept: bool) -> None:
    engine = world.open()
    for name in ("update", "delete", "if_absent", "cas", "modify", "touch", "batch", "transact", "range"):
        engine.set("s", name, 7, ttl=10)
    world.dispatcher.run_until_idle()
    world.told()
    pass_time(world, 10, swept=swept)
    scope = engine.scope("s")

    assert scope.update("update", [{"type": "increment", "path": "", "by": 1}]).new_value == 1
    assert scope.delete("delete") is None
    assert scope.set("if_absent", 1, if_absent=True).created
    assert not scope.compare_and_set("cas", 7, 8).swapped
    assert scope.modify("modify", lambda value: value, default=5).new_value == 5
    assert scope.touch("touch", ttl=100) is False
    with scope.batch() as batch:
        batch.check("batch", absent=True)
        batch.set("batch", 1)
    scope.transact(lambda tx: tx.set("transact", 2 if tx.get("transact") is None else 0))
    assert scope.delete_range(prefix="range") == 0
    world.dispatcher.advance(2)

    told = world.told()
    for key in ("update", "if_absent", "modify", "batch", "transact"):
        assert [kind for kind, name, _ in told if name == key] == ["expired", "created"]
    assert [kind for kind, name, _ in told if name == "delete"] == ["expired", "deleted"]
    assert [[kind for kind, name, _ in told if name == key] for key in ("cas", "touch", "range")] == [["expired"]] * 3
    assert [revision for _, _, revision in told] == list(range(10, 10 + len(told)))


def test_every_read_finds_an_expired_key_absent(world: World) -> None:
    engine = world.open()
    scope = engine.scope("s")
    scope.set("a", 1, ttl=10)
    scope.set("b", 2, ttl=20)
    pass_time(world, 10, swept=False)

    assert scope.get("a") is None
    assert scope.entry("a") is None
    assert scope.ttl("a") is None
    assert "a" not in scope
    assert scope.list() == scope.values() == [2]
    assert scope.keys() == ["b"]
    assert scope.items() == [("b", 2)] or dict(scope.items()) == {"b": 2}
    assert scope.count() == 1
    assert [entry.key for page in scope.pages() for entry in page.entries] == ["b"]
    assert list(scope.mapping()) == ["b"]
    pass_time(world, 10, swept=False)
    assert engine.list_groups() == []


def test_a_deadline_is_kept_moved_and_cleared_as_the_writes_say(world: World) -> None:
    scope = world.open().scope("s")
    for key in ("set", "kept", "updated", "touched", "cleared"):
        scope.set(key, 1, ttl=10)
    world.dispatcher.advance(5)
    scope.set("set", 2)
    scope.set("kept", 2, keep_ttl=True)
    scope.update("updated", [{"type": "increment", "path": "", "by": 1}])
    scope.touch("touched", ttl=10)
    scope.touch("cleared", ttl=None)

    assert [scope.ttl(key) for key in ("set", "kept", "updated", "touched", "cleared")] == [None, 5.0, 5.0, 10.0, None]
    world.dispatcher.advance(6)
    assert scope.keys() == ["cleared", "set", "touched"]
    world.dispatcher.advance(1000)
    assert scope.keys() == ["cleared", "set"]
    assert [key for kind, key, _ in world.told() if kind == "expired"] == ["kept", "updated", "touched"]


def pass_time(world: World, seconds: float, *, swept: bool) -> None:
    """Let time pass; not `swept`: so that nothing has run since."""
    if swept:
        world.dispatcher.advance(seconds + 1)
    else:
        world.dispatcher._now += seconds


# ----------------------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_is_set_back_revives_nothing_and_puts_nothing_off(world: World) -> None:
    engine = world.open()
    engine.set("s", "a", 1, ttl=10)
    engine.set("s", "b", 1, ttl=20)
    pass_time(world, 10, swept=False)
    assert engine.get("s", "a") is None

    world.dispatcher.set_clock(-3600)
    assert engine.get("s", "a") is None
    assert engine.ttl("s", "b") == 10.0
    world.dispatcher.run_until_idle()
    assert engine.health().problems == (
        "the time of day was set back: deadlines follow a clock that is 3600 s ahead of it",
    )
    world.dispatcher.advance(10.05)

    assert [event.key for event in world.seen if event.event_type == "state:expired"] == ["a", "b"]
    assert engine.get("s", "b") is None
    assert engine.health().ok  # no key has a deadline now


def test_a_clock_that_is_set_forward_expires_at_once(world: World) -> None:
    engine = world.open()
    engine.set("s", "a", 1, ttl=3600)
    world.dispatcher.advance(0.5)  # the timer is set

    world.dispatcher.set_clock(3600)
    assert engine.get("s", "a") is None
    world.dispatcher.advance(1.05)

    assert [kind for kind, _, _ in world.told()] == ["created", "expired"]


def test_the_time_of_a_suspended_machine_counts(world: World) -> None:
    engine = world.open()
    engine.set("s", "a", 1, ttl=3600)
    world.dispatcher.advance(0.5)  # the timer is set

    world.dispatcher.suspend(3600)
    assert engine.get("s", "a") is None
    world.dispatcher.advance(1.05)

    assert [kind for kind, _, _ in world.told()] == ["created", "expired"]


def test_a_clock_that_is_set_back_between_two_processes_revives_nothing(kept: World) -> None:
    engine = kept.open()
    engine.set("s", "a", 1, ttl=10)
    engine.set("s", "b", 1, ttl=30)
    engine.flush()
    pass_time(kept, 10, swept=False)
    assert engine.get("s", "a") is None
    kept.end()

    kept.dispatcher.set_clock(-86_400)
    engine = kept.open()
    assert engine.get("s", "a") is None
    assert engine.ttl("s", "b") == 20.0
    kept.told()
    kept.dispatcher.advance(20.05)
    assert [kind for kind, _, _ in kept.told()] == ["expired", "expired"]


# ---------------------------------------------------------------------------------------- restarts, pace, passivation


def test_after_a_week_what_has_expired_is_removed_oldest_first_and_paced(kept: World) -> None:
    engine = kept.open(watch=False)
    for number in range(3000):
        engine.set(f"s{number % 3}", f"k{number}", number, ttl=60 + (number * 7919) % 3000)
    engine.set("s0", "stays", 1, ttl=30 * 86_400)
    engine.set("never", "k", 1)
    kept.end()

    kept.dispatcher.set_clock(7 * 86_400)
    engine = kept.open()
    assert engine.stats().keys == 0  # nothing is loaded for it yet
    times: list[float] = []
    engine.on_change(events=("expired",))(lambda event: times.append(kept.dispatcher.monotonic()))
    kept.dispatcher.advance(1)

    assert len(times) == 3000
    for begin in times:
        assert sum(begin <= time < begin + 0.0099 for time in times) <= 1000
    assert times[-1] - times[0] >= 0.02
    deadlines = [event.expired_at or 0 for event in kept.seen]
    for scope in ("s0", "s1", "s2"):
        mine = [event.expired_at or 0 for event in kept.seen if event.scope == scope]
        assert mine == sorted(mine)
    # The scopes take turns: what is removed is never much younger than the oldest that is left.
    assert max(max(deadlines[:index], default=0) - deadline for index, deadline in enumerate(deadlines)) < 1_600_000
    assert all((event.late_ms or 0) > 6 * 86_400_000 for event in kept.seen)
    assert engine.scope("s0").keys() == ["stays"]


def test_scopes_with_deadlines_leave_memory_and_their_keys_expire_all_the_same(kept: World) -> None:
    engine = kept.open(passivate_after_ms=10_000)
    engine.set("s", "a", 1, ttl=3600)
    engine.set("s", "b", 2)
    kept.dispatcher.advance(60)
    assert engine.stats().scopes == 0
    assert engine.stats().expiring_scopes == 1
    kept.told()

    kept.dispatcher.advance(3600)

    [event] = kept.seen
    assert (event.event_type, event.key, event.late_ms) == ("state:expired", "a", 0)
    kept.dispatcher.advance(60)
    assert engine.stats().scopes == 0
    assert engine.stats().expiring_scopes == 0
    assert engine.scope("s").keys() == ["b"]


def test_keys_that_expire_while_no_engine_is_open_fire_when_the_next_one_is(kept: World) -> None:
    engine = kept.open()
    engine.set("s", "a", 1, ttl=100)
    kept.end()
    kept.told()
    kept.dispatcher.set_clock(3600)

    engine = kept.open()
    kept.dispatcher.advance(0.05)

    assert kept.told() == [("expired", "a", 2)]
    engine.close()
    kept.end()
    kept.open()
    kept.dispatcher.advance(10)
    assert kept.told() == []


def test_an_engine_that_closes_removes_no_more_keys(kept: World) -> None:
    engine = kept.open()
    engine.set("s", "a", 1, ttl=1)
    engine.on_change(scope="s")(lambda event: kept.dispatcher.sleep(4))
    engine.set("s", "b", 1)
    engine.close()  # it waits for the handler, longer than the key lasts

    assert [kind for kind, _, _ in kept.told()] == ["created", "created"]
    kept.end()
    kept.open()
    kept.dispatcher.advance(1)
    assert kept.told() == [("expired", "a", 3)]


# -------------------------------------------------------------------------------------------- what stands in the way


def test_a_full_handler_holds_expired_keys_back_and_loses_none(world: World, caplog: pytest.LogCaptureFixture) -> None:
    engine = world.open(handler_mailbox=10, call_timeout_ms=0, watch=False)
    seen: list[str] = []
    open_at = [1e9]

    def slow(event: StateEvent) -> None:
        while world.dispatcher.monotonic() < open_at[0]:
            world.dispatcher.sleep(1)
        seen.append(event.key)

    engine.on_change(scope="s", events=("expired",))(slow)
    for number in range(1000):
        engine.set("s", f"k{number:03}", number, ttl=1 + number / 100)
    world.dispatcher.advance(30)

    assert engine.list("s") == []
    assert 0 < engine.stats().expired < 1000
    [problem] = engine.health().problems
    assert problem == "expired keys of scope 's' could not be removed and will be retried: a handler's mailbox is full"
    assert sum("could not be removed" in record.message for record in caplog.records) == 1
    open_at[0] = 0
    world.dispatcher.advance(60)

    assert seen == [f"k{number:03}" for number in range(1000)]
    assert engine.health().ok
    assert engine.stats().expired == 1000


def test_keys_before_the_one_whose_handler_is_full_are_removed(world: World) -> None:
    engine = world.open(handler_mailbox=1, call_timeout_ms=0, watch=False)
    stuck = [True]

    def slow(event: StateEvent) -> None:
        while stuck[0]:
            world.dispatcher.sleep(1)

    engine.on_change(key="stuck", events=("expired",), order="trigger")(slow)
    for scope in ("in the handler", "in its mailbox"):
        engine.set(scope, "stuck", 1, ttl=1)
        world.dispatcher.advance(2)
    for key in ("a", "b", "stuck", "c"):
        engine.set("s", key, 1, ttl=5)
    world.dispatcher.advance(30)

    assert list(engine._parts.directory["s"]._values) == ["stuck", "c"]  # type: ignore[attr-defined]
    assert engine.list("s") == []
    stuck[0] = False
    world.dispatcher.advance(30)
    assert engine.stats().expired == 6


def test_a_store_that_cannot_be_read_is_tried_again(kept: World, caplog: pytest.LogCaptureFixture) -> None:
    engine = kept.open()
    for scope in ("bad", "good"):
        engine.set(scope, "a", 1, ttl=100)
    kept.end()
    kept.told()
    kept.dispatcher.set_clock(3600)
    engine = kept.open()
    store = engine._parts.backend.store
    assert store is not None
    load, failing = store.load, [True]

    def load_or_fail(scope: str) -> Any:
        if failing[0] and scope == "bad":
            raise StorageError("the disk is on fire")
        return load(scope)

    store.load = load_or_fail  # type: ignore[method-assign]
    kept.dispatcher.advance(60)

    assert [event.scope for event in kept.seen] == ["good"]
    assert "the disk is on fire" in engine.health().problems[0]
    assert sum("the disk is on fire" in record.message for record in caplog.records) == 1
    failing[0] = False
    kept.dispatcher.advance(20)
    assert [event.scope for event in kept.seen] == ["good", "bad"]
    assert engine.health().ok


def test_a_commit_that_fails_loses_no_event_and_repeats_none(tmp_path: Path) -> None:
    world = World(tmp_path / "store", "commit")
    engine = world.open()
    engine.set("s", "a", 1, ttl=10)
    store = engine._parts.backend.store
    assert store is not None
    save, failing = store.save, [True]

    def save_or_fail(batch: Any) -> None:
        if failing[0]:
            raise StorageError("no space left")
        save(batch)

    store.save = save_or_fail  # type: ignore[method-assign]
    world.dispatcher.run_until_idle()
    world.told()
    world.dispatcher.advance(15)
    assert world.told() == []
    assert engine.get("s", "a") is None
    failing[0] = False
    world.dispatcher.advance(20)

    assert [(kind, key) for kind, key, _ in world.told()] == [("expired", "a")]
    engine.close()


def test_a_new_deadline_that_could_not_be_saved_keeps_its_scope_in_memory(tmp_path: Path) -> None:
    world = World(tmp_path / "store", "interval")
    engine = world.open(passivate_after_ms=1000)
    engine.set("s", "a", 1)
    engine.flush()
    store = engine._parts.backend.store
    assert store is not None
    save, failing = store.save, [True]

    def save_or_fail(batch: Any) -> None:
        if failing[0]:
            raise StorageError("no space left")
        save(batch)

    store.save = save_or_fail  # type: ignore[method-assign]
    engine.touch("s", "a", ttl=100)  # no change has a number here
    world.dispatcher.advance(10)
    assert engine.ttl("s", "a") == 90.0
    failing[0] = False
    world.dispatcher.advance(80)
    assert engine.stats().scopes == 0
    world.dispatcher.advance(10)

    assert [kind for kind, _, _ in world.told()] == ["created", "expired"]
    engine.close()


# -------------------------------------------------------------------------------------------------------------- rules


def test_a_rule_gives_keys_a_time_to_live_from_each_write_or_from_their_creation(world: World) -> None:
    rules = (
        ScopeRule(name="plain", ttl_ms=0),
        ScopeRule(prefix="w", ttl_ms=10_000),
        ScopeRule(prefix="c", ttl_ms=10_000, ttl_from="create"),
        ScopeRule(prefix="", ttl_ms=50_000),
    )
    engine = world.open(rules)
    for scope in ("w", "c", "plain", "other"):
        engine.set(scope, "k", 1)
    world.dispatcher.advance(6)
    for scope in ("w", "c"):
        engine.update(scope, "k", [{"type": "increment", "path": "", "by": 1}])

    assert [engine.ttl(scope, "k") for scope in ("w", "c", "plain", "other")] == [10.0, 4.0, None, 44.0]
    engine.set("w", "own", 1, ttl=100)
    assert engine.ttl("w", "own") == 100.0
    world.dispatcher.advance(5)
    assert [engine.get(scope, "k") for scope in ("w", "c", "plain", "other")] == [2, None, 1, 1]


def test_a_reload_changes_the_rules_for_the_writes_that_follow(world: World) -> None:
    engine = world.open((ScopeRule(prefix="s", ttl_ms=10_000),))
    engine.set("s", "before", 1)
    engine.set("other", "before", 1)
    parts = engine._parts

    parts.reconfigure(msgspec.structs.replace(parts.config, scopes=(ScopeRule(prefix="", ttl_ms=60_000, strict=True),)))
    engine.set("s", "after", 1)
    engine.set("other", "after", 1)

    assert [engine.ttl("s", key) for key in ("before", "after")] == [10.0, 60.0]
    assert [engine.ttl("other", key) for key in ("before", "after")] == [None, 60.0]
    with pytest.raises(UpdateRefused):
        engine.update(
            "s", "after", [{"type": "increment", "path": "", "by": 1}, {"type": "append", "path": "x", "value": 1}]
        )
    parts.reconfigure(msgspec.structs.replace(parts.config, scopes=()))
    engine.set("s", "after", 1)
    assert engine.ttl("s", "after") is None


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_forked_child_removes_nothing_and_its_parent_goes_on() -> None:
    seen: list[str] = []
    with Engine() as engine:
        engine.on_change(events=("expired",))(lambda event: seen.append(event.key))
        engine.set("s", "a", 1, ttl=0.3)
        with beside_threads():
            child = os.fork()
        if child == 0:
            expiry = engine._parts.expiry
            before = expiry.expired, len(seen)  # the parent may have been late with the fork
            expiry.expect("s", 1)
            expiry._ring()
            time.sleep(0.5)
            os._exit(0 if expiry._ended and (expiry.expired, len(seen)) == before else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ends = time.monotonic() + 20
        while not seen:
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert engine.get("s", "a") is None

    assert seen == ["a"]


def test_refused_turns_do_not_wake_the_actor_again_and_again(world: World) -> None:
    engine = world.open(watch=False)
    engine.set("s", "a", 1, ttl=1000)
    world.dispatcher.run_until_idle()

    for _ in range(50):
        with pytest.raises(Conflict):
            engine.set("s", "a", 2, if_revision=77)

    assert engine._parts.expiry._mailbox == []


# ------------------------------------------------------------------------------------------------------------ many keys


def test_keys_that_fall_due_together_are_removed_in_small_turns_between_which_callers_come(world: World) -> None:
    engine = world.open(watch=False)
    for number in range(5000):
        engine.set("s", f"k{number}", number, ttl=10)
    world.dispatcher.advance(9.9)
    sizes: list[int] = []
    scope = engine._parts.directory["s"]
    decide = Expire.decide

    def counted(self: Expire, view: Any) -> Any:
        stored, answer = decide(self, view)
        sizes.append(answer.keys)
        return stored, answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Expire, "decide", counted)
        world.dispatcher.advance(0.5)

    assert sum(sizes) == 5000
    assert max(sizes) <= 256
    assert (scope.key_count(), len(scope._wheel), len(scope._deadlines)) == (0, 0, 0)  # type: ignore[attr-defined]
    assert engine.stats().expiry_late_ms >= 40  # 5,000 keys take five windows


@pytest.mark.parametrize("seed", range(20))
def test_expiry_holds_in_every_order_of_turns(seed: int, tmp_path: Path) -> None:
    world = World(tmp_path / "store", "interval")
    world.dispatcher = DeterministicDispatcher(seed, switch=0.3, busy=0.3)
    engine = world.open(passivate_after_ms=3000)
    rng = random.Random(seed)
    for _ in range(300):
        key = f"k{rng.randrange(10)}"
        scope = f"s{rng.randrange(3)}"
        draw = rng.random()
        if draw < 0.5:
            engine.set(scope, key, 1, ttl=rng.choice([0.001, 0.1, 1, 5, 70]))
        elif draw < 0.6:
            engine.touch(scope, key, ttl=rng.choice([0.1, 10]))
        elif draw < 0.7:
            engine.set(scope, key, 2)
        elif draw < 0.8:
            engine.delete(scope, key)
        else:
            world.dispatcher.advance(rng.choice([0.01, 0.5, 3]))
    world.dispatcher.advance(100)

    for name in ("s0", "s1", "s2"):
        mine = [event for event in world.seen if event.scope == name]
        assert [event.revision for event in mine] == list(range(1, len(mine) + 1))
        there: dict[str, bytes] = {}
        for event in mine:
            assert event.old_json == there.pop(event.key, None)
            if event.new_json is not None:
                there[event.key] = event.new_json
            if event.event_type == "state:expired":
                assert event.old_json is not None
                assert 0 <= (event.late_ms or 0) <= 50
        assert {key: engine.scope(name).get(key) for key in there} == {key: int(data) for key, data in there.items()}
        assert all(engine.ttl(name, key) is None for key in there)
    engine.close()
