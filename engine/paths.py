"""Paths that begin with `~` or `~user`."""

from __future__ import annotations

import os

from scopestate.errors import ConfigError


def expand_home(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """Return `path` with a leading `~` or `~user` replaced by that home directory.

    For every path from a configuration, a program or the command line. Raises ConfigError if the home directory is not
    known: otherwise a folder named `~` would be created in the working directory.
    """
    given = os.fsdecode(path)
    if not given.startswith("~"):
        return given
    expanded = os.path.expanduser(given)
    if expanded == given:
        user = given[1:].split(os.sep)[0]
        whose = f"of a user {user!r}" if user else "of this process's user (HOME is not set)"
        raise ConfigError(
            f"the path {given!r} begins with `~`, and the home directory {whose} is not known: write the whole path, "
            f"or './{given}' for a folder of that name"
        )
    return expanded
