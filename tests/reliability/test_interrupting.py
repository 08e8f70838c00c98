"""The tool that interrupts code at every opcode: what it must not do itself."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from reliability import interrupting
from reliability.interrupting import interrupt_at


def called(value: Any) -> Any:
    return value


call_after_ten_lists = json.JSONDecoder(object_hook=called).scan_once
"""Calls `called` from C, behind allocations that may make a garbage collection due."""


@contextmanager
def collecting(threshold: int, callback: Any) -> Iterator[None]:
    """Have garbage collected as soon as so many objects are new, and `callback` called at each collection."""
    before = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(callback)
    gc.set_threshold(threshold, 1000, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(callback)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_in_a_garbage_collection_before_a_traced_call_leaves_the_call_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CPython 3.11 called a trace function that was freed in between: "'traceback' object is not callable"."""
    made: list[Any] = []

    class Traced(interrupting._Traced):
        def __init__(self, place: int) -> None:
            super().__init__(place)
            made.append(self)

    monkeypatch.setattr(interrupting, "_Traced", Traced)
    interrupted = 0

    def callback(phase: str, info: dict[str, int]) -> None:
        nonlocal interrupted
        if phase == "start" and made and sys._getframe(1).f_code is called.__code__ and not made[-1]._place:
            interrupted += 1
            made[-1]._place = made[-1].count + 10  # somewhere in the next line
            called(called(called(called(interrupted))))

    for threshold in range(20, 60, 5):
        kept: list[Any] = []

        def work() -> None:
            while len(kept) < 10:  # noqa: B023 - runs at once
                kept.append(call_after_ten_lists("[[], [], [], [], [], [], [], [], [], [], {}]", 0))  # noqa: B023 - as above

        with collecting(threshold, callback):
            interrupt_at(0, work, KeyboardInterrupt)
        assert len(kept) == 10
    # From CPython 3.12 on, garbage is collected between instructions, never within one.
    assert interrupted or sys.version_info >= (3, 12)
