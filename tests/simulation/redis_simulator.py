"""Engines on a played Redis server, from a seed: clients, handlers, rivals, lost and late answers, cuts, closing."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any, Final
from unittest import mock

import msgspec

from scopestate import Engine, StateEvent, lifecycle, ops
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.reply import Envelope, Reply, deliver
from scopestate.actors.scope import Passivate
from scopestate.config import Config, LimitsConfig
from scopestate.errors import (
    ConnectionLost,
    EngineClosed,
    Overloaded,
    ReplyTimeout,
    ScopestateError,
    StorageError,
)
from scopestate.ops import messages, turns
from scopestate.ops.values import encode
from scopestate.persistence.connections import owner, pump, watch
from scopestate.persistence.redis import commands, events, reading, servers, tail
from scopestate.persistence.redis import owner as redis_owner
from scopestate.persistence.redis.backend import RedisBackend
from scopestate.persistence.redis.options import RedisOptions
from tests.redis.played_server import Session
from tests.simulation.model import Violation
from tests.simulation.playing_loops import PlayedLoop, TaskReply
from tests.simulation.playing_threads import Play, PlayedClaim
from tests.simulation.redis_network import ADDRESS, Network

SCOPES: Final = ("a", "b")
KEYS: Final = ("x", "y")
MOST_STEPS: Final = 30_000
QUIET_S: Final = 60.0
"""Virtual seconds within which everything must come to rest after the faults have ended."""

_KINDS: Final = {
    "set": 6,
    "update": 6,
    "delete": 2,
    "get": 4,
    "list": 2,
    "ask": 4,
    "task": 4,
    "tell": 1,
    "give up": 2,
    "drain": 1,
}

PLAY: Final = Play()


class Failure(msgspec.Struct, frozen=True):
    """A seed that showed a bug."""

    seed: int
    problem: str
    trace: list[str]


class Write(msgspec.Struct, eq=False):
    """One write, as the server made it."""

    scope: str
    key: str
    old: bytes | None
    new: bytes | None
    engine: int
    """Number of the engine that sent it; 0: a rival."""
    place: int
    """Index of the state that it made."""
    is_claimed: bool = False
    """A caller got an answer for this write."""
    was_told: bool = False
    """A handler of its engine was called with it."""


class Truth:
    """The present and past states of the server. It does one thing at a time, so it decides the order of effects."""

    def __init__(self) -> None:
        self.states: dict[str, list[dict[str, bytes]]] = {scope: [{}] for scope in SCOPES}
        self.writes: list[Write] = []
        self.by_id: dict[int, Write] = {}
        self.senders: dict[int, str] = {}
        """Id -> the client that sent it. The ids of a client rise, so those of its writes of one key must rise too."""
        self.unknown: set[int] = set()
        """Ids whose write may have been made, or may still be made: the answer said so, or there was no answer."""
        self._latest: dict[tuple[str, str, str], int] = {}
        self.refused: dict[int, str] = {}
        """Id whose write was not made, according to its answer -> that answer."""

    def wrote(self, scope: str, key: str, old: bytes | None, new: bytes | None, engine: int) -> None:
        """Note that the server makes a write. It must be the only one with this id."""
        states = self.states[scope]
        state = dict(states[-1])
        if state.get(key) != old:
            raise Violation(f"the played server is wrong about {scope}/{key}: {old!r}")
        if new is None:
            state.pop(key, None)
        else:
            state[key] = new
        states.append(state)
        write = Write(scope, key, old, new, engine, len(states) - 1)
        self.writes.append(write)
        if new is not None:
            number = msgspec.json.decode(new)["id"]
            if number in self.by_id:
                raise Violation(f"write {number} was sent twice: {self.by_id[number]}, and {write}")
            if number in self.refused:
                raise Violation(f"write {number} is done, and its caller was told: {self.refused[number]}")
            self.by_id[number] = write
            self._check_order(write, number)

    def _check_order(self, write: Write, number: int) -> None:
        sender = self.senders.get(number)
        if sender is None or number in self.unknown:
            return
        latest = self._latest.get((sender, write.scope, write.key), 0)
        if number < latest:
            raise Violation(f"write {number} of {sender} was overtaken by its later one {latest}: {write}")
        self._latest[sender, write.scope, write.key] = number

    @property
    def published(self) -> int:
        """How many writes were made by engines."""
        return sum(write.engine != 0 for write in self.writes)

    def now(self, scope: str) -> int:
        """Index of the state of a scope."""
        return len(self.states[scope]) - 1


class Call:
    """One call of a client: begun, then held against what the server did meanwhile."""

    def __init__(self, life: Life, what: str, scope: str, key: str, number: int | None) -> None:
        self._life = life
        self._truth = life.world.truth
        self._scope = scope
        self._key = key
        self._number = number
        self._first = self._truth.now(scope)
        self.label = f"engine {life.number}: {what} {scope}/{key}" + ("" if number is None else f" id {number}")
        life.world.open_calls[self] = self.label
        life.world.note(lambda: f"{self.label} begins")

    def make(self, work: Callable[[], Any], good: Callable[[Any], None]) -> None:
        """Make it, and check how it ends."""
        try:
            answer = work()
        except BaseException as error:
            if not isinstance(error, (Exception, KeyboardInterrupt)):
                raise
            self.failed(error)
        else:
            good(answer)

    def failed(self, error: BaseException) -> None:
        """The call ended with an error: either the write may have been made, or it must never be made."""
        self._end(error)
        self._life.said_closed |= isinstance(error, EngineClosed)
        if isinstance(error, (ReplyTimeout, KeyboardInterrupt)) or _may_be_applied(error):
            if self._number is not None:
                self._truth.unknown.add(self._number)
            return
        if not isinstance(error, (StorageError, Overloaded, EngineClosed)):
            raise Violation(f"{self.label} raised {error!r}") from error
        if self._number is not None:
            self._truth.refused[self._number] = repr(error)
            if self._number in self._truth.by_id:
                raise Violation(f"{self.label} is done, and its caller was told: {error!r}")

    def wrote(self, old: bytes | None, new: bytes | None) -> None:
        """The call succeeded: there must be such a write, made between the beginning and the end of the call."""
        self._end((old, new))
        write = self._write(old, new)
        if write is None or not self._first < write.place:
            raise Violation(f"{self.label} was answered ({old!r} -> {new!r}), and the server never did that: {write}")
        write.is_claimed = True

    def read(self, value: bytes | None) -> None:
        """A read ended: its value must have been there at some time during the call."""
        self._end(value)
        if not any(state.get(self._key) == value for state in self._between()):
            raise Violation(f"{self.label} gave {value!r}, there was {self._between()}")

    def listed(self, values: list[bytes]) -> None:
        """A list ended: all its values must have been there at one time during the call."""
        self._end(values)
        if not any([state[key] for key in sorted(state)] == values for state in self._between()):
            raise Violation(f"{self.label} gave {values!r}, there was {self._between()}")

    def _between(self) -> list[dict[str, bytes]]:
        return self._truth.states[self._scope][self._first :]

    def _write(self, old: bytes | None, new: bytes | None) -> Write | None:
        if self._number is not None:
            write = self._truth.by_id.get(self._number)
            return write if write and not write.is_claimed and (write.old, write.new) == (old, new) else None
        for write in self._truth.writes:
            if (write.scope, write.key, write.old, write.new) == (self._scope, self._key, old, new) and (
                write.place > self._first and not write.is_claimed and write.engine == self._life.number
            ):
                return write
        return None

    def _end(self, outcome: object) -> None:
        if self._life.world.open_calls.pop(self, None) is None:
            raise Violation(f"{self.label} was answered twice")
        self._life.world.note(lambda: f"{self.label} -> {outcome!r}")


def _is_of(event: StateEvent, write: Write) -> bool:
    said = (event.scope, event.key, event.old_json, event.new_json)
    return said == (write.scope, write.key, write.old, write.new)


def _may_be_applied(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionLost):
            return error.may_be_applied
        error = error.__cause__
    return False


class Lodger:
    """The world's dispatcher as one of its engines sees it: it does not end with that engine."""

    def __init__(self, dispatcher: DeterministicDispatcher) -> None:
        self._dispatcher = dispatcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dispatcher, name)

    def close(self) -> None:
        """Do nothing: the other engines continue."""


