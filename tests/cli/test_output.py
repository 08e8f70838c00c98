"""Where output goes: pipes whose reader leaves, full disks, encodings, closed descriptors, terminals."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, Program, Run

from scopestate import Engine
from scopestate.cli.terminal import json_text, shown
from scopestate.cli.watch_work import event_line
from scopestate.config import from_mapping
from scopestate.server.server import Server

COMMAND = (sys.executable, "-m", "scopestate")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store whose export is larger than any pipe's buffer."""
    folder = tmp_path / "store"
    kv = {"store_method": "file_based", "file_path": str(folder)}
    entry = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    with Engine(from_mapping({"workers": [entry]})) as engine:
        for number in range(2000):
            engine.set("s", str(number), "x" * 200)
    return folder


def run(*arguments: str, stdin: bytes = b"", stdout: Any = subprocess.PIPE, **environment: str) -> Any:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=PATIENCE_S * 3,
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
    )


def in_shell(line: str, *parts: str) -> tuple[int, str]:
    """Run `$C ...` in bash; return the exit code of the first command of the pipe, and what all said."""
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}", "bash", *parts],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S * 3,
        env={**os.environ, "C": " ".join(COMMAND)},
        check=False,
    )
    return done.returncode, done.stderr


def test_a_reader_that_has_enough_ends_an_export_quietly(store: Path) -> None:
    code, said = in_shell('$C store export "$1" | head -1 >/dev/null', str(store))

    assert (code, said) == (0, "")


@pytest.mark.parametrize("arguments", ["--help", "--version", "store --help", "config show", "get s k", "list-groups"])
def test_a_reader_that_never_reads_is_no_error(arguments: str, server: Server) -> None:
    server.engine.set("s", "k", "x" * 300_000)

    code, said = in_shell(f"$C {arguments} | true")

    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert code in (0, 1)  # 1 is what rich makes of help texts


@pytest.mark.parametrize(
    "arguments", ["store export STORE", "store info STORE", "store verify STORE --json", "get s k", "config show", "-V"]
)
def test_a_full_disk_behind_standard_output_is_said(arguments: str, store: Path, server: Server) -> None:
    server.engine.set("s", "k", 1)

    code, said = in_shell(f"$C {arguments.replace('STORE', str(store))} > /dev/full")

    assert code == 4, said
    assert "standard output cannot be written: No space left on device" in " ".join(said.split())
    assert "Traceback" not in said
    assert "Exception ignored" not in said


@pytest.mark.parametrize("arguments", ["get s k", "store info STORE", "store export STORE"])
def test_a_closed_standard_output_is_said(arguments: str, store: Path, server: Server) -> None:
    server.engine.set("s", "k", 1)

    code, said = in_shell(f"$C {arguments.replace('STORE', str(store))} >&-")

    assert code == 4, said
    assert "standard output is closed" in said


def test_without_standard_error_the_result_is_there_all_the_same(server: Server) -> None:
    server.engine.set("s", "k", 1)

    assert in_shell('test "$($C get s k 2>&-)" = 1')[0] == 0
    assert in_shell("$C get s missing 2>&-")[0] == 6


def test_without_standard_input_a_dash_is_an_error(server: Server, store: Path) -> None:
    code, said = in_shell("$C set s k - <&-")
    assert (code, "standard input is closed" in said) == (2, True), said

    code, said = in_shell(f"$C store import {store.parent / 'new'} <&-")
    assert (code, "standard input is closed" in said) == (4, True), said


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=["cp1252", "ascii", "C"],
)
def test_an_encoding_without_a_character_gets_it_as_json_escapes_it(
    environment: dict[str, str], server: Server
) -> None:
    key, value = "👩\u2028é", {"é👩‍👧": "ü\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}
    server.engine.set("s", key, value)

    done = run("call", "state::get", "-", stdin=json.dumps({"scope": "s", "key": key}).encode(), **environment)
    missing = run("get", "s", "nö👩", "--json", **environment)
    refused = run("call", "nö::such👩", "--json", **environment)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("cp1252" if "cp1252" in environment.values() else "ascii")) == value
    assert missing.returncode == 6
    assert b"Traceback" not in missing.stderr + refused.stderr
    assert json.loads(refused.stderr.decode("cp1252"))["error"]["code"] == "function_not_found"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("\ufeff1\r\n".encode(), 0),
        ('"é"'.encode("utf-16"), 0),
        (b"", 2),
        (b" \n", 2),
        (b'"\xe9"', 2),
        (b"\xff\xfe\x00", 2),
        (b"[" * 100_000, 2),
    ],
    ids=["utf-8 mark", "utf-16", "empty", "blank", "latin-1", "half utf-16", "deep"],
)
def test_values_on_standard_input(given: bytes, code: int, cli: Run, server: Server) -> None:
    server.engine.register_function("app::any", lambda payload: payload)
    for arguments in (("set", "s", "k", "-"), ("call", "app::any", "-")):
        done = cli(*arguments, stdin=given)

        assert done.code == code, done.err
    ops = b"\xef\xbb\xbf" + b'[{"type":"set","path":"","value":1}]'
    assert cli("update", "s", "k", "-", stdin=ops).code == 0


HOSTILE = "\x1b]0;pwned\x07\x9b31m\u202ekey\x7f"
OBEYED = ("\x1b", "\x07", "\x9b", "\u202e", "\x7f")


