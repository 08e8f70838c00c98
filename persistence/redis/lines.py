"""The links to one server, and an adapter's servers if that is all there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.dialling import Server
from scopestate.persistence.redis.flight import Flight
from scopestate.persistence.redis.link import Link
from scopestate.persistence.redis.options import RedisOptions

Deliver = Callable[[list[Any]], None]
"""Takes the outcomes of many calls at once."""


class Lines:
    """The links to one server: one that all scopes share, and some for what is large.

    Making them costs neither a connection nor a thread: each has those from its first command on.
    """

    def __init__(
        self,
        target: Server,
        options: RedisOptions,
        deliver: Deliver,
        *,
        redirect: Callable[[Flight, Refusal | None], Link] | None = None,
        fails_over: bool = False,
    ) -> None:
        """`redirect` and `fails_over`: see `Link`."""
        self.target = target
        self._links = [
            Link(
                target,
                call_timeout_s=options.call_timeout_s,
                connect_wait_s=options.connect_wait_s,
                deliver=deliver,
                redirect=redirect,
                fails_over=fails_over,
            )
            for _ in range(options.pool_size)
        ]
        self.express = self._links[0]

    def bulk(self) -> Link:
        """Return the link for something large: the one with the least to do."""
        return min(self._links[1:], key=Link.load, default=self.express)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    def close(self) -> None:
        """Close every connection. Idempotent."""
        for link in self._links:
            link.end()  # all at once: each may be in the middle of an attempt to connect, which takes its time to fail
        for link in self._links:
            link.close()


class Single:
    """The servers of an adapter (`servers.Servers`) if that is one."""

    def __init__(self, target: Server, options: RedisOptions, deliver: Deliver, *, fails_over: bool = False) -> None:
        self._lines = Lines(target, options, deliver, fails_over=fails_over)

    def connect(self) -> None:
        self._lines.express.connect()

    def link(self, hash_key: bytes) -> Link:
        return self._lines.express

    def bulk_link(self, hash_key: bytes) -> Link:
        return self._lines.bulk()

    def server_of(self, hash_key: bytes) -> Server:
        return self._lines.target

    def primaries(self) -> list[Server]:
        return [self._lines.target]

    def links(self) -> Iterator[Link]:
        return iter(self._lines)

    def close(self) -> None:
        self._lines.close()
