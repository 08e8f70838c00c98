"""One run of the proof: processes on one directory, of which owners and followers are killed, closed and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.living import untraced_environment
from sharing.clients import ORDER_KEYS
from sharing.facts import Death, Fact, Run, read

HERE = Path(__file__).parent
PATIENCE_S = 180.0
PATIENT_MS = 30_000
"""How long calls wait for an owner, and a closing owner for calls: a busy machine must not look like a fault."""
INTERVAL_MS = 50
STEP_S = 0.002


@dataclass
class Plan:
    """How a run goes."""

    seconds: float
    processes: int
    seed: int
    calm: bool = False
    """True: processes are not stopped with SIGSTOP."""
    durable: bool = True
    """False: there are no durable triggers."""
    plant: str | None = None
    pause_s: tuple[float, float] = (0.15, 0.6)
    """Between two kills."""


def config_of(directory: Path) -> dict[str, Any]:
    """Return the configuration of every process."""
    kv = {
        "store_method": "file_based",
        "file_path": str(directory),
        "save_interval_ms": INTERVAL_MS,
        "durability": "commit",
        "connect_wait_ms": PATIENT_MS,
    }
    return {
        "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}],
        "scopes": [{"prefix": "soft", "durability": "interval"}, {"prefix": "orders", "history": {}}],
        "limits": {"close_grace_ms": PATIENT_MS},
    }


class Killing:
    """The processes of a run, and their ends."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.store = folder / "store"
        self.rng = random.Random(plan.seed)
        self.alive: dict[str, int] = {}
        """Name -> process id."""
        self.deaths: list[Death] = []
        self.owners: list[tuple[int, str]] = []
        self.unexpected: list[str] = []
        self._expected: set[str] = set()
        self._stopped: list[tuple[float, int, str, int, bool]] = []
        self._started = 0
        self._owner = 0
        self._rest = b""
        paths = [str(HERE.parent), *(path for path in sys.path if path)]
        self._errors = (folder / "errors.txt").open("w+")
        self._nursery = subprocess.Popen(
            [sys.executable, str(HERE / "child_proof.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**untraced_environment(), "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._nursery.stdout is not None
        os.set_blocking(self._nursery.stdout.fileno(), False)

    # ------------------------------------------------------------------------------------------------------ processes

    def start(self, **more: Any) -> str:
        """Start another process; return its name."""
        self._started += 1
        name = f"p{self._started}"
        facts = {
            "name": name,
            "log": str(self.folder / f"{name}.log"),
            "config": config_of(self.store),
            "seed": self.plan.seed,
            "processes": self.plan.processes,
            "quiet": str(self.folder / "quiet"),
            "plant": self.plan.plant,
            "durable": self.plan.durable,
            **more,
        }
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(facts).encode() + b"\n")
        self._nursery.stdin.flush()
        return name

    def expect(self, name: str) -> None:
        """A process is about to be made to end."""
        self._expected.add(name)

    def look(self) -> None:
        """See which processes began and ended, and which is the owner."""
        assert self._nursery.stdout is not None
        data = self._nursery.stdout.read()
        assert data != b"", self.errors()
        *lines, self._rest = (self._rest + (data or b"")).split(b"\n")
        for line in lines:
            word, name, number = line.decode().split()
            if word == "begin":
                self.alive[name] = int(number)
            else:
                del self.alive[name]
                if name not in self._expected:
                    self.unexpected.append(f"{name} ended by itself with {number}: {self.errors()[-2000:]}")
        owner = self.holder()
        if owner != self._owner:
            self._owner = owner
            if name := self.name_of(owner):
                self.owners.append((time.monotonic_ns(), name))
        for due in [one for one in self._stopped if one[0] <= time.monotonic()]:
            self._stopped.remove(due)
            _, pid, name, began, was_owner = due
            os.kill(pid, signal.SIGCONT)
            self.deaths.append(Death(began, name, "stop", was_owner, time.monotonic_ns()))

    def holder(self) -> int:
        """Return the process that has recorded itself as the owner; 0 if no process has."""
        try:
            found = json.loads((self.store / "state.lock").read_bytes().partition(b"\n")[0])
        except (OSError, ValueError):
            return 0
        return int(found.get("pid", 0))

    def name_of(self, pid: int) -> str | None:
        return next((name for name, one in self.alive.items() if one == pid), None)

    def until(self, holds: Callable[[], Any], what: str) -> None:
        """Look until something holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            self.look()
            if self.unexpected or time.monotonic() > deadline:
                self._ask_where_they_are()
                raise AssertionError(f"{what}: {self.unexpected} {self.errors()}")
            time.sleep(STEP_S)

    def _ask_where_they_are(self) -> None:
        """Let each process write where its threads are, also one that is stopped."""
        for pid in self.alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)

    # ---------------------------------------------------------------------------------------------------------- kills

    def strike(self) -> None:
        """Kill, close or stop a process, most often the owner, and start another in its place."""
        stopped = {pid for _, pid, *_ in self._stopped}
        owner = self.name_of(self.holder())
        followers = [name for name, pid in self.alive.items() if name != owner and pid not in stopped]
        of_owner = owner is not None and self.alive[owner] not in stopped
        how, wants_owner = self.rng.choices(
            [("kill", True), ("close", True), ("stop", True), ("kill", False), ("close", False)], [60, 14, 6, 13, 7]
        )[0]
        if how == "stop" and self.plan.calm:
            how = "kill"
        name = owner if wants_owner and of_owner else self.rng.choice(followers) if followers else None
        if name is None or (wants_owner and not of_owner):
            return
        pid = self.alive[name]
        if how == "stop":
            os.kill(pid, signal.SIGSTOP)
            self._stopped.append(
                (time.monotonic() + self.rng.uniform(0.2, 1.2), pid, name, time.monotonic_ns(), wants_owner)
            )
            return
        self.expect(name)
        # Noted before it happens, so that nothing that it causes seems to come before it.
        self.deaths.append(Death(time.monotonic_ns(), name, how, wants_owner))
        os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
        if how == "kill":
            self.until(lambda: name not in self.alive, f"{name} does not die")
        self.start()

    def run(self) -> Run:
        """Do the whole run; return its facts."""
        for _ in range(self.plan.processes):
            self.start()
        self.until(lambda: len(self.alive) == self.plan.processes and self.holder(), "the first processes do not begin")
        end = time.monotonic() + self.plan.seconds
        while time.monotonic() < end:
            pause = time.monotonic() + self.rng.uniform(*self.plan.pause_s)
            while time.monotonic() < min(pause, end):
                self.look()
                assert not self.unexpected, self.unexpected
                time.sleep(STEP_S)
            self.strike()
        return self.finish()

    def finish(self) -> Run:
        """Let the processes end their calls, one more read everything, and all of them close."""
        (self.folder / "quiet").touch()
        self.until(lambda: not self._stopped, "a stopped process does not go on")
        self.until(lambda: all(name in self.alive for name in [f"p{self._started}"]), "the last process does not begin")
        closing = {death.name for death in self.deaths if death.how == "close"}
        self.until(lambda: not closing & set(self.alive), "a process does not close")
        self.until(self._calm, "a call does not end")
        last = self.start(finish={"durable": self.plan.durable, "pending": self._pending()})
        self.expect(last)
        self.until(lambda: last in self.alive, "the last process does not begin")
        self.until(lambda: last not in self.alive, "the last process does not end")
        survivors = set(self.alive)
        run = self._facts(survivors)
        assert run.words("finished"), self.errors()
        self._wait_until_told(run)
        for name, pid in self.alive.items():
            self.expect(name)
            self.deaths.append(Death(time.monotonic_ns(), name, "close", was_owner=False))
            os.kill(pid, signal.SIGTERM)
        self.until(lambda: not self.alive, "a process does not close")
        whole = self._facts(survivors)
        (self.folder / "run.json").write_text(json.dumps([whole.deaths, whole.owners, sorted(survivors)]))
        return whole

    def _calm(self) -> bool:
        """True if no client of a living process is within a call."""
        logs = {name: read(self.folder / f"{name}.log") for name in self.alive}
        run = Run(logs, self.deaths, self.owners, set(), interval_ms=INTERVAL_MS)
        return all(one.ended is not None for one in run.attempts) and all(
            any(fact.word == "triggers" for fact in facts) for facts in logs.values()
        )

    def _pending(self) -> list[tuple[str, int]]:
        """The counts that have no answer."""
        attempts = self._facts(set()).attempts
        return [(one.client, one.number) for one in attempts if one.scope.startswith("counter-") and one.ended is None]

    def _wait_until_told(self, run: Run) -> None:
        """Give triggers and watches time to tell the last changes; those that do not are found by the checks."""
        orders = run.final().get("orders", {})
        deadline = time.monotonic() + 20

        def is_told(facts: list[Fact]) -> bool:
            saw = {word: {f.rest[0]: f.rest[1] for f in facts if f.word == word} for word in ("told", "saw")}
            return all(found.get(key) == orders.get(key) for found in saw.values() for key in ORDER_KEYS)

        while time.monotonic() < deadline:
            if all(is_told(read(self.folder / f"{name}.log")) for name in self.alive):
                return
            self.look()
            time.sleep(0.05)

    def _facts(self, survivors: set[str]) -> Run:
        logs = {path.stem: read(path) for path in self.folder.glob("p*.log")}
        return Run(logs, sorted(self.deaths), self.owners, survivors, self.plan.durable, INTERVAL_MS)

    def errors(self) -> str:
        """What the processes have written to standard error."""
        self._errors.seek(0)
        return self._errors.read()[-5000:]

    def close(self) -> None:
        """Kill what is left."""
        for pid in self.alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        self._nursery.wait(PATIENCE_S)
        self._nursery.stdout.close()
        self._errors.close()


def run(plan: Plan, folder: Path) -> Run:
    """Do one run in an empty folder."""
    killing = Killing(plan, folder)
    try:
        return killing.run()
    finally:
        killing.close()


def keep(folder: Path, to: Path) -> None:
    """Keep the folder of a run that found something."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.sock"))
