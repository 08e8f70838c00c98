"""Directories that diskcache of PyPI has written, read without unpickling and without changing them."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache
import pytest

from scopestate import Engine
from scopestate.errors import StoreUnusable
from scopestate.integrations.cache import Cache
from scopestate.integrations.cache.from_diskcache import LeftOut, Report, import_diskcache

RAN: list[str] = []


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("unpickled",)


@pytest.fixture
def old(tmp_path: Path) -> Iterator[diskcache.Cache]:
    """A cache of diskcache, open while the test runs."""
    RAN.clear()
    with diskcache.Cache(str(tmp_path / "old")) as cache:
        yield cache
    assert RAN == []


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache(size_limit=None) as cache:
        yield cache


def _files(directory: str) -> dict[str, str]:
    """Return each file with a digest of it. SQLite's shared memory has the locks of readers, and nothing else."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in Path(directory).rglob("*")
        if file.is_file() and not file.name.endswith("-shm")
    }


def _counts(report: Report) -> dict[str, int]:
    counts = {name: getattr(report, name) for name in report.__struct_fields__ if name != "problems"}
    return {name: count for name, count in counts.items() if count}


ENTRIES = {
    "text": "value",
    "~odd": "ü\n",
    b"bytes": b"\x00\xff",
    7: -(2**63),
    1.5: 2.5,
    "large bytes": os.urandom(50_000),
    "large text": "ä" * 40_000,
    "empty": "",
    "no bytes": b"",
}


def test_entries_come_with_their_deadlines_and_tags(old: diskcache.Cache, cache: Cache) -> None:
    for key, value in ENTRIES.items():
        old.set(key, value)
    for tag in ("x", 5, 1.5, b"y"):
        old.set(("tagged", tag)[1], "tagged", expire=600, tag=tag)
    old.set("file", io.BytesIO(b"from a file"), read=True)
    old.set("gone", 1, expire=600)
    with sqlite3.connect(Path(old.directory) / "cache.db") as database:
        database.execute("UPDATE Cache SET expire_time = 1 WHERE key = 'gone'")
    database.close()

    report = import_diskcache(old.directory, cache)

    assert report.ok
    assert _counts(report) == {"read": len(old), "imported": len(old) - 1, "expired": 1}
    for key in old:
        if key != "gone":
            value, at, tag = old.get(key, expire_time=True, tag=True)
            found, found_at, found_tag = cache.get(key, expire_time=True, tag=True)
            assert (found, found_tag) == (value, tag)
            assert type(found) is type(value)
            assert found_at == (None if at is None else pytest.approx(at, abs=0.002))
    assert cache["file"] == b"from a file"
    assert cache.evict("x") == 1


def test_what_is_pickled_is_counted_and_not_loaded(old: diskcache.Cache, cache: Cache) -> None:
    old["list"] = [1]
    old["none"] = None
    old["malicious"] = Malicious()
    old["large"] = [0] * 50_000
    old[("a", 1)] = "tuple"
    old[True] = Malicious()
    found: list[LeftOut] = []

    report = import_diskcache(old.directory, cache, left_out=found.append)

    assert report.ok
    assert _counts(report) == {"read": 6, "pickled_keys": 2, "pickled_values": 4}
    assert [(one.key, one.reason) for one in found] == [
        ("list", "pickled_values"),
        ("none", "pickled_values"),
        ("malicious", "pickled_values"),
        ("large", "pickled_values"),
        (None, "pickled_keys"),
        (None, "pickled_keys"),
    ]
    assert all(one.bytes for one in found)
    assert len(cache) == 0


@pytest.mark.parametrize("in_use", [True, False], ids=["in use", "closed"])
def test_the_directory_stays_as_it_is(old: diskcache.Cache, cache: Cache, in_use: bool) -> None:
    for number in range(300):
        old[number] = "x" * (number * 200)
    if not in_use:
        old.close()
    before = _files(old.directory)
    assert ("cache.db-wal" in before) == in_use

    assert import_diskcache(old.directory, cache).imported == 300

    assert _files(old.directory) == before
    assert cache[299] == "x" * 299 * 200