class PlayedBackend(RedisBackend):
    """The real one; its scopes go by the world's clock."""

    def __init__(self, world: World, options: RedisOptions, number: int) -> None:
        self._world = world
        target: Any = types.SimpleNamespace(
            address=ADDRESS, dial=lambda: world.network.dial(options.call_timeout_s, number)
        )
        means = pump.Means(deliver, world.dispatcher.monotonic, world.random.uniform)
        single = servers.Single(target, options, means)
        for one in single.owners():
            one._claim = PlayedClaim(PLAY)
        super().__init__(options, deliver, servers=single)
        shape: Any = self.shape
        shape._wall_ns = world.dispatcher.wall_ns
        reader: Any = self.reader
        if reader is not None:
            reader._backoff._uniform = world.random.uniform

    def _find_due(self) -> None:
        """It would dial without the world; the scopes here are few, and in use."""

    def make_scope(self, scope: str, around: Any) -> Any:
        made: Any = super().make_scope(scope, around)
        made.commands._clock = self._world.dispatcher.monotonic
        made.commands._uniform = self._world.random.uniform
        return made


class Life:
    """One engine of the world, from its start to its close."""

    def __init__(self, world: World, number: int) -> None:
        draw = world.random
        self.world = world
        self.number = number
        self.ended = False
        self.said_closed = False
        """A call was refused because the engine is closed."""
        self._places: dict[str, int] = {}
        """Scope -> place of its last write that the witness was called with."""
        self._sequences: dict[str, int] = {}
        self.shares_events = world.shares_events
        options = RedisOptions(
            call_timeout_ms=draw.choice((200, 5000)),
            connect_wait_ms=draw.choice((100, 5000)),
            pool_size=draw.choice((1, 2)),
            update_attempts=draw.choice((2, 100)),
            events="shared" if self.shares_events else "local",
            revisions=world.has_revisions,
        )
        limits = LimitsConfig(
            call_timeout_ms=draw.choice((None, 100, 1000, 10_000)) or LimitsConfig().call_timeout_ms,
            scope_mailbox=draw.choice((3, 10_000)),
            close_grace_ms=draw.choice((100, 60_000)),
            passivate_after_ms=draw.choice((100, 300_000)),
        )
        with world.network.faults.suspended():  # an engine that finds no server is not opened
            self.backend = PlayedBackend(world, options, number)
        reader: Any = self.backend.reader
        self.heard: int = reader._number if self.shares_events else 0
        """With shared events: how many of all events the witness has handled, counting those before its start."""
        self.loop = PlayedLoop(PLAY, world.network)
        world.dispatcher.submit(self.loop.run)
        lodger: Any = Lodger(world.dispatcher)
        self.engine = Engine(Config(limits=limits), adapter=self.backend, dispatcher=lodger, handle_sigterm=False)
        self.engine.register_function("witness", self._witness)
        self.engine.register_trigger(function_id="witness", trigger_id="witness", order="trigger")
        self.engine.register_function("deriving", self._derive)
        self.engine.register_trigger(function_id="deriving", trigger_id="deriving", scope="a", key="x")
        world.note(lambda: f"engine {number} starts: {options}, {limits}")

    def _witness(self, event: StateEvent) -> None:
        """Handle each answered write of this engine once, in the server's order; with shared events, every write."""
        with self.world.watching():
            if self.shares_events:
                self._hear(event)
                return
            place, writes = self._places.get(event.scope, 0), self.world.truth.writes
            self.world.note(lambda: f"engine {self.number}: event {event.revision} of {event.scope}/{event.key}")
            write = next(
                (
                    write
                    for write in writes
                    if write.scope == event.scope and write.place > place and self._describes(event, write)
                ),
                None,
            )
            if write is None:
                raise Violation(f"engine {self.number}: {event!r} comes twice, out of order, or from nowhere")
            if event.revision <= self._sequences.get(event.scope, 0):
                raise Violation(f"engine {self.number}: event {event.revision} of {event.scope} is behind its turn")
            self._places[event.scope], self._sequences[event.scope] = write.place, event.revision
            write.was_told = True

    def _describes(self, event: StateEvent, write: Write) -> bool:
        return write.engine == self.number and _is_of(event, write)

    def _hear(self, event: StateEvent) -> None:
        """With shared events: the events of all engines, one after the other."""
        published = [write for write in self.world.truth.writes if write.engine]
        self.world.note(lambda: f"engine {self.number}: event {event.revision} of {event.scope}/{event.key}")
        if self.heard >= len(published) or not _is_of(event, published[self.heard]):
            expected = published[self.heard] if self.heard < len(published) else None
            raise Violation(f"engine {self.number}: {event!r} comes, and next is {expected}")
        self.heard += 1

    def _derive(self, event: StateEvent) -> None:
        """Write into another scope, as handlers do."""
        if self.ended:
            return
        with contextlib.suppress(ScopestateError):
            self.engine.tell(messages.Set("b", event.key, {"id": self.world.next_id()}))

    def patiently(self, work: Callable[[], Any]) -> Any:
        """Make a call again if it takes longer than this engine lets its callers wait."""
        for _ in range(20):
            with contextlib.suppress(ReplyTimeout):
                return work()
        raise Violation(f"engine {self.number}: no answer in 20 tries")

    def close(self) -> None:
        """Close the engine while its clients call it."""
        self.world.note(lambda: f"engine {self.number} closes")
        self.ended = True
        with contextlib.suppress(StorageError):
            self.engine.close()
        self.world.note(lambda: f"engine {self.number} is closed")

    def check_rest(self) -> None:
        """Check that the engine has no work left."""
        for scope in list(self.engine._scopes.values()):
            work = scope.commands
            if scope._mailbox or work.command or work.paused or work.pausing or scope.listed:
                raise Violation(f"engine {self.number}: scope {scope.scope!r} does not come to rest: {vars(work)}")
        for one in self.backend._servers.owners():
            left = [
                name for name in ("_claim", "_inbox", "_ready", "_under_way", "over", "_later") if getattr(one, name)
            ]
            if left or one._wanted or one._led:
                raise Violation(f"engine {self.number}: an owner does not come to rest: {left}")

    def check_awake(self) -> None:
        """No thread can run now. Check that none sleeps beyond the time at which its owner has work to do."""
        now = self.world.dispatcher.monotonic()
        for one in self.backend._servers.owners():
            tokens: Any = one._tokens
            if one._claim or tokens.sleeps_until is None:
                continue
            due = one._later[0][0] if one._later else float("inf")
            if one._ready:
                due = min(due, 1e9)  # there is no connection, and the next attempt to make one has its time
            is_under_way = one._under_way and not (one._watch and one._watch.active)
            if one._inbox or is_under_way or tokens.sleeps_until > max(due, now) + 1e-6:
                left = [list(one._inbox), list(one._ready), list(one._under_way), one._later]
                raise Violation(f"engine {self.number}: a wake-up is lost: {left}, asleep until {tokens.sleeps_until}")

    def check_told(self) -> None:
        """Check that each answered write was an event too. Removals look alike, so they are only counted."""
        if self.shares_events:
            if self.heard != self.world.truth.published:
                raise Violation(f"engine {self.number}: {self.heard} of {self.world.truth.published} events came")
            return
        claimed: Counter[tuple[Any, ...]] = Counter()
        told: Counter[tuple[Any, ...]] = Counter()
        for write in self.world.truth.writes:
            if write.engine == self.number:
                what = (write.scope, write.key, write.old, write.new)
                claimed[what] += write.is_claimed
                told[what] += write.was_told
        for what, count in claimed.items():
            if told[what] < count:
                raise Violation(f"engine {self.number}: {told[what]} events came of {count} writes {what}")


