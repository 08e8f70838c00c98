"""How connections to Redis are made: redis-py resolves names, speaks TLS, asks Sentinels and logs in."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from contextlib import suppress
from typing import Any, Final

from redis import connection as library
from redis.connection import AbstractConnection
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NoAnswer

from scopestate.errors import NotConnected
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.redis import connection
from scopestate.persistence.redis.options import RedisAddress, RedisOptions

log = logging.getLogger("scopestate.persistence.redis")

_LOGIN_REFUSED: Final = (
    "the server refused the login; its answer is left out because it contains the password: does it know AUTH?"
)
_OURS: Final = (NoConnection, NoAnswer)
"""Errors with messages of our own, which may name a host that is called like the password."""
_DIALLED: Final[dict[threading.Thread, AbstractConnection]] = {}
"""The connection that a thread is making."""
_PIECE: Final = 8
"""Length of a part of a password that would reveal too much."""


class Server:
    """One server that can be dialled: a `connections.connection.Target`. From any thread."""

    def __init__(
        self,
        options: RedisOptions,
        place: RedisAddress | None = None,
        *,
        name: str = "",
        within_s: float | None = None,
    ) -> None:
        """`place`: replaces the address of the options. `name`: for messages. `within_s`: how long it may take."""
        self._options = options
        self._place = options.server if place is None else place
        self._within_s = options.connect_timeout_s if within_s is None else within_s
        self.address = name or (options.address if place is None else f"{place.host}:{place.port}")

    def dial(self) -> connection.Connection:
        """Make a connection that is ready for commands. Raises NotConnected, in time."""
        dialled: Any = self.make()
        # The time limits of redis-py are for each step (connect, TLS, each answer); this one is for all of them.
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()  # first: the next step ends the connection while another thread dials
            _cut(dialled)

        overdue = threading.Timer(self._within_s, give_up)
        overdue.daemon = True
        overdue.start()
        me = threading.current_thread()
        outer = _DIALLED.get(me)  # which a signal handler has interrupted
        _DIALLED[me] = dialled
        try:
            dialled.connect()
            return self.wrapped(dialled)
        except (RedisError, OSError, ValueError) as error:
            dialled.disconnect()
            reason = error
        finally:
            overdue.cancel()
            if outer is None:
                _DIALLED.pop(me, None)
            else:
                _DIALLED[me] = outer
        problem = f"no connection to Redis at {self.address}: "
        if _reveals(reason, self._place.password):
            # Not even chained to it: tracebacks show causes.
            raise NotConnected(problem + _LOGIN_REFUSED)
        raise NotConnected(problem + self._why_not(reason, is_late=is_late.is_set())) from reason

    def _why_not(self, error: Exception, *, is_late: bool) -> str:
        """Return why it did not work, with a likely cause if the error does not name one."""
        unusable = _unusable_file(self._options) if self._place.tls else None
        if unusable is not None:
            return unusable
        if is_late or isinstance(error, NoAnswer):
            hint = "; does the server speak TLS? If not, write redis://" if self._place.tls else ""
            return f"no answer within {round(self._within_s, 2):g} s{hint}"
        text = str(error).removesuffix(".")
        could_have_tls = self._place.unix_path is None and not self._place.tls
        if could_have_tls and text.startswith(("Error while reading", "Connection closed by server")):
            return f"{text}; does the server want TLS? Then write rediss://"
        return text

    def make(self) -> AbstractConnection:
        """Make a connection that is not connected yet."""
        place = self._place
        common: dict[str, Any] = {
            "db": place.database or 0,
            "username": place.username,
            "password": place.password,
            "socket_timeout": self._within_s,
            "socket_connect_timeout": self._within_s,
            "protocol": 2,
            "client_name": "scopestate",
        }
        # redis-py's classes have no types of their own.
        if place.unix_path is not None:
            kind: Any = library.UnixDomainSocketConnection
            common["path"] = place.unix_path
        else:
            kind = library.SSLConnection if place.tls else library.Connection
            common |= {"host": place.host, "port": place.port, "socket_keepalive": True}
            if place.tls:
                common |= tls_options(self._options)
        made: AbstractConnection = kind(**common)
        return made

    def wrapped(self, dialled: AbstractConnection) -> connection.Connection:
        """Wrap a connection of the library."""
        return connection.Connection(dialled, self.address, self._options.call_timeout_s)


def abort_dial(thread: threading.Thread) -> None:
    """End the attempt to connect that a thread is making, whatever server it dials. Not while TCP connects."""
    dialled = _DIALLED.get(thread)
    if dialled is not None:
        _cut(dialled)


def traits(opened: connection.Connection) -> dict[bytes, Any]:
    """Return what a server says about itself: `mode` is b"standalone" or b"cluster", `role` b"master" or b"replica".

    Empty if it does not say, as with a proxy. Raises NotConnected, and closes the connection.

    Refused: INFO and ROLE, which some users may not call. HELLO without arguments changes nothing.
    """
    try:
        said = opened.call("HELLO")
    except connection.Refusal:
        return {}
    except Broken as error:
        raise NotConnected(f"no connection to Redis at {opened.address}: {error}") from error
    return dict(zip(said[::2], said[1::2], strict=False))


def tls_options(options: RedisOptions) -> dict[str, Any]:
    """Return the arguments of redis-py's TLS connections."""
    files = options.tls_files
    return {
        "ssl_ca_certs": files["tls_ca_file"],
        "ssl_certfile": files["tls_cert_file"],
        "ssl_keyfile": files["tls_key_file"] or files["tls_cert_file"],
        "ssl_cert_reqs": "required" if options.tls_verify else "none",
        "ssl_check_hostname": options.tls_verify,
    }


def _reveals(error: Exception, password: str | None) -> bool:
    """Tell whether an error has the password in it, or a part: a server or proxy that does not know AUTH echoes it."""
    if not password or type(error) in _OURS:
        return False
    text = str(error)
    if "args beginning with" in text:
        return True  # Redis and Valkey: cut after a hundred characters or so, and with some of them replaced
    pieces = {form[i : i + _PIECE] for form in (password, repr(password)[1:-1]) for i in range(len(form))}
    whole = min(_PIECE, len(password))
    return any(piece in text for piece in pieces if len(piece) >= whole)


def _unusable_file(options: RedisOptions) -> str | None:
    """Return which of the files for TLS cannot be used, and why: the library does not name it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    files = options.tls_files
    for name, path in files.items():
        if path is not None:
            try:
                with open(path, "rb"):
                    pass
                if name == "tls_ca_file":
                    context.load_verify_locations(path)
                elif name == "tls_cert_file" and options.tls_key_file is None:
                    context.load_cert_chain(path, password="")
                elif name == "tls_key_file" and files["tls_cert_file"] is not None:
                    context.load_cert_chain(files["tls_cert_file"], path, password="")
            except (OSError, ValueError) as error:
                return f"`{name}` {path} cannot be used: {getattr(error, 'strerror', None) or error}"
    return None


def _cut(dialled: AbstractConnection) -> None:
    sock: Any = dialled._get_socket()
    if sock is not None:
        with suppress(OSError):  # it has ended on its own
            sock.shutdown(socket.SHUT_RDWR)
