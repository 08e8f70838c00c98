"""The pytest plugin: fresh engines whose failed handlers fail the test, and a clock that the test moves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from scopestate import DeliveryFailure, Engine, StateEvent
    from scopestate.testing import VirtualClock

# pytest loads this module in every run. The engine is imported when a fixture is used.

DRAIN_S: Final = 10.0
"""How long, at the end of a test, events that were fired may take to be handled."""
LATEST: Final = 20
"""How many events a failed `wait_for` shows."""

_checks = pytest.StashKey[list[Callable[[], None]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        "scopestate(config=None, errors='fail'): the configuration of this test's engines, a mapping or a file; "
        "errors='allow': failed handlers do not fail the test",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """After a test that has passed, check its engines."""
    result = yield
    for check in item.stash.get(_checks, []):
        check()
    return result


class _Marked:
    """What the marker of a test says."""

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
    """The events of `state_engine`, in the order in which they came. Filled by other threads."""

    def __init__(self) -> None:
        super().__init__()
        self._came = threading.Condition()

    def _add(self, event: StateEvent) -> None:
        with self._came:
            self.append(event)
            self._came.notify_all()

    def wait_for(self, wanted: Callable[[StateEvent], object], timeout: float = 10.0) -> StateEvent:
        """Return the first event for which `wanted(event)` is true, and wait for it up to `timeout` seconds.

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


def _open(node: pytest.Item, marked: _Marked, config: Any) -> Engine:
    """Open an engine on the real clock, and have it checked after the test."""
    from scopestate import Engine  # noqa: PLC0415 - see above
    from scopestate.errors import ReplyTimeout  # noqa: PLC0415 - see above
    from scopestate.testing import describe  # noqa: PLC0415 - see above

    failures: list[DeliveryFailure] = []

    def note(failure: DeliveryFailure) -> None:
        if failure.final:
            failures.append(failure)

    engine = Engine.from_config(config, watch=False, on_error=note, handle_sigterm=False)

    def check() -> None:
        if not engine.closed:
            try:
                engine.drain(timeout=DRAIN_S)
            except ReplyTimeout as error:
                pytest.fail(f"events were not handled {DRAIN_S:g} s after the test: {error}", pytrace=False)
        if failures and marked.fails:
            pytest.fail(describe(failures), pytrace=False)

    node.stash.setdefault(_checks, []).append(check)
    return engine


def _with_files(config: Any, directory: os.PathLike[str]) -> dict[str, Any]:
    """Return a mapping of the marker with a store in `directory`."""
    if config is not None and (not isinstance(config, Mapping) or "workers" in config):
        raise pytest.UsageError(
            "with state_store and state_files the marker's config is a mapping without `workers`: they say which "
            "adapter there is"
        )
    adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": os.fspath(directory)}}
    return {**(config or {}), "workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}


@pytest.fixture
def state_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A new engine in memory, or with the marker's configuration; failed and unhandled events fail the test."""
    marked = _Marked(request.node)
    engine = _open(request.node, marked, marked.config)
    yield engine
    engine.close()


@pytest.fixture
def state_store(request: pytest.FixtureRequest, state_files: dict[str, Any]) -> Iterator[Engine]:
    """As `state_engine`, with a store of files in `tmp_path`."""
    engine = _open(request.node, _Marked(request.node), state_files)
    yield engine
    engine.close()


@pytest.fixture
def state_files(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> dict[str, Any]:
    """A configuration with a store of files in `tmp_path`, for `Engine.from_config` or `state_clock.open`."""
    return _with_files(_Marked(request.node).config, tmp_path)


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
