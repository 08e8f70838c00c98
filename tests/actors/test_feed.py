"""The feed: one order of all changes, and what watches get of it, under any order of writes, commits and reads."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from scopestate.actors import feed as feed_module
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.fed_scope import Hold
from scopestate.actors.feed import Feed
from scopestate.actors.interests import Interests
from scopestate.actors.journal import History
from scopestate.actors.triggers import TriggerTable
from scopestate.actors.watcher import Filter, Watcher
from scopestate.ops.changes import Change
from scopestate.ops.cursors import ManyCursor, ScopeCursor
from scopestate.ops.results import StateEvent

SCOPES = ["a", "ab", "b", "gated"]


class Owner:
    """What a watch belongs to."""


class World:
    """A feed, and a list of everything that has happened, in order."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.feed = Feed(DeterministicDispatcher(seed), lambda: None, TriggerTable(lambda trigger: None))  # type: ignore[arg-type,return-value]  # there are none
        self.history: set[str] = set()
        self.feed.connect(
            "store",
            None,
            lambda: 0,
            lambda scope: History() if scope in self.history else None,
            lambda scope: "commit" if scope == "gated" else "interval",
        )
        self.revisions = dict.fromkeys(SCOPES, 0)
        self.written: dict[str, list[StateEvent]] = {scope: [] for scope in SCOPES}
        """What is settled, or will be numbered as such."""
        self.waiting: list[StateEvent] = []
        self.holds: list[Hold] = []
        self.readers: list[tuple[Watcher, list[Change], Owner]] = []

    def transaction(self, scope: str) -> list[StateEvent]:
        size = self.draw.choice([1, 1, 1, 2, 5])
        last = self.revisions[scope] + size
        events = []
        for revision in range(self.revisions[scope] + 1, last + 1):
            key = self.draw.choice("kl")
            value = b'"%s %d"' % (scope.encode(), revision)
            event = StateEvent("state:updated", scope, key, b"0", value, revision, transaction=last, time_ms=1)
            events.append(event)
        self.revisions[scope] = last
        return events

    def write(self) -> None:
        scope = self.draw.choice(SCOPES[:3])
        events = self.transaction(scope)
        if self.feed.is_wanted(scope):
            self.feed.incoming |= {id(event): event for event in events}
            self.written[scope] += events

    def write_gated(self) -> None:
        if self.feed.is_wanted("gated"):
            self.waiting += self.transaction("gated")

    def commit(self) -> None:
        if self.waiting and not self.holds:
            held = self.feed.hold(self.waiting)
            assert held is not None
            self.holds.append(held)
            self.waiting = []

    def settle(self) -> None:
        if self.holds:
            held = self.holds.pop()
            if self.draw.random() < 0.7:
                self.feed.settle(held)
                self.feed.settle(held)
                self.written["gated"] += held.events
            else:
                self.feed.drop(held)
                self.waiting = []  # what was built on it is taken back too

    def number(self) -> None:
        self.feed.number()

    def watch(self) -> None:
        scope = self.draw.choice([None, None, *SCOPES])
        prefix = self.draw.choice(["", "a"]) if scope is None else ""
        key = self.draw.choice([None, None, "k"])
        watcher, owner = Watcher(scope, prefix, Filter(key=key), buffer=10**9), Owner()
        self.feed.number()
        self.feed.add(watcher, owner)
        if scope is None:
            self.feed.begin_at(watcher, {}, self.feed.shown())
        else:
            # A turn tells the revision; a commit under way is waited for.
            while self.holds or (scope == "gated" and self.waiting):
                self.commit()
                self.settle()
            self.feed.begin_at(watcher, {scope: self.revisions[scope]}, 0)
        self.readers.append((watcher, [], owner))

    def read(self) -> None:
        if self.readers:
            watcher, seen, _ = self.draw.choice(self.readers)
            for _ in range(self.draw.randint(1, 9)):
                if not watcher.pending:
                    break
                seen.append(watcher.pending.popleft())

    def check(self) -> None:
        """Every watch got each change of what it asks for, once, in order, from its begin on."""
        while self.waiting or self.holds:
            self.commit()
            self.settle()
        self.feed.number()
        for watcher, seen, _ in self.readers:
            seen.extend(watcher.pending)
            assert not watcher.lost
            for scope in SCOPES:
                wanted = scope == watcher.scope or (watcher.scope is None and scope.startswith(watcher.scope_prefix))
                told = [change.revision for change in seen if change.scope == scope]
                events = [
                    event.revision
                    for event in self.written[scope]
                    if wanted and watcher.key in (None, event.key) and self.is_behind_begin(watcher, event)
                ]
                assert told == events, (scope, watcher.scope)
            if watcher.scope is None:
                positions = [change.position for change in seen]
                assert positions == sorted(set(positions))
            for one, other in itertools.pairwise(seen):
                if one.transaction != one.revision and watcher.key is None and watcher.scope is not None:
                    assert other.transaction == one.transaction

    @staticmethod
    def is_behind_begin(watcher: Watcher, event: StateEvent) -> bool:
        return event.position > watcher.at and event.revision > watcher._floors.get(event.scope, 0)


