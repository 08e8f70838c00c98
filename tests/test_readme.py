"""Every Python example in the README runs as it stands, in an empty folder and in an interpreter of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def _examples() -> list[tuple[str, str]]:
    """Return (id, source) of each ```python block; the id is its heading and place, for a readable failure."""
    text = README.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        heading = re.findall(r"^#+ (.+)$", text[: match.start()], re.MULTILINE)[-1]
        # Keeps the line numbers of a traceback those of the README.
        found.append((f"{heading}, line {line}", "\n" * line + match.group(1)))
    return found


EXAMPLES = _examples()


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("source", [source for _, source in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def test_example_runs_without_error_or_warning(source: str, tmp_path: Path) -> None:
    script = tmp_path / "README.md"
    script.write_text(source, encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
