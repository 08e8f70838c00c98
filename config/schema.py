"""The structs of the configuration. Unknown keys and wrong types are errors. Each field says what zero means."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec

from scopestate.actors.journal import History
from scopestate.ops.json_schema import JsonSchema
from scopestate.ops.results import EventName
from scopestate.ops.triggers import OPTIONS, Order
from scopestate.persistence.bridge.options import BridgeOptions
from scopestate.persistence.local import KvOptions
from scopestate.persistence.redis.options import RedisOptions

# The upper limits keep typing errors (or nanoseconds) away from timers and queues, which overflow far above them.
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=31_536_000_000)]
"""0 to one year."""
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


AdapterName = Literal["kv", "redis", "bridge"]
AdapterOptions = KvOptions | RedisOptions | BridgeOptions
ADAPTERS: Final[Mapping[str, type[AdapterOptions]]] = {"kv": KvOptions, "redis": RedisOptions, "bridge": BridgeOptions}
"""The values of an adapter's `name:`, with the struct that its `config:` is read into."""


class AdapterConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`adapter:` of the `iii-state` worker."""

    name: AdapterName
    config: AdapterOptions = KvOptions()

    @property
    def kv(self) -> KvOptions:
        """The options of a kv adapter; for other adapters, the defaults, which have no effect."""
        return self.config if isinstance(self.config, KvOptions) else KvOptions()


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`limits:`. After a reload each applies from the next call or event."""

    max_value_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """Largest value accepted, in bytes of JSON; 0 means no limit."""
    max_batch_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] = 8_388_608
    """Most bytes of JSON that one transaction may write; a larger one is refused. It may change at most 1,000 keys."""
    scope_mailbox: Count = 10_000
    """Messages that may wait for one scope; further ones are refused with `OVERLOADED`."""
    scope_mailbox_bytes: Bytes = 67_108_864
    """Bytes of values in those messages; 0 means no limit."""
    handler_mailbox: Count = 100_000
    """Events that may wait for one trigger's handler."""
    handler_mailbox_bytes: Bytes = 67_108_864
    """Bytes of old and new values in those events. The event that exceeds it is still taken. 0 means no limit."""
    events_bytes: Bytes = 268_435_456
    """Bytes of values in the events that wait for all triggers together, each value counted once; 0 means no limit."""
    handler_when_full: Literal["block", "drop_oldest", "reject"] = "block"
    """`block`: writers wait, at most `call_timeout_ms`. `drop_oldest`, `reject`: an event is dropped and reported."""
    handler_timeout_ms: Milliseconds = 0
    """A handler that runs longer is reported as failed; 0 means no limit."""
    handler_attempts: Count = 1
    """Attempts to deliver an event before it goes to the dead-letter hook."""
    handler_backoff_ms: Milliseconds = 100
    """Pause before the second attempt; it doubles with each further one."""
    max_event_depth: Count = 1000
    """Events that may cause one another in a chain of handlers; a longer chain is cut and reported."""
    call_timeout_ms: Milliseconds = 30_000
    """How long a call waits for a busy scope or a full handler; 0 means no limit."""
    journal_events: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] = 1_000_000
    """Changes that the journal of a store keeps for durable triggers."""
    journal_bytes: Bytes = 1_073_741_824
    """Bytes of keys and values in those changes, and 64 for each; 0 means no limit."""
    journal_when_full: Literal["block", "pause"] = "block"
    """`block`: writes to the scopes of durable triggers wait, at most `call_timeout_ms`. `pause`: the slowest durable
    trigger is paused, and loses its oldest events, which are counted."""
    close_grace_ms: Milliseconds = 5_000
    """How long `close()` waits for events already fired."""
    passivate_after_ms: Milliseconds = 300_000
    """A saved scope that is not used for this long leaves memory; 0 means never."""
    max_resident_bytes: Bytes = 0
    """Bytes of memory for the keys and values of saved scopes, about. Saved keys leave memory when there are more, and
    come back when they are asked for; 0 means no limit."""


class HistoryConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`history:` of an entry of `scopes:`: how many of the changes are kept. The oldest go first; 0 means no limit."""

    events: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 100_000
    """Changes of each scope."""
    age_s: Annotated[int, msgspec.Meta(ge=0, le=315_360_000)] = 604_800
    """Seconds."""
    bytes: Bytes = 64 << 20
    """Bytes of keys and values, and 64 for each change."""

    def limits(self) -> History:
        """Return the limits as the journal takes them."""
        return History(self.events, self.age_s * 1000, self.bytes)


class FunctionRef(msgspec.Struct, frozen=True):
    """A value of `functions:`, resolved."""

    target: str
    """`package.module:callable`, as in the file; dots after the colon are attributes."""
    callable: Callable[..., object]


class TypeRef(msgspec.Struct, frozen=True):
    """`type:` of an entry of `scopes:`, resolved."""

    target: str
    """`package.module:Type`, as in the file; or the name of a type that the program handed over itself."""
    type: Any


class SchemaRef(msgspec.Struct, frozen=True):
    """`schema:` of an entry of `scopes:`, compiled."""

    path: str | None
    """The path, as in the file; None: the schema is in the configuration itself."""
    schema: JsonSchema


class ScopeRule(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An entry of `scopes:`: options for some scopes.

    Each option is taken from the first entry that matches and has it. The options about values, from `type` to
    `upgrade`, count as one. A reload changes all but `durability`, for later writes.
    """

    durability: Literal["memory", "interval", "commit"] | None = None
    """`memory`: these scopes are never saved. For `kv` only."""
    name: str | None = None
    """Exact scope name. Give either `name` or `prefix`."""
    prefix: str | None = None
    """Scopes whose name starts with this."""
    ttl_ms: Annotated[int, msgspec.Meta(ge=0, le=3_153_600_000_000)] | None = None
    """Keys that are written without a time to live or a deadline expire after this time; 0 means never."""
    ttl_from: Literal["write", "create"] | None = None
    """`write`: each write of a key starts that time again. `create`: it counts from the creation of the key. Left out:
    `write`."""
    strict: bool | None = None
    """True: an update with an op that is refused writes nothing, and raises `UpdateRefused`."""
    type: TypeRef | None = None
    """The type that values must fit, as `package.module:Type`. Give `type` or `schema`, not both."""
    schema: SchemaRef | None = None
    """The JSON schema that values must fit: a path from the folder of the file, or the schema itself."""
    enforce: Literal["refuse", "warn"] | None = None
    """What happens to a write whose value does not fit. `refuse`: it raises `SchemaViolation`. `warn`: it is made,
    counted and logged. Left out: `refuse`."""
    version: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    """The current version of the values."""
    version_field: str | None = None
    """The field at the top of a value that has its version; a value without it has version 1."""
    upgrade: FunctionRef | None = None
    """Function of a value and its version that returns the value in the next version: `package.module:callable`."""
    history: HistoryConfig | None = None
    """Keep changes so that a watch can continue from a cursor; in a store of files, also after a restart."""


class RetryConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`retry:` of a durable trigger. The pause after attempt n is `first * factor ** (n - 1)`, at most `longest`."""

    attempts: int = 10
    """Attempts in all, the first included."""
    first: float = 1.0
    """Seconds between the first attempt and the second."""
    factor: float = 2.0
    longest: float = 300.0
    """Seconds of the longest pause."""
    jitter: float = 0.2
    """Part of the pause by which it is varied at random, from 0 to 1."""


class TriggerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An entry of `triggers:`."""

    function_id: str
    scope: str | None = None
    """Exact scope; left out: every scope."""
    key: str | None = None
    """Exact key; left out: every key."""
    condition_function_id: str | None = None
    """Called first; if it returns `false` or raises, the handler is skipped."""
    id: str | None = None
    """Trigger id; left out: made from the content of the entry."""
    events: tuple[EventName, ...] | None = None
    """Kinds of changes: `created`, `updated`, `deleted`, `expired`; left out: all of them."""
    # The rest is checked by `ops.triggers.read_options`, as for a program; that module describes each option.
    prefix: str | None = None
    """Keys that begin with this; not together with `key`."""
    scope_prefix: str | None = None
    """Scopes whose name begins with this; not together with `scope`."""
    only_if_changed: bool | None = None
    """True: not for a write that does not change the JSON value."""
    fields: tuple[str, ...] | None = None
    """Only if one of these top-level fields of the value was changed, added or removed."""
    order: Order | None = None
    """Which events are handled one after the other: of the same `scope` or `key`, all of the `trigger`, or `none`."""
    concurrency: int | None = None
    """How many events may be handled at the same time; left out: 8."""
    durable: str | None = None
    """The name of its consumer in the store; left out: not durable, events are in memory only."""
    retry: RetryConfig | None = None
    """For durable triggers: when a failed delivery is tried again."""
    ack_wait: float | None = None
    """For durable triggers: seconds after which a delivery is tried again; left out: 30."""
    start: str | None = None
    """For durable triggers: where a new consumer begins, `now`, `earliest`, or a cursor."""
    on_giving_up: Literal["skip", "block"] | None = None
    """For durable triggers: what happens to the events after one that is given up; left out: `skip`."""
    max_dead: int | None = None
    """For durable triggers: how many dead letters are kept; left out: 100,000."""
    debounce: float | None = None
    """Seconds for which a key must not change before its newest event is delivered."""
    debounce_max: float | None = None
    """Seconds after which that event is delivered in any case; left out: ten times `debounce`."""
    batch: int | None = None
    """Deliver lists of at most this many events."""
    batch_wait: float | None = None
    """Seconds for which the first event of a list waits for more; left out: 0.2."""
    metadata: dict[str, Any] | None = None
    """A JSON object that the handler finds in `event.metadata`."""


