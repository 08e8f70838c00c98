"""`scopestate` and `python -m scopestate`: the command line, or what to install for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def main() -> None:
    """Run the command line; without its libraries, say what to install (exit code 1)."""
    try:
        run = _command_line()
    except ImportError as error:
        if (error.name or "").startswith("scopestate"):
            raise
        sys.exit(f"the command line needs the extra `cli` ({error}): pip install 'scopestate[cli]'")
    run()


def _command_line() -> Callable[[], None]:
    """Return what runs the command line. Its libraries are an extra; `serve` needs the fewest of them."""
    if sys.argv[1:2] == ["serve"]:
        from scopestate.cli import serve_line  # noqa: PLC0415 - see above

        arguments = serve_line.read(sys.argv[1:], os.environ)
        if arguments is not None:
            return lambda: serve_line.serve(arguments)
    from scopestate.cli.app import main as run  # noqa: PLC0415 - see above

    return run


if __name__ == "__main__":
    main()
