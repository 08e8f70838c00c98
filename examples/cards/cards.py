"""Run the service under uvicorn with two workers, kill one under load, restart all, and compare what everyone saw.

    python examples/cards/cards.py

Exit status: 0 if every write that was answered was made once, and every stream showed each change once, 1 if not.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

HERE = Path(__file__).parent
CLIENTS = 3
CARDS = 12
"""At least, for each client; it continues until a worker was killed and replaced."""
PATIENCE_S = 60.0

_LISTENS = re.compile(r"running on http://127\.0\.0\.1:(\d+)")


class Service:
    """uvicorn with two workers."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / f"{uuid.uuid4()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "service:app", "--port", "0", "--workers", "2", "--no-access-log"],
                cwd=HERE,
                env={**os.environ, "CARDS_DIRECTORY": str(folder / "state")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.port = 0

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace")

    def wait_for_workers(self) -> dict[int, int]:
        """Wait until two workers answer; return the process id of each, with that of the owner that it names."""
        found: dict[int, int] = {}

        def ask(_: int) -> None:
            with contextlib.suppress(OSError):
                status, answer = self.request("GET", "/status")
                if status == 200:
                    found[answer["worker"]] = answer["health"]["sharing"]["owner_pid"]

        def two_answer() -> bool:
            if self.process.poll() is not None:
                raise SystemExit(f"the server has ended:\n{self.log}")
            if listens := _LISTENS.search(self.log):
                self.port = int(listens[1])
                list(pool.map(ask, range(4)))  # side by side: a worker that has one is slower to take the next one
            return len(found) > 1 and all(found.values())

        with ThreadPoolExecutor(4) as pool:
            wait_until(two_answer, "two workers answer")
        return found

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Make one request; return its status and what it has answered. Raises OSError if the connection fails."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Connection": "close", **headers})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except (http.client.HTTPException, ValueError) as error:  # cut off
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def write(self, method: str, path: str, body: Any, **query: Any) -> tuple[int, Any]:
        """Write, and as long as there is no answer send the same again, with the same key: it is done once."""
        key = str(uuid.uuid4())
        ends = time.monotonic() + PATIENCE_S
        while True:
            try:
                status, answer = self.request(
                    method,
                    f"{path}?{urlencode(query)}",
                    body,
                    **{"Idempotency-Key": key, "Content-Type": "application/json"},
                )
                if status != 503:
                    return status, answer
            except OSError as error:
                status, answer = 0, str(error)
            if time.monotonic() > ends:
                return status, answer
            time.sleep(0.02)

    def stop(self) -> int | None:
        """End the server in order; return its exit status, None if it did not end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


class Page(threading.Thread):
    """A page in a browser: it follows the stream, and goes on from the last id when the connection is lost."""

    def __init__(self, service: Service, last_id: str = "") -> None:
        super().__init__(daemon=True)
        self._service = service
        self._closed = False
        self.last_id = last_id
        self.worker = 0
        self.connected = 0
        self.resyncs: list[str] = []
        self.changes: list[tuple[str, str, str, int, Any]] = []
        """Kind, scope, key, revision and value of each change."""
        self.ids: list[str] = []
        """The id behind each of them."""
        self.latest: dict[tuple[str, str], Any] = {}
        """What the page shows."""

    def run(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._follow()
            time.sleep(0.02)

    def close(self) -> None:
        """Connect no more."""
        self._closed = True

    def _follow(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._service.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", "/changes", headers={"Last-Event-ID": self.last_id} if self.last_id else {})
            response = connection.getresponse()
            if response.status != 200:
                return
            self.worker = int(response.headers["X-Worker"])
            self.connected += 1
            fields: dict[str, str] = {}
            while line := response.readline().decode():
                if line != "\n":
                    name, _, text = line.rstrip("\n").partition(":")
                    fields[name] = text.removeprefix(" ")
                    continue
                self.last_id = fields.get("id", self.last_id)
                if "event" in fields:
                    self._take(fields["event"], json.loads(fields["data"]))
                fields = {}
        finally:
            connection.close()

    def _take(self, kind: str, data: Any) -> None:
        if kind == "resync":
            self.resyncs.append(data["reason"])
            self.latest.clear()
        elif kind in ("put", "delete", "expire"):
            scope, key, value = data["scope"], data["key"], data.get("value")
            self.ids.append(self.last_id)
            self.changes.append((kind, scope, key, data["revision"], value))
            if kind == "put":
                self.latest[scope, key] = value
            else:
                self.latest.pop((scope, key), None)

    def shows(self, scope: str) -> dict[str, Any]:
        """Return what the page shows of a scope."""
        return {key: value for (of, key), value in list(self.latest.items()) if of == scope}


class Team:
    """Clients that move cards and vote for one of them, and note what they were answered."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = [threading.Thread(target=self._work, args=(f"client-{n}",)) for n in range(CLIENTS)]
        self._over = threading.Event()
        self._exclusive = threading.Lock()
        self.written: set[tuple[str, str, int]] = set()
        """Scope, key and revision of each write that was answered with success."""
        self.done = self.votes = self.conflicts = 0
        self.workers: set[int] = set()
        self.failed: list[str] = []

    def start(self) -> None:
        self._put("vote", {"title": "Vote for me"}, 0)
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until each has moved its cards."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, name: str) -> None:
        number = 0
        while (number < CARDS or not self._over.is_set()) and not self.failed:
            key, revision = f"{name}-{number}", 0
            self._note("team:holds", key, *self._service.write("POST", f"/cards/{key}/hold", {"by": name}, seconds=1))
            for column in ("todo", "doing", "done"):
                revision = self._put(key, {"title": f"A card\nof {name}", "column": column}, revision)
            with self._exclusive:
                self.done += 1
            self._vote()
            number += 1

    def _put(self, key: str, card: dict[str, Any], revision: int) -> int:
        status, answer = self._service.write("PUT", f"/cards/{key}", card, revision=revision)
        return self._note("team:cards", key, status, answer)

    def _vote(self) -> None:
        """Read, add one, write if there was no other vote since; otherwise again."""
        while not self.failed:
            status, found = self._service.write("GET", "/cards/vote", None)
            if status != 200:
                self._note("team:cards", "vote", status, found)
                return
            card = {**found["card"], "votes": found["card"]["votes"] + 1}
            status, answer = self._service.write("PUT", "/cards/vote", card, revision=found["revision"])
            if status == 409 and answer["code"] == "CONFLICT":
                with self._exclusive:
                    self.conflicts += 1
                continue
            self._note("team:cards", "vote", status, answer)
            with self._exclusive:
                self.votes += 1
            return

    def _note(self, scope: str, key: str, status: int, answer: Any) -> int:
        with self._exclusive:
            if status != 200:
                self.failed.append(f"{scope} {key}: {status} {answer}")
                return 0
            self.written.add((scope, key, answer["revision"]))
            self.workers.add(answer["worker"])
            return int(answer["revision"])


