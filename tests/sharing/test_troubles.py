"""Directories that the next owner cannot open, tools, forks, and processes whose configurations differ."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Process, role_of, shared, wait_until
from typer.testing import CliRunner

from scopestate import Engine, StorageError
from scopestate.config import from_mapping
from scopestate.errors import NotConnected, StoreLocked
from scopestate.opening import open_for_tool
from scopestate.persistence.sharing import sockets
from scopestate.server import Server

Open = Callable[..., Engine]
Start = Callable[..., Process]


def test_the_health_of_a_follower_names_an_owner_that_is_stopped(open_engine: Open, start: Start) -> None:
    owner = start()
    engine = open_engine()
    owner.send(signal.SIGSTOP)

    wait_until(lambda: not engine.health().ok)
    assert f"kill -CONT {owner.pid}" in engine.health().problems[0]

    owner.send(signal.SIGCONT)
    wait_until(lambda: engine.health().ok)


def test_a_damaged_store_is_opened_by_no_follower(open_engine: Open, start: Start, directory: Path) -> None:
    owner, other = start(), start()
    engine = open_engine(connect_wait_ms=1000)
    engine.set("s", "k", 1)
    with pytest.raises(RuntimeError, match="KeyError"):
        owner.do("raise KeyError")  # it is at work, so nothing of the store is being written
    owner.send(signal.SIGSTOP)
    for name in ("state.db", "state.db-wal"):
        (directory / name).write_bytes(b"no database" * 1000)
    owner.kill()

    with pytest.raises(StorageError) as caught:
        engine.set("s", "k", 2)

    assert isinstance(caught.value.__cause__, NotConnected)
    assert "damaged" in str(caught.value) or "is gone" in str(caught.value)
    assert not engine.health().ok
    assert role_of(engine) == "follower"
    assert other.do("answer = engine.stats().sharing.role") == "follower"
    assert not (directory / "state.db").exists()  # it was set aside, and no empty one took its place


def test_a_directory_that_was_removed_is_not_made_again(open_engine: Open, start: Start, directory: Path) -> None:
    owner = start()
    engine = open_engine(connect_wait_ms=300)
    owner.send(signal.SIGSTOP)
    shutil.rmtree(directory)
    assert "was removed" in str(engine.health().problems)
    owner.kill()

    with pytest.raises(StorageError, match="is gone"):
        engine.set("s", "k", 1)
    assert not directory.exists()


def test_a_follower_goes_on_when_the_store_is_repaired(open_engine: Open, start: Start, directory: Path) -> None:
    owner = start()
    owner.do("engine.set('s', 'k', 1)")
    engine = open_engine(connect_wait_ms=300)
    owner.send(signal.SIGSTOP)
    kept = directory.with_name("kept")
    directory.rename(kept)
    owner.kill()
    with pytest.raises(StorageError, match="is gone"):
        engine.get("s", "k")

    kept.rename(directory)

    wait_until(lambda: role_of(engine) == "owner")
    assert engine.get("s", "k") == 1
    assert engine.health().ok


def test_a_failing_disk_of_the_owner_fails_the_writes_of_its_followers(open_engine: Open, start: Start) -> None:
    owner = start()
    engine = open_engine()
    engine.set("s", "k", 1)
    owner.do(
        "kept['save'] = type(engine._parts.backend.store).save\n"
        "def fail(*args): raise __import__('scopestate').StorageError('the disk is full')\n"
        "type(engine._parts.backend.store).save = fail"
    )

    with pytest.raises(StorageError, match="the disk is full"):
        engine.set("s", "k", 2)

    assert role_of(engine) == "follower"
    assert not owner.do("answer = engine.health().ok")
    owner.do("type(engine._parts.backend.store).save = kept['save']")
    engine.set("s", "k", 3)
    assert engine.get("s", "k") == 3


def test_a_forked_child_of_the_owner_keeps_no_follower_waiting(start: Start, open_engine: Open) -> None:
    owner = start()
    engine = open_engine()
    engine.set("s", "k", 1)
    child = owner.do(
        "import os, time, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "answer = os.fork()\n"
        "if not answer:\n"
        "    time.sleep(60)\n"
        "    os._exit(0)"
    )
    try:
        owner.kill()  # its child has copies of all its descriptors, and lives

        assert engine.get("s", "k") == 1
        wait_until(lambda: role_of(engine) == "owner")
        assert start().role == "follower"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_of_a_follower_does_not_keep_its_place(start: Start, open_engine: Open) -> None:
    engine = open_engine()
    follower = start()
    follower.do("engine.set('s', 'k', 1)")
    child = follower.do(
        "import os, time, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "answer = os.fork()\n"
        "if not answer:\n"
        "    time.sleep(60)\n"
        "    os._exit(0)"
    )
    try:
        follower.kill()

        wait_until(lambda: engine.stats().sharing.followers == 0)  # type: ignore[union-attr]
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_followers_of_a_process_are_two(open_engine: Open) -> None:
    engine, first, second = open_engine(), open_engine(), open_engine()
    first.set("s", "k", 1)
    second.set("s", "k", 2)

    status = engine.stats().sharing
    assert status is not None
    assert status.followers == 2


def test_a_value_of_any_size_goes_through(open_engine: Open) -> None:
    engine, follower = open_engine(), open_engine()
    large = "x" * (80 << 20)  # more than a message of a worker may take

    follower.set("s", "k", large)

    assert engine.get("s", "k") == large
    assert follower.get("s", "k") == large


def test_a_tool_follows_an_engine_and_lets_none_follow(directory: Path, open_engine: Open, start: Start) -> None:
    config = from_mapping(shared(directory))
    with Engine(config, adapter=open_for_tool(config)) as tool:
        process = start(wait=False)  # it waits for the end of the tool
        tool.set("s", "k", 1)
    assert process.wait_open() == "owner"

    with Engine(config, adapter=open_for_tool(config)) as tool:
        assert tool.get("s", "k") == 1
        tool.set("s", "k", 2)
    assert process.do("answer = engine.get('s', 'k')") == 2


def test_a_tool_that_stays_is_named(directory: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scopestate.sharing.OPEN_S", 0.3)
    config = from_mapping(shared(directory))
    with (
        Engine(config, adapter=open_for_tool(config)),
        pytest.raises(StoreLocked, match="command-line tool"),
    ):
        open_engine(connect_wait_ms=300)


def test_settings_that_differ_from_those_of_the_owner_are_named(
    open_engine: Open, caplog: pytest.LogCaptureFixture
) -> None:
    open_engine(durability="commit")
    with caplog.at_level(logging.WARNING, "scopestate.sharing"):
        open_engine(durability="commit")
    assert caplog.messages == []

    with caplog.at_level(logging.WARNING, "scopestate.sharing"):
        open_engine(durability="interval", scopes=[{"name": "a", "strict": True}])
    (warning,) = caplog.messages
    assert "`durability` and `scopes`" in warning


def test_an_owner_has_a_server_beside(open_engine: Open, start: Start) -> None:
    engine = open_engine()
    process = start()
    with Server(engine, port=0) as server:
        adapter = {"name": "bridge", "config": {"bridge_url": server.url}}
        bridge_config = {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}
        with Engine.from_config(bridge_config) as bridge:
            bridge.set("s", "k", 1)
        assert process.do("answer = engine.get('s', 'k')") == 1
        assert engine.call("engine::functions::list", {})["functions"]
    process.do("engine.set('s', 'k', 2)")
    assert engine.get("s", "k") == 2


def test_a_follower_has_a_server_too(open_engine: Open) -> None:
    open_engine()
    follower = open_engine()
    with Server(follower, port=0) as server:
        adapter = {"name": "bridge", "config": {"bridge_url": server.url}}
        bridge_config = {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}
        with Engine.from_config(bridge_config) as bridge:
            bridge.set("s", "k", 1)
    assert follower.get("s", "k") == 1


def test_a_process_of_another_user_is_refused(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setattr(sockets, "peer_user", lambda connected: 4711)
    monkeypatch.setattr("scopestate.sharing.OPEN_S", 0.3)
    open_engine()

    with pytest.raises(StoreLocked, match="does not answer"):
        open_engine(connect_wait_ms=300)
    monkeypatch.undo()
    assert role_of(open_engine()) == "follower"


def test_the_user_at_the_other_end_of_a_socket_is_known() -> None:
    ends = socket.socketpair()
    assert sockets.peer_user(ends[0]) == os.geteuid()
    for end in ends:
        end.close()


def test_a_file_with_an_address_that_others_may_write_is_not_used(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    file = directory / "state.address"
    file.write_text('{"url": "ws://127.0.0.1:1", "token": "x"}')
    file.chmod(0o666)
    with pytest.raises(NotConnected, match="other users may have written it"):
        sockets.find(str(directory))

    file.chmod(0o600)
    assert sockets.find(str(directory)).url == "ws://127.0.0.1:1"
    file.unlink()
    file.symlink_to("/etc/passwd")
    with pytest.raises(NotConnected, match="cannot read"):
        sockets.find(str(directory))


def test_a_directory_of_another_user_is_not_shared(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir(mode=0o700)
    assert sockets.why_not_private(str(directory)) is None
    if os.geteuid() == 0:
        os.chown(directory, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)

    assert "belongs to user" in str(sockets.why_not_private(str(directory)))


def test_the_command_line_reaches_a_directory_in_use(open_engine: Open, directory: Path) -> None:
    from scopestate.cli.app import app

    open_engine()
    done = CliRunner().invoke(app, ["consumers", "list", "--store", str(directory)])
    assert done.exit_code == 0, done.output


def test_an_owner_that_cannot_serve_says_so_and_tries_again(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problems = [OSError(24, "Too many open files")]

    def new_loop() -> asyncio.AbstractEventLoop:
        if problems:
            raise problems.pop()
        return asyncio.new_event_loop()

    monkeypatch.setattr("scopestate.server.server.new_loop", new_loop)
    owner = open_engine()

    other = open_engine()
    other.set("s", "k", 1)

    assert owner.get("s", "k") == 1
    assert "cannot be served" in caplog.text
    assert owner.health().ok


def test_an_owner_that_can_start_no_thread_works_alone_and_says_so(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "scopestate-owner":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    owner = open_engine()
    owner.set("s", "k", 1)

    with pytest.raises(StoreLocked, match="no thread can be started for"):
        open_engine()

    assert owner.get("s", "k") == 1
