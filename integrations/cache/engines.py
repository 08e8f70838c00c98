"""The engines of caches: one for each directory in a process, opened when it is needed."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Final, Literal

from scopestate.engine import Engine
from scopestate.errors import ConfigError

Durability = Literal["interval", "commit"]


class EngineSource:
    """Where a cache has its engine from: a directory, the memory of the process, or the program's own engine.

    `engine` is the engine, or an object that opens it at the first use of an attribute: at first, after `close`, and in
    a forked child. So a hot call pays for none of this.
    """

    def __init__(
        self, given: str | os.PathLike[str] | Engine | None, durability: Durability | None, interval_ms: int | None
    ) -> None:
        self.given: Final = given
        self._lock = threading.RLock()
        self._entered = 0
        self._opened: _Opened | None = None
        self.engine: Engine
        if isinstance(given, Engine):
            if durability is not None or interval_ms is not None:
                raise ConfigError(
                    "`durability` and `save_interval_ms` are for a cache in a directory; an engine has its own"
                )
            self.engine = given
            return
        self._options = {
            "store_method": "in_memory",
            "durability": durability or "interval",
            "save_interval_ms": 1000 if interval_ms is None else interval_ms,
        }
        if given is None:
            if durability is not None or interval_ms is not None:
                raise ConfigError("a cache without a directory is in memory: nothing is saved, at no interval")
        else:
            path = os.path.realpath(os.path.expandvars(os.path.expanduser(os.fspath(given))))
            self._options |= {"store_method": "file_based", "file_path": path}
        self.engine = _OpensIt(self)  # type: ignore[assignment]  # it passes on what it is asked for
        _sources.add(self)

    @property
    def directory(self) -> str | None:
        """The directory; None in memory, and with an engine of the program."""
        return None if isinstance(self.given, Engine) else self._options.get("file_path")  # type: ignore[return-value]

    def open(self) -> Engine:
        """Return the engine, opened if it is not. Raises ConfigError and StorageError."""
        with self._lock:
            if self._opened is None:
                if isinstance(self.given, Engine):
                    return self.given
                self._opened = _acquire(self._options)
                self.engine = self._opened.engine
            return self.engine

    def enter(self) -> None:
        """Begin a `with` block."""
        with self._lock:
            self._entered += 1
            self.open()

    def leave(self) -> None:
        """End a `with` block: the last one that ends closes the engine."""
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                self.close()

    def close(self) -> None:
        """Close the engine if this has opened it, and no other cache of this process uses it. A later call opens it."""
        with self._lock:
            opened, self._opened = self._opened, None
            if opened is not None:
                self.engine = _OpensIt(self)  # type: ignore[assignment]  # as above
                _release(opened)

    def forget(self) -> None:
        """In a forked child: leave the engine to the parent."""
        self._lock = threading.RLock()
        if self._opened is not None:
            self._opened = None
            self._entered = 0
            self.engine = _OpensIt(self)  # type: ignore[assignment]  # as above


class _OpensIt:
    """In the place of an engine: opens it when it is used."""

    def __init__(self, source: EngineSource) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source.open(), name)


class _Opened:
    """An engine that caches of this process use together."""

    def __init__(self, engine: Engine, options: dict[str, Any]) -> None:
        self.engine = engine
        self.options = options
        self.users = 0


_lock = threading.Lock()
_by_directory: weakref.WeakValueDictionary[str, _Opened] = weakref.WeakValueDictionary()
_sources: weakref.WeakSet[EngineSource] = weakref.WeakSet()


def _acquire(options: dict[str, Any]) -> _Opened:
    directory = options.get("file_path", "")
    with _lock:
        opened = _by_directory.get(directory) if directory else None
        if opened is None or opened.engine.closed:
            opened = _Opened(Engine.from_config(_config(options)), options)
            if directory:
                _by_directory[directory] = opened
        elif opened.options != options:
            raise ConfigError(
                f"another cache of this process has opened {directory} with another `durability` or "
                "`save_interval_ms`: give both the same"
            )
        opened.users += 1
        return opened


def _release(opened: _Opened) -> None:
    with _lock:
        opened.users -= 1
        if opened.users:
            return
        directory = opened.options.get("file_path", "")
        if _by_directory.get(directory) is opened:
            del _by_directory[directory]
    opened.engine.close()


def _config(options: dict[str, Any]) -> dict[str, Any]:
    if options["store_method"] == "in_memory":
        return {}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - a thread that is not there in the child may hold it
    _lock = threading.Lock()
    _by_directory.clear()
    for source in list(_sources):
        source.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