def options_of(trigger: TriggerConfig) -> dict[str, object]:
    """Return the options of an entry as `ops.triggers.read_options` takes them."""
    given: dict[str, object] = {name: getattr(trigger, name) for name in OPTIONS}
    if trigger.retry is not None:
        given["retry"] = msgspec.structs.asdict(trigger.retry)
    return given


EVERYTHING: Final = ("*",)
"""The pattern that matches every name."""
TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}")
"""The name of a token."""
EVERY_REGISTRATION: Final = ("*", "engine::*", "state::*")
"""The patterns of `registers` that match every id: `*` alone does not cover the engine's own."""


class TokenConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An entry of `auth.tokens`: where the token comes from, and what its bearer may do (docs/reference/rights.md).

    A string instead of the mapping is a token that may do everything (`full_token`). In a pattern `*` stands for any
    characters and `?` for one. If none of `functions`, `read` and `write` is given, these three are unlimited; if one
    of them is given, those that are left out allow nothing.
    """

    token: str | None = None
    """The token itself, better as `${VARIABLE}`. Give one of `token`, `env` and `file`."""
    env: str | None = None
    """The environment variable that holds it."""
    file: str | None = None
    """The file that holds it; surrounding white space is ignored."""
    functions: tuple[str, ...] | None = None
    """Ids of functions that it may call, directly or through a trigger."""
    registers: tuple[str, ...] = ()
    """Ids of the functions and trigger types that it may register; left out: none. Ids that begin with `engine::` or
    `state::` match only patterns that begin so too."""
    read: tuple[str, ...] | None = None
    """Scopes that it may read and watch."""
    write: tuple[str, ...] | None = None
    """Scopes that it may write. The answer to a write contains the old value."""
    name: str | None = None
    """The name under which its durable triggers keep their consumers: letters, digits, `-`, `_` and `.`. Left out: it
    can have no durable triggers, unless it may do everything. Tokens with the same name, such as the old and the new
    token of a service, share the consumers."""

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
    """The tokens to connect with, as `Authorization: Bearer TOKEN`; empty: every program may connect."""


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
    """0: a free port."""
    auth: AuthConfig = AuthConfig()
    insecure: bool = False
    """True: allow other than loopback addresses without tokens."""
    tls: TlsConfig | None = None
    origins: tuple[str, ...] = ()
    """Web pages that may connect, as `https://host:port`, or "*". Browsers are refused on any other page."""
    call_timeout_ms: Milliseconds = 30_000
    """How long a worker may take to answer a call; then the caller gets `TIMEOUT`. 0 means no limit."""
    max_connections: Count = 10_000
    """Connections at a time; further ones are answered with HTTP 503."""
    max_message_bytes: Annotated[int, msgspec.Meta(ge=1024, le=1_073_741_824)] = 67_108_864
    """Largest message from a worker; a larger one closes its connection with code 1009."""
    max_unsent_bytes: Annotated[int, msgspec.Meta(ge=65_536, le=4_294_967_296)] = 67_108_864
    """Bytes that may wait for a worker that reads slowly; with more, its connection is closed with code 1008."""
    max_registrations: Count = 10_000
    """Functions, triggers and trigger types of one worker; with more, its connection is closed with code 1008."""
    max_calls: Count = 10_000
    """Calls in progress for each worker, as caller and as executor; further ones are answered `OVERLOADED`."""
    max_call_bytes: Annotated[int, msgspec.Meta(ge=1024, le=2**40)] = 268_435_456
    """Bytes that waiting calls of one worker may hold; above that, further calls are answered `OVERLOADED`.

    All workers together may hold four times as much.
    """
    max_waiting_events: Count = 50_000
    """Events that may wait for one trigger of a worker; with more, its connection is closed with code 1008."""
    max_waiting_bytes: Annotated[int, msgspec.Meta(ge=1024, le=2**40)] = 268_435_456
    """Bytes of events that may wait for all triggers of one worker; with more, its connection is closed with code
    1008."""


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A complete, checked configuration. Two are equal if an engine would run the same on both."""

    adapter: AdapterConfig = AdapterConfig("kv")
    functions: dict[str, FunctionRef] = {}
    """Function id -> function, in the order of the file."""
    triggers: tuple[TriggerConfig, ...] = ()
    scopes: tuple[ScopeRule, ...] = ()
    limits: LimitsConfig = LimitsConfig()
    server: ServerConfig | None = None
    """The `iii-worker-manager` entry; None: no server is configured."""
    source: str | None = None
    """Absolute path of the file, with symbolic links; None if the source was text or a mapping."""
