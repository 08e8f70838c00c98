"""An engine in the lifespan of a web application, for Starlette, FastAPI and other ASGI frameworks.

The server enters the lifespan once in each worker process, after any fork, and leaves it when the worker ends: the
place to open and close an engine. docs/how-to/sharing.md says how the workers of one application share a directory.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypedDict, Unpack

from scopestate.config import Config
from scopestate.engine import Engine
from scopestate.integrations._web_server import workers
from scopestate.persistence.local import LocalBackend
from scopestate.reactive import Hook

__all__ = ["EngineOptions", "lifespan", "open_engine"]

log = logging.getLogger("scopestate.integrations")

Source = str | os.PathLike[str] | Mapping[str, Any] | Config | Engine | None

_warned = False


class EngineOptions(TypedDict, total=False):
    """Options of `Engine.from_config`."""

    watch: bool
    on_error: Hook | None
    on_dead_letter: Hook | None
    handle_sigterm: bool


@asynccontextmanager
async def open_engine(source: Source = None, **options: Unpack[EngineOptions]) -> AsyncIterator[Engine]:
    """Open an engine for an `async with` in a lifespan of your own, and close it in order at the end.

    `source` and `options` are those of `Engine.from_config`. `source` may also be an open engine, such as one that a
    test has made: it is used as it is, and not closed. Opening blocks the event loop, which serves no requests yet;
    closing does not block it, so handlers on it run to their end. Raises ConfigError and StorageError: the server then
    reports that the application did not start. If the state is in memory while the server runs several workers, each
    worker has a separate state; the log warns of that once in each process.
    """
    if isinstance(source, Engine):
        if options:
            raise TypeError(f"an engine that is open takes no options: {', '.join(options)}")
        yield source
        return
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
    **options: Unpack[EngineOptions],
) -> Callable[[object], AbstractAsyncContextManager[dict[str, Engine]]]:
    """Return a lifespan for an application: `Starlette(lifespan=lifespan("engine.yaml"))`, the same for FastAPI.

    A request finds the engine as `request.state.engine`, or under another `name`. `setup(engine)`, a plain function or
    a coroutine function, runs once it is open and before the first request: to register triggers. If it raises, the
    engine is closed and the application does not start. The rest is as in `open_engine`.
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
    count, told_by = workers()
    if count > 1:
        _warned = True
        log.warning(
            "the server runs %d workers (%s), and the state of this engine is in the memory of its process: each "
            "worker has a state of its own. Give the adapter kv `store_method: file_based`, then the workers share the "
            "directory; or use the adapter redis (docs/how-to/sharing.md)",
            count,
            told_by,
        )
