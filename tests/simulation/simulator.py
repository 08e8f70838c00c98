"""Whole-engine runs from a seed: clients, triggers, saves, faults, passivation, reloads, crashes and restarts."""

from __future__ import annotations

import contextlib
import logging
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import msgspec

from scopestate import Engine, StateEvent, lifecycle
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.gate import Gate
from scopestate.actors.local import LocalScope
from scopestate.actors.scope import Passivate
from scopestate.config import AdapterConfig, Config, KvOptions, LimitsConfig, ScopeRule
from scopestate.errors import ReplyTimeout, ScopestateError, StorageError
from scopestate.opening import durability_of
from scopestate.ops.turns import Change
from tests.simulation.clients import SCOPES, Client
from tests.simulation.disk import Disk, DiskAdapter
from tests.simulation.model import Model, Violation
from tests.simulation.triggers import DERIVED, TRIGGERS, watchers

RULES: Final = (ScopeRule("memory", prefix="memory-"), ScopeRule("commit", prefix="commit-"))
MOST_STEPS: Final = 50_000
"""A run with more steps than this does not end."""


class Failure(msgspec.Struct, frozen=True):
    """A seed that showed a bug."""

    seed: int
    problem: str
    trace: list[str]


class Life:
    """One engine, from its start to its close or crash, with everything that watches it."""

    def __init__(self, world: World) -> None:
        draw = world.random
        self._world = world
        self.ended = False
        self.open_calls: dict[object, str] = {}
        self.told: list[int] = []
        self.running = 0
        self.next_id = world.next_id
        self.dispatcher = DeterministicDispatcher(
            draw.getrandbits(32), switch=draw.choice((0.0, 0.05, 0.2)), busy=draw.choice((0.0, 0.1, 0.3))
        )
        disk = world.disk
        self.model = Model(
            self.dispatcher.monotonic,
            lambda scope: (disk.items(scope), disk.sequence(scope)),
            lambda scope: durability_of(scope, RULES, "interval"),
            watchers(),
        )
        self.adapter = DiskAdapter(disk, self.dispatcher, self.model)
        self.interval_s = self.longest_interval_s = draw.choice((0.2, 1.0))
        self.config = self._config()
        self.engine = Engine(self.config, adapter=self.adapter, dispatcher=self.dispatcher, handle_sigterm=False)
        self._register()
        self.note(lambda: f"an engine starts, saving every {self.interval_s} s, {self.config.limits}")

    def note(self, text: Callable[[], str]) -> None:
        """Add a line to the trace, if there is one."""
        if self._world.trace is not None:
            self._world.trace.append(f"{self.dispatcher.monotonic():9.3f}  {text()}")

    # -------------------------------------------------------------------------------------------------- set-up

    def _config(self) -> Config:
        draw = self._world.random
        self.model.attempts = draw.choice((1, 2))
        return Config(
            AdapterConfig("kv", KvOptions(save_interval_ms=int(self.interval_s * 1000))),
            scopes=RULES,
            limits=LimitsConfig(
                scope_mailbox=draw.choice((3, 10_000)),
                handler_mailbox=draw.choice((2, 100_000)),
                handler_attempts=self.model.attempts,
                handler_backoff_ms=100,
                close_grace_ms=600_000,
                passivate_after_ms=draw.choice((100, 300_000)),
            ),
        )

    def reload(self) -> None:
        """Give the engine a new configuration: another interval, other limits."""
        draw = self._world.random
        self.interval_s = draw.choice((0.1, 0.2, 1.0))
        self.longest_interval_s = max(self.longest_interval_s, self.interval_s)
        limits = msgspec.structs.replace(self.config.limits, scope_mailbox=draw.choice((2, 5, 10_000)))
        kv = KvOptions(save_interval_ms=int(self.interval_s * 1000))
        self.config = Config(AdapterConfig("kv", kv), scopes=RULES, limits=limits)
        self.note(lambda: f"reload: saving every {self.interval_s} s, {limits.scope_mailbox} messages per scope")
        self.engine.reconfigure(self.config)

    def _register(self) -> None:
        engine = self.engine
        engine.register_function("is_odd", lambda event: event.revision % 2 == 1)
        for trigger_id, (filters, after) in TRIGGERS.items():
            engine.register_function(trigger_id, self._handler(trigger_id, after))
            engine.register_trigger(function_id=trigger_id, trigger_id=trigger_id, **filters)

    def _handler(self, trigger_id: str, after: Callable[[Life, StateEvent], None]) -> Callable[[StateEvent], None]:
        def handle(event: StateEvent) -> None:
            if self.ended:
                return
            self.note(lambda: f"{trigger_id} is called: {event.scope} {event.revision} {event.key}")
            with self.model.watching():
                self.model.check_call(trigger_id, event)
            after(self, event)

        return handle

    def extra_trigger(self) -> None:
        """Register or unregister a trigger while writes are in progress."""
        if any(handle.trigger_id == "extra" for handle in self.engine.triggers()):
            self.note(lambda: "the extra trigger goes")
            next(handle for handle in self.engine.triggers() if handle.trigger_id == "extra").unregister()
            return
        self.note(lambda: "the extra trigger comes")
        last: dict[str, int] = {}

        def in_order(_: Life, event: StateEvent) -> None:
            with self.model.watching():
                if event.revision <= last.get(event.scope, 0):
                    raise Violation(f"extra: write {event.revision} of {event.scope} after {last[event.scope]}")
            last[event.scope] = event.revision

        self.engine.register_function("extra", self._handler("extra", in_order))
        self.engine.register_trigger(function_id="extra", trigger_id="extra")

    # -------------------------------------------------------------------------------------------------- the end

    def check(self) -> None:
        """What must be true after every step."""
        self.model.raise_problem()
        for actor in list(self.engine._scopes.values()):
            values = actor._values
            if values is not None:
                self.model.check_memory(actor.scope, tuple(values.items()), actor._sequence)
        # Commits and flushes that are in progress go first.
        self.model.check_age(self.longest_interval_s + 8 * self._world.disk.slowest_s + 0.01)

    def crash(self) -> None:
        """The process dies: nothing in it continues, and only durable data remains."""
        self.note(lambda: "crash")
        self.ended = self.adapter.crashed = True
        self.dispatcher.kill()
        lifecycle.release(self.engine)
        self.engine.disown()  # a dead process closes nothing when its memory goes
        self.engine._parts.loop_thread.close()
        self.adapter.close()
        self.model.raise_problem()

    def close(self) -> None:
        """Close the engine while clients call it: everything must be saved, delivered and answered."""
        self.note(lambda: "close")
        killed: list[str] = []
        end = self.dispatcher.kill

        def kill_the_rest() -> None:
            killed.extend(worker.label for worker in self.dispatcher._parked if worker.reply and not worker.reply.done)
            self.ended = True
            end()

        with mock.patch.object(self.dispatcher, "kill", kill_the_rest):
            try:
                self.engine.close()
            except StorageError as error:
                text = repr(error)
                self.note(lambda: f"close -> {text}")
                self._world.disk.heal()
                self.engine.close()
        self.model.raise_problem()
        if killed:
            raise Violation(f"close() left {killed} waiting")
        sequences = self.model.sequences()
        self.model.check_events_done(sequences)
        self.model.check_all_saved(sequences)
        self.note(lambda: "closed")

    def settle(self) -> None:
        """Let everything finish: every call is answered, every event handled, everything saved."""
        world = self._world
        world.disk.heal()
        self.note(lambda: "the disk works from here on; everybody finishes")
        while self.running or self.open_calls:
            world.step(self)
            if self.dispatcher.monotonic() > world.patience_s:
                raise Violation(
                    f"never answered: {list(self.open_calls.values())}; waiting: {self.dispatcher.waiting()}"
                )
        try:
            self.engine.drain(60.0)
        except ReplyTimeout as error:
            raise Violation(f"drain does not end: {error}") from error
        sequences = self.model.sequences()
        self.model.check_events_done(sequences)
        self.engine.flush()
        self.model.check_all_saved(sequences)
        self.check()
        lost = [number for number in self.told if number not in self.model.by_id]
        if lost and not self.model.failed_loads:
            raise Violation(f"told and never handled: {lost}")
        for scope in (*SCOPES, *DERIVED):
            values = [msgspec.json.decode(data) for _, data in self.model.history(scope).now().items]
            if self.engine.list(scope) != values:
                raise Violation(f"list({scope!r}) is {self.engine.list(scope)}, expected {values}")
        groups = sorted(scope for scope, history in self.model.histories.items() if history.now().items)
        groups = sorted({*groups, *self.adapter.scopes()})
        if self.engine.list_groups() != groups:
            raise Violation(f"list_groups() is {self.engine.list_groups()}, expected {groups}")


