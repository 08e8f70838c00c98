"""Which engine owns a directory, and which follow."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Process, role_of, shared

from scopestate import Engine
from scopestate.errors import ConfigError, StoreLocked, StoreUnusable
from scopestate.persistence.sharing import sockets
from scopestate.persistence.sqlite.adapter import FileAdapter

Open = Callable[..., Engine]
Start = Callable[..., Process]


def test_two_engines_of_a_process_have_one_state(open_engine: Open) -> None:
    first, second = open_engine(), open_engine()

    second.set("s", "k", {"n": 1})

    assert first.get("s", "k") == {"n": 1}
    assert (role_of(first), role_of(second)) == ("owner", "follower")


def test_another_process_follows(open_engine: Open, start: Start) -> None:
    engine = open_engine()
    process = start()

    assert process.role == "follower"
    process.do("engine.set('s', 'k', 'from there')")
    assert engine.get("s", "k") == "from there"
    status = engine.stats().sharing
    assert status is not None
    assert (status.owner_pid, status.followers) == (os.getpid(), 1)
    assert process.do("answer = engine.health().sharing.owner_pid") == os.getpid()


def test_sixteen_processes_that_start_at_once_have_one_owner(start: Start) -> None:
    processes = [start(wait=False) for _ in range(16)]
    roles = [process.wait_open() for process in processes]

    assert sorted(roles) == ["follower"] * 15 + ["owner"]
    for process in processes:
        process.begin("from scopestate import ops; engine.update('s', 'n', [ops.Increment('', 1)])")
    for process in processes:
        process.end()
    assert processes[0].do("answer = engine.get('s', 'n')") == 16


def test_what_is_in_the_directory_is_for_its_user_only(open_engine: Open, directory: Path) -> None:
    before = os.umask(0)
    try:
        open_engine()
    finally:
        os.umask(before)

    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "state.sock").stat().st_mode) == 0o600


def test_the_socket_is_gone_when_the_owner_is_closed(open_engine: Open, directory: Path) -> None:
    open_engine().close()

    assert not (directory / "state.sock").exists()


def test_a_socket_that_a_killed_owner_has_left_is_replaced(open_engine: Open, start: Start, directory: Path) -> None:
    start().kill()
    assert (directory / "state.sock").exists()

    open_engine()
    assert start().role == "follower"


def test_a_directory_that_others_may_enter_is_not_shared(open_engine: Open, start: Start, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    open_engine()

    refused = start().role
    assert refused.startswith("StoreLocked")
    assert f"this engine cannot: other users may enter {directory}" in refused
    assert f"chmod 700 {directory}" in refused
    assert not (directory / "state.sock").exists()


def test_never_refuses_a_second_engine(open_engine: Open) -> None:
    open_engine(share="never")

    with pytest.raises(StoreLocked, match=f"process {os.getpid()} does not share it: .*share: never.* started again"):
        open_engine()
    with pytest.raises(StoreLocked, match=r"this engine cannot: .*share: never"):
        open_engine(share="never")


def test_permissions_that_were_mended_count_when_the_owner_is_started_again(open_engine: Open, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    owner = open_engine()
    directory.chmod(0o700)
    with pytest.raises(StoreLocked, match=r"does not share it: .* takes effect when process \d+ is started again"):
        open_engine()

    owner.close()
    open_engine()
    assert role_of(open_engine()) == "follower"


def test_an_owner_whose_socket_was_removed_is_named(
    open_engine: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.sharing.OPEN_S", 0.3)
    open_engine()
    (directory / "state.sock").unlink()

    with pytest.raises(StoreLocked, match=r"does not answer on its socket: .* has none\. If its file was removed"):
        open_engine(connect_wait_ms=300)


def test_in_memory_there_is_nothing_to_share() -> None:
    kv = {"store_method": "in_memory", "share": "auto"}
    config = {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}

    with pytest.raises(ConfigError, match="only a directory can be shared"):
        Engine.from_config(config)


@pytest.mark.parametrize("library", ["picows", "websockets"])
def test_without_the_extra_the_second_engine_is_told(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr("scopestate.sharing._is_installed", lambda name: name != library)
    open_engine()

    with pytest.raises(StoreLocked, match=r"share: auto.*this engine cannot: .*pip install 'scopestate\[wire\]'"):
        open_engine()
    monkeypatch.undo()
    with pytest.raises(StoreLocked, match=r"process \d+ does not share it: .*pip install 'scopestate\[wire\]'"):
        open_engine()


def test_a_directory_with_a_long_path_is_shared(tmp_path: Path, open_engine: Open) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.parent.mkdir()
    with Engine.from_config(shared(directory)) as first, Engine.from_config(shared(directory)) as second:
        second.set("s", "k", 1)
        assert first.get("s", "k") == 1


def test_where_there_are_no_unix_sockets_a_token_is_needed(
    open_engine: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(directory: str) -> socket.socket:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(sockets, "_listen_unix", none)
    first, second = open_engine(), open_engine()

    second.set("s", "k", 1)

    assert first.get("s", "k") == 1
    assert role_of(second) == "follower"
    assert stat.S_IMODE((directory / "state.address").stat().st_mode) == 0o600


def test_a_store_that_another_program_has_opened_is_refused(directory: Path, open_engine: Open) -> None:
    store = FileAdapter(directory)
    try:
        with pytest.raises(StoreLocked, match="does not share it"):
            open_engine()
    finally:
        store.close()
    open_engine()


def test_a_file_system_without_locks_is_named(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("scopestate.persistence.sqlite.lock._lock", none)

    with pytest.raises(StoreUnusable, match="has no locks"):
        open_engine()
