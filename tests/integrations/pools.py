"""What workers of `multiprocessing` run: in a module that they can import."""

from __future__ import annotations

import os
from pathlib import Path

from web_servers import file_config

from scopestate import Engine, ops

engine: Engine | None = None


def open_engine(folder: str) -> None:
    """The initializer of each worker."""
    global engine  # noqa: PLW0603 - a worker has one engine
    engine = Engine.from_config(file_config(Path(folder)))


def count(number: int) -> int:
    """Add one; return the process."""
    assert engine is not None
    engine.update("hits", "all", [ops.Increment("", 1)])
    return os.getpid()
