"""Start-up is loud: whatever is wrong with the directory is one clear error, and nothing is overwritten."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stored import change, values_of

from scopestate.errors import StorageError, StoreCorrupt, StoreUnusable
from scopestate.persistence import FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite import schema
from scopestate.persistence.sqlite.database import connect

Open = Callable[..., FileAdapter]
RunChild = Callable[..., subprocess.Popen[str]]


def fill(adapter: FileAdapter, count: int = 300) -> dict[str, bytes]:
    values = {f"key-{number}": b'{"number":%d,"text":"%s"}' % (number, b"x" * 90) for number in range(count)}
    adapter.save([change("s", count, dict(values), {key: place for place, key in enumerate(values, 1)})])
    return values


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "state.lock"}


# --- a good start ----------------------------------------------------------------------------------------------------


def test_missing_directories_are_created(open_file: Open, tmp_path: Path) -> None:
    adapter = open_file(tmp_path / "a" / "b" / "c")

    assert adapter.directory == str(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "state.db").is_file()


def test_the_data_can_be_read_with_the_sqlite3_tool(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save([change("users", 3, {"ada": b'{"age":36}'}, {"ada": 3})])
    adapter.close()

    with sqlite3.connect(directory / "state.db") as other:
        rows = other.execute("SELECT scope, key, created, revision, value, typeof(value) FROM entries").fetchall()
        revisions = other.execute("SELECT scope, revision FROM scopes").fetchall()
    other.close()

    assert rows == [("users", "ada", 3, 3, '{"age":36}', "text")]
    assert revisions == [("users", 3)]


def test_the_file_carries_our_mark_and_version(open_file: Open, directory: Path) -> None:
    open_file().close()

    header = (directory / "state.db").read_bytes()[:100]

    assert header[68:72] == b"scop"
    assert int.from_bytes(header[60:64], "big") == schema.VERSION


def test_closing_leaves_one_database_file_without_a_log(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    fill(adapter)
    assert adapter.size_bytes() > (directory / "state.db").stat().st_size

    adapter.close()

    assert sorted(path.name for path in directory.iterdir()) == ["state.db", "state.lock"]


def test_every_commit_is_synced_to_the_disk(open_file: Open) -> None:
    """docs/reference/semantics.md 8.17: without it a power loss takes whole scopes."""
    writers: list[sqlite3.Connection] = []

    def remember(uri: str) -> sqlite3.Connection:
        writers.append(connect(uri))
        return writers[-1]

    open_file(connect=remember)

    assert writers[0].execute("PRAGMA synchronous").fetchall() == [(2,)]
    assert writers[0].execute("PRAGMA journal_mode").fetchall() == [("wal",)]


def test_the_log_stays_small_however_much_is_saved_and_loaded(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    for number in range(1, 200):
        value = b'"' + bytes([65 + number % 26]) * 100_000 + b'"'
        adapter.save([change("s", number, {"k": value}, {"k": 1})])
        assert values_of(adapter.load("s")) == {"k": value}

    assert (directory / "state.db-wal").stat().st_size < 8_000_000


def test_an_empty_database_file_is_a_fresh_start(open_file: Open, directory: Path) -> None:
    """What a crash during the very first opening leaves."""
    directory.mkdir()
    (directory / "state.db").touch()

    adapter = open_file()

    fill(adapter)
    assert adapter.check() == []


def test_a_half_made_database_of_ours_is_rolled_back_and_made_again(open_file: Open, directory: Path) -> None:
    """A crash in the middle of the creating transaction leaves pages in the file, and the journal that undoes them."""
    directory.mkdir()
    making = sqlite3.connect(directory / "state.db", isolation_level=None)
    making.execute("PRAGMA cache_size = 1")
    making.execute("BEGIN")
    schema.create_tables(making)
    making.execute("CREATE TABLE filler AS WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n LIMIT 5000)"
                   " SELECT i, hex(randomblob(40)) FROM n")  # fmt: skip
    halves = files(directory)
    assert halves["state.db-journal"]
    making.close()
    for name, content in halves.items():
        (directory / name).write_bytes(content)

    adapter = open_file()

    assert adapter.scopes() == []
    fill(adapter)
    assert adapter.check() == []


def test_a_removed_database_is_a_fresh_start_with_a_warning(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = open_file()
    fill(adapter)
    adapter.close()
    (directory / "state.db").unlink()

    with caplog.at_level(logging.WARNING):
        adapter = open_file()

    assert adapter.scopes() == []
    assert "is gone" in caplog.text


def test_a_database_in_rollback_mode_is_brought_back_to_a_log(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    values = fill(adapter)
    adapter.close()
    other = sqlite3.connect(directory / "state.db")
    other.execute("PRAGMA journal_mode = DELETE")
    other.close()

    adapter = open_file()

    assert values_of(adapter.load("s")) == values
    assert (directory / "state.db-wal").exists()


def test_files_of_iii_are_left_alone_and_named_once(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir()
    (directory / "users.bin").write_bytes(b"\x00rkyv")
    (directory / "orders.bin").write_bytes(b"\x01rkyv")

    with caplog.at_level(logging.WARNING):
        open_file().close()

    (record,) = caplog.records
    assert "2 `*.bin` files" in record.getMessage()
    assert str(directory) in record.getMessage()
    assert (directory / "users.bin").read_bytes() == b"\x00rkyv"


# --- directories that cannot be used ---------------------------------------------------------------------------------


def test_a_file_in_place_of_the_directory(open_file: Open, directory: Path) -> None:
    directory.write_text("mine")

    with pytest.raises(StoreUnusable, match="cannot be used as a store: a file has this name"):
        open_file()

    assert directory.read_text() == "mine"


def test_a_file_above_the_directory(open_file: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(StoreUnusable, match=r"cannot be used as a store: (Not a directory|a file has this name)"):
        open_file(tmp_path / "file" / "store")


@pytest.mark.parametrize("path", ["", "a\x00b"])
def test_a_path_that_is_none(open_file: Open, path: str) -> None:
    with pytest.raises(StoreUnusable, match="cannot be used as a store"):
        open_file(path)


def test_a_path_too_long(open_file: Open, tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="File name too long"):
        open_file(tmp_path / ("x" * 300))


def test_a_directory_in_place_of_the_database(open_file: Open, directory: Path) -> None:
    (directory / "state.db").mkdir(parents=True)

    with pytest.raises(StoreUnusable, match=r"cannot read .*state\.db: not a regular file"):
        open_file()


def test_a_directory_in_place_of_the_lock(open_file: Open, directory: Path) -> None:
    (directory / "state.lock").mkdir(parents=True)

    with pytest.raises(StoreUnusable, match="cannot write in"):
        open_file()


OPEN_AS_NOBODY = """
import os, sys
from scopestate.persistence import Row, FileAdapter, ScopeChange
from scopestate.errors import StorageError
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    FileAdapter(sys.argv[1])
except StorageError as error:
    print(type(error).__name__, error)
