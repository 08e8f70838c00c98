"""An event loop on a worker of the deterministic dispatcher: as much of asyncio's as the Redis backend uses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.simulation.playing_threads import Play, PlayedInbox

if TYPE_CHECKING:
    from tests.simulation.redis_network import Network


class PlayedLoop:
    """Calls back in the order of what it was asked to, when a connection has something, and when time is over."""

    def __init__(self, play: Play, network: Network) -> None:
        self._play = play
        self._network = network
        self._calls = PlayedInbox(play)
        self._readers: dict[int, Callable[[], object]] = {}
        self._polled: set[int] = set()

    def run(self) -> None:
        """Run until `stop` is called."""
        while (call := self._calls.get_within(None)) is not None:
            call()

    def stop(self) -> None:
        """Make `run` return."""
        self._calls.put(None)

    def time(self) -> float:
        return self._play.dispatcher.monotonic()

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        self._calls.put(functools.partial(callback, *arguments))

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, callback: Callable[..., object], *arguments: Any) -> None:
        self._play.dispatcher.call_later(delay_s, lambda: self.call_soon(callback, *arguments))

    def add_reader(self, fd: int, callback: Callable[..., object], *arguments: Any) -> None:
        self._readers[fd] = functools.partial(callback, *arguments)
        self._network.end_of(fd).on_readable = lambda: self._poll(fd)
        self._poll(fd)

    def remove_reader(self, fd: int) -> None:
        self._readers.pop(fd, None)

    def _poll(self, fd: int) -> None:
        if fd in self._readers and fd not in self._polled and self._network.end_of(fd).readable():
            self._polled.add(fd)
            self.call_soon(self._read, fd)

    def _read(self, fd: int) -> None:
        self._polled.discard(fd)
        callback = self._readers.get(fd)
        if callback is not None and self._network.end_of(fd).readable():
            callback()
            self._poll(fd)


class TaskReply:
    """What a task waits for: `arrived(value, error)` is called on its loop."""

    abandoned = False

    def __init__(self, loop: PlayedLoop, arrived: Callable[[Any, BaseException | None], object]) -> None:
        self.loop = loop
        self._arrived = arrived

    @property
    def loop_reply(self) -> TaskReply:
        return self

    def set(self, value: Any = None) -> None:
        self.loop.call_soon(self._arrived, value, None)

    def fail(self, error: BaseException) -> None:
        self.loop.call_soon(self._arrived, None, error)

    def deliver_all(self, outcomes: list[tuple[TaskReply, Any, BaseException | None]]) -> None:
        """Deliver many at once."""
        for reply, value, error in outcomes:
            reply.loop.call_soon(reply._arrived, value, error)
