"""Run the project under gunicorn with two workers, kill one of them, and see that no session is lost.

    python examples/members/members.py

Exit status: 0 if each member stayed logged in, no visit that was answered is lost, and the limit held; 1 if not.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SERVER = ["gunicorn", "urls:application", "--bind", "127.0.0.1:0", "--workers", "2", "--no-control-socket"]
MEMBERS = ("ada", "bob", "eve", "kim")
VISITS = 60
"""At least, for each member; they continue until a worker was killed and another one serves."""
SEARCHES = 15
PATIENCE_S = 100.0

_LISTENS = re.compile(r"Listening at: http://127\.0\.0\.1:(\d+)")


class Site:
    """The web server."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this interpreter
                [sys.executable, "-m", *SERVER],
                cwd=HERE,
                env={
                    **os.environ,
                    "DJANGO_SETTINGS_MODULE": "settings",
                    "MEMBERS_DIRECTORY": str(folder / "state"),
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.port = 0

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace")

    def wait(self) -> None:
        """Wait until it listens. Raises SystemExit if it has ended."""
        ends = time.monotonic() + PATIENCE_S
        while (found := _LISTENS.search(self.log)) is None:
            if self.process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"the server does not run:\n{self.log}")
            time.sleep(0.02)
        self.port = int(found[1])

    def stop(self) -> None:
        """End it in order."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Member(threading.Thread):
    """A browser: it keeps its cookie, and asks again if a connection breaks."""

    def __init__(self, site: Site, name: str, over: threading.Event) -> None:
        super().__init__(name=name)
        self._site = site
        self._over = over
        self._cookie = ""
        self.visits: list[int] = []
        """What each answer has said."""
        self.workers: set[int] = set()
        self.computed: set[int] = set()
        self.allowed = 0
        self.asked_again = 0
        self.problems: list[str] = []

    def run(self) -> None:
        self._get(f"/log-in?name={self.name}")
        while len(self.visits) < VISITS or not self._over.is_set():
            status, answer = self._get("/me")
            if status != 200 or answer["member"] != self.name:
                self.problems.append(f"{status}: {answer}")
                return
            self.visits.append(answer["visits"])
            self.workers.add(answer["worker"])
            status, answer = self._get("/report")
            if status != 200:
                return
            self.computed.add(answer["computed"])
        before = self.asked_again
        for _ in range(SEARCHES):
            self.allowed += self._get("/search")[0] == 200
        self.allowed += self.asked_again - before  # one that was counted, and not answered

    def _get(self, path: str) -> tuple[int, Any]:
        ends = time.monotonic() + PATIENCE_S
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self._site.port, timeout=PATIENCE_S)
            try:
                connection.request("GET", path, headers={"Cookie": self._cookie, "Connection": "close"})
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException):
                self.asked_again += 1
                if time.monotonic() > ends:
                    raise
                time.sleep(0.02)
                continue
            finally:
                connection.close()
            if given := response.headers["Set-Cookie"]:
                self._cookie = given.partition(";")[0]
            if response.status >= 500:
                self.problems.append(f"{path}: {response.status}: {body.decode(errors='replace'):.500}")
            return response.status, json.loads(body) if body[:1] == b"{" else body.decode(errors="replace")


def main() -> int:
    """Run it; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="scopestate-members-") as folder:
        site, over = Site(Path(folder)), threading.Event()
        members = [Member(site, name, over) for name in MEMBERS]
        try:
            site.wait()
            for member in members:
                member.start()
            killed = wait_for_workers(members, 2, set())
            os.kill(min(killed), signal.SIGKILL)
            wait_for_workers(members, 1, killed)
        finally:
            over.set()
            for member in members:
                if member.ident is not None:
                    member.join()
            site.stop()
        return report(members, site.log)


def wait_for_workers(members: list[Member], count: int, besides: set[int]) -> set[int]:
    """Wait until `count` workers other than `besides` have answered; return them."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        found = {worker for member in members for worker in set(member.workers)} - besides
        if len(found) >= count:
            return found
        if time.monotonic() > ends or not any(member.is_alive() for member in members):
            raise SystemExit(f"no more workers than {found} have answered")
        time.sleep(0.02)


def report(members: list[Member], log: str) -> int:
    """Print what has happened; return the exit status."""
    problems = [problem for member in members for problem in member.problems]
    for member in members:
        # A visit whose answer was lost with the worker may have been counted.
        if any(later <= earlier for earlier, later in zip(member.visits, member.visits[1:], strict=False)):
            problems.append(f"a visit of {member.name} is lost: {member.visits}")
        if member.allowed < 10 or member.allowed > 10 + member.asked_again:
            problems.append(f"{member.name} could search {member.allowed} times")
    workers = set().union(*[member.workers for member in members])
    computed = set().union(*[member.computed for member in members])
    print(f"{sum(len(member.visits) for member in members)} visits of {len(members)} members")
    print(f"answered by {len(workers)} workers, one of which was killed; asked again: "
          f"{sum(member.asked_again for member in members)}")  # fmt: skip
    print(f"the report was computed {max(computed)} times")
    if problems:
        print(*problems[:5], log[-3000:], sep="\n", file=sys.stderr)
        return 1
    print("every member stayed logged in, every visit counted, the limit of searches held")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
