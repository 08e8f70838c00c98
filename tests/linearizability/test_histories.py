"""Real histories: threads and asyncio tasks at once, all six functions, each adapter, while scopes come and go."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
from linearizability.history import History, run_clients
from linearizability.revised_history import RevisedHistory
from reliability.figures import record

from scopestate import Engine
from scopestate.actors.scope import Passivate
from scopestate.config import Config, KvOptions, from_mapping
from scopestate.errors import StorageError
from scopestate.ops import turns
from scopestate.persistence import FileAdapter, ScopeChange

SCOPES = ("a", "b", "")
KEYS = ("k", "l", "m")

totals: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    """Keep how much was checked, for docs/explanation/reliability.md."""
    totals.clear()
    yield
    record("linearizability", **totals)


@pytest.fixture(params=[1e-6, 1e-5, 1e-4], ids=["1us", "10us", "100us"])
def switch_interval(request: pytest.FixtureRequest) -> Iterator[float]:
    """How often the interpreter changes threads: the shorter, the more interleavings."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield request.param
    sys.setswitchinterval(before)


def config(directory: Path, **limits: Any) -> Config:
    kv = {"store_method": "file_based", "file_path": str(directory), "save_interval_ms": 1}
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    return from_mapping({"workers": [worker], "limits": limits})


def in_memory(directory: Path) -> Engine:
    return Engine()


def file_interval(directory: Path) -> Engine:
    return Engine(config(directory))


def file_commit(directory: Path) -> Engine:
    plain = config(directory)
    kv = KvOptions("file_based", str(directory), 1, "commit")
    return Engine(Config(type(plain.adapter)("kv", kv), limits=plain.limits))


ADAPTERS = {"in_memory": in_memory, "file_interval": file_interval, "file_commit": file_commit}


