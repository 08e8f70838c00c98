"""Every interleaving of a few threads of control, on the real code.

The code runs in greenlets, which stop where it touches what threads share (`World.point`), waits (`World.wait`), or
meets something that may go either way (`World.choose`). From each state every next step is tried. A state that was seen
before is not followed again: a state is where each thread stands, with its local variables, and everything that can be
reached from them. So the result is the graph of all states, and the question whether rest can be reached from each.

What a state leaves out: values of an expression that is half evaluated, such as the iterator of a `for`.
"""

from __future__ import annotations

import functools
import types
from array import array
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, NamedTuple

import greenlet


class Step(NamedTuple):
    """What can happen next."""

    thread: Thread
    label: str
    outcome: Any = None
    is_certain: bool = True
    """It happens by itself, sooner or later: rest may be waited for over it. Faults are not."""
    raises: BaseException | type[BaseException] | None = None


class Thread:
    """One thread of control, at a point where it stands still."""

    def __init__(self, world: World, name: str, ident: int, work: Callable[[], object], *, can_be_cut: bool) -> None:
        self.name = name
        self.ident = ident
        self.can_be_cut = can_be_cut
        """A signal handler may raise KeyboardInterrupt in it, at any point."""
        self.label = "begins"
        self.is_over = False
        self.ready: Callable[[], bool] | None = None
        """While it waits: what for."""
        self.timeout: str | None = None
        """The budget that its wait may use up to end without that."""
        self.choices: tuple[tuple[str, Any, str | None], ...] = ()
        self.error: BaseException | None = None
        self._work = work
        self._world = world
        self.strand = greenlet.greenlet(self._run, world.driver)

    def _run(self) -> None:
        try:
            self._work()
        except greenlet.GreenletExit:
            raise
        except KeyboardInterrupt:
            pass
        except BaseException as error:  # noqa: BLE001 - the driver raises it
            self.error = error
        self.is_over = True


class Problem(AssertionError):
    """A run that went wrong, with the steps that led there."""


