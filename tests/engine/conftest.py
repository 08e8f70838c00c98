"""Engines for the tests: opened in one line, closed at the end, and nothing may be left of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers

sys.path.insert(0, str(Path(__file__).parent))  # for `import watching`, as tests/conftest.py does for its own folder

from watching import LoopThread

from scopestate import Engine

OpenEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail if an engine or one of its threads outlives its test."""
    with no_leftovers():
        yield


@pytest.fixture
def open_engine(nothing_left_behind: None) -> Iterator[OpenEngine]:
    """Open engines: `open_engine(limits={...}, adapter={...}, scopes=[...])` as in a YAML file; closed at the end."""
    opened: list[Engine] = []

    def open_(*, store: Any = None, on_error: Any = None, on_dead_letter: Any = None, **sections: Any) -> Engine:
        adapter_config = sections.pop("adapter", None)
        if adapter_config is not None:
            worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": adapter_config}}}
            sections["workers"] = [worker]
        if store is None:
            engine = Engine.from_config(sections, on_error=on_error, on_dead_letter=on_dead_letter)
        else:
            engine = Engine(config(sections), adapter=store, on_error=on_error, on_dead_letter=on_dead_letter)
        opened.append(engine)
        return engine

    yield open_
    for engine in reversed(opened):
        engine.close()


def config(sections: dict[str, Any]) -> Any:
    from scopestate.config import from_mapping

    return from_mapping(sections)


@pytest.fixture
def engine(open_engine: OpenEngine) -> Engine:
    """An engine in memory."""
    return open_engine()


STORES: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    "memory": lambda _: None,
    "interval": lambda folder: {"store_method": "file_based", "file_path": str(folder / "store")},
    "commit": lambda folder: {"store_method": "file_based", "file_path": str(folder / "store"), "durability": "commit"},
}


def opener(kind: str, open_engine: OpenEngine, folder: Path) -> OpenEngine:
    def open_(**sections: Any) -> Engine:
        return open_engine(adapter=STORES[kind](folder), **sections)

    open_.kind = kind  # type: ignore[attr-defined]
    return open_


@pytest.fixture(params=list(STORES))
def open_store(request: pytest.FixtureRequest, open_engine: OpenEngine, tmp_path: Path) -> OpenEngine:
    """Open engines on one store of each kind; on disk, the second one finds what the first one left."""
    return opener(request.param, open_engine, tmp_path)


@pytest.fixture(params=["interval", "commit"])
def open_file_store(request: pytest.FixtureRequest, open_engine: OpenEngine, tmp_path: Path) -> OpenEngine:
    """As `open_store`, for the kinds that keep something."""
    return opener(request.param, open_engine, tmp_path)


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    """An event loop on a thread of its own."""
    thread = LoopThread()
    yield thread
    thread.stop()
