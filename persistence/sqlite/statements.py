"""Writing many rows with few statements.

Each `sqlite3` call releases the interpreter lock and takes it again, which waits up to 5 ms (the switch interval) while
another thread is CPU-bound. Row by row, 100,000 rows would then take minutes. So several hundred rows are written by
one statement. It is bounded in rows and bytes, so that preparing one does not keep other threads waiting for more than
about a millisecond.
"""

from __future__ import annotations

import sqlite3

CHUNK_ROWS = (1024, 256, 32, 4, 1)
"""Rows for each statement. Only these few sizes, so that the connection's cache of compiled statements has them."""
_CHUNK_BYTES = 256 * 1024

Parameter = str | bytes | int | None


class Write:
    """One kind of statement: collects its rows and runs them, many at a time."""

    def __init__(self, connection: sqlite3.Connection, texts: dict[int, str], width: int) -> None:
        self._connection = connection
        self._texts = texts
        self._width = width
        self._parameters: list[Parameter] = []
        self._bytes = 0

    def add(self, row: tuple[Parameter, ...], size: int) -> None:
        """Collect a row of about `size` bytes. Runs the collected rows when they fill the largest statement."""
        self._parameters += row
        self._bytes += size
        if self._bytes >= _CHUNK_BYTES or len(self._parameters) >= CHUNK_ROWS[0] * self._width:
            self.flush()

    def extend(self, rows: list[Parameter], size: int) -> None:
        """Collect the parameters of several rows, of about `size` bytes together, as `add` does."""
        self._parameters += rows
        self._bytes += size
        if self._bytes >= _CHUNK_BYTES or len(self._parameters) >= CHUNK_ROWS[0] * self._width:
            self.flush()

    def flush(self) -> None:
        """Run the collected rows."""
        parameters, self._parameters, self._bytes = self._parameters, [], 0
        start = 0
        for rows, text in self._texts.items():
            step = rows * self._width
            while len(parameters) - start >= step:
                self._run(text, parameters[start : start + step], rows)
                start += step

    def _run(self, text: str, parameters: list[Parameter], rows: int) -> None:
        self._connection.execute(text, parameters)


def ladder(head: str, row: str, tail: str) -> dict[int, str]:
    """Return a statement for each number of rows in `CHUNK_ROWS`; `row` stands in it as often, separated by commas."""
    return {rows: f"{head} {','.join([row] * rows)} {tail}" for rows in CHUNK_ROWS}
