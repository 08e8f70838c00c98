"""KeyboardInterrupt and signal handlers that raise, at every place of a caller's turn: each write is whole or not."""

from __future__ import annotations

import ctypes
import dis
import itertools
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, MemberDescriptorType
from typing import Any

import pytest
from effort import size
from reliability.conftest import OpenEngine
from reliability.figures import record
from reliability.interrupting import Interruption, interrupt_at
from reliability.living import PATIENCE_S, InThread, Seen, saved, until
from reliability.stretches import content

from scopestate import Engine, messages
from scopestate.actors import stretch as stretches
from scopestate.actors.local import LocalScope
from scopestate.errors import Conflict
from scopestate.ops.values import decode

# An exception that a signal handler raises inside a weakref callback (the standard library has some) is dropped by
# CPython, with this warning: whatever was interrupted then goes on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ERRORS = [KeyboardInterrupt, Interruption]
DURABILITIES = ["memory", "interval", "commit"]


def places_of(error: type[BaseException]) -> Iterator[int]:
    """Every place; in a run of the suite every other one, and those between them with the other error."""
    step = size(2, 1)
    return itertools.count(1 + ERRORS.index(error) % step, step)


Write = Callable[[Engine, str, int], Any]

WRITES: dict[str, Write] = {
    "set": lambda engine, key, number: engine.set("s", key, number),
    "set of a new key": lambda engine, key, number: engine.set("s", f"new-{number}", number),
    "update": lambda engine, key, number: engine.update("s", key, [{"type": "increment", "path": "", "by": 1}]),
    "delete": lambda engine, key, number: engine.delete("s", key),
    "ask": lambda engine, key, number: engine.ask(messages.Set("s", key, number)),
    "tell": lambda engine, key, number: engine.tell(messages.Set("s", key, number)),
    "scope handle": lambda engine, key, number: engine.scope("s").set(key, number),
    "touch": lambda engine, key, number: engine.touch("s", key, 600 + number),
    "pykka ref": lambda engine, key, number: engine.scope("s").actor_ref.ask(messages.Set("s", key, number)),
}


def scope_of(engine: Engine, scope: str = "s") -> LocalScope:
    actor = engine._scopes[scope]
    assert isinstance(actor, LocalScope)
    return actor


def state_of(actor: LocalScope) -> dict[str, Any]:
    return {key: decode(data) for key, data in content(actor).values.items()}


def replay(events: list[Any], state: dict[str, Any]) -> dict[str, Any]:
    """Do to `state` what the events say was done."""
    for event in events:
        assert event.old_value == state.get(event.key)
        assert event.existed is (event.key in state)
        if event.event_type == "state:deleted":
            state.pop(event.key, None)
        else:
            state[event.key] = event.new_value
    return state


def watched(engine: Engine, scope: str | None = "s") -> Seen:
    seen = Seen()
    engine.register_function("watch", seen)
    engine.register_trigger(function_id="watch", scope=scope)
    return seen


def check_agreement(engine: Engine, seen: Seen, *, start: dict[str, Any] | None = None) -> None:
    """Without another call to the engine: claim released, and events, memory and sequence agree."""
    actor = scope_of(engine)
    until(lambda: not actor._claim, "the claim is never released")
    until(lambda: not actor._mailbox, "a message is stuck")
    events = seen.wait_for(actor._sequence)
    assert [event.revision for event in events] == list(range(1, actor._sequence + 1))
    assert replay(events, start or {}) == state_of(actor)


