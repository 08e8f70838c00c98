"""`console`: the web console of an engine as a program, which lets in the browser that has its address."""

from __future__ import annotations

import http.cookiejar
import json
import os
import pty
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, Program, Run

from scopestate import Engine
from scopestate.cli import console_work as command
from scopestate.server.server import Server


class Browser:
    """Keeps cookies, and follows what the first page says."""

    def __init__(self) -> None:
        jar = http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
        self.jar = jar

    def get(self, address: str, **headers: str) -> tuple[int, str]:
        return self._open(urllib.request.Request(address, headers=headers))

    def post(self, address: str, **fields: str) -> tuple[int, str]:
        token = next(cookie.value for cookie in self.jar if cookie.name.startswith("scopestate_csrf"))
        data = urllib.parse.urlencode({"csrf": token, **fields}).encode()
        headers = {"Sec-Fetch-Site": "same-origin"}
        return self._open(urllib.request.Request(address, data, headers))

    def _open(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with self._opener.open(request, timeout=PATIENCE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


def file_of(folder: Path) -> Path:
    file = folder / "engine.yaml"
    file.write_text(
        "workers:\n"
        f"- {{name: iii-state, config: {{adapter: {{name: kv, config: {{store_method: file_based,"
        f" file_path: {folder}/store}}}}}}}}\n"
        "functions: {app::fails: json:loads}\n"
        "triggers: [{function_id: app::fails}]\n"
    )
    return file


def _started(program: type[Program], *arguments: str) -> tuple[Any, dict[str, Any]]:
    started = program("console", *arguments, "--json")
    facts: dict[str, Any] = json.loads(started.line())
    return started, facts


def test_the_address_lets_one_browser_in_once(program: type[Program], tmp_path: Path) -> None:
    started, facts = _started(program, str(file_of(tmp_path)))
    address = facts["url"].split("?")[0]
    browser, other = Browser(), Browser()

    assert browser.get(address)[0] == 401
    status, page = browser.get(facts["url"])
    assert (status, 'url=./"' in page) == (200, True)
    assert "Overview" in browser.get(address)[1]

    assert other.get(facts["url"])[0] == 401
    assert other.get(f"{address}?token=x")[0] == 401
    assert other.get(f"{address}scopes", Cookie="scopestate_console=x")[0] == 401
    assert browser.get(f"{address}scopes", Host="rebound.example")[0] == 421
    (cookie,) = [one for one in browser.jar if one.name.startswith("scopestate_console_")]
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "strict"
    ended = started.signal(signal.SIGTERM)
    assert (ended.code, ended.err) == (0, "")


def test_it_only_reads_unless_it_is_told_to_write(program: type[Program], tmp_path: Path) -> None:
    file = file_of(tmp_path)
    for write in (False, True):
        started, facts = _started(program, str(file), *(["--write"] if write else []))
        address = facts["url"].split("?")[0]
        browser = Browser()
        browser.get(facts["url"])
        page = browser.get(f"{address}keys?scope=s")[1]
        assert ('action="create' in page) == write
        if not write:
            assert "Logged out" in browser.post(f"{address}log-out")[1]
            assert browser.get(address)[0] == 401
        else:
            assert browser.post(f"{address}create?scope=s", key="k", value="[1]")[0] == 200
            assert "Revision" in browser.get(f"{address}entry?scope=s&key=k")[1]
        assert started.signal(signal.SIGINT).code == 0


def test_a_file_whose_directory_is_open_follows_the_engine_that_has_it(program: type[Program], tmp_path: Path) -> None:
    file = file_of(tmp_path)
    text = file.read_text(encoding="utf-8").split("functions:")[0]
    (tmp_path / "running.yaml").write_text(text, encoding="utf-8")
    with Engine.from_config(tmp_path / "running.yaml", watch=False) as engine:
        engine.set("users", "ada", {"logins": 1})
        engine.on_change(scope="users", function_id="app::greet")(lambda event: None)

        started, facts = _started(program, str(file))
        address = facts["url"].split("?")[0]
        browser = Browser()
        browser.get(facts["url"])

        assert f"process {os.getpid()} on" in browser.get(address)[1]
        assert "follower" in browser.get(f"{address}?own=1")[1]
        assert "ada" in browser.get(f"{address}keys?scope=users")[1]
        assert "app::greet" in browser.get(f"{address}triggers")[1]
        assert "No server runs" not in browser.get(f"{address}workers")[1]
        assert started.signal(signal.SIGTERM).code == 0


def test_an_address_shows_a_running_engine(program: type[Program], engine: Engine, server: Server) -> None:
    engine.set("users", "ada", {"logins": 1})
    engine.register_function("app::greet", lambda payload: None, description="says hello")

    started, facts = _started(program, server.url)
    address = facts["url"].split("?")[0]
    browser = Browser()
    browser.get(facts["url"])

    assert "ada" in browser.get(f"{address}keys?scope=users")[1]
    assert "says hello" in browser.get(f"{address}workers")[1]
    assert "kept elsewhere" in browser.get(f"{address}scopes")[1]
    assert started.signal(signal.SIGTERM).code == 0


def test_what_cannot_be_reached_or_read_ends_it(cli: Run, tmp_path: Path) -> None:
    assert cli("console", "ws://127.0.0.1:1").code == 5
    assert cli("console", str(tmp_path / "missing.yaml")).code in {3, 4}
    file = file_of(tmp_path)
    with command._listener(0) as taken:
        done = cli("console", str(file), "--port", str(taken.getsockname()[1]))
    assert done.code == 3
    assert "takes any free port" in done.err


def test_without_its_extra_it_says_what_to_install(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)

    done = cli("console", str(file_of(tmp_path)))

    assert done.code == 3
    assert "scopestate[console]" in done.err


def test_at_a_terminal_enter_prints_another_address(tmp_path: Path) -> None:
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "scopestate", "console", str(file_of(tmp_path))]
    process = subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        os.write(keyboard, b"\n")
        second = process.stdout.readline().strip()

        assert first.startswith("http://127.0.0.1:")
        assert (first != second, first.split("?")[0]) == (True, second.split("?")[0])
        for address in (first, second):
            assert Browser().get(address)[0] == 200
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=PATIENCE_S)[1]
        assert process.returncode == 0
        assert "press Enter for another" in err
    finally:
        process.kill()
        process.communicate()
        os.close(keyboard)
        os.close(terminal)
