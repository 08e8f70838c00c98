"""Ends of a process that have no exit hooks of their own: nothing acknowledged is lost (docs/design/0011)."""

from __future__ import annotations

import http.client
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reliability.living import PATIENCE_S, saved, start_child, until
from stored import read_values

from scopestate.persistence.sqlite.reading import StoreReader

DOCKERS_PATIENCE_S = 9.5
"""What `docker stop` waits before it sends SIGKILL, less what it takes to get there."""
ALL = {str(number): b"%d" % number for number in range(100)}

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a program of child_ends.py."""
    started: list[subprocess.Popen[bytes]] = []

    def start_(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        started.append(start_child("ends", name, tmp_path, *arguments))
        return started[-1]

    yield start_
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], PATIENCE_S)[0], "it is not ready"
    line = os.read(process.stdout.fileno(), 100)
    assert line == b"ready\n", process.communicate()[1].decode()


def end(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out.decode(), err.decode()


def ended_within(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


# --- workers that end by os._exit ------------------------------------------------------------------------------------

METHODS = pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])


@METHODS
@pytest.mark.parametrize("target", ["work", "work_in_a_thread", "leave_a_thread_behind"])
def test_a_worker_process_that_returns_saves(start: Start, tmp_path: Path, method: str, target: str) -> None:
    code, out, err = end(start("in_process", method, target))

    assert (code, out, err) == (0, "worker 0\n", "")
    assert saved(tmp_path / "store", "s")[1] == ALL


def test_a_worker_process_that_returns_delivers_its_events(start: Start, tmp_path: Path) -> None:
    assert end(start("in_process", "fork", "work_and_derive"))[:2] == (0, "worker 0\n")

    assert saved(tmp_path / "store", "derived")[1] == ALL


@METHODS
def test_a_signal_that_a_worker_process_did_not_notice_is_sent_again(start: Start, tmp_path: Path, method: str) -> None:
    assert end(start("in_process", method, "work_and_miss_a_signal"))[:2] == (0, f"worker {-signal.SIGTERM}\n")

    assert saved(tmp_path / "store", "s")[1] == ALL


def test_a_worker_process_that_exits_keeps_its_exit_code(start: Start, tmp_path: Path) -> None:
    assert end(start("in_process", "fork", "fail"))[:2] == (0, "worker 3\n")

    assert saved(tmp_path / "store", "s")[1] == ALL


@METHODS
@pytest.mark.parametrize("kind", ["in_pool", "in_pool_that_is_closed", "in_executor"])
def test_workers_of_pools_and_executors_save(start: Start, tmp_path: Path, method: str, kind: str) -> None:
    code, _, err = end(start(kind, method))

    assert (code, err) == (0, "")
    assert saved(tmp_path / "store", "s")[1] == ALL


def test_a_forked_worker_saves_its_own_engine_and_leaves_the_parents_to_the_parent(
    start: Start, tmp_path: Path
) -> None:
    assert end(start("forked_with_an_engine_of_the_parent"))[:2] == (0, "worker 0\n")

    assert saved(tmp_path / "store", "s")[1] == ALL
    assert saved(tmp_path / "parent", "s")[1] == ALL


# --- hosts that handle SIGTERM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "gives_sigterm_back_and_raises_it",
        "gives_sigterm_back_and_sends_it",
        "gives_sigterm_back_from_a_thread_that_opened",
        "handles_it_on_its_event_loop",
        "replaces_our_handler_later",
    ],
)
def test_an_engine_opened_under_a_host_that_owns_sigterm_saves_at_the_end(
    start: Start, tmp_path: Path, name: str
) -> None:
    process = start(name)
    wait_until_ready(process)

    process.send_signal(signal.SIGTERM)

    code, _, err = end(process)
    assert (code, err) == (-signal.SIGTERM, "")
    assert saved(tmp_path / "store", "s")[1] == ALL


@pytest.mark.parametrize("way", ["ends_itself_in_its_handler", "drops_its_engine_and_ends_itself_in_its_handler"])
def test_what_was_acknowledged_is_saved_before_a_handler_of_the_host_runs(
    way: str, start: Start, tmp_path: Path
) -> None:
    process = start(way)
    wait_until_ready(process)

    process.send_signal(signal.SIGTERM)

    assert end(process)[0] == 7
    assert saved(tmp_path / "store", "s")[1] == ALL


def test_an_application_under_uvicorn_that_opens_its_engine_in_a_request_and_never_closes_it(tmp_path: Path) -> None:
    (tmp_path / "app_under_test.py").write_text(UVICORN_APP)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import uvicorn; "
        "uvicorn.run('app_under_test:app', port=0, log_level='info')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "STORE": str(tmp_path / "store")},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        port = 0
        for line in process.stderr:
            if b"running on" in line:
                port = int(line.split(b"http://127.0.0.1:")[1].split()[0])
                break
        for number in range(10):
            assert get(port, f"/{number}") == b"ok"

        process.send_signal(signal.SIGTERM)

        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == -signal.SIGTERM
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert len(saved(tmp_path / "store", "hits")[1]) == 10


UVICORN_APP = """
import os
from scopestate import Engine

