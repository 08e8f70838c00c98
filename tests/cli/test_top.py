"""`top`: figures of an engine, live. Driven by Textual's pilot, and once in a real terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import PATIENCE_S, Run, in_terminal
from textual.pilot import Pilot
from textual.widgets import DataTable, Static, TabbedContent

from scopestate import Engine
from scopestate.cli.top_figures import Rates, Reading, calls_per_s, summary
from scopestate.cli.top_screen import HelpScreen, TopScreen
from scopestate.cli.top_sources import EngineSource, RedisSource, Source, StoreSource
from scopestate.cli.top_work import _show, source_of
from scopestate.config import from_mapping
from scopestate.errors import ConfigError
from scopestate.server.server import Server
from scopestate.wire.address import Address

sys.path.insert(0, str(Path(__file__).parents[1] / "redis"))

from servers import Server as RedisServer


def on_disk(folder: Path) -> dict[str, Any]:
    kv = {"store_method": "file_based", "file_path": str(folder), "save_interval_ms": 20}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}


async def until(true: Callable[[], bool], pilot: Pilot[Any]) -> None:
    """Let the view go on until something holds."""
    ends = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < ends, screen_text(pilot)
        await pilot.pause(0.01)


def screen_text(pilot: Pilot[Any]) -> str:
    view = pilot.app.screen_stack[0]
    return "\n".join(str(view.query_one(name, Static).content) for name in ("#place", "#trouble", "#figures"))


def table(pilot: Pilot[Any], name: str) -> list[list[str]]:
    found: DataTable[Any] = pilot.app.screen_stack[0].query_one(f"#table-{name}", DataTable)
    return [[str(cell) for cell in found.get_row_at(row)] for row in range(found.row_count)]


def drive(source: Source, use: Callable[[Pilot[Any], TopScreen], Any], *, interval_s: float = 0.05) -> TopScreen:
    """Run the view without a terminal, and have `use` drive it."""

    async def main() -> TopScreen:
        app = TopScreen(source, interval_s)
        async with app.run_test(size=(100, 30)) as pilot:
            await use(pilot, app)
        return app

    return asyncio.run(main())


def test_it_shows_health_calls_and_scopes(server: Server, engine: Engine) -> None:
    engine.set("users", "\x1b[31m", 1)
    engine.set("", "k", "v")

    async def use(pilot: Pilot[Any], app: TopScreen) -> None:
        await until(lambda: app.readings >= 2, pilot)
        assert f"{server.url} | healthy" in screen_text(pilot)
        assert "2 scopes | 2 keys" in screen_text(pilot)
        assert [row[:2] for row in table(pilot, "scopes")] == [["users", "1"], ["(empty name)", "1"]]
        assert ["state::set", "0", "2"] in table(pilot, "calls")
        engine.set("users", "two", 2)
        await until(lambda: ["users", "2"] in [row[:2] for row in table(pilot, "scopes")], pilot)

    drive(EngineSource(source_address(server)), use)


def source_address(server: Server) -> Address:
    return Address(server.url)


def test_the_keyboard_sorts_pauses_and_shows_the_tables(server: Server, engine: Engine) -> None:
    engine.set("small", "k", "x" * 100)
    engine.set("large", "k", 1)
    engine.set("large", "l", 1)

    async def use(pilot: Pilot[Any], app: TopScreen) -> None:
        await until(lambda: app.readings >= 1, pilot)
        assert [row[0] for row in table(pilot, "scopes")] == ["large", "small"]
        await pilot.press("s")  # by size
        await until(lambda: [row[0] for row in table(pilot, "scopes")] == ["small", "large"], pilot)
        await pilot.press("3")
        assert app.query_one(TabbedContent).active == "consumers"
        await pilot.press("question_mark")
        assert isinstance(app.screen, HelpScreen)
        before = app.readings
        await until(lambda: app.readings > before, pilot)  # behind the help too
        await pilot.press("escape")
        assert not isinstance(app.screen, HelpScreen)
        await pilot.press("minus")
        assert app.interval_s == 0.25  # the least
        await pilot.press("minus", "plus", "plus", "plus")
        assert app.interval_s == 0.25
        await pilot.press("p")
        assert app.paused
        assert "press p to continue" in screen_text(pilot)
        await pilot.press("space")
        before = app.readings
        await until(lambda: app.readings > before, pilot)
        await pilot.press("q")

    assert drive(EngineSource(source_address(server)), use).return_code == 0


def test_an_engine_that_goes_away_is_waited_for(engine: Engine) -> None:
    server = Server(engine, port=0).start()

    async def use(pilot: Pilot[Any], app: TopScreen) -> None:
        await until(lambda: app.readings >= 1, pilot)
        port = server.port
        await asyncio.to_thread(server.stop)
        await until(lambda: "Trying again" in app.trouble, pilot)
        assert " old" in app.trouble or await shows_the_age(pilot, app)
        with await asyncio.to_thread(Server(engine, port=port).start):
            before = app.readings
            await until(lambda: app.readings > before and not app.trouble, pilot)

    drive(EngineSource(source_address(server)), use)


async def shows_the_age(pilot: Pilot[Any], app: TopScreen) -> bool:
    await until(lambda: " old" in app.trouble, pilot)
    return True


def test_a_directory_is_read_through_its_owner_and_from_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    config = from_mapping(on_disk(folder))
    with Engine(config) as engine:
        engine.set("users", "ada", 1)

    async def use(pilot: Pilot[Any], app: TopScreen) -> None:
        await until(lambda: app.readings >= 1, pilot)
        assert "no engine has it open: this is what is on disk" in screen_text(pilot)
        assert [row[:3] for row in table(pilot, "scopes")] == [["users", "1", "1 byte"]]
        owner = await asyncio.to_thread(Engine, config)
        try:
            owner.set("users", "bob", 2)
            await until(lambda: "| owner | healthy" in screen_text(pilot), pilot)
            await until(lambda: ["users", "2"] in [row[:2] for row in table(pilot, "scopes")], pilot)
        finally:
            await asyncio.to_thread(owner.close)
        await until(lambda: "on disk" in screen_text(pilot), pilot)

    drive(StoreSource(str(folder)), use)


def test_a_directory_without_a_store_is_said_until_there_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "state"

    async def use(pilot: Pilot[Any], app: TopScreen) -> None:
        await until(lambda: "there is no store in" in app.trouble, pilot)
        with await asyncio.to_thread(Engine, from_mapping(on_disk(folder))):
            await until(lambda: app.readings >= 1 and not app.trouble, pilot)

    drive(StoreSource(str(folder)), use)


def test_a_killed_owner_leaves_what_is_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, json.dumps(on_disk(folder))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"

        async def use(pilot: Pilot[Any], app: TopScreen) -> None:
            await until(lambda: "| owner |" in screen_text(pilot), pilot)
            owner.kill()
            await until(lambda: "no engine answers at its socket" in screen_text(pilot), pilot)

        drive(StoreSource(str(folder)), use)
    finally:
        owner.kill()
        owner.communicate()


OWNER = """
import json, sys, time
from scopestate import Engine
with Engine.from_config(json.loads(sys.argv[1])) as engine:
    engine.set("users", "ada", 1, durable=True)
    print("open", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def test_redis_is_read_by_itself(redis: RedisServer) -> None:
    url = f"redis://localhost:{redis.port}"
    adapter = {"name": "redis", "config": {"redis_url": url}}
    config = from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]})
    with Engine(config) as writer:
        writer.set("users", "ada", 1)
        source = source_of(url, None, None)
        assert isinstance(source, RedisSource)

        async def use(pilot: Pilot[Any], app: TopScreen) -> None:
            await until(lambda: app.readings >= 1, pilot)
            assert table(pilot, "scopes")[0][:2] == ["users", "1"]
            writer.set("users", "bob", 1)
            await until(lambda: ["users", "2"] in [row[:2] for row in table(pilot, "scopes")], pilot)
            await asyncio.to_thread(redis.stop)
            await until(lambda: "no connection to Redis" in screen_text(pilot), pilot)
            await asyncio.to_thread(redis.start)
            writer.set("back", "k", 1)
            await until(lambda: "healthy" in screen_text(pilot) and bool(table(pilot, "scopes")), pilot)

        drive(source, use)


