"""The options of a bridge. Imports neither asyncio nor a WebSocket library."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final, Literal
from urllib.parse import urlsplit

from scopestate.actors.ports import Mistake, Options, Wait
from scopestate.errors import ConfigError
from scopestate.wire.address import DEFAULT_URL, checked_token, checked_url

_ANYWHERE: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - compared with, not listened on


class BridgeOptions(Options, frozen=True):
    """`adapter: {name: bridge, config: ...}`: every scope lives in another engine. A reload changes none of it."""

    bridge_url: str = DEFAULT_URL
    """Address of the other engine: `ws://host:port`, `wss://host:port`, or `ws+unix:///path` for a Unix socket."""
    token: str | None = None
    """Bearer token, better as `${VARIABLE}`; never logged."""
    tls_ca_file: str | None = None
    """PEM file of the authorities to trust for `wss://`; if left out, those of the system."""
    tls_verify: bool = True
    """`false`: accept any certificate, so any server can pose as the other engine."""
    connect_wait_ms: Wait = 5_000
    """How long a call waits for a connection before it fails with nothing sent."""
    call_timeout_ms: Wait = 20_000
    """How long a call waits for the answer after it was sent."""
    events: Literal["local", "remote"] = "local"
    """`local`: triggers get the events of writes through this engine. `remote`: of every change in the other one."""

    def mistakes(self) -> Iterator[Mistake]:
        """Yield the mistakes that the types do not show."""
        try:
            checked_url(self.bridge_url)
        except ConfigError as error:
            yield Mistake("bridge_url", error.problem)
        try:
            checked_token(self.token)
        except ConfigError as error:
            yield Mistake("token", error.problem)

    def refuse_server(self, host: str, port: int) -> None:
        """Raise ConfigError if a server of this engine would listen at the address of the bridge.

        iii's default address of a bridge is the default address of the engine itself: calls would be forwarded in a
        circle until they time out (docs/reference/semantics.md, section 8.37).
        """
        parts = urlsplit(self.bridge_url)
        target = parts.hostname or ""
        if (parts.port or {"ws": 80, "wss": 443}.get(parts.scheme)) != port:
            return
        here = _is_loopback(target) and (host in _ANYWHERE or _is_loopback(host))
        if here or target == host.lower():
            raise ConfigError(
                f"bridge_url {self.bridge_url} is the address on which this engine itself listens ({host}:{port}): "
                "every call would come back to it; name another engine, or let this one listen on another port",
                key="bridge_url",
            )

    def described(self) -> str:
        """Describe where the state is kept."""
        return f"bridge to {self.bridge_url}, {self.events} events"

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        if self.token is not None:
            shown["token"] = "***"  # noqa: S105 - what stands for one
        return f"BridgeOptions({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