# ------------------------------------------------------------------------------------------------- every single place


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_write_interrupted_at_any_opcode_has_wholly_happened_or_not_at_all(
    open_engine: OpenEngine, tmp_path: Path, durability: str, error: type[BaseException]
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k", 0)
    actor = scope_of(engine)
    places = 0
    for write in WRITES.values():
        for place in places_of(error):
            reached = interrupt_at(place, lambda: write(engine, "k", place), error)  # noqa: B023 - runs at once
            # The loss of one event, or a step of the sequence without its event, shows here: nothing else is called.
            until(lambda: not actor._claim and not actor._mailbox, f"stuck at opcode {place}")
            events = seen.wait_for(actor._sequence)
            assert len(events) == actor._sequence, f"an event twice, or without its write, at opcode {place}"
            if not reached:
                break
            places += 1
        check_agreement(engine, seen)
    engine.drain(PATIENCE_S)
    engine.flush()
    expected = actor._sequence, dict(content(actor).values)
    InThread(engine.close).result()
    if durability != "memory":
        assert saved(tmp_path / "store", "s") == expected
    record(f"interrupted at each opcode: {durability}, {error.__name__}", places=places)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_read_interrupted_at_any_opcode_leaves_the_scope_usable(
    open_engine: OpenEngine, durability: str, error: type[BaseException]
) -> None:
    engine = open_engine(durability)
    engine.set("s", "k", 1)
    for read in (
        lambda: engine.get("s", "k"),
        lambda: engine.get("s", "absent"),
        lambda: engine.list("s"),
        engine.list_groups,
        lambda: engine.ask(messages.Get("s", "k")),
    ):
        for place in places_of(error):
            reached = interrupt_at(place, read, error)
            until(lambda: not scope_of(engine)._claim, f"the claim is never released, at opcode {place}")
            if not reached:
                break
    assert engine.list("s") == [1]
    InThread(engine.close).result()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("durability", ["memory", "interval"])
def test_a_refused_write_interrupted_at_any_opcode_leaves_the_scope_usable(
    open_engine: OpenEngine, durability: str, error: type[BaseException]
) -> None:
    engine = open_engine(durability)
    engine.set("s", "k", 1)

    def refused() -> None:
        with suppress(Conflict):
            engine.set("s", "k", 2, if_revision=99)

    for place in itertools.count(1):
        reached = interrupt_at(place, refused, error)
        until(lambda: not scope_of(engine)._claim, f"the claim is never released, at opcode {place}")
        if not reached:
            break
    assert engine.list("s") == [1]
    InThread(engine.close).result()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_loading_a_scope_interrupted_at_any_opcode_can_be_tried_again(
    open_engine: OpenEngine, tmp_path: Path, durability: str, error: type[BaseException]
) -> None:
    with open_engine(durability) as before:
        for number in range(10):
            before.set("s", f"k{number}", number)
    engine = open_engine(durability)
    seen = watched(engine)
    for place in places_of(error):
        engine._scopes.pop("s", None)  # as after passivation
        reached = interrupt_at(place, lambda: engine.get("s", "k3"), error)
        assert InThread(lambda: engine.list("s")).result() == list(range(10)), f"at opcode {place}"
        if not reached:
            break
    engine.set("s", "k0", "after")
    assert seen.wait_for(1)[0].revision == 11
    InThread(engine.close).result()
    assert saved(tmp_path / "store", "s")[1]["k0"] == b'"after"'


@pytest.mark.parametrize("error", ERRORS)
def test_the_very_first_write_interrupted_at_any_opcode_still_gets_its_event_out(error: type[BaseException]) -> None:
    """The first event starts the engine's threads, on the caller's thread."""
    # An engine for each place, and threads: some of the opcodes, other ones in the other variant.
    for place in itertools.count(1 + ERRORS.index(error), size(6, 2)):
        with Engine() as engine:
            seen = watched(engine)
            reached = interrupt_at(place, lambda: engine.set("s", "k", 1), error)
            actor = scope_of(engine)
            assert len(seen.wait_for(actor._sequence)) == actor._sequence
            # And more threads come when the first one is blocked.
            gate = threading.Event()
            engine.register_function("block", lambda _, gate=gate: gate.wait(PATIENCE_S))
            engine.register_trigger(function_id="block", scope="blocking")
            engine.set("blocking", "k", 1)
            count = actor._sequence + 1
            engine.set("s", "k", 2)
            assert len(seen.wait_for(count)) == count
            gate.set()
        if not reached:
            return


@pytest.mark.parametrize(
    ("error", "filters"),
    [*((error, {"scope": "s"}) for error in ERRORS), (ERRORS[0], {"scope_prefix": "s", "prefix": "k"})],
)
def test_registering_interrupted_at_any_opcode_can_be_repeated(
    open_engine: OpenEngine, error: type[BaseException], filters: dict[str, Any]
) -> None:
    engine = open_engine()
    seen = Seen()
    engine.register_function("watch", seen)

    def register() -> None:
        engine.register_trigger(function_id="watch", trigger_id="t", **filters)

    def unregister() -> None:
        engine._router.triggers.unregister("t")

    for place in itertools.count(1):
        reached = interrupt_at(place, register, error)
        register()
        engine.set("s", "k", place)
        assert len(seen.wait_for(place)) == place, f"at opcode {place}"
        reached = interrupt_at(place, unregister, error) or reached
        if engine.triggers():
            unregister()
        engine.register_trigger(function_id="watch", scope="elsewhere").unregister()  # one that is left alone
        engine.set("s", "k", place)
        engine.drain(PATIENCE_S)
        assert len(seen.events) == place, f"at opcode {place}"
        if not reached:
            return


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("phase", ["snapshot", "missed", "waiting", "latest", "many"])
def test_reading_a_watch_interrupted_at_any_opcode_loses_no_change(
    open_engine: OpenEngine, phase: str, error: type[BaseException]
) -> None:
    engine = open_engine()
    scope = engine.scope("s")
    with scope.watch() as keeps, engine.watch() as keeps_many:
        begin, begin_many = keeps.cursor, keeps_many.cursor
        for number in range(5):
            scope.set(f"{number}", number)
        engine.drain(PATIENCE_S)
        keeps.get(PATIENCE_S)  # they have their positions
        for place in itertools.count(1):
            options: dict[str, Any] = {"since": begin_many if phase == "many" else begin}
            if phase == "snapshot":
                options = {}
            elif phase in ("waiting", "latest"):
                options = {"snapshot": False, "latest": phase == "latest"}
            watch = engine.watch if phase == "many" else scope.watch
            with watch(**options) as changes:
                expected = list(range(5))
                if phase in ("waiting", "latest"):
                    for number in expected:
                        scope.set(f"{number}", number)
                    while len(changes._watcher.pending or changes._watcher.newest or ()) < 5:
                        engine._router.wake_anyway()
                got: list[Any] = []
                reached = interrupt_at(place, lambda: got.append(changes.get(PATIENCE_S)), error)  # noqa: B023 - runs at once
                # The caller has what is noted as yielded: no signal is handled between the return and `append`.
                assert got == ([] if changes._last is None else [changes._last]), f"opcode {place}"
                left = expected[len(got) :]
                cursor = changes.cursor
                if phase != "snapshot":
                    with watch(since=cursor) as again:
                        assert [again.get(PATIENCE_S).value for _ in left] == left, f"opcode {place}"
                assert [changes.get(PATIENCE_S).value for _ in left] == left, f"opcode {place}"
            if not reached:
                break


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("durability", DURABILITIES)
def test_close_interrupted_at_any_opcode_can_be_repeated_and_loses_nothing(
    open_engine: OpenEngine, tmp_path: Path, durability: str, error: type[BaseException]
) -> None:
    step = size(29, 11)  # an engine and a store for each place: some of the opcodes, other ones in each variant
    start = 1 + DURABILITIES.index(durability) + 3 * ERRORS.index(error)
    for place in itertools.count(start, step):
        engine = open_engine(durability, folder=f"store-{place}")
        seen = watched(engine)
        engine.set("s", "k", place)
        reached = interrupt_at(place, engine.close, error)
        InThread(engine.close).result()
        assert engine.closed
        assert len(seen.events) == 1
        if durability != "memory":
            assert saved(tmp_path / f"store-{place}", "s") == (1, {"k": b"%d" % place}), f"at opcode {place}"
        if not reached:
            return


# -------------------------------------------------------------------------------------------------- the stretch itself

_PLACES_FOR_SIGNALS = ("CALL", "PRECALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "FOR_ITER", "SEND", "YIELD", "RESUME")


def _names(instruction: dis.Instruction) -> tuple[str, ...]:
    """Return the names that an instruction uses. CPython 3.13 and later have some that load or store two at once."""
    argval = instruction.argval
    return argval if isinstance(argval, tuple) else (argval,)


STRETCHES: list[tuple[str, set[str]]] = [
    ("_write", {"values", "revisions", "dirty", "outbox", "_incoming"}),
    ("_create", {"values", "revisions", "created", "deadlines", "dirty", "outbox", "_incoming", "_creations"}),
    ("_write_timed", {"values", "revisions", "deadlines", "dirty", "outbox", "_incoming"}),
    ("_write_deadline", {"deadlines", "dirty"}),
    ("_remove", {"values", "revisions", "created", "deadlines", "removed", "dirty", "outbox", "_incoming"}),
    (
        "_apply",
        {
            "values",
            "revisions",
            "created",
            "deadlines",
            "removed",
            "dirty",
            "answers",
            "unsaved",
            "outbox",
            "incoming",
            "_creations",
        },
    ),
    ("_write_all", {"values", "revisions", "created", "dirty", "outbox", "incoming", "_creations"}),
]
"""The methods that have one, and what it changes."""


def test_a_scope_that_takes_no_writes_refuses_every_stretch() -> None:
    assert {method for method, _ in STRETCHES} == set(stretches._COMMITS)


@pytest.mark.parametrize(("method", "changed"), STRETCHES)
def test_a_stretch_has_no_place_where_a_signal_could_come(method: str, changed: set[str]) -> None:
    """A call or a loop between these lines would give up that writes are whole (actors/stretch.py)."""
    instructions = list(dis.get_instructions(getattr(LocalScope, method)))
    [begin] = [place for place, found in enumerate(instructions) if _stores(found, "touched")]
    ends = [place for place, found in enumerate(instructions) if _stores(found, "_sequence")]
    if method == "_write_deadline":  # it gives no revision, and the deadline is the last that it changes
        assert ends == []
        ends = [place for place, found in enumerate(instructions) if found.opname == "STORE_SUBSCR"][-1:]
    [end] = ends
    stretch = instructions[begin : end + 1]
    assert changed | {"_registry"} <= {
        name for found in stretch if found.opname.startswith(("LOAD", "STORE")) for name in _names(found)
    }

    stretch, handler = _without_handler(stretch)
    assert len([found for found in handler if found.opname == "CALL"]) <= 1, "an undo of two steps can be cut in two"
    offending = [found for found in stretch if found.opname.startswith(_PLACES_FOR_SIGNALS)]
    assert [(found.opname, found.argval) for found in offending] == []
    # Nothing is changed before it: what stands there may be cut off.
    before = {found.opname for found in instructions[:begin] if found.opname.startswith(("STORE_SUBSCR", "DELETE"))}
    assert before == set()
    # Names read in the stretch are plain attributes: a property would be a call.
    attributes = {found.argval for found in stretch if found.opname in ("LOAD_ATTR", "STORE_ATTR", "LOAD_METHOD")}
    for name in attributes:
        assert _is_plain(getattr(LocalScope, name, None)), f"LocalScope.{name} has code behind it"


def _without_handler(found: list[dis.Instruction]) -> tuple[list[dis.Instruction], list[dis.Instruction]]:
    """Return the instructions without those of an exception handler, which CPython 3.11 has in between; and those."""
    names = [instruction.opname for instruction in found]
    if "PUSH_EXC_INFO" not in names:
        return found, []
    begin = names.index("PUSH_EXC_INFO")
    end = len(names) - names[::-1].index("RERAISE")
    return found[:begin] + found[end:], found[begin:end]


def _is_plain(attribute: object) -> bool:
    """Return whether code written in Python runs if the attribute is read or set: none does for a slot."""
    return type(attribute) is MemberDescriptorType or not hasattr(attribute, "__get__")


def _stores(instruction: dis.Instruction, attribute: str) -> bool:
    return instruction.opname == "STORE_ATTR" and instruction.argval == attribute


def test_the_tables_that_the_stretch_changes_are_plain_dicts_and_lists(open_engine: OpenEngine) -> None:
    for durability in DURABILITIES:
        engine = open_engine(durability, folder=durability)
        engine.set("s", "k", 1)
        actor = scope_of(engine)
        assert type(actor._values) is dict
        assert type(actor._registry) is dict
        assert type(actor._revisions) is dict
        assert type(actor._created) is dict
        assert type(actor._deadlines) is dict
        assert type(actor._removed) is dict
        assert type(actor._outbox) is list
        assert type(actor._incoming) is dict
        assert type(actor._dirty) in (dict, type(None))


# ---------------------------------------------------------------------------------------------------- at random, often


@contextmanager
def alarms(error: type[BaseException], seed: int, longest_us: int) -> Iterator[tuple[Callable[[], None], list[int]]]:
    """Real signals: yields a function that sets the next alarm at random, and a list that counts those that came."""
    moments = random.Random(seed)
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(1)
        raise error

    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, moments.randrange(1, longest_us) / 1e6), came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def any_call(engine: Engine, draw: random.Random, number: int) -> None:
    key = f"k{draw.randrange(5)}"
    match draw.randrange(6):
        case 0 | 1:
            engine.set("s", key, number)
        case 2:
            engine.update("s", key, [{"type": "set", "path": "n", "value": number}])
        case 3:
            engine.delete("s", key)
        case 4:
            engine.get("s", key)
        case _:
            engine.list("s")


def call_while(goes_on: Callable[[], bool], engine: Engine, draw: random.Random, calls: Iterator[int]) -> None:
    """Make calls while no signal has come; most signals raise.

    A function of its own: CPython 3.13.0 skips `except` and `finally` for a signal at the end of a loop inside `try`.
    """
    while goes_on():
        any_call(engine, draw, next(calls))


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without coverage's tracer: it has a lock that a signal in the middle of it leaves taken for ever.

    And without pytest's hook for what is raised where nobody can catch it, such as the callback that hypothesis gives
    the garbage collector: there too a signal comes now and then.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    tracer, for_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]  # None takes it away, as for sys.settrace
    yield
    threading.settrace(for_threads)  # type: ignore[arg-type]  # as above
    sys.settrace(tracer)


