"""What callers, events, health() and the disk say while the store fails, and after: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from reliability.living import PATIENCE_S, Seen
from stored import values_of

from scopestate import Engine
from scopestate.actors.scope import Passivate
from scopestate.errors import StorageError
from scopestate.persistence import FileAdapter, ScopeChange, ScopeState
from scopestate.persistence.sqlite.database import connect
from scopestate.persistence.sqlite.reading import StoreReader

OpenEngine = Callable[..., Engine]
ADD = [{"type": "increment", "path": "", "by": 1}]


class Faulty(FileAdapter):
    """A store that fails where the test says."""

    fault: StorageError | None = None
    fails: frozenset[str] = frozenset()

    def break_(self, *what: str) -> None:
        self.fault = StorageError("the disk is full, says the test")
        self.fails = frozenset(what)

    def mend(self) -> None:
        self.fails = frozenset()

    def _pass(self, what: str) -> None:
        if what in self.fails:
            assert self.fault is not None
            raise self.fault

    def load(self, scope: str) -> ScopeState:
        self._pass("load")
        return super().load(scope)

    def scopes(self) -> list[str]:
        self._pass("scopes")
        return super().scopes()

    def save(self, batch: Sequence[ScopeChange]) -> None:
        self._pass("save")
        super().save(batch)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def adapter(store: Path) -> Faulty:
    return Faulty(store, busy_timeout_ms=30)


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for what the engine does by itself."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S * 200)):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it never came to that")


def on_disk(store: Path) -> dict[str, list[tuple[str, bytes]]]:
    adapter = FileAdapter(store)
    try:
        assert adapter.check() == []
        return {scope: list(values_of(adapter.load(scope)).items()) for scope in sorted(adapter.scopes())}
    finally:
        adapter.close()


# --- commit: the callers are told ------------------------------------------------------------------------------------


def make(engine: Engine, name: str) -> Callable[[], Any]:
    return {
        "set": lambda: engine.set("s", "k", 2),
        "update": lambda: engine.update("s", "k", ADD),
        "delete": lambda: engine.delete("s", "k"),
        "call": lambda: engine.call("state::set", {"scope": "s", "key": "k", "value": 2}),
        "aio.set": lambda: asyncio.run(engine.aio.set("s", "k", 2)),
        "aio.update": lambda: asyncio.run(engine.aio.update("s", "k", ADD)),
        "aio.delete": lambda: asyncio.run(engine.aio.delete("s", "k")),
        "create": lambda: engine.set("new", "k", 2),
    }[name]


WRITES = {
    "set": "SET_ERROR", "update": "UPDATE_ERROR", "delete": "DELETE_ERROR", "call": "SET_ERROR", "aio.set": "SET_ERROR",
    "aio.update": "UPDATE_ERROR", "aio.delete": "DELETE_ERROR", "create": "SET_ERROR",
}  # fmt: skip


@pytest.mark.parametrize(("name", "code"), WRITES.items())
def test_commit_a_write_that_cannot_be_saved_fails_and_leaves_memory_disk_and_events_agreeing(
    open_engine: OpenEngine, adapter: Faulty, store: Path, name: str, code: str
) -> None:
    engine = open_engine("commit", adapter=adapter, save_interval_ms=3_600_000)
    seen = Seen()
    engine.on_change()(seen)
    engine.set("s", "k", 1)
    adapter.break_("save")

    for _ in range(3):
        with pytest.raises(StorageError, match="the disk is full") as caught:
            make(engine, name)()
        assert caught.value.code == code

    assert engine.get("s", "k") == 1
    assert engine.list("s") == [1]
    assert engine.list_groups() == ["s"]
    assert not engine.health().ok
    adapter.mend()
    make(engine, name)()
    engine.drain(PATIENCE_S)
    assert engine.health().ok
    assert len(seen.events) == 2
    assert [event.revision for event in seen.events] == ([1, 1] if name == "create" else [1, 2])
    memory = {scope: engine.list(scope) for scope in engine.list_groups()}
    engine.close()
    assert {scope: len(values) for scope, values in on_disk(store).items()} == {
        scope: len(values) for scope, values in memory.items()
    }


def test_commit_a_transaction_that_cannot_be_saved_leaves_nothing_of_it(
    open_engine: OpenEngine, adapter: Faulty, store: Path
) -> None:
    """Neither values, revisions and deadlines nor its kept answer: asked for again, it is done."""
    engine = open_engine("commit", adapter=adapter, save_interval_ms=3_600_000)
    seen = Seen()
    engine.on_change()(seen)
    engine.set("s", "a", 1, ttl=3600)
    engine.set("s", "b", 2)
    before = engine.entries("s"), engine.ttl("s", "a"), engine.keys("s")
    calls: list[int] = []

    def transfer(tx: Any) -> int:
        calls.append(1)
        tx.set("a", tx.get("a") + 1, ttl=60)
        tx.delete("b")
        tx.set("c", 3)
        return len(calls)

    adapter.break_("save")
    for _ in range(2):
        with pytest.raises(StorageError, match="the disk is full"):
            engine.transact("s", transfer, idempotency_key="i")
    with pytest.raises(StorageError, match="the disk is full"), engine.batch("s", idempotency_key="j") as batch:
        batch.set("a", 9)
        batch.touch("b", ttl=1)
    with pytest.raises(StorageError, match="the disk is full"):
        engine.touch("s", "a", ttl=1)

    assert (engine.entries("s"), engine.keys("s")) == (before[0], before[2])
    assert engine.ttl("s", "a") > 3000
    adapter.mend()
    assert engine.transact("s", transfer, idempotency_key="i") == 3
    assert engine.transact("s", transfer, idempotency_key="i") == 3, "the first answer"
    assert len(calls) == 3
    engine.drain(PATIENCE_S)
    assert [(event.key, event.revision) for event in seen.events] == [("a", 1), ("b", 2), ("a", 3), ("b", 4), ("c", 5)]
    engine.close()
    assert on_disk(store) == {"s": [("a", b"2"), ("c", b"3")]}


def test_interval_transactions_stay_queued_and_are_saved_whole_with_their_answers(
    open_engine: OpenEngine, adapter: Faulty, store: Path
) -> None:
    engine = open_engine("interval", adapter=adapter, save_interval_ms=5)
    adapter.break_("save")

    def add(tx: Any) -> int:
        tx.set("n", tx.get("n", 0) + 1)
        tx.set(f"only-{tx.get('n')}", 1, ttl=3600)
        tx.delete(f"only-{tx.get('n') - 1}")
        return int(tx.get("n"))

    for number in range(1, 30):
        assert engine.transact("s", add, idempotency_key=f"{number}") == number
        if number % 10 == 0:
            failed = engine.stats().failed_saves
            wait_until(lambda failed=failed: engine.stats().failed_saves > failed)  # a part of them waits for a new try
    with pytest.raises(StorageError, match="is in memory"):
        engine.set("s", "durable", 1, durable=True)
    adapter.mend()
    engine.set("s", "durable", 2, durable=True)

    with StoreReader(store) as reader:
        found = dict(reader.entries("s"))
        assert {key: entry.json for key, entry in found.items()} == {"n": b"29", "only-29": b"1", "durable": b"2"}
        assert found["only-29"].expires_ms is not None
        assert list(reader.answers("s")) == [f"{number}" for number in range(1, 30)]


def test_commit_a_reader_never_sees_what_was_not_saved(open_engine: OpenEngine, adapter: Faulty) -> None:
    engine = open_engine("commit", adapter=adapter)
    engine.set("s", "k", 0)
    stop = threading.Event()
    seen: set[Any] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(engine.get("s", "k"))
            seen.update(engine.list("s"))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, 100):
            if number % 2:
                adapter.break_("save")
                with pytest.raises(StorageError):
                    engine.set("s", "k", number)
            else:
                adapter.mend()
                engine.set("s", "k", number)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    adapter.mend()

    assert {value for value in seen if value % 2} == set()
    assert engine.get("s", "k") == 98


# --- interval: the data stays queued ---------------------------------------------------------------------------------


def test_interval_data_stays_queued_health_says_so_and_saving_resumes_by_itself(
    open_engine: OpenEngine, adapter: Faulty, store: Path
) -> None:
    engine = open_engine("interval", adapter=adapter, save_interval_ms=5)
    engine.set("s", "old", 1)
    engine.set("s", "gone", 1)
    engine.flush()
    adapter.break_("save")

    engine.set("s", "new", 2)
    engine.delete("s", "gone")
    wait_until(lambda: engine.stats().failed_saves >= 2)
    engine.update("s", "new", ADD)
    engine.set("other", "k", 1)

    assert engine.get("s", "new") == 3
    health = engine.health()
    assert not health.ok
    assert "the disk is full" in " ".join(health.problems)
    wait_until(lambda: engine.health().unsaved_scopes == 2)
    with pytest.raises(StorageError, match="the disk is full"):
        engine.flush()

    adapter.mend()
    wait_until(lambda: engine.health().ok and engine.stats().unsaved_scopes == 0)
    engine.close()
    assert on_disk(store) == {"other": [("k", b"1")], "s": [("old", b"1"), ("new", b"3")]}


def test_interval_a_close_that_cannot_save_says_so_and_may_be_tried_again(
    open_engine: OpenEngine, adapter: Faulty, store: Path
) -> None:
    engine = open_engine("interval", adapter=adapter, save_interval_ms=3_600_000)
    engine.set("s", "k", 1)
    adapter.break_("save")

    with pytest.raises(StorageError, match="call close"):
        engine.close()

    adapter.mend()
    engine.close()
    assert on_disk(store) == {"s": [("k", b"1")]}


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_a_load_that_fails_is_the_error_of_its_call_and_works_again_afterwards(
    open_engine: OpenEngine, adapter: Faulty, durability: str
) -> None:
    engine = open_engine(durability, adapter=adapter)
    engine.set("s", "k", 1)
    engine.flush()
    assert engine._scopes["s"].housekeep(Passivate())
    adapter.break_("load", "scopes")
    calls: dict[str, list[Callable[[], Any]]] = {
        "GET_ERROR": [
            lambda: engine.get("s", "k"),
            lambda: engine.call("state::get", {"scope": "s", "key": "k"}),
            lambda: asyncio.run(engine.aio.get("s", "k")),
        ],
        "SET_ERROR": [lambda: engine.set("s", "k", 2), lambda: asyncio.run(engine.aio.set("s", "k", 2))],
        "UPDATE_ERROR": [lambda: engine.update("s", "k", ADD), lambda: asyncio.run(engine.aio.update("s", "k", ADD))],
        "DELETE_ERROR": [lambda: engine.delete("s", "k"), lambda: asyncio.run(engine.aio.delete("s", "k"))],
        "LIST_ERROR": [lambda: engine.list("s"), lambda: asyncio.run(engine.aio.list("s"))],
        "LIST_GROUPS_ERROR": [engine.list_groups, lambda: asyncio.run(engine.aio.list_groups())],
    }

    for code, ways in calls.items():
        for call in ways:
            with pytest.raises(StorageError, match="the disk is full") as caught:
                call()
            assert caught.value.code == code

    adapter.mend()
    assert engine.get("s", "k") == 1
    assert engine.list_groups() == ["s"]
    assert engine.update("s", "k", ADD).new_value == 2


# --- real faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_a_full_database_refuses_or_queues_and_goes_on_when_there_is_room(
    open_engine: OpenEngine, store: Path, durability: str
) -> None:
    limit = ["PRAGMA max_page_count = 1073741823"]

    def limited(uri: str) -> sqlite3.Connection:
        connection = connect(uri)
        connection.execute(limit[0])
        return connection

    adapter = FileAdapter(store, connect=limited)
    engine = open_engine(durability, adapter=adapter, save_interval_ms=5)
    engine.set("s", "k", "small")
    engine.flush()
    assert adapter._writer is not None
    adapter._writer.execute("PRAGMA max_page_count = 10")

    if durability == "commit":
        with pytest.raises(StorageError, match="full") as caught:
            engine.set("s", "big", "x" * 200_000)
        assert caught.value.code == "SET_ERROR"
        assert engine.get("s", "big") is None
        engine.set("s", "k", "still goes")
    else:
        engine.set("s", "big", "x" * 200_000)
        wait_until(lambda: "full" in " ".join(engine.health().problems))

    adapter._writer.execute("PRAGMA max_page_count = 1073741823")
    if durability == "commit":
        engine.set("s", "big", "x" * 200_000)
    wait_until(lambda: engine.health().ok)
    engine.close()
    assert len(dict(on_disk(store)["s"])["big"]) == 200_002


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_a_directory_that_is_removed_while_the_engine_runs_gets_its_content_back_with_the_directory(
    open_engine: OpenEngine, store: Path, durability: str
) -> None:
    engine = open_engine(durability, save_interval_ms=5)
    engine.set("s", "before", 1)
    engine.flush()
    shutil.rmtree(store)

    if durability == "commit":
        with pytest.raises(StorageError, match="vanished"):
            engine.set("s", "during", 2)
    else:
        engine.set("s", "during", 2)
        wait_until(lambda: "vanished" in " ".join(engine.health().problems))
    store.mkdir()
    if durability == "commit":
        engine.set("s", "during", 2)
    wait_until(lambda: engine.health().ok)

    assert engine.list("s") == [1, 2]
    engine.close()
    assert on_disk(store) == {"s": [("before", b"1"), ("during", b"2")]}


@pytest.fixture
def other_process(store: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that opens a transaction on the database, and ends it when told to."""
    code = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for line in sys.stdin:\n"
        "    c.execute(line.strip())\n"
        "    print('done', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store / "state.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate()


