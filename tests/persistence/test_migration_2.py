"""Stores that version 2 wrote: all of it is there afterwards, killed at any moment too, and the journal can be used."""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pytest

from scopestate.actors.journal import JournalSize, Pending
from scopestate.errors import StorageError
from scopestate.ops.results import StateEvent
from scopestate.persistence import FileAdapter, ScopeChange
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.persistence.sqlite.schema import RESERVED, VERSION

Open = Callable[..., FileAdapter]
Content = dict[str, list[Any]]
WRITTEN = Path(__file__).parent / "version2"
NAMES = ("interval", "crashed", "empty")


class Faults(Protocol):
    """The `faults` fixture of conftest.py."""

    def connect(self, uri: str) -> sqlite3.Connection: ...
    def fail_at(self, number: int, fault: BaseException) -> None: ...
    def heal(self) -> None: ...


def unpack(name: str, directory: Path) -> Content:
    """Put a store of version 2 into `directory`, and return what it holds."""
    directory.mkdir(mode=0o700)
    for file in WRITTEN.glob(f"{name}-*.gz"):
        target = directory / file.name.removeprefix(f"{name}-").removesuffix(".gz")
        target.write_bytes(gzip.decompress(file.read_bytes()))
        target.chmod(0o600)
    held: Content = json.loads((WRITTEN / f"{name}.json").read_text())
    return held


def loaded(adapter: FileAdapter, scopes: Content) -> Content:
    found: Content = {}
    for scope in scopes:
        state = adapter.load(scope)
        rows = [[key, row.json.decode(), row.revision, row.expires_ms] for key, row in state.entries.items()]
        found[scope] = [state.revision % RESERVED, rows, sorted(state.answers)]
    return found


def version(directory: Path) -> int:
    with sqlite3.connect(directory / "state.db") as tool:
        ((found,),) = tool.execute("PRAGMA user_version").fetchall()
    tool.close()
    return int(found)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_version_2_wrote_is_there(open_file: Open, directory: Path, name: str) -> None:
    written = unpack(name, directory)

    adapter = open_file()

    assert loaded(adapter, written) == written
    assert {adapter.load(scope).revision // RESERVED for scope in written} <= {int(name == "crashed")}
    assert adapter.check() == []
    assert adapter.journal.size() == JournalSize(0, 0, 0, 0)
    adapter.close()
    assert version(directory) == VERSION
    assert loaded(open_file(), written) == written


def test_the_journal_of_a_migrated_store_begins_behind_what_was_there(open_file: Open, directory: Path) -> None:
    written = unpack("interval", directory)
    adapter = open_file()
    last = written["users"][0]
    event = StateEvent("state:updated", "users", "k7", b"1", b"2", last + 1, transaction=last + 1, position=5)

    consumer = adapter.journal.create_consumer("c", "", 4, 0)
    adapter.journal.given = adapter.journal.settled = 5
    adapter.save([ScopeChange("users", last + 1, {}, due_ms=1, log=[event], logged_since=last)])

    assert adapter.journal.gone_in_scope("users", last) is None
    assert adapter.journal.gone_in_scope("users", last - 1) == "trimmed"
    assert [found.revision for found in adapter.journal.read_scope("users", last)] == [last + 1]
    assert (consumer.done, consumer.pending) == (4, dict[int, Pending]())
    assert adapter.check() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_shows_version_2_and_does_not_touch_it(directory: Path, name: str) -> None:
    written = unpack(name, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    with StoreReader(directory) as reader:
        found = {
            scope: [
                reader.revision(scope),
                [[key, one.json.decode(), one.revision, one.expires_ms] for key, one in reader.entries(scope)],
                sorted(reader.answers(scope)),
            ]
            for scope in reader.scopes(empty=True)
        }
        assert reader.problems() == []

    assert found == written
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_fault_at_any_statement_of_an_upgrade_leaves_a_whole_store(
    directory: Path, faults: Faults, io_error: sqlite3.Error
) -> None:
    written = unpack("interval", directory)
    seen = set()
    for number in count(1):
        faults.fail_at(number, io_error)
        try:
            FileAdapter(directory, connect=faults.connect).close()
            break
        except StorageError:
            seen.add(version(directory))
            with StoreReader(directory) as reader:
                assert reader.scopes(empty=True) == sorted(written)
                assert reader.problems() == []
    faults.heal()

    assert seen == {2, VERSION}
    adapter = FileAdapter(directory)
    assert loaded(adapter, written) == written
    adapter.close()


KILLED = """
import os, signal, sys
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.database import connect
steps = 0
def step():
    global steps
    steps += 1
    if steps == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return 0
def stepwise(uri):
    connection = connect(uri)
    connection.set_progress_handler(step, 20)
    return connection
FileAdapter(sys.argv[1], connect=stepwise)
os._exit(0)
"""


def test_killed_anywhere_in_an_upgrade_the_store_is_whole(
    tmp_path: Path, run_child: Callable[..., subprocess.Popen[str]]
) -> None:
    seen = set()
    for moment in (10, 60, 90, 120, 150, 180, 220, 10_000):
        place = tmp_path / f"killed-{moment}"
        written = unpack("interval", place)
        run_child(KILLED, str(place), str(moment)).wait(60)
        seen.add(version(place))

        adapter = FileAdapter(place)
        assert loaded(adapter, written) == written
        assert adapter.check() == []
        adapter.close()

    assert seen == {2, VERSION}