class Client:
    """A virtual thread that calls an engine, one call after the other, in an order drawn from its own seed."""

    def __init__(self, life: Life, name: str, seed: int, calls: int) -> None:
        self._life = life
        self._name = name
        self._world = life.world
        self._engine = life.engine
        self._random = random.Random(seed)
        self._calls = calls
        self._work = {kind: getattr(self, "_" + kind.replace(" ", "_")) for kind in _KINDS}

    def run(self) -> None:
        """Make all calls."""
        draw, world = self._random, self._world
        for _ in range(self._calls):
            if self._life.said_closed:
                break
            kind = draw.choices(list(_KINDS), list(_KINDS.values()))[0]
            self._work[kind](draw.choice(SCOPES), draw.choice(KEYS))
            world.dispatcher.give_way()
            if draw.random() < 0.3:
                world.dispatcher.sleep(draw.random() * 0.1)
        world.running -= 1

    def _number(self) -> int:
        number = self._world.next_id()
        self._world.truth.senders[number] = self._name
        return number

    def _call(self, what: str, scope: str, key: str, number: int | None = None) -> Call:
        return Call(self._life, what, scope, key, number)

    def _set(self, scope: str, key: str) -> None:
        number = self._number()
        call = self._call("set", scope, key, number)
        call.make(
            lambda: self._interruptible(lambda: self._engine.set(scope, key, {"id": number})),
            lambda result: call.wrote(result.old_json, result.new_json),
        )

    def _update(self, scope: str, key: str) -> None:
        number = self._number()
        call = self._call("update", scope, key, number)
        work = [ops.Merge({"id": number}), ops.Increment("count", 1)]
        call.make(
            lambda: self._interruptible(lambda: self._engine.update(scope, key, work)),
            lambda result: call.wrote(result.old_json, result.new_json),
        )

    def _delete(self, scope: str, key: str) -> None:
        call = self._call("delete", scope, key)
        call.make(lambda: self._engine.delete(scope, key), lambda old: call.wrote(_json(old), None))

    def _get(self, scope: str, key: str) -> None:
        call = self._call("get", scope, key)
        call.make(
            lambda: self._interruptible(lambda: self._engine.get(scope, key)), lambda value: call.read(_json(value))
        )

    def _list(self, scope: str, key: str) -> None:
        call = self._call("list", scope, key)
        call.make(lambda: self._engine.list(scope), lambda values: call.listed([encode(value) for value in values]))

    def _ask(self, scope: str, key: str) -> None:
        """Send without waiting; the answer is checked when it comes."""
        number = self._number()
        call = self._call("ask", scope, key, number)

        def arrived(reply: Reply[Any]) -> None:
            with self._world.watching():
                call.make(reply.get, lambda result: call.wrote(result.old_json, result.new_json))

        value = {"id": number}
        message: messages.Message = messages.Set(scope, key, value)
        if self._random.random() < 0.5:
            message = messages.Update(scope, key, (ops.Merge(value),))
        try:
            reply = self._engine.ask(message, block=False)
        except ScopestateError as error:
            call.failed(error)
        else:
            reply.add_done_callback(arrived)

    def _task(self, scope: str, key: str) -> None:
        """Call as a task of an event loop does: on the loop's thread, which then drives the connection if it can."""
        number = self._world.next_id()  # it begins when the loop runs it: after later calls of this thread
        call = self._call("task", scope, key, number)
        value = {"id": number}
        turn: Any = turns.Set(key, encode(value))
        if self._random.random() < 0.5:
            turn = turns.Update(key, (ops.Merge(value),))

        def arrived(result: Any, error: BaseException | None) -> None:
            with self._world.watching():
                if error is None:
                    call.wrote(result.old_json, result.new_json)
                else:
                    call.failed(error)

        def begin() -> None:
            reply: Any = TaskReply(self._life.loop, arrived)
            try:
                self._engine._scopes[scope].send(Envelope(turn, reply))
            except ScopestateError as error:
                arrived(None, error)

        self._life.loop.call_soon(begin)

    def _tell(self, scope: str, key: str) -> None:
        number = self._number()
        try:
            self._engine.tell(messages.Set(scope, key, {"id": number}))
        except ScopestateError as error:
            self._world.truth.refused[number] = repr(error)

    def _give_up(self, scope: str, key: str) -> None:
        """Ask, wait for a moment, and wait no longer."""
        number = self._number()
        call = self._call("ask and give up", scope, key, number)

        def work() -> Any:
            return self._engine.ask(messages.Set(scope, key, {"id": number}), timeout=self._random.choice((0.0, 0.01)))

        call.make(work, lambda result: call.wrote(result.old_json, result.new_json))

    def _drain(self, scope: str, key: str) -> None:
        with contextlib.suppress(EngineClosed, ReplyTimeout, StorageError):
            self._engine.drain(1.0)

    def _interruptible(self, work: Callable[[], Any]) -> Any:
        with self._world.may_be_interrupted():
            return work()


