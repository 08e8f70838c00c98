"""Ask the web server that runs the application how many workers it has, and whether it is ending.

ASGI has no such information. It is read from the server's own objects, found in the stack frames that called the
application or in those of the event loop's tasks. With an unknown or changed server only this information is missing;
tests with the real servers notice a change.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

__all__ = ["server_ends", "workers", "workers_of"]

_SERVERS: Final = ("gunicorn", "uvicorn")
"""Packages whose objects know the number of workers, the outermost first: gunicorn runs uvicorn's server."""

_ENDING: Final[dict[str, Callable[[Any], bool]]] = {
    "uvicorn.server": lambda server: bool(server.should_exit),
    "gunicorn.workers.gasgi": lambda worker: not worker.alive,
}
"""Modules whose objects know whether the server has been told to end."""

LOOKS_EVERY_S: Final = 0.1
"""Seconds between two looks at the server while a stream is open. uvicorn itself looks as often."""


def workers() -> tuple[int, str]:
    """Return how many workers the server runs, as far as a worker can know, and the source; (1, "") if unknown.

    Call it within the lifespan. In a worker only the server's objects combine the settings of the command line, files
    and environment. If no known object is found, `WEB_CONCURRENCY` counts.
    """
    found: dict[str, int] = {}
    frame = inspect.currentframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in _SERVERS:
            count = workers_of(frame.f_locals.get("self"), package)
            if count is not None:
                found[package] = count
        frame = frame.f_back
    for server in _SERVERS:
        if server in found:
            return found[server], f"{server}'s `workers`"
    text = os.environ.get("WEB_CONCURRENCY", "")
    return (int(text), f"WEB_CONCURRENCY={text}") if text.isdecimal() else (1, "")


def workers_of(server: object, package: str) -> int | None:
    """Return the number of workers that an object of a server has in its settings; None if it has none."""
    settings = getattr(server, "cfg", None) or getattr(server, "config", None)
    count = getattr(settings, "workers", None)
    if not isinstance(count, int):
        return None
    return 1 if package == "uvicorn" and getattr(settings, "reload", False) else count  # then ignored


async def server_ends() -> None:
    """Return when the server of this event loop has been told to end; never, if the server is not known.

    A server waits for open responses before it ends the lifespan, without telling them: an endless stream would keep it
    from ending.
    """
    loop = asyncio.get_running_loop()
    ending = _endings.get(loop)
    if ending is None:
        ending = _endings[loop] = _Ending()
    await ending.wait(loop)


class _Ending:
    """Watches for the end of an event loop's server while anything waits for it: one timer for all streams."""

    def __init__(self) -> None:
        self._ends = _end_of_server()
        self._waiting: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting: asyncio.Future[None] = loop.create_future()
        self._waiting.add(waiting)
        if self._timer is None:
            self._look(loop)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._ends is None or not self._waiting:
            return
        if self._ends():
            for waiting in self._waiting:
                if not waiting.done():
                    waiting.set_result(None)
        else:
            self._timer = loop.call_later(LOOKS_EVERY_S, self._look, loop)


_endings: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Ending] = weakref.WeakKeyDictionary()


def _end_of_server() -> Callable[[], bool] | None:
    """Return a function that says whether this event loop's server is ending; None if the server is not known."""
    for task in asyncio.all_tasks():
        for frame in _frames(task.get_coro()):
            ends = _ENDING.get(str(frame.f_globals.get("__name__")))
            server = None if ends is None else frame.f_locals.get("self")
            if ends is not None and server is not None:
                try:
                    ends(server)
                except AttributeError:
                    continue  # another object of the module, or another version
                # Not weak: uvicorn's objects live as long as the loop does.
                return lambda ends=ends, server=server: ends(server)  # type: ignore[misc]  # mypy cannot infer it
    return None


def _frames(coroutine: object) -> Iterator[FrameType]:
    """Yield the frames of a suspended coroutine, and of those that it awaits."""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            yield frame
        coroutine = getattr(coroutine, "cr_await", None)