@pytest.mark.usefixtures("untraced")
@pytest.mark.timeout(method="thread")  # the other method needs the timer that is used here
@pytest.mark.parametrize(
    ("durability", "error", "interruptions"),
    [
        ("memory", KeyboardInterrupt, 5000),
        ("interval", Interruption, 5000),
        ("commit", KeyboardInterrupt, 1000),
        ("commit", Interruption, 1000),
    ],
)
def test_signals_at_random_moments_leave_state_sequence_and_events_in_agreement(
    open_engine: OpenEngine, tmp_path: Path, durability: str, error: type[BaseException], interruptions: int
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k0", 0)
    draw = random.Random(f"{durability} {error.__name__}")
    calls = itertools.count(1)
    with alarms(error, seed=interruptions, longest_us=1500 if durability == "commit" else 150) as (set_alarm, came):
        while (before := len(came)) < interruptions:
            try:
                set_alarm()
                call_while(lambda: len(came) == before, engine, draw, calls)
            except error:
                if before % 250 == 0:
                    seen.wait_for(scope_of(engine)._sequence)  # or a full mailbox makes the writers wait
    check_agreement(engine, seen)
    InThread(lambda: engine.drain(PATIENCE_S)).result()
    if durability != "memory":
        InThread(engine.flush).result()
    actor = scope_of(engine)
    assert actor._sequence > 50
    expected = actor._sequence, dict(content(actor).values)
    InThread(engine.close).result()
    if durability != "memory":
        assert saved(tmp_path / "store", "s") == expected
    record(f"signals at random: {durability}, {error.__name__}", interruptions=len(came), calls=next(calls) - 1)


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Have `error` raised in a thread, as debuggers and time-limit libraries do."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("durability", DURABILITIES)
def test_exceptions_put_into_other_threads_leave_everything_in_agreement(
    open_engine: OpenEngine, tmp_path: Path, durability: str
) -> None:
    engine = open_engine(durability)
    seen = watched(engine)
    engine.set("s", "k0", 0)
    goal, came, numbers, over = 150, [0, 0], itertools.count(1), threading.Event()

    def work(which: int) -> None:
        draw = random.Random(which)
        while not over.is_set():
            try:
                while not over.is_set():
                    any_call(engine, draw, next(numbers))
            except Interruption:
                came[which] += 1

    def shielded(which: int) -> None:
        while not over.is_set():
            try:
                work(which)
            except Interruption:
                came[which] += 1

    threads = [InThread(lambda which=which: shielded(which)) for which in range(2)]  # type: ignore[misc]  # bound now
    pause, moments = threading.Event(), random.Random(7)
    deadline = time.monotonic() + PATIENCE_S
    while min(came) < goal and time.monotonic() < deadline:
        for caller in threads:
            raise_in(caller.thread, Interruption)
        pause.wait(moments.randrange(300) / 1e6)
    over.set()
    for caller in threads:
        caller.thread.join(PATIENCE_S)
        assert not caller.thread.is_alive()
    assert min(came) >= goal
    check_agreement(engine, seen)
    InThread(lambda: engine.drain(PATIENCE_S)).result()
    actor = scope_of(engine)
    expected = actor._sequence, dict(content(actor).values)
    InThread(engine.close).result()
    if durability != "memory":
        assert saved(tmp_path / "store", "s") == expected
    record(f"exceptions put into threads: {durability}", interruptions=sum(came))
