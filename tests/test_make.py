"""`make` makes an environment that is not sound again. Nothing is installed here: `--dry-run` says what it would do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, with a space in its name, that has the Makefile, and an environment with a module called `pip`."""
    folder = tmp_path_factory.mktemp("a place")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    venv.create(folder / ".venv", symlinks=True)
    # All that the Makefile asks of pip is that it can be imported; the real one takes five seconds to install.
    (packages,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").touch()
    return folder


@pytest.fixture
def place(bare: Path, tmp_path: Path) -> Path:
    """A copy of it that takes itself for the original."""
    shutil.copytree(bare, tmp_path / "a copy", symlinks=True)
    config = tmp_path / "a copy" / ".venv" / "pyvenv.cfg"
    config.write_text(config.read_text().replace(str(bare), str(tmp_path / "a copy")))
    return tmp_path / "a copy"


def untouched_by_make() -> dict[str, str]:
    """Return this process's environment without what a `make VENV=... test` around it has put there."""
    of_make = {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "VENV", "PYTHON", "PYTEST_ARGS", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in of_make}


def make(place: Path, *arguments: str) -> str:
    """Say what `make` would do."""
    done = subprocess.run(
        ["make", "--dry-run", "run", *arguments],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env=untouched_by_make(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sound_environment_stays(place: Path) -> None:
    assert "making .venv again" not in make(place)


def test_one_that_was_moved_is_made_again(place: Path) -> None:
    moved = place.parent / "moved here"
    place.rename(moved)

    assert "making .venv again: it was made in another folder" in make(moved)


@pytest.mark.parametrize("missing", ["bin/python", "lib"])
def test_one_whose_making_was_interrupted_is_made_again(missing: str, place: Path) -> None:
    part = place / ".venv" / missing
    shutil.rmtree(part) if part.is_dir() else part.unlink()

    assert "making .venv again: its Python or its pip does not work" in make(place)


def test_one_of_a_python_that_is_gone_is_made_again(place: Path) -> None:
    python = place / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(place / "no" / "such" / "python3")

    assert "making .venv again: its Python or its pip does not work" in make(place)


def test_one_of_another_python_than_the_given_one_is_made_again(place: Path) -> None:
    other = place / "python3"
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.exit(1)"\n')
    other.chmod(0o755)

    assert "making .venv again: it was made by another Python" in make(place, "PYTHON=./python3")


def test_a_python_without_venv_is_refused_with_what_to_do(place: Path) -> None:
    shutil.rmtree(place / ".venv")
    (place / "python3").write_text("#!/bin/sh\nexit 1\n")
    (place / "python3").chmod(0o755)

    done = subprocess.run(
        ["make", "run", "PYTHON=./python3"],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env=untouched_by_make(),
    )

    assert done.returncode != 0
    assert "needs Python 3.11 or newer with venv (Debian, Ubuntu: apt install python3-venv)" in done.stderr
