"""scopestate: scoped key-value state, owned by actors, with reactive triggers.

>>> from scopestate import Engine
>>> engine = Engine()  # in memory; for files, Redis or another engine: Engine.from_config("engine.yaml")
>>> engine.set("users", "ada", {"name": "Ada"})
SetResult(old_value=None, new_value={'name': 'Ada'}, revision=1)
>>> engine.get("users", "ada")
{'name': 'Ada'}
>>> engine.close()

`help(scopestate.Engine)` describes the calls. `dir(scopestate)` lists the other names: handles (`Scope`), results
(`SetResult`, ...), what handlers receive (`StateEvent`, `Delivery`), and errors (the whole tree is in
`scopestate.errors`).
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

if not TYPE_CHECKING:  # with it, a type checker would accept every name

    def __getattr__(name: str) -> Any:
        """Import slow parts at their first use: the engine takes 100 ms, asyncio 20 ms, the version 10 ms.

        So importing one module of the package loads only that module: pytest loads the plugin in every run.
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
    """Load everything that is exported, and return the object with this name."""
    exports = importlib.import_module("scopestate.exports")
    here = globals()
    # Names that are already set stay: a test may have replaced them.
    here.update({each: vars(exports)[each] for each in exports.__all__ if each not in here})
    return here[name]


def _module(name: str) -> Any:
    """Return a module of the package, for `from scopestate import testing`.

    This does not go through `_exported`: if the exports need the module that is imported first, they do not exist yet.
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
    """Return whether `help(scopestate)` is asking: it would print 3,000 lines, and each class has its own help."""
    import inspect  # noqa: PLC0415 - takes 10 ms

    frame = inspect.currentframe()
    for _ in range(6):  # pydoc calls `inspect.getmembers`, which calls `dir`
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
    except PackageNotFoundError:  # run from source, not installed
        return "0+unknown"
