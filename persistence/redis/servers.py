"""Which connections the commands of a scope go by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import msgspec

from scopestate.errors import ConfigError, NotConnected
from scopestate.persistence.redis.cluster import Clustered, slots_of
from scopestate.persistence.redis.dialling import Server, traits
from scopestate.persistence.redis.lines import Deliver, Single
from scopestate.persistence.redis.link import Link
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.sentinel import Watched

__all__ = ["Deliver", "Servers", "find_servers"]

_NO_DATABASES: Final = "a cluster has only database 0, and {address} is in one; leave the database out"
_NO_EVENTS: Final = (
    "{address} is in a cluster: its keys live on different servers, so a write and its event cannot be one step; use "
    "one server or Sentinels, or `events: local`"
)


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


def find_servers(options: RedisOptions, deliver: Deliver) -> Servers:
    """Return the servers that the options name, connected; whether they are a cluster, the server itself says.

    Raises:
        NotConnected: there is no connection within `connect_timeout_s`, or to none that keeps data; the text names the
            address.
        ConfigError: the servers are a cluster, and the options ask for what a cluster cannot do.
    """
    servers: Servers
    mode = b"" if options.sentinels else _mode_of(options)
    if options.sentinels:
        servers = Watched(options, deliver)
    elif mode == b"sentinel":
        raise NotConnected(f"Redis at {options.address} is a Sentinel and keeps no data; name it in `sentinels`")
    elif mode == b"cluster":
        if options.server.database:
            raise ConfigError(_NO_DATABASES.format(address=options.address), key="adapter.config.database")
        if options.shares_events:
            raise ConfigError(_NO_EVENTS.format(address=options.address), key="adapter.config.events")
        servers = Clustered(options, deliver, slots_of(options))
    else:
        servers = Single(Server(options), options, deliver)
    try:
        servers.connect()
    except BaseException:
        servers.close()
        raise
    return servers


def _mode_of(options: RedisOptions) -> bytes:
    """Return what the server says it is: b"standalone", b"cluster" or b"sentinel"; b"" if it does not say."""
    # Of a cluster no other database can be chosen, and the error of that would not say why.
    place = msgspec.structs.replace(options.server, database=0)
    connection = Server(options, place, name=options.address).dial()
    try:
        connection.wait_at_most(options.connect_timeout_s)
        return bytes(traits(connection).get(b"mode", b""))
    finally:
        connection.close()
