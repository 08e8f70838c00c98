"""Addresses of engines: what a client dials."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote, urlsplit

from scopestate.errors import ConfigError
from scopestate.paths import expand_home

if TYPE_CHECKING:
    import socket
    import ssl

DEFAULT_URL: Final = "ws://localhost:49134"

_UNIX: Final = "ws+unix"
_PORTS: Final = {"ws": 80, "wss": 443}
_LONGEST_PATH: Final = 103
"""Bytes that the path of a Unix socket may have on every system."""
_FULL: Final = frozenset({errno.EAGAIN, errno.EWOULDBLOCK})
_UNDER_WAY: Final = frozenset({errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR})
_SLICE_S: Final = 0.05
_FULL_PAUSE_S: Final = 0.002
_FULL_MOST_S: Final = 1.0


class Address:
    """Where an engine is, and what a client needs to be let in. Immutable; methods from any thread.

    `ws://host:port`, `wss://host:port` for TLS, or `ws+unix:///path` for a Unix socket.
    """

    def __init__(
        self, url: str, *, token: str | None = None, tls_ca_file: str | None = None, tls_verify: bool = True
    ) -> None:
        """`token`: sent as `Authorization: Bearer ...`, never shown. `tls_ca_file`: authorities to trust for `wss://`,
        a PEM file; None: the system's. `tls_verify=False`: accept any certificate.

        Raises ConfigError for what cannot be an address, and for a token that a header cannot hold.
        """
        self.url: Final = checked_url(url)
        """For messages: it has no token."""
        self.token: Final = checked_token(token)
        self.tls_ca_file: Final = tls_ca_file
        self.tls_verify: Final = tls_verify
        parts = urlsplit(url)
        self.path: Final[str | None] = unquote(parts.path) if parts.scheme == _UNIX else None
        """Path of the Unix socket; None for a host."""
        self.host: Final = "localhost" if self.path is not None else parts.hostname or ""
        self.port: Final = 80 if self.path is not None else parts.port or _PORTS[parts.scheme]
        self._context: ssl.SSLContext | None = None

    @classmethod
    def of_path(cls, path: str | os.PathLike[str]) -> Address:
        """Return the address of a Unix socket, by its absolute path."""
        return cls(f"{_UNIX}://{quote(os.fspath(path))}")

    def __repr__(self) -> str:
        return f"Address({self.url!r})"

    @property
    def secure(self) -> bool:
        """Whether it is reached by TLS."""
        return self.url.startswith("wss:")

    @property
    def request_url(self) -> str:
        """The address that the WebSocket handshake names."""
        return "ws://localhost/" if self.path is not None else self.url

    def headers(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the headers of the upgrade request: those given, and the token."""
        return dict(more) if self.token is None else {**more, "Authorization": f"Bearer {self.token}"}

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context; None without TLS. Raises ConfigError if `tls_ca_file` cannot be read."""
        if not self.secure:
            return None
        if self._context is None:
            self._context = _tls_context(self.tls_ca_file, verify=self.tls_verify)
        return self._context

    # ------------------------------------------------------------------------------------------------------ dialling

    def dial(self, timeout_s: float, is_cancelled: Callable[[], bool] = lambda: False) -> socket.socket:
        """Connect, without TLS, and return the socket, whose timeout is `timeout_s`. Blocks.

        Raises OSError, at once if `is_cancelled()`, which is called repeatedly.
        """
        import socket  # noqa: PLC0415 - a configuration need not load it

        if self.path is not None:
            sock = _of_unix()
            try:
                _connect_unix(sock, self.path, is_cancelled)
            except BaseException:
                sock.close()
                raise
        else:
            sock = _connect_to(self.host, self.port, timeout_s, is_cancelled)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout_s)
        return sock

    def secure_socket(self, sock: socket.socket) -> socket.socket:
        """Return a dialled socket with TLS, if the address asks for it. The plain socket must not be used then."""
        context = self.tls()
        return sock if context is None else context.wrap_socket(sock, server_hostname=self.host)

    def asyncio_options(self) -> dict[str, Any]:
        """Return what `loop.create_connection` needs: a socket that is connected, or the TLS context. Raises OSError.

        A Unix socket is connected here: that does not wait for the other side to accept it.
        """
        if self.path is None:
            return {"ssl": self.tls()}
        sock = _of_unix()
        try:
            with usable_path(self.path) as path:
                sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return {"sock": sock}


def _of_unix() -> socket.socket:
    import socket  # noqa: PLC0415 - a configuration need not load it

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def _connect_to(host: str, port: int, timeout_s: float, is_cancelled: Callable[[], bool]) -> socket.socket:
    """Connect to the first of a host's addresses that answers."""
    import select  # noqa: PLC0415 - as socket
    import socket  # noqa: PLC0415 - a configuration need not load it

    problem: OSError | None = None
    for family, kind, protocol, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(target)
            until = time.monotonic() + timeout_s
            while code in _UNDER_WAY and not select.select([], [sock], [sock], _SLICE_S)[1]:
                if is_cancelled():
                    raise ConnectionAbortedError("this client is closed")
                if time.monotonic() >= until:
                    raise TimeoutError(f"no answer within {timeout_s:g} s")
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if code in _UNDER_WAY else code
            if code:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            sock.close()
            problem = error
            if is_cancelled():
                break
        else:
            return sock
    raise problem or OSError(f"{host} has no address")


