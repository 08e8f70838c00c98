"""Several workers of one application, on one directory: under real servers, and as children of a program."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import pools
import pytest
from applications import ASGI, HOOKED, HOOKS, WSGI
from forking import beside_threads
from web_servers import PATIENCE_S, WebServer, file_config

from scopestate import Engine
from scopestate.errors import EngineForked

UVICORN = ["-k", "uvicorn_worker.UvicornWorker"]


def counted_by(web: WebServer, processes: int) -> int:
    """Make requests until so many processes have answered; return how many. Each answer is the next number."""
    answers: list[int] = []
    by: Counter[str] = Counter()
    ends = time.monotonic() + PATIENCE_S

    def ask() -> None:
        status, body = web.get("/")
        assert status == 200, body
        number, process = body.split()
        answers.append(int(number))
        by[process] += 1

    with concurrent.futures.ThreadPoolExecutor(8) as clients:  # beside one another, or the first worker takes all
        while len(by) < processes:
            assert time.monotonic() < ends, f"{by}: {web.log}"
            for done in [clients.submit(ask) for _ in range(32)]:
                done.result()
    assert sorted(answers) == list(range(1, len(answers) + 1)), "one was lost, or counted twice"
    return len(answers)


@pytest.mark.parametrize(
    ("server", "application", "arguments"),
    [
        ("uvicorn", ASGI, ["--workers", "4"]),
        ("gunicorn", ASGI, ["-w", "2", *UVICORN]),
        ("gunicorn", ASGI, ["-w", "2", *UVICORN, "--preload"]),
        ("gunicorn", WSGI, ["-w", "2"]),
        ("gunicorn", WSGI, ["-w", "2", "-k", "gthread", "--threads", "2"]),
        ("gunicorn", HOOKED, ["-w", "2", "--preload", "-c", "hooks.py"]),
        ("gunicorn", WSGI, ["-w", "2", "--preload", "-c", "hooks.py"]),
    ],
    ids=[
        "uvicorn",
        "gunicorn uvicorn",
        "gunicorn uvicorn preload",
        "gunicorn sync",
        "gunicorn gthread",
        "gunicorn hooks",
        "gunicorn owner",
    ],
)
def test_workers_of_a_server_have_one_state(
    tmp_path: Path, server: str, application: str, arguments: list[str]
) -> None:
    (tmp_path / "app.py").write_text(application)
    (tmp_path / "hooks.py").write_text(HOOKS)
    with WebServer(tmp_path, server, "app:app", *arguments) as web:
        count = counted_by(web, processes=2)
        assert web.stop() == 0
    with Engine.from_config(file_config(tmp_path)) as engine:
        assert engine.get("hits", "all") == count


def test_workers_that_are_recycled_hand_the_directory_over(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(WSGI)
    with WebServer(tmp_path, "gunicorn", "app:app", "-w", "2", "--max-requests", "20") as web:
        count = counted_by(web, processes=4)
        assert web.stop() == 0
    with Engine.from_config(file_config(tmp_path)) as engine:
        assert engine.get("hits", "all") == count


def test_an_engine_that_gunicorn_has_preloaded_says_where_to_open_it(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(WSGI)
    with WebServer(tmp_path, "gunicorn", "app:app", "-w", "2", "--preload") as web:
        status, body = web.get("/")
    assert status == 500
    assert "EngineForked: this engine was inherited through fork" in body
    for place in ("gunicorn --preload", "lifespan", "post_worker_init", "initializer", "os.fork"):
        assert place in body


# ------------------------------------------------------------------------------------------------ children of a program


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_of_multiprocessing_have_the_state_of_their_parent(tmp_path: Path, method: str) -> None:
    with Engine.from_config(file_config(tmp_path)) as engine:
        engine.set("hits", "all", 1)
        context = multiprocessing.get_context(method)
        with beside_threads(), context.Pool(3, pools.open_engine, (str(tmp_path),)) as pool:
            processes = pool.map(pools.count, range(60), chunksize=1)
            pool.close()
            pool.join()
        assert engine.get("hits", "all") == 61
    assert os.getpid() not in processes


def test_an_engine_that_a_worker_has_inherited_says_where_to_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine() as engine:
        monkeypatch.setattr(pools, "engine", engine)
        context = multiprocessing.get_context("fork")
        with beside_threads(), context.Pool(1) as pool, pytest.raises(EngineForked, match="worker's `initializer`"):
            pool.apply(pools.count, (1,))
