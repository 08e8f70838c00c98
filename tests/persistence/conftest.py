"""Stores for the persistence tests: an adapter, opened and reopened, and what it must leave behind."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stored import forget_scopes

from scopestate.persistence import FileAdapter, Store
from scopestate.persistence.sqlite.database import connect


class Place:
    """A place that keeps scopes, and the one adapter open on it."""

    def __init__(self, make: Callable[[], Store]) -> None:
        self._make = make
        self.adapter = make()

    def reopen(self) -> Store:
        """Close the adapter and open the place again, as a restart of the process would."""
        self.adapter.close()
        self.adapter = self._make()
        return self.adapter


@pytest.fixture(autouse=True)
def _no_scopes() -> None:
    forget_scopes()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(params=["file"])
def store(request: pytest.FixtureRequest, directory: Path) -> Iterator[Place]:
    """One store per keeping adapter: a new adapter adds a line here, not tests."""
    places: dict[str, Callable[[], Store]] = {
        "file": lambda: FileAdapter(directory),
    }
    place = Place(places[request.param])
    yield place
    adapter = place.reopen()
    if isinstance(adapter, FileAdapter):
        assert adapter.check() == []
    adapter.close()


@pytest.fixture
def open_file(directory: Path) -> Iterator[Callable[..., FileAdapter]]:
    """Open file adapters on `directory`; each one is closed at the end."""
    opened: list[FileAdapter] = []

    def open_(place: Path = directory, **options: Any) -> FileAdapter:
        adapter = FileAdapter(place, **options)
        opened.append(adapter)
        return adapter

    yield open_
    for adapter in opened:
        adapter.close()


class Faults:
    """A layer under the adapter: counts statements, and fails those that the test names."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.fail: Callable[[str], BaseException | None] = lambda statement: None

    def connect(self, uri: str) -> sqlite3.Connection:
        faults = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                faults.statements.append(sql)
                if fault := faults.fail(sql):
                    raise fault
                return super().execute(sql, *parameters)

        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, factory=Connection)

    def fail_at(self, number: int, fault: BaseException) -> None:
        """Let the statement with this number, counted from now, fail."""
        self.statements.clear()
        self.fail = lambda statement: fault if len(self.statements) == number else None

    def heal(self) -> None:
        self.fail = lambda statement: None


def sqlite_fault(code: int, text: str, kind: type[sqlite3.Error] = sqlite3.OperationalError) -> sqlite3.Error:
    error = kind(text)
    error.sqlite_errorcode = code
    return error


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def io_error() -> sqlite3.Error:
    return sqlite_fault(sqlite3.SQLITE_IOERR | (3 << 8), "disk I/O error")


@pytest.fixture
def run_child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a real process that runs `code`; it can import scopestate as this one does."""
    children: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture
def sqlite_tool() -> Callable[[Path], sqlite3.Connection]:
    """Somebody else's look at the database, as with the sqlite3 tool."""
    return lambda path: connect(f"file:{path}?mode=rw")