def test_consumers_and_workers_have_their_tables(server: Server, tmp_path: Path) -> None:
    with Engine(from_mapping(on_disk(tmp_path / "state"))) as engine, Server(engine, port=0) as other:
        engine.on_change(scope="orders", durable="ship")(lambda event: None)
        engine.consumers().pause("ship", "stock")
        engine.set("orders", "1", 1, durable=True)

        async def use(pilot: Pilot[Any], app: TopScreen) -> None:
            await until(lambda: bool(table(pilot, "consumers")) and table(pilot, "consumers")[0][1] == "1", pilot)
            assert table(pilot, "consumers")[0][-1] == "paused stock"
            bridge = {"name": "bridge", "config": {"bridge_url": other.url}}
            options = {"workers": [{"name": "iii-state", "config": {"adapter": bridge}}]}
            with await asyncio.to_thread(Engine.from_config, options) as bridged:
                await asyncio.to_thread(bridged.get, "orders", "1")
                await until(lambda: bool(table(pilot, "workers")), pilot)
                assert table(pilot, "workers")[0][3].startswith("python")

        drive(EngineSource(source_address(other)), use)


def test_an_engine_without_these_figures_is_named(server: Server, engine: Engine) -> None:
    engine._functions.discard("engine::metrics", engine._functions.find("engine::metrics").target)  # type: ignore[union-attr]
    server._hub._engine_functions.by_id.pop("engine::metrics")  # type: ignore[union-attr]

    async def use(pilot: Pilot[Any], app: TopScreen) -> None:
        await until(lambda: "has no function engine::metrics: it is iii, or an older" in app.trouble, pilot)

    drive(EngineSource(source_address(server)), use)


