"""What it costs to check and encode a value, beside msgspec, which encodes it without a check."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.harness import Batch, Measure, Pairs, Row, Sizes, compare, make_value
from scopestate.ops.values import encode


def _encoding(function: Callable[[Any], bytes]) -> Batch:
    def batch(pairs: Pairs) -> None:
        for _, value in pairs:
            function(value)

    return batch


def _row(name: str, what: str, limit: float, value: Any, calls: int, sizes: Sizes) -> Row:
    pairs = [("", value)] * calls
    found = compare(_encoding(encode), _encoding(msgspec.json.Encoder().encode), pairs, sizes.repeats)
    return Row(name, what, 1 / found.ratio, "x", limit, figures=found.figures, own="ours_us")


def encode_values(sizes: Sizes) -> list[Row]:
    """Values of different shapes."""
    numbers = random.Random(1)
    embedding = [numbers.uniform(-1, 1) for _ in range(1_536)]
    chat = [
        {"role": "assistant" if index % 2 else "user", "content": f"message {index}: {'word ' * 8}"}
        for index in range(500)
    ]
    rows = [make_value(index) for index in range(500)]
    large = max(2, sizes.slow_calls // 10)
    return [
        _row("encode_object", "checked / msgspec: an object of 4 fields", 5, make_value(1), sizes.calls, sizes),
        _row("encode_embedding", "checked / msgspec: 1,536 floats", 1.6, embedding, large, sizes),
        _row("encode_chat", "checked / msgspec: a chat of 500 messages", 2.7, chat, large, sizes),
        _row("encode_rows", "checked / msgspec: 500 objects of 4 fields", 5, rows, large, sizes),
    ]


MEASURES: dict[str, Measure] = {"encode_values": encode_values}
