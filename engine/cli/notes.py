"""What commands print beside their results."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from rich.console import Console

from scopestate.cli.terminal import let_go


class Notes(Console):
    """Standard error. Failing to write to it does not end a command: results go to standard output."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`, but errors of writing are ignored."""
        with suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Print nothing more, as the reader is gone."""
        self.quiet = True
        let_go(sys.stderr)
