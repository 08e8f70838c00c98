"""Connections on which a server of a cluster announces changes of keys (`CLIENT TRACKING`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hiredis
from redis.connection import AbstractConnection

from scopestate.errors import NotConnected
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.redis.connection import Connection, Refusal
from scopestate.persistence.redis.dialling import Server
from scopestate.persistence.redis.options import RedisOptions

if TYPE_CHECKING:
    from scopestate.persistence.redis.cluster import Clustered
    from scopestate.persistence.redis.servers import Where


class Tracked(Connection):
    """A connection on which the server announces, between replies, which keys have changed."""

    def __init__(self, dialled: AbstractConnection, address: str, timeout_s: float) -> None:
        super().__init__(dialled, address, timeout_s)
        self.changed: set[bytes] = set()
        """Keys that have changed, as far as the server has announced."""
        self.forgotten = False
        """True if all keys may have changed: the database was flushed."""
        self._next = self.next_reply
        self.next_reply = self._next_reply

    def fileno(self) -> int:
        """Return the file descriptor of the socket, for waiting. Ask `has_decrypted` first."""
        fd: int = self._sock.fileno()
        return fd

    def has_decrypted(self) -> bool:
        """True if TLS has bytes of the server that were taken from the socket already."""
        return self._decrypted is not None and self._decrypted() > 0

    def take_pushes(self) -> None:
        """Take in the announcements of the server. Raises Broken if there is a reply, because none is expected."""
        if self._next_reply() is not NOT_ALL:
            raise Broken("the server has sent an unexpected answer")

    def _next_reply(self) -> Any:
        while True:
            reply = self._next()
            if type(reply) is not hiredis.PushNotification:
                return reply
            if reply[0] == b"invalidate":
                if reply[1] is None:
                    self.forgotten = True
                else:
                    self.changed.update(reply[1])

    def exchange(self, command: bytes) -> Any:
        """As `Connection.exchange`, but a read may bring only announcements."""
        self.send(command)
        while (reply := self._next_reply()) is NOT_ALL:
            self.receive()
        return reply


class Listener(Server):
    """A server of a cluster, for connections on which it announces which keys with a prefix have changed."""

    def __init__(
        self, cluster: Clustered, options: RedisOptions, where: Where, prefix: str, follow: Callable[[], object]
    ) -> None:
        """`follow` is called after the map of the cluster was read again."""
        super().__init__(options, cluster.place_of(where))
        self._cluster = cluster
        self._where = where
        self._prefix = prefix
        self._follow = follow

    def dial(self) -> Tracked:
        """Make a connection with tracking. If it raises NotConnected, the map of the cluster was read again."""
        try:
            connection = super().dial()
        except NotConnected:
            self._cluster.refresh(but=self._where)
            self._follow()
            raise
        assert isinstance(connection, Tracked)  # made by `wrapped`
        try:
            connection.call("HELLO", "3")
            connection.call("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", self._prefix)
        except (Refusal, Broken) as error:
            connection.close()
            raise NotConnected(
                f"Redis at {self.address} does not say which keys change, which `events: shared` needs in a cluster: "
                f"{error}; it takes Redis 6 or later, or Valkey, and a user with `+client|tracking` and `+hello`"
            ) from error
        return connection

    def wrapped(self, dialled: AbstractConnection) -> Tracked:
        return Tracked(dialled, self.address, self._options.call_timeout_s)
