"""Progress of long commands: a bar on standard error if that is a terminal. Also how Ctrl-C ends such commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, TypeVar

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from scopestate.cli.people import number
from scopestate.cli.terminal import shown, standard_error
from scopestate.signals import join

T = TypeVar("T")

Unit = Callable[[int, int | None], str]
"""Takes how much is done, and the total (None: not known). Returns both as text for people."""

REFRESHES_PER_S: Final = 5


def keys(done: int, total: int | None) -> str:
    """Return `1,200/5,000 keys`."""
    return f"{number(done)} keys" if total is None else f"{number(done)}/{number(total)} keys"


def size(done: int, total: int | None) -> str:
    """Return `1.2 MB/5.0 MB` for numbers of bytes."""
    return decimal(done) if total is None else f"{decimal(done)}/{decimal(total)}"


def percent(done: int, total: int | None) -> str:
    """Return `24 %`. For estimated totals: shows 100 % only if the total is reached exactly."""
    return f"{100 if done == total else min(100 * done // total, 99)} %" if total else ""


class Advance:
    """Records how much is done, and moves the bar if there is one. May be called from any thread."""

    def __init__(self, bar: Progress | None, doing: str, total: int | None) -> None:
        self.done = 0
        self._bar = bar
        self._task = bar.add_task(doing, total=total) if bar is not None else None

    def __call__(self, done: int) -> None:
        self.done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)


class _Amount(ProgressColumn):
    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        total = None if task.total is None else int(task.total)
        return Text(self._unit(int(task.completed), total), style="progress.download")


@contextmanager
def progress(doing: str, total: int | None, unit: Unit = keys) -> Iterator[Advance]:
    """Show the progress of a command on standard error, if that is a terminal. `total`: None if it is not known."""
    console = standard_error()
    if not console.is_terminal:
        yield Advance(None, doing, total)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _Amount(unit),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=REFRESHES_PER_S,
    ) as bar:
        yield Advance(bar, doing, total)


def run_beside(work: Callable[[], T], interrupt: Callable[[], object]) -> T:
    """Call `work` on a new thread, and return its result. Ctrl-C calls `interrupt`, which must make `work` end.

    For work in C code, during which Python handles no signals.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised on the thread that waits for the result
            errors.append(error)

    thread = threading.Thread(target=run, name="scopestate-command", daemon=True)
    try:
        thread.start()
        join(thread)
    except BaseException:
        interrupt()
        if thread.ident is not None:
            join(thread)
        raise
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def said_if_interrupted(left: object) -> Iterator[None]:
    """If the command is interrupted, print `left` as text: what the command has left behind at that moment."""
    try:
        yield
    except KeyboardInterrupt:
        standard_error().print(shown(f"interrupted: {left}"), markup=False)
        raise


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the command as Ctrl-C does, with its cleanup."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # An ignored signal, such as SIGHUP under nohup, stays ignored.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
