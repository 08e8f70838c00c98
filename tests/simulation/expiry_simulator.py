"""Engines whose keys have deadlines, from a seed: clocks that jump, suspended machines, crashes, restarts, faults.

There is only one client, so that the right results are obvious. The turns that expire, save and passivate run in any
order between its calls, and wherever a call takes or gives back a claim.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from scopestate import Engine, StateEvent, lifecycle, ops
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.scope import Passivate
from scopestate.config import AdapterConfig, Config, KvOptions, LimitsConfig, ScopeRule
from scopestate.errors import StorageError
from scopestate.persistence import Row, ScopeChange, ScopeState, Store
from tests.simulation.model import Violation
from tests.simulation.simulator import Failure

SCOPES: Final = ("interval-0", "interval-1", "commit-0", "memory-0", "rule-0")
KEYS: Final = ("k0", "k1", "k2", "k3")
RULES: Final = (
    ScopeRule("memory", prefix="memory-"),
    ScopeRule("commit", prefix="commit-"),
    ScopeRule(prefix="rule-", ttl_ms=4000, ttl_from="create"),
)
TTLS_S: Final = (0.001, 0.05, 0.5, 3, 70, 4000)


class Platter:
    """What outlives the engines."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, tuple[str, Row]]] = {}
        self.revisions: dict[str, int] = {}
        self.due: dict[str, int | None] = {}
        self.clock_ms = 0
        self.failing_saves = self.failing_loads = 0
        self.lives = 0


class PlatterStore(Store):
    """A platter as one engine sees it."""

    def __init__(self, platter: Platter) -> None:
        self._platter = platter
        self.clock_ms = platter.clock_ms
        self.crashed = False
        platter.lives += 1

    def load(self, scope: str) -> ScopeState:
        """Return the saved state of a scope."""
        platter = self._platter
        if self.crashed or platter.failing_loads > 0:
            platter.failing_loads -= 1
            raise StorageError("the platter cannot be read")
        rows = platter.rows.get(scope, {})
        saved = {key: row for _, (key, row) in sorted(rows.items())}
        return ScopeState.of(saved, platter.revisions.get(scope, 0) + 1000 * platter.lives)

    def scopes(self) -> list[str]:
        """Return the scopes that hold a key."""
        return [scope for scope, rows in self._platter.rows.items() if rows]

    def save(self, batch: Sequence[ScopeChange]) -> None:
        """Write all changes, or none."""
        platter = self._platter
        if self.crashed or platter.failing_saves > 0:
            platter.failing_saves -= 1
            raise StorageError("the platter cannot be written")
        if self.clock_ms < platter.clock_ms:
            raise Violation("the time of a save goes back")
        platter.clock_ms = self.clock_ms
        for change in batch:
            rows = platter.rows.setdefault(change.scope, {})
            for created in change.removed:
                rows.pop(created, None)
            for key, row in change.entries.items():
                if row is not None:
                    rows[row.created] = key, row
            platter.revisions[change.scope] = change.revision - 1000 * platter.lives
            platter.due[change.scope] = change.due_ms
            first = min((row.expires_ms for _, row in rows.values() if row.expires_ms is not None), default=None)
            if first is not None and (change.due_ms is None or change.due_ms > first):
                raise Violation(f"{change.scope}: saved as due at {change.due_ms}, but a key expires at {first}")

    def due(self, limit: int) -> list[tuple[int, str]]:
        """Return the scopes with deadlines, the earliest first."""
        return sorted((ms, scope) for scope, ms in self._platter.due.items() if ms is not None)[:limit]

    def close(self) -> None:
        """Keep the time."""
        if not self.crashed:
            self._platter.clock_ms = max(self._platter.clock_ms, self.clock_ms)


class Known(msgspec.Struct):
    """What the client knows about a key: its value, and when it expires."""

    number: int
    expires_ms: int | None


