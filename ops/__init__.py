"""Update ops: changes of a value that apply in one atomic step. Pure functions, no I/O, no actors."""

from __future__ import annotations

from scopestate.ops.apply import MISSING, apply
from scopestate.ops.update_ops import (
    Append,
    Decrement,
    Increment,
    Merge,
    OpError,
    RefusedOp,
    Remove,
    Set,
    UpdateOp,
    checked,
    convert_ops,
)

__all__ = [
    "MISSING",
    "Append",
    "Decrement",
    "Increment",
    "Merge",
    "OpError",
    "RefusedOp",
    "Remove",
    "Set",
    "UpdateOp",
    "apply",
    "checked",
    "convert_ops",
]