else:
    print("opened")
sys.stdout.flush()
os._exit(0)  # nobody may not write a coverage report either
"""


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that another user can reach; pytest's own are private."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def private(mode: int) -> int:
    """Return the mode without the rights of others if the child owns the file: it would take them away, with a warning.

    As root, the child becomes another user, and needs these rights.
    """
    return mode if os.geteuid() == 0 else mode & 0o700


def outcome(child: subprocess.Popen[str]) -> str:
    out, err = child.communicate(timeout=60)
    assert err == ""
    return out


def test_a_directory_that_may_not_be_written(run_child: RunChild, shared_directory: Path) -> None:
    shared_directory.chmod(0o555)

    text = outcome(run_child(OPEN_AS_NOBODY, str(shared_directory)))

    assert text.startswith(f"StoreUnusable cannot write in {shared_directory}: Permission denied")
    assert list(shared_directory.iterdir()) == []


def test_a_directory_that_may_not_be_created(run_child: RunChild, shared_directory: Path) -> None:
    shared_directory.chmod(0o555)

    text = outcome(run_child(OPEN_AS_NOBODY, str(shared_directory / "new")))

    assert text.startswith("StoreUnusable")
    assert "Permission denied" in text


def test_a_database_that_may_not_be_written(run_child: RunChild, shared_directory: Path) -> None:
    FileAdapter(shared_directory).close()
    (shared_directory / "state.db").chmod(private(0o444))
    (shared_directory / "state.lock").chmod(private(0o666))
    shared_directory.chmod(0o777)

    text = outcome(run_child(OPEN_AS_NOBODY, str(shared_directory)))

    assert text.startswith("StoreUnusable cannot open the database")
    assert stat.S_IMODE((shared_directory / "state.db").stat().st_mode) == private(0o444)


def test_a_database_that_may_not_be_read(run_child: RunChild, shared_directory: Path) -> None:
    FileAdapter(shared_directory).close()
    (shared_directory / "state.db").chmod(0o000)
    (shared_directory / "state.lock").chmod(private(0o666))
    shared_directory.chmod(0o777)

    text = outcome(run_child(OPEN_AS_NOBODY, str(shared_directory)))

    assert text.startswith("StoreUnusable cannot read")


def test_a_file_system_without_a_write_ahead_log(open_file: Open, directory: Path) -> None:
    """An in-memory database stands for a network file system: it cannot have a log either."""

    def connect(uri: str) -> sqlite3.Connection:
        return sqlite3.connect(":memory:", isolation_level=None)

    with pytest.raises(StoreUnusable, match=r"cannot use a write-ahead log.*local disk"):
        open_file(connect=connect)


# --- databases that are not ours -------------------------------------------------------------------------------------


def make_foreign(path: Path, *statements: str) -> bytes:
    path.parent.mkdir()
    other = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        other.execute(statement)
    other.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (("CREATE TABLE places (url TEXT)", "PRAGMA application_id = 1234"), "application_id is 0x4d2"),
        (("CREATE TABLE places (url TEXT)",), "its tables are not ours"),
        (("CREATE TABLE state (x)", "CREATE TABLE scopes (y)"), "its tables are not ours"),
        (("CREATE TABLE places (url TEXT)", "PRAGMA journal_mode = WAL"), "its tables are not ours"),
        (("PRAGMA user_version = 3",), "user_version is 3"),
    ],
)
def test_somebody_elses_database_is_refused_and_not_changed(
    open_file: Open, directory: Path, statements: tuple[str, ...], reason: str
) -> None:
    content = make_foreign(directory / "state.db", *statements)

    with pytest.raises(StoreUnusable, match=f"not one of scopestate .{reason}"):
        open_file()

    assert files(directory) == {"state.db": content}


def test_a_database_of_a_newer_scopestate_is_refused_and_not_changed(open_file: Open, directory: Path) -> None:
    open_file().close()
    other = sqlite3.connect(directory / "state.db")
    other.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    other.close()
    content = files(directory)

    with pytest.raises(StoreUnusable, match=f"schema version {schema.VERSION + 1}.*newer scopestate"):
        open_file()

    assert files(directory) == content


# --- damaged databases -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound database of some 50 pages."""
    directory = tmp_path_factory.mktemp("sound")
    adapter = FileAdapter(directory)
    fill(adapter, 900)
    adapter.close()
    return (directory / "state.db").read_bytes()


