"""Where scopes are kept: in a directory of files, in Redis, or in another engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scopestate.actors.ports import Answer, Backend, Row, ScopeChange, ScopeState, Store

if TYPE_CHECKING:
    from scopestate.persistence.sqlite.adapter import FileAdapter

__all__ = ["Answer", "Backend", "FileAdapter", "Row", "ScopeChange", "ScopeState", "Store"]


def __getattr__(name: str) -> Any:
    # SQLite takes 12 ms to import, which an engine in memory need not spend.
    if name == "FileAdapter":
        from scopestate.persistence.sqlite.adapter import FileAdapter  # noqa: PLC0415 - as said

        return FileAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
