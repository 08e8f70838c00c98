"""Functions of a configuration that are in the current folder."""

from __future__ import annotations

import os
import sys


def import_from_here() -> None:
    """Let `functions:` name modules in the current folder, as with `python -m`."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
