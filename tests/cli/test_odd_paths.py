"""Paths of all kinds: pipes, names that are not UTF-8, long names, empty names, addresses, and full disks."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import Program, Run

from scopestate import Engine
from scopestate.config import from_mapping


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A closed store whose name holds a byte that is not UTF-8."""
    return make(tmp_path / os.fsdecode(b"store\xff"))


def make(folder: Path) -> Path:
    kv = {"store_method": "file_based", "file_path": str(folder)}
    entry = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    with Engine(from_mapping({"workers": [entry]})) as engine:
        engine.set("s", "k", 1)
    return folder


def replace_by_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("command", ["info", "verify", "export", "import"])
def test_a_pipe_in_place_of_the_database_is_an_error_and_no_wait(command: str, cli: Run, tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    replace_by_pipe(store / "state.db")
    (tmp_path / "in.jsonl").write_text('{"scope":"s","key":"k","value":1}\n')
    more = (str(tmp_path / "in.jsonl"),) if command == "import" else ()

    refused = cli("store", command, str(store), *more)

    assert (refused.code, "not a regular file" in refused.err) == (4, True), refused.err


def test_a_pipe_in_place_of_the_lock_file_keeps_no_reader_waiting(cli: Run, tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    replace_by_pipe(store / "state.lock")

    assert cli("store", "verify", str(store)).code == 0


def test_json_output_shows_names_that_are_not_utf_8(cli: Run, store: Path) -> None:
    escaped = f"{store.parent}/store\\udcff"
    good, bad = (store.parent / os.fsdecode(name) for name in (b"good\xff.yaml", b"bad\xff.yaml"))
    good.write_text("workers: []\n")
    bad.write_text("limits: {x: 1}\n")

    info = cli("store", "info", str(store), "--json")
    missing = cli("store", "info", f"{store}2", "--json")
    checked = cli("config", "check", str(bad), "--json")

    assert (info.code, info.json["directory"]) == (0, escaped)
    assert missing.code == 4
    assert f"{escaped}2" in json.loads(missing.err)["error"]["message"]
    assert checked.code == 3
    assert checked.json["errors"][0]["file"].endswith("bad\\udcff.yaml")
    assert cli("config", "show", str(good), "--json").code == 0
    assert json.loads(cli("config", "show", str(bad), "--json").err)["error"]["code"] == "CONFIG_ERROR"


def test_serve_tells_programs_a_name_that_is_not_utf_8(program: type[Program], tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"here\xff.yaml")
    file.write_text("workers: []\n")
    served = program("serve", str(file), "--port", "0", "--json")

    told = json.loads(served.line())

    assert told["config"].endswith("here\\udcff.yaml")
    served.process.terminate()
    assert served.wait().code == 0


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127], ids=["ascii", "two bytes each"])
def test_an_export_may_have_the_longest_name_that_the_file_system_takes(name: str, cli: Run, store: Path) -> None:
    target = store.parent / name

    for _ in range(2):
        assert cli("store", "export", str(store), str(target)).code == 0
    assert target.read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("target", "problem"),
    [("", "no name"), ("{here}/new/", "there is no such directory"), ("{here}/", "name a file in it")],
    ids=["empty", "new folder", "folder"],
)
def test_an_export_to_what_is_no_file_name_is_refused(target: str, problem: str, cli: Run, store: Path) -> None:
    refused = cli("store", "export", str(store), target.format(here=store.parent))

    assert (refused.code, problem in refused.err) == (4, True), refused.err
    assert os.listdir(store.parent) == [store.name]


def test_an_address_of_another_kind_is_told_from_a_directory(cli: Run) -> None:
    for address in ("http://localhost:49134", "https://h/", "postgres://h:1/x"):
        refused = cli("store", "export", address)
        assert (refused.code, "begins with ws://" in refused.err) == (4, True), refused.err


@pytest.mark.parametrize(
    "address", ["ws://h\udcff", "ws://a b", "ws://a\nb", "ws://h:1/#part", "ws://h\x1b[31m:1", "ws://\u202eh"]
)
def test_an_address_with_a_character_that_no_address_has_is_a_mistake(address: str, cli: Run) -> None:
    refused = cli("get", "s", "k", "--url", address)

    assert (refused.code, "not an" in refused.err or "is not the address" in refused.err) == (3, True), refused.err
    assert "Traceback" not in refused.err


@contextmanager
def small_disk() -> Iterator[None]:
    """Let no file of this process become larger than 100 KiB: writing fails as on a disk that becomes full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export that is larger than the limit of `small_disk`."""
    file = tmp_path / "big.jsonl"
    value = json.dumps("x" * 1000)
    file.write_text("".join(f'{{"scope":"s","key":"{number}","value":{value}}}\n' for number in range(500)))
    return file


def test_a_disk_that_becomes_full_during_an_import_leaves_nothing(export: Path, cli: Run, tmp_path: Path) -> None:
    store = tmp_path / "new"

    with small_disk():
        failed = cli("store", "import", str(store), str(export))

    assert (failed.code, "nothing was imported" in failed.err) == (4, True), failed.err
    assert cli("store", "import", str(store), str(export)).code == 0


def test_no_room_for_the_copy_of_standard_input_is_said(export: Path, cli: Run, tmp_path: Path) -> None:
    with small_disk():
        failed = cli("store", "import", str(tmp_path / "new"), stdin=export.read_text())

    assert failed.code == 4
    assert "standard input could not be copied to a temporary file in" in failed.err
    assert "set TMPDIR" in failed.err
    assert not (tmp_path / "new").exists()


def test_a_disk_that_becomes_full_during_an_export_leaves_the_file_before(
    export: Path, cli: Run, tmp_path: Path
) -> None:
    store, target = tmp_path / "new", tmp_path / "out.jsonl"
    assert cli("store", "import", str(store), str(export)).code == 0
    target.write_text("before")

    with small_disk():
        failed = cli("store", "export", str(store), str(target))

    assert (failed.code, "cannot be written: File too large" in failed.err) == (4, True), failed.err
    assert target.read_text() == "before"
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
