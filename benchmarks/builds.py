"""Builds of the package in environments of their own: the working tree, or a commit.

An environment holds this one build. It takes every other library from the environment that runs the benchmarks, so both
sides of a comparison use the same versions of them, and a build takes seconds; only libraries that it lacks are
installed with the build. The measuring code is the working tree's on both sides, so a benchmark that was edited does
not look like a change of speed. Refused: installing all libraries anew (a minute for each commit, other versions).
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".make" / "against"
"""Builds of commits, one folder each. `make clean` removes them."""


class BuildError(Exception):
    """The revision is unknown, or its package cannot be built; the text is the message of git or pip."""


def clean_environment() -> dict[str, str]:
    """Return the environment variables without those that could put another copy of the package on the import path."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "COV_CORE"))}


def _run(*command: str | Path) -> bytes:
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise BuildError(f"{Path(command[0]).name} {command[1]} failed: {said}")
    return done.stdout


def commit_of(revision: str) -> str:
    """Return the hash of a commit; raise BuildError if there is no such commit or no git repository."""
    try:
        return _run("git", "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    except BuildError as error:
        raise BuildError(f"--against {revision}: no such commit here: {error}") from None


def describe(revision: str) -> str:
    """Return the short hash and the subject of a commit."""
    return _run("git", "log", "-1", "--format=%h (%s)", revision).decode().strip()


def describe_working_tree() -> str:
    """Return the commit that the working tree is based on, and whether it differs from that."""
    changed = ", with uncommitted changes" if _run("git", "status", "--porcelain") else ""
    return f"the working tree at {describe('HEAD')}{changed}"


def build_commit(commit: str) -> Path:
    """Return the interpreter of an environment with the package of a commit, given by its full hash.

    It is built at the first call, and kept.
    """

    def extract(target: Path) -> None:
        archive = _run("git", "archive", "--format=tar", commit)
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            # An attribute, not an argument: CPython 3.11.2 (Debian 12) does not have filters, 3.12 warns without one.
            files.extraction_filter = getattr(tarfile, "data_filter", None)
            files.extractall(target)  # noqa: S202 - an archive that git made of this repository

    home = CACHE / f"{commit[:12]}-{sys.implementation.cache_tag}"
    if not home.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE, prefix="building-") as folder:
            _build(extract, Path(folder) / "environment")
            # Complete or absent: a build that was interrupted is made again.
            (Path(folder) / "environment").rename(home)
    _share_libraries(home)
    return home / "bin" / "python"


def build_working_tree(home: Path) -> Path:
    """Build the files that git tracks or would add into `home`; return the interpreter of the environment."""

    def copy(target: Path) -> None:
        listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target / name)

    _build(copy, home)
    return home / "bin" / "python"


def _build(put_source: Callable[[Path], None], home: Path) -> None:
    """Make an environment and install the package into it. Not an editable install: both sides load alike."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(home)
    _share_libraries(home)
    with TemporaryDirectory() as folder:
        put_source(Path(folder))
        python = home / "bin" / "python"
        options = ("--disable-pip-version-check", "--quiet", "--python", python)
        _run(sys.executable, "-m", "pip", *options, "install", f"{folder}[all]")


def _share_libraries(home: Path) -> None:
    """Let the environment see the libraries of the running one; a build of its own comes first on the path.

    A path file in a folder that is on the path through a path file is not read, so an editable install stays unseen.
    """
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    own = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    Path(own, "shared-libraries.pth").write_text("\n".join(sorted(shared)) + "\n", encoding="utf-8")
