"""`serve`: an engine with its server as a program, ended by signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, Program, Run
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from scopestate import Engine
from scopestate.cli.serve_screen import StatusLine
from scopestate.config import AdapterConfig, BridgeOptions, KvOptions
from scopestate.server.server import Server


def config_file(folder: Path, more: str = "") -> Path:
    file = folder / "engine.yaml"
    file.write_text(
        "workers:\n"
        f"- {{name: iii-state, config: {{adapter: {{name: kv, config: {{store_method: file_based,"
        f" file_path: {folder}/store, save_interval_ms: 86400000}}}}}}}}\n"
        "- {name: iii-worker-manager, config: {port: 0}}\n" + more
    )
    return file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_everything_saved(number: int, program: type[Program], cli: Run, tmp_path: Path) -> None:
    served = program("serve", str(config_file(tmp_path)), "--json")
    facts = json.loads(served.line())
    assert facts["pid"] == served.process.pid
    assert facts["state"] == f"{tmp_path}/store, saved every 86400000 ms"

    assert cli("set", "users", "k", '{"n": 1}', "--url", facts["url"]).code == 0
    ended = served.signal(number)

    assert ended.code == 0
    assert "stopped, everything is saved" in ended.err
    assert "Traceback" not in ended.err
    exported = cli("store", "export", str(tmp_path / "store")).out
    assert '{"scope":"users","key":"k","value":{"n":1},"revision":1}' in exported


def test_started_with_nohup_it_outlives_its_terminal(program: type[Program], cli: Run, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        served = program("serve", str(config_file(tmp_path)), "--json")
    finally:
        signal.signal(signal.SIGHUP, before)
    facts = json.loads(served.line())
    served.process.send_signal(signal.SIGHUP)

    assert cli("set", "users", "k", "1", "--url", facts["url"]).code == 0
    assert served.signal(signal.SIGTERM).code == 0


def test_a_second_signal_ends_it_at_once(program: type[Program], tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import threading\ndef hang(event):\n    threading.Event().wait()\n")
    more = (
        "functions: {app::hang: hanging:hang}\ntriggers: [{function_id: app::hang}]\nlimits: {close_grace_ms: 600000}\n"
    )
    served = program("serve", str(config_file(tmp_path, more)), "--json", cwd=tmp_path)
    url = json.loads(served.line())["url"]
    with Engine.from_config(bridge_to(url)) as engine:
        engine.set("s", "k", 1)
    served.process.send_signal(signal.SIGTERM)
    while "stopping" not in served.error_line():
        continue

    ended = served.signal(signal.SIGTERM)

    assert ended.code == 128 + signal.SIGTERM
    assert "ended at once by a second signal" in ended.err
    assert "changes that were not saved may be lost" in ended.err


def bridge_to(url: str) -> dict[str, Any]:
    adapter = {"name": "bridge", "config": {"bridge_url": url}}
    return {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}


def test_workers_are_told_to_come_back(program: type[Program]) -> None:
    served = program("serve", "--port", "0", "--json")
    with connect(json.loads(served.line())["url"]) as worker:
        assert json.loads(worker.recv(PATIENCE_S))["type"] == "workerregistered"
        assert served.signal(signal.SIGTERM).code == 0
        with pytest.raises(ConnectionClosed) as closed:
            worker.recv(PATIENCE_S)

    # Not 1000 or 1001, after which a Python SDK never reconnects (docs/reference/protocol.md, section 9).
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012


def test_without_a_file_state_is_in_memory(program: type[Program], cli: Run) -> None:
    served = program("serve", "--port", "0", "--json")
    facts = json.loads(served.line())

    assert facts["state"] == "in memory: lost when this process ends"
    assert cli("set", "s", "k", "1", "--url", facts["url"]).code == 0
    assert served.signal(signal.SIGTERM).code == 0


def test_the_banner_says_where_and_how(program: type[Program], tmp_path: Path) -> None:
    served = program("serve", str(config_file(tmp_path)))
    lines: list[str] = []
    while not any(line.startswith("process") for line in lines):
        lines.append(served.error_line())
        assert len(lines) < 50, lines
    served.signal(signal.SIGTERM)

    banner = "\n".join(lines)
    for words in ("ws://127.0.0.1:", str(tmp_path / "engine.yaml"), f"{tmp_path}/store", "no TLS", "Ctrl-C"):
        assert words in banner


def test_configured_functions_of_the_current_folder_run(program: type[Program], cli: Run, tmp_path: Path) -> None:
    (tmp_path / "served_handlers.py").write_text("def double(data): return data['n'] * 2\n")
    config_file(tmp_path, "functions: {app::double: 'served_handlers:double'}\n")
    served = program("serve", "engine.yaml", "--json", cwd=tmp_path)
    url = json.loads(served.line())["url"]

    assert cli("call", "app::double", '{"n": 4}', "--url", url).json == 8
    assert served.signal(signal.SIGTERM).code == 0


def test_mistakes_in_the_file_stop_it_before_it_begins(cli: Run, tmp_path: Path) -> None:
    file = config_file(tmp_path, "limits: {scope_mailbox: none}\n")

    result = cli("serve", str(file))

    assert result.code == 3
    assert "engine.yaml:4" in result.err


def test_a_port_in_use_is_named(program: type[Program], server: Server) -> None:
    result = program("serve", "--port", str(server.port)).wait()

    assert result.code == 3
    assert f"cannot listen on 127.0.0.1:{server.port}" in result.err
    assert "is another engine running there?" in result.err


def test_an_address_of_another_machine_is_not_taken_for_one_in_use(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("- {name: iii-worker-manager, config: {insecure: true}}\n")

    result = cli("serve", str(file), "--host", "192.0.2.1", "--port", "0")  # an address for documentation, RFC 5737

    assert result.code == 3
    assert "this machine has no such address" in result.err
    assert "another engine" not in result.err


def test_two_of_them_serve_one_store(program: type[Program], cli: Run, tmp_path: Path) -> None:
    file = config_file(tmp_path)
    first, second = program("serve", str(file), "--json"), program("serve", str(file), "--json")
    urls = [json.loads(served.line())["url"] for served in (first, second)]

    assert cli("set", "s", "k", "1", "--url", urls[0]).code == 0
    assert cli("get", "s", "k", "--url", urls[1]).out.strip() == "1"
    assert first.signal(signal.SIGTERM).code == 0
    assert cli("get", "s", "k", "--url", urls[1]).out.strip() == "1"
    assert second.signal(signal.SIGTERM).code == 0


def test_a_store_in_use_is_named(program: type[Program], tmp_path: Path) -> None:
    file = config_file(tmp_path)
    file.write_text(file.read_text().replace("save_interval_ms", "share: never, save_interval_ms"))
    first = program("serve", str(file), "--json")
    first.line()

    second = program("serve", str(file)).wait()

    assert second.code == 4
    assert f"process {first.process.pid}" in second.err
    assert first.signal(signal.SIGTERM).code == 0


def test_a_bridge_to_its_own_address_is_refused(program: type[Program], tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("workers:\n- {name: iii-state, config: {adapter: {name: bridge}}}\n")

    result = program("serve", str(file)).wait()

    assert result.code == 3
    assert "on which this engine itself listens" in result.err


def test_at_a_terminal_it_shows_a_status_line(tmp_path: Path) -> None:
    main_end, program_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "scopestate", "serve", "--port", "0"],
        stderr=program_end,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(program_end)
    shown = b""
    while b"calls/s" not in shown:
        shown += os.read(main_end, 4096)
    process.send_signal(signal.SIGINT)
    while b"stopped" not in shown:
        shown += os.read(main_end, 4096)
    assert process.wait(PATIENCE_S) == 0
    os.close(main_end)

    assert b"0 workers" in shown


def test_the_status_line_counts_by_the_clock(engine: Engine) -> None:
    now = [100.0]
    with Server(engine, port=0) as server:
        line = StatusLine(server, clock=lambda: now[0])
        engine.set("s", "k", 1)
        line.text()
        now[0] += 2.0
        for _ in range(10):
            engine.get("s", "k")
        text = line.text().plain

    assert "| 5 calls/s |" in text
    assert "1 scope, 1 key in memory" in text
    assert "up 0:00:02" in text
    assert "to save" not in text


def test_the_status_line_counts_calls_of_workers_once(engine: Engine, cli: Run) -> None:
    now = [100.0]
    with Server(engine, port=0) as server:
        line = StatusLine(server, clock=lambda: now[0])
        line.text()
        now[0] += 2.0
        for call in (("set", "s", "k", "1"), ("get", "s", "k"), ("call", "state::list_groups"), ("count", "s")):
            assert cli(*call, "--url", server.url).code == 0
        text = line.text().plain

    assert "| 2 calls/s | 4 calls/s of workers |" in text  # each command says who it is, too


def test_the_status_line_says_what_is_not_saved_yet(cli: Run, tmp_path: Path) -> None:
    with Server.from_config(config_file(tmp_path)) as server:
        server.engine.set("s", "k", 1)
        assert "1 scope to save" in StatusLine(server).text().plain


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (AdapterConfig("kv"), "in memory: lost when this process ends"),
        (AdapterConfig("kv", KvOptions("file_based", "/data", durability="commit")), "/data, saved on each write"),
        (AdapterConfig("bridge", BridgeOptions("ws://far:1", token="s3cret")), "bridge to ws://far:1, local events"),
    ],
)
def test_where_the_state_is_in_words(adapter: Any, words: str) -> None:
    assert adapter.config.described() == words
