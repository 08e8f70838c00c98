"""Many durable triggers beside many writers: each comes to its end, and neither memory nor the database grows on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from effort import size
from load.child import settings
from reliability.figures import record
from reliability.living import until

from scopestate import Engine, StateEvent

CONSUMERS = 24
WRITERS = 16
SECONDS = size(3, 60)
PACE_S = 0.01
"""What a writer waits between its writes: 1,600 writes a second in all, of which each consumer gets a part."""


def held_mib() -> float:
    """The memory that this process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def on_disk_mib(directory: Path) -> float:
    """The size of all files of a store."""
    return sum(file.stat().st_size for file in directory.iterdir()) / 2**20


@pytest.mark.timeout(300)
def test_24_consumers_keep_up_with_16_writers_and_what_is_kept_is_bounded(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    handled = [0] * CONSUMERS
    last: list[dict[str, int]] = [{} for _ in range(CONSUMERS)]
    over, wrote = threading.Event(), [0] * WRITERS
    sizes: list[tuple[float, float]] = []
    with Engine.from_config(settings(str(directory), interval_ms=100)) as engine:
        for number in range(CONSUMERS):

            def handle(event: StateEvent, number: int = number) -> None:
                assert event.new_value == last[number].get(event.key, 0) + 1, "in order, each once"
                last[number][event.key] = event.new_value
                handled[number] += 1

            engine.on_change(scope=f"orders-{number % 4}", durable=f"consumer-{number}")(handle)

        def write(writer: int) -> None:
            while not over.wait(PACE_S):
                wrote[writer] += 1
                engine.set(f"orders-{writer % 4}", f"k{writer}", wrote[writer])

        writers = [threading.Thread(target=write, args=(writer,)) for writer in range(WRITERS)]
        began = time.monotonic()
        for thread in writers:
            thread.start()
        while time.monotonic() - began < SECONDS:
            over.wait(SECONDS / 20)
            sizes.append((held_mib(), on_disk_mib(directory)))
        over.set()
        for thread in writers:
            thread.join()
        engine.flush()  # what is not saved yet is not behind
        until(lambda: not any(one.lag_events for one in engine.consumers()), "a consumer does not come to its end")
        assert sum(handled) == sum(wrote) * CONSUMERS // 4
        assert all(one.dead == 0 for one in engine.consumers())
    half = len(sizes) // 2
    record(
        "24 consumers beside 16 writers",
        seconds=SECONDS,
        writes=sum(wrote),
        deliveries=sum(handled),
        memory_mib=max(memory for memory, _ in sizes),
        disk_mib=max(disk for _, disk in sizes),
    )
    assert max(memory for memory, _ in sizes[half:]) < max(memory for memory, _ in sizes[:half]) + 30
    assert max(disk for _, disk in sizes[half:]) < max(disk for _, disk in sizes[:half]) + 10
