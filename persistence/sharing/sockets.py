"""The socket in a directory on which its owner serves other processes, and how they find it.

It is a Unix socket, `state.sock`. On a system without such sockets it is a port of 127.0.0.1, with the address and a
random token in `state.address`. Both have the permissions 0600, in a directory that only its owner may use.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import stat
import struct
import sys
from typing import Final

from scopestate.errors import NotConnected
from scopestate.persistence.sqlite.files import PRIVATE
from scopestate.wire.address import Address, usable_path

log = logging.getLogger("scopestate.sharing")

SOCKET_FILE: Final = "state.sock"
ADDRESS_FILE: Final = "state.address"
BACKLOG: Final = 1024

_NEW: Final = ".new"
"""Appended to the name of a file until it is complete. Only the owner makes files here."""
_ADDRESS_BYTES: Final = 4096
_UCRED: Final = struct.Struct("3i")
_XUCRED: Final = struct.Struct("2Ih16I")
_LOCAL_PEERCRED: Final = 1


class Listener:
    """The listening socket of the owner of a directory."""

    def __init__(self, directory: str) -> None:
        """Listen in `directory`, whose lock the caller has. Leaves nothing behind if it raises OSError."""
        self._directory = directory
        self.token: str | None = None
        """The token that a client must send; None: the system tells its user."""
        _remove(directory, SOCKET_FILE, SOCKET_FILE + _NEW, ADDRESS_FILE, ADDRESS_FILE + _NEW)
        try:
            self.socket = _listen_unix(directory)
        except (OSError, AttributeError) as error:  # AttributeError: the system has no such sockets
            log.info("%s: no Unix socket can be made there (%s): serving on 127.0.0.1 instead", directory, error)
            self.token = secrets.token_urlsafe(32)
            self.socket = _listen_loopback(directory, self.token)
        self._name = SOCKET_FILE if self.token is None else ADDRESS_FILE

    def refusal(self, accepted: socket.socket) -> str | None:
        """Return why the process at the other end may not connect; None if it may: it is of this user, or of root."""
        if self.token is not None:
            return None  # it must send the token
        try:
            user = peer_user(accepted)
        except OSError as error:
            return f"the system does not say which user it is: {error}"
        return None if user in (None, 0, os.geteuid()) else f"it is of user {user}, and this one of {os.geteuid()}"

    def close(self) -> None:
        """Stop listening and remove the file. For the holder of the lock. Idempotent."""
        self.socket.close()
        _remove(self._directory, self._name)

    def abandon(self) -> None:
        """In a forked child: leave the socket to the parent.

        As long as a copy of it is open, it accepts connections that are never answered. Its number stays in use: the
        parent's objects also exist here, and would close another file that got the number.
        """
        replace_by_nothing(self.socket.fileno())


def find(directory: str) -> Address:
    """Return where the owner of `directory` serves. Raises NotConnected: nothing serves there now."""
    path = os.path.join(directory, SOCKET_FILE)
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            return Address.of_path(path)
        raise NotConnected(f"{path} is not a socket: remove it")
    except FileNotFoundError:
        return _read_address(directory)
    except OSError as error:
        raise NotConnected(f"cannot look for {path}: {error.strerror or error}") from error


def has_socket(directory: str) -> bool:
    """Return whether an engine serves in `directory`, or was killed while it did."""
    return any(os.path.lexists(os.path.join(directory, name)) for name in (SOCKET_FILE, ADDRESS_FILE))


def why_not_private(directory: str) -> str | None:
    """Return why a directory is not safe to share, with what to do; None if it is, or does not exist yet."""
    if os.name == "nt":  # pragma: no cover - has no such permissions
        return None
    try:
        found = os.stat(directory)
    except OSError:
        return None
    if found.st_uid not in (0, os.geteuid()):
        return (
            f"{directory} belongs to user {found.st_uid}, and this process is of user {os.geteuid()}: run every "
            "process that uses it as that user"
        )
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        return (
            f"other users may enter {directory} (its mode is {mode:04o}), and what is shared there would be theirs "
            f"too: chmod 700 {directory}"
        )
    return None


def peer_user(connected: socket.socket) -> int | None:
    """Return the id of the user at the other end of a Unix socket; None: this system does not tell. Raises OSError."""
    if hasattr(socket, "SO_PEERCRED"):
        _, user, _ = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return int(user)
    if sys.platform == "darwin" or "bsd" in sys.platform:  # pragma: no cover - the tests run on Linux
        fields = _XUCRED.unpack(connected.getsockopt(0, _LOCAL_PEERCRED, _XUCRED.size))
        return int(fields[1])
    return None  # pragma: no cover - the directory is private in any case


def replace_by_nothing(descriptor: int) -> None:
    """Make a descriptor refer to `/dev/null` instead of its file."""
    if descriptor < 0:
        return
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)


# ---------------------------------------------------------------------------------------------------------- listening


def _listen_unix(directory: str) -> socket.socket:
    path = os.path.join(directory, SOCKET_FILE)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with usable_path(path + _NEW) as usable:
            listener.bind(usable)
        os.chmod(path + _NEW, PRIVATE)
        listener.listen(BACKLOG)
        os.rename(path + _NEW, path)
    except BaseException:
        listener.close()
        _remove(directory, SOCKET_FILE + _NEW)
        raise
    return listener


def _listen_loopback(directory: str, token: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    path = os.path.join(directory, ADDRESS_FILE)
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(BACKLOG)
        content = json.dumps({"url": f"ws://127.0.0.1:{listener.getsockname()[1]}", "token": token})
        descriptor = os.open(path + _NEW, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(content + "\n")
        os.replace(path + _NEW, path)
    except BaseException:
        listener.close()
        _remove(directory, ADDRESS_FILE + _NEW)
        raise
    return listener


def _remove(directory: str, *names: str) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))


# ------------------------------------------------------------------------------------------------------------ finding


def _read_address(directory: str) -> Address:
    path = os.path.join(directory, ADDRESS_FILE)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            problem = _untrusted(os.fstat(descriptor))
            content = os.read(descriptor, _ADDRESS_BYTES)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise NotConnected(f"no process serves {directory} now") from error
    except OSError as error:
        raise NotConnected(f"cannot read {path}: {error.strerror or error}") from error
    if problem is not None:
        raise NotConnected(f"{path} is not used, because {problem}: remove it")
    try:
        found = json.loads(content)
        return Address(found["url"], token=found["token"])
    except (ValueError, TypeError, KeyError) as error:
        raise NotConnected(f"{path} does not hold an address: {error}") from error


def _untrusted(found: os.stat_result) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if os.name != "nt" and (found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o077):
        return "other users may have written it"
    return None


def is_stopped(pid: int) -> bool:
    """Return whether a process of this host is stopped, as by SIGSTOP; False if the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.ENOTDIR):
            log.debug("reading the state of process %d: %s", pid, error)
        return False
