"""Engines for the load tests."""

from __future__ import annotations

from load.engines import nothing_left, open_engine

__all__ = ["nothing_left", "open_engine"]
