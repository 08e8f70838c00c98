"""The bounds that keep memory and waiting finite; one object per engine, changed in place by a reload."""

from __future__ import annotations

import sys
from typing import Literal

import msgspec


class Limits(msgspec.Struct):
    """Read without locks by whoever needs one; the meaning of each is in `config.LimitsConfig`."""

    max_value_bytes: int = 0
    """0: none. Never more than the store can hold."""
    longest_name: int = sys.maxsize
    """Characters of a scope or key that the store can hold."""
    """0: no limit."""
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
    """None: wait for ever."""
    close_grace_s: float = 5.0
    passivate_after_s: float = 300.0
    """0: never."""
