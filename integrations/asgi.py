"""An engine in the lifespan of a web application, for Starlette, FastAPI and other ASGI frameworks.

The server calls the lifespan once in each worker process, behind any fork, and again when the worker ends: the place to
open an engine and to close it. docs/sharing.md says how the workers of one application share a directory.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from scopestate.config import Config
from scopestate.engine import Engine
from scopestate.persistence.local import LocalBackend

__all__ = ["lifespan", "open_engine"]

log = logging.getLogger("scopestate.integrations")

Source = str | os.PathLike[str] | Mapping[str, Any] | Config | None

_SERVERS: Final = ("gunicorn", "uvicorn")
"""Packages whose objects say how many workers there are, the outermost one first: gunicorn runs uvicorn's server."""

_warned = False


@asynccontextmanager
async def open_engine(source: Source = None, **options: Any) -> AsyncIterator[Engine]:
    """Open an engine, for the body of an `async with` in a lifespan of your own, and close it in order at its end.

    `source` and `options` are those of `Engine.from_config`. Opening blocks the event loop, which serves nothing yet;
    closing does not, so handlers on it run to their end. Raises ConfigError and StorageError: the server then reports
    that the application did not start. Once in a process, the log warns if the state is in memory while the server runs
    several workers, each of which has a state of its own then.
    """
    engine = Engine.from_config(source, **options)
    try:
        _warn_of_several_states(engine)
        yield engine
    finally:
        await engine.aio.close()


def lifespan(
    source: Source = None,
    *,
    setup: Callable[[Engine], Awaitable[None] | None] | None = None,
    name: str = "engine",
    **options: Any,
) -> Callable[[object], AbstractAsyncContextManager[dict[str, Engine]]]:
    """Return a lifespan for an application: `Starlette(lifespan=lifespan("engine.yaml"))`, the same for FastAPI.

    A request finds the engine as `request.state.engine`, or under another `name`. `setup(engine)`, a plain function or
    a coroutine function, runs once it is open and before the first request: to register triggers. If it raises, the
    engine is closed and the application does not start. `source` and `options` are those of `Engine.from_config`; the
    rest is as in `open_engine`.
    """

    @asynccontextmanager
    async def running(app: object) -> AsyncIterator[dict[str, Engine]]:
        async with open_engine(source, **options) as engine:
            if setup is not None:
                done = setup(engine)
                if inspect.isawaitable(done):
                    await done
            yield {name: engine}

    return running


def _warn_of_several_states(engine: Engine) -> None:
    global _warned  # noqa: PLW0603 - once in a process
    backend = engine._parts.backend
    if _warned or not isinstance(backend, LocalBackend) or backend.store is not None:
        return
    count, told_by = _workers()
    if count > 1:
        _warned = True
        log.warning(
            "the server runs %d workers (%s), and the state of this engine is in the memory of its process: each "
            "worker has a state of its own. Give the adapter kv `store_method: file_based`, then the workers share the "
            "directory; or use the adapter redis (docs/sharing.md)",
            count,
            told_by,
        )


def _workers() -> tuple[int, str]:
    """Return how many workers the server runs, as far as a worker can know, and what says so. (1, "") if nothing does.

    The server's own objects are asked, which stand in the frames that have called the lifespan: a worker has nothing
    else in which the command line, the files and the environment have been put together. A server that is not known, or
    that has changed, leaves `WEB_CONCURRENCY`.
    """
    found: dict[str, int] = {}
    frame = inspect.currentframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in _SERVERS:
            count = _workers_of(frame.f_locals.get("self"), package)
            if count is not None:
                found[package] = count
        frame = frame.f_back
    for server in _SERVERS:
        if server in found:
            return found[server], f"{server}'s `workers`"
    text = os.environ.get("WEB_CONCURRENCY", "")
    return (int(text), f"WEB_CONCURRENCY={text}") if text.isdecimal() else (1, "")


def _workers_of(server: object, package: str) -> int | None:
    """Return the number of workers that an object of a server has in its settings; None if it has none."""
    settings = getattr(server, "cfg", None) or getattr(server, "config", None)
    count = getattr(settings, "workers", None)
    if not isinstance(count, int):
        return None
    return 1 if package == "uvicorn" and getattr(settings, "reload", False) else count  # which it then ignores
