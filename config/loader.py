"""Configuration from a file, from text or from Python data.

`load` stops at the first mistake, `check` returns them all. Each is a `ConfigError` that names file, line and key.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import msgspec

from scopestate.config.schema import Config, FunctionRef, SchemaRef, TypeRef
from scopestate.errors import ConfigError
from scopestate.paths import expand_home

# `sections` (and with it PyYAML, difflib, ...) loads with the first configuration that is read: an engine in memory
# needs none, and `import scopestate` must stay quick.

MAX_FILE_BYTES = 1024 * 1024


def load(path: str | os.PathLike[str]) -> Config:
    """Read a configuration file.

    `${VAR:default}` is expanded from the environment and the targets of `functions:` are imported. A relative
    `file_path` is taken from the current folder, not from the file's, as iii does. `~` is the home directory, here and
    in every path in the file.

    Raises:
        ConfigError: the first mistake in the file, or why it cannot be read.
    """
    return examine(path).first()


def loads(text: str, *, file: str = "<string>") -> Config:
    """Read a configuration from text; errors name it `file`.

    Raises:
        ConfigError: the first mistake in it.
    """
    return _examined(text, file, None).first()


def from_mapping(mapping: Mapping[str, object] | Sequence[object]) -> Config:
    """Read a configuration from Python data of the same shape as the file, or from the bare list of workers.

    Values are taken as they are: nothing is expanded. `functions` may hold callables as well as targets.

    Raises:
        ConfigError: the first mistake; it has a `key`, but no file and line.
    """
    from scopestate.config.sections import read_python  # noqa: PLC0415 - brings PyYAML; see above

    if isinstance(mapping, str | bytes):
        raise ConfigError("expected a mapping, found text; use `loads` for YAML text and `load` for a path")
    config, errors = read_python(mapping)
    return Examined(config, errors).first()


def check(path: str | os.PathLike[str]) -> list[ConfigError]:
    """Return every mistake in a file, by line; an empty list if `load` would succeed. Imports `functions:` as well."""
    return examine(path).errors


class Examined(NamedTuple):
    """What was read from a file, and all its mistakes."""

    config: Config | None
    errors: list[ConfigError]
    """What `load` refuses."""
    doubts: Sequence[ConfigError] = ()
    """What works but is probably a mistake: triggers of functions that are not in the file."""
    lines: Mapping[str, int | None] = {}
    """Path of each key that was read -> its line."""
    files: AbstractSet[str] = frozenset()
    """Other files that were read, or looked for: those of schemas."""

    def first(self) -> Config:
        """Return the configuration. Raises the first mistake."""
        if self.config is None or self.errors:
            raise self.errors[0]
        return self.config


def examine(path: str | os.PathLike[str]) -> Examined:
    """Read a file as `check` does, for tools that need more. After mistakes `config` is None, or has defaults."""
    try:
        return examine_bytes(read_bytes(path), path)
    except ConfigError as error:
        return Examined(None, [error])


def examine_bytes(content: bytes, path: str | os.PathLike[str]) -> Examined:
    """As `examine`, for content of `path` that was read before."""
    file = expand_home(path)
    try:
        return _examined(_decode(content, file), file, os.path.abspath(file))
    except ConfigError as error:
        return Examined(None, [error])


def validate(config: Config) -> None:
    """Check a `Config` that was built by code, which msgspec takes unchecked.

    Raises:
        ConfigError: the first field that a file could not hold either.
    """
    workers: list[object] = [{"name": "iii-state", "config": {"adapter": _plain(config.adapter)}}]
    if config.server is not None:
        workers.append({"name": "iii-worker-manager", "config": _plain(config.server)})
    data: dict[str, object] = {
        "workers": workers,
        "functions": {function_id: getattr(ref, "callable", ref) for function_id, ref in config.functions.items()},
        "triggers": _plain(config.triggers),
        "scopes": _plain(config.scopes),
        "limits": _plain(config.limits),
    }
    from_mapping(data)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read the file whole.

    Raises:
        ConfigError: there is no such file, it is a directory, larger than 1 MiB, or cannot be read.
    """
    file = expand_home(path)
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        folder = "" if os.path.isabs(file) else f" in {os.getcwd()}"
        raise ConfigError(f"there is no such file{folder}", file=file) from error
    except IsADirectoryError as error:
        raise ConfigError("this is a directory; name the file in it", file=file) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"the file cannot be read: {reason}", file=file) from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"the file is larger than {MAX_FILE_BYTES} bytes; this is not a configuration", file=file)
    return content


def _decode(content: bytes, file: str) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError("this is UTF-16 text; save the file as UTF-8", file=file, line=1)
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError(f"not UTF-8 text: byte 0x{byte:02x} at offset {error.start}", file=file, line=line) from error


def _examined(text: str, file: str, source: str | None) -> Examined:
    from scopestate.config.nodes import Problems  # noqa: PLC0415 - brings PyYAML; see above
    from scopestate.config.sections import read_text  # noqa: PLC0415 - as above

    if len(text) > MAX_FILE_BYTES:
        problem = f"longer than {MAX_FILE_BYTES} characters; this is not a configuration"
        return Examined(None, [ConfigError(problem, file=file)])
    problems = Problems(file)
    config, errors = read_text(text, source, problems)
    return Examined(config, errors, problems.doubts, problems.lines, problems.files)


def _plain(value: object) -> object:
    if isinstance(value, TypeRef):
        return value.type
    if isinstance(value, FunctionRef):
        return value.callable
    if isinstance(value, SchemaRef):
        return value
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
