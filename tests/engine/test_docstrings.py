"""The examples in docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    f"scopestate.{file.stem}" for file in sorted((ROOT / "engine").glob("*.py")) if ">>> " in file.read_text("utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run_as_they_stand(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name))

    assert done.attempted > 3
    assert done.failed == 0


def test_the_classes_that_programs_get_have_examples() -> None:
    assert {"scopestate.batch", "scopestate.mapping", "scopestate.handles", "scopestate.state"} <= set(MODULES)