def test_control_characters_are_shown_in_every_result_and_error(cli: Run, server: Server, tmp_path: Path) -> None:
    server.engine.set(HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    server.engine.register_function("app::fails", lambda payload: 1 / len(HOSTILE.removeprefix(HOSTILE)))
    server.engine.register_function("app::says", lambda payload: fail_with(HOSTILE))
    bad = tmp_path / "bad\x1b[31m.yaml"
    bad.write_text('limits: {"\\e[31mx": 1}\n')

    got = cli("get", HOSTILE, HOSTILE)
    results = [
        got,
        cli("list", HOSTILE),
        cli("list-groups"),
        cli("get", "s", HOSTILE),
        cli("call", HOSTILE),
        cli("call", HOSTILE, "--json"),
        cli("call", "app::says"),
        cli("config", "check", str(bad)),
        cli("config", "check", str(bad), "--json"),
        cli("store", "info", HOSTILE),
        cli("store", "import", str(tmp_path / "new"), HOSTILE),
    ]

    for result in results:
        assert not [sign for sign in OBEYED if sign in result.out + result.err], result.out + result.err
    assert got.json == {HOSTILE: HOSTILE}
    assert "pwned" in results[6].err


def fail_with(text: str) -> None:
    raise ValueError(text)


def test_events_for_people_and_programs_hold_no_control_characters() -> None:
    event = {"event_type": "state:created", "scope": HOSTILE, "key": HOSTILE, "old_value": None, "new_value": HOSTILE}

    line = event_line(event).plain

    assert not [sign for sign in OBEYED if sign in line]
    assert json.loads(json_text(json.dumps(event, ensure_ascii=False).encode())) == event
    assert not [sign for sign in OBEYED if sign in json_text(json.dumps(event, ensure_ascii=False).encode())]
    assert shown("a\nb\x1b") == "a\nb\\x1b"
    assert shown("a\nb", keep="") == "a\\nb"


def test_a_terminal_shows_json_indented_and_obeys_none_of_it(server: Server) -> None:
    server.engine.set("s", "k", {"text": HOSTILE, "n": 1})
    master, slave = pty.openpty()
    try:
        done = run("get", "s", "k", stdout=slave, NO_COLOR="1", TERM="dumb")
        os.close(slave)
        text = os.read(master, 65536).decode()
    finally:
        os.close(master)

    assert done.returncode == 0, done.stderr
    assert json.loads(text) == {"text": HOSTILE, "n": 1}
    assert text.count("\n") == 4
    assert not [sign for sign in OBEYED if sign in text]


def test_watch_at_a_terminal_shows_lines_for_people(server: Server, engine: Engine) -> None:
    master, slave = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "watch", "--count", "2"],
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"},
    ) as watch:
        try:
            os.close(slave)
            assert watch.stderr is not None
            assert watch.stderr.readline() == f"watching {server.url}\n"
            engine.set("s", "k", HOSTILE)
            engine.set("s", "k", 2)
            assert watch.wait(PATIENCE_S) == 0
            first, second = os.read(master, 65536).decode().splitlines()
        finally:
            watch.kill()
            os.close(master)

    assert first.startswith("created s / k")
    assert not [sign for sign in OBEYED if sign in first]
    assert second.startswith("updated s / k")
    assert second.endswith(" -> 2")


def test_watch_ends_when_its_reader_does_even_without_an_event(program: type[Program], server: Server) -> None:
    watch = program("watch")
    assert watch.error_line() == f"watching {server.url}"
    assert watch.process.stdout is not None

    watch.process.stdout.close()

    assert watch.process.wait(PATIENCE_S) == 0
    assert watch.process.stderr is not None
    assert watch.process.stderr.read() == ""


def test_watch_ends_with_an_error_when_it_cannot_write(server: Server, engine: Engine) -> None:
    with open("/dev/full", "wb") as full:
        watch = subprocess.Popen([*COMMAND, "watch"], stdout=full, stderr=subprocess.PIPE, text=True)
    try:
        assert watch.stderr is not None
        assert watch.stderr.readline() == f"watching {server.url}\n"
        engine.set("s", "k", 1)
        assert watch.wait(PATIENCE_S) == 4
        assert "No space left" in watch.stderr.read()
    finally:
        watch.kill()
        watch.communicate()


def test_no_server_fails_at_once_and_says_how_to_start_one(cli: Run) -> None:
    nowhere = ("--url", "ws://127.0.0.1:9")
    commands = [
        ("get", "s", "k"),
        ("set", "s", "k", "1"),
        ("delete", "s", "k"),
        ("update", "s", "k", "[]"),
        ("list", "s"),
        ("list-groups",),
        ("call", "f"),
        ("watch",),
    ]
    for command in commands:
        result = cli(*command, *nowhere)
        assert result.code == 5
        assert "start one with `scopestate serve`" in result.err
        assert "nothing was sent" in result.err
    for arguments in (("store", "export", "ws://127.0.0.1:9"), ("store", "import", "ws://127.0.0.1:9", "-")):
        result = cli(*arguments, stdin='{"scope":"s","key":"k","value":1}\n')
        assert result.code == 5, result.err
        assert "start one with `scopestate serve`" in result.err
