"""How connections to Redis are made: redis-py looks names up, speaks TLS, asks Sentinels and logs in."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis import connection as library
from redis.connection import AbstractConnection
from redis.exceptions import RedisError

from scopestate.errors import NotConnected
from scopestate.persistence.redis import connection
from scopestate.persistence.redis.options import RedisOptions


class Server:
    """One server that can be dialled: a `link.Target`. From any thread."""

    def __init__(self, make: Callable[[], AbstractConnection], address: str, options: RedisOptions) -> None:
        """`make` makes a connection that is not connected yet."""
        self.make = make
        self._options = options
        self.address = address

    def dial(self) -> connection.Connection:
        """Make a connection that is ready for commands. Raises NotConnected, within `connect_timeout_s`."""
        dialled: Any = self.make()
        # The time limits of redis-py are for each step (connect, TLS, each answer); this one is for all of them.
        overdue = threading.Timer(self._options.connect_timeout_s, lambda: _cut(dialled))
        overdue.daemon = True
        overdue.start()
        try:
            dialled.connect()
            return self.wrapped(dialled)
        except (RedisError, OSError, ValueError) as error:
            dialled.disconnect()
            raise NotConnected(f"no connection to Redis at {self.address}: {error}") from error
        finally:
            overdue.cancel()

    def wrapped(self, dialled: AbstractConnection) -> connection.Connection:
        """Return the connection that is made of a library's."""
        return connection.Connection(dialled, self.address, self._options.call_timeout_s)


def server(options: RedisOptions, host: str = "", port: int = 0) -> Server:
    """Return the server that the options name; or the one at `host` and `port`, reached in the same way."""
    common: dict[str, Any] = {
        "db": options.database,
        "username": options.username,
        "password": options.password,
        "socket_timeout": options.connect_timeout_s,
        "socket_connect_timeout": options.connect_timeout_s,
        "protocol": 2,
        "client_name": "scopestate",
    }
    # redis-py's classes have no types of their own.
    if options.unix_path is not None:
        kind: Any = library.UnixDomainSocketConnection
        common["path"] = options.unix_path
    else:
        kind = library.SSLConnection if options.tls else library.Connection
        common |= {"host": host or options.host, "port": port or options.port, "socket_keepalive": True}
        if options.tls:
            common |= tls_options(options)
    return Server(lambda: kind(**common), f"{host}:{port}" if host else options.address, options)


def traits(opened: connection.Connection) -> dict[bytes, Any]:
    """Return what a server says of itself: `mode` is b"standalone" or b"cluster", `role` b"master" or b"replica".

    Empty if it keeps that to itself, as a proxy does. Raises NotConnected, and closes the connection.

    Refused: INFO and ROLE, which some users may not call. HELLO without arguments changes nothing.
    """
    try:
        said = opened.call("HELLO")
    except connection.Refusal:
        return {}
    except connection.Broken as error:
        raise NotConnected(f"no connection to Redis at {opened.address}: {error}") from error
    return dict(zip(said[::2], said[1::2], strict=False))


def tls_options(options: RedisOptions) -> dict[str, Any]:
    """Return what redis-py's TLS connections are told."""
    return {
        "ssl_ca_certs": options.tls_ca_file,
        "ssl_certfile": options.tls_cert_file,
        "ssl_keyfile": options.tls_key_file or options.tls_cert_file,
        "ssl_cert_reqs": "required" if options.tls_verify else "none",
        "ssl_check_hostname": options.tls_verify,
    }


def _cut(dialled: AbstractConnection) -> None:
    sock: Any = dialled._get_socket()
    if sock is not None:
        with suppress(OSError):  # it has ended by itself
            sock.shutdown(socket.SHUT_RDWR)
