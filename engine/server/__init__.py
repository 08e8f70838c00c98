"""Serving an engine to workers in other processes, over iii's WebSocket protocol."""

from scopestate.server.server import Server, new_loop

__all__ = ["Server", "new_loop"]
