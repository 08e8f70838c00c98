"""Real web servers with several worker processes, each started as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from reliability.living import untraced_environment

PATIENCE_S = 60.0

SERVERS = {
    "uvicorn": ["uvicorn", "--port", "0"],
    # A worker that gets SIGTERM before it has its signal handlers loses it, and gunicorn then waits for this timeout.
    "gunicorn": ["gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket", "--graceful-timeout", "10"],
}
_RUNS = re.compile(r"(?:running on|Listening at:) http://127\.0\.0\.1:(\d+)")


class WebServer:
    """A server that runs `app.py` of a folder: `WebServer(folder, "uvicorn", "app:app", "--workers", "4")`."""

    def __init__(self, folder: Path, server: str, *arguments: str, **environment: str) -> None:
        self._log = folder / f"{server}.log"
        cleared = {name: value for name, value in untraced_environment().items() if name != "WEB_CONCURRENCY"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *SERVERS[server], *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                env={**cleared, "PYTHONPATH": str(folder), **environment},
            )  # fmt: skip
        try:
            self.port = int(self.wait_for_log(_RUNS)[1])
            self._wait_until_it_listens()
        except BaseException:
            self.kill()
            raise

    def _wait_until_it_listens(self) -> None:
        """Wait for the first worker: the main process of uvicorn has a port, and leaves it to the workers to listen."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), PATIENCE_S).close()
            except ConnectionRefusedError:
                assert self.process.poll() is None, f"it has ended with {self.process.returncode}:\n{self.log}"
                assert time.monotonic() < ends, self.log
                time.sleep(0.02)
            else:
                return

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    def wait_for_log(self, pattern: str | re.Pattern[str], count: int = 1) -> re.Match[str]:
        """Wait until a pattern was written so many times, and return the last one."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            found = list(re.finditer(pattern, self.log))
            if len(found) >= count:
                return found[-1]
            assert self.process.poll() is None, f"it has ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < ends, f"{pattern} was not written:\n{self.log}"
            time.sleep(0.02)

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Make a request on a connection of its own; return the status and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path, headers={"Connection": "close", **headers})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def stop(self) -> int:
        """End it as a deployment does; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it and its workers at once, if it has not ended."""
        if self.process.poll() is not None:
            return
        for process in [*self.workers(), psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """Return the processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            sys.stderr.write(self.log)
            self.kill()


def file_config(folder: Path, **options: Any) -> dict[str, Any]:
    """Return a configuration that keeps its state in a folder."""
    kv = {"store_method": "file_based", "file_path": str(folder / "state"), **options}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}