def test_the_log_of_a_program_that_was_killed_is_read_and_stays(
    old: diskcache.Cache, cache: Cache, tmp_path: Path
) -> None:
    old["k"] = "in the log"
    killed = tmp_path / "killed"
    shutil.copytree(old.directory, killed)
    (killed / "cache.db-shm").unlink()
    before = _files(str(killed))

    assert import_diskcache(killed, cache).imported == 1

    assert cache["k"] == "in the log"
    assert _files(str(killed)) == before


def test_a_program_that_begins_to_use_it_is_noticed(old: diskcache.Cache, cache: Cache) -> None:
    for number in range(500):
        old[number] = "before"
    old.close()
    begun = False

    def begin(_: Report) -> None:
        nonlocal begun
        if not begun:
            begun = True
            old[499] = "after"

    report = import_diskcache(old.directory, cache, progress=begin)

    assert report.ok
    assert report.imported == 500
    assert cache[0] == "before"
    assert cache[499] == "after"


def test_an_import_is_repeated_to_go_on(old: diskcache.Cache, cache: Cache) -> None:
    for number in range(450):
        old[number] = str(number)
    steps = []

    def interrupt(report: Report) -> None:
        steps.append(report.imported)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_diskcache(old.directory, cache, progress=interrupt)
    written = len(cache)
    assert 0 < written < 450
    cache[0] = "newer"

    assert _counts(import_diskcache(old.directory, cache)) == {
        "read": 450,
        "imported": 450 - written,
        "present": written,
    }
    assert cache[0] == "newer"
    assert [cache[number] for number in (1, 449)] == ["1", "449"]
    assert _counts(import_diskcache(old.directory, cache, overwrite=True)) == {"read": 450, "imported": 450}
    assert cache[0] == "0"


def test_a_dry_run_writes_nothing(old: diskcache.Cache, cache: Cache) -> None:
    old["k"] = "v"
    old["p"] = []
    assert _counts(import_diskcache(old.directory, cache, dry_run=True)) == {
        "read": 2,
        "imported": 1,
        "pickled_values": 1,
    }
    assert len(cache) == 0


def test_a_fanout_cache_is_its_shards(tmp_path: Path, cache: Cache) -> None:
    with diskcache.FanoutCache(str(tmp_path / "old"), shards=3) as old:
        for number in range(50):
            old[f"k{number}"] = number

    assert import_diskcache(tmp_path / "old", cache).imported == 50
    assert cache["k49"] == 49


def test_all_of_a_json_disk_is_carried(tmp_path: Path, cache: Cache) -> None:
    entries: dict[Any, Any] = {"k": {"a": [1, None]}, 5: None, ("a", 1): "x" * 200_000, "b": 1.5}
    with diskcache.Cache(str(tmp_path / "old"), disk=diskcache.JSONDisk) as old:
        for key, value in entries.items():
            old[key] = value
        old["large"] = [os.urandom(20).hex() for _ in range(4_000)]
        assert import_diskcache(tmp_path / "old", cache).imported == 5
        assert cache["large"] == old["large"]
        with sqlite3.connect(tmp_path / "old" / "cache.db") as database:
            database.execute("UPDATE Cache SET value = x'00' WHERE mode = 1")

    assert {key: cache[key] for key in entries} == entries
    cache.clear()
    assert import_diskcache(tmp_path / "old", cache).damaged == 4