class World:
    """One run: a server, a network, engines and their clients."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        draw = self.random = random.Random(seed)
        self.trace: list[str] | None = [] if trace else None
        self.dispatcher = DeterministicDispatcher(draw.getrandbits(32), switch=draw.choice((0.0, 0.1, 0.3)), busy=0.0)
        PLAY.use(self.dispatcher)
        self.truth = Truth()
        self.open_calls: dict[Call, str] = {}
        self.running = 0
        self.shares_events = draw.random() < 0.3
        self.has_revisions = seed % 4 != 0
        """Of all its engines."""
        self.network = Network(self.dispatcher, draw, lambda text: self.note(lambda: text))
        server = self.network.server
        server.before, server.wrote = self._before, self._wrote
        self.network.may_interrupt = lambda: get_ident() in self._interruptible
        self.lives: list[Life] = []
        self._interruptible: set[int] = set()
        self._engine_at_server = 0
        self._id = 0
        self._steps = 0
        self._problem: Exception | None = None

    def note(self, text: Callable[[], str]) -> None:
        """Add a line to the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.dispatcher.monotonic():9.4f}  {text()}")

    def next_id(self) -> int:
        """A number that no other value has."""
        self._id += 1
        return self._id

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep errors from inside the engine, because the engine's code may only log them."""
        try:
            yield
        except Exception as error:
            self._problem = self._problem or error
            raise

    @contextlib.contextmanager
    def may_be_interrupted(self) -> Iterator[None]:
        """A signal handler may raise in this thread, at a connection."""
        self._interruptible.add(get_ident())
        try:
            yield
        finally:
            self._interruptible.discard(get_ident())

    def run(self) -> None:
        """Let everything happen. Raises Violation, or whatever an engine raises."""
        draw = self.random
        for number in range(1, draw.choice((1, 1, 2)) + 1):
            life = Life(self, number)
            self.lives.append(life)
            for place in range(draw.randint(1, 4)):
                client = Client(life, f"client {place} of engine {number}", draw.getrandbits(32), draw.randint(3, 12))
                self.running += 1
                self.dispatcher.submit(client.run)
        closes_amid = draw.random() < 0.3
        for _ in range(draw.randint(10, 200) if closes_amid else 5000):
            if not self.running and not self.open_calls:
                break
            self._happen()
            self._step()
        self.network.faults.end()
        self._mend()
        if not closes_amid:
            self._settle()
        for life in self.lives:
            life.close()
            self.check()
        self.dispatcher.advance(QUIET_S)
        for life in self.lives:
            life.loop.stop()
        self.dispatcher.run_until_idle()
        self.check()
        if self.open_calls:
            raise Violation(f"closed, and these wait: {list(self.open_calls.values())}")
        if self.network.open_ends():
            raise Violation(f"closed, and connections are open: {[end.number for end in self.network.open_ends()]}")
        if self.network.server.sessions:
            raise Violation("closed, and the server has sessions")
        if left := self.dispatcher.waiting():
            raise Violation(f"closed, and these have not ended: {left}")
        self.dispatcher.kill()  # its threads are idle, and would be kept

    def _settle(self) -> None:
        """End the faults: every call must end, every event must be delivered, and reads must find the right values."""
        until = self.dispatcher.monotonic() + QUIET_S
        while (self.running or self.open_calls) and self.dispatcher.monotonic() < until:
            self._step()
        if self.open_calls:
            raise Violation(f"these do not end: {list(self.open_calls.values())}")
        self.dispatcher.advance(1.0)
        for life in self.lives:
            life.engine.drain(QUIET_S)
            if self.shares_events:
                self.dispatcher.advance(QUIET_S)  # those of other engines are not waited for
            life.check_told()
            for scope in SCOPES:
                state = self.truth.states[scope][-1]
                values = [msgspec.json.decode(state[key]) for key in sorted(state)]
                if life.patiently(lambda: life.engine.list(scope)) != values:  # noqa: B023 - called here
                    raise Violation(f"engine {life.number}: list({scope!r}) is not {values}")
            self.dispatcher.run_until_idle()
        self.dispatcher.advance(5.0)
        for life in self.lives:
            life.check_rest()

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise Violation(f"no end after {self._steps} steps; waiting: {self.dispatcher.waiting()}")
        dispatcher = self.dispatcher
        if not dispatcher._ready and not any(worker.can_go(dispatcher.monotonic()) for worker in dispatcher._parked):
            for life in self.lives:
                life.check_awake()
        if not dispatcher.step() and self.open_calls:
            raise Violation(f"nothing is left to run, but these wait: {list(self.open_calls.values())}")
        self.check()

    def check(self) -> None:
        """Raise the first error, if any."""
        if self._problem is not None:
            raise self._problem

    def _happen(self) -> None:
        """Let something happen from outside, or nothing, at random."""
        draw, network = self.random, self.network
        server, chance = network.server, draw.random()
        if chance > 0.05:
            return
        if chance < 0.01:
            self.dispatcher.advance(draw.random() * 0.2)
        elif chance < 0.02:
            scopes = [scope for life in self.lives for scope in life.engine._scopes.values()]
            if scopes:
                scope = draw.choice(scopes)
                self.note(lambda: f"passivate {scope.scope}")
                self.dispatcher.submit(lambda: scope.housekeep_now(Passivate()))
        elif chance < 0.03:
            what = draw.choice(("loading", "readonly", "full"))
            setattr(server, what, not getattr(server, what))
            self.note(lambda: f"the server is {what}: {getattr(server, what)}")
        elif chance < 0.035:
            self.note(lambda: "the server forgets its scripts")
            server.scripts.clear()
        elif chance < 0.04 or network.is_down:
            self._mend()
        elif draw.random() < 0.5:
            self.note(lambda: "the server ends")
            network.go_down()
        elif ends := network.open_ends():
            draw.choice(ends).cut("by chance")

    def _mend(self) -> None:
        server = self.network.server
        server.loading = server.readonly = server.full = False
        if self.network.is_down:
            self.note(lambda: "the server is back")
            self.network.come_back()

    def _before(self, session: Session, parts: list[bytes]) -> bool:
        """A command is about to be executed: another program may write before it."""
        self._engine_at_server = self.network.engine_of(session)
        server = self.network.server
        is_well = not (server.loading or server.readonly or server.full)
        is_script = parts[0] in (b"EVALSHA", b"EVAL")
        if (
            (is_script or parts[0] in (b"HGET", b"HGETALL"))
            and is_well
            and self.network.happens(self.network.faults.rival)
        ):
            hash_key = parts[3] if is_script else parts[1]
            scope, key = hash_key.decode().removeprefix("state:"), self.random.choice(KEYS)
            value = encode({"id": self.next_id(), "rival": True})
            old = server.do("HGET", hash_key, key)
            server.do("HSET", hash_key, key, value)
            self.note(lambda: f"a rival writes {scope}/{key}: {value!r}")
            with self.watching():
                self.truth.wrote(scope, key, old, value, 0)
        return True

    def _wrote(self, hash_key: bytes, field: bytes, old: bytes | None, new: bytes | None) -> None:
        scope, key = hash_key.decode().removeprefix("state:"), field.decode()
        self.note(lambda: f"the server writes {scope}/{key}: {old!r} -> {new!r}")
        with self.watching():
            self.truth.wrote(scope, key, old, new, self._engine_at_server)

    def abandon(self) -> None:
        """After a failure: end everything that still runs."""
        self.dispatcher.kill()
        for life in self.lives:
            life.ended = True
            lifecycle.release(life.engine)
            life.engine.disown()
            life.engine._parts.loop_thread.close()


