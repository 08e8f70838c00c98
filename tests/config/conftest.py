"""Shared by the config tests: a folder for throw-away modules, and files written in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write a module that can be imported during the test: `module("shop.handlers", "def f(e): ...")`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)

    def write(name: str, source: str) -> None:
        *packages, last = name.split(".")
        home = folder
        for package in packages:
            home = home / package
            home.mkdir(exist_ok=True)
            (home / "__init__.py").touch()
        (home / f"{last}.py").write_text(source)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Write `engine.yaml` and return its path."""

    def put(text: str) -> Path:
        path = tmp_path / "engine.yaml"
        path.write_text(text)
        return path

    return put
