"""The browsers for the tests: one from npm whose version is the same everywhere, and the Chromium of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from node_packages import NODE, from_npm, kept, run

CHROMIUM = "153.0.0"
AXE = "4.14.1"

# Node has a decoder for Brotli, Python has none.
_UNPACK = """
const [from, to] = process.argv.slice(1), fs = require("fs");
fs.writeFileSync(to, require("zlib").brotliDecompressSync(fs.readFileSync(from)));
"""
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <include ignore_missing="yes">/etc/fonts/fonts.conf</include>
  <dir>{folder}/fonts</dir>
  <cachedir>{folder}/fonts-cache</cachedir>
</fontconfig>
"""


class Program(NamedTuple):
    """A browser that can be started."""

    name: str
    path: str
    environment: Mapping[str, str]
    """What its process needs besides the environment of this one."""


def pinned() -> Program:
    """Return the Chromium of the npm package `@sparticuz/chromium`, installed at the first call.

    It needs no other package of the machine: it has no window system in it, and brings the libraries and a font.
    """
    folder = kept(f"chromium-{CHROMIUM}", _unpack)
    libraries = os.pathsep.join(filter(None, [str(folder / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
    return Program(
        "pinned",
        str(folder / "chromium"),
        {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_FILE": str(folder / "fonts.conf")},
    )


def installed() -> Program | None:
    """Return the Chromium of this machine, or Chrome where the pinned one does not run; None if there is none.

    A Chromium in a snap is left out: it does not see the temporary folders of others.
    """
    names = ["chromium"] if HAS_PINNED else ["chromium", "google-chrome", _CHROME_OF_MACOS]
    for path in filter(None, map(shutil.which, names)):
        if Path(path).resolve().name != "snap":
            return Program("installed", path, {})
    return None


_CHROME_OF_MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"

HAS_PINNED = sys.platform == "linux" and platform.machine() == "x86_64"
"""The package has a program for this platform only."""

BROWSERS = [*(["pinned"] if HAS_PINNED else []), *(["installed"] if installed() is not None else [])]
"""The names of what there is to test with."""

MISSING = (
    "the tests of the console need a browser: install Chromium, so that the command `chromium` is found, or Chrome"
)


def program(name: str) -> Program:
    """Return a browser by its name; `none` is an error that says what to install."""
    found = pinned() if name == "pinned" else installed()
    assert found is not None, MISSING
    return found


def axe() -> Path:
    """Return the script of axe-core, which finds what makes a page hard to use for some people."""
    return from_npm(f"axe-core-{AXE}", f"axe-core@{AXE}") / "node_modules" / "axe-core" / "axe.min.js"


def _unpack(folder: Path) -> None:
    package = f"@sparticuz/chromium@{CHROMIUM}"
    packed = from_npm(f"sparticuz-chromium-{CHROMIUM}", package) / "node_modules" / "@sparticuz" / "chromium" / "bin"
    for name in ("chromium", "al2023.tar", "fonts.tar"):
        run([NODE, "-e", _UNPACK, str(packed / f"{name}.br"), str(folder / name)])
    for name in ("al2023.tar", "fonts.tar"):
        with tarfile.open(folder / name) as archive:
            archive.extractall(folder, filter="data")
        (folder / name).unlink()
    (folder / "fonts.conf").write_text(_FONTS.format(folder=folder), encoding="utf-8")
    (folder / "chromium").chmod(0o755)
