"""What happens to saving and loading when the disk, another process or the directory fails under a running engine."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest
from stored import change, values_of

from scopestate.actors.ports import ANSWERS_KEPT_MS
from scopestate.errors import StorageError, StoreCorrupt, StoreLocked, StoreUnusable
from scopestate.persistence import Answer, FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite.database import connect
from scopestate.persistence.sqlite.opening import publish
from scopestate.persistence.sqlite.schema import RESERVED

Open = Callable[..., FileAdapter]
RunChild = Callable[..., subprocess.Popen[str]]


class Faults(Protocol):
    """The `faults` fixture of conftest.py."""

    statements: list[str]
    fail: Callable[[str], BaseException | None]

    def connect(self, uri: str) -> sqlite3.Connection: ...
    def fail_at(self, number: int, fault: BaseException) -> None: ...
    def heal(self) -> None: ...


def changed(scope: str, revision: int, **values: bytes | None) -> ScopeChange:
    return change(scope, revision, values)


NOW = 1_800_000_000_000


def everything(adapter: FileAdapter) -> dict[str, object]:
    """What is kept of each scope, and when they are due."""
    kept: dict[str, object] = {scope: adapter.load(scope) for scope in ("a", "b", "old answers")}
    return {**kept, "due": adapter.due(10)}


def contents(adapter: FileAdapter) -> dict[str, tuple[int, list[tuple[str, bytes]]]]:
    states = {scope: adapter.load(scope) for scope in adapter.scopes()}
    return {scope: (state.revision, list(values_of(state).items())) for scope, state in states.items()}


def mixed_batch() -> list[ScopeChange]:
    """Creates, overwrites, deletes, empties an extent, keeps and drops answers, and has one scope twice: every kind of
    statement of a save.
    """
    created: dict[str, Row | None] = {f"new-{n}": Row(b"1", 10 + n, 10 + n, 5000 + n) for n in range(300)}
    answers: dict[str, Answer | None] = {f"{n}": Answer(b"", b"%d" % n, NOW) for n in range(40)}
    return [
        ScopeChange("a", 310, created, due_ms=5000, answers=answers),
        ScopeChange("b", 2**30, {"old": Row(b"2", 2**30, 1), "gone": None, "far": Row(b"3", 2**30, 2**30)}, [2]),
        ScopeChange("a", 400, {"new-0": None, "new-1": Row(b"3", 400, 400)}, [10, 11], 5000, {"7": None}),
        ScopeChange("b", 2**30 + 1, {"old": None}, [1]),
    ]


def error_of(call: Callable[[], object]) -> StorageError | None:
    try:
        call()
    except StorageError as error:
        return error
    return None


# --- all or nothing --------------------------------------------------------------------------------------------------


def test_a_fault_at_any_statement_of_a_save_leaves_nothing_of_it_behind(
    open_file: Open, faults: Faults, io_error: sqlite3.Error
) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.clock_ms = NOW - 2 * ANSWERS_KEPT_MS
    old = ScopeChange("old answers", 1, {}, answers={"old": Answer(b"", b"", adapter.clock_ms)})
    adapter.save([changed("b", 3, old=b"1", gone=b"1"), old])
    adapter.clock_ms = NOW
    before = everything(adapter)

    for number in count(1):
        faults.fail_at(number, io_error)
        error = error_of(lambda: adapter.save(mixed_batch()))
        faults.heal()
        if error is None:
            break  # a save has fewer statements
        assert error.__cause__ is io_error
        assert everything(adapter) == before

    assert number > 20
    assert len(adapter.load("a").answers) == 39
    assert adapter.load("old answers").answers == {}
    assert adapter.due(10) == [(5000, "a")]
    assert contents(adapter)["b"] == (2**30 + 1, [("far", b"3")])
    assert len(contents(adapter)["a"][1]) == 299


def test_a_rollback_that_fails_reopens_the_database(
    open_file: Open, faults: Faults, io_error: sqlite3.Error, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.save([changed("s", 1, k=b"1")])
    faults.fail = lambda statement: io_error if statement in {"COMMIT", "ROLLBACK"} else None

    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        adapter.save([changed("s", 2, k=b"2")])

    faults.heal()
    assert contents(adapter) == {"s": (1, [("k", b"1")])}
    assert "reopening" in caplog.text
    adapter.save([changed("s", 3, k=b"3")])
    assert contents(adapter) == {"s": (3, [("k", b"3")])}


def test_an_interrupt_in_the_middle_of_a_save_leaves_nothing_of_it_behind(open_file: Open, faults: Faults) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.save([changed("s", 1, k=b"1")])
    faults.fail_at(3, KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        adapter.save([changed("s", 2, k=b"2")])

    faults.heal()
    assert contents(adapter) == {"s": (1, [("k", b"1")])}
    adapter.save([changed("s", 2, k=b"2")])
    assert contents(adapter) == {"s": (2, [("k", b"2")])}


def test_a_value_over_sqlites_limit_names_its_key_and_nothing_is_written(open_file: Open) -> None:
    def small(uri: str) -> sqlite3.Connection:
        connection = connect(uri)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
        return connection

    adapter = open_file(connect=small)

    with pytest.raises(StorageError, match=r"key 'large' of scope 's' takes 100002 bytes.*Split"):
        adapter.save([changed("s", 2, small=b"1", large=b'"' + b"x" * 100_000 + b'"')])

    assert adapter.scopes() == []


def test_a_load_that_fails_leaves_the_adapter_usable(open_file: Open, faults: Faults, io_error: sqlite3.Error) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.save([changed("s", 1, k=b"1")])
    faults.fail = lambda statement: io_error if statement.startswith("SELECT") else None

    with pytest.raises(StorageError, match=r"cannot load scope 's'.*input/output error"):
        adapter.load("s")
    with pytest.raises(StorageError, match="cannot list the scopes"):
        adapter.scopes()

    faults.heal()
    assert contents(adapter) == {"s": (1, [("k", b"1")])}


def test_a_fault_at_any_statement_of_a_large_load_is_an_error_and_the_next_load_works(
    open_file: Open, faults: Faults, io_error: sqlite3.Error
) -> None:
    values = {f"k{number}": b'"%s"' % (b"x" * 700) for number in range(2500)}
    adapter = open_file(connect=faults.connect)
    adapter.save([change("s", 2500, dict(values), {key: place for place, key in enumerate(values)})])
    faults.statements.clear()
    assert values_of(adapter.load("s")) == values
    count = len(faults.statements)
    assert count > 6

    # From 4: the first three belong to opening the connection, which now waits for the next load.
    for number in range(1, count - 3):
        faults.fail_at(number, io_error)
        with pytest.raises(StorageError, match="input/output error"):
            adapter.load("s")
        faults.heal()
        assert list(values_of(adapter.load("s")).items()) == list(values.items())


def test_an_error_that_is_no_size_error_is_not_taken_for_one(open_file: Open, faults: Faults) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.save([change("s", 1, {f"k{n}": b"1" for n in range(1500)}, {})])
    odd = sqlite3.DataError("odd")
    for wanted in (1, 2):
        faults.statements.clear()
        faults.fail = lambda _, wanted=wanted: (
            odd if sum("json_group_array(key)" in earlier for earlier in faults.statements) == wanted else None
        )

        with pytest.raises(StorageError, match="odd"):
            adapter.load("s")


# --- full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_the_save_and_saving_resumes_when_there_is_room(open_file: Open) -> None:
    writers: list[sqlite3.Connection] = []

    def connect_limited(uri: str) -> sqlite3.Connection:
        writers.append(connect(uri))
        return writers[-1]

    adapter = open_file(connect=connect_limited)
    adapter.save([changed("s", 1, k=b"1")])
    writers[0].execute("PRAGMA max_page_count = 20")
    large = changed("s", 2, k=b'"' + b"x" * 200_000 + b'"', other=b"1")

    for _ in range(3):
        with pytest.raises(StorageError, match="disk is full"):
            adapter.save([large])
        assert contents(adapter) == {"s": (1, [("k", b"1")])}
    adapter.save([changed("s", 3, small=b"1")])

    writers[0].execute("PRAGMA max_page_count = 1000000")
    adapter.save([large])
    assert values_of(adapter.load("s"))["k"] == large.entries["k"].json


FILL_UNTIL_THE_LIMIT = """
import resource, sys
from scopestate.errors import StorageError
from scopestate.persistence import Row, FileAdapter, ScopeChange
adapter = FileAdapter(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
saved = 0
try:
    for number in range(1, 1000):
        adapter.save([ScopeChange("s", number, {f"k{number}": Row(b'"' + b"x" * 5000 + b'"', number, number)})])
        saved = number
except StorageError as error:
    print(type(error).__name__, error)
loaded = adapter.load("s")
assert list(loaded.entries) == [f"k{number}" for number in range(1, saved + 1)], len(loaded.entries)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
adapter.save([ScopeChange("s", saved + 1, {"after": Row(b"1", saved + 1, saved + 1)})])
assert adapter.check() == []
adapter.close()
print(saved)
"""


def test_a_real_limit_of_the_operating_system_refuses_the_save_and_saving_resumes(
    run_child: RunChild, open_file: Open, directory: Path
) -> None:
    out, err = run_child(FILL_UNTIL_THE_LIMIT, str(directory)).communicate(timeout=60)

    assert err == ""
    error, saved = out.splitlines()
    assert error.startswith("StorageError cannot save 1 changed scopes in")
    assert int(saved) > 10
    assert list(values_of(open_file().load("s"))) == [*(f"k{number}" for number in range(1, int(saved) + 1)), "after"]


# --- another process in the database ---------------------------------------------------------------------------------


def test_a_database_held_by_another_process_refuses_the_save_and_saving_resumes(
    open_file: Open, directory: Path
) -> None:
    adapter = open_file(busy_timeout_ms=20)
    adapter.save([changed("s", 1, k=b"1")])
    other = sqlite3.connect(directory / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StorageError, match="another process holds the database"):
        adapter.save([changed("s", 2, k=b"2")])
    assert contents(adapter) == {"s": (1, [("k", b"1")])}

    other.execute("ROLLBACK")
    other.close()
    adapter.save([changed("s", 2, k=b"2")])
    assert contents(adapter) == {"s": (2, [("k", b"2")])}


def test_a_database_held_by_another_process_cannot_be_opened(open_file: Open, directory: Path) -> None:
    open_file().close()
    other = sqlite3.connect(directory / "state.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    with pytest.raises(StorageError, match=r"cannot open the database.*another process holds"):
        open_file(busy_timeout_ms=20)

    other.close()
    open_file()


def test_a_reader_elsewhere_does_not_hinder_saving_or_closing(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    other = sqlite3.connect(directory / "state.db", isolation_level=None)
    other.execute("BEGIN")
    assert other.execute("SELECT value FROM state").fetchall() == [("1",)]

    adapter.save([changed("s", 2, k=b"2")])
    adapter.close()

    assert other.execute("SELECT value FROM state").fetchall() == [("1",)]
    other.close()
    assert contents(open_file()) == {"s": (2, [("k", b"2")])}


# --- the directory goes away -----------------------------------------------------------------------------------------


def test_a_directory_moved_away_stops_saving_until_it_is_back(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    elsewhere = directory.with_name("elsewhere")
    directory.rename(elsewhere)

    for call in (lambda: adapter.save([changed("s", 2, k=b"2")]), lambda: adapter.load("s"), adapter.scopes):
        with pytest.raises(StorageError, match="the store vanished"):
            call()

    elsewhere.rename(directory)
    assert contents(adapter) == {"s": (1, [("k", b"1")])}
    adapter.save([changed("s", 2, k=b"2")])
    assert contents(adapter) == {"s": (2, [("k", b"2")])}


@pytest.mark.parametrize("first", ["save", "load"])
def test_a_removed_directory_that_is_made_again_gets_all_its_content_back(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture, first: str
) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    adapter.load("s")
    adapter.save([changed("t", 1, k=b"1")])
    shutil.rmtree(directory)
    with pytest.raises(StorageError, match="the store vanished"):
        adapter.save([changed("t", 2, k=b"2")])

    directory.mkdir()
    if first == "load":
        assert values_of(adapter.load("s")) == {"k": b"1"}
    adapter.save([changed("t", 2, k=b"2")])

    assert "content was written again" in caplog.text
    expected = {"s": (1, [("k", b"1")]), "t": (2, [("k", b"2")])}
    assert contents(adapter) == expected
    assert adapter.check() == []
    with pytest.raises(StoreLocked):
        open_file()
    adapter.close()
    assert sorted(path.name for path in directory.iterdir()) == ["state.db", "state.lock"]
    assert contents(open_file()) == expected


def test_a_removed_database_file_is_put_back(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    for name in ("state.db", "state.db-wal", "state.db-shm"):
        (directory / name).unlink()
    (directory / "state.db.restoring").write_text("left by an interrupted attempt")

    adapter.save([changed("s", 2, k=b"2")])

    adapter.close()
    assert contents(open_file()) == {"s": (2, [("k", b"2")])}


def test_a_restoring_that_fails_changes_nothing_and_is_tried_again(
    open_file: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    shutil.rmtree(directory)
    directory.mkdir()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        (directory / "state.db.restoring").touch()
        with pytest.raises(StorageError, match=r"putting .* back failed: .*No space left"):
            adapter.save([changed("s", 2, k=b"2")])
    adapter.save([changed("s", 2, k=b"2")])

    assert contents(adapter) == {"s": (2, [("k", b"2")])}


def test_a_copy_that_cannot_be_written_is_an_error_and_tried_again(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "state.db.restoring-journal").mkdir()

    with pytest.raises(StorageError, match="cannot save 1 changed scopes"):
        adapter.save([changed("s", 2, k=b"2")])

    (directory / "state.db.restoring-journal").rmdir()
    adapter.save([changed("s", 2, k=b"2")])
    assert contents(adapter) == {"s": (2, [("k", b"2")])}


def test_another_database_in_our_place_is_never_written(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    adapter.load("s")
    shutil.rmtree(directory)
    other = FileAdapter(directory)
    other.save([changed("theirs", 1, k=b"9")])

    with pytest.raises(StorageError, match="removed or replaced"):
        adapter.save([changed("s", 2, k=b"2")])
    with pytest.raises(StorageError, match="removed or replaced"):
        adapter.load("theirs")
    adapter.close()
    assert (directory / "state.db-wal").exists()

    other.save([changed("theirs", 2, k=b"10")])
    other.close()
    assert contents(open_file()) == {"theirs": (2, [("k", b"10")])}


def test_a_database_put_in_our_place_while_ours_is_put_back_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_text("theirs")
    (tmp_path / "state.db.restoring").write_text("ours")

    with pytest.raises(FileExistsError):
        publish(str(tmp_path / "state.db.restoring"), str(tmp_path / "state.db"))

    assert (tmp_path / "state.db").read_text() == "theirs"


def test_a_load_never_creates_a_database_where_ours_was(open_file: Open, directory: Path) -> None:
    opened = 0

    def remove_before_the_second(uri: str) -> sqlite3.Connection:
        nonlocal opened
        opened += 1
        if opened == 2:
            (directory / "state.db").unlink()
        return connect(uri)

    adapter = open_file(connect=remove_before_the_second)

    with pytest.raises(StorageError, match=r"cannot load scope 's'.*cannot be opened"):
        adapter.load("s")

    assert not (directory / "state.db").exists()


def test_a_database_that_loses_its_name_during_a_save_takes_the_save_with_it(
    open_file: Open, directory: Path, faults: Faults
) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.save([changed("s", 1, k=b"1")])

    def remove(statement: str) -> None:
        if statement == "COMMIT":
            shutil.rmtree(directory)

    faults.fail = remove

    with pytest.raises(StorageError, match="the store vanished"):
        adapter.save([changed("s", 2, k=b"2")])


def test_a_removed_lock_file_is_made_again(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    (directory / "state.lock").unlink()

    adapter.save([changed("s", 1, k=b"1")])

    with pytest.raises(StoreLocked):
        open_file()


def test_a_lock_that_somebody_else_took_meanwhile_stops_saving(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save([changed("s", 1, k=b"1")])
    (directory / "state.lock").unlink()
    other = open_file()

    with pytest.raises(StoreLocked):
        adapter.save([changed("s", 2, k=b"2")])
    assert contents(other) == {"s": (1 + RESERVED, [("k", b"1")])}

    other.close()
    adapter.save([changed("s", 2, k=b"2")])


def test_the_size_of_a_vanished_store_is_0(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    assert adapter.size_bytes() > 0

    shutil.rmtree(directory)

    assert adapter.size_bytes() == 0


# --- closing ---------------------------------------------------------------------------------------------------------


def test_closing_waits_for_a_load_that_is_running(open_file: Open, faults: Faults) -> None:
    adapter = open_file(connect=faults.connect)
    adapter.save([changed("s", 1, k=b"1")])
    loading, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def hold(statement: str) -> None:
        if "json_group_array(key)" in statement:
            loading.set()
            assert go_on.wait(30)

    faults.fail = hold
    results: list[dict[str, bytes]] = []
    reader = threading.Thread(target=lambda: results.append(values_of(adapter.load("s"))))
    closer = threading.Thread(target=lambda: (adapter.close(), closed.set()))
    reader.start()
    assert loading.wait(30)
    closer.start()

    assert not closed.wait(0.05)
    go_on.set()
    assert closed.wait(30)
    reader.join()
    closer.join()
    assert results == [{"k": b"1"}]


def test_a_close_that_cannot_close_warns_and_releases_the_lock(
    open_file: Open, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(sqlite3.Connection):
        refused = False

        def close(self) -> None:
            super().close()
            raise sqlite3.OperationalError("unable to close")

    adapter = open_file(
        connect=lambda uri: sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, factory=Stubborn
        )
    )
    adapter.save([changed("s", 1, k=b"1")])

    adapter.close()

    assert "unable to close" in caplog.text
    assert contents(open_file()) == {"s": (1, [("k", b"1")])}


@pytest.mark.parametrize("code", [sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY])
def test_a_database_that_cannot_be_opened_is_unusable(open_file: Open, faults: Faults, code: int) -> None:
    refused = sqlite3.OperationalError("refused")
    refused.sqlite_errorcode = code
    faults.fail = lambda statement: refused if "user_version" in statement else None

    with pytest.raises(StoreUnusable, match="cannot open the database"):
        open_file(connect=faults.connect)


def test_a_connection_that_cannot_be_prepared_is_closed_again(
    open_file: Open, faults: Faults, io_error: sqlite3.Error
) -> None:
    faults.fail = lambda statement: io_error if "synchronous" in statement else None

    with pytest.raises(StorageError, match="input/output error"):
        open_file(connect=faults.connect)

    faults.heal()
    open_file(connect=faults.connect)


def test_corruption_reported_in_a_save_stops_all_later_saves(open_file: Open, faults: Faults) -> None:
    adapter = open_file(connect=faults.connect)
    corrupt = sqlite3.DatabaseError("database disk image is malformed")
    corrupt.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    faults.fail = lambda statement: corrupt if statement.startswith("INSERT") else None
    with pytest.raises(StoreCorrupt):
        adapter.save([changed("s", 1, k=b"1")])
    faults.heal()

    with pytest.raises(StoreCorrupt, match="is damaged"):
        adapter.save([changed("s", 1, k=b"1")])

    assert adapter.scopes() == []
