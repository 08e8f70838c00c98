"""The files of `store export` and `store import`: written completely or not at all, checked before they are used."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Final

from scopestate.cli.progress import progress, size
from scopestate.cli.terminal import ReaderGone, standard_output
from scopestate.errors import DeserializationError, StorageError
from scopestate.paths import expand_home
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.transfer import KeyLine, Reader, read_lines

_TOLD_BYTES: Final = 256 * 1024


class Output:
    """The destination of an export, and a remark about it for the report."""

    def __init__(self, write: Callable[[bytes], object], remark: str = "") -> None:
        self.write = write
        self.remark = remark


@contextmanager
def output(to: str, reader: Reader) -> Iterator[Output]:
    """Open the destination of an export; `-` is standard output.

    A regular file is replaced by the complete export at the end, and keeps its mode and owner. If it cannot be
    replaced, its content is overwritten at the end. Other destinations, such as a pipe or a device, are written
    directly.
    """
    if to == "-":
        with standard_output() as write:
            yield Output(write)
        return
    if not to:
        raise StorageError("the file to write has no name; name one, or `-` for standard output")
    try:
        status = os.stat(expand_home(to))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise _unwritable(to, error) from error
        if to.endswith(os.sep):
            raise StorageError(f"{to} cannot be written: there is no such directory") from error
        status = None
    path = os.path.realpath(expand_home(to))
    if status is not None and isinstance(reader, StoreReader) and reader.is_own_file(path):
        raise StorageError(f"{to} is a file of the store that is exported; write to another one")
    # These names stand for open files, as does a file that is standard output.
    if status is not None and (
        not stat.S_ISREG(status.st_mode)
        or to.startswith(("/dev/fd/", "/dev/std", "/proc/"))
        or (sys.stdout is not None and _is_same(status, sys.stdout))
    ):
        with _opened_directly(to, status) as write:
            yield Output(write)
        return
    try:
        with _beside(path, status) as (file, finish):
            yield Output(file.write, "" if status is None else ", overwriting what was there")
            finish()
    except OSError as error:
        raise _unwritable(to, error) from error


@contextmanager
def _opened_directly(to: str, status: os.stat_result) -> Iterator[Callable[[bytes], object]]:
    """Open something that is not a regular file for writing, or standard output if `to` names it."""
    if sys.stdout is not None and _is_same(status, sys.stdout):
        with standard_output() as write:
            yield write
        return
    if stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{to} cannot be written: it is a directory; name a file in it")
    try:
        # Neither create nor truncate it: it exists, and other programs may have it open. Opening a pipe waits for its
        # reader.
        with open(os.open(expand_home(to), os.O_WRONLY), "wb") as stream:
            yield stream.write
    except BrokenPipeError as error:
        raise ReaderGone from error
    except OSError as error:
        raise _unwritable(to, error) from error


def _is_same(status: os.stat_result, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(status, os.fstat(stream.fileno()))
    except (OSError, ValueError):
        return False


@contextmanager
def _beside(path: str, status: os.stat_result | None) -> Iterator[tuple[IO[bytes], Callable[[], object]]]:
    """Yield a new file to write to, and a function that gives it the name `path` afterwards."""
    folder, name = os.path.split(path)
    try:
        # Only the beginning of a long name: with the additions it could exceed the limit of the file system.
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name[:40]}.", delete=False)  # noqa: SIM115 - see below
    except OSError:
        if status is None or not os.access(path, os.W_OK):
            raise
        # No file can be created in the folder, but this one may be written.
        with tempfile.TemporaryFile() as copy:
            yield copy, lambda: _copy_into(path, copy)
        return
    with file:
        try:

            def finish() -> None:
                file.flush()
                if status is not None:
                    _take_after(file.fileno(), status)
                os.fsync(file.fileno())
                try:
                    os.replace(file.name, path)
                except OSError as error:
                    # A file that is a mount point, as in containers, cannot be replaced.
                    if error.errno not in (errno.EBUSY, errno.EXDEV):
                        raise
                    _copy_into(path, file)
                    os.unlink(file.name)

            yield file, finish
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def _take_after(descriptor: int, status: os.stat_result) -> None:
    """Give a file the mode of the file that it replaces, and also its owner if this process may."""
    if hasattr(os, "fchown"):
        with suppress(OSError):
            os.fchown(descriptor, status.st_uid, status.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def _copy_into(path: str, copy: IO[bytes]) -> None:
    """Overwrite a file in place with the whole of `copy`."""
    copy.flush()
    copy.seek(0)
    with open(path, "r+b") as target:
        shutil.copyfileobj(copy, target)
        target.truncate()
        target.flush()
        os.fsync(target.fileno())


def _unwritable(to: str, error: OSError) -> StorageError:
    return StorageError(f"{to} cannot be written: {error.strerror or error}")


class Source:
    """The file of an import. It is read twice: to check it, and to import it."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name

    def size(self) -> int:
        """Return its size in bytes. Raises StorageError if it cannot be read."""
        try:
            return self._stream.seek(0, os.SEEK_END)
        except OSError as error:
            raise _unreadable(self._name, error) from error

    def count_keys(self, check: Callable[[KeyLine], object] = bool, advance: Callable[[int], object] = bool) -> int:
        """Read the whole file and return its number of keys. Raises StorageError if it is not an export.

        Each key is given to `check`, which may refuse it. `advance(bytes)` is called from time to time, with what was
        read so far.
        """
        keys = 0
        try:
            for item in read_lines(_counted(self.lines(), advance)):
                if isinstance(item, KeyLine):
                    keys += 1
                    check(item)
            return keys
        except DeserializationError as error:
            raise StorageError(f"{_named(self._name)}: {error}", code=error.code) from error

    def lines(self) -> Iterator[bytes]:
        """Yield the lines from the beginning."""
        try:
            self._stream.seek(0)
            yield from self._stream
        except OSError as error:
            raise _unreadable(self._name, error) from error


