"""scopestate: scoped key-value state, owned by actors, with reactive triggers."""

from scopestate import ops
from scopestate.actors import messages
from scopestate.actors.handler import DeliveryFailure
from scopestate.actors.results import SetResult, StateEvent, UpdateResult
from scopestate.engine import Engine
from scopestate.errors import ScopestateError, StorageError

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
