"""scopestate: scoped key-value state, owned by actors, with reactive triggers.

>>> from scopestate import Engine
>>> with Engine() as engine:  # in memory; in files, Redis or another engine: Engine.from_config("engine.yaml")
...     engine.set("users", "ada", {"name": "Ada"})
...     engine.get("users", "ada")
SetResult(old_value=None, new_value={'name': 'Ada'}, revision=1)
{'name': 'Ada'}

`help(Engine)` has the calls, `help(scopestate.errors)` all errors, docs/ the rest.
"""

from scopestate import ops
from scopestate.actors.consuming import ConsumerStatus, DeadLetter
from scopestate.engine import Engine
from scopestate.errors import Compacted, Conflict, SchemaViolation, ScopestateError, StorageError, WatchOverrun
from scopestate.ops import MISSING, messages
from scopestate.ops.changes import Change
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.results import (
    BatchResult,
    CasResult,
    DeliveryFailure,
    EntryView,
    ModifyResult,
    Page,
    SetResult,
    StateEvent,
    UpdateResult,
)
from scopestate.ops.writes import DELETE, KEEP

__all__ = [
    "DELETE",
    "KEEP",
    "MISSING",
    "BatchResult",
    "CasResult",
    "Change",
    "Compacted",
    "Conflict",
    "ConsumerStatus",
    "DeadLetter",
    "Delivery",
    "DeliveryFailure",
    "Discard",
    "Engine",
    "EntryView",
    "ModifyResult",
    "Page",
    "Retry",
    "RetryLater",
    "SchemaViolation",
    "ScopestateError",
    "SetResult",
    "StateEvent",
    "StorageError",
    "UpdateResult",
    "WatchOverrun",
    "messages",
    "ops",
]
