"""The command line of `scopestate serve`, read without Typer and Pydantic.

Importing the two takes a quarter of the time, and of the memory, that a server needs until it listens
(docs/design/0082-speed-of-the-wire.md).
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from scopestate.cli.serving import Level, run
from scopestate.cli.terminal import errors_to_exit_codes, prepare_output

_OPTIONS: Final = {"--host": "host", "--port": "port", "-p": "port", "--log-level": "log_level"}
_PORT: Final = re.compile("[0-9]{1,5}")


def read(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments of `serving.run` for the words after the name of the program.

    None for every line that Typer must read: with a mistake, a rare spelling, help, completion, another command. None
    also without the extra `cli`.
    """
    if words[:1] != ["serve"] or os.name == "nt" or any("COMPLETE" in name for name in environment):
        return None
    if None in map(importlib.util.find_spec, ("picows", "rich", "typer")):
        return None
    found: dict[str, Any] = {"config": None, "host": None, "port": None, "log_level": "info", "as_json": False}
    left = list(reversed(words[1:]))
    while left:
        word = left.pop()
        if word == "--json":
            found["as_json"] = True
            continue
        name, sign, value = word.partition("=")
        if name.startswith("--") and sign:
            field = _OPTIONS.get(name)
        else:
            field = _OPTIONS.get(word) if word.startswith("-") else "config"
            if field == "config":
                value = word
                if found["config"] is not None:
                    return None
            else:
                value = left.pop() if left else ""
        if field is None or not value or value.startswith("-"):
            return None
        found[field] = value
    if found["log_level"] not in get_args(Level):
        return None
    if found["config"] is not None:
        found["config"] = Path(found["config"])
    if found["port"] is not None:
        if not _PORT.fullmatch(found["port"]) or int(found["port"]) > 65535:
            return None
        found["port"] = int(found["port"])
    return found


def serve(arguments: dict[str, Any]) -> None:
    """Run `scopestate serve` with what `read` has returned."""
    prepare_output()
    with errors_to_exit_codes(as_json=arguments["as_json"]):
        run(**arguments)
