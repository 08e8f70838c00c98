"""Run the service under a web server with four workers, restart them under load, and compare the counts.

    python examples/counters/counters.py            # uvicorn
    python examples/counters/counters.py gunicorn

Exit status: 0 if every request was answered and every visit counted once, 1 if not.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SERVERS = {
    "uvicorn": ["uvicorn", "app:app", "--port", "0", "--workers", "4", "--no-access-log"],
    "gunicorn": ["gunicorn", "app:app", "--bind", "127.0.0.1:0", "-w", "4", "-k", "uvicorn_worker.UvicornWorker"],
}
PAGES = ("home", "news", "shop")
CLIENTS = 6
VISITS = 100
"""At least, for each client; it continues until the restart is over."""
PATIENCE_S = 100.0

_LISTENS = re.compile(r"(?:running on|Listening at:) http://127\.0\.0\.1:(\d+)")


class Service:
    """A web server with four workers."""

    def __init__(self, server: str, folder: Path) -> None:
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this interpreter, with a server of the list
                [sys.executable, "-m", *SERVERS[server]],
                cwd=HERE,
                env={**os.environ, "COUNTERS_DIRECTORY": str(folder / "state")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.port = 0
        wait_until(self._listens)

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace")

    def _listens(self) -> bool:
        if self.process.poll() is not None:
            raise SystemExit(f"the server has ended:\n{self.log}")
        found = _LISTENS.search(self.log)
        if found is None:
            return False
        self.port = int(found[1])
        try:
            return self.request("GET", "/report")[0] == 200
        except OSError:
            return False  # no worker yet

    def request(self, method: str, path: str, **headers: str) -> tuple[int, Any]:
        """Make one request; return its status and what it has answered. Raises OSError if the connection fails."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, headers={"Connection": "close", **headers})
            response = connection.getresponse()
            body = response.read()
            return response.status, json.loads(body) if response.status == 200 else body.decode(errors="replace")
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def restart(self) -> None:
        """Have the server replace its workers one after the other, as a deployment does."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """End the server."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Visitors:
    """Clients that visit the pages, and note what they were answered."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = [threading.Thread(target=self._visit, args=(number,)) for number in range(CLIENTS)]
        self._exclusive = threading.Lock()
        self._over = threading.Event()
        self.visits: Counter[str] = Counter()
        self.workers: Counter[int] = Counter()
        self.repeated = 0
        self.failed: list[str] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until each has made its visits."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _visit(self, client: int) -> None:
        number = 0
        while number < VISITS or not self._over.is_set():
            page = PAGES[(client + number) % len(PAGES)]
            status, answer = self._answer(page, str(uuid.uuid4()))
            number += 1
            with self._exclusive:
                if status == 200:
                    self.visits[page] += 1
                    self.workers[answer["worker"]] += 1
                else:
                    self.failed.append(f"{status}: {answer}")

    def _answer(self, page: str, key: str) -> tuple[int, Any]:
        """Visit a page. As a proxy does, send it again if the server closed the connection before it answered.

        A worker that ends closes connections that it has accepted and not read yet. The key makes that safe.
        """
        ends = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._service.request("POST", f"/visits/{page}", **{"Idempotency-Key": key})
            except OSError as error:
                if time.monotonic() > ends:
                    return 0, str(error)
                with self._exclusive:
                    self.repeated += 1
                time.sleep(0.01)


def main(server: str = "uvicorn") -> int:
    """Run it; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="scopestate-counters-") as folder:
        service = Service(server, Path(folder))
        try:
            visitors = Visitors(service)
            visitors.start()
            wait_until(lambda: len(visitors.workers) > 1)
            before = set(visitors.workers)
            service.restart()
            wait_until(lambda: len(set(visitors.workers) - before) > 1)
            visitors.finish()
            expected = {f"{page} {hundred}" for page, count in visitors.visits.items() for hundred in hundreds(count)}
            wait_until(lambda: service.request("GET", "/report")[1]["milestones"].keys() == expected, forgiving=True)
            found = service.request("GET", "/report")[1]
        finally:
            service.stop()
        return compare(visitors, found, expected, service.log)


def compare(visitors: Visitors, found: dict[str, Any], expected: set[str], log: str) -> int:
    """Print what was counted; return the exit status."""
    total = visitors.visits.total()
    print(f"{total:,} visits, answered by {len(visitors.workers)} workers, which were restarted meanwhile")
    print(f"requests that failed: {len(visitors.failed)}; sent again on a new connection: {visitors.repeated}")
    print(f"counted by the service: {sum(found['visits'].values()):,}")
    once = [name for name, value in found["milestones"].items() if value == {"celebrated": 1}]
    print(
        f"milestones: {len(expected)}, celebrated once: {len(once)}; the site was opened by {found['site']['opened']}"
    )
    right = not visitors.failed and found["visits"] == visitors.visits and set(once) == expected
    if not right:
        print(*visitors.failed[:3], log[-3000:], "something was lost, or counted twice", sep="\n", file=sys.stderr)
        return 1
    print("every request was answered, every visit counted once, every job done once")
    return 0


def hundreds(count: int) -> range:
    """Return the milestones that this many visits have passed."""
    return range(100, count + 1, 100)


def wait_until(true: Any, *, forgiving: bool = False) -> None:
    """Wait until `true()` is."""
    ends = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > ends:
            if forgiving:
                return
            raise SystemExit("it takes too long")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