def test_missing_and_misleading_files_are_told(old: diskcache.Cache, cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for name in ("missing", "outside", "absolute", "link", "folder", "text", "fine"):
        old[name] = "x" * 40_000
    files = dict(_columns(old, "key", "filename"))
    folder = Path(old.directory)
    (folder / files["missing"]).unlink()
    (folder / files["link"]).unlink()
    (folder / files["link"]).symlink_to(tmp_path / "secret")
    (folder / files["folder"]).unlink()
    (folder / files["folder"]).mkdir()
    (folder / files["text"]).write_bytes(b"\xff" * 40_000)
    with sqlite3.connect(folder / "cache.db") as database:
        database.execute("UPDATE Cache SET filename = '../secret' WHERE key = 'outside'")
        database.execute("UPDATE Cache SET filename = ? WHERE key = 'absolute'", (str(tmp_path / "secret"),))
    database.close()
    found: list[LeftOut] = []

    report = import_diskcache(old.directory, cache, left_out=found.append)

    assert not report.ok
    assert _counts(report) == {"read": 7, "imported": 1, "missing_files": 2, "damaged": 4}
    assert list(cache) == ["fine"]
    assert {one.key for one in found if one.reason == "missing_files"} == {"missing", "folder"}
    # diskcache removes the files of its rows when the test ends: not that of another folder.
    old.clear()


def test_odd_rows_are_told(old: diskcache.Cache, cache: Cache) -> None:
    for number in range(7):
        old[f"k{number}"] = "v"
    with sqlite3.connect(Path(old.directory) / "cache.db") as database:
        for number, change in enumerate((
            "mode = 9", "value = NULL", "value = CAST(x'ff' AS TEXT)", "expire_time = 'soon'", "key = NULL",
            "expire_time = 1e300", "tag = x'00', expire_time = 9e99",
        )):  # fmt: skip
            database.execute(f"UPDATE Cache SET {change} WHERE key = 'k{number}'")
    database.close()

    report = import_diskcache(old.directory, cache)

    assert _counts(report) == {"read": 7, "imported": 2, "damaged": 5}
    assert cache.get("k5", expire_time=True) == ("v", None)
    assert cache.get("k6", tag=True) == ("v", b"\x00")


def test_a_damaged_database_is_told_and_its_good_part_is_carried(old: diskcache.Cache, cache: Cache) -> None:
    for number in range(2_000):
        old[number] = "x" * 500
    old.close()
    file = Path(old.directory) / "cache.db"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = b"\xa5" * (len(data) - len(data) // 2)
    file.write_bytes(data)

    report = import_diskcache(old.directory, cache)

    assert not report.ok
    assert report.problems[0].startswith(f"{old.directory}: ")
    assert 0 < report.imported < 2_000
    file.write_bytes(b"no database at all, but some text")
    (problem,) = import_diskcache(old.directory, cache).problems
    assert "not a database" in problem
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE other (x)")
    other.close()
    (problem,) = import_diskcache(old.directory, cache).problems
    assert "no such table: Cache" in problem
    old.close()


def test_what_is_no_diskcache_is_refused(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(StoreUnusable, match="not a directory of diskcache"):
        import_diskcache(tmp_path, cache)
    with pytest.raises(StoreUnusable, match="cannot be read"):
        import_diskcache(tmp_path / "missing", cache)


def test_values_that_are_too_large_for_the_engine_are_told_and_the_others_carried(old: diskcache.Cache) -> None:
    old["large"] = "x" * 2_000
    old["huge"] = b"y" * 3_000_000
    old["small"] = "v"
    with Engine.from_config({"limits": {"max_value_bytes": 1_000}}) as engine:
        cache = Cache(engine)
        assert _counts(import_diskcache(old.directory, cache)) == {"read": 3, "imported": 1, "refused": 2}
        assert list(cache) == ["small"]
    with Engine() as engine:
        cache = Cache(engine)
        cache["small"] = "kept"
        assert _counts(import_diskcache(old.directory, cache)) == {"read": 3, "imported": 2, "present": 1}
        assert cache["huge"] == b"y" * 3_000_000
        assert _counts(import_diskcache(old.directory, cache)) == {"read": 3, "present": 3}


def test_what_is_removed_while_it_is_read_is_no_problem(old: diskcache.Cache, cache: Cache) -> None:
    old["pickle"] = []
    old["file"] = "x" * 40_000

    report = import_diskcache(old.directory, cache, left_out=lambda _: old.pop("file", None))

    assert report.ok
    assert _counts(report) == {"read": 2, "pickled_values": 1, "changed": 1}


def _columns(old: diskcache.Cache, *names: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(Path(old.directory) / "cache.db") as database:
        rows = database.execute(f"SELECT {', '.join(names)} FROM Cache").fetchall()
    database.close()
    return rows
