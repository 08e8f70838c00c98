"""Which directory a store is in, how people write it, and who may read its files."""

from __future__ import annotations

import json
import logging
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import change, read_values

from scopestate import Engine
from scopestate.config import KvOptions, load
from scopestate.errors import ConfigError, StorageError, StoreLocked, StoreUnusable
from scopestate.paths import expand_home
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.reading import StoreReader

Open = Callable[..., FileAdapter]
ONE = [change("s", 1, {"k": b"1"}, {"k": 1})]


def config_of(path: str) -> dict[str, object]:
    adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": path}}
    return {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- how a path is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a b/what?mode=ro#frag%41", "slash/", "C:\\Users\\ada\\state", "ü/状态", "file:uri", "a\nb", "%00",
        "'quoted'\"", "-rf", "./~", os.fsdecode(b"not-utf8-\xff"), "$HOME", "*", " leading", "trailing ",
    ],
)  # fmt: skip
def test_what_was_saved_under_an_odd_path_is_found_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "scopestate")
    with Engine.from_config(config_of(name)) as engine:
        engine.set("s", "k", 1)

    assert os.path.isfile(os.path.join(name, "state.db"))
    with Engine.from_config(config_of(name)) as engine:
        assert engine.get("s", "k") == 1
    with StoreReader(name) as reader:
        assert read_values(reader, "s") == {"k": b"1"}
    for record in caplog.records:
        record.getMessage().encode()  # what is logged can be written down


def test_bytes_and_path_objects_name_a_directory_too(tmp_path: Path) -> None:
    for path in (os.fsencode(tmp_path / "store"), tmp_path / "store"):
        adapter = FileAdapter(path)
        assert adapter.directory == str(tmp_path / "store")
        adapter.close()


def test_a_store_stays_where_it_is_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Engine.from_config(config_of("data")) as engine:
        monkeypatch.chdir(tmp_path / "elsewhere")
        engine.set("s", "k", 1)
        engine.flush()
        assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "data" / "state.db").is_file()


@pytest.mark.parametrize("what", ["itself", "above"])
def test_a_file_where_a_directory_should_be_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("precious")

    with pytest.raises(StoreUnusable, match=r"a file has this name|Not a directory"):
        FileAdapter(tmp_path / "file" if what == "itself" else tmp_path / "file" / "store")

    assert (tmp_path / "file").read_text() == "precious"


def test_a_tilde_is_the_home_directory_in_every_path_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "engine.yaml").write_text(json.dumps(config_of("~/data")))

    with Engine.from_config("~/engine.yaml") as engine:
        engine.set("s", "k", 1)

    assert load("~/engine.yaml").adapter.config == KvOptions("file_based", "~/data")
    assert (home / "data" / "state.db").is_file()
    with StoreReader("~/data") as reader:
        assert reader.scopes() == ["s"]
    assert list(here.iterdir()) == []


def test_a_tilde_with_a_name_is_that_users_home_directory() -> None:
    me = pwd.getpwuid(os.getuid())

    assert expand_home(f"~{me.pw_name}/data") == f"{me.pw_dir}/data"


def test_the_home_of_an_unknown_user_is_refused_and_no_folder_of_that_name_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(StorageError, match=r"home directory of a user 'no-such-user' is not known.*'\./~no-such-user"):
        Engine.from_config(config_of("~no-such-user/data"))
    with pytest.raises(ConfigError, match="no-such-user"):
        Engine.from_config("~no-such-user/engine.yaml")

    assert list(tmp_path.iterdir()) == []


# --- what the log says -----------------------------------------------------------------------------------------------


def test_opening_says_once_at_info_which_directory_and_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "scopestate.persistence.file")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with Engine.from_config(config_of("./data/state")) as engine:
            for number in range(3):
                engine.set(f"scope-{number % 2}", str(number), number)

    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    directory = str(tmp_path / "data" / "state")
    assert said == [
        f"opened the store {directory!r}, which is new",
        f"opened the store {directory!r}, which holds 3 keys in 2 scopes",
    ]


