"""scopestate: scoped key-value state, owned by actors, with reactive triggers.

>>> from scopestate import Engine
>>> engine = Engine()  # in memory; for files, Redis or another engine: Engine.from_config("engine.yaml")
>>> engine.set("users", "ada", {"name": "Ada"})
SetResult(old_value=None, new_value={'name': 'Ada'}, revision=1)
>>> engine.get("users", "ada")
{'name': 'Ada'}
>>> engine.close()

`help(scopestate.Engine)` describes the calls, and `dir(scopestate)` has the names of what else there is: handles
(`Scope`), results (`SetResult`, ...), what handlers get (`StateEvent`, `Delivery`), errors (all: `scopestate.errors`).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any

from scopestate import errors, ops
from scopestate.actors.consuming import ConsumerStatus, DeadLetter
from scopestate.config import Config
from scopestate.engine import Engine
from scopestate.errors import (
    Compacted,
    ConfigError,
    Conflict,
    EngineClosed,
    InvalidValue,
    Overloaded,
    ReplyTimeout,
    SchemaViolation,
    ScopestateError,
    StorageError,
    StoreLocked,
    UpdateRefused,
    WatchOverrun,
)
from scopestate.handles import AioScope, Scope
from scopestate.ops import MISSING, messages
from scopestate.ops.changes import Change
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.results import (
    BatchResult,
    CasResult,
    DeleteResult,
    DeliveryFailure,
    EntryView,
    ModifyResult,
    Page,
    SetResult,
    StateEvent,
    UpdateResult,
)
from scopestate.ops.writes import DELETE, KEEP
from scopestate.sharing import SharingStatus
from scopestate.stats import Health, Stats

if TYPE_CHECKING:
    from scopestate.aio import AioEngine

    __version__: str
    """The version of the installed package, such as "0.1.0"."""

__all__ = [
    "DELETE",
    "KEEP",
    "MISSING",
    "AioEngine",
    "AioScope",
    "BatchResult",
    "CasResult",
    "Change",
    "Compacted",
    "Config",
    "ConfigError",
    "Conflict",
    "ConsumerStatus",
    "DeadLetter",
    "DeleteResult",
    "Delivery",
    "DeliveryFailure",
    "Discard",
    "Engine",
    "EngineClosed",
    "EntryView",
    "Health",
    "InvalidValue",
    "ModifyResult",
    "Overloaded",
    "Page",
    "ReplyTimeout",
    "Retry",
    "RetryLater",
    "SchemaViolation",
    "Scope",
    "ScopestateError",
    "SetResult",
    "SharingStatus",
    "StateEvent",
    "Stats",
    "StorageError",
    "StoreLocked",
    "UpdateRefused",
    "UpdateResult",
    "WatchOverrun",
    "errors",
    "messages",
    "ops",
]

if not TYPE_CHECKING:  # a checker would take every name for one of the package

    def __getattr__(name: str) -> Any:
        """Load at the first use what takes time to import: asyncio takes 20 ms, the metadata of packages 10 ms."""
        if name == "AioEngine":
            found = importlib.import_module("scopestate.aio").AioEngine
        elif name == "__version__":
            found = _installed_version()
        else:
            raise AttributeError(f"module 'scopestate' has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    if _is_for_help():
        return []
    here = [name for name in globals() if name.startswith("__") or f"scopestate.{name}" in sys.modules]
    return sorted({*here, *__all__, "__version__"})


def _is_for_help() -> bool:
    """Return whether `help(scopestate)` asks: all classes would be 3,000 lines, and each has its own help."""
    frame = inspect.currentframe()
    for _ in range(6):  # `dir` is called by `inspect.getmembers`, and that by pydoc
        if frame is None:
            break
        if frame.f_code.co_filename.endswith("pydoc.py"):
            return True
        frame = frame.f_back
    return False


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - see above

    try:
        return version("scopestate")
    except PackageNotFoundError:  # the source, without an installation
        return "0+unknown"
