"""Forking beside threads, on purpose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def beside_threads() -> Iterator[None]:
    """Silence what CPython 3.12 and later warn of: what a fork beside threads does is what these tests look at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        yield
