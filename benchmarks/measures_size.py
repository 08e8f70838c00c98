"""Memory, many scopes, import time: each in a process of its own."""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Measure, Row, Sizes
from benchmarks.probes import run_probe, time_import

THREADS_ALLOWED = 16
"""Threads that an engine may have for itself, however many scopes it holds."""


def memory_keys(sizes: Sizes) -> list[Row]:
    """Resident memory of one large scope beside a plain dict[str, bytes] with the same keys and JSON."""
    ours = run_probe("engine_memory", sizes.memory_keys)["grown_bytes"]
    theirs = run_probe("dict_memory", sizes.memory_keys)["grown_bytes"]
    figures = {"ours_mb": ours / 1e6, "dict_mb": theirs / 1e6}
    what = f"memory of {sizes.memory_keys} keys / dict[str, bytes]"
    return [Row("memory_keys", what, ours / max(theirs, 1), "x", 1.5, figures=figures, own="ours_mb")]


def many_scopes(sizes: Sizes) -> list[Row]:
    """Many scopes with one small key each, in memory; the same on disk is shown beside it."""
    probe = run_probe("many_scopes", "", sizes.scopes)
    with TemporaryDirectory() as folder:
        stored = run_probe("many_scopes", str(Path(folder) / "store"), sizes.scopes)
    count = sizes.scopes
    return [
        Row("idle_scope", "memory of an idle scope with one small key", probe["grown_bytes"] / count, "bytes", 2_048),
        Row("scopes_created", f"{count} scopes created", probe["create_s"], "s", 5),
        Row("scopes_closed", f"{count} scopes closed", probe["close_s"], "s", 3),
        Row("scopes_threads", f"threads of an engine with {count} scopes", probe["threads"], "", THREADS_ALLOWED),
        Row("scopes_created_on_disk", f"{count} scopes created, file_based", stored["create_s"], "s"),
        Row("scopes_closed_on_disk", f"{count} scopes saved and closed, file_based", stored["close_s"], "s"),
    ]


def import_time(sizes: Sizes) -> list[Row]:
    """`import scopestate` beside a bare interpreter, the best of several alternating runs: noise only ever adds."""
    time_import("import scopestate")
    pairs = [(time_import("import scopestate"), time_import("pass")) for _ in range(sizes.repeats * 2)]
    ours, bare = min(mine for mine, _ in pairs), min(plain for _, plain in pairs)
    figures = {
        "ours_ms": ours * 1e3,
        "bare_ms": bare * 1e3,
        "median_ms": statistics.median(a - b for a, b in pairs) * 1e3,
    }
    return [
        Row("import_time", "import scopestate, more than bare Python", (ours - bare) * 1e3, "ms", 100, figures=figures)
    ]


MEASURES: dict[str, Measure] = {
    "memory_keys": memory_keys,
    "many_scopes": many_scopes,
    "import_time": import_time,
}
