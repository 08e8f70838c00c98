"""Puts this directory on the path: `--import-mode=importlib` does not, and `import conformance` needs it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
