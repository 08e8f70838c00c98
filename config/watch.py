"""Hot reload: follows the configuration file and hands over each valid change.

The files of schemas that it names are followed with it. The folders are watched, not the files: editors replace a file
by renaming another over it, and Kubernetes swaps a symlink (`engine.yaml -> ..data/engine.yaml`,
`..data -> ..2024_05_01`), so each folder that holds a link on the way is watched for that link's name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING

from scopestate.config.loader import examine_bytes, read_bytes
from scopestate.config.schema import Config
from scopestate.errors import ConfigError
from scopestate.paths import expand_home
from scopestate.signals import join

if TYPE_CHECKING:
    from watchdog.events import FileSystemEvent
    from watchdog.observers.api import BaseObserver, ObservedWatch

log = logging.getLogger("scopestate.config")

_MAX_LINKS = 40  # as in the kernel: with more it is a loop
_MAX_QUIET_PERIODS = 20  # then a file that is written without a pause is read anyway


class ConfigWatcher:
    """Calls `apply` with each new valid configuration of a file and `report` with each error, on one thread of its own.

    A file that is wrong, gone or refused by `apply` changes nothing: `report` is called once per content, and the
    watcher goes on. Content equal to what was read last is ignored, even if the environment has changed; otherwise
    `${VAR}` is read again each time. Modules that `functions:` has already imported are not read again. `start` and
    `stop` may be called from any thread, `stop` also from a callback.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        apply: Callable[[Config], None],
        report: Callable[[ConfigError], None],
        *,
        running: Config | None = None,
        quiet_s: float = 0.1,
        recheck_s: float = 5.0,
    ) -> None:
        """Prepare; nothing is watched before `start`.

        Args:
            path: The file; it need not exist at the moment.
            apply: Gets the new configuration. What it raises is logged and reported.
            report: Gets the error. What it raises is logged.
            running: The configuration in use. If the file differs from it at `start`, the file is applied.
            quiet_s: Seconds without a change before the file is read, so that no half-written file is read.
            recheck_s: Seconds between looks at the file that need no event: for network file systems, which send none,
                and for a folder that was itself replaced.
        """
        from watchdog.events import FileSystemEventHandler  # noqa: PLC0415 # `import scopestate` must not pay for it

        watcher = self

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                watcher._on_event(event)

        self._file = os.path.abspath(expand_home(path))
        self._apply = apply
        self._report = report
        self._running = running
        self._beside: frozenset[str] = frozenset()
        """Schema files that the last content named. A change of one counts as a change of the file."""
        self._quiet_s = quiet_s
        self._recheck_s = recheck_s
        self._handler = Handler()
        self._observer: BaseObserver  # made by `start`: from then on it holds a thread and a file descriptor
        # Only the watcher's own thread changes these, and `start` before that thread exists.
        self._watches: dict[str, tuple[tuple[int, int], ObservedWatch]] = {}
        self._paths: frozenset[str] = frozenset()
        self._seen: tuple[bytes | str, ...] | None = None
        self._signature: tuple[tuple[int, ...] | None, ...] | None = None
        self._calm = True  # whether the last wait for quiet succeeded
        # Guards the rest. Never held while something else is called.
        self._changed = threading.Condition()
        self._changes = 0
        self._handled = 0
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self) -> None:
        """Start watching; every change from here on is seen. A watcher starts once.

        Raises:
            RuntimeError: started or stopped before.
        """
        thread = threading.Thread(target=self._run, name="scopestate-config-watch", daemon=True)
        with self._changed:
            if self._thread is not None or self._stopping:
                raise RuntimeError("this ConfigWatcher was started or stopped before; make a new one")
            self._thread = thread
        self._observe()
        if self._running is None:
            self._signature = self._stat()
            content = self._read()
            self._seen = self._seen_now(content)
        else:
            self._handled = -1  # the first look needs no event, and compares with `running`
        thread.start()

    def stop(self) -> None:
        """Stop, and wait for the watcher's thread; nothing is called after that. Idempotent.

        Within a callback it cannot wait for itself: then that callback is the last one. The caller must not hold a lock
        that a callback needs.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread() and thread.ident is not None:
            join(thread)

    # The watcher's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_change():
                # A wrong file may still be in the middle of a write: the next quiet period decides.
                retried = False
                while self._wait_for_quiet() and not self._look(last_try=retried and self._calm):
                    retried = True
        finally:
            self._observer.stop()
            self._observer.join()

    def _wait_for_change(self) -> bool:
        """Wait until something changed; False when stopping."""
        while True:
            with self._changed:
                changed = self._changed.wait_for(
                    lambda: self._stopping or self._changes != self._handled, timeout=self._recheck_s
                )
                if self._stopping:
                    return False
            if changed:
                return True
            self._arm()
            if self._stat() != self._signature:
                return True

    def _wait_for_quiet(self) -> bool:
        """Wait until nothing has changed for `quiet_s`, or changes do not stop; False when stopping."""
        deadline = time.monotonic() + _MAX_QUIET_PERIODS * self._quiet_s
        with self._changed:
            noisy = True
            while noisy and not self._stopping and time.monotonic() < deadline:
                self._handled = self._changes
                noisy = self._changed.wait_for(
                    lambda: self._stopping or self._changes != self._handled, timeout=self._quiet_s
                )
            self._calm = not noisy
            return not self._stopping

    def _look(self, *, last_try: bool) -> bool:
        """Read the file and act on it. False if the file is wrong and `last_try` is false: then nothing was done."""
        # Watch first, then read: a change between the two is seen as an event, not lost.
        self._arm()
        self._signature = self._stat()
        content = self._read()
        seen = self._seen_now(content)
        if seen == self._seen:
            return True
        try:
            if isinstance(content, ConfigError):
                raise content
            examined = examine_bytes(content, self._file)
            if examined.files != self._beside:
                self._beside = frozenset(examined.files)
                # As above: watched first, then read.
                self._arm()
                self._signature = self._stat()
                seen = self._seen_now(content)
                examined = examine_bytes(content, self._file)
            config = examined.first()
        except ConfigError as error:
            if not last_try:
                return False
            self._seen, self._running = seen, None
            self._tell(error)
            return True
        self._seen = seen
        known, self._running = self._running, None
        if config != known:
            self._hand_over(config)
        return True

    def _hand_over(self, config: Config) -> None:
        if self._stopping:
            return
        try:
            self._apply(config)
        except ConfigError as error:
            self._tell(error)
        except Exception as error:
            log.exception("%s: the new configuration could not be applied", self._file)
            failure = ConfigError(f"the new configuration could not be applied: {error!r}", file=self._file)
            failure.__cause__ = error
            self._tell(failure)
        else:
            log.info("%s: the new configuration was applied", self._file)

    def _tell(self, error: ConfigError) -> None:
        if self._stopping:
            return
        log.error("%s; the running configuration stays", error)
        try:
            self._report(error)
        except Exception:
            log.exception("%s: reporting the error above failed", self._file)

    def _read(self) -> bytes | ConfigError:
        try:
            return read_bytes(self._file)
        except ConfigError as error:
            return error

    def _seen_now(self, content: bytes | ConfigError) -> tuple[bytes | str, ...]:
        """Return what was read, with the content of the schema files."""
        seen: list[bytes | str] = [content if isinstance(content, bytes) else str(content)]
        for file in sorted(self._beside):
            try:
                seen.append(read_bytes(file))
            except ConfigError as error:
                seen.append(str(error))
        return tuple(seen)

    def _stat(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple([_signature(file) for file in (self._file, *sorted(self._beside))])

    # What is watched.

    def _on_event(self, event: FileSystemEvent) -> None:
        """Called on watchdog's threads. Reading the file makes events too: those must not count."""
        if event.event_type in ("opened", "closed_no_write"):
            return
        if os.fsdecode(event.src_path) in self._paths or os.fsdecode(event.dest_path) in self._paths:
            with self._changed:
                self._changes += 1
                self._changed.notify_all()

    def _observe(self) -> None:
        """Start an observer; if the system has no more event watches, one that polls every second."""
        from watchdog.observers import Observer  # noqa: PLC0415 # `import scopestate` must not pay for it
        from watchdog.observers.polling import PollingObserver  # noqa: PLC0415 # the same

        observer: BaseObserver | None = None
        try:
            self._observer = observer = Observer()
            observer.start()
            self._arm(strict=True)
        except OSError as error:
            log.warning("%s: no file events (%s); looking at the file every second instead", self._file, error)
            if observer is not None:
                observer.stop()
                if observer.is_alive():
                    observer.join()
            self._watches.clear()
            self._recheck_s = min(self._recheck_s, 1.0)
            self._observer = PollingObserver()
            self._observer.start()
            self._arm()

    def _arm(self, *, strict: bool = False) -> None:
        """Watch the folders that matter now. Unless `strict`, one that cannot be watched waits for the next recheck."""
        points = watch_points(self._file).union(*map(watch_points, self._beside))
        folders = {folder: identity for folder, _ in points if (identity := _identity(folder)) is not None}
        self._paths = frozenset(os.path.join(*point) for point in points)
        for folder, (identity, watch) in list(self._watches.items()):
            if folders.get(folder) != identity:
                del self._watches[folder]
                with contextlib.suppress(KeyError, OSError):  # the folder is gone, and its watch may be as well
                    self._observer.unschedule(watch)
        for folder, identity in folders.items():
            if folder not in self._watches:
                try:
                    watch = self._observer.schedule(self._handler, folder, recursive=False)
                except OSError as error:
                    if strict:
                        raise
                    log.debug("%s: folder %s cannot be watched now: %s", self._file, folder, error)
                else:
                    self._watches[folder] = identity, watch


def watch_points(path: str) -> set[tuple[str, str]]:
    """Return the (folder, name) pairs whose change can change what the absolute `path` leads to.

    They are each symlink on the path, and the file itself, or the first part of the path that does not exist.
    """
    current, *rest = PurePath(path).parts
    points: set[tuple[str, str]] = set()
    pending = rest[::-1]
    links = 0
    while pending:
        name = pending.pop()
        if name == "..":
            current = os.path.dirname(current)
            continue
        step = os.path.join(current, name)
        try:
            target = PurePath(os.readlink(step))
        except OSError:  # not a link, or not there
            if not pending or not os.path.lexists(step):
                points.add((current, name))
                break
            current = step
            continue
        points.add((current, name))
        links += 1
        if links > _MAX_LINKS:
            break
        parts = target.parts
        if target.is_absolute():
            current, parts = parts[0], parts[1:]
        pending.extend(reversed(parts))
    return points


def _signature(file: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino
