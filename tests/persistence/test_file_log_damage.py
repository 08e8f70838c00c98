"""Damage of the write-ahead log: to SQLite it looks like a log whose end was never written."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import change

from scopestate import Engine
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.reading import StoreReader

COMMITS = 100
KILLED = """
import os, sys
from scopestate.persistence import Row, FileAdapter, ScopeChange
adapter = FileAdapter(sys.argv[1])
for number in range(1, int(sys.argv[2]) + 1):
    adapter.save([ScopeChange("s", number, {f"k{number}": Row(b"1", number, number)})])
os._exit(0)
"""
FRAME = 24 + 4096


@pytest.fixture(scope="module")
def killed_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose process was killed behind 100 commits."""
    directory = tmp_path_factory.mktemp("killed") / "store"
    subprocess.run([sys.executable, "-c", KILLED, str(directory), str(COMMITS)], check=True, timeout=60)
    assert (directory / "state.db-wal").stat().st_size > COMMITS * FRAME
    return directory


@pytest.fixture
def killed(killed_store: Path, directory: Path) -> Path:
    """A copy of it at `directory`; returns its log."""
    shutil.copytree(killed_store, directory)
    return directory / "state.db-wal"


def flip(log: Path, place: int) -> None:
    content = bytearray(log.read_bytes())
    content[place] ^= 1
    log.write_bytes(content)


def open_engine(directory: Path) -> Engine:
    adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(directory)}}
    return Engine.from_config({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the first frame": lambda log: flip(log, 32 + 24 + 2000),
    "a bit in the middle": lambda log: flip(log, 32 + 60 * FRAME + 100),
    "a bit of the last frame": lambda log: flip(log, log.stat().st_size - 10),
    "a bit of the header": lambda log: flip(log, 5),
    "a salt": lambda log: flip(log, 17),
    "a checksum": lambda log: flip(log, 32 + 50 * FRAME + 18),
    "its end is cut off": lambda log: os.truncate(log, log.stat().st_size - FRAME),
    "it is cut within a frame": lambda log: os.truncate(log, log.stat().st_size // 2 + 100),
    "it is empty": lambda log: os.truncate(log, 0),
    "it is gone": lambda log: log.unlink(),
    "it is zeros": lambda log: log.write_bytes(bytes(log.stat().st_size)),
    "it is noise": lambda log: log.write_bytes(os.urandom(log.stat().st_size)),
}


@pytest.mark.parametrize("shared_memory", ["kept", "gone"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_acknowledged_writes_that_the_log_has_lost_are_told(
    killed: Path,
    directory: Path,
    damage: Callable[[Path], object],
    shared_memory: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(killed)
    if shared_memory == "gone":  # as after a power cut
        (directory / "state.db-shm").unlink()
    found = killed.read_bytes() if killed.exists() else b""
    with StoreReader(directory) as reader:
        assert any("acknowledged writes are missing" in problem for problem in reader.problems())

    engine = open_engine(directory)
    keys = len(engine.list("s"))

    assert keys < COMMITS
    (problem,) = engine.health().problems
    assert problem.startswith(f"acknowledged writes are missing in {directory}/state.db: scope 's' is at write {keys}")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [problem]
    copies = list(directory.glob("state.db-wal.damaged-*"))
    assert [copy.read_bytes() for copy in copies] == ([found] if found else [])
    assert all(copy.stat().st_mode & 0o077 == 0 for copy in copies)
    engine.set("s", "new", 1)  # it goes on with what there is
    engine.close()
    with StoreReader(directory) as reader:
        said = reader.problems()
    assert len(said) == len(copies)
    assert all("acknowledged writes were lost before" in problem for problem in said)
    with open_engine(directory) as engine:
        assert engine.health().ok
        assert engine.get("s", "new") == 1


def test_a_sound_log_raises_no_alarm(killed: Path, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StoreReader(directory) as reader:
        assert reader.problems() == []
    with open_engine(directory) as engine:
        assert len(engine.list("s")) == COMMITS
        assert engine.health().ok
    assert caplog.records == []


def test_a_transaction_that_was_never_acknowledged_may_be_torn(
    killed: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The note is written behind the commit: what a crash has torn before that was not noted."""
    note = (directory / "state.lock").read_bytes()
    assert json.loads(note.splitlines()[1]) == ["s", COMMITS]
    (directory / "state.lock").write_bytes(note.replace(b'["s", 100]', b'["s", 99] '))
    os.truncate(killed, killed.stat().st_size - 100)

    with open_engine(directory) as engine:
        assert len(engine.list("s")) == COMMITS - 1
        assert engine.health().ok
    assert caplog.records == []


def test_an_older_database_in_the_place_of_ours_is_told(killed: Path, directory: Path, tmp_path: Path) -> None:
    other = FileAdapter(tmp_path / "older")
    other.save([change("s", 7, {"k": b"1"}, {"k": 1})])
    other.close()
    for name in ("state.db-wal", "state.db-shm"):
        (directory / name).unlink()
    (directory / "state.db").write_bytes((tmp_path / "older" / "state.db").read_bytes())

    with open_engine(directory) as engine:
        assert "scope 's' is at write 7, and write 100 had been saved" in engine.health().problems[0]


def test_a_clean_end_leaves_no_note(directory: Path) -> None:
    adapter = FileAdapter(directory)
    adapter.save([change("s", 1, {"k": b"1"}, {"k": 1})])
    assert len((directory / "state.lock").read_bytes().splitlines()) == 2

    adapter.close()

    assert len((directory / "state.lock").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("scope", ["", "s\n\0\"'", "\U0001f600" * 250, "x" * 251])
def test_the_note_holds_any_name_or_is_left_out(directory: Path, scope: str) -> None:
    adapter = FileAdapter(directory)
    adapter.save([change("before", 1, {"k": b"1"}, {"k": 1})])
    adapter.save([change(scope, 5, {"k": b"1"}, {"k": 1})])
    lines = (directory / "state.lock").read_bytes().splitlines()

    assert json.loads(lines[1]) == ([scope, 5] if len(scope) <= 250 else ["before", 1])
    with StoreReader(directory) as reader:  # while the engine runs
        assert reader.problems() == []
    adapter.close()


@pytest.mark.parametrize("note", [b"", b"[", b'["s"]', b"null", b'["s", "9"]', b"\xff\xff", b"[3, 4]"])
def test_a_note_that_cannot_be_read_is_no_note(killed: Path, directory: Path, note: bytes) -> None:
    first = (directory / "state.lock").read_bytes().splitlines()[0]
    (directory / "state.lock").write_bytes(first + b"\n" + note)

    with open_engine(directory) as engine:
        assert len(engine.list("s")) == COMMITS
        assert engine.health().ok
