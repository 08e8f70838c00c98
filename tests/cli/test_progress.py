"""Progress of long commands at a terminal, and Ctrl-C in the middle of them."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, Program, Run, in_terminal

from scopestate import Engine
from scopestate.cli.progress import keys, percent, run_beside, size
from scopestate.cli.serve_screen import stopping_line
from scopestate.errors import StorageError
from scopestate.persistence.sqlite.reading import StoreReader

SLOW = """
import pathlib, threading

def check(value, version):
    pathlib.Path("begun").touch()
    threading.Event().wait(600)
"""
RULES = """
workers:
- name: iii-state
  config: {adapter: {name: kv, config: {store_method: file_based, file_path: store, share: never}}}
scopes:
- {name: people, schema: {type: object}, version: 2, version_field: v, upgrade: slow_rules:check}
"""


def filled(folder: Path, keys: int) -> Path:
    options = {"store_method": "file_based", "file_path": str(folder / "store"), "share": "never"}
    config: dict[str, Any] = {
        "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]
    }
    with Engine.from_config(config) as engine:
        for at in range(keys):
            engine.set("people", f"key-{at}", {"n": at})
    return folder / "store"


def wait_for_file(file: Path, process: subprocess.Popen[Any]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not file.exists():
        assert process.poll() is None, "it has ended too early"
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_terminal_is_told_how_far_a_check_and_an_import_are(cli: Run, tmp_path: Path) -> None:
    store = filled(tmp_path, 1200)

    checked = in_terminal("store", "verify", str(store))
    assert "checking the database" in checked
    assert "100 %" in checked
    assert f"{store}: ok" in checked

    file = tmp_path / "export.jsonl"
    assert cli("store", "export", str(store), str(file)).code == 0
    imported = in_terminal("store", "import", str(tmp_path / "copy"), str(file))
    assert "checking the file" in imported
    assert size(file.stat().st_size, file.stat().st_size) in imported
    assert "1,200/1,200 keys" in imported


def test_what_is_no_terminal_is_told_nothing(cli: Run, tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    exported = cli("store", "export", str(store)).out

    assert cli("store", "verify", str(store)).err == ""
    assert cli("store", "import", str(tmp_path / "copy"), stdin=exported).err == f"imported 3 keys to {tmp_path}/copy\n"


def test_amounts_are_written_for_people() -> None:
    assert [keys(1200, 5000), keys(1, None)] == ["1,200/5,000 keys", "1 keys"]
    assert [size(1_200_000, 5_000_000), size(5, None)] == ["1.2 MB/5.0 MB", "5 bytes"]
    assert [percent(0, 200), percent(50, 200), percent(900, 200), percent(200, 200), percent(3, 0)] == [
        "0 %",
        "25 %",
        "99 %",
        "100 %",
        "",
    ]


@pytest.mark.parametrize(
    ("command", "number"), [("verify", signal.SIGTERM), ("import", signal.SIGINT), ("migrate", signal.SIGINT)]
)
def test_a_signal_in_the_middle_of_a_check_ends_it(
    command: str, number: int, program: type[Program], cli: Run, tmp_path: Path
) -> None:
    filled(tmp_path, 3)
    (tmp_path / "slow_rules.py").write_text(SLOW)
    (tmp_path / "rules.yaml").write_text(RULES)
    assert cli("store", "export", str(tmp_path / "store"), str(tmp_path / "all.jsonl")).code == 0
    arguments = ["new", "all.jsonl", "--config", "rules.yaml"] if command == "import" else ["rules.yaml"]

    running = program("store", command, *arguments, cwd=tmp_path)
    wait_for_file(tmp_path / "begun", running.process)
    ended = running.signal(number)

    assert (ended.code, ended.out) == (130, "")
    assert (
        ended.err
        == {
            "verify": "interrupted: the check has not ended; nothing was changed\n",
            "import": "interrupted: nothing was imported to new\n",
            "migrate": "interrupted: 0 values migrated, 0 are current; repeat the command to continue\n",
        }[command]
    )


def test_ctrl_c_ends_work_that_handles_no_signals() -> None:
    interrupted, ended = threading.Event(), threading.Event()

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert interrupted.wait(PATIENCE_S)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_beside(work, interrupted.set)
    assert ended.is_set()


def test_work_beside_gives_its_result_or_its_error() -> None:
    assert run_beside(lambda: 7, bool) == 7
    with pytest.raises(ZeroDivisionError):
        run_beside(lambda: 1 // 0, bool)


def test_the_check_of_a_store_says_how_far_it_is_and_can_be_interrupted(tmp_path: Path) -> None:
    told: list[int] = []
    with StoreReader(filled(tmp_path, 3000)) as reader:
        assert reader.problems(told.append) == []
        assert told == sorted(told)
        # An estimate: another SQLite takes other steps.
        assert 0.5 < told[-1] / reader.steps_to_check() < 2
        with pytest.raises(StorageError, match="interrupted"):
            reader.problems(lambda steps: reader.interrupt())


def test_a_stopping_engine_says_what_it_still_has_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    options = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 86_400_000}
    release = threading.Event()
    with Engine.from_config(
        {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}
    ) as engine:
        store = engine._parts.backend.store
        assert store is not None
        engine.on_change(scope="people", function_id="app::wait")(lambda event: release.wait(PATIENCE_S))
        save = store.save

        def save_and_tell(*changes: Any) -> None:
            told.append(stopping_line(engine))
            save(*changes)

        monkeypatch.setattr(store, "save", save_and_tell)
        assert stopping_line(engine) == "saving"
        for at in range(1200):
            engine.set("other", f"key-{at}", at)
        for at in range(3):
            engine.set("people", f"key-{at}", at)
        ends = time.monotonic() + PATIENCE_S
        while stopping_line(engine) != "delivering 3 events":
            assert time.monotonic() < ends, stopping_line(engine)
            time.sleep(0.005)
        release.set()
        engine.flush()
        assert told == ["saving 0/1,203 keys"]
        assert store.keys_written() == 1203


def test_serve_says_at_a_terminal_what_it_waits_for(tmp_path: Path) -> None:
    (tmp_path / "slow_handler.py").write_text(
        "import pathlib, time\n"
        "def handle(event):\n"
        "    pathlib.Path('begun').touch()\n"
        "    while not pathlib.Path('go-on').exists():\n"
        "        time.sleep(0.02)\n"
    )
    (tmp_path / "engine.yaml").write_text(
        "workers:\n"
        "- {name: iii-state, config: {adapter: {name: kv, config: {store_method: file_based, file_path: store}}}}\n"
        "- {name: iii-worker-manager, config: {port: 0}}\n"
        "functions: {app::handle: slow_handler:handle}\n"
        "triggers: [{function_id: app::handle}]\n"
        "limits: {close_grace_ms: 600000}\n"
    )
    main_end, program_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "scopestate", "serve", "engine.yaml"],
        stderr=program_end,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(program_end)
    try:
        shown = read_until(b"calls/s", main_end)
        with Engine.from_config({"workers": [{"name": "iii-state", "config": _kv(tmp_path / "store")}]}) as follower:
            follower.set("s", "k", 1)
        wait_for_file(tmp_path / "begun", process)
        process.send_signal(signal.SIGINT)
        shown = read_until(b"delivering 1 event", main_end)
        (tmp_path / "go-on").touch()
        shown = read_until(b"stopped, everything is saved", main_end)
        assert process.wait(PATIENCE_S) == 0, shown
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        os.close(main_end)


def read_until(words: bytes, terminal: int) -> bytes:
    """Read what a terminal is sent, up to these words."""
    shown = b""
    ends = time.monotonic() + PATIENCE_S
    while words not in shown:
        assert select.select([terminal], [], [], max(ends - time.monotonic(), 0))[0], shown
        shown += os.read(terminal, 4096)
    return shown


def _kv(directory: Path) -> dict[str, Any]:
    return {"adapter": {"name": "kv", "config": {"store_method": "file_based", "file_path": str(directory)}}}