engine = None


def get():
    global engine
    if engine is None:
        config = {"store_method": "file_based", "file_path": os.environ["STORE"], "save_interval_ms": 3_600_000}
        adapter = {"name": "kv", "config": config}
        engine = Engine.from_config({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]})
    return engine


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await get().aio.set("hits", scope["path"], 1)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
"""


def get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("waits", signal.SIGTERM),
        ("waits", signal.SIGHUP),
        ("waits_with_sigint_at_its_default", signal.SIGINT),
        ("opened_in_a_thread_that_main_waits_for", signal.SIGTERM),
        ("opened_in_a_thread_that_main_waits_for", signal.SIGHUP),
        ("opened_in_a_thread_whose_first_signals_do_not_wake_main", signal.SIGTERM),
    ],
)
def test_a_signal_that_ends_the_process_saves_first(
    start: Start, tmp_path: Path, name: str, number: signal.Signals
) -> None:
    process = start(name)
    wait_until_ready(process)

    process.send_signal(number)
    while name == "opened_in_a_thread_that_main_waits_for" and not ended_within(process, 1.0):
        # Its main thread sleeps in a wait of its own without limit. CPython notices a signal that comes as that begins
        # with the next signal only.
        process.send_signal(number)

    code, _, err = end(process)
    assert (code, err) == (-number, "")
    assert saved(tmp_path / "store", "s")[1] == ALL


@pytest.mark.parametrize("name", ["has_a_handler_that_hangs", "has_two_engines_whose_handlers_hang"])
def test_with_handlers_that_hang_all_is_saved_at_once_and_the_end_comes_in_time_for_docker(
    start: Start, tmp_path: Path, name: str
) -> None:
    process = start(name)
    wait_until_ready(process)
    began = time.monotonic()

    process.send_signal(signal.SIGTERM)

    assert end(process)[0] == -signal.SIGTERM
    assert time.monotonic() - began < DOCKERS_PATIENCE_S
    assert saved(tmp_path / "store", "s")[1] == ALL
    if name == "has_two_engines_whose_handlers_hang":
        assert saved(tmp_path / "other", "s")[1] == ALL


def test_with_a_handler_that_hangs_all_is_saved_even_if_the_end_is_not_waited_for(start: Start, tmp_path: Path) -> None:
    """The save comes before the wait: a supervisor that gives it a second loses nothing."""
    process = start("has_a_handler_that_hangs")
    wait_until_ready(process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)

    wait_for_a_save(tmp_path / "store", "s", len(ALL))
    process.kill()

    assert end(process)[0] == -signal.SIGKILL, f"it had ended by itself, after {time.monotonic() - began:.1f} s"
    assert saved(tmp_path / "store", "s")[1] == ALL


def wait_for_a_save(directory: Path, scope: str, keys: int) -> None:
    """Wait for what is saved while handlers are waited for, which takes longer."""

    def is_saved() -> bool:
        with StoreReader(directory) as reader:
            return len(read_values(reader, scope)) == keys

    until(is_saved, "nothing was saved before the handlers were waited for")


# --- executors at the exit -------------------------------------------------------------------------------------------


def test_events_are_delivered_at_exit_while_executors_take_work(start: Start, tmp_path: Path) -> None:
    code, _, err = end(start("exits_with_handlers_that_need_executors"))

    assert code == 0
    if platform.python_version() in ("3.12.0", "3.12.1"):
        # They start no thread once the main program is over; then the failure is reported.
        assert "can't create new thread at interpreter shutdown" in err
        return
    assert err == ""
    assert set(saved(tmp_path / "store", "done")[1]) == {"to_thread", "run_in_executor", "submit"}


def test_threads_that_outlive_the_main_program_still_write(start: Start, tmp_path: Path) -> None:
    code, _, err = end(start("goes_on_in_a_thread_when_main_has_returned"))

    assert (code, err) == (0, "")
    assert saved(tmp_path / "store", "s")[1] == ALL
