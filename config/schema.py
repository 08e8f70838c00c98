"""The shape of the configuration. Unknown keys and wrong types are errors; zero and defaults are said per field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

# The upper bounds keep a typing slip (or nanoseconds) away from timers and queues, which overflow far above them.
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=31_536_000_000)]
"""0 to one year."""
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


class KvConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`adapter: {name: kv, config: ...}`."""

    store_method: Literal["in_memory", "file_based"] = "in_memory"
    """`in_memory`: nothing is kept. `file_based`: kept in the directory `file_path`. A reload does not change it."""
    file_path: str = "kv_store_data.db"
    """The directory of a file_based store, despite the suffix that iii gives it. A reload does not change it."""
    save_interval_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)] = 5000
    """Milliseconds between saves; with `durability: interval` a crash loses at most this much. Reloads at once."""
    durability: Literal["interval", "commit"] = "interval"
    """`interval`: a write is acknowledged from memory. `commit`: when it is on disk. A reload does not change it."""


class AdapterConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`adapter:` of the `iii-state` worker."""

    name: Literal["kv"]
    config: KvConfig = KvConfig()


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`limits:`. Each applies from the next call or event after a reload."""

    max_value_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """Largest value accepted, in bytes of JSON; 0 means no limit."""
    scope_mailbox: Count = 10_000
    """Messages that may wait for one scope; one more is refused with `OVERLOADED`."""
    handler_mailbox: Count = 100_000
    """Events that may wait for one trigger's handler."""
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
    close_grace_ms: Milliseconds = 10_000
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
    source: str | None = None
    """Absolute path of the file, not resolved through symlinks; None if it came from text or a mapping."""