class World:
    """One run of a scenario: its threads, what may still go wrong, and what all of them share."""

    def __init__(self, budgets: dict[str, int]) -> None:
        self.driver = greenlet.getcurrent()
        self.threads: list[Thread] = []
        self.budgets = dict(budgets)
        """Name of a fault -> how often it may still happen."""
        self.roots: list[Any] = []
        """What states are made of, besides the threads' local variables."""
        self.is_at_rest: Callable[[], bool] = lambda: True
        """For the end of a run, and the question whether rest can be reached: does anything wait that should not?"""
        self.time_passes_amid = True
        """True: time may pass while threads can run. False: only while no thread can run, apart from faults."""
        self.left_out: frozenset[str] = frozenset()
        """Names of fields and local variables that make no difference: counters, and what never changes."""
        self.check: Callable[[], object] = lambda: None
        """Called in each state; raises what is wrong with it."""
        self._running: Thread | None = None
        self._is_over = False

    # ------------------------------------------------------------------------------------------- for the scenario

    def spawn(self, name: str, work: Callable[[], object], *, can_be_cut: bool = False) -> Thread:
        """Add a thread."""
        thread = Thread(self, name, len(self.threads) + 1, work, can_be_cut=can_be_cut)
        self.threads.append(thread)
        return thread

    def settle(self, thread: Thread) -> None:
        """Let a thread come to its first wait before anything else begins."""
        while thread.ready is None and not thread.is_over:
            self.take(Step(thread, thread.label, (True, None)))

    @property
    def current(self) -> Thread | None:
        """The thread that runs; None while the scenario is made."""
        return self._running

    def ident(self) -> int:
        """Stand in for `get_ident`."""
        thread = self.current
        return 0 if thread is None else thread.ident

    def point(self, label: str) -> None:
        """Another thread may go first."""
        thread = self.current
        if thread is not None and not self._is_over:
            thread.label = label
            self.driver.switch()

    def wait(self, label: str, ready: Callable[[], bool], timeout: str | None = None) -> bool:
        """Stop until `ready()`; False if that is given up, which takes from the budget of that name."""
        thread = self.current
        assert thread is not None, f"{label}: nothing else runs while the scenario is made"
        if self._is_over:
            raise greenlet.GreenletExit
        thread.label, thread.ready, thread.timeout = label, ready, timeout
        came = self.driver.switch()
        thread.ready = thread.timeout = None
        return bool(came)

    def choose(self, label: str, *choices: tuple[str, Any, str | None]) -> Any:
        """Go on with one of (what, value, budget that it takes from); return the value."""
        thread = self.current
        open_ = [choice for choice in choices if choice[2] is None or self.budgets.get(choice[2], 0)]
        if thread is None or self._is_over or len(open_) == 1:
            return open_[0][1]
        thread.label, thread.choices = label, choices
        chosen = self.driver.switch()
        thread.choices = ()
        return chosen

    # --------------------------------------------------------------------------------------------- for the explorer

    def steps(self) -> list[Step]:
        """What can happen now."""
        found: list[Step] = []
        late: list[Step] = []
        for thread in self.threads:
            if thread.is_over:
                continue
            if thread.choices:
                found += [
                    Step(thread, f"{thread.label}: {what}", (value, budget), budget is None)
                    for what, value, budget in thread.choices
                    if budget is None or self.budgets.get(budget, 0)
                ]
            elif thread.ready is None or thread.ready():
                found.append(Step(thread, thread.label, (True, None)))
            if thread.ready is not None and thread.timeout is not None:
                if thread.timeout == "time":  # it passes by itself
                    late.append(Step(thread, f"{thread.label}: time is over", (False, None)))
                elif self.budgets.get(thread.timeout, 0):
                    found.append(Step(thread, f"{thread.label}: gives up", (False, thread.timeout), False))
            if thread.can_be_cut and thread.label != "begins" and self.budgets.get("cuts", 0):
                found.append(Step(thread, f"{thread.label}: cut short", (None, "cuts"), False, KeyboardInterrupt))
        waits = any(step.is_certain for step in found) and not self.time_passes_amid
        return found if waits else [*found, *late]

    def take(self, step: Step) -> None:
        """Let one thread continue to its next point."""
        value, budget = step.outcome
        if budget is not None:
            self.budgets[budget] -= 1
        thread = self._running = step.thread
        if step.raises is not None:
            thread.ready = thread.timeout = None
            thread.choices = ()
            thread.strand.throw(step.raises)
        elif thread.label == "begins":
            thread.strand.switch()
        else:
            thread.strand.switch(value)
        self._running = None
        if thread.error is not None:
            raise thread.error

    def state(self) -> int:
        """Return a number that stands for the state."""
        picture = Picture(self.left_out)
        for thread in self.threads:
            if thread.is_over:
                picture.add("over")
                continue
            picture.add(thread.label)
            frame = thread.strand.gr_frame
            while frame is not None:
                code = frame.f_code
                if code.co_filename != __file__:
                    picture.add(code.co_qualname)
                    picture.add(frame.f_lasti)
                    for name, value in frame.f_locals.items():
                        if name not in self.left_out:
                            picture.add(name)
                            picture.add(value)
                frame = frame.f_back
        picture.add(sorted(self.budgets.items()))
        picture.add(self.roots)
        return picture.number()

    def end(self) -> None:
        """Let go of every thread."""
        self._is_over = True
        for thread in self.threads:
            if not thread.strand.dead and thread.strand.gr_frame is not None:
                thread.strand.throw(greenlet.GreenletExit)


class _Kind(Enum):
    """How a picture shows things of a type."""

    AS_IT_IS, BY_NAME, ITEMS, PAIRS, SET, FIELDS, METHOD, TEXT, TYPE = range(9)


# Looked at a million times in each run: names of this module are found more quickly than those of the class.
_AS_IT_IS, _BY_NAME, _ITEMS, _PAIRS = _Kind.AS_IT_IS, _Kind.BY_NAME, _Kind.ITEMS, _Kind.PAIRS
_SET, _FIELDS, _METHOD, _TEXT = _Kind.SET, _Kind.FIELDS, _Kind.METHOD, _Kind.TEXT
_PLAIN: Final = frozenset((type(None), bool, int, float, str, bytes))
_KINDS: Final[dict[type[Any], _Kind]] = {}
_SLOTS: Final[dict[type[Any], tuple[str, ...]]] = {}


def _kind_of(kind: type[Any]) -> _Kind:
    if issubclass(kind, (type(None), bool, int, float, str, bytes)):
        found = _Kind.AS_IT_IS
    elif issubclass(kind, (World, Thread, greenlet.greenlet)):
        found = _Kind.TYPE
    elif issubclass(kind, (list, tuple, deque)):
        found = _Kind.ITEMS
    elif issubclass(kind, (dict, types.MappingProxyType)):
        found = _Kind.PAIRS
    elif issubclass(kind, (set, frozenset)):
        found = _Kind.SET
    elif issubclass(kind, BaseException):
        found = _Kind.TEXT
    elif issubclass(kind, (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)):
        found = _Kind.BY_NAME
    elif issubclass(kind, types.MethodType):
        found = _Kind.METHOD
    else:
        _SLOTS[kind] = tuple(name for one in kind.__mro__ for name in getattr(one, "__slots__", ()))
        has_fields = hasattr(kind, "__dict__") and (_SLOTS[kind] or "__dict__" in dir(kind))
        found = _Kind.FIELDS if has_fields else _Kind.TYPE
    _KINDS[kind] = found
    return found


