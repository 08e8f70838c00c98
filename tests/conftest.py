"""What all tests need: this directory on the path, signals that are not ignored in the processes they start, reports.

`--import-mode=importlib` does not put it there, and `import conformance` needs it.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from effort import FULL

# The package has a plugin, so pytest would rewrite the assertions in all its modules: the engine under test would be
# another one than users have, and each process of a run would take longer to import it. The plugin does the same.
for _finder in sys.meta_path:
    getattr(_finder, "_must_rewrite", set()).discard("scopestate")

# How long an example takes says more about the machine than about the project.
# The suite tries the same examples in each run: a change is not blamed for what was there before. The proofs of full
# size, `make reliability`, try others each time.
settings.register_profile(
    "suite", settings(), deadline=None, derandomize=not FULL, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

# A shell ignores SIGINT in what it starts in the background, and `nohup` SIGHUP; processes inherit that, and the tests
# send these signals to theirs. One that is handled here has its default there. SIGHUP still does not end this process.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through the 15,000 tests and all modules: 0.4 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def the_root_logger_stays_as_it_is() -> Iterator[None]:
    """Fail a test that configures it: later tests of the process would find messages that they do not expect."""
    root = logging.getLogger()
    level, handlers = root.level, _own_handlers(root)
    yield
    found_level, found_handlers = root.level, _own_handlers(root)
    root.setLevel(level)
    for handler in set(found_handlers) - set(handlers):
        root.removeHandler(handler)
    assert (found_level, found_handlers) == (level, handlers)


def _own_handlers(logger: logging.Logger) -> list[logging.Handler]:
    """Return the handlers that are not pytest's: it puts others there for each phase of a test."""
    return [handler for handler in logger.handlers if not type(handler).__module__.startswith("_pytest.")]


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a process of the suite report a test with texts that are no UTF-8, such as hostile names."""
    return _as_utf8((yield))


def _as_utf8(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode()
    if isinstance(data, dict):
        return {_as_utf8(name): _as_utf8(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(map(_as_utf8, data))
    return data