@pytest.fixture(params=ADAPTERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    engine = ADAPTERS[request.param](tmp_path / "store")
    yield engine
    engine.close()


class Disturber(threading.Thread):
    """Passivates scopes, and reloads the configuration, for as long as the clients are at it."""

    def __init__(self, engine: Engine, history: History) -> None:
        super().__init__(name="disturber")
        self.engine = engine
        self.history = history
        self.may_begin = history.may_begin
        self.stop = threading.Event()
        self.passivated = 0

    def run(self) -> None:
        engine, directory = self.engine, self.engine._scopes
        rounds = 0
        while not self.stop.wait(0.001):
            rounds += 1
            self.may_begin.clear()
            with contextlib.suppress(StorageError):
                engine.flush()
            # Some while only the calls that had begun are there, the others while everybody comes back at once.
            for place, actor in enumerate(shuffled(list(directory.values()))):
                if place:
                    self.may_begin.set()
                self.passivated += actor.housekeep_now(Passivate()) is True
            self.may_begin.set()
            self.history.rounds = rounds
            if rounds % 20 == 0:
                before = engine._parts.config
                limits = msgspec.structs.replace(before.limits, max_event_depth=1000 + rounds)
                engine.reconfigure(msgspec.structs.replace(before, limits=limits))

    def __enter__(self) -> Self:
        self.history.rounds = 0
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.join(30)
        self.history.rounds = None


def shuffled(actors: list[Any]) -> list[Any]:
    return random.sample(actors, len(actors))


def record_history(
    engine: Engine, *, threads: int, tasks: int, calls: int, seed: int, kind: type[History] = History
) -> History:
    history = kind(engine, SCOPES, KEYS)

    async def loop() -> None:
        await asyncio.gather(*(history.task(seed + 100 + n, calls, f"task-{n}") for n in range(tasks)))

    with Disturber(engine, history) as disturber:
        run_clients([history.thread(seed + n, calls, f"thread-{n}") for n in range(threads)], loop)
    if engine._parts.backend.keeps:
        assert disturber.passivated > 0
    totals.update(histories=1, calls=len(history), passivations=disturber.passivated)
    return history


def test_every_history_is_linearizable(engine: Engine, switch_interval: float) -> None:
    history = record_history(engine, threads=4, tasks=4, calls=300, seed=random.randrange(10**9))

    history.check()
    assert history.refused == []


def test_every_history_with_conditions_and_transactions_is_linearizable(engine: Engine, switch_interval: float) -> None:
    seed = random.randrange(10**9)
    history = record_history(engine, threads=3, tasks=3, calls=250, seed=seed, kind=RevisedHistory)

    history.check()
    assert history.refused == []
    assert isinstance(history, RevisedHistory)
    outcomes = history.outcomes()
    assert min(outcomes[f"{kind} {word}"] for kind in ("set_if", "pair") for word in ("written", "conflict")) > 10
    assert min(outcomes["compare_and_set swapped"], outcomes["compare_and_set missed"]) > 10


def test_every_event_shows_one_link_of_one_chain_per_key(engine: Engine, switch_interval: float) -> None:
    events: dict[str, list[Any]] = defaultdict(list)
    engine.register_function("test::note", lambda event: events[event.scope].append(event))
    engine.register_trigger(function_id="test::note")

    history = record_history(engine, threads=3, tasks=3, calls=100, seed=random.randrange(10**9))
    engine.drain(60)

    history.check()
    for scope in SCOPES:
        last: dict[str, bytes | None] = {}
        before = 0
        for event in events[scope]:
            if event.revision != before + 1:
                # A scope that is not kept may leave memory while it is empty, and comes back behind a gap.
                assert not engine._parts.backend.keeps
                assert event.revision > before
                assert not any(last.values()), "a gap while the scope held keys"
            before = event.revision
            assert event.old_json == last.get(event.key)
            last[event.key] = event.new_json
        assert last == {
            **dict.fromkeys(last),
            **{k: engine._scopes[scope].run(turns.Get(k)) for k in KEYS if k in last},
        }


class Flaky(FileAdapter):
    """A store in which every third save fails, whole."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.tries = 0
        self.works = False

    def save(self, batch: Sequence[ScopeChange]) -> None:
        self.tries += 1
        if self.tries % 3 == 0 and not self.works:
            raise StorageError("the disk is full, says the test")
        super().save(batch)


@pytest.mark.parametrize("kind", [History, RevisedHistory])
def test_a_write_whose_commit_failed_never_was(tmp_path: Path, switch_interval: float, kind: type[History]) -> None:
    adapter = Flaky(tmp_path / "store")
    kv = KvOptions("file_based", str(tmp_path / "store"), 1, "commit")
    plain = config(tmp_path)
    with Engine(Config(type(plain.adapter)("kv", kv)), adapter=adapter) as engine:
        history = record_history(engine, threads=4, tasks=4, calls=60, seed=random.randrange(10**9), kind=kind)
        adapter.works = True

        history.check()
        assert len(history.refused) > 10
        after = {scope: engine.list(scope) for scope in SCOPES}
    with Engine(Config(type(plain.adapter)("kv", kv))) as engine:
        assert {scope: engine.list(scope) for scope in SCOPES} == after


@pytest.mark.parametrize("kind", [History, RevisedHistory])
def test_a_call_that_was_cut_off_happened_once_or_not_at_all(
    tmp_path: Path, switch_interval: float, kind: type[History]
) -> None:
    engine = file_commit(tmp_path / "store")
    history = kind(engine, SCOPES[:1], KEYS[:2])

    def cuts() -> int:
        return sum(call.cut_off for _, call in history._calls)

    async def cut_off(seed: int) -> None:
        rng = random.Random(seed)
        for n in range(400):
            if n >= 40 and cuts() > 20:
                return
            task = asyncio.ensure_future(history.call_async(history.choose(rng), f"task-{seed}-{n}"))
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def loop() -> None:
        await asyncio.gather(cut_off(1), history.task(2, 80, "task"))

    with engine, Disturber(engine, history):
        run_clients([history.thread(n, 80, f"thread-{n}") for n in (3, 4)], loop)

    history.check()
    assert cuts() > 20


def test_the_checker_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same clients on a store that reads, then writes, without an actor around it."""
    values: dict[str, int] = {}

    class Careless:
        @staticmethod
        def update(scope: str, key: str, ops: Any) -> Any:
            old = values.get(key)
            barrier.wait(30)
            values[key] = new = (old or 0) + 1
            return type("Result", (), {"created": old is None, "old_value": old, "new_value": new})

    barrier = threading.Barrier(2)
    history = History(Careless(), ("a",), ("k",))  # type: ignore[arg-type]
    monkeypatch.setattr(history, "choose", lambda rng: ("update", "a", ("k", (("increment", 1),))))
    threads = [history.thread(n, 3, f"thread-{n}") for n in range(2)]

    async def nothing() -> None:
        return None

    run_clients(threads, nothing)

    with pytest.raises(AssertionError, match="not linearizable"):
        history.check()


def test_memory_only_scopes_stay_unless_they_were_never_written() -> None:
    with Engine() as engine:
        assert not engine._parts.backend.keeps
        engine.set("a", "k", 1)
        engine.get("b", "k")
        for actor in list(engine._scopes.values()):
            actor.housekeep(Passivate())

        assert list(engine._scopes) == ["a"]
        assert engine.get("a", "k") == 1
