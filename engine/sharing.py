"""Several processes with one directory: which engine owns it, and what the others do when the owner ends.

The lock of the directory decides which engine owns it; the socket in the directory is only for connections. The owner
is an ordinary engine with an additional thread that waits for connections. A follower uses a bridge to the owner. When
its connection is lost, a thread of the follower tries to take the lock: if that succeeds, it opens the store and the
engine continues with it; otherwise the bridge connects to the engine that was faster
(docs/design/0052-several-processes.md).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import selectors
import threading
import time
import weakref
from binascii import crc32
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

from scopestate.actors.ports import Backend, Durability
from scopestate.config import Config, KvOptions
from scopestate.errors import EngineClosed, NotConnected, ScopestateError, StorageError, StoreLocked, StoreUnusable
from scopestate.inbox import Inbox
from scopestate.lifecycle import wait_for_dropped
from scopestate.ops.json_schema import JsonSchema
from scopestate.ops.plain import Plain
from scopestate.persistence.local import LocalBackend
from scopestate.signals import join

if TYPE_CHECKING:
    import socket

    from scopestate.engine import Engine
    from scopestate.parts import Parts
    from scopestate.persistence.bridge.backend import BridgeBackend
    from scopestate.persistence.sharing.sockets import Listener
    from scopestate.persistence.sqlite.adapter import FileAdapter
    from scopestate.persistence.sqlite.lock import Holder
    from scopestate.wire.address import Address

log = logging.getLogger("scopestate.sharing")

LIBRARIES: Final = ("picows", "websockets")
"""The libraries of the extra `wire`."""
FIRST_PAUSE_S: Final = 0.005
LONGEST_PAUSE_S: Final = 0.04
"""Longest pause between two attempts to take the lock, while there is no connection."""
RETRY_S: Final = 1.0
"""Pause in seconds after the store could not be opened."""
TOOL: Final = "a command-line tool has opened it, and will soon have ended"
OPEN_S: Final = 30.0
"""Shortest time in seconds that a new engine waits for the owner, which may be opening a large store."""
START_S: Final = 30.0
"""Longest time in seconds for which deliveries are held back while the server of the followers starts."""
LASTS_S: Final = 1.0
"""A warning is logged if the connection is lost for this many seconds."""
SURE_S: Final = 0.1
"""Seconds for which the record of a process that does not share must stay unchanged before it is believed."""

FOLLOWED_FILE: Final = "state.followed"
"""This file exists from the owner's first follower on, until the next owner has seen it."""
SERVER: Final = "scopestate.server.followers"
"""The module of the server for followers: it is in a higher layer, and brings asyncio and picows."""

_SHARE_HINT: Final = "With `share: auto`, several processes can use it together"


class SharingStatus(Plain, msgspec.Struct, frozen=True):
    """An engine's part in sharing its directory: `sharing` of `stats()` and `health()`."""

    role: Literal["owner", "follower"]
    """`owner`: it has opened the directory. `follower`: it reaches the directory through the owner."""
    owner_pid: int | None
    """Process id of the owner, on `owner_host`; None: no process owns the directory at this moment."""
    owner_host: str
    since: str
    """When the owner opened the directory, in UTC, as `2026-01-31T12:00:00Z`."""
    followers: int | None
    """How many engines follow; None in a follower, which does not know the number."""
    taken_over: bool = False
    """Whether this engine has followed before it became the owner."""
    alone: str | None = None
    """Why the owner does not let others follow; None: it does."""


class Serving(Protocol):
    """The server of an owner, as this module uses it."""

    def run(self) -> None:
        """Serve on this thread until `stop` is called on another one."""

    def end(self) -> None:
        """Close every connection and make `run` return. Idempotent; does not wait."""

    def followers(self) -> int:
        """Return how many engines follow."""

    def hold(self, timeout_s: float, *, handlers_may: bool) -> None:
        """Begin no more calls of followers, and wait until those that were begun are answered."""

    def abandon(self) -> None:
        """In a forked child: leave every connection to the parent."""


