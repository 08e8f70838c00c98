"""The web console: an ASGI application that shows the state of an engine and, if allowed, changes it.

    app.mount("/state", console(engine, auth=basic_auth("admin", password)))

docs/how-to/console.md has the details. The command `scopestate console` serves it on its own.
"""

from __future__ import annotations

try:
    from scopestate.console.app import Console, console
    from scopestate.console.security import Auth, allow_everyone, basic_auth
except ImportError as error:
    if (error.name or "").startswith("scopestate"):
        raise
    raise ImportError(
        f"scopestate.console needs the extra `console` ({error}): pip install 'scopestate[console]'"
    ) from error

__all__ = ["Auth", "Console", "allow_everyone", "basic_auth", "console"]