def refuse_and_set_aside(open_file: Open, directory: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> str:
    """Opening says so once, keeps the evidence under a new name, and the next opening starts empty."""
    directory.mkdir(exist_ok=True)
    (directory / "state.db").write_bytes(content)

    with caplog.at_level(logging.ERROR), pytest.raises(StoreCorrupt) as caught:
        open_file()

    moved = caught.value.quarantined
    assert moved is not None
    assert Path(moved).name.startswith("state.db.corrupt-2")
    assert Path(moved).read_bytes() == content
    assert not (directory / "state.db").exists()
    assert moved in str(caught.value)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert moved in caplog.text
    adapter = open_file()
    assert adapter.scopes() == []
    adapter.close()
    assert Path(moved).read_bytes() == content
    return moved


@pytest.mark.parametrize(
    "content",
    [b"x", b"hello, this is not a database\n" * 200, b"SQLite format 3\x00", b"\x00" * 4096],
    ids=["one byte", "text", "only the magic", "zeros"],
)
def test_a_file_that_is_no_database(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    refuse_and_set_aside(open_file, directory, content, caplog)


@pytest.mark.parametrize("keep", [1, 50, 99, 100, 101, 512, 1024, 4095, 4096, 4097, 8192, 20480, 40960, -4096, -1])
def test_a_truncated_database(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture, sound: bytes, keep: int
) -> None:
    refuse_and_set_aside(open_file, directory, sound[:keep], caplog)


def test_a_database_cut_to_nothing_is_not_taken_for_a_new_one(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_file().close()

    moved = refuse_and_set_aside(open_file, directory, b"", caplog)

    assert Path(moved).read_bytes() == b""


def test_a_database_missing_beside_its_log_is_not_taken_for_a_new_one(open_file: Open, directory: Path) -> None:
    """SQLite itself would delete the log, and with it all that was not yet folded in."""
    adapter = open_file()
    fill(adapter)
    log = (directory / "state.db-wal").read_bytes()
    adapter.close()
    (directory / "state.db").unlink()
    (directory / "state.db-wal").write_bytes(log)

    with pytest.raises(StoreCorrupt) as caught:
        open_file()

    assert Path(f"{caught.value.quarantined}-wal").read_bytes() == log
    assert open_file().scopes() == []


@pytest.mark.parametrize("page", range(19))
def test_a_root_page_of_random_bytes(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture, sound: bytes, page: int
) -> None:
    noise = bytes((number * 197 + 31) % 251 for number in range(4096))

    refuse_and_set_aside(open_file, directory, sound[: page * 4096] + noise + sound[(page + 1) * 4096 :], caplog)


@pytest.mark.parametrize("name", ["TABLE scopes", "TABLE extents", "TABLE journal", "VIEW entries"])
def test_a_database_without_one_of_its_tables(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture, sound: bytes, name: str
) -> None:
    directory.mkdir()
    (directory / "state.db").write_bytes(sound)
    other = sqlite3.connect(directory / "state.db")
    other.execute(f"DROP {name}")
    other.close()

    refuse_and_set_aside(open_file, directory, (directory / "state.db").read_bytes(), caplog)


def test_each_damaged_database_gets_a_name_of_its_own(
    open_file: Open, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "20250101T120000Z")
    directory.mkdir()
    for content in (b"first", b"second", b"third"):
        (directory / "state.db").write_bytes(content)
        with pytest.raises(StoreCorrupt):
            open_file()

    assert files(directory) == {
        "state.db.corrupt-20250101T120000Z": b"first",
        "state.db.corrupt-20250101T120000Z-2": b"second",
        "state.db.corrupt-20250101T120000Z-3": b"third",
    }


def test_a_damaged_database_that_cannot_be_moved_is_left_where_it_is(
    open_file: Open, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir()
    (directory / "state.db").write_bytes(b"damaged")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StoreCorrupt, match="could not be set aside") as caught:
        open_file()

    assert caught.value.quarantined is None
    assert (directory / "state.db").read_bytes() == b"damaged"
    assert "could not be set aside" in caplog.text


def test_a_damaged_page_anywhere_is_found_when_it_is_opened_or_read(
    open_file: Open, directory: Path, sound: bytes
) -> None:
    """Page after page is spoilt: never is anything wrong returned, and never is the damaged page overwritten."""
    directory.mkdir()
    noise = b"\xff" * 4096
    found = {"opening": 0, "reading": 0}
    for page in range(len(sound) // 4096):
        damaged = sound[: page * 4096] + noise + sound[(page + 1) * 4096 :]
        (directory / "state.db").write_bytes(damaged)
        try:
            adapter = open_file()
        except StoreCorrupt:
            found["opening"] += 1
            continue
        with pytest.raises(StoreCorrupt):
            adapter.load("s")
        found["reading"] += 1
        with pytest.raises(StoreCorrupt, match="is damaged"):
            adapter.save([change("t", 1, {"k": b"1"}, {"k": 1})])
        adapter.close()
        assert (directory / "state.db").read_bytes()[page * 4096 :][:4096] == noise

    assert all(found.values()), found


# --- rows edited by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "'{'",
        "''",
        "'nul'",
        "'1 2'",
        "'1],[9,9,\"x\",2'",
        "'\"a],['",
        "CAST(x'22ff22' AS TEXT)",
        "x'ff'",
        "'1' || char(0)",
    ],
)
def test_a_value_that_is_not_json_names_its_row(open_file: Open, directory: Path, value: str) -> None:
    adapter = open_file()
    fill(adapter, 10)
    adapter.save([change("t", 1, {"k": b"1"}, {"k": 1})])
    other = sqlite3.connect(directory / "state.db")
    with other:
        other.execute(f"UPDATE state SET value = {value} WHERE key = 'key-7'")
    other.close()

    with pytest.raises(StorageError, match="'key-7' of scope 's' does not hold JSON") as caught:
        adapter.load("s")

    assert not isinstance(caught.value, StoreCorrupt)
    assert values_of(adapter.load("t")) == {"k": b"1"}


def test_a_key_that_is_not_text_is_named_as_well_as_possible(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    fill(adapter, 10)
    other = sqlite3.connect(directory / "state.db")
    with other:
        other.execute("UPDATE state SET key = CAST(x'61ff' AS TEXT) WHERE key = 'key-7'")
    other.close()

    with pytest.raises(StorageError, match="'a\ufffd' of scope 's'"):
        adapter.load("s")


def test_a_value_edited_by_hand_with_spaces_is_fine(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    fill(adapter, 2)
    other = sqlite3.connect(directory / "state.db")
    with other:
        other.execute("UPDATE state SET value = ' { \"a\" : 1 } ' WHERE key = 'key-1'")
    other.close()

    assert values_of(adapter.load("s"))["key-1"] == b'{ "a" : 1 }'


def test_a_number_typed_by_hand_becomes_text(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    fill(adapter, 2)
    other = sqlite3.connect(directory / "state.db")
    with other:
        other.execute("UPDATE state SET value = 5 WHERE key = 'key-1'")
    other.close()

    assert values_of(adapter.load("s"))["key-1"] == b"5"


def test_check_names_what_is_wrong(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    fill(adapter, 3)
    adapter.save([change("t", 2, {"k": b"1"}, {"k": 1})])
    assert adapter.check() == []
    other = sqlite3.connect(directory / "state.db")
    with other:
        other.execute("UPDATE state SET value = '{' WHERE key = 'key-1'")
        other.execute("UPDATE state SET key = 'key-0' WHERE key = 'key-2'")
        other.execute("UPDATE state SET revision = 99 WHERE key = 'k'")
        other.execute("INSERT INTO state VALUES (1 << 40, 'lost', 1, NULL, '1')")
        other.execute("UPDATE state SET expires = 5000 WHERE key = 'k'")
        other.execute("INSERT INTO answers VALUES (1, 99, 'token', 0, x'', x'')")
    other.close()

    assert adapter.check() == [
        "the value for key 'key-1' of scope 's' is not JSON",
        "key 'key-0' of scope 's' is stored 2 times",
        "key 'k' of scope 't', with the revision 99, has a number above that of its scope",
        f"the row {1 << 40} of the table `state`, for key 'lost', belongs to no scope",
        "a key of scope 't' expires at 5000, and the scope is looked at never",
        "the answer for the idempotency key 'token' belongs to no scope",
    ]


def test_a_key_that_is_stored_twice_is_an_error(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    fill(adapter, 3)
    other = sqlite3.connect(directory / "state.db")
    with other:
        other.execute("UPDATE state SET key = 'key-0' WHERE key = 'key-2'")
    other.close()

    with pytest.raises(StorageError, match="scope 's' holds a key twice"):
        adapter.load("s")


def test_a_row_of_another_key_is_never_overwritten(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    fill(adapter, 3)

    with pytest.raises(StorageError, match="holds another key than the one that is saved"):
        adapter.save([ScopeChange("s", 4, {"other": Row(b"1", 4, 2)})])

    assert list(adapter.load("s").entries) == ["key-0", "key-1", "key-2"]