# --- a file system that is read-only but for the store ---------------------------------------------------------------


def test_saves_that_sqlite_would_spill_need_no_place_for_temporary_files(tmp_path: Path) -> None:
    """Temporary files go to memory: each connection says so itself, whatever the environment has."""
    adapter = FileAdapter(tmp_path / "store")
    with StoreReader(tmp_path / "store") as reader:
        assert reader._connection.execute("PRAGMA temp_store").fetchone() == (2,)
    adapter.load("s")
    assert adapter._writer is not None
    for connection in (adapter._writer, *adapter._idle):
        assert connection.execute("PRAGMA temp_store").fetchone() == (2,)
    adapter.close()


# --- who may read it -------------------------------------------------------------------------------------------------


def test_every_file_of_a_store_is_its_owners_alone_from_the_start(open_file: Open, directory: Path) -> None:
    before = os.umask(0)
    try:
        adapter = open_file()
        adapter.save(ONE)
        found = {path.name: oct(mode(path)) for path in directory.iterdir()}
        adapter.close()
    finally:
        os.umask(before)

    assert set(found) == {"state.db", "state.db-wal", "state.db-shm", "state.lock"}
    assert set(found.values()) == {"0o600"}


def test_files_that_others_could_read_are_tightened_and_that_is_logged(
    open_file: Open, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_file().close()
    for name in ("state.db", "state.lock"):
        (directory / name).chmod(0o664)

    adapter = open_file()

    assert {mode(directory / name) for name in ("state.db", "state.lock")} == {0o600}
    assert sorted(record.getMessage().split("'")[1] for record in caplog.records) == [
        str(directory / "state.db"), str(directory / "state.lock"),
    ]  # fmt: skip
    adapter.close()


def test_a_store_that_vanished_is_put_back_for_its_owner_alone(open_file: Open, directory: Path) -> None:
    adapter = open_file()
    adapter.save(ONE)
    (directory / "state.db").unlink()

    adapter.save([change("s", 2, {"k": b"2"}, {})])

    assert mode(directory / "state.db") == 0o600
    adapter.close()


# --- the lock file ---------------------------------------------------------------------------------------------------

CRASH = """
import os, sys
from scopestate.persistence import FileAdapter
FileAdapter(sys.argv[1])
os._exit(0)
"""


def test_the_lock_file_keeps_no_argument_of_the_program(directory: Path) -> None:
    subprocess.run([sys.executable, "-c", CRASH, str(directory), "--password=hunter2"], check=True, timeout=60)

    text = (directory / "state.lock").read_text()

    assert "hunter2" not in text
    assert str(directory) not in text
    assert "pid" in json.loads(text)
    assert mode(directory / "state.lock") == 0o600


def test_what_an_earlier_version_wrote_into_the_lock_is_not_told_to_others(open_file: Open, directory: Path) -> None:
    open_file()
    path = directory / "state.lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), "command": "app --password=hunter2"}))

    with pytest.raises(StoreLocked) as caught:
        open_file()

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_place_of_the_lock_is_refused_and_not_followed(directory: Path, tmp_path: Path, exists: bool) -> None:
    directory.mkdir()
    target = tmp_path / "precious"
    if exists:
        target.write_text("precious")
    (directory / "state.lock").symlink_to(target)

    with pytest.raises(StoreUnusable, match="symbolic link"):
        FileAdapter(directory)

    assert target.read_text() == "precious" if exists else not target.exists()
    assert (directory / "state.lock").is_symlink()


def test_a_pipe_in_place_of_the_lock_is_refused_at_once(directory: Path) -> None:
    directory.mkdir()
    os.mkfifo(directory / "state.lock")

    with pytest.raises(StoreUnusable, match="not a regular file"):
        FileAdapter(directory)
