"""The script that makes the pictures of the documentation still runs, and the documentation has those pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import screenshots

pytestmark = pytest.mark.timeout(300)  # the browser is fetched once


def test_each_picture_of_the_console_is_made_by_the_script(tmp_path: Path) -> None:
    taken = {path.name for path in screenshots.take(tmp_path)}  # refuses pictures that are too large

    assert taken == {path.name for path in screenshots.IMAGES.glob("console-*.png")}