@pytest.mark.parametrize("seed", range(150))
def test_each_watch_gets_each_change_once_and_in_order(seed: int) -> None:
    world = World(seed)
    steps = [world.write, world.write, world.write_gated, world.commit, world.settle, world.number, world.read]
    for _ in range(3):
        world.watch()
    for _ in range(150):
        world.draw.choice(steps)()
        if world.draw.random() < 0.05:
            world.watch()
    world.check()
    assert sum(len(seen) for _, seen, _ in world.readers) > 0


@pytest.mark.parametrize("seed", range(40))
def test_a_watch_goes_on_behind_any_change_that_the_ring_still_has(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "RING_EVENTS", 60)
    world = World(seed)
    keep = [world.feed.want(None), world.feed.want("a")]
    assert keep
    steps = [world.write, world.write_gated, world.commit, world.settle, world.number]
    for _ in range(200):
        world.draw.choice(steps)()
    while world.waiting or world.holds:
        world.commit()
        world.settle()
    world.feed.number()
    ring = list(world.feed._ring)
    assert [event.position for event in ring] == sorted(event.position for event in ring)
    reached = 0
    for at, event in enumerate(ring):
        many, one, owner = (
            Watcher(None, "", Filter(), buffer=10**9),
            Watcher(event.scope, "", Filter(), buffer=10**9),
            Owner(),
        )
        for watcher, cursor, expected in (
            (many, ManyCursor("store", 0, event.position), ring[at + 1 :]),
            (
                one,
                ScopeCursor("store", event.scope, event.revision),
                [other for other in ring[at + 1 :] if other.scope == event.scope],
            ),
        ):
            world.feed.add(watcher, owner)
            assert world.feed.from_ring(watcher, cursor) == expected
            assert not watcher.pending
            world.feed.remove(watcher)
            reached += 1
    assert reached
    oldest = world.feed._floor
    if oldest > 2:
        watcher = Watcher(None, "", Filter(), buffer=1)
        world.feed.add(watcher, Owner())
        assert world.feed.from_ring(watcher, ManyCursor("store", 0, oldest - 1)) is None


def test_what_is_taken_for_the_journal_is_each_change_once_up_to_the_revision() -> None:
    world = World(1)
    feed = world.feed
    feed.journal = Any  # type: ignore[assignment]  # that there is one is all it looks at here
    world.history = {"a"}
    feed._refresh(None)
    for _ in range(30):
        world.write()
    feed.number()
    first = feed.take("a", 10)[0]
    assert [event.revision for event in first] == list(range(1, 11))
    assert feed.settled() == feed._scopes["a"].unsaved[0].position - 1
    rest, since = feed.take("a", 10**9)
    assert [event.revision for event in rest] == list(range(11, world.revisions["a"] + 1))
    assert since == 0
    assert feed.take("a", 10**9) == ([], 0)
    assert feed.take("b", 10**9) == ([], None)
    assert feed.settled() == feed.position
    feed.committed([*first, *rest])
    assert feed._unsaved == 0


def test_a_commit_under_way_holds_back_what_is_settled() -> None:
    world = World(2)
    feed = world.feed
    keep = feed.want(None)
    assert keep
    feed.number()
    before = feed.position
    world.write_gated()
    world.commit()
    world.write()
    feed.number()
    assert feed.settled() == before
    assert feed.shown() == before
    feed.settle(world.holds.pop())
    assert feed.shown() == feed.position


def test_a_refused_allocation_ends_watches_and_loses_nothing_for_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(3)
    feed = world.feed
    feed.journal = Any  # type: ignore[assignment]  # as above
    world.history = set(SCOPES)
    feed._refresh(None)
    world.watch()
    [(watcher, _, _)] = world.readers
    for _ in range(20):
        world.write()
    made = feed_module.changes_of

    def refuse(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(feed_module, "changes_of", refuse)
    monkeypatch.setattr(Watcher, "take", refuse)
    with pytest.raises(MemoryError):
        feed.number()
    monkeypatch.undo()
    assert made is feed_module.changes_of
    assert watcher.lost
    taken = [event.revision for scope in SCOPES[:3] for event in feed.take(scope, 10**9)[0]]
    assert len(taken) == sum(world.revisions[scope] for scope in SCOPES[:3])
    assert not feed.incoming


def test_an_interest_in_one_scope_costs_the_same_however_many_there_are() -> None:
    class Listed(dict[Any, Any]):
        def values(self) -> Any:
            raise AssertionError("all interests are looked at")

        __iter__ = items = values

    interests = Interests()
    interests._all = Listed()
    twice = interests.add(("s", "", None), 1), interests.add(("s", "", 7), 2)
    wide = interests.add((None, "p", None), 3)
    assert interests.want("s")
    assert interests.want("past")
    assert not interests.want("t")
    assert interests.consumers("s") == [7]
    for interest in twice:
        assert interests.want("s")
        interests.remove(interest)
        interests.remove(interest)
    assert not interests.want("s")
    assert interests.durable == ()
    interests.remove(wide)
    assert not interests.want("past")


def test_many_interests_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = World(1).feed
    refed: list[str | None] = []
    monkeypatch.setattr(feed._triggers, "refeed", refed.append)
    monkeypatch.setattr(feed_module, "LINGER_S", 0.0)
    for number in range(50):
        feed.unwant(feed.want(None, f"p{number}"))
    kept = feed.want("s")
    refed.clear()
    feed.forget_unused()
    assert refed == [None]
    assert feed._interests.unused() == []
    feed.unwant(kept)
    feed.forget_unused()
    assert refed == [None, "s"]