class Sharing:
    """One engine's part in sharing a directory. Every method may be called from any thread."""

    def __init__(self, config: Config, durability_of: Callable[[str], Durability], *, tool: bool = False) -> None:
        """`config` has a directory. `tool`: follow if the directory is in use, and let no other engine follow."""
        self.directory = ""
        """The real path of the directory; "" before `open`."""
        self._kv = config.adapter.kv
        self._call_timeout_ms = config.limits.call_timeout_ms
        self._settings = _settings_of(config)
        self._durability_of = durability_of
        self._tool = tool
        self._known_owner = 0
        self._pid = os.getpid()
        self._role: Literal["owner", "follower"] = "owner"
        self._taken_over = False
        self._problem = ""
        """Why a follower could not open the store after the owner had ended, or why an owner serves no others now.

        "": neither is so.
        """
        self._alone: str | None = None
        """Why this engine does not share the directory; None: it does."""
        self._follower: BridgeBackend | None = None
        self._parts: Callable[[], Parts | None] = lambda: None
        self._engine: Callable[[], Engine | None] = lambda: None
        self._store: FileAdapter | None = None
        self._listener: Listener | None = None
        self._server: Serving | None = None
        self.succeeds = False
        """True for an owner whose predecessor had followers: they connect with their cursors, and with the events that
        they are handling."""
        self._wakers: tuple[socket.socket, ...] = ()
        self._serving: threading.Thread | None = None
        self._watching: threading.Thread | None = None
        self._lost: Inbox[None] = Inbox()
        """Wakes the thread of a follower when the connection to the owner may be lost, or when the engine closes."""
        self._reason = ""
        """Why there is no connection."""
        self._ends = False
        """Whether the engine closes."""

    # ---------------------------------------------------------------------------------------------------------- opening

    def open(self) -> Backend:
        """Open the directory, or follow its owner. Raises StorageError, and StoreLocked if neither works."""
        from scopestate.persistence.sqlite.opening import open_directory  # noqa: PLC0415 - SQLite takes 12 ms to import

        self.directory = open_directory(self._kv.file_path)
        self._alone = _why_alone(self._kv, self.directory)
        try:
            return self._own()
        except StoreLocked as locked:
            # Perhaps it is held by an engine that the program has dropped and that is just being closed.
            if wait_for_dropped():
                with contextlib.suppress(StoreLocked):
                    return self._own()
            if self._alone is not None:
                raise _refused(locked, f"this engine cannot: {self._alone}", self._alone) from locked.__cause__
        return self._follow()

    def _own(self, *, existing: bool = False) -> Backend:
        """Open the store. Raises StoreLocked and StorageError. `existing`: as `FileAdapter`."""
        from scopestate.persistence.sqlite.adapter import FileAdapter  # noqa: PLC0415 - as in `open`
        from scopestate.persistence.sqlite.lock import Terms  # noqa: PLC0415 - as in `open`

        if existing and not os.path.isdir(self.directory):
            raise StoreUnusable(f"the directory {self.directory} is gone: restore it")
        alone = TOOL if self._tool else self._alone
        terms = Terms(alone, self._tool, self._settings)
        self._store = FileAdapter(self.directory, terms=terms, existing=existing)
        self.succeeds = self._follower is not None or os.path.exists(self._mark)
        return LocalBackend(self._store, self._durability_of)

    @property
    def follows(self) -> bool:
        """Whether another engine owns the directory, so that calls go over a connection."""
        return self._role == "follower"

    @property
    def _mark(self) -> str:
        """The file that says that the owner has or had followers. An owner that closes without any removes it."""
        return os.path.join(self.directory, FOLLOWED_FILE)

    def _follow(self) -> Backend:
        """Connect to the owner; if it ends meanwhile, open the directory. Raises StoreLocked and StorageError."""
        from scopestate.persistence.bridge.backend import BridgeBackend  # noqa: PLC0415 - brings a WebSocket library
        from scopestate.persistence.bridge.options import BridgeOptions  # noqa: PLC0415 - as above

        wait_ms = self._kv.connect_wait_ms
        wait_s = max(wait_ms / 1000, OPEN_S)
        timeout_ms = self._call_timeout_ms * 2 // 3 or 20_000  # before the engine's own, whose error says less
        options = BridgeOptions(
            connect_wait_ms=wait_ms, call_timeout_ms=max(1, min(timeout_ms, 20_000)), events="remote"
        )
        follower = BridgeBackend(options, self._find, on_lost=self._note_lost, describe=self._describe_owner)
        try:
            backend = self._wait_for_owner(follower, time.monotonic() + wait_s)
        except BaseException:
            follower.close()
            raise
        if backend is not follower:
            follower.close()
            return backend
        self._role, self._follower = "follower", follower
        self._compare_settings()
        return follower

    def _wait_for_owner(self, follower: BridgeBackend, deadline: float) -> Backend:
        pause_s, alone_since = FIRST_PAUSE_S, 0.0
        while True:
            # Short at first: a connection takes a few milliseconds.
            until = time.monotonic() + pause_s
            while time.monotonic() < until:
                if follower.connected:
                    return follower
                time.sleep(0.001)
            pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)
            try:
                return self._own()
            except StoreLocked as locked:
                now = time.monotonic()
                # The record may be that of an earlier process, until the process that has the lock has written its own.
                holder = self._holder()
                if locked.alone is None or holder is None or holder.passing or not holder.may_live():
                    alone_since = 0.0
                else:
                    alone_since = alone_since or now
                sure = alone_since > 0 and now - alone_since >= SURE_S
                if locked.alone is not None and (sure or now >= deadline):
                    raise _refused(locked, _why_the_owner(locked), locked.alone) from locked.__cause__
                if now >= deadline:
                    silent = f"it does not answer on its socket{self._why_silent(holder)}"
                    raise _refused(locked, silent, silent) from locked.__cause__

    def start(self, engine: Engine) -> None:
        """Serve the followers or watch the owner, now that the engine is complete."""
        self._engine, self._parts = weakref.ref(engine), weakref.ref(engine._parts)
        if self._role == "owner":
            self._serve()
        else:
            self._watching = threading.Thread(target=self._watch_owner, name="scopestate-follower", daemon=True)
            self._watching.start()

    # ----------------------------------------------------------------------------------------------------- as the owner

    def _serve(self) -> None:
        """Listen. Everything else is done when a follower connects."""
        if self._alone is not None:
            log.info("%s is not shared with other processes: %s", self.directory, self._alone)
            return
        from socket import socketpair  # noqa: PLC0415 - not needed where nothing is shared

        from scopestate.persistence.sharing.sockets import Listener  # noqa: PLC0415 - as above

        try:
            self._listener = Listener(self.directory)
            self._wakers = socketpair()
            serving = threading.Thread(target=self._wait_for_followers, name="scopestate-owner", daemon=True)
            serving.start()
        except (OSError, RuntimeError) as error:  # RuntimeError: no more threads can be started
            if self._listener is not None:
                self._listener.close()
            what = "socket can be made in" if isinstance(error, OSError) else "thread can be started for"
            self._alone = f"no {what} {self.directory}: {error}"
            log.warning("other processes cannot use the store %s with this one: %s", self.directory, self._alone)
            if self._store is not None:
                self._store.note_alone(self._alone)
            return
        self._serving = serving

    def _wait_for_followers(self) -> None:
        """Serve the followers. If that fails, try again a moment later: this engine stays the owner."""
        told = False
        while not self._ends:
            try:
                self._serve_followers()
            except Exception as error:
                if not told:
                    told = True
                    log.exception("the engines of other processes cannot be served in %s now", self.directory)
                self._problem = f"the engines of other processes cannot be served now: {error}"
                if self._listener is not None:
                    self._listener.close()  # otherwise connecting engines would wait without end
                self._wakers[0].settimeout(RETRY_S)
                with contextlib.suppress(OSError):
                    self._wakers[0].recv(1)
            else:
                return

    def _serve_followers(self) -> None:
        from scopestate.persistence.sharing.sockets import Listener  # noqa: PLC0415 - as in `_serve`

        if self._problem:
            self._listener = Listener(self.directory)
            self._problem = ""
        listener = self._listener
        assert listener is not None
        with selectors.DefaultSelector() as selector:
            selector.register(listener.socket, selectors.EVENT_READ)
            selector.register(self._wakers[0], selectors.EVENT_READ)
            selector.select()
        engine = self._engine()
        if self._ends or engine is None:
            return
        with contextlib.suppress(OSError), open(self._mark, "wb"):
            pass
        engine._parts.await_claims(START_S)
        self._server = importlib.import_module(SERVER).FollowerServer(engine, listener)
        engine._parts.await_claims()
        if self._server is not None and not self._ends:
            self._server.run()

    def hold(self, timeout_s: float, *, handlers_may: bool) -> None:
        """Begin no more calls of followers before the engine closes, and wait for those that have begun."""
        if self._server is not None:
            self._server.hold(timeout_s, handlers_may=handlers_may)

    def has_followers(self) -> bool:
        """Whether any engine follows this one."""
        return self._server is not None and self._server.followers() > 0

    # ---------------------------------------------------------------------------------------------------- as a follower

    def _find(self) -> Address:
        from scopestate.persistence.sharing.sockets import find, why_not_private  # noqa: PLC0415 - as in `_serve`

        problem = self._problem or why_not_private(self.directory)
        if problem:
            raise NotConnected(problem)
        return find(self.directory)

    def _note_lost(self, reason: str) -> None:
        self._reason = reason
        if self._follower is not None:
            self._lost.put(None)

    def _describe_owner(self) -> str:
        """Say which process the owner is, for errors."""
        holder = self._holder()
        if holder is None:
            return f"no process owns {self.directory} now"
        stopped = _why_stopped(holder)
        return f"the owner of {self.directory} is {holder.describe()}{stopped and f'. {stopped}'}"

    def _why_silent(self, holder: Holder | None) -> str:
        """Return details about an owner that cannot be reached, for the end of a sentence; "" if none are known."""
        from scopestate.persistence.sharing.sockets import has_socket  # noqa: PLC0415 - as in `_serve`

        if holder is not None and (stopped := _why_stopped(holder)):
            return f". {stopped}"
        if not has_socket(self.directory):
            return f": {self.directory} has none. If its file was removed, start that process again"
        return self._reason and f" ({self._reason})"

    def _watch_owner(self) -> None:
        """Try to own the directory while the connection is lost. Runs on a thread of its own."""
        follower = self._follower
        assert follower is not None
        while True:
            self._lost.get()
            if follower.connected and not self._ends:
                continue  # one attempt to connect failed, but another one succeeded
            pause_s, began, told = FIRST_PAUSE_S, time.monotonic(), False
            while not self._ends and not follower.connected:
                if self._take_over(began):
                    return
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.5, RETRY_S if self._problem else LONGEST_PAUSE_S)
                if not told and time.monotonic() - began > LASTS_S:
                    told = True
                    log.warning(
                        "%s: calls wait for its owner: %s; %s", self.directory, self._reason, self._describe_owner()
                    )
            if self._ends:
                return
            self._note_owner(began, told)

    def _note_owner(self, began: float, told: bool) -> None:
        """Log that there is a connection again."""
        log.log(
            logging.WARNING if told else logging.INFO,
            "%s: connected again after %.0f ms; %s",
            self.directory,
            1000 * (time.monotonic() - began),
            self._describe_owner(),
        )
        self._compare_settings()

    def _compare_settings(self) -> None:
        """Log the settings in which the owner differs from this engine, once for each owner."""
        holder = self._holder()
        if holder is None or holder.pid == self._known_owner:
            return
        self._known_owner = holder.pid
        other = [name for name, mine in self._settings.items() if holder.settings.get(name, mine) != mine]
        if other:
            log.warning(
                "%s: process %d owns it, and its configuration applies; it differs from the one of this process in %s",
                self.directory,
                holder.pid,
                " and ".join(f"`{name}`" for name in other),
            )

    def _take_over(self, lost_at: float) -> bool:
        """Become the owner if no process is. False: try again later."""
        try:
            backend = self._own(existing=True)
        except StoreLocked:
            self._problem = ""
            return False
        except StorageError as error:
            if str(error) != self._problem:
                log.error("the owner of %s has ended, and it cannot be opened here: %s", self.directory, error)  # noqa: TRY400 - the text says it all
            self._problem = str(error)
            return False
        parts = self._parts()
        try:
            if parts is None or self._ends:
                raise EngineClosed
            parts.take_over(backend)
        except EngineClosed:
            self._store = None
            backend.close()
            return True
        except Exception as error:
            self._store = None
            backend.close()
            level = logging.ERROR if isinstance(error, ScopestateError) else logging.CRITICAL
            log.log(level, "this engine cannot own %s: %s", self.directory, error, exc_info=level == logging.CRITICAL)
            self._problem = f"this engine cannot own it: {error}"
            return False
        self._problem, self._role, self._taken_over, self._follower = "", "owner", True, None
        closed = self._store is not None and self._store.follows_close
        log.log(
            logging.INFO if closed else logging.WARNING,
            "%s: this process owns it now, after %.0f ms; the previous owner %s",
            self.directory,
            1000 * (time.monotonic() - lost_at),
            "ended normally" if closed else "was killed, or failed",
        )
        self._serve()
        return True

    # ----------------------------------------------------------------------------------------------------------- ending

    def end_following(self) -> None:
        """Take over the directory no more, as the engine closes. Waits for a take-over in progress. Idempotent."""
        self._ends = True
        self._lost.put(None)
        thread = self._watching
        if thread is not None and thread is not threading.current_thread():
            join(thread)

    def end(self) -> None:
        """Say goodbye to the followers and stop serving. The lock is released after this. Idempotent."""
        if os.getpid() != self._pid:
            return
        self.end_following()
        if self._role == "owner" and self._store is not None and not self.has_followers():
            with contextlib.suppress(OSError):
                os.unlink(self._mark)
        for waker in self._wakers[1:]:
            with contextlib.suppress(OSError):
                waker.send(b"x")
        if self._server is not None:
            self._server.end()
        if self._serving is not None:
            join(self._serving)
        if self._listener is not None:
            self._listener.close()
        for waker in self._wakers:
            waker.close()
        self._wakers = ()

    def disown(self) -> None:
        """In a forked child: leave the sockets to the parent."""
        if self._listener is not None:
            self._listener.abandon()
        if self._server is not None:
            self._server.abandon()
        if self._follower is not None:
            self._follower.abandon()

    # ----------------------------------------------------------------------------------------------------------- status

    @property
    def role(self) -> Literal["owner", "follower"]:
        """As in `SharingStatus`, without reading the directory."""
        return self._role

    def status(self) -> SharingStatus:
        """Return which process owns the directory, and how many engines follow."""
        holder = self._holder()
        owns = self._role == "owner"
        server = self._server
        return SharingStatus(
            self._role,
            None if holder is None else holder.pid,
            "" if holder is None else holder.host,
            "" if holder is None else holder.since,
            (0 if server is None else server.followers()) if owns else None,
            self._taken_over,
            self._alone if owns else None,
        )

    def problem(self) -> str | None:
        """Describe what is wrong now; None if nothing is."""
        if self._problem or self._role == "owner":
            return self._problem or None
        if not os.path.isdir(self.directory):
            return f"the directory {self.directory} was removed: its owner can no longer save what it holds"
        holder = self._holder()
        stopped = "" if holder is None else _why_stopped(holder)
        return f"calls wait for {self._describe_owner()}" if stopped else None

    def _holder(self) -> Holder | None:
        from scopestate.persistence.sqlite.lock import read_holder  # noqa: PLC0415 - as in `open`

        return read_holder(os.path.join(self.directory, "state.lock"))


