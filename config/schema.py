"""The shape of the configuration. Unknown keys and wrong types are errors; zero and defaults are said per field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final, Literal

import msgspec

from scopestate.persistence.redis.urls import MASK, MAX_DATABASE, without_credentials, without_password

# The upper bounds keep a typing slip (or nanoseconds) away from timers and queues, which overflow far above them.
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=31_536_000_000)]
"""0 to one year."""
_Wait = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
"""Milliseconds, at most one day."""
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class KvConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`adapter: {name: kv, config: ...}`."""

    store_method: Literal["in_memory", "file_based"] = "in_memory"
    """`in_memory`: nothing is kept. `file_based`: kept in the directory `file_path`. A reload does not change it."""
    file_path: str = "kv_store_data.db"
    """The directory of a file_based store, despite the suffix that iii gives it. A reload does not change it."""
    save_interval_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)] = 5000
    """Milliseconds between saves; with `durability: interval` a crash loses what was written in the
    last interval and while its save ran. Reloads at once."""
    durability: Literal["interval", "commit"] = "interval"
    """`interval`: a write is acknowledged from memory. `commit`: when it is on disk. A reload does not change it."""


class BridgeConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`adapter: {name: bridge, config: ...}`: every scope lives in another engine. A reload changes none of it."""

    bridge_url: str = "ws://localhost:49134"
    """Address of the other engine, `ws://` or `wss://`."""
    token: str | None = None
    """Bearer token, best as `${VARIABLE}`; never logged."""
    tls_ca_file: str | None = None
    """PEM file of the authorities to trust for `wss://`; left out: the system's."""
    tls_verify: bool = True
    """`false`: accept any certificate, so any server may be at the other end."""
    connect_wait_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)] = 5_000
    """How long a call waits for a connection before it fails with nothing sent."""
    call_timeout_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)] = 20_000
    """How long a call waits for the answer once it was sent."""
    events: Literal["local", "remote"] = "local"
    """`local`: triggers hear of what goes through this engine. `remote`: of every change, also those made elsewhere."""

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        if self.token is not None:
            shown["token"] = "***"  # noqa: S105 - what stands for one
        return f"BridgeConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class RedisConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
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
    connect_timeout_ms: _Wait = 5_000
    """The longest that opening the engine, and each later attempt to connect, may take."""
    connect_wait_ms: _Wait = 5_000
    """How long a call waits for a connection before it fails with nothing sent."""
    call_timeout_ms: _Wait = 5_000
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
    events_kept: Count = 10_000
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

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["redis_url"] = without_password(self.redis_url)
        shown["sentinels"] = tuple(MASK if "@" in sentinel else sentinel for sentinel in self.sentinels)
        for name in ("password", "sentinel_password"):
            if shown[name] is not None:
                shown[name] = MASK
        return f"RedisConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class AdapterConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`adapter:` of the `iii-state` worker."""

    name: Literal["kv", "redis", "bridge"]
    config: KvConfig | RedisConfig | BridgeConfig = KvConfig()

    @property
    def kv(self) -> KvConfig:
        """The options of a kv adapter; for another one, the defaults, which do nothing there."""
        return self.config if isinstance(self.config, KvConfig) else KvConfig()


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`limits:`. Each applies from the next call or event after a reload."""

    max_value_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """Largest value accepted, in bytes of JSON; 0 means no limit."""
    scope_mailbox: Count = 10_000
    """Messages that may wait for one scope; one more is refused with `OVERLOADED`."""
    scope_mailbox_bytes: Bytes = 67_108_864
    """Bytes of values in those messages; 0 means no limit."""
    handler_mailbox: Count = 100_000
    """Events that may wait for one trigger's handler."""
    handler_mailbox_bytes: Bytes = 67_108_864
    """Bytes of old and new values in those events; the event that exceeds it is taken. 0 means no limit."""
    events_bytes: Bytes = 268_435_456
    """Bytes of values in the events that wait for all triggers together, each value counted once; 0 means no limit."""
    handler_when_full: Literal["block", "drop_oldest", "reject"] = "block"
    """`block`: writers wait (at most `call_timeout_ms`). `drop_oldest`, `reject`: the event is reported and counted."""
    handler_timeout_ms: Milliseconds = 0
    """A handler that runs longer is reported as failed; 0 means no limit."""
    handler_attempts: Count = 1
    """How often an event is tried before it goes to the dead-letter hook."""
    handler_backoff_ms: Milliseconds = 100
    """Wait before the second attempt; doubles with each further one."""
    max_event_depth: Count = 1000
    """How deep handlers may fire each other before the chain is cut and reported."""
    call_timeout_ms: Milliseconds = 30_000
    """How long a call waits for a busy scope or a full handler; 0 means for ever."""
    close_grace_ms: Milliseconds = 5_000
    """How long `close()` waits for events already fired."""
    passivate_after_ms: Milliseconds = 300_000
    """A saved scope untouched for this long leaves memory; 0 means never."""