class ExpiryWorld:
    """One run."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.trace: list[str] | None = [] if trace else None
        self.platter = Platter()
        self.wall_s = 1_767_225_600.0
        self.number = 0
        self.known: dict[str, dict[str, Known]] = {scope: {} for scope in SCOPES}
        self.deadline_of: dict[int, int | None] = {}
        """Number of a value -> its deadline, or the last one that it had."""
        self.expired_ever: dict[int, int] = {}
        """Number of a value -> how often an event reported that it had expired."""
        self.problem: Exception | None = None
        self.engine: Engine | None = None

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.dispatcher.monotonic():10.3f}  {text}")

    # ------------------------------------------------------------------------------------------------------ lives

    def run(self) -> None:
        """Run several engines, one after the other. Raises Violation, or what an engine raises."""
        draw = self.random
        for end in (*draw.choices(("crash", "close"), k=draw.randrange(4)), "settle"):
            self.begin()
            for _ in range(draw.randint(10, 60)):
                self.act()
                self.check()
            if end == "crash":
                self.crash()
            else:
                self.settle()
                self.end()
            self.wall_s = self.dispatcher.wall_s() + draw.choice((0, 1, 30, 100_000, -50))

    def begin(self) -> None:
        """Open an engine on the platter."""
        draw = self.random
        self.dispatcher = DeterministicDispatcher(
            draw.getrandbits(32),
            switch=draw.choice((0.0, 0.1, 0.3)),
            busy=draw.choice((0.0, 0.2)),
            wall_s=self.wall_s,
        )
        self.store = PlatterStore(self.platter)
        limits = LimitsConfig(passivate_after_ms=draw.choice((200, 3000, 300_000)), close_grace_ms=60_000)
        config = Config(AdapterConfig("kv", KvOptions(save_interval_ms=500)), scopes=RULES, limits=limits)
        self.events: dict[str, list[StateEvent]] = {scope: [] for scope in SCOPES}
        self.base = {scope: dict(known) for scope, known in self.known.items()}
        self.told = dict.fromkeys(SCOPES, 0)
        self.engine = Engine(config, adapter=self.store, dispatcher=self.dispatcher, handle_sigterm=False)
        self.engine.on_change()(self.witness)
        self.latest_ms = self.now()
        self.note("an engine begins")

    def crash(self) -> None:
        """End the process at once. Only what was saved remains, and the client reads that."""
        assert self.engine is not None
        self.note("crash")
        self.store.crashed = True
        self.dispatcher.kill()
        lifecycle.release(self.engine)
        self.engine.disown()
        self.engine._parts.loop_thread.close()
        self.engine = None
        for scope in SCOPES:
            before = self.known[scope]
            rows = self.platter.rows.get(scope, {})
            self.known[scope] = {
                key: Known(msgspec.json.decode(row.json)["id"], row.expires_ms)
                for _, (key, row) in sorted(rows.items())
            }
            for key, known in self.known[scope].items():
                self.deadline_of[known.number] = known.expires_ms
                if scope.startswith("commit") and self.expired_ever.get(known.number):
                    raise Violation(f"{scope}/{key}: told to have expired, and there again after a crash")
            if scope.startswith("commit"):
                lost = {key: known for key, known in before.items() if key not in self.known[scope]}
                if any(known.expires_ms is None for known in lost.values()):
                    raise Violation(f"{scope}: {lost} were committed, and are gone")

    def settle(self) -> None:
        """End all faults and let time pass: every expired key is removed, with an event."""
        self.platter.failing_saves = self.platter.failing_loads = 0
        self.dispatcher.advance(40)
        self.check()
        assert self.engine is not None
        self.engine.drain(60)
        self.check()
        for scope in SCOPES:
            there = self.replay(scope)
            if there != {key: known.number for key, known in self.alive(scope).items()}:
                raise Violation(f"{scope}: events lead to {there}, it has {self.alive(scope)}")
            self.known[scope] = self.alive(scope)
        if any("expired" in problem for problem in self.engine.health().problems):
            raise Violation(f"after all faults have ended: {self.engine.health()}")

    def end(self) -> None:
        """Close the engine. A later process must find everything, and a clock that has not gone back."""
        assert self.engine is not None
        self.note("close")
        now_ms = self.now()
        self.engine.close()
        self.check_problem()
        self.engine = None
        if self.platter.clock_ms < now_ms:
            raise Violation(f"closed at {now_ms}, and saved the time {self.platter.clock_ms}")
        self.known["memory-0"] = {}

    # ------------------------------------------------------------------------------------------------------ the client

    def now(self) -> int:
        """The engine's time."""
        assert self.engine is not None
        return self.engine._parts.clock.now_ms()

    def act(self) -> None:
        """Let something happen, chosen at random."""
        draw, dispatcher, chance = self.random, self.dispatcher, self.random.random()
        if chance < 0.55:
            self.call()
        elif chance < 0.65:
            for _ in range(draw.randint(1, 6)):
                dispatcher.step()
        elif chance < 0.80:
            seconds = draw.choice((0.001, 0.02, 0.4, 2.0, 10.0))
            self.note(f"{seconds} s pass")
            dispatcher.advance(seconds)
        elif chance < 0.84:
            seconds = draw.choice((-3600.0, -0.5, 0.5, 60.0, 5000.0))
            self.note(f"the clock is set by {seconds} s")
            dispatcher.set_clock(seconds)
        elif chance < 0.86:
            self.note("the machine is suspended")
            dispatcher.suspend(draw.choice((1.0, 100.0)))
        elif chance < 0.92:
            assert self.engine is not None
            actors = list(self.engine._scopes.values())
            if actors:
                actor = draw.choice(actors)
                self.note(f"passivate {actor.scope}")
                dispatcher.submit(lambda: actor.housekeep(Passivate()))
        elif chance < 0.95:
            self.platter.failing_saves = draw.randint(1, 3)
        elif chance < 0.97:
            self.platter.failing_loads = draw.randint(1, 2)
        else:
            assert self.engine is not None
            with contextlib.suppress(StorageError):
                self.engine.flush()

    def alive(self, scope: str, now_ms: int | None = None) -> dict[str, Known]:
        """The values that the scope must have, in the order of creation."""
        now = self.now() if now_ms is None else now_ms
        return {
            key: known for key, known in self.known[scope].items() if known.expires_ms is None or known.expires_ms > now
        }

    def call(self) -> None:
        """Make one call of the client, and check its answer."""
        assert self.engine is not None
        draw = self.random
        scope, key = draw.choice(SCOPES), draw.choice(KEYS)
        kind = draw.choice(
            ("set", "set", "ttl", "ttl", "ttl", "at", "keep", "touch", "update", "delete", "batch", "read", "read")
        )
        work: Callable[[str, str], None] = getattr(self, f"_{kind}")
        before_ms = self.now()
        try:
            work(scope, key)
        except StorageError as error:
            self.note(f"{kind} {scope}/{key} -> {error!r}")
        else:
            self.note(f"{kind} {scope}/{key} is done")
        if self.now() != before_ms:
            raise Violation(f"{kind}: time has passed during a call that waits for nothing")

    def _wrote(self, scope: str, key: str, number: int, expires_ms: int | None) -> None:
        known = self.known[scope]
        if key not in self.alive(scope):
            known.pop(key, None)  # created again: the last in its order
        known[key] = Known(number, expires_ms)
        if self.deadline_of.setdefault(number, expires_ms) != expires_ms:
            raise Violation(f"{scope}/{key}: expired at {self.deadline_of[number]}, expected {expires_ms}")

    def _next(self) -> dict[str, int]:
        self.number += 1
        return {"id": self.number}

    def _rule(self, scope: str, key: str) -> int | None:
        """Return the deadline of a key that is written without one."""
        if not scope.startswith("rule"):
            return None
        before = self.alive(scope).get(key)
        return self.now() + 4000 if before is None else before.expires_ms

    def _checked_old(self, scope: str, key: str, old: Any) -> None:
        before = self.alive(scope).get(key)
        if old != (None if before is None else {"id": before.number}):
            raise Violation(f"{scope}/{key}: the old value was {old}, expected {before}")

    def _set(self, scope: str, key: str) -> None:
        value = self._next()
        result = self.engine.set(scope, key, value)  # type: ignore[union-attr]  # open
        self._checked_old(scope, key, result.old_value)
        self._wrote(scope, key, value["id"], self._rule(scope, key))

    def _ttl(self, scope: str, key: str) -> None:
        value, ttl = self._next(), self.random.choice(TTLS_S)
        result = self.engine.set(scope, key, value, ttl=ttl)  # type: ignore[union-attr]  # open
        self._checked_old(scope, key, result.old_value)
        self._wrote(scope, key, value["id"], self.now() + round(ttl * 1000))

    def _at(self, scope: str, key: str) -> None:
        value, ms = self._next(), self.now() + self.random.choice((-5000, 0, 1, 700))
        moment = datetime.fromtimestamp(ms / 1000, UTC)
        moment = moment.replace(microsecond=ms % 1000 * 1000)
        result = self.engine.set(scope, key, value, expires_at=moment)  # type: ignore[union-attr]  # open
        self._checked_old(scope, key, result.old_value)
        self._wrote(scope, key, value["id"], ms)

    def _keep(self, scope: str, key: str) -> None:
        value, before = self._next(), self.alive(scope).get(key)
        otherwise = self._rule(scope, key)
        result = self.engine.set(scope, key, value, keep_ttl=True)  # type: ignore[union-attr]  # open
        self._checked_old(scope, key, result.old_value)
        self._wrote(scope, key, value["id"], otherwise if before is None else before.expires_ms)

    def _touch(self, scope: str, key: str) -> None:
        ttl, before = self.random.choice((None, *TTLS_S)), self.alive(scope).get(key)
        touched = self.engine.touch(scope, key, ttl=ttl)  # type: ignore[union-attr]  # open
        if touched is not (before is not None):
            raise Violation(f"touch {scope}/{key}: {touched}, there was {before}")
        if before is not None:
            before.expires_ms = None if ttl is None else self.now() + round(ttl * 1000)
            self.deadline_of[before.number] = before.expires_ms

    def _update(self, scope: str, key: str) -> None:
        value, before = self._next(), self.alive(scope).get(key)
        otherwise = self._rule(scope, key)
        result = self.engine.update(scope, key, [ops.Merge(value)])  # type: ignore[union-attr]  # open
        self._checked_old(scope, key, result.old_value)
        self._wrote(scope, key, value["id"], otherwise if before is None else before.expires_ms)

    def _delete(self, scope: str, key: str) -> None:
        old = self.engine.delete(scope, key)  # type: ignore[union-attr]  # open
        self._checked_old(scope, key, old)
        self.known[scope].pop(key, None)

    def _batch(self, scope: str, key: str) -> None:
        assert self.engine is not None
        values, ttl = (self._next(), self._next()), self.random.choice(TTLS_S)
        other = self.random.choice([name for name in KEYS if name != key])
        rule = self._rule(scope, other)
        with self.engine.batch(scope) as batch:
            batch.set(key, values[0], ttl=ttl)
            batch.set(other, values[1])
        self._wrote(scope, key, values[0]["id"], self.now() + round(ttl * 1000))
        self._wrote(scope, other, values[1]["id"], rule)

    def _read(self, scope: str, key: str) -> None:
        assert self.engine is not None
        engine, alive, now = self.engine, self.alive(scope), self.now()
        ttls = {name: None if one.expires_ms is None else (one.expires_ms - now) / 1000 for name, one in alive.items()}
        numbers = {name: one.number for name, one in alive.items()}
        found: dict[str, tuple[object, object]] = {
            "get": ((engine.get(scope, key) or {}).get("id"), numbers.get(key)),
            "list": ([value["id"] for value in engine.list(scope)], list(numbers.values())),
            "keys": (engine.keys(scope), sorted(numbers)),
            "count": (engine.count(scope), len(numbers)),
            "ttl": (engine.ttl(scope, key), ttls.get(key)),
        }
        for name, (answer, expected) in found.items():
            if answer != expected:
                raise Violation(f"{name} {scope}/{key}: {answer!r}, expected {expected!r}")

    # ------------------------------------------------------------------------------------------------------ the checks

    def witness(self, event: StateEvent) -> None:
        """The handler for every event."""
        self.note(
            f"{event.event_type} {event.scope}/{event.key} {event.revision} {event.old_json!r} {event.new_json!r}"
        )
        events = self.events[event.scope]
        try:
            if events and event.revision != events[-1].revision + 1:
                raise Violation(f"event {event.revision} of {event.scope} after {events[-1].revision}")
            if event.event_type == "state:expired":
                number = event.old_value["id"]
                self.expired_ever[number] = self.expired_ever.get(number, 0) + 1
                # A touch after the deadline finds the key absent, so this deadline was the last one of the value.
                # The event may arrive before the answer of the write, if the deadline had passed by then.
                expected = self.deadline_of.setdefault(number, event.expired_at)
                if event.expired_at != expected or (event.late_ms or 0) < 0:
                    raise Violation(f"{event!r} expired at {event.expired_at}, expected {self.deadline_of[number]}")
                if sum(one.event_type == "state:expired" and one.old_value == event.old_value for one in events):
                    raise Violation(f"{event!r} comes twice")
        except Exception as error:
            self.problem = self.problem or error
            raise
        events.append(event)

    def check_problem(self) -> None:
        """Raise the violation that the handler found, if any."""
        if self.problem is not None:
            raise self.problem

    def check(self) -> None:
        """Check what must be true after every step."""
        self.check_problem()
        now_ms = self.now()
        if now_ms < self.latest_ms:
            raise Violation(f"time goes back from {self.latest_ms} to {now_ms}")
        self.latest_ms = now_ms
        assert self.engine is not None
        for actor in list(self.engine._scopes.values()):
            values, deadlines = actor._values, actor._deadlines  # type: ignore[attr-defined]  # of a LocalScope
            if values is not None and not deadlines.keys() <= values.keys():
                raise Violation(f"{actor.scope}: deadlines of keys that are not there: {deadlines}")
            if values is not None and deadlines and actor.next_due() > min(deadlines.values()):
                raise Violation(f"{actor.scope}: looks at {actor.next_due()}, but {deadlines}")

    def replay(self, scope: str) -> dict[str, int]:
        """Return, for each key, the number of the value that follows from the events of this life."""
        there = {key: known.number for key, known in self.base[scope].items()}
        for event in self.events[scope]:
            old = None if event.old_json is None else event.old_value["id"]
            if there.pop(event.key, None) != old:
                raise Violation(f"{event!r} does not continue what came before")
            if event.new_json is not None:
                there[event.key] = event.new_value["id"]
        return there


def simulate_expiry(seed: int, *, trace: bool = False) -> Failure | None:
    """Run one seed. Returns what went wrong, or None."""
    world = ExpiryWorld(seed, trace=trace)
    try:
        world.run()
    except Exception as error:  # noqa: BLE001 - whatever escapes from an engine is what the seeds look for
        if world.engine is not None:
            with contextlib.suppress(Exception):
                world.crash()
        problem = str(error) if isinstance(error, Violation) else "".join(traceback.format_exception(error))
        return Failure(seed, problem, world.trace or [])
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is logged of faults, which are meant, out of the report."""
    import logging

    logger = logging.getLogger("scopestate")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
