"""The messages of the six functions.

One definition serves the actor-message API (`engine.ask(messages.Set(...))`), `engine.call`, the wire, and the
schemas that `engine.functions()` returns; `ops/functions.py` reads them from JSON. Source: the API reference, and
docs/semantics.md 2 for what is refused.
"""

from __future__ import annotations

from typing import Any

import msgspec

from scopestate.ops import UpdateOp


class Set(msgspec.Struct, frozen=True):
    """Set a value in state."""

    scope: str
    key: str
    value: Any
    """Any JSON value, None included."""


class Get(msgspec.Struct, frozen=True):
    """Get a value from state."""

    scope: str
    key: str


class Delete(msgspec.Struct, frozen=True):
    """Delete a value from state."""

    scope: str
    key: str


class Update(msgspec.Struct, frozen=True):
    """Update a value in state."""

    scope: str
    key: str
    ops: tuple[UpdateOp, ...]
    """Applied in order to one working copy, then written once (docs/semantics.md, section 3)."""


class List(msgspec.Struct, frozen=True):
    """Get a group from state."""

    scope: str


class ListGroups(msgspec.Struct, frozen=True):
    """List all state groups."""


Message = Set | Get | Delete | Update | List | ListGroups
