"""A bridge that goes on with a backend of its own: what waits, what is under way, and what a program holds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from played_remote import PlayedRemote
from second_engine import PATIENCE_S

from scopestate import Engine, messages, ops
from scopestate.config import from_mapping
from scopestate.errors import EngineClosed, StorageError
from scopestate.persistence.local import LocalBackend
from scopestate.persistence.sqlite.adapter import FileAdapter


def in_memory() -> LocalBackend:
    return LocalBackend(None, lambda scope: "memory")


def in_files(path: Path) -> LocalBackend:
    return LocalBackend(FileAdapter(path), lambda scope: "commit" if scope.startswith("commit") else "interval")


@pytest.fixture
def remote() -> PlayedRemote:
    return PlayedRemote()


@pytest.fixture
def engine(remote: PlayedRemote) -> Iterator[Engine]:
    with Engine(from_mapping({"limits": {"close_grace_ms": 0}}), adapter=remote) as engine:
        yield engine


def begin(engine: Engine, message: messages.Message) -> Any:
    """Send a message without waiting; return the reply."""
    return engine.ask(message, block=False)


def test_calls_that_were_not_sent_go_to_the_new_backend_in_their_order(engine: Engine, remote: PlayedRemote) -> None:
    sent = begin(engine, messages.Set("s", "k", 0))
    waiting = [begin(engine, messages.Update("s", "k", [ops.Append("", number)])) for number in (1, 2)]
    read = begin(engine, messages.Get("s", "k"))
    remote.sent("set k")

    engine._parts.take_over(in_memory())

    with pytest.raises(StorageError, match="may have been applied"):
        sent.get(timeout=PATIENCE_S)
    assert [reply.get(timeout=PATIENCE_S).new_value for reply in waiting] == [[1], [1, 2]]
    assert read.get(timeout=PATIENCE_S) == [1, 2]
    assert engine.get("s", "k") == [1, 2]


def test_a_read_and_a_write_with_an_idempotency_key_that_were_under_way_are_done_by_the_new_backend(
    engine: Engine, remote: PlayedRemote
) -> None:
    read = begin(engine, messages.Get("s", "other"))
    write = begin(engine, messages.Set("s", "k", 1, idempotency_key="once"))
    remote.sent("get other", "set k")

    engine._parts.take_over(in_memory())

    assert read.get(timeout=PATIENCE_S) is None
    assert write.get(timeout=PATIENCE_S).created
    assert engine.scope("s").set("k", 1, idempotency_key="once").replayed


def test_what_a_program_holds_of_the_engine_goes_on(engine: Engine) -> None:
    events: list[Any] = []
    engine.on_change(scope="s")(events.append)
    handle, mapping = engine.scope("s"), engine.mapping("s")

    engine._parts.take_over(in_memory())

    handle.set("k", 1)
    mapping["other"] = 2
    engine.drain()
    assert [(event.key, event.new_value) for event in events] == [("k", 1), ("other", 2)]
    assert engine.stats().keys == 2
    assert engine.list_groups() == ["s"]


@pytest.mark.parametrize("scope", ["interval", "commit"])
def test_what_is_written_from_then_on_is_saved(engine: Engine, scope: str, tmp_path: Path) -> None:
    engine._parts.take_over(in_files(tmp_path / "store"))

    engine.scope(scope).set("k", 1)
    assert engine.scope(scope).set("d", 1, durable=True).created
    engine.close()

    store = FileAdapter(tmp_path / "store")
    assert {key: row.json for key, row in store.load(scope).entries.items()} == {"k": b"1", "d": b"1"}
    store.close()


def test_a_write_that_was_to_be_durable_is_so_in_the_new_backend(
    engine: Engine, remote: PlayedRemote, tmp_path: Path
) -> None:
    first = begin(engine, messages.Set("interval", "k", 0))
    durable = begin(engine, messages.Set("interval", "k", 1, durable=True))
    other = begin(engine, messages.Set("commit", "k", 0))
    gated = begin(engine, messages.Set("commit", "k", 1, durable=True))
    remote.sent("set k", "set k 2")

    engine._parts.take_over(in_files(tmp_path / "store"))

    with pytest.raises(StorageError):
        first.get(timeout=PATIENCE_S)
    with pytest.raises(StorageError):
        other.get(timeout=PATIENCE_S)
    assert durable.get(timeout=PATIENCE_S).created
    assert gated.get(timeout=PATIENCE_S).created
    assert engine._snapshot.waiting_scopes() == 0


def test_a_closed_engine_takes_nothing_over(remote: PlayedRemote) -> None:
    engine = Engine(adapter=remote)
    engine.close()

    with pytest.raises(EngineClosed):
        engine._parts.take_over(in_memory())


def test_a_store_that_fails_leaves_everything_as_it_was(
    engine: Engine, remote: PlayedRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = in_files(tmp_path / "store")
    assert bad.store is not None

    def fail() -> Any:
        raise StorageError("the disk is gone")

    assert bad.store.journal is not None
    monkeypatch.setattr(bad.store.journal, "consumers", fail)
    with pytest.raises(StorageError, match="the disk is gone"):
        engine._parts.take_over(bad)
    bad.close()

    read = begin(engine, messages.Get("s", "k"))
    remote.sent("get k")
    remote.answer("get k", 5)
    assert read.get(timeout=PATIENCE_S) == 5


def test_calls_of_many_threads_meet_a_take_over(engine: Engine, remote: PlayedRemote) -> None:
    done: dict[str, list[int]] = {}
    begun = threading.Barrier(9)

    def work(name: str) -> None:
        mine = done[name] = []
        begun.wait()
        for number in range(200):
            engine.tell(messages.Update("s", name, [ops.Append("", number)]))
            if number % 10 == 9:
                mine.append(len(engine.get("s", name)))

    def answer() -> None:
        begun.wait()
        engine._parts.take_over(in_memory())

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(8)]
    threads.append(threading.Thread(target=answer))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

    for name, lengths in done.items():
        values = engine.get("s", name)
        # What was sent before the take-over may be lost with its connection; the rest is there, once and in order.
        assert values == sorted(set(values))
        assert values[-1] == 199
        assert lengths == sorted(lengths)
