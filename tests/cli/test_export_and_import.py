"""What an export writes to, and what is there after an import that ended early."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from commands import PATIENCE_S, Program, Run
from stored import values_of

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.errors import StorageError
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.server.server import Server
from scopestate.transfer import import_whole


def open_store(folder: Path) -> Engine:
    kv = {"store_method": "file_based", "file_path": str(folder)}
    return Engine(
        from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]})
    )


def test_an_import_into_a_directory_in_use_names_the_address_of_its_engine(cli: Run, tmp_path: Path) -> None:
    lines = b'{"scope": "s", "key": "k", "value": 1}\n'
    folder = tmp_path / "a store"
    folder.mkdir(mode=0o700)
    with open_store(folder) as engine:
        refused = cli("store", "import", str(folder), "-", stdin=lines)
        assert refused.code == 4
        address = refused.err.split()[-2]
        assert address == f"ws+unix://{tmp_path}/a%20store/state.sock"

        assert cli("store", "import", address, "-", stdin=lines).code == 0
        assert engine.get("s", "k") == 1


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with open_store(tmp_path / "store") as engine:
        engine.set("s", "k", 1)
    return tmp_path / "store"


def keys_in(text: str) -> list[str]:
    return [line["key"] for line in map(json.loads, text.splitlines()) if "key" in line]


def test_a_pipe_gets_the_export_and_stays_a_pipe(program: type[Program], store: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    export = program("store", "export", str(store), str(pipe))

    assert keys_in(pipe.read_text()) == ["k"]
    assert export.wait().code == 0
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode)


def test_a_device_is_written_to_and_stays(cli: Run, store: Path, tmp_path: Path) -> None:
    before = os.stat(os.devnull)
    link = tmp_path / "link"
    link.symlink_to(os.devnull)

    assert cli("store", "export", str(store), os.devnull).code == 0
    assert cli("store", "export", str(store), str(link)).code == 0
    full = cli("store", "export", str(store), "/dev/full")

    assert (full.code, "No space left on device" in full.err) == (4, True), full.err
    assert os.path.samestat(os.stat(os.devnull), before)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "-"])
def test_standard_output_by_its_names(name: str, store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scopestate", "store", "export", str(store), name]
    piped = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S * 3, check=False)
    file = tmp_path / "both.txt"
    with open(file, "w") as both:
        both.write("# first\n")
        both.flush()
        redirected = subprocess.run(command, stdout=both, timeout=PATIENCE_S * 3, check=False)

    assert (piped.returncode, keys_in(piped.stdout)) == (0, ["k"])
    assert redirected.returncode == 0
    assert file.read_text().startswith("# first\n")
    assert keys_in(file.read_text().removeprefix("# first\n")) == ["k"]


@pytest.mark.parametrize("kind", ["directory", "socket"])
def test_what_cannot_be_written_stays_as_it_is(kind: str, cli: Run, store: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with socket.socket(socket.AF_UNIX) as listener:
        target.mkdir() if kind == "directory" else listener.bind(str(target))
        before = os.lstat(target)

        refused = cli("store", "export", str(store), str(target))

        assert (refused.code, "cannot be written" in refused.err) == (4, True), refused.err
        assert os.path.samestat(os.lstat(target), before)


def test_a_link_is_followed_and_the_file_keeps_its_mode(cli: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "real.jsonl", tmp_path / "link.jsonl"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    dangling = tmp_path / "dangling.jsonl"
    dangling.symlink_to(tmp_path / "there" / "new.jsonl")

    first, again = (
        cli("store", "export", str(store), str(link)),
        cli("store", "export", str(store), str(link), "--json"),
    )
    new = cli("store", "export", str(store), str(dangling))

    assert keys_in(file.read_text()) == ["k"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert "overwriting what was there" in first.err
    assert json.loads(again.err) == {"exported": 1, "overwritten": True}
    assert dangling.is_symlink()
    assert keys_in((tmp_path / "there" / "new.jsonl").read_text()) == ["k"]
    assert "overwriting" not in new.err
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new.jsonl", "real.jsonl"]


def test_a_longer_file_in_memory_is_replaced_whole(cli: Run, store: Path) -> None:
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        file = Path(folder) / "export.jsonl"
        file.write_text("old " * 1000)

        assert cli("store", "export", str(store), str(file)).code == 0

        assert keys_in(file.read_text()) == ["k"]


def test_files_of_the_store_itself_are_refused(cli: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store / "state.db")

    for target in (store / "state.db", store / "state.lock", tmp_path / "link"):
        refused = cli("store", "export", str(store), str(target))
        assert (refused.code, "is a file of the store" in refused.err) == (4, True), refused.err
    assert cli("store", "verify", str(store)).code == 0


def test_an_export_that_fails_leaves_the_file_before(cli: Run, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text("old")
    connection = sqlite3.connect(store / "state.db")
    connection.execute("UPDATE state SET value = 'nonsense'")
    connection.commit()
    connection.close()

    assert cli("store", "export", str(store), str(file)).code == 4
    assert file.read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".old")]


def lines(count: int, last: bytes = b"") -> list[bytes]:
    return [b'{"scope":"s","key":"%d","value":%d}\n' % (number, number) for number in range(count)] + (
        [last] * bool(last)
    )


class Stopped(BaseException):
    """As KeyboardInterrupt: comes at any moment."""


def stop_at(keys: int) -> Callable[[int], object]:
    def progress(done: int) -> None:
        if done >= keys:
            raise Stopped

    return progress


def test_an_import_into_a_directory_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    adapter = FileAdapter(str(tmp_path / "store"))
    try:
        with pytest.raises(Stopped):
            import_whole(lines(5000), adapter, stop_at(3000))
        assert adapter.scopes() == []
        assert import_whole(lines(5000), adapter).keys == 5000
        with pytest.raises(Stopped):
            import_whole([b'{"scope":"s","key":"0","value":"new"}\n', *lines(5000)[1:]], adapter, stop_at(3000))
        assert values_of(adapter.load("s"))["0"] == b"0"
    finally:
        adapter.close()


def test_an_import_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[int] = []
    adapter = FileAdapter(str(tmp_path / "store"))
    try:
        import_whole(lines(2500), adapter, told.append)
    finally:
        adapter.close()

    assert told[0] == 1000
    assert told[-1] == 2500
    assert told == sorted(told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_during_an_import_leaves_an_empty_store(number: int, program: type[Program], tmp_path: Path) -> None:
    store = tmp_path / "store"
    big = tmp_path / "big.jsonl"
    big.write_bytes(b"".join(lines(200_000)))
    running = program("store", "import", str(store), str(big))
    # The lock file is there once the store is open; what is read twice takes much longer than that.
    while not (store / "state.db-wal").exists() and running.process.poll() is None:
        os.sched_yield()

    ended = running.signal(number)

    assert ended.code == (-number if number == signal.SIGKILL else 130), ended.err
    assert number == signal.SIGKILL or "nothing was imported" in ended.err
    with open_store(store) as engine:
        assert engine.list_groups() == []


def test_an_import_into_an_engine_that_ends_early_says_how_to_go_on(
    program: type[Program], cli: Run, server: Server, engine: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"".join(lines(100_000)))
    running = program("store", "import", server.url, str(file))
    assert "if this is interrupted, repeat it with --merge" in running.error_line()
    while engine.get("s", "0") is None:  # not `list`: it takes longer the more there is
        os.sched_yield()

    ended = running.signal(signal.SIGINT)

    assert ended.code == 130, "it had ended before the signal came"
    assert "to continue, repeat the import with --merge" in ended.err
    file.write_bytes(b"".join(lines(100)))
    assert cli("store", "import", server.url, str(file)).code == 4
    assert cli("store", "import", server.url, str(file), "--merge").code == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"scope":"x","key":"\xff","value":1}\n', "line 1: not UTF-8 text"),
        (lines(1)[0] + b'{"scope":"x","key":"k","value":"\xe9"}\n', "line 2: not UTF-8 text"),
        (lines(1)[0].decode().encode("utf-16"), "line 1: this is UTF-16 text"),
        (b'{"scope":"x","revision":9223372036854775807}\n', "line 1: "),
        (b'{"scope":"x","key":"k","value":' + b"[" * 100_000 + b"\n", "line 1: "),
    ],
    ids=["key", "value", "utf-16", "revision", "deep"],
)
def test_what_cannot_be_read_is_named_by_line(content: bytes, problem: str, cli: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)

    refused = cli("store", "import", str(tmp_path / "new"), str(tmp_path / "in.jsonl"))

    assert (refused.code, problem in refused.err) == (4, True), refused.err
    assert not (tmp_path / "new").exists()


def test_a_byte_order_mark_and_a_pipe_are_read(program: type[Program], cli: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(1)[0])
    assert cli("store", "import", str(tmp_path / "one"), str(tmp_path / "in.jsonl")).code == 0

    os.mkfifo(tmp_path / "pipe")
    running = program("store", "import", str(tmp_path / "two"), str(tmp_path / "pipe"))
    (tmp_path / "pipe").write_bytes(lines(1)[0])
    assert running.wait().code == 0


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_socket()}


def test_looking_at_a_closed_store_changes_nothing(cli: Run, store: Path) -> None:
    before, times = content_of(store), [path.stat().st_mtime_ns for path in sorted(store.iterdir())]

    for command in ("info", "verify", "export"):
        assert cli("store", command, str(store)).code == 0

    assert content_of(store) == before
    assert [path.stat().st_mtime_ns for path in sorted(store.iterdir())] == times


def test_looking_at_a_store_of_a_process_that_died_reads_its_log_and_changes_nothing(cli: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    program = (
        "import os, sys\nfrom scopestate import Engine\n"
        "kv = {'store_method': 'file_based', 'file_path': sys.argv[1]}\n"
        "entry = {'name': 'iii-state', 'config': {'adapter': {'name': 'kv', 'config': kv}}}\n"
        "engine = Engine.from_config({'workers': [entry]})\n"
        "engine.set('s', 'k', 1)\nengine.flush()\nos._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(store)], check=True, timeout=PATIENCE_S * 3)
    assert (store / "state.db-wal").stat().st_size > 0
    before = content_of(store)

    assert keys_in(cli("store", "export", str(store)).out) == ["k"]
    assert cli("store", "info", str(store), "--json").json["keys"] == 1
    assert cli("store", "verify", str(store)).code == 0

    assert content_of(store) == before


def test_looking_at_a_store_beside_its_engine(cli: Run, store: Path) -> None:
    with open_store(store) as engine:
        engine.set("s", "other", 2)
        engine.flush()
        names = sorted(content_of(store))

        assert cli("store", "info", str(store), "--json").json["keys"] == 2
        assert sorted(content_of(store)) == names
        engine.set("s", "third", 3)
        engine.flush()


def test_a_database_that_changes_under_a_reader_without_locks_is_noticed(store: Path) -> None:
    with StoreReader(store) as reader:
        assert reader.scopes() == ["s"]
        os.utime(store / "state.db")
        with pytest.raises(StorageError, match="was changed while it was read"):
            reader.scopes()


def test_an_export_of_a_running_engine_has_whole_transactions(cli: Run, server: Server, engine: Engine) -> None:
    """Each scope is read as of one moment. The sum of all keys is 0 before and after each transaction."""
    ended = threading.Event()

    def move() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with engine.batch("s") as batch:
                batch.set(f"{number % 300}", number)
                batch.set(f"-{number % 300}", -number)

    moving = threading.Thread(target=move)
    moving.start()
    try:
        sums = []
        while len(sums) < 5 or not sums[-1][0]:
            exported = [json.loads(line) for line in cli("store", "export", server.url).out.splitlines()]
            values = [line["value"] for line in exported if "key" in line]
            sums.append((len(values), sum(values)))
    finally:
        ended.set()
        moving.join()

    assert [total for _, total in sums] == [0] * len(sums)
    assert all(keys % 2 == 0 for keys, _ in sums)
