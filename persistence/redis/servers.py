"""Which connections the commands of a scope go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from scopestate.persistence.redis.dialling import Server, server
from scopestate.persistence.redis.link import Link
from scopestate.persistence.redis.options import RedisOptions

Deliver = Callable[[list[Any]], None]
"""Takes the outcomes of many calls at once."""


class Servers(Protocol):
    """The servers behind one adapter. From any thread; only `connect` and `close` block."""

    def connect(self) -> None:
        """Connect for the first time. Raises NotConnected."""

    def link(self, hash_key: bytes) -> Link:
        """By which the commands of a hash go."""

    def bulk_link(self, hash_key: bytes) -> Link:
        """By which those go that are large, or have large answers: they hold up only each other."""

    def server_of(self, hash_key: bytes) -> Server:
        """The server that holds a hash."""

    def primaries(self) -> list[Server]:
        """The servers that hold keys between them, for whoever looks at all."""

    def links(self) -> Iterator[Link]:
        """All links."""

    def close(self) -> None:
        """Close every connection. Idempotent."""


class Lines:
    """The links to one server: one that all scopes share, and some for what is large."""

    def __init__(self, target: Server, options: RedisOptions, deliver: Deliver, **how: object) -> None:
        """`how`: see `Link`."""
        self.target = target
        self._links = [
            Link(
                target,
                call_timeout_s=options.call_timeout_s,
                connect_wait_s=options.connect_wait_s,
                deliver=deliver,
                **how,  # type: ignore[arg-type]  # passed on as it came
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
            link.close()


class Single:
    """One server; or a primary that Sentinels name, which `target.dial` asks for."""

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


def find_servers(options: RedisOptions, deliver: Deliver) -> Servers:
    """Return the servers that the options name, connected. Raises NotConnected, ConfigError."""
    servers = Single(server(options), options, deliver)
    servers.connect()
    return servers
