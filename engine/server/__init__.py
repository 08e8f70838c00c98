"""Workers over the wire: the server, and what it does for each connection."""

from scopestate.server.server import Server

__all__ = ["Server"]