class World:
    """One run: a disk and the engines that live on it, one after another."""

    def __init__(self, seed: int, *, path: str | None = None, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.disk = Disk(path)
        self.trace: list[str] | None = [] if trace else None
        self.life: Life | None = None
        self.steps = 0
        self.patience_s = 300.0
        self._id = 0

    def next_id(self) -> int:
        """A number that no other value has."""
        self._id += 1
        return self._id

    def run(self) -> None:
        """Run several engines, one after the other. Raises Violation, or whatever an engine raises."""
        draw = self.random
        ends = draw.choices(("crash", "close"), k=draw.randrange(3))
        for end in (*ends, "settle"):
            life = self.life = Life(self)
            for number in range(draw.randint(1, 3)):
                client = Client(life, f"client {number}", draw.getrandbits(32), draw.randint(3, 10))
                life.running += 1
                life.dispatcher.submit(client.run)
            steps = draw.randint(20, 150) if end != "settle" else 400
            for _ in range(steps):
                if not life.running and not life.open_calls:
                    break
                self._happen(life)
                self.step(life)
            if end == "crash":
                life.crash()
                continue
            if end == "settle":
                life.settle()
            self.disk.slow_s = 0.0
            life.close()
        self.life = None

    def step(self, life: Life) -> None:
        """Run one turn, then check everything."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise Violation(f"no end after {self.steps} steps; waiting: {life.dispatcher.waiting()}")
        if not life.dispatcher.step() and life.open_calls:
            raise Violation(f"nothing is left to run, but these wait: {list(life.open_calls.values())}")
        life.check()

    def _happen(self, life: Life) -> None:
        """Let something happen from outside, or nothing, at random."""
        draw, disk = self.random, self.disk
        chance = draw.random()
        if chance > 0.2:
            return
        if chance < 0.05:
            life.dispatcher.advance(draw.random() * 0.2)
        elif chance < 0.12:
            actors = list(life.engine._scopes.values())
            if actors:
                actor = draw.choice(actors)
                life.note(lambda: f"passivate {actor.scope}")
                life.dispatcher.submit(lambda: actor.housekeep(Passivate()))
        elif chance < 0.14:
            disk.failing_saves = draw.randint(1, 3)
            life.note(lambda: f"the next {disk.failing_saves} saves will fail")
        elif chance < 0.15:
            disk.failing_loads = 1
            life.note(lambda: "the next load will fail")
        elif chance < 0.16:
            disk.slow_s = draw.choice((0.0, 0.03, 0.1))
            disk.slowest_s = max(disk.slowest_s, disk.slow_s)
            life.note(lambda: f"a save takes {disk.slow_s} s")
        elif chance < 0.18:
            life.reload()
        else:
            life.extra_trigger()

    def abandon(self) -> None:
        """After a failure: end everything that still runs."""
        if self.life is not None and not self.life.ended:
            with contextlib.suppress(Violation, ScopestateError):
                self.life.crash()


# ------------------------------------------------------------------------------------------------------ the runs


@contextlib.contextmanager
def observed() -> Iterator[None]:
    """Make the scopes of simulated engines report their writes to the model. A nested `observed()` does nothing."""
    if LocalScope._write.__module__ == __name__:
        yield
        return
    write, create, remove = LocalScope._write, LocalScope._create, LocalScope._remove
    commit, write_all = LocalScope._commit, LocalScope._write_all
    roll_back = Gate._roll_back

    def tell(actor: LocalScope, key: str, old: bytes | None, new: bytes | None, commit: Callable[[], None]) -> None:
        model = _model_of(actor)
        # Before the write, because other threads may read directly after it; none can read between here and a refusal.
        with model.watching():
            model.wrote(actor.scope, actor._sequence + 1, key, old, new)
        before = actor._sequence
        try:
            commit()
        except BaseException:
            if actor._sequence == before:
                model.refuse_write(actor.scope)
            raise

    def tell_together(
        actor: LocalScope, changes: list[tuple[str, bytes | None, bytes | None]], commit: Callable[[], None]
    ) -> None:
        model = _model_of(actor)
        with model.watching():
            model.wrote_together(actor.scope, actor._sequence + 1, changes)
        before = actor._sequence
        try:
            commit()
        except BaseException:
            if actor._sequence == before:
                model.refuse_write(actor.scope, len(changes))
            raise

    def observed_commit(actor: LocalScope, stored: Any) -> None:
        changes = [(one.key, one.before, one.after) for one in stored if isinstance(one, Change)]
        tell_together(actor, changes, lambda: commit(actor, stored))

    def observed_write_all(actor: LocalScope, sets: dict[str, bytes], before: list[bytes | None]) -> None:
        changes = [(key, old, new) for (key, new), old in zip(sets.items(), before, strict=True)]
        tell_together(actor, changes, lambda: write_all(actor, sets, before))

    def observed_write(actor: LocalScope, key: str, old: bytes | None, new: bytes | None) -> None:
        if old is None or new is None:
            write(actor, key, old, new)  # it ends in one of the other two
        else:
            tell(actor, key, old, new, lambda: write(actor, key, old, new))

    def observed_create(actor: LocalScope, key: str, new: bytes, *more: Any) -> None:
        tell(actor, key, None, new, lambda: create(actor, key, new, *more))

    def observed_remove(actor: LocalScope, key: str, old: bytes | None, *more: Any) -> None:
        tell(actor, key, old, None, lambda: remove(actor, key, old, *more))

    def observed_roll_back(gate: Gate, batch: Any, error: StorageError) -> Any:
        actor = gate._scope
        if not actor._passivated:  # else only reads were left here, and another actor has the scope
            with _model_of(actor).watching():
                _model_of(actor).rolled_back(actor.scope)
        return roll_back(gate, batch, error)

    logger = logging.getLogger("scopestate")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # the faults are meant, and a thousand runs would fill a disk
    try:
        with (
            mock.patch.object(LocalScope, "_write", observed_write),
            mock.patch.object(LocalScope, "_create", observed_create),
            mock.patch.object(LocalScope, "_remove", observed_remove),
            mock.patch.object(LocalScope, "_commit", observed_commit),
            mock.patch.object(LocalScope, "_write_all", observed_write_all),
            mock.patch.object(Gate, "_roll_back", observed_roll_back),
        ):
            yield
    finally:
        logger.setLevel(level)


def _model_of(actor: LocalScope) -> Model:
    store = actor._around.store
    assert isinstance(store, DiskAdapter)
    return store.model


def simulate(seed: int, *, path: str | None = None, trace: bool = False) -> Failure | None:
    """Run one seed, within `observed()`. With `path`, on a real store in that directory.

    Returns what went wrong, or None.
    """
    world = World(seed, path=path, trace=trace)
    try:
        world.run()
    except Exception as error:  # noqa: BLE001 - whatever escapes from an engine is what the seeds look for
        world.abandon()
        problem = str(error) if isinstance(error, Violation) else "".join(traceback.format_exception(error))
        return Failure(seed, problem, world.trace or [])
    return None
