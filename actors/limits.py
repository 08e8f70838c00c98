"""The limits of an engine's memory and waits: one object for each engine, which a reload changes."""

from __future__ import annotations

import sys
from typing import Literal

import msgspec


class Limits(msgspec.Struct):
    """The current limits, read without locks. `config.LimitsConfig` says what each means."""

    max_value_bytes: int = 0
    """0: none. At most what the store can hold."""
    longest_name: int = sys.maxsize
    """Characters of the longest scope or key that the store can hold."""
    scope_mailbox: int = 10_000
    scope_mailbox_bytes: int = 1 << 26
    """0: no limit."""
    handler_mailbox: int = 100_000
    handler_mailbox_bytes: int = 1 << 26
    """0: no limit."""
    events_bytes: int = 1 << 28
    """0: no limit."""
    handler_when_full: Literal["block", "drop_oldest", "reject"] = "block"
    handler_timeout_s: float = 0.0
    """0: no limit."""
    handler_attempts: int = 1
    handler_backoff_s: float = 0.1
    max_event_depth: int = 1000
    call_timeout_s: float | None = 30.0
    """None: no limit."""
    close_grace_s: float = 5.0
    passivate_after_s: float = 300.0
    """0: never."""
