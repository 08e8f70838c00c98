"""Stores that version 1 wrote: all of it is there afterwards, and a migration that does not end changes nothing."""

from __future__ import annotations

import gzip
import json
import sqlite3
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest

from scopestate.errors import StorageError, StoreCorrupt
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite import migration
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.persistence.sqlite.schema import RESERVED, VERSION

Open = Callable[..., FileAdapter]
Content = dict[str, tuple[int, list[tuple[str, str]]]]
WRITTEN = Path(__file__).parent / "version1"
NAMES = ("interval", "commit", "crashed", "positions", "names", "empty")
TOO_HIGH = "high"
"""The scope of `positions` whose numbers cannot be held."""


class Faults(Protocol):
    """The `faults` fixture of conftest.py."""

    statements: list[str]

    def connect(self, uri: str) -> sqlite3.Connection: ...
    def fail_at(self, number: int, fault: BaseException) -> None: ...
    def heal(self) -> None: ...


def unpack(name: str, directory: Path) -> Content:
    """Put a store of version 1 into `directory`, and return what it holds."""
    directory.mkdir(mode=0o700)
    for file in WRITTEN.glob(f"{name}-*.gz"):
        target = directory / file.name.removeprefix(f"{name}-").removesuffix(".gz")
        target.write_bytes(gzip.decompress(file.read_bytes()))
        target.chmod(0o600)
    held = json.loads((WRITTEN / f"{name}.json").read_text())
    return {scope: (number, [(key, value) for key, value in items]) for scope, (number, items) in held.items()}


def loaded(adapter: FileAdapter, scopes: Content) -> Content:
    states = {scope: adapter.load(scope) for scope in scopes}
    return {
        scope: (state.revision, [(key, entry.json.decode()) for key, entry in state.entries.items()])
        for scope, state in states.items()
    }


def shown(reader: StoreReader, scope: str) -> list[tuple[str, str]]:
    return [(key, entry.json.decode()) for key, entry in reader.entries(scope)]


def keys_of(content: Content) -> dict[str, list[tuple[str, str]]]:
    return {scope: items for scope, (_, items) in content.items()}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "state.lock"}


def version(directory: Path) -> int:
    return int.from_bytes((directory / "state.db").read_bytes()[60:64], "big")


@pytest.mark.parametrize("name", NAMES)
def test_all_that_version_1_wrote_is_there(open_file: Open, directory: Path, name: str) -> None:
    written = unpack(name, directory)

    adapter = open_file()

    assert keys_of(loaded(adapter, written)) == keys_of(written)
    assert sorted(adapter.scopes()) == sorted(scope for scope, (_, items) in written.items() if items)
    assert adapter.check() == []
    assert adapter.problem() is None
    adapter.close()
    assert version(directory) == VERSION
    assert sorted(path.name for path in directory.iterdir()) == ["state.db", "state.lock"]
    again = open_file()
    assert keys_of(loaded(again, written)) == keys_of(written)


@pytest.mark.parametrize("name", ["interval", "commit", "positions"])
def test_numbers_go_on_behind_those_of_version_1(open_file: Open, directory: Path, name: str) -> None:
    written = unpack(name, directory)
    written.pop(TOO_HIGH, None)

    adapter = open_file()

    for scope, (number, items) in written.items():
        state = adapter.load(scope)
        assert state.revision == max(number, len(items))
        assert all(entry.created <= entry.revision <= state.revision for entry in state.entries.values())


def test_numbers_that_a_killed_version_1_may_have_given_are_skipped(open_file: Open, directory: Path) -> None:
    written = unpack("crashed", directory)

    adapter = open_file()

    assert loaded(adapter, written) == {scope: (number + RESERVED, items) for scope, (number, items) in written.items()}