class Picture:
    """What a state is made of, as one flat list: same objects in the same places, same values."""

    def __init__(self, left_out: frozenset[str] = frozenset()) -> None:
        self._left_out = left_out
        self._parts: list[Any] = []
        self._known: dict[int, int] = {}
        self._kept: list[Any] = []

    def number(self) -> int:
        """Return 64 bits of it."""
        return hash(tuple(self._parts))

    def add(self, thing: Any) -> None:
        """Add a thing, with all that hangs on it."""
        parts = self._parts
        kind = type(thing)
        how = _KINDS.get(kind) or _kind_of(kind)
        if how is _AS_IT_IS:
            parts.append(thing)
            return
        known = self._known.get(id(thing))
        if known is not None:
            parts.append(("same as", known))
            return
        self._known[id(thing)] = len(self._known)
        self._kept.append(thing)  # or another one may get its id
        if how is _FIELDS:
            self._add_fields(kind, thing)
        elif how is _ITEMS:
            for part in thing:
                if type(part) in _PLAIN:
                    parts.append(part)
                else:
                    self.add(part)
        elif how is _PAIRS:
            for name, value in thing.items():
                self.add(name)
                self.add(value)
        elif how is _METHOD:
            parts.append(thing.__name__)
            self.add(thing.__self__)
        elif how is _BY_NAME:
            parts.append(thing.__name__)
        elif how is _SET:
            for part in sorted(thing, key=repr):
                self.add(part)
        elif how is _TEXT:
            parts.append(str(thing))
        parts.append(kind)

    def _add_fields(self, kind: type[Any], thing: Any) -> None:
        parts, left_out = self._parts, self._left_out
        for name in _SLOTS[kind]:
            if name not in left_out and hasattr(thing, name):
                self.add(getattr(thing, name))
        for name, value in getattr(thing, "__dict__", {}).items():
            if name not in left_out:
                parts.append(name)
                if type(value) in _PLAIN:
                    parts.append(value)
                else:
                    self.add(value)


class Graph(NamedTuple):
    """All states of a scenario."""

    states: int
    steps: int
    ends: int
    """States in which nothing can happen any more; each of them is at rest."""


def explore(scenario: Callable[[World], None], budgets: dict[str, int], *, most: int = 1_000_000) -> Graph:
    """Try everything that can happen; `budgets`: how often each fault may.

    Raises Problem, with the steps that lead there, for an error, a state from which rest cannot be reached without a
    fault, and a run that ends in anything but rest.
    """
    search = _Search(scenario, budgets, most)
    search.run()
    return search.graph()


class _Search:
    def __init__(self, scenario: Callable[[World], None], budgets: dict[str, int], most: int) -> None:
        self._scenario = scenario
        self._budgets = budgets
        self._most = most
        self._index: dict[int, int] = {}
        self._rests = bytearray()
        self._from, self._to = array("l"), array("l")
        """Steps that happen by themselves."""
        self._paths: list[tuple[int, int]] = []
        """State -> the state before it, and the number of the step from there."""
        self._count = self._ends = 0
        self._open: list[tuple[list[int], int, bool]] = [([], -1, True)]

    def run(self) -> None:
        while self._open:
            path, before, is_certain = self._open.pop()
            self._follow(path, before, is_certain=is_certain)
            if len(self._index) > self._most:
                raise AssertionError(f"more than {self._most} states")

    def _follow(self, path: list[int], before: int, *, is_certain: bool) -> None:
        world = World(self._budgets)
        labels: list[str] = []
        try:
            self._scenario(world)
            for number in path:
                self._take(world, world.steps()[number], labels)
            while True:
                state = world.state()
                here = self._index.get(state)
                is_new = here is None
                if here is None:
                    here = self._index[state] = len(self._index)
                    self._rests.append(world.is_at_rest())
                    self._paths.append((before, path[-1] if path else 0))
                if before >= 0:
                    self._count += 1
                    if is_certain:
                        self._from.append(before)
                        self._to.append(here)
                if not is_new:
                    return
                self._check(world, labels)
                steps = world.steps()
                if not steps:
                    self._ends += 1
                    if not world.is_at_rest():
                        raise Problem(_told("nothing can happen any more, and this is not rest", world, labels))
                    return
                for number in range(len(steps) - 1, 0, -1):
                    self._open.append(([*path, number], here, steps[number].is_certain))
                path = [*path, 0]
                before, is_certain = here, steps[0].is_certain
                self._take(world, steps[0], labels)
        finally:
            world.end()

    def _take(self, world: World, step: Step, labels: list[str]) -> None:
        labels.append(f"{step.thread.name}: {step.label}")
        try:
            world.take(step)
        except Exception as error:
            raise Problem(_told(f"{type(error).__name__}: {error}", world, labels)) from error

    def _check(self, world: World, labels: list[str]) -> None:
        try:
            world.check()
        except AssertionError as error:
            raise Problem(_told(str(error), world, labels)) from error

    def graph(self) -> Graph:
        """Look for states from which there is no way to rest."""
        count = len(self._index)
        backwards: list[list[int]] = [[] for _ in range(count)]
        for one, other in zip(self._from, self._to, strict=True):
            backwards[other].append(one)
        good = bytearray(self._rests)
        found = [state for state in range(count) if good[state]]
        while found:
            for one in backwards[found.pop()]:
                if not good[one]:
                    good[one] = 1
                    found.append(one)
        bad = [state for state in range(count) if not good[state]]
        if bad:
            path: list[int] = []
            state = bad[0]
            while state > 0:
                state, number = self._paths[state]
                path.append(number)
            raise Problem(self._retold(path[::-1], f"from {len(bad)} of {count} states rest cannot be reached"))
        return Graph(count, self._count, self._ends)

    def _retold(self, path: list[int], problem: str) -> str:
        world, labels = World(self._budgets), list[str]()
        try:
            self._scenario(world)
            for number in path:
                self._take(world, world.steps()[number], labels)
            return _told(problem, world, labels)
        finally:
            world.end()


