"""What a Redis backend is told, what is wrong with it, and what it means together."""

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
    """Goes before the one in `redis_url`."""
    password: str | None = None
    """Goes before the one in `redis_url`; best as `${VARIABLE}`; never logged."""
    database: Annotated[int, msgspec.Meta(ge=0, le=MAX_DATABASE)] | None = None
    """Goes before the one in `redis_url`; neither: 0."""
    key_prefix: str = "state:"
    """A scope is the hash with this and then its name as key. iii's prefix is `state:`."""
    sentinels: tuple[str, ...] = ()
    """`host:port` of Redis Sentinels; without a port it is 26379. They name the primary, and the host of `redis_url`
    does not count; its `rediss://` holds for them too."""
    sentinel_service: str = "mymaster"
    """What the Sentinels call the primary."""
    sentinel_username: str | None = None
    """As whom to log in at the Sentinels, which do not get `username` and `password`."""
    sentinel_password: str | None = None
    """Best as `${VARIABLE}`; never logged."""
    tls_ca_file: str | None = None
    """PEM file of the authorities to trust for `rediss://`; left out: the system's."""
    tls_cert_file: str | None = None
    """PEM file of the certificate to show to the server; left out: none is shown."""
    tls_key_file: str | None = None
    """PEM file of the private key; left out: it is in `tls_cert_file`."""
    tls_verify: bool = True
    """`false`: accept any certificate, so any server may be at the other end."""
    connect_timeout_ms: Wait = 5_000
    """The longest that opening the engine, and each later attempt to connect, may take."""
    connect_wait_ms: Wait = 5_000
    """How long a call waits for a connection before it fails with nothing sent."""
    call_timeout_ms: Wait = 5_000
    """How long a call waits for the answer once it was sent."""
    pool_size: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    """Connections to each server, at most."""
    update_attempts: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 100
    """How often an update is tried against writers of the same key elsewhere before it fails with nothing written."""
    events: Literal["local", "shared"] = "local"
    """`local`: triggers hear of what goes through this engine. `shared`: of every write of every engine with
    `events: shared` on this database and prefix."""
    delivery: Literal["each", "one"] = "each"
    """With `events: shared`: `each` engine's triggers fire, or exactly `one` engine's (at least once)."""
    events_kept: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] = 10_000
    """With `events: shared`: about how many events the stream keeps. An engine further behind reports the gap."""
    group: str = "scopestate"
    """With `delivery: one`: the consumer group. Engines of one group share the events among them."""
    claim_after_ms: Annotated[int, msgspec.Meta(ge=100, le=86_400_000)] = 30_000
    """With `delivery: one`: when another engine takes over the events of an engine that shows no life."""

    @property
    def address(self) -> str:
        """Where the state is, for messages: without user name and password."""
        if self.sentinels:
            # An entry with more than host and port in it is an error; until that is said it may hold a password.
            named = ", ".join(MASK if "@" in sentinel else sentinel for sentinel in self.sentinels)
            return f"{self.sentinel_service!r} of the Sentinels {named}"
        return without_credentials(self.redis_url, self.database)

    @property
    def server(self) -> RedisAddress:
        """Where the server is and as whom to log in: `username`, `password` and `database` go before `redis_url`.

        With `sentinels`, host and port do not count, all else does. Raises ConfigError: `redis_url` is not an address.
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
        """True if triggers hear of every write of every engine."""
        return self.events == "shared"

    @property
    def tls_files(self) -> dict[str, str | None]:
        """The three files for TLS by the names of their options, with `~` expanded. Raises ConfigError."""
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
        """Yield what types alone do not tell."""
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
    """Return what `parse` gives, if it is an address, or what is wrong."""
    try:
        return parse(text), None
    except ConfigError as error:
        return None, error.problem