def tell(process: subprocess.Popen[str], statement: str) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(statement + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_another_process_that_holds_the_database_delays_saving_and_harms_nothing_else(
    open_engine: OpenEngine, adapter: Faulty, store: Path, other_process: subprocess.Popen[str], durability: str
) -> None:
    engine = open_engine(durability, adapter=adapter, save_interval_ms=5)
    engine.set("s", "k", 1)
    engine.flush()
    tell(other_process, "BEGIN IMMEDIATE")

    if durability == "commit":
        with pytest.raises(StorageError, match="another process") as caught:
            engine.set("s", "k", 2)
        assert caught.value.code == "SET_ERROR"
        assert engine.get("s", "k") == 1
    else:
        engine.set("s", "k", 2)
        wait_until(lambda: not engine.health().ok)
        assert engine.get("s", "k") == 2
    assert engine.get("not in memory yet", "k") is None  # reading goes on
    tell(other_process, "ROLLBACK")
    if durability == "commit":
        engine.set("s", "k", 2)
    wait_until(lambda: engine.health().ok)
    engine.close()

    assert on_disk(store) == {"s": [("k", b"2")]}


def test_a_file_size_limit_of_the_process_is_a_clear_error_and_saving_resumes_when_it_is_raised(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("child_limit.py")), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["refused", "queued", "resumed"]
    disk = on_disk(tmp_path / "store")
    assert len(dict(disk["interval"])["big"]) == len(dict(disk["orders"])["big"]) == 2_000_002
