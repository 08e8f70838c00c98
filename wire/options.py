"""Options of a client: its name, time limits, and limits of size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message in either direction, as in iii 0.11.6 (docs/reference/protocol.md, section 1)."""

LIMIT_HEADER = "Scopestate-Max-Message-Bytes"
"""HTTP header of the handshake, in both directions: the largest message that its sender accepts. scopestate only."""


def limit_in(header: str | None, otherwise: int) -> int:
    """Return the limit that the other side announced, but at most `otherwise`; `otherwise` if it announced none."""
    announced = header or ""
    return min(int(announced), otherwise) if announced.isascii() and announced.isdigit() else otherwise


REFUSALS: Final = frozenset({401, 403, 404})
"""HTTP statuses that another attempt will not change."""
GOING: Final = 1012
"""Close code of a server that stops."""
GOODBYE: Final = "all that was begun is answered"
"""Reason that goes with `GOING`: a call without an answer was not begun, so it may be sent again, elsewhere."""


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a client, apart from its address."""

    headers: Mapping[str, str] = {}
    """More HTTP headers for the upgrade request."""
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

    def request_headers(self) -> dict[str, str]:
        """Return the headers of the upgrade request, without the token."""
        return {**self.headers, LIMIT_HEADER: str(self.max_message_bytes)}
