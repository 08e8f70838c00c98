"""How much a proof does: a part of it in every run of the suite, all of it with `SCOPESTATE_PROOF=full`.

`make reliability` and `make simulate` run the full sizes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

FULL: Final = os.environ.get("SCOPESTATE_PROOF") == "full"


def size(suite: int, full: int) -> int:
    """Return how many repetitions, seeds or examples a proof has now."""
    return full if FULL else suite


@contextmanager
def untraced() -> Iterator[None]:
    """Measure no coverage of this thread, and of threads that start within the block.

    Tracing takes two thirds of the time of a loop that repeats the same lines thousands of times, and finds nothing
    after the first round: each such proof has shorter tests beside it that are traced.
    """
    trace, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]  # it takes None, as `sys.settrace` does
    try:
        yield
    finally:
        threading.settrace(of_threads)  # type: ignore[arg-type]  # None if it was None
        sys.settrace(trace)
