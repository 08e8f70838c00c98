"""Whole engines on real files, from a seed: writes, watches, durable triggers, saves, trims, crashes and restarts.

Every turn runs in an order that the seed decides. The truth is recorded where the engine numbers its changes.
`checker.py` compares with it what each watch has yielded and each durable trigger has handled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import msgspec

from scopestate import Delivery, Discard, Engine, Retry, StateEvent, lifecycle
from scopestate.actors.deterministic import START_S, DeterministicDispatcher
from scopestate.actors.feed import Feed
from scopestate.actors.scope import Passivate
from scopestate.config import from_mapping
from scopestate.errors import Compacted, EngineClosed, Overloaded, ReplyTimeout, WatchOverrun
from scopestate.parts import CLAIM_S
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.schema import RESERVED
from scopestate.sharing import FOLLOWED_FILE
from tests.durable.checker import (
    Asked,
    Began,
    Change,
    Checker,
    Counted,
    Ended,
    Fact,
    Finished,
    Left,
    Over,
    Watched,
    watch_violations,
)
from tests.stored import values_of

SCOPES: Final = ("interval-a", "interval-b", "commit-a", "commit-b")
KEYS: Final = ("k0", "k1", "l0", "l1")
ORDERS: Final = ("interval-orders", "commit-orders")
"""Scopes whose keys count up; durable triggers handle their events."""
EFFECTS: Final = "interval-effects"
COUNTED: Final = ("a", "b")
RETRY: Final = Retry(attempts=50, first=0.01, factor=2.0, longest=0.1)
KINDS: Final = {"created": "put", "updated": "put", "deleted": "delete", "expired": "expire"}
MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None


class Failure(msgspec.Struct, frozen=True):
    """A seed that showed a bug."""

    seed: int
    problem: str
    trace: list[str]


class Watcher:
    """A client that watches, goes away, and comes back with its cursor."""

    def __init__(self, world: World, name: str) -> None:
        draw = world.random
        self.name = name
        self.world = world
        self.scope = draw.choice((*SCOPES, None))
        self.options: dict[str, Any] = draw.choice(({}, {}, {"key": "k0"}, {"prefix": "k"}))
        if draw.random() < 0.2:
            self.options = {**self.options, "events": draw.choice((["created"], ["deleted", "expired"]))}
        self.buffer = draw.choice((3, 50, 10_000))
        self.cursor: str | None = None
        self.at = 0
        """The revision after which the cursor is; the position, if it watches many scopes."""
        self.changes: Any = None
        self._is_mark = True
        """True: the cursor is not that of a change."""
        self._there = 0
        """How many changes there were when a watch of many scopes began without a cursor."""
        self._began = 0
        self._began_crashes = self._cursor_crashes = 0
        """How many crashes there had been when the session's first cursor was given, and when the present one was."""
        self._saw: list[tuple[str, str, str, int]] = []
        self._marks: dict[int, int] = {}

    def wanted(self) -> list[int]:
        """The places of the truth that its filters match."""
        events = self.options.get("events")
        return [
            place
            for place, event in enumerate(self.world.events)
            if (self.scope is None or event.scope == self.scope)
            and (event.existed or event.new_json is not None)  # a delete of an absent key is an event, and no change
            and self.options.get("key", event.key) == event.key
            and event.key.startswith(self.options.get("prefix", ""))
            and (events is None or event.event_type.removeprefix("state:") in events)
        ]

    def look(self, engine: Engine, most: int) -> None:
        """Open the watch if it is not open, and read some changes."""
        if self.changes is None and not self._open(engine):
            return
        try:
            for _ in range(most):
                self._see(self.changes.get(timeout=0.0))
        except TimeoutError:
            pass
        except WatchOverrun as error:
            self.world.note(f"{self.name} was too slow")
            self._end(error.cursor, overrun=True)
        except Compacted as error:
            self._refused(error)

    def _open(self, engine: Engine) -> bool:
        scopes = {} if self.scope is None else {"scope": self.scope}
        self._began, self._saw, self._marks = self.at, [], {}
        self._began_crashes = self._cursor_crashes
        self._there = 0
        fresh = self.cursor is None
        try:
            self.changes = engine.watch(
                **scopes, **self.options, since=self.cursor, snapshot=False, markers=True, buffer=self.buffer
            )
        except Compacted as error:
            self._refused(error)
            return False
        if fresh:
            self._began = self.at = self.changes._at()
            self._began_crashes = self._cursor_crashes = self.world.crashes
            self._there = len(self.world.events) if self.scope is None else 0
        self.world.note(f"{self.name} watches from {self.at}")
        return True

    def _see(self, change: Any) -> None:
        self.world.note(f"{self.name} sees {change!r}")
        self.cursor = change.cursor
        self._cursor_crashes = self.world.crashes
        self._is_mark = change.kind in ("synced", "progress")
        if self._is_mark:
            self.at = max(self.at, change.revision if self.scope is not None else change.position)
            self._marks[len(self._saw)] = self.at
            return
        self._saw.append((change.scope, change.key, change.kind, change.revision))
        self.at = change.revision if self.scope is not None else change.position

    def _place(self, at: int) -> int:
        """Return how many changes of the truth are up to a revision, or a position: changes are numbered late."""
        events = self.world.events
        if self.scope is None:
            return sum(event.position <= at for event in events)
        ours = [place for place, event in enumerate(events) if event.scope == self.scope]
        return max((place + 1 for place in ours if events[place].revision <= at), default=0)

    def _stands_behind_lost(self) -> bool:
        """Return whether the watch began after a change that an earlier crash has lost: a crash begins new numbers."""
        world = self.world
        lost = [world.events[place] for place, crash in world.lost.items() if crash > self._began_crashes]
        ours = [
            event.position if self.scope is None else event.revision
            for event in lost
            if self.scope in (None, event.scope)
        ]
        return any(number <= self._began and number // RESERVED == self._began // RESERVED for number in ours)

    def _refused(self, error: Compacted) -> None:
        self.world.note(f"{self.name}: {error}")
        is_mark = self.scope is None and self.world.crashes > 0 and self._is_mark
        self._check(Watched(self._place(self.at), (), refused=error.reason, is_mark=is_mark))
        self.changes = self.cursor = None

    def _end(self, cursor: str | None, *, overrun: bool = False, complete: bool = False) -> None:
        marks = {after: self._place(at) for after, at in self._marks.items()}
        self._check(
            Watched(self._place(self._began), self._saw, marks, overrun=overrun, complete=complete, there=self._there)
        )
        self.changes.close()
        self._is_mark = self._is_mark or cursor != self.cursor
        self.changes, self.cursor = None, cursor

    def leave(self, *, complete: bool = False) -> None:
        """Close the watch and keep its cursor."""
        if self.changes is not None:
            self._end(self.changes.cursor if complete else self.cursor, complete=complete)

    def _check(self, watched: Watched) -> None:
        world, wanted = self.world, self.wanted()
        truth = world.truth()
        world.found += [
            f"{self.name} of {self.scope} {self.options}: {text}"
            for text in watch_violations(truth, watched, wanted, world.trimmed(self.scope))
        ]
        if watched.refused is None and self._stands_behind_lost():
            world.found.append(f"{self.name}: resumable: it goes on behind a change that a crash took back")


class Handlers:
    """The durable triggers of one life, and the facts that they report to the checker."""

    def __init__(self, world: World, engine: Engine) -> None:
        self.world = world
        self.draw = random.Random(world.random.getrandbits(32))
        scope = world.orders
        engine.on_change(scope=scope, durable="plain", retry=RETRY, start="earliest")(self.plain)
        engine.on_change(scope=scope, durable="counts", retry=RETRY, start="earliest", concurrency=2)(self.counts)
        engine.on_change(scope=scope, durable="dies", retry=RETRY, start="earliest", order="scope")(self.dies)

    def _take(self, fact: Fact) -> None:
        self.world.take(fact)
        if self.draw.random() < 0.3:
            self.world.dispatcher.sleep(self.draw.choice((0.001, 0.02, 0.2)))

    def _began(self, event: StateEvent, delivery: Delivery) -> None:
        number = event.new_value
        self._take(Began(delivery.consumer, delivery.id, event.scope, event.key, number, delivery.attempt))

    def _fail(self, delivery: Delivery) -> None:
        self._take(Ended(delivery.consumer, delivery.id, "failed"))
        raise RuntimeError("not yet")

    def plain(self, event: StateEvent, delivery: Delivery) -> None:
        """Fail from time to time."""
        self._began(event, delivery)
        if self.draw.random() < 0.2 and delivery.attempt < 5:
            self._fail(delivery)
        self._take(Ended(delivery.consumer, delivery.id))

    def counts(self, event: StateEvent, delivery: Delivery) -> None:
        """Write an effect in the transaction of the delivery."""
        self._began(event, delivery)
        if self.draw.random() < 0.3 and delivery.attempt < 5:
            self._fail(delivery)
        with delivery.transaction(EFFECTS) as tx:
            name = f"{event.scope} {event.key} {event.new_value}"
            tx.set(name, (tx.get(name) or 0) + 1)
        self._take(Ended(delivery.consumer, delivery.id))

    def dies(self, event: StateEvent, delivery: Delivery) -> None:
        """Give some events up, each once."""
        self._began(event, delivery)
        if event.new_value % 3 == 0 and delivery.id not in self.world.died:
            self.world.died.add(delivery.id)
            self._take(Ended(delivery.consumer, delivery.id, "dead"))
            raise Discard("given up")
        self._take(Ended(delivery.consumer, delivery.id))


class World:
    """One run: a directory and the engines that live on it, one after another."""

    def __init__(self, seed: int, directory: Path, *, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.directory = directory
        self.trace: list[str] | None = [] if trace else None
        self.events: list[StateEvent] = []
        """Every change that an engine has numbered, in that order."""
        self.lost: dict[int, int] = {}
        """Place of a change that was lost -> the number of the crash."""
        self.found: list[str] = []
        self.history = self.random.choice((3, 20, 1_000))
        self.engine: Engine | None = None
        self.dispatcher = DeterministicDispatcher(0)
        self.watchers = [Watcher(self, f"watcher {number}") for number in range(self.random.randint(1, 4))]
        self.life_began = 0
        self.running = 0
        self._replays = False
        self.orders = self.random.choice(ORDERS)
        self.numbers: dict[tuple[str, str], int] = {}
        """Key in the scopes of orders -> its number on disk."""
        self.checker = Checker()
        self.died: set[str] = set()
        """Deliveries that were given up once."""
        self._wall_s = START_S
        self.crashes = 0

    def note(self, text: str) -> None:
        """Add a line to the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.dispatcher.monotonic():9.3f}  {text}")

    def numbered(self, events: Sequence[StateEvent]) -> None:
        """Record the changes that the engine has given positions to."""
        for event in events if self.engine is not None else ():
            self.events.append(event)
            self.note(f"{event.position}: {event.scope} {event.revision} {event.event_type} {event.key}")

    def take(self, fact: Fact) -> None:
        """Check one more fact of deliveries against the promises."""
        if self.engine is not None or isinstance(fact, (Over, Counted, Finished)):
            self.note(str(fact))
            self.checker.take(fact)

    def truth(self) -> list[Change]:
        """What has happened, in the form that the checker needs."""
        return [
            Change(
                event.scope,
                event.key,
                KINDS[event.event_type.removeprefix("state:")],
                event.revision,
                event.transaction,
                place in self.lost,
            )
            for place, event in enumerate(self.events)
        ]

    def trimmed(self, scope: str | None) -> int:
        """Return the place up to which changes may be forgotten: after it, no scope has more changes than are kept."""
        last = 0
        for name in (*SCOPES, *ORDERS, EFFECTS) if scope is None else (scope,):
            ours = [place for place, event in enumerate(self.events) if event.scope == name and place not in self.lost]
            if len(ours) > self.history:
                last = max(last, ours[-self.history])
        return last

    # ---------------------------------------------------------------------------------------------------- the run

    def run(self) -> None:
        """Run several engines, one after the other."""
        draw = self.random
        ends = draw.choices(("crash", "close"), k=draw.randint(0, 3))
        for end in (*ends, "settle"):
            self._start()
            for number in range(draw.randint(1, 3)):
                self.running += 1
                seed = draw.getrandbits(32)
                self.dispatcher.submit(lambda number=number, seed=seed: self._client(number, random.Random(seed)))
            for key in COUNTED:
                self.running += 1
                self.dispatcher.submit(lambda key=key: self._count(key))
            for _ in range(draw.randint(5, 150)):
                self._happen()
                if not self.dispatcher.step() or (not self.running and draw.random() < 0.1):
                    break
            if end == "crash":
                self._crash()
            else:
                self._close(is_last=end == "settle")
            self.found += self.checker.violations
            if self.found:
                return

    def _start(self) -> None:
        draw = self.random
        self.dispatcher = DeterministicDispatcher(
            draw.getrandbits(32), switch=draw.choice((0.0, 0.1)), busy=draw.choice((0.0, 0.2)), wall_s=self._wall_s
        )
        kv = {
            "store_method": "file_based",
            "share": "never",  # the directory is copied in the middle, and one thread does everything
            "file_path": str(self.directory),
            "save_interval_ms": draw.choice((200, 1000, 5000)),
        }
        history = {"events": self.history}
        config = {
            "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}],
            "scopes": [
                {"prefix": "commit-", "durability": "commit", "history": history},
                {"prefix": "interval-", "history": history},
            ],
        }
        mark = self.directory / FOLLOWED_FILE
        if len(self.events) % 3:
            mark.touch()  # the previous owner had followers
        else:
            mark.unlink(missing_ok=True)
        self.engine = Engine(from_mapping(config), dispatcher=self.dispatcher, handle_sigterm=False)
        self.life_began = len(self.events)
        self.running = 0
        self._replays = False
        self._tell_letters()
        Handlers(self, self.engine)
        self.note(f"an engine starts, saving every {kv['save_interval_ms']} ms, with {history}")

    def _client(self, number: int, draw: random.Random) -> None:
        engine = self.engine
        assert engine is not None
        try:
            for _ in range(draw.randint(3, 15)):
                self._write(engine, draw)
                if draw.random() < 0.2:
                    self.dispatcher.sleep(draw.random() * 0.1)
        except (EngineClosed, Overloaded, ReplyTimeout):
            pass
        finally:
            self.running -= 1
        self.note(f"client {number} has ended")

    def _count(self, key: str) -> None:
        engine, draw = self.engine, random.Random(self.random.getrandbits(32))
        assert engine is not None
        number = self.numbers.get((self.orders, key), 0)
        try:
            for _ in range(draw.randint(0, 6)):
                number += 1
                engine.set(self.orders, key, number)
                if draw.random() < 0.3:
                    self.dispatcher.sleep(draw.random() * 0.1)
        except (EngineClosed, Overloaded, ReplyTimeout):
            pass
        finally:
            self.running -= 1

    def _tell_letters(self) -> list[str]:
        engine = self.engine
        assert engine is not None
        found = engine.dead_letters("dies").list()
        self.take(Left("dies", frozenset(f"dies:{letter.event.position}" for letter in found)))
        return [letter.id for letter in found]

    def _replay(self) -> None:
        """Replay all dead letters."""
        engine = self.engine
        assert engine is not None
        if self._replays:
            return  # what another one leaves would look like half of what this one has asked for
        self._replays = True
        letters = engine.dead_letters("dies").list()
        if letters:
            self.take(Asked("dies", frozenset(f"dies:{letter.event.position}" for letter in letters)))
            engine.dead_letters("dies").replay([letter.id for letter in letters])
            self._tell_letters()
        self._replays = False

    def _write(self, engine: Engine, draw: random.Random) -> None:
        scope, key, value = draw.choice(SCOPES), draw.choice(KEYS), draw.randrange(1_000)
        match draw.randrange(10):
            case 0 | 1 | 2 | 3:
                engine.set(scope, key, value)
            case 4:
                engine.delete(scope, key)
            case 5:
                engine.set(scope, key, value, ttl=draw.choice((0.01, 0.1)))
            case 6:
                engine.update(scope, key, [{"type": "set", "path": "", "value": value}])
            case _:
                with engine.batch(scope) as batch:
                    for one in draw.sample(KEYS, draw.randint(1, 4)):
                        batch.set(one, value)

    def _happen(self) -> None:
        """Let something happen from outside, or nothing, at random."""
        draw, engine = self.random, self.engine
        assert engine is not None
        chance = draw.random()
        if chance < 0.25:
            draw.choice(self.watchers).look(engine, draw.choice((1, 5, 100)))
        elif chance < 0.28:
            draw.choice(self.watchers).leave()
        elif chance < 0.31:
            self.dispatcher.advance(draw.choice((0.05, 0.3, 2.0)))
        elif chance < 0.33:
            actors = list(engine._scopes.values())
            if actors:
                actor = draw.choice(actors)
                self.note(f"passivate {actor.scope}")
                self.dispatcher.submit(lambda: actor.housekeep(Passivate()))
        elif chance < 0.35:
            self.dispatcher.submit(self._replay)
        elif chance < 0.351:
            self.dispatcher.advance(70.0)  # the ring of a scope that is not watched is forgotten

    def _crash(self) -> None:
        """The process dies: what is in its files now is what the next one finds."""
        engine = self.engine
        assert engine is not None
        self.note("crash")
        self.crashes += 1
        copy = self.directory.with_name(f"store-{self.crashes}")
        shutil.copytree(self.directory, copy)
        self.engine = None  # what the end makes of the turns that are cut off tells nothing
        self.dispatcher.kill()
        for watcher in self.watchers:
            watcher.leave()
        lifecycle.release(engine)
        engine.disown()
        engine._parts.loop_thread.close()
        engine._parts.backend.close()
        shutil.rmtree(self.directory)
        self.directory = copy
        self._wall_s = self.dispatcher.wall_s()
        self._note_lost()

    def _note_lost(self) -> None:
        adapter = FileAdapter(self.directory)
        try:
            if problems := adapter.check():
                self.found.append(f"the store is damaged: {problems}")
            on_disk = {scope: adapter.load(scope).revision % RESERVED for scope in (*SCOPES, *ORDERS, EFFECTS)}
            self._read_orders(adapter)
        finally:
            adapter.close()
        self.take(Over(self.numbers))
        for place in range(self.life_began, len(self.events)):
            event = self.events[place]
            if event.revision % RESERVED > on_disk[event.scope]:
                self.lost[place] = self.crashes

    def _read_orders(self, adapter: FileAdapter, *, is_all: bool = False) -> None:
        orders = values_of(adapter.load(self.orders))
        self.numbers = {(self.orders, key): int(json) for key, json in orders.items()}
        effects: dict[Any, int] = {}
        for name, json in values_of(adapter.load(EFFECTS)).items():
            scope, key, number = name.split()
            effects[scope, key, int(number)] = int(json)
        self.take(Counted("counts", effects, is_all=is_all))

    def _finish_deliveries(self, engine: Engine) -> None:
        """Wait until every consumer has finished."""
        for _ in range(200):
            self._replay()
            self.dispatcher.advance(0.5)
            if not any(one.lag_events or one.in_flight or one.dead for one in engine.consumers()):
                return
        raise AssertionError(f"consumers do not end: {list(engine.consumers())}")

    def _close(self, *, is_last: bool) -> None:
        """Let all clients end, then read every watch to its end, and close the engine cleanly."""
        engine = self.engine
        assert engine is not None
        while self.running:
            if not self.dispatcher.step():
                raise AssertionError(f"clients do not end: {self.dispatcher.waiting()}")
        self.dispatcher.advance(1.0 + CLAIM_S)  # until then, what a crash has cut off waits for a follower
        engine.flush()
        self.dispatcher.run_until_idle()
        for watcher in self.watchers:
            for _ in range(2):  # one that was refused, or too slow, continues
                if watcher.cursor is not None or watcher.changes is not None:
                    watcher.look(engine, 100_000)
            watcher.leave(complete=True)
        if is_last:
            self._finish_deliveries(engine)
        self.note("close")
        engine.close()
        self.engine = None
        self._wall_s = self.dispatcher.wall_s()
        adapter = FileAdapter(self.directory)
        try:
            self._read_orders(adapter, is_all=is_last)
        finally:
            adapter.close()
        self.take(Over(self.numbers, killed=False))
        if is_last:
            self.take(Finished(self.numbers))

    def abandon(self) -> None:
        """After a failure: end everything that still runs."""
        if self.engine is not None:
            with contextlib.suppress(Exception):
                self._crash()


_WORLDS: Final[list[World]] = []
"""The world of the current run."""


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Make feeds report to the world of the run what they number. Logs nothing."""
    give = Feed._give_positions

    def give_and_note(feed: Feed, events: Sequence[StateEvent]) -> None:
        give(feed, events)
        for world in _WORLDS:
            world.numbered(events)

    logger = logging.getLogger("scopestate")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with mock.patch.object(Feed, "_give_positions", give_and_note):
            yield
    finally:
        logger.setLevel(level)


def traced(seed: int) -> list[str]:
    """Run one seed, within `noted()`, and return what happened."""
    with tempfile.TemporaryDirectory(prefix="scopestate-durable-", dir=MEMORY) as folder:
        world = World(seed, Path(folder) / "store", trace=True)
        _WORLDS[:] = [world]
        try:
            world.run()
        finally:
            _WORLDS.clear()
    assert world.trace is not None
    return world.trace


def simulate(seed: int, *, trace: bool = False) -> Failure | None:
    """Run one seed, within `noted()`. Returns what went wrong, or None."""
    with tempfile.TemporaryDirectory(prefix="scopestate-durable-", dir=MEMORY) as folder:
        world = World(seed, Path(folder) / "store", trace=trace)
        _WORLDS[:] = [world]
        try:
            world.run()
        except Exception as error:  # noqa: BLE001 - whatever escapes from an engine is what the seeds look for
            world.abandon()
            return Failure(seed, "".join(traceback.format_exception(error)), world.trace or [])
        finally:
            _WORLDS.clear()
        if world.found:
            world.abandon()
            return Failure(seed, "\n".join(world.found[:5]), world.trace or [])
    return None