def _told(problem: str, world: World, labels: list[str]) -> str:
    stand = [f"  {thread.name}: {'over' if thread.is_over else thread.label}" for thread in world.threads]
    return "\n".join([problem, "after", *(f"  {label}" for label in labels), "now", *stand])


# -------------------------------------------------------------------------------------------- what threads share


class SharedDict(dict[Any, Any]):
    """A dict at which other threads may go first: a claim. `get` has no point: it asks if the claim is one's own."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self.world = world
        self.name = name

    def __bool__(self) -> bool:
        self.world.point(f"{self.name}?")
        return len(self) > 0

    def setdefault(self, key: Any, default: Any = None, /) -> Any:
        self.world.point(f"{self.name}.setdefault")
        return super().setdefault(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self.world.point(f"{self.name}.pop")
        return super().pop(key, *default)

    def __setitem__(self, key: Any, value: Any, /) -> None:
        self.world.point(f"{self.name} = ...")
        super().__setitem__(key, value)

    def __delitem__(self, key: Any, /) -> None:
        self.world.point(f"del {self.name}")
        super().__delitem__(key)


class SharedDeque(deque[Any]):
    """A deque at which other threads may go first. One thread at a time takes from it, so that needs no points."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self.world = world
        self.name = name

    def __bool__(self) -> bool:
        self.world.point(f"{self.name}?")
        return len(self) > 0

    def append(self, thing: Any, /) -> None:
        self.world.point(f"{self.name}.append")
        super().append(thing)


class SharedList(list[Any]):
    """A list at which other threads may go first. One thread at a time takes from it; others only add to its end."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self.world = world
        self.name = name

    def __bool__(self) -> bool:
        self.world.point(f"{self.name}?")
        return len(self) > 0

    def __iadd__(self, things: Any, /) -> Any:
        self.world.point(f"{self.name} += ...")
        return super().__iadd__(things)

    def append(self, thing: Any, /) -> None:
        self.world.point(f"{self.name}.append")
        super().append(thing)

    def __setitem__(self, place: Any, value: Any, /) -> None:
        self.world.point(f"{self.name}[...] = ...")
        super().__setitem__(place, value)

    def __delitem__(self, place: Any, /) -> None:
        self.world.point(f"del {self.name}[...]")
        super().__delitem__(place)


@functools.cache
def sharing(kind: type[Any], *names: str) -> type[Any]:
    """Return the class with points at each read and change of these plain attributes of its instances."""

    def shared(name: str) -> property:
        def read(self: Any) -> Any:
            self.world.point(f"{name}?")
            return self.__dict__[name]

        def write(self: Any, value: Any) -> None:
            self.world.point(f"{name} = {value!r:.40}")
            self.__dict__[name] = value

        return property(read, write)

    return type(f"Shared{kind.__name__}", (kind,), {name: shared(name) for name in names})


class Latch:
    """Stands in for the lock at which a caller waits for its answer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_free = False

    def acquire(self, *arguments: Any, **options: Any) -> bool:
        came = self.world.wait("waits for its answer", lambda: self.is_free, "timeouts")
        if came:
            self.is_free = False
        return came

    def release(self) -> None:
        assert not self.is_free, "answered twice"
        self.world.point("answers")
        self.is_free = True