def test_numbers_above_53_bits_begin_anew_with_a_warning(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unpack("positions", directory)

    adapter = open_file()

    assert adapter.load(TOO_HIGH).revision == 3
    assert "scope 'high' had the number 9223372036854775807" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_shows_version_1_and_does_not_touch_it(directory: Path, name: str) -> None:
    written = unpack(name, directory)
    before = files(directory)

    with StoreReader(directory) as reader:
        scopes = reader.scopes()
        found = {scope: shown(reader, scope) for scope in scopes}
        assert {size.scope: size.keys for size in reader.sizes()} == {
            scope: len(items) for scope, items in found.items()
        }
        assert reader.problems() == []

    assert found == {scope: items for scope, items in keys_of(written).items() if items}
    assert files(directory) == before


def test_a_fault_at_any_statement_of_a_migration_leaves_version_1_whole(
    directory: Path, faults: Faults, io_error: sqlite3.Error
) -> None:
    written = unpack("interval", directory)
    for number in count(1):
        faults.fail_at(number, io_error)
        try:
            adapter = FileAdapter(directory, connect=faults.connect)
        except StorageError:
            migrated = version(directory) == VERSION
            assert not (directory / "state.db.migrating").exists()
            with StoreReader(directory) as reader:
                found = {scope: shown(reader, scope) for scope in reader.scopes()}
            assert found == {scope: items for scope, items in keys_of(written).items() if items}
            if migrated:
                break  # what follows is the opening of version 2
        else:
            adapter.close()
            break
    faults.heal()

    assert number > 15
    adapter = FileAdapter(directory)
    assert keys_of(loaded(adapter, written)) == keys_of(written)
    adapter.close()


KILLED = """
import os, signal, sys
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite import migration
from scopestate.persistence.sqlite.database import connect
moment = sys.argv[2]
steps = 0
def reach(name):
    if moment == name:
        os.kill(os.getpid(), signal.SIGKILL)
def step():
    global steps
    steps += 1
    reach(str(steps))
replace = os.replace
def replaced(*paths):
    reach("before")
    replace(*paths)
    reach("after")
os.replace = replaced
def stepwise(uri):
    connection = connect(uri)
    connection.set_progress_handler(lambda: step() or 0, 50)
    return connection
FileAdapter(sys.argv[1], connect=stepwise).close()
"""


def test_killed_anywhere_in_a_migration_the_store_is_whole(
    directory: Path, tmp_path: Path, run_child: Callable[..., subprocess.Popen[str]]
) -> None:
    seen = set()
    for moment in (1, 2, 3, 5, 8, 12, 17, 25, 35, 50, 70, "before", "after"):
        place = tmp_path / f"killed-{moment}"
        written = unpack("interval", place)
        child = run_child(KILLED, str(place), str(moment))
        assert child.wait(60) < 0
        seen.add(version(place))

        adapter = FileAdapter(place)
        assert keys_of(loaded(adapter, written)) == keys_of(written)
        assert adapter.check() == []
        adapter.close()
        assert sorted(path.name for path in place.iterdir()) == ["state.db", "state.lock"]

    assert seen == {1, VERSION}


def test_another_program_that_has_the_database_open_is_not_cut_off(
    open_file: Open, directory: Path, sqlite_tool: Callable[[Path], sqlite3.Connection]
) -> None:
    written = unpack("interval", directory)
    before = files(directory)["state.db"]
    tool = sqlite_tool(directory / "state.db")
    tool.execute("BEGIN")
    tool.execute("SELECT count(*) FROM state").fetchall()

    with pytest.raises(StorageError, match="another process holds the database"):
        open_file(busy_timeout_ms=50)

    assert files(directory)["state.db"] == before
    tool.close()
    assert keys_of(loaded(open_file(), written)) == keys_of(written)


def test_a_damaged_version_1_is_left_where_it_is(open_file: Open, directory: Path) -> None:
    unpack("interval", directory)
    with sqlite3.connect(directory / "state.db") as other:
        ((root,),) = other.execute("SELECT rootpage FROM sqlite_master WHERE name = 'state'").fetchall()
    other.close()
    content = bytearray((directory / "state.db").read_bytes())
    content[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
    (directory / "state.db").write_bytes(content)

    for _ in range(2):
        with pytest.raises(StoreCorrupt, match="cannot be migrated") as caught:
            open_file()
        assert caught.value.quarantined is None
        assert sqlite3_pages(directory / "state.db")[root - 1] == b"\xff" * 4096


def sqlite3_pages(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return [content[place : place + 4096] for place in range(0, len(content), 4096)]


def test_what_a_killed_migration_left_is_removed(open_file: Open, directory: Path) -> None:
    written = unpack("interval", directory)
    (directory / "state.db.migrating").write_bytes(b"half")

    assert keys_of(loaded(open_file(), written)) == keys_of(written)
    assert not (directory / "state.db.migrating").exists()


def test_more_keys_than_an_extent_holds(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extents of 16 keys stand for those of 16 million."""
    written = unpack("interval", directory)
    for name in ("_EXTENTS", "_STATE"):
        text = getattr(migration, name).replace("<< 24", "<< 4").replace(">> 24", ">> 4").replace(str(2**24 - 1), "15")
        monkeypatch.setattr(migration, name, text)
    new = tmp_path / "new.db"
    new.touch()

    migration.rebuild(f"file:{directory / 'state.db'}?mode=ro", str(new))

    with sqlite3.connect(new) as found:
        rows = found.execute(
            "SELECT scopes.scope, key, value FROM state JOIN extents ON extent = id >> 4"
            " JOIN scopes ON number = extents.scope ORDER BY id"
        ).fetchall()
        assert found.execute("SELECT max(high) FROM extents").fetchall() == [(1,)]
    found.close()
    kept: dict[str, list[tuple[str, str]]] = {}
    for scope, key, value in rows:
        kept.setdefault(scope, []).append((key, value))
    assert kept == {scope: items for scope, items in keys_of(written).items() if items}
