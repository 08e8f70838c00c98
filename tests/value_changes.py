"""Another thread that changes a value while it is encoded: it may run between any two opcodes, and a trace plays it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from scopestate.errors import InvalidValue
from scopestate.ops import checked_copy, values

FILES = {values.__file__, checked_copy.__file__}


def encode_with_change_at(opcode: int, value: Any, change: Callable[[], object]) -> tuple[bytes | None, bool]:
    """Encode `value`, calling `change` once before the given opcode. Result: JSON, None if refused; whether called."""
    left = opcode

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                change()
        return trace

    before = sys.gettrace()
    # CPython 3.12 looks here, when tracing begins, whether opcodes are wanted at all.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        return values.encode(value), left <= 0
    except InvalidValue:
        return None, left <= 0
    finally:
        sys.settrace(before)
