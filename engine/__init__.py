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
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scopestate.aio import AioEngine
    from scopestate.exports import *

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
        """Load at the first use what takes time to import: the engine 100 ms, asyncio 20 ms, the version 10 ms.

        So a module of the package costs no more than itself: pytest loads the plugin in every run.
        """
        if name == "AioEngine":
            found = importlib.import_module("scopestate.aio").AioEngine
        elif name == "__version__":
            found = _installed_version()
        elif name.startswith("__"):
            raise AttributeError(f"module 'scopestate' has no attribute {name!r}")
        elif name in __all__:
            return _exported(name)
        else:
            found = _module(name)
        globals()[name] = found
        return found


def _exported(name: str) -> Any:
    """Load all that is exported, and return what has this name now."""
    exports = importlib.import_module("scopestate.exports")
    here = globals()
    # What is there stays: a test may have replaced it.
    here.update({each: vars(exports)[each] for each in exports.__all__ if each not in here})
    return here[name]


def _module(name: str) -> Any:
    """Return a module of the package, for `from scopestate import testing`.

    Not by `_exported`: if a module that the exports need is the first to be imported, they are not there yet.
    """
    whole = f"scopestate.{name}"
    try:
        return importlib.import_module(whole)
    except ModuleNotFoundError as error:
        if error.name != whole:
            raise
        raise AttributeError(f"module 'scopestate' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    if _is_for_help():
        return []
    here = [name for name in globals() if name.startswith("__") or f"scopestate.{name}" in sys.modules]
    return sorted({*here, *__all__, "__version__"})


def _is_for_help() -> bool:
    """Return whether `help(scopestate)` asks: all classes would be 3,000 lines, and each has its own help."""
    import inspect  # noqa: PLC0415 - takes 10 ms

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