def _settings_of(config: Config) -> dict[str, str]:
    """Return the settings that should be the same in all engines of a directory; otherwise the owner's apply."""
    limits = config.limits
    compared: dict[str, object] = {
        "durability": config.adapter.kv.durability,
        "save_interval_ms": config.adapter.kv.save_interval_ms,
        "scopes": config.scopes,
        "max_value_bytes": limits.max_value_bytes,
        "max_batch_bytes": limits.max_batch_bytes,
    }
    encode = msgspec.json.Encoder(enc_hook=_as_json).encode
    return {name: f"{crc32(encode(value)):08x}" for name, value in compared.items()}


def _as_json(value: object) -> object:
    """Return a value that stands for a schema; a type or a function is compared by its name."""
    return value.documents() if isinstance(value, JsonSchema) else getattr(value, "__qualname__", repr(value))


def _why_alone(kv: KvOptions, directory: str) -> str | None:
    """Return why an engine does not share its directory; None: it does."""
    from scopestate.persistence.sharing.sockets import why_not_private  # noqa: PLC0415 - only for stores of files

    if not kv.shares:
        return "its configuration says `share: never`"
    missing = [name for name in LIBRARIES if not _is_installed(name)]
    if missing:
        return (
            f"the extra `wire` is not installed in the process (no {' and no '.join(missing)}): "
            "pip install 'scopestate[wire]'"
        )
    return why_not_private(directory)


