"""For `import patient_model`, as tests/conftest.py does for its own folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
