"""The exports of `scopestate`, apart from `AioEngine`. Loaded when a program first uses one of the names.

A new name goes here, and into `__all__` of the package and of this module.
"""

from __future__ import annotations

from scopestate import errors, ops
from scopestate.actors.consuming import ConsumerStatus, DeadLetter
from scopestate.config import Config
from scopestate.engine import Engine
from scopestate.errors import (
    Compacted,
    ConfigError,
    Conflict,
    EngineClosed,
    InvalidValue,
    Overloaded,
    ReplyTimeout,
    SchemaViolation,
    ScopestateError,
    StorageError,
    StoreLocked,
    UpdateRefused,
    WatchOverrun,
)
from scopestate.handles import AioScope, Scope
from scopestate.ops import MISSING, messages
from scopestate.ops.changes import Change
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.results import (
    BatchResult,
    CasResult,
    DeleteResult,
    DeliveryFailure,
    EntryView,
    ModifyResult,
    Page,
    SetResult,
    StateEvent,
    UpdateResult,
)
from scopestate.ops.writes import DELETE, KEEP
from scopestate.sharing import SharingStatus
from scopestate.stats import Health, Stats

__all__ = [
    "DELETE",
    "KEEP",
    "MISSING",
    "AioScope",
    "BatchResult",
    "CasResult",
    "Change",
    "Compacted",
    "Config",
    "ConfigError",
    "Conflict",
    "ConsumerStatus",
    "DeadLetter",
    "DeleteResult",
    "Delivery",
    "DeliveryFailure",
    "Discard",
    "Engine",
    "EngineClosed",
    "EntryView",
    "Health",
    "InvalidValue",
    "ModifyResult",
    "Overloaded",
    "Page",
    "ReplyTimeout",
    "Retry",
    "RetryLater",
    "SchemaViolation",
    "Scope",
    "ScopestateError",
    "SetResult",
    "SharingStatus",
    "StateEvent",
    "Stats",
    "StorageError",
    "StoreLocked",
    "UpdateRefused",
    "UpdateResult",
    "WatchOverrun",
    "errors",
    "messages",
    "ops",
]