@functools.cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _why_stopped(holder: Holder) -> str:
    """Return a sentence about a process that is stopped; "" if it runs, or if that is not known."""
    from scopestate.persistence.sharing.sockets import is_stopped  # noqa: PLC0415 - as in `Sharing._serve`

    if not holder.is_here or not is_stopped(holder.pid):
        return ""
    return f"It is stopped (SIGSTOP): continue it (kill -CONT {holder.pid}) or end it (kill -9 {holder.pid})"


def _why_the_owner(locked: StoreLocked) -> str:
    """Say that the owner does not share the directory, and why."""
    from scopestate.persistence.sqlite.lock import NOT_SHARED  # noqa: PLC0415 - as in `Sharing.open`

    name = "the other process" if locked.pid is None else f"process {locked.pid}"
    why = f"{name} does not share it: {locked.alone}"
    return why if locked.alone in (TOOL, NOT_SHARED) else f"{why}. A change takes effect when {name} is started again"


def _refused(locked: StoreLocked, why: str, alone: str) -> StoreLocked:
    """Return the error for an engine that can neither open the directory nor follow; `why` says which one cannot."""
    return StoreLocked(
        f"{locked}. {_SHARE_HINT} (docs/how-to/sharing.md), but {why}", pid=locked.pid, host=locked.host, alone=alone
    )
