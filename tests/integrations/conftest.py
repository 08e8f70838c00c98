"""Web servers for the tests, and nothing may be left of the engines that they open here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftovers import no_leftovers

sys.path.insert(0, str(Path(__file__).parent))  # for `import web_servers`

collect_ignore = ["vendor"]  # tests of other projects, which run in processes of their own


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail if an engine, or a thread of an engine, outlives its test."""
    with no_leftovers():
        yield