def _connect_unix(sock: socket.socket, path: str, is_cancelled: Callable[[], bool]) -> None:
    """Connect. While more connections wait to be accepted than the server allows, try again, for a second."""
    waited_s = 0.0
    while True:
        try:
            with usable_path(path) as usable:
                sock.connect(usable)
            return
        except OSError as error:
            if error.errno not in _FULL or waited_s >= _FULL_MOST_S or is_cancelled():
                raise
        time.sleep(_FULL_PAUSE_S)
        waited_s += _FULL_PAUSE_S


@contextlib.contextmanager
def usable_path(path: str) -> Iterator[str]:
    """Yield a path to bind or connect a Unix socket to, even if the real path is too long for a socket.

    Raises OSError: the directory does not exist; ENAMETOOLONG if this system has no other way.
    """
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    if not os.path.isdir("/proc/self/fd") or len(os.fsencode(name)) > _LONGEST_PATH - 30:
        raise OSError(errno.ENAMETOOLONG, "the path is too long for a Unix socket", path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------------------------------------- checks


def checked_url(url: str) -> str:
    """Return `url` if it is the address of an engine. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not an address: {error}") from error
    if parts.scheme == _UNIX:
        return _checked_unix(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConfigError(
            f"{url!r} is not the address of an engine; write ws://host:port, wss://host:port for TLS, or "
            "ws+unix:///path for a Unix socket, which is state.sock in a directory that engines share"
        )
    if parts.username or parts.password:
        raise ConfigError("the address has a user name or password in it; use the token option instead")
    if not url.isprintable() or " " in url or parts.fragment:
        raise ConfigError(
            f"{url!a} is not the address of an engine: it contains a character that an address cannot have"
        )
    if port == 0:
        raise ConfigError(f"{url!r} has port 0, on which no server listens")
    return url


def _checked_unix(url: str) -> str:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or path.endswith("/"):
        raise ConfigError(
            f"{url!r} is not the address of a Unix socket; write ws+unix:// and the absolute path, which begins with "
            "`/`: ws+unix:///run/app/state.sock"
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise ConfigError(f"{url!r}: in the path of a Unix socket, write %3F for `?` and %23 for `#`")
    if not url.isprintable() or "\0" in path:
        raise ConfigError(
            f"{url!a} is not the address of an engine: it contains a character that an address cannot have"
        )
    import socket  # noqa: PLC0415 - as above

    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError(f"{url!r}: this system has no Unix sockets; use ws://host:port")
    return url


def checked_token(token: str | None) -> str | None:
    """Return `token` if a header can hold it. Raises ConfigError."""
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError("a token is printable ASCII text without spaces; the one given is not (it is not shown here)")
    return token


def _tls_context(ca_file: str | None, *, verify: bool) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415 - takes 10 ms, which reading a configuration need not spend

    try:
        context = ssl.create_default_context(cafile=ca_file and expand_home(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the file of TLS authorities {ca_file!r} cannot be read: {error}") from error
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