def main() -> int:
    """Run it; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="scopestate-cards-") as name:
        folder = Path(name)
        service = Service(folder)
        try:
            workers = service.wait_for_workers()
            pages = open_pages(service, set(workers))
            team = Team(service)
            team.start()
            wait_until(lambda: len(team.written) > 20 * CLIENTS, "the clients write")
            owner = next(iter(workers.values()))
            os.kill(owner, signal.SIGKILL)
            wait_until(lambda: bool(team.workers - set(workers)) or bool(team.failed), "another worker answers")
            team.finish()
            with contextlib.suppress(SystemExit):  # `compare` says what is missing
                wait_until(lambda: all(settled(page, team) for page in pages), "each page shows everything")
            found = service.request("GET", "/cards")[1]
            ended = service.stop()  # with open streams
            service = Service(folder)
            service.wait_for_workers()
            late = resumed(service, pages[0])
        except SystemExit:
            print(service.log[-3000:], file=sys.stderr)
            raise
        finally:
            service.stop()
        print(f"{len(team.written):,} writes by {len(team.workers)} workers; the owner, {owner}, was killed meanwhile")
        return compare(team, pages, late, found, ended, service.log)


def open_pages(service: Service, workers: set[int]) -> list[Page]:
    """Open pages until each worker has one; return one of each."""
    opened: dict[int, Page] = {}

    def each_has_one() -> bool:
        page = Page(service)
        page.start()
        wait_until(lambda: bool(page.worker), "a page opens")
        if opened.setdefault(page.worker, page) is not page:
            page.close()
        return set(opened) == workers

    wait_until(each_has_one, "each worker has a page")
    return list(opened.values())


def settled(page: Page, team: Team) -> bool:
    """Return whether a page shows what the team has done, and everything that comes of it by itself."""
    cards = page.shows("team:cards")
    shown = (len(cards) - 1, page.shows("team:totals").get("done"), cards.get("vote", {}).get("votes"))
    return bool(team.failed) or (shown == (team.done, team.done, team.votes) and not page.shows("team:holds"))


def resumed(service: Service, page: Page) -> Page:
    """Return a page that has gone on from the middle of what another one has seen."""
    middle = len(page.ids) // 2
    late = Page(service, page.ids[middle])
    late.start()
    missed = len(page.changes) - middle - 1
    wait_until(lambda: len(late.changes) >= missed, "the late page has what it missed")
    return late


def compare(team: Team, pages: list[Page], late: Page, found: dict[str, Any], ended: int | None, log: str) -> int:
    """Print what was seen; return the exit status."""
    first = pages[0]
    puts = [(scope, key, revision) for kind, scope, key, revision, _ in first.changes if kind == "put"]
    expired = [key for kind, _, key, _, _ in first.changes if kind == "expire"]
    held = {key for scope, key, _ in team.written if scope == "team:holds"}
    checks = {
        "every request was answered": not team.failed,
        "every write was shown, and once": sorted(at for at in puts if at[0] != "team:totals") == sorted(team.written),
        "no vote was lost": found["vote"]["votes"] == team.votes,
        "every card that is done was counted once": first.shows("team:totals") == {"done": team.done},
        "every hold ended, and once": sorted(expired) == sorted(held),
        "the pages saw the same, and what is stored": first.shows("team:cards") == found
        and all(page.changes == first.changes and page.resyncs == ["begin"] for page in pages),
        "a page was resumed after the kill": any(page.connected > 1 for page in pages),
        "a page was resumed after the restart": not late.resyncs
        and late.changes == first.changes[-len(late.changes) :]
        and len(late.changes) == len(first.changes) - len(first.ids) // 2 - 1,
        "the server ended with open streams": ended == 0,
    }
    print(
        f"{team.done} cards, {team.votes} votes, {team.conflicts} conflicts, {len(first.changes):,} changes on a page"
    )
    for said, holds in checks.items():
        print(f"{'yes' if holds else 'NO ':3}  {said}")
    if all(checks.values()):
        print("nothing was lost, and nothing was done or shown twice")
        return 0
    print(*team.failed[:3], log[-3000:], sep="\n", file=sys.stderr)
    return 1


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Wait until `true()` is."""
    ends = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > ends:
            raise SystemExit(f"it takes too long until {what}")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
