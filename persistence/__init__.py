"""Where scopes are kept: the adapter contract, in memory, and in a directory of files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scopestate.actors.ports import Adapter, ScopeChange, ScopeState
from scopestate.persistence.memory import MemoryAdapter

if TYPE_CHECKING:
    from scopestate.persistence.sqlite.adapter import FileAdapter

__all__ = ["Adapter", "FileAdapter", "MemoryAdapter", "ScopeChange", "ScopeState"]


def __getattr__(name: str) -> Any:
    # SQLite takes 12 ms to import, which an engine in memory need not spend.
    if name == "FileAdapter":
        from scopestate.persistence.sqlite.adapter import FileAdapter  # noqa: PLC0415 - as said

        return FileAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
