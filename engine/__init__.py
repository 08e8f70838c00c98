"""scopestate: scoped key-value state, owned by actors, with reactive triggers."""

from scopestate import ops
from scopestate.engine import Engine
from scopestate.errors import ScopestateError, StorageError
from scopestate.ops import messages
from scopestate.ops.results import DeliveryFailure, SetResult, StateEvent, UpdateResult

__all__ = [
    "DeliveryFailure",
    "Engine",
    "ScopestateError",
    "SetResult",
    "StateEvent",
    "StorageError",
    "UpdateResult",
    "messages",
    "ops",
]