# ------------------------------------------------------------------------------------------------------- the command


def test_in_a_pipe_one_object_is_printed(cli: Run, server: Server, engine: Engine) -> None:
    engine.set("users", "ada", 1)

    told = cli("top", "--interval", "0.1").json

    assert (told["place"], told["ok"], told["scope_count"]) == (server.url, True, 1)
    assert told["calls"]["state::set"] == 1
    assert told["per_second"]["state::set"] == 0.0


def test_once_in_a_terminal_prints_text(server: Server, engine: Engine) -> None:
    engine.set("users", "ada", 1)

    text = in_terminal("top", server.url, "--once", "--interval", "0.1", TERM="dumb")

    assert f"{server.url} | healthy" in text
    assert "  users: 1 keys" in text


@pytest.mark.parametrize(
    ("where", "code"), [("ws://127.0.0.1:9", 5), ("nowhere", 4), ("http://x", 4), ("memory.yaml", 3)]
)
def test_a_place_that_is_not_there_is_an_error_in_a_pipe(
    where: str, code: int, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory.yaml").write_text("workers: []\n")

    result = cli("top", where, "--once")

    assert result.code == code, result.err
    assert result.err.startswith("scopestate: error: ")


def test_a_configuration_file_names_the_place(tmp_path: Path) -> None:
    def place(adapter: str) -> Source:
        file = tmp_path / "engine.yaml"
        file.write_text(f"workers: [{{name: iii-state, config: {{adapter: {adapter}}}}}]\n")
        return source_of(str(file), None, None)

    disk = place(f"{{name: kv, config: {{store_method: file_based, file_path: {tmp_path}/s}}}}")
    redis = place("{name: redis, config: {redis_url: 'redis://:secret@localhost:1'}}")
    far = place("{name: bridge, config: {bridge_url: 'ws://far:1'}}")

    assert (type(disk), disk.place) == (StoreSource, f"{tmp_path}/s")
    assert isinstance(redis, RedisSource)
    assert "secret" not in redis.place
    assert (type(far), far.place) == (EngineSource, "ws://far:1")
    with pytest.raises(ConfigError):
        source_of("ws://", None, None)


def test_without_its_library_the_extra_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scopestate.cli.top_screen", raising=False)
    monkeypatch.setitem(sys.modules, "textual.app", None)

    with pytest.raises(typer.BadParameter, match=r"pip install 'scopestate\[tui\]'"):
        _show(EngineSource(source_address(server)), 1.0)


@pytest.mark.parametrize("ends", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_view_and_leaves_the_terminal_as_it_was(ends: str, server: Server) -> None:
    master, slave = pty.openpty()
    view = subprocess.Popen(
        [sys.executable, "-m", "scopestate", "top", server.url],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    told = b""
    while b"healthy" not in told:
        told += os.read(master, 65536)
    view.send_signal(getattr(signal, ends))
    with pytest.raises(OSError, match="Input/output"):
        while True:
            told += os.read(master, 65536)
    os.close(master)

    assert view.wait(PATIENCE_S) == 130
    assert b"\x1b[?1049l" in told  # back from the alternate screen


# --------------------------------------------------------------------------------------------------------- the figures


def test_rates_begin_with_the_second_reading_and_survive_a_new_engine() -> None:
    rates = Rates()
    first = Reading(at_s=1.0, place="p", calls={"get": 10}, totals={"saves": 4})
    assert rates.of(first) == {}
    second = Reading(at_s=3.0, place="p", calls={"get": 30, "set": 2}, totals={"saves": 4})
    assert rates.of(second) == {"get": 10.0, "set": 1.0, "saves": 0.0}
    restarted = Reading(at_s=4.0, place="p", calls={"get": 5}, totals={"saves": 0})
    found = rates.of(restarted)
    assert found == {"get": 5.0, "saves": 0.0}
    assert calls_per_s(restarted, found) == 5.0
    assert rates.of(Reading(at_s=5.0, place="elsewhere")) == {}


def test_the_summary_says_problems_first() -> None:
    reading = Reading(
        at_s=1.0,
        place="p",
        ok=False,
        problems=("not saved: disk full",),
        role="owner",
        totals=dict.fromkeys(("events", "deliveries", "retries"), 0) | {"failures": 2, "saves": 1},
        now={"keys": 1234, "waiting": 3, "last_save_ms": 2.5, "unsaved_scopes": 1},
        scope_count=1,
        workers=({},),
    )

    where, figures = summary(reading, {})

    assert where == "p | owner | not saved: disk full"
    assert "2 failures" in figures
    assert "1 save, the last took 2 ms, 1 scope to save" in figures
    assert "1 scope | 1,234 keys | 1 worker | 3 messages waiting" in figures


def test_a_source_is_closed_twice_without_harm(server: Server) -> None:
    async def main() -> None:
        source = EngineSource(source_address(server))
        await source.read()
        await source.close()
        await source.close()
        gone = StoreSource("/nowhere/at/all")
        await gone.close()

    asyncio.run(main())
