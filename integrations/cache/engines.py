"""The engines of caches: one for each directory in a process, opened when it is needed."""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

from scopestate.engine import Engine
from scopestate.errors import ConfigError
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    from scopestate.aio import AioEngine

Durability = Literal["interval", "commit"]


class EngineSource:
    """Where a cache gets its engine from: a directory, the memory of the process, or the program's own engine.

    `engine` is the engine, or an object that opens it when an attribute is first used: in the beginning, after `close`,
    and in a forked child. So an ordinary call needs no check.
    """

    def __init__(
        self,
        given: str | os.PathLike[str] | Engine | None,
        durability: Durability | None,
        interval_ms: int | None,
        after_fork: Callable[[], None],
    ) -> None:
        self.given: Final = given
        self._after_fork = after_fork
        self._exclusive = Guard()
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
        self.engine = _OpensIt(self)  # type: ignore[assignment]  # it has the engine's attributes
        _sources.add(self)

    @property
    def directory(self) -> str | None:
        """The directory; None in memory, and with an engine of the program."""
        return None if isinstance(self.given, Engine) else self._options.get("file_path")  # type: ignore[return-value]

    @exclusive
    def open(self) -> Engine:
        """Return the engine; open it if necessary. Raises ConfigError and StorageError."""
        if self._opened is None:
            if isinstance(self.given, Engine):
                return self.given
            self._opened = _exclusive.run(_acquire, self, self._options)
            self.engine = self._opened.engine
        return self.engine

    async def aio(self) -> AioEngine:
        """Return the engine for asyncio, opened on a thread: in the beginning, after `close`, and in a forked child."""
        engine: object = self.engine
        if isinstance(engine, Engine):
            return engine.aio
        import asyncio  # noqa: PLC0415 - takes 20 ms

        # Not by an attribute of that object, which would open the engine here, on the event loop.
        return (await asyncio.to_thread(self.open)).aio

    def once(self) -> dict[str, Any]:
        """Return an option for one write: in a follower an idempotency key, otherwise nothing.

        With the key, a write in flight when the owner of the directory is killed is sent again to the next owner. As
        this makes the owner keep the answer, it is used only where a connection can be lost, and not in Redis.
        """
        sharing = self.engine._parts.sharing
        return {"idempotency_key": secrets.token_hex(16)} if sharing is not None and sharing.follows else {}

    @exclusive
    def enter(self) -> None:
        """Enter a `with` block."""
        self._entered += 1
        self.open()

    @exclusive
    def leave(self) -> None:
        """Leave a `with` block: the end of the last open one closes the engine."""
        self._entered -= 1
        if self._entered == 0:
            self.close()

    @exclusive
    def close(self) -> None:
        """Close the engine if this opened it and no other cache of this process uses it. A later call opens it."""
        opened, self._opened = self._opened, None
        if opened is not None:
            self.engine = _OpensIt(self)  # type: ignore[assignment]  # as above
            if _exclusive.run(_release, self, opened):
                opened.engine.close()

    def forget(self) -> None:
        """In a forked child: leave the engine, and what its threads hold, to the parent."""
        self._exclusive = Guard()
        self._after_fork()
        if self._opened is not None:
            self._opened = None
            self._entered = 0
            self.engine = _OpensIt(self)  # type: ignore[assignment]  # as above


class _OpensIt:
    """Stands in for an engine, and opens it when it is used."""

    def __init__(self, source: EngineSource) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source.open(), name)


class _Opened:
    """An engine that several caches of this process share."""

    def __init__(self, engine: Engine, options: dict[str, Any]) -> None:
        self.engine = engine
        self.options = options
        self.users: weakref.WeakSet[EngineSource] = weakref.WeakSet()


_exclusive = Guard()
_by_directory: weakref.WeakValueDictionary[str, _Opened] = weakref.WeakValueDictionary()
_sources: weakref.WeakSet[EngineSource] = weakref.WeakSet()


def _acquire(source: EngineSource, options: dict[str, Any]) -> _Opened:
    directory = options.get("file_path", "")
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
    opened.users.add(source)
    return opened


def _release(source: EngineSource, opened: _Opened) -> bool:
    """Note that a source no longer uses an engine; return whether it was the last one."""
    opened.users.discard(source)
    if opened.users:
        return False
    directory = opened.options.get("file_path", "")
    if _by_directory.get(directory) is opened:
        del _by_directory[directory]
    return True


def _config(options: dict[str, Any]) -> dict[str, Any]:
    if options["store_method"] == "in_memory":
        return {}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}


def _after_fork() -> None:
    global _exclusive  # noqa: PLW0603 - a thread that is not there in the child may hold it
    _exclusive = Guard()
    _by_directory.clear()
    for source in list(_sources):
        source.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
