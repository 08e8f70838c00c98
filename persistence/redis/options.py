"""The options of Redis, their mistakes, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, TypeVar

import msgspec

from scopestate.errors import ConfigError
from scopestate.paths import expand_home
from scopestate.persistence.options import Mistake, Options, Wait
from scopestate.persistence.redis.urls import (
    MASK,
    MAX_DATABASE,
    RedisAddress,
    parse_redis_url,
    parse_sentinel,
    without_credentials,
    without_password,
)

_TLS_FILES = ("tls_ca_file", "tls_cert_file", "tls_key_file")
_TLS = (*_TLS_FILES, "tls_verify")
_SENTINEL = ("sentinel_service", "sentinel_username", "sentinel_password")

_A = TypeVar("_A")


class RedisOptions(Options, frozen=True):
    """`adapter: {name: redis, config: ...}`: scopes live in Redis or Valkey, shared by any number of engines.

    A reload changes none of it.
    """

    redis_url: str = "redis://localhost:6379"
    """`redis://host:port`, `rediss://host:port` (TLS) or `unix:///path`. `user:password@` may stand before the host or
    path, percent-encoded; `/2`, for a path `?db=2`, is the database."""
    username: str | None = None
    """Overrides the one in `redis_url`."""
    password: str | None = None
    """Overrides the one in `redis_url`; better as `${VARIABLE}`; never logged."""
    database: Annotated[int, msgspec.Meta(ge=0, le=MAX_DATABASE)] | None = None
    """Overrides the one in `redis_url`; 0 if neither is given."""
    key_prefix: str = "state:"
    """A scope is the hash whose key is this prefix and the name of the scope. iii's prefix is `state:`."""
    sentinels: tuple[str, ...] = ()
    """`host:port` of Redis Sentinels; without a port it is 26379. They name the primary, and the host of `redis_url`
    does not count; its `rediss://` holds for them too."""
    sentinel_service: str = "mymaster"
    """The name of the service in the Sentinels' configuration."""
    sentinel_username: str | None = None
    """User name for the Sentinels, which do not get `username` and `password`."""
    sentinel_password: str | None = None
    """Password for the Sentinels, better as `${VARIABLE}`; never logged."""
    tls_ca_file: str | None = None
    """PEM file of the authorities to trust for `rediss://`; left out: the system's."""
    tls_cert_file: str | None = None
    """PEM file of the certificate to show to the server; left out: none is shown."""
    tls_key_file: str | None = None
    """PEM file of the private key; left out: it is in `tls_cert_file`."""
    tls_verify: bool = True
    """`false`: accept any certificate, so any server may be at the other end."""
    connect_timeout_ms: Wait = 5_000
    """The longest time for opening the engine, and for each later attempt to connect."""
    connect_wait_ms: Wait = 5_000
    """How long a call waits for a connection before it fails with nothing sent."""
    call_timeout_ms: Wait = 5_000
    """How long a call waits for the answer after it was sent."""
    pool_size: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    """Connections to each server, at most."""
    update_attempts: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 100
    """Attempts of an update while other engines change the key, before it fails with nothing written."""
    events: Literal["local", "shared"] = "local"
    """`local`: triggers get the events of writes through this engine. `shared`: of every write of every engine with
    `events: shared` on this database and prefix."""
    delivery: Literal["each", "one"] = "each"
    """With `events: shared`: `each` engine's triggers fire, or exactly `one` engine's (at least once)."""
    events_kept: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] = 10_000
    """With `events: shared`: about how many events the stream keeps. An engine that is further behind reports a gap."""
    group: str = "scopestate"
    """With `delivery: one`: the consumer group. Engines of one group share the events among them."""
    claim_after_ms: Annotated[int, msgspec.Meta(ge=100, le=86_400_000)] = 30_000
    """With `delivery: one`: time after which other engines take over the events of an engine that does not respond."""

    @property
    def address(self) -> str:
        """The address for messages, without user name and password."""
        if self.sentinels:
            # An entry with more than host and port is an error, but it may contain a password.
            named = ", ".join(MASK if "@" in sentinel else sentinel for sentinel in self.sentinels)
            return f"{self.sentinel_service!r} of the Sentinels {named}"
        return without_credentials(self.redis_url, self.database)

    @property
    def server(self) -> RedisAddress:
        """The address and login of the server: `username`, `password` and `database` override `redis_url`.

        With `sentinels`, host and port are not used. Raises ConfigError if `redis_url` is not an address.
        """
        given = {"username": self.username, "password": self.password, "database": self.database}
        return msgspec.structs.replace(
            parse_redis_url(self.redis_url), **{name: value for name, value in given.items() if value is not None}
        )

    @property
    def sentinel_addresses(self) -> tuple[tuple[str, int], ...]:
        """Hosts and ports of the Sentinels. Raises ConfigError."""
        return tuple(parse_sentinel(sentinel) for sentinel in self.sentinels)

    @property
    def shares_events(self) -> bool:
        """True if triggers get the events of every engine."""
        return self.events == "shared"

    @property
    def tls_files(self) -> dict[str, str | None]:
        """The files for TLS by the names of their options, with `~` expanded. Raises ConfigError."""
        given = {name: getattr(self, name) for name in _TLS_FILES}
        return {name: path and expand_home(path) for name, path in given.items()}

    @property
    def connect_timeout_s(self) -> float:
        """`connect_timeout_ms` in seconds."""
        return self.connect_timeout_ms / 1000

    @property
    def connect_wait_s(self) -> float:
        """`connect_wait_ms` in seconds."""
        return self.connect_wait_ms / 1000

    @property
    def call_timeout_s(self) -> float:
        """`call_timeout_ms` in seconds."""
        return self.call_timeout_ms / 1000

    @property
    def claim_after_s(self) -> float:
        """`claim_after_ms` in seconds."""
        return self.claim_after_ms / 1000

    def mistakes(self) -> Iterator[Mistake]:
        """Yield the mistakes that the types do not show."""
        address, problem = _tried(parse_redis_url, self.redis_url)
        if problem is not None:
            yield Mistake("redis_url", problem)
        for i, sentinel in enumerate(self.sentinels):
            _, problem = _tried(parse_sentinel, sentinel)
            if problem is not None:
                yield Mistake("sentinels", problem, i)
        if address is not None and address.unix_path is not None and self.sentinels:
            yield Mistake(
                "sentinels", "Sentinels name a server by host and port; `redis_url` cannot be unix:// with them"
            )
        if not self.sentinels:
            for name in self._changed(_SENTINEL):
                yield Mistake(name, "there are no `sentinels`; name them, or remove this")
        if address is not None and not address.tls:
            for name in self._changed(_TLS):
                yield Mistake(name, "the connection has no TLS; write rediss:// in `redis_url`, or remove this")
        if self.tls_key_file is not None and self.tls_cert_file is None:
            yield Mistake("tls_key_file", "a key without its certificate; give `tls_cert_file` too")
        if self.delivery == "one" and not self.shares_events:
            yield Mistake(
                "delivery", "`one` is a choice among the engines that share events; write `events: shared` too"
            )
        if not self.group:
            yield Mistake("group", "expected a non-empty string")

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        defaults = RedisOptions()
        return [name for name in names if getattr(self, name) != getattr(defaults, name)]

    def described(self) -> str:
        """Describe where the state is kept."""
        return f"Redis at {self.address}, {self.events} events"

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["redis_url"] = without_password(self.redis_url)
        shown["sentinels"] = tuple(MASK if "@" in sentinel else sentinel for sentinel in self.sentinels)
        for name in ("password", "sentinel_password"):
            if shown[name] is not None:
                shown[name] = MASK
        return f"RedisOptions({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _tried(parse: Callable[[str], _A], text: str) -> tuple[_A | None, str | None]:
    """Return the parsed address, or the problem."""
    try:
        return parse(text), None
    except ConfigError as error:
        return None, error.problem
