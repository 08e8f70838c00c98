"""The lifespan of a web application: it opens the engine, sets it up, closes it, and knows of other workers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from web_servers import WebServer, file_config

from scopestate import Engine, ops
from scopestate.errors import ConfigError, EngineClosed
from scopestate.integrations import asgi
from scopestate.integrations._web_server import workers_of
from scopestate.integrations.asgi import lifespan, open_engine

APP = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from scopestate import ops
from scopestate.integrations.asgi import lifespan

async def count(request):
    found = await request.state.engine.aio.update("hits", "all", [ops.Increment("", 1)])
    return PlainTextResponse(str(found.new_value))

app = Starlette(routes=[Route("/", count)], lifespan=lifespan())
"""
WARNING = "each worker has a state of its own"


@pytest.fixture(autouse=True)
def not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_warned", False)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


@pytest.mark.asyncio
async def test_a_lifespan_opens_an_engine_sets_it_up_and_closes_it(tmp_path: Path) -> None:
    seen = []

    def set_up(engine: Engine) -> None:
        engine.on_change(scope="s")(lambda event: seen.append(event.key))

    running = lifespan(file_config(tmp_path), setup=set_up, name="state")
    async with running("the application") as state:
        engine = state["state"]
        await engine.aio.set("s", "k", 1)
    assert seen == ["k"]
    with pytest.raises(EngineClosed):
        engine.get("s", "k")
    async with running("the application") as again:
        assert again["state"].get("s", "k") == 1


@pytest.mark.asyncio
async def test_an_open_engine_is_set_up_and_not_closed() -> None:
    seen = []
    with Engine() as engine:
        async with lifespan(engine, setup=seen.append)("the application") as state:
            assert state == {"engine": engine}
        assert seen == [engine]
        assert not engine.closed
        with pytest.raises(TypeError, match="takes no options: watch"):
            await open_engine(engine, watch=False).__aenter__()


@pytest.mark.asyncio
async def test_an_engine_whose_setup_fails_is_closed(tmp_path: Path) -> None:
    opened = []

    async def fail(engine: Engine) -> None:
        opened.append(engine)
        raise LookupError("no such thing")

    with pytest.raises(LookupError):
        async with lifespan(file_config(tmp_path), setup=fail)(None):
            pass
    assert opened[0].closed
    async with open_engine(file_config(tmp_path)) as engine:  # the directory is free
        assert not engine.closed
    with pytest.raises(ConfigError):
        async with open_engine({"workers": 1}):
            pass


@pytest.mark.asyncio
async def test_a_handler_on_the_event_loop_is_waited_for_at_the_end() -> None:
    handled = []
    async with open_engine() as engine:

        @engine.on_change(scope="s")
        async def handler(event: object) -> None:
            handled.append(event)

        await engine.aio.update("s", "k", [ops.Increment("", 1)])
    assert len(handled) == 1


@pytest.mark.asyncio
async def test_several_workers_with_a_state_in_memory_are_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with open_engine():
            pass
        for one in ("1", "", "many"):
            monkeypatch.setenv("WEB_CONCURRENCY", one)
            async with open_engine():
                pass
        monkeypatch.setenv("WEB_CONCURRENCY", "4")
        async with open_engine(file_config(tmp_path)):
            pass
        assert caplog.messages == []
        for _ in range(2):
            async with open_engine():
                pass
    (said,) = caplog.messages
    assert WARNING in said
    assert "4 workers (WEB_CONCURRENCY=4)" in said
    assert "store_method: file_based" in said


def test_uvicorn_runs_one_worker_if_it_reloads() -> None:
    server = SimpleNamespace(config=SimpleNamespace(workers=4, reload=True))
    assert workers_of(server, "uvicorn") == 1
    server.config.reload = False
    assert workers_of(server, "uvicorn") == 4
    assert workers_of(SimpleNamespace(cfg=SimpleNamespace(workers="many")), "gunicorn") is None
    assert workers_of(None, "gunicorn") is None


@pytest.mark.parametrize(
    ("server", "arguments", "environment", "told"),
    [
        ("uvicorn", ["--workers", "2"], {}, "2 workers (uvicorn's `workers`)"),
        ("uvicorn", [], {"WEB_CONCURRENCY": "2"}, "2 workers (uvicorn's `workers`)"),
        ("uvicorn", ["--workers", "1"], {"WEB_CONCURRENCY": "2"}, None),
        (
            "gunicorn",
            ["-w", "3", "-k", "uvicorn_worker.UvicornWorker", "--preload"],
            {"WEB_CONCURRENCY": "2"},
            "3 workers (gunicorn's `workers`)",
        ),
        ("gunicorn", ["-k", "uvicorn_worker.UvicornWorker"], {}, None),
    ],
    ids=["uvicorn", "uvicorn by environment", "uvicorn alone", "gunicorn", "gunicorn alone"],
)
def test_a_worker_knows_how_many_there_are(
    tmp_path: Path, server: str, arguments: list[str], environment: dict[str, str], told: str | None
) -> None:
    (tmp_path / "app.py").write_text(APP)
    with WebServer(tmp_path, server, "app:app", *arguments, **environment) as web:
        assert web.get("/")[0] == 200
        said = web.log
    assert (WARNING in said) is (told is not None), said
    assert told is None or told in said, said
