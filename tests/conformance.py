"""The conformance cases that the specification comes with, and the comparison they ask for.

The cases live beside the repository, in `../shared/conformance`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
CONFORMANCE = SHARED / "conformance"
SPEC = SHARED / "spec"


def load(name: str) -> Any:
    """Load a JSON file of the conformance directory; 1, 1.0 and true stay three different values."""
    return json.loads((CONFORMANCE / name).read_text(encoding="utf-8"))


def same(a: object, b: object) -> bool:
    """Compare as JSON does: type by type, all the way down. 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(item, b[key]) for key, item in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return a == b
