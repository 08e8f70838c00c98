"""Options of a client: address, token, TLS, time limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from scopestate.errors import ConfigError
from scopestate.paths import expand_home

if TYPE_CHECKING:
    import ssl

DEFAULT_URL = "ws://localhost:49134"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message in either direction, as in iii 0.11.6 (docs/protocol.md, section 1)."""

LIMIT_HEADER = "Scopestate-Max-Message-Bytes"
"""HTTP header of the handshake, in both directions: the largest message that its sender takes. Ours only."""


def limit_in(header: str | None, otherwise: int) -> int:
    """Return the limit that the other side announced, but at most `otherwise`; `otherwise` if it announced none."""
    announced = header or ""
    return min(int(announced), otherwise) if announced.isascii() and announced.isdigit() else otherwise


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a client, apart from its address."""

    token: str | None = None
    """Sent as `Authorization: Bearer ...`; never logged."""
    headers: Mapping[str, str] = {}
    """More HTTP headers for the upgrade request."""
    tls_ca_file: str | None = None
    """PEM file of the authorities to trust for `wss://`, instead of the system's."""
    tls_verify: bool = True
    """False: accept any certificate. The connection is encrypted, but the server may be an impostor."""
    name: str = "scopestate"
    """Name of this client in the server's list of workers."""
    connect_wait_s: float = 30.0
    """How long a call waits for a connection before it fails with nothing sent."""
    call_timeout_s: float = 30.0
    """How long a call waits for its answer after it was sent."""
    insist: bool = True
    """False: if the first attempt to connect fails, the client gives up, and calls fail at once."""
    backoff_first_s: float = 0.1
    """Pause before the first attempt to reconnect; it doubles with each further one, with 30 % of jitter."""
    backoff_most_s: float = 10.0
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Largest message in either direction. The server is told; if its own limit is smaller, that holds for sending."""
    max_pending: int = 100_000
    """Calls in progress at most; one more is refused with `OVERLOADED`."""


def checked_url(url: str) -> str:
    """Return `url` if it is the address of a WebSocket server. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not an address: {error}") from error
    if parts.scheme not in {"ws", "wss"} or not parts.hostname:
        raise ConfigError(f"{url!r} is not the address of an engine; write ws://host:port, or wss://host:port for TLS")
    if parts.username or parts.password:
        raise ConfigError("the address has a user name or password in it; use the token option instead")
    if not url.isprintable() or " " in url or parts.fragment:
        raise ConfigError(
            f"{url!a} is not the address of an engine: it contains a character that an address cannot have"
        )
    if port == 0:
        raise ConfigError(f"{url!r} has port 0, on which no server listens")
    return url


def tls_context(url: str, options: ClientOptions) -> ssl.SSLContext | None:
    """Return the TLS context for `wss://`; None for `ws://`. Raises ConfigError if `tls_ca_file` cannot be read."""
    if not url.startswith("wss:"):
        return None
    import ssl  # noqa: PLC0415 - takes 10 ms, which reading a configuration need not spend

    try:
        context = ssl.create_default_context(cafile=options.tls_ca_file and expand_home(options.tls_ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the file of TLS authorities {options.tls_ca_file!r} cannot be read: {error}") from error
    if not options.tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def request_headers(options: ClientOptions) -> dict[str, str]:
    """Return the headers of the upgrade request. Raises ConfigError for a token that a header cannot hold."""
    headers = {**options.headers, LIMIT_HEADER: str(options.max_message_bytes)}
    token = checked_token(options.token)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return headers


def checked_token(token: str | None) -> str | None:
    """Return `token` if a header can hold it. Raises ConfigError."""
    if token is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError("a token is printable ASCII text without spaces; the one given is not (it is not shown here)")
    return token
