"""What the wire costs: a server beside an echo server on the same WebSocket library, a client in its own process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Measure, Row, Sizes, percentile
from scopestate import Engine
from scopestate.server import Server

ROOT = Path(__file__).parent.parent


@contextmanager
def serving(kind: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own: its port, and the process."""
    command = [sys.executable, "-m", "benchmarks.wire_servers", kind]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield int(process.stdout.readline()), psutil.Process(process.pid)
        finally:
            process.stdin.close()


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Let the processes that are started within run on one CPU, where the platform can do that.

    For measures of one message at a time. With two CPUs, the time from one process to the other depends on whether a
    CPU has to be woken: on an idle machine an echo takes 12 us within one CPU and 100 between two.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def load(**asked: Any) -> subprocess.Popen[str]:
    """Start the client."""
    command = [sys.executable, "-m", "benchmarks.wire_load", json.dumps(asked)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def loaded(**asked: Any) -> dict[str, Any]:
    """Run the client to its end and return what it found."""
    with load(**asked) as process:
        assert process.stdout is not None
        found: dict[str, Any] = json.loads(process.stdout.readline())
        return found


def compared(measure: str, sizes: Sizes, calls: int, baseline: str = "echo") -> tuple[float, dict[str, float]]:
    """Return the median of the ratios engine / baseline of neighbours, and the medians of both."""
    with serving(baseline) as (echo, _), serving("engine") as (engine, _):
        found = loaded(measure=measure, echo=echo, engine=engine, repeats=sizes.repeats, calls=calls)
    ratio = statistics.median(ours / theirs for theirs, ours in zip(found["echo"], found["engine"], strict=True))
    return ratio, {"echo": statistics.median(found["echo"]), "engine": statistics.median(found["engine"])}


def delivered(measure: str, sizes: Sizes, calls: int) -> dict[str, list[float]]:
    """Measure deliveries beside echoes, or fan-outs, and the same of the relay; see `benchmarks.wire_load`."""
    with on_one_cpu(), serving("echo") as (echo, _), serving("relay") as (relay, _), serving("engine") as (engine, _):
        return loaded(measure=measure, echo=echo, relay=relay, engine=engine, repeats=sizes.repeats, calls=calls)


def _ratio(over: list[float], under: list[float]) -> float:
    """Return the median of the ratios of neighbours."""
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def _micros(medians: dict[str, float]) -> dict[str, float]:
    return {f"{name}_us": value * 1e6 for name, value in medians.items()}


def wire_get(sizes: Sizes) -> list[Row]:
    """`state::get` of a small value, one request at a time."""
    with on_one_cpu():
        ratio, medians = compared("round_trips", sizes, sizes.slow_calls)
    return [
        Row(
            "wire_get",
            "state::get, one at a time, p50: ours / echo",
            ratio,
            "x",
            1.6,
            figures=_micros(medians),
            own="engine_us",
        )
    ]


def wire_pipelined(sizes: Sizes) -> list[Row]:
    """Many requests at a time on one connection; and 50 connections beside one."""
    ratio, medians = compared("pipelined", sizes, sizes.calls)
    figures = {f"{name}_per_s": value for name, value in medians.items()}
    together, both = compared("fifty", sizes, sizes.calls)
    of_echo, _ = compared("fifty_echo", sizes, sizes.calls)
    fifty = {"one_per_s": both["echo"], "fifty_per_s": both["engine"], "ratio_of_echo": of_echo}
    return [
        Row(
            "wire_pipelined",
            "pipelined state::get: ours / echo",
            ratio,
            "x",
            0.6,
            at_least=True,
            figures=figures,
            own="engine_per_s",
        ),
        Row(
            "wire_fifty",
            "50 connections / one, pipelined",
            together,
            "x",
            0.85,
            at_least=True,
            figures=fifty,
            own="fifty_per_s",
        ),
    ]


def wire_delivery(sizes: Sizes) -> list[Row]:
    """A set on one connection until the handler's call on another, beside an echo's round trip, and beside the relay's.

    The relay is the floor: it sends the same messages without an engine.
    """
    found = delivered("deliveries", sizes, sizes.slow_calls)
    figures = _micros({name: statistics.median(times) for name, times in found.items()})
    return [
        Row(
            "wire_delivery",
            "set to handler, p50 / echo",
            _ratio(found["engine"], found["echo"]),
            "x",
            2.5,
            figures=figures,
            own="engine_us",
        ),
        Row(
            "wire_delivery_floor",
            "set to handler, p50 / the same messages without an engine",
            _ratio(found["engine"], found["relay"]),
            "x",
            3.5,
            figures=figures,
            own="engine_us",
        ),
    ]


def wire_fan_out(sizes: Sizes) -> list[Row]:
    """A set of a key that 32 triggers of one worker watch, until their first call and until their last.

    The first call is judged beside a single delivery's limit: it must not wait for the other 31.
    """
    found = delivered("fan_outs", sizes, max(1, sizes.slow_calls // 10))
    figures = _micros({name: statistics.median(times) for name, times in found.items()})
    return [
        Row(
            "wire_fan_out_first",
            "32 triggers: first call, p50 / echo",
            _ratio(found["engine"], found["echo"]),
            "x",
            6.0,
            figures=figures,
            own="engine_us",
        ),
        Row(
            "wire_fan_out",
            "32 triggers: last call, p50 / 32 messages without an engine",
            _ratio(found["engine_last"], found["relay_last"]),
            "x",
            3.0,
            figures=figures,
            own="engine_last_us",
        ),
    ]


_SERVE = ["-m", "scopestate", "serve", "--port", "0", "--json"]
_LIBRARIES = [
    "-c",
    "import asyncio, logging, ssl, msgspec, picows, pykka, uvloop; print(flush=True); import sys; sys.stdin.read()",
]


def _started(arguments: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Start an interpreter; return the seconds until its first line of output, and its resident memory then."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        taken = time.perf_counter() - began
        memory = psutil.Process(process.pid).memory_info().rss
        process.terminate()
    return taken, memory


def serve_start(sizes: Sizes) -> list[Row]:
    """`scopestate serve` until it listens, beside an interpreter that imports its libraries: that is the floor.

    The best of several alternating runs, because noise only ever adds. With bytecode, as an installed package has it.
    """
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        ours, floor = list[tuple[float, int]](), list[tuple[float, int]]()
        for repeat in range(sizes.repeats + 1):
            both = _started(_SERVE, environment), _started(_LIBRARIES, environment)
            if repeat:  # the first one writes the bytecode
                ours.append(both[0])
                floor.append(both[1])
    (seconds, memory), (least_s, least) = map(min, zip(*ours, strict=True)), map(min, zip(*floor, strict=True))
    return [
        Row(
            "serve_start",
            "serve until it listens / importing its libraries",
            seconds / least_s,
            "x",
            2.0,
            figures={"ours_ms": seconds * 1e3, "floor_ms": least_s * 1e3},
            own="ours_ms",
        ),
        Row(
            "serve_memory",
            "memory of serve when it listens / its libraries",
            memory / least,
            "x",
            1.5,
            figures={"ours_mb": memory / 1e6, "floor_mb": least / 1e6},
            own="ours_mb",
        ),
    ]


def wire_idle(sizes: Sizes) -> list[Row]:
    """What idle workers cost the server in memory."""
    workers = min(1_000, sizes.calls)
    with serving("engine") as (port, process):
        with load(measure="idle", engine=port, repeats=0, calls=1) as warm:
            assert warm.stdout is not None
            warm.stdout.readline()
            warm.communicate("\n")
        before = process.memory_info().rss
        with load(measure="idle", engine=port, repeats=0, calls=workers) as client:
            assert client.stdout is not None
            client.stdout.readline()
            grown = process.memory_info().rss - before
            client.communicate("\n")
    limit = 50_000_000
    return [Row("wire_idle", f"memory of {workers} idle workers", grown, "bytes", limit)]


def wire_embedding(sizes: Sizes) -> list[Row]:
    """Calls of the embedding program while a client saturates the server in the same process."""
    seconds = 0.5 * sizes.repeats
    taken: list[float] = []
    with Engine() as engine, Server(engine, port=0) as server:
        engine.set("users", "profile", {"name": "Ada"})
        clock = time.perf_counter
        with load(measure="saturate", engine=server.port, repeats=0, calls=2_000, seconds=seconds) as client:
            while server.status().calls < 1_000 and client.poll() is None:
                time.sleep(0.01)
            while client.poll() is None:
                for _ in range(20):
                    began = clock()
                    engine.set("own", "key", {"n": 1})
                    taken.append(clock() - began)
                time.sleep(0.001)  # a program that has other things to do
            assert client.stdout is not None
            answers = json.loads(client.stdout.readline())["answers"]
    p99 = percentile(taken, 0.99) * 1000
    figures = {"calls": float(len(taken)), "server_per_s": answers / seconds, "worst_ms": max(taken) * 1000}
    return [Row("wire_embedding", "set by the program beside a saturated server, p99", p99, "ms", 1.0, figures=figures)]


def websocket_libraries(sizes: Sizes) -> list[Row]:
    """picows beside `websockets`, both as echo servers (docs/design/0020-websockets.md). Shown, not judged."""
    with serving("echo") as (fast, _), serving("websockets") as (plain, _):
        trips = loaded(measure="round_trips", echo=fast, engine=plain, repeats=sizes.repeats, calls=sizes.slow_calls)
        many = loaded(measure="pipelined", echo=fast, engine=plain, repeats=sizes.repeats, calls=sizes.calls)
    rows = []
    for name, found, invert in (("round trip", trips, False), ("pipelined", many, True)):
        ratios = [theirs / ours for ours, theirs in zip(found["echo"], found["engine"], strict=True)]
        value = statistics.median(1 / ratio if invert else ratio for ratio in ratios)
        rows.append(Row(f"websockets_{name.replace(' ', '_')}", f"{name}: websockets / picows", value, "x"))
    return rows


MEASURES: dict[str, Measure] = {
    "wire_get": wire_get,
    "wire_pipelined": wire_pipelined,
    "wire_delivery": wire_delivery,
    "wire_fan_out": wire_fan_out,
    "serve_start": serve_start,
    "wire_idle": wire_idle,
    "wire_embedding": wire_embedding,
    "websocket_libraries": websocket_libraries,
}
