"""Names of the parameters of tests that are the same in each process of the suite."""

from __future__ import annotations

import re


def stable(value: object) -> str:
    """Return the `repr` of a value without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
