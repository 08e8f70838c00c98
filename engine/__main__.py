"""`scopestate` and `python -m scopestate`: the command line, or what to install for it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without its libraries, say what to install (exit code 1)."""
    try:
        from scopestate.cli.app import main as run  # noqa: PLC0415 - its libraries are an extra
    except ImportError as error:
        if (error.name or "").startswith("scopestate"):
            raise
        sys.exit(f"the command line needs the extra `cli` ({error}): pip install 'scopestate[cli]'")
    run()


if __name__ == "__main__":
    main()