@contextlib.contextmanager
def played() -> Iterator[None]:
    """Make the Redis backend take its threads and its time from the world that runs."""
    logger = logging.getLogger("scopestate")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)  # the faults are meant, and a thousand runs would fill a disk
    try:
        with (
            PLAY.in_modules(owner, pump, watch, redis_owner, events, reading, tail, commands),
            mock.patch.object(watch, "os", types.SimpleNamespace(dup=lambda fd: fd, close=lambda fd: None)),
            mock.patch.object(Engine, "_close_behind_this", _never_ends),
        ):
            yield
            gc.collect()  # what let go of its file descriptor later would let go of the system's
    finally:
        logger.setLevel(level)


def _never_ends(engine: Engine) -> None:
    raise Violation("close() waits for what does not end")


def simulate(seed: int, *, trace: bool = False) -> Failure | None:
    """Run one seed, within `played()`. Returns what went wrong, or None."""
    world = World(seed, trace=trace)
    try:
        world.run()
    except Exception as error:  # noqa: BLE001 - whatever escapes from an engine is what the seeds look for
        world.abandon()
        problem = str(error) if isinstance(error, Violation) else "".join(traceback.format_exception(error))
        return Failure(seed, problem, world.trace or [])
    return None


def _json(value: Any) -> bytes | None:
    return None if value is None else encode(value)