def _counted(lines: Iterator[bytes], advance: Callable[[int], object]) -> Iterator[bytes]:
    """Yield the lines, and tell `advance` how many bytes they have."""
    done = told = 0
    for line in lines:
        yield line
        done += len(line)
        if done - told >= _TOLD_BYTES:
            advance(done)
            told = done
    advance(done)


@contextmanager
def source_of(source: str) -> Iterator[Source]:
    """Open the file of an import; `-` is standard input. A source that cannot be read twice is copied first."""
    with ExitStack() as stack:
        try:
            if source == "-":
                if sys.stdin is None or sys.stdin.closed:
                    raise StorageError("standard input is closed: there is nothing to import")
                stream: IO[bytes] = sys.stdin.buffer
            else:
                stream = stack.enter_context(open(expand_home(source), "rb"))
            if source == "-" or not stream.seekable():
                stream = _copied(stream, source, stack.enter_context(_temporary(source)))
        except OSError as error:
            raise _unreadable(source, error) from error
        yield Source(stream, source)


def _temporary(source: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise _uncopied(source, error) from error


def _copied(stream: IO[bytes], source: str, copy: IO[bytes]) -> IO[bytes]:
    """Copy a source that can be read only once. A failure of the temporary file is reported as such."""
    done = 0
    with progress(f"reading {_named(source)}", None, size) as advance:
        while piece := stream.read(shutil.COPY_BUFSIZE):  # type: ignore[attr-defined]  # missing in typeshed
            try:
                copy.write(piece)
                copy.flush()
            except OSError as error:
                with suppress(OSError):
                    copy.close()  # it cannot write what is left in its buffer
                raise _uncopied(source, error) from error
            done += len(piece)
            advance(done)
    copy.seek(0)
    return copy


def _uncopied(source: str, error: OSError) -> StorageError:
    return StorageError(
        f"{_named(source)} could not be copied to a temporary file in {tempfile.gettempdir()}: "
        f"{error.strerror or error}. Make room there, or set TMPDIR to another directory"
    )


def _unreadable(source: str, error: OSError) -> StorageError:
    return StorageError(f"{_named(source)} cannot be read: {error.strerror or error}")


def _named(source: str) -> str:
    return "standard input" if source == "-" else source
