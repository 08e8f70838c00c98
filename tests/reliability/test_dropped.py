"""Engines that are dropped, not closed: saved and released all the same, with a ResourceWarning."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_leftovers
from reliability.living import PATIENCE_S, InThread, saved, settings, until

from scopestate import Engine, StateEvent, lifecycle
from scopestate.server.server import Server

pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")
ONE_HOUR_MS = 3_600_000


@pytest.fixture(autouse=True)
def all_of_it_is_gone() -> Iterator[None]:
    with no_leftovers():
        yield
        assert lifecycle.wait_for_dropped() in (True, False)
    assert not lifecycle._dropped
    assert not lifecycle._stores


def opened(directory: Path, **limits: int) -> Engine:
    return Engine.from_config(settings("interval", directory, save_interval_ms=ONE_HOUR_MS, limits=limits))


def until_collected(ref: weakref.ref[Any]) -> None:
    def is_gone() -> bool:
        gc.collect()
        return ref() is None

    until(is_gone, "something keeps the engine")


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_an_engine_that_is_dropped_is_saved_and_its_store_can_be_opened_at_once(
    tmp_path: Path, durability: str
) -> None:
    config = settings(durability, tmp_path / "store", save_interval_ms=ONE_HOUR_MS)
    engine = Engine.from_config(config)
    engine.set("s", "k", 1)

    dropping = [engine]
    del engine
    with pytest.warns(ResourceWarning, match=r"dropped without close\(\)"):
        until_collected(weakref.ref(dropping.pop()))
    again = Engine.from_config(config)

    assert again.get("s", "k") == 1
    again.close()


def test_an_engine_that_was_closed_is_dropped_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    engine = opened(tmp_path / "store")
    engine.close()
    del engine
    gc.collect()

    assert [str(warning.message) for warning in recwarn] == []


def test_it_is_collected_with_handlers_functions_and_views_that_refer_to_it(tmp_path: Path) -> None:
    """Whatever the program registers may refer to the engine: all of it is one cycle."""

    def use() -> weakref.ref[Engine]:
        engine = opened(tmp_path / "store")
        engine.on_change(scope="s")(lambda event: engine.set("derived", event.key, event.new_value))
        engine.on_change(scope="s", durable="x")(lambda event: engine.get("s", event.key))
        engine.register_function("app::f", lambda payload: engine.get("s", "k"))
        engine.on_dead_letter(lambda failure: engine.get("s", "k"))
        views = [engine.aio, engine.scope("s"), engine.aio.scope("s"), engine.watch(), engine.scope("s").watch()]
        engine.own = views  # type: ignore[attr-defined]
        engine.set("s", "k", 1)
        engine.drain(PATIENCE_S)
        return weakref.ref(engine)

    with pytest.warns(ResourceWarning):
        until_collected(use())
    lifecycle.wait_for_dropped()

    assert saved(tmp_path / "store", "s")[1] == {"k": b"1"}
    assert saved(tmp_path / "store", "derived")[1] == {"k": b"1"}


def test_a_handler_under_way_keeps_it_until_it_has_ended(tmp_path: Path) -> None:
    begun, over = threading.Event(), threading.Event()

    def use() -> weakref.ref[Engine]:
        engine = opened(tmp_path / "store")

        @engine.on_change(scope="s")
        def derive(event: StateEvent) -> None:
            begun.set()
            over.wait(PATIENCE_S)
            engine.set("derived", event.key, event.new_value)

        engine.set("s", "k", 1)
        return weakref.ref(engine)

    ref = use()
    assert begun.wait(PATIENCE_S)
    gc.collect()
    assert ref() is not None
    over.set()
    with pytest.warns(ResourceWarning):
        until_collected(ref)
    lifecycle.wait_for_dropped()

    assert saved(tmp_path / "store", "derived")[1] == {"k": b"1"}


def test_a_scope_handle_keeps_its_engine(tmp_path: Path) -> None:
    scope = opened(tmp_path / "store").scope("s")
    gc.collect()

    scope.set("k", 1)

    scope._engine.close()
    assert saved(tmp_path / "store", "s")[1] == {"k": b"1"}


def test_an_engine_in_memory_leaves_no_thread(tmp_path: Path) -> None:
    def use() -> weakref.ref[Engine]:
        engine = Engine()
        engine.on_change()(lambda event: None)
        engine.set("s", "k", 1)
        engine.drain(PATIENCE_S)
        return weakref.ref(engine)

    with pytest.warns(ResourceWarning):
        until_collected(use())


def test_a_watched_configuration_file_does_not_keep_it(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("workers: [{name: iii-state, config: {}}]")

    def use() -> weakref.ref[Engine]:
        return weakref.ref(Engine.from_config(file))

    with pytest.warns(ResourceWarning):
        until_collected(use())


def test_a_server_that_was_never_started_does_not_keep_it(tmp_path: Path) -> None:
    def use() -> weakref.ref[Engine]:
        server = Server(opened(tmp_path / "store"), port=0, owns_engine=True)
        server.engine.set("s", "k", 1)
        return weakref.ref(server.engine)

    with pytest.warns(ResourceWarning):
        until_collected(use())
    lifecycle.wait_for_dropped()

    assert saved(tmp_path / "store", "s")[1] == {"k": b"1"}


def test_an_engine_dropped_on_an_event_loop_does_not_block_it(tmp_path: Path) -> None:
    async def main() -> None:
        engine = opened(tmp_path / "store")
        await engine.aio.set("s", "k", 1)
        ref = weakref.ref(engine)
        del engine
        async with asyncio.timeout(PATIENCE_S):
            while ref() is not None:  # the thread that has loaded the scope may not be done with it
                gc.collect()
                await asyncio.sleep(0)

    with pytest.warns(ResourceWarning):
        asyncio.run(main())
    InThread(lifecycle.wait_for_dropped).result()

    assert saved(tmp_path / "store", "s")[1] == {"k": b"1"}


PROGRAM = """
import gc, sys
from reliability.living import settings
from scopestate import Engine
engine = Engine.from_config(settings("interval", sys.argv[1], save_interval_ms=3_600_000))
engine.set("s", "k", 1)
engine.own = engine
del engine
gc.collect()
"""


def test_a_program_that_ends_right_behind_the_drop_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", f"import sys; sys.path[:0] = {sys.path!r}{PROGRAM}",
         str(tmp_path / "store")],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 0
    assert "ResourceWarning: an engine was dropped without close()" in done.stderr
    assert "Traceback" not in done.stderr
    assert saved(tmp_path / "store", "s")[1] == {"k": b"1"}
