"""One engine per directory (docs/reference/semantics.md 8.27), across processes, crashes and forks."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forking import beside_threads
from stored import change, values_of

from scopestate.errors import StorageError, StoreLocked, StoreUnusable
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.lock import StoreLock

Open = Callable[..., FileAdapter]
RunChild = Callable[..., subprocess.Popen[str]]

HOLD = """
import sys
from scopestate.persistence import FileAdapter
adapter = FileAdapter(sys.argv[1])
print("holding", flush=True)
sys.stdin.readline()
adapter.close()
print("released", flush=True)
"""


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_a_second_engine_in_this_process_is_refused(open_file: Open, directory: Path) -> None:
    open_file()

    with pytest.raises(StoreLocked, match=rf"in use by process {os.getpid()} \(this process\)"):
        open_file()


def test_the_same_directory_by_another_name_is_the_same_directory(
    open_file: Open, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file()
    (tmp_path / "link").symlink_to(directory)
    monkeypatch.chdir(directory)

    for name in (tmp_path / "link", directory / ".." / "store", Path()):
        with pytest.raises(StoreLocked):
            open_file(name)


def test_a_second_process_is_refused_and_told_who_holds_it(
    open_file: Open, directory: Path, run_child: RunChild
) -> None:
    child = run_child(HOLD, str(directory))
    assert line(child) == "holding"

    with pytest.raises(StoreLocked) as caught:
        open_file()

    text = str(caught.value)
    assert f"in use by process {child.pid} on {os.uname().nodename} since 2" in text
    assert str(directory) in text
    assert sys.executable in text or "-c" in text
    child.communicate("\n", timeout=60)
    open_file()


def test_a_killed_holder_blocks_nobody(open_file: Open, directory: Path, run_child: RunChild) -> None:
    child = run_child(HOLD, str(directory))
    assert line(child) == "holding"

    child.send_signal(signal.SIGKILL)
    child.wait(30)

    open_file()


def test_a_process_started_by_the_holder_does_not_inherit_the_lock(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        adapter.close()
        open_file()
    finally:
        child.communicate(b"\n", timeout=60)


def test_a_descriptor_shared_with_a_child_does_not_keep_the_lock(open_file: Open, directory: Path) -> None:
    """A process that is just being started still shares it: the lock must go when it is released, not later."""
    directory.mkdir()
    lock = StoreLock(str(directory / "state.lock"))
    shared = os.dup(lock._file.fileno())

    lock.release()

    StoreLock(str(directory / "state.lock")).release()
    os.close(shared)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', "\x00\xff"])
def test_a_lock_file_that_names_nobody_still_locks(open_file: Open, directory: Path, content: str) -> None:
    open_file()
    (directory / "state.lock").write_text(content)

    with pytest.raises(StoreLocked, match="in use by another process"):
        open_file()


def test_nonsense_left_in_the_lock_file_hinders_nobody(open_file: Open, directory: Path) -> None:
    directory.mkdir()
    (directory / "state.lock").write_text("nonsense")

    open_file()

    assert json.loads((directory / "state.lock").read_text())["pid"] == os.getpid()


def test_a_released_lock_names_nobody_but_remembers_the_store(open_file: Open, directory: Path) -> None:
    open_file().close()

    assert list(json.loads((directory / "state.lock").read_text())) == ["created"]


def test_a_failed_opening_releases_the_lock(open_file: Open, directory: Path) -> None:
    (directory / "state.db").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(StoreUnusable):
            open_file()


def test_a_lock_file_removed_while_it_is_taken_is_taken_anew(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two engines would each hold a lock on a file of the same name."""
    directory.mkdir()
    path = directory / "state.lock"
    opens = 0
    real_open = os.open

    def open_and_remove(name: str, *options: int) -> int:
        nonlocal opens
        descriptor = real_open(name, *options)
        opens += 1
        if opens == 1:
            path.unlink()
        if opens == 2:
            path.unlink()
            path.write_text("")
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_and_remove)
        lock = StoreLock(str(path))

    assert opens == 3
    assert lock.held()
    lock.release()
    lock.release()


def test_a_lock_that_cannot_be_written_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreUnusable, match=r"cannot write .*No space left on device"):
            StoreLock(str(directory / "state.lock"))

    lock = StoreLock(str(directory / "state.lock"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        lock.release()
    StoreLock(str(directory / "state.lock")).release()


# --- fork ------------------------------------------------------------------------------------------------------------


def in_forked_child(action: Callable[[], object]) -> list[str]:
    """Run `action` in a forked child that then ends as an interpreter does; return what it wrote."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        try:
            action()
            sender.send([])
        except StorageError as error:
            sender.send([str(error)])

    child = context.Process(target=run)
    with beside_threads():
        child.start()
    assert receiver.poll(30)
    result: list[str] = receiver.recv()
    child.join(30)
    assert child.exitcode == 0
    return result


def test_a_forked_child_is_refused_and_the_parent_goes_on(open_file: Open) -> None:
    adapter = open_file()
    adapter.save([change("s", 1, {"k": b"1"}, {"k": 1})])
    adapter.load("s")
    newer = change("s", 2, {"k": b"2"}, {})

    for action in (lambda: adapter.load("s"), adapter.scopes, lambda: adapter.save([newer])):
        (text,) = in_forked_child(action)
        assert f"belongs to process {os.getpid()}" in text
    assert in_forked_child(adapter.close) == []

    adapter.save([newer])
    assert values_of(adapter.load("s")) == {"k": b"2"}
    with pytest.raises(StoreLocked):
        open_file()


def test_in_another_process_nothing_is_touched_not_even_by_close(
    open_file: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as above seen from inside, with the process id pretended."""
    adapter = open_file()
    owner = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: owner + 1)
        with pytest.raises(StorageError, match=f"belongs to process {owner}"):
            adapter.scopes()
        adapter.close()

    assert adapter.scopes() == []


def test_a_forked_child_never_closes_the_parents_connections(open_file: Open, directory: Path) -> None:
    """The child drops its last reference, as at interpreter exit, after the parent closed and opened the store anew."""
    closed, close = os.pipe()
    parent = os.getpid()

    class Connection(sqlite3.Connection):
        def __del__(self) -> None:
            if os.getpid() != parent:
                os.write(close, b"x")

    adapter = open_file(
        connect=lambda uri: sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, factory=Connection
        )
    )
    adapter.save([change("s", 1, {"k": b"1"}, {"k": 1})])
    adapter.load("s")
    told, tell = os.pipe()
    with beside_threads():
        child = os.fork()
    if child == 0:
        os.close(tell)
        os.read(told, 1)
        adapter.__dict__.clear()
        gc.collect()
        os._exit(0)
    os.close(told)
    adapter.close()
    again = open_file()
    again.save([change("s", 2, {"k": b"2"}, {})])

    os.close(tell)
    assert os.waitpid(child, 0)[1] == 0

    os.set_blocking(closed, False)
    with pytest.raises(BlockingIOError):
        os.read(closed, 1)
    os.close(closed)
    again.save([change("t", 1, {"k": b"3"}, {"k": 1})])
    again.close()
    reopened = open_file()
    assert reopened.check() == []
    assert (values_of(reopened.load("s")), values_of(reopened.load("t"))) == ({"k": b"2"}, {"k": b"3"})