class ScopeRule(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An entry of `scopes:`: how long the writes of some scopes must last. The first entry that fits counts."""

    durability: Literal["memory", "interval", "commit"]
    """`memory`: these scopes are never saved."""
    name: str | None = None
    """Exact scope name. Give either `name` or `prefix`."""
    prefix: str | None = None
    """Scopes whose name starts with this."""


class TriggerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An entry of `triggers:`."""

    function_id: str
    scope: str | None = None
    """Exact scope; left out: every scope."""
    key: str | None = None
    """Exact key; left out: every key."""
    condition_function_id: str | None = None
    """Asked first; only `false` skips the handler."""
    id: str | None = None
    """Trigger id; left out: made from the entry's content."""


EVERYTHING: Final = ("*",)
"""The pattern that matches every name."""
EVERY_REGISTRATION: Final = ("*", "engine::*", "state::*")
"""The patterns of `registers` that match every id: `*` alone does not cover the engine's own."""


class TokenConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An entry of `auth.tokens`: where the token comes from, and what its bearer may do (docs/rights.md).

    A string instead of the mapping is a token that may do everything (`full_token`). A pattern is a name in which `*`
    stands for any characters, `?` for one. If none of `functions`, `read` and `write` is given, these three are
    unlimited; if one of them is given, those that are left out allow nothing.
    """

    token: str | None = None
    """The token itself, best as `${VARIABLE}`. Give one of `token`, `env` and `file`."""
    env: str | None = None
    """The environment variable that holds it."""
    file: str | None = None
    """The file that holds it; white space around it does not count."""
    functions: tuple[str, ...] | None = None
    """Ids of functions that it may call, through a trigger too."""
    registers: tuple[str, ...] = ()
    """Ids of the functions and trigger types that it may register; left out: none. Only a pattern that begins with
    `engine::` or `state::` matches an id that does."""
    read: tuple[str, ...] | None = None
    """Scopes that it may read and watch."""
    write: tuple[str, ...] | None = None
    """Scopes that it may write. A write answers with the old value, so it reads that too."""

    def __repr__(self) -> str:
        token = None if self.token is None else "***"
        return f"TokenConfig(token={token}, env={self.env!r}, file={self.file!r}, functions={self.functions!r}, ...)"


def full_token(token: str) -> TokenConfig:
    """Return the entry that a string in `auth.tokens` stands for: a token that may do everything."""
    return TokenConfig(
        token=token, functions=EVERYTHING, registers=EVERY_REGISTRATION, read=EVERYTHING, write=EVERYTHING
    )


def with_every_list(token: TokenConfig) -> TokenConfig:
    """Return a token with the lists that were left out: see `TokenConfig`."""
    limited = any(names is not None for names in (token.functions, token.read, token.write))
    left_out = () if limited else EVERYTHING
    given = {name: getattr(token, name) for name in ("functions", "read", "write")}
    return msgspec.structs.replace(
        token, **{name: left_out if names is None else names for name, names in given.items()}
    )


class AuthConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`auth:` of the `iii-worker-manager`."""

    tokens: tuple[TokenConfig, ...] = ()
    """Who may connect, with `Authorization: Bearer TOKEN`; empty: every program."""


class TlsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`tls:` of the `iii-worker-manager`: with it the server speaks `wss://` and `https://` only."""

    certfile: str
    """Certificate chain, PEM."""
    keyfile: str | None = None
    """Private key, PEM; left out: it is in `certfile`."""


class ServerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`config:` of the `iii-worker-manager` worker. A reload changes its tokens only."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs `auth.tokens`, or `insecure: true`."""
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 49134
    """0: a free one."""
    auth: AuthConfig = AuthConfig()
    insecure: bool = False
    """True: listen on other than loopback addresses without any token."""
    tls: TlsConfig | None = None
    origins: tuple[str, ...] = ()
    """Web pages that may connect, as `https://host:port`, or "*". Browsers with any other page are refused."""
    call_timeout_ms: Milliseconds = 30_000
    """How long a worker may take to answer a call; then the caller gets `TIMEOUT`. 0 means for ever."""
    max_connections: Count = 10_000
    """Connections at a time; one more is answered with HTTP 503."""
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1024, le=1_073_741_824)] = 67_108_864
    """Largest message taken from a worker; a larger one closes the connection with code 1009."""
    max_unsent_bytes: Annotated[int, msgspec.Meta(ge=65_536, le=4_294_967_296)] = 67_108_864
    """What may wait for a worker that reads slowly, before its connection is closed with code 1008."""
    max_registrations: Count = 10_000
    """Functions, triggers and trigger types of one worker; one more closes its connection with code 1008."""
    max_calls: Count = 10_000
    """Calls in progress per worker, as caller and as executor; one more is answered `OVERLOADED`."""
    max_call_bytes: Annotated[int, msgspec.Meta(ge=1024, le=2**40)] = 268_435_456
    """Bytes that calls of one worker may hold while they wait for their answer; from there on each is `OVERLOADED`.

    All workers together may hold four times as much.
    """
    max_waiting_events: Count = 50_000
    """Events that may wait for one trigger of a worker; then its connection is closed with code 1008."""
    max_waiting_bytes: Annotated[int, msgspec.Meta(ge=1024, le=2**40)] = 268_435_456
    """Bytes of the events that may wait for all triggers of one worker; then its connection is closed likewise."""


class FunctionRef(msgspec.Struct, frozen=True):
    """A value of `functions:`, resolved."""

    target: str
    """`package.module:callable`, as the file has it; dots after the colon walk attributes."""
    callable: Callable[..., object]


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole configuration, checked. Two of them are equal if an engine would run the same on both."""

    adapter: AdapterConfig = AdapterConfig("kv")
    functions: dict[str, FunctionRef] = {}
    """Function id -> function, in the order of the file."""
    triggers: tuple[TriggerConfig, ...] = ()
    scopes: tuple[ScopeRule, ...] = ()
    limits: LimitsConfig = LimitsConfig()
    server: ServerConfig | None = None
    """The `iii-worker-manager` entry; None: there is none."""
    source: str | None = None
    """Absolute path of the file, not resolved through symlinks; None if it came from text or a mapping."""
