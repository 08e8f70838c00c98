"""The work of `scopestate config`: check a configuration file, show what it means."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec
import yaml
from rich.markup import escape

from scopestate.cli.current_folder import import_from_here
from scopestate.cli.terminal import Exit, errors_to_exit_codes, json_of, out, shown, standard_error
from scopestate.config import AdapterConfig, Config, KvOptions, ServerConfig, examine, load
from scopestate.config.loader import Examined
from scopestate.config.schema import FunctionRef, SchemaRef, TypeRef
from scopestate.errors import ConfigError
from scopestate.opening import durable_mistakes, load_libraries
from scopestate.paths import expand_home
from scopestate.server import access
from scopestate.server.handshakes import Certificates

_SECRET = {"token", "tokens", "password", "sentinel_password", "secret"}
MASK = "***"


def check(file: Path, *, registered_later: bool, as_json: bool) -> None:
    """See `config.check_`."""
    import_from_here()
    with errors_to_exit_codes(as_json=as_json):
        _check(file, registered_later=registered_later, as_json=as_json)


def _check(file: Path, *, registered_later: bool, as_json: bool) -> None:
    examined = examine(file)
    errors = [*examined.errors, *refused_by_serve(examined)]
    if not registered_later:
        errors += examined.doubts
    errors.sort(key=lambda error: error.line or 0)
    if as_json:
        found = [{"file": e.file, "line": e.line, "key": e.key, "problem": e.problem} for e in errors]
        out(json_of({"ok": not errors, "errors": found}))
    elif errors:
        console = standard_error()
        for error in errors:
            place = shown(":".join(str(part) for part in (error.file, error.line) if part is not None))
            key = f" [bold]{escape(shown(error.key))}[/]:" if error.key else ""
            console.print(f"[cyan]{escape(place)}[/]:{key} {escape(shown(error.problem))}")
        console.print(f"[red]{len(errors)} mistake{'s' if len(errors) > 1 else ''}[/] in {escape(shown(str(file)))}")
    else:
        out(shown(f"{file}: ok"))
    if errors:
        raise SystemExit(Exit.CONFIG)


def show(file: Path | None, *, as_json: bool) -> None:
    """See `config.show`."""
    import_from_here()
    with errors_to_exit_codes(as_json=as_json):
        config = Config() if file is None else load(file)
    plain = as_mapping(config)
    out(json_of(plain) if as_json else yaml.safe_dump(plain, sort_keys=False).rstrip())


def refused_by_serve(examined: Examined) -> list[ConfigError]:
    """Return what `serve` refuses in a file that an engine accepts: addresses, tokens, certificates, the adapter."""
    config = examined.config
    if config is None:
        return []
    server = config.server or ServerConfig()
    found = list(access.mistakes(server))
    try:
        if server.tls is not None:
            Certificates(server.tls)
    except ConfigError as error:
        found.append(error)
    try:
        config.adapter.config.refuse_server(server.host, server.port)
    except ConfigError as error:
        found.append(error)
    placed = [_placed(error, examined.lines, config.source) for error in found]
    placed += [
        ConfigError(error.problem, file=config.source, line=examined.lines.get(error.key or ""), key=error.key)
        for error in durable_mistakes(config)
    ]
    for refused in _refused_adapter(config.adapter):
        lines = [line for path, line in examined.lines.items() if path.endswith(f".{refused.key}")]
        placed.append(ConfigError(refused.problem, file=config.source, line=next(iter(lines), None), key=refused.key))
    return placed


def _refused_adapter(adapter: AdapterConfig) -> Iterator[ConfigError]:
    """Yield the reasons to refuse the adapter that can be found without connecting and without changing anything."""
    try:
        load_libraries(adapter)
    except ConfigError as error:
        yield error
    config = adapter.config
    if isinstance(config, KvOptions):
        if config.store_method == "file_based":
            yield from _refused_directory(config.file_path)
    elif config.tls_ca_file is not None:
        try:
            ssl.create_default_context(cafile=expand_home(config.tls_ca_file))
        except (OSError, ConfigError) as error:
            reason = getattr(error, "strerror", None) or error
            problem = f"the file of TLS authorities {config.tls_ca_file!r} cannot be read: {reason}"
            yield ConfigError(problem, key="adapter.config.tls_ca_file")


def _refused_directory(path: str) -> Iterator[ConfigError]:
    key = "adapter.config.file_path"
    try:
        directory = expand_home(path)
    except ConfigError as error:
        yield ConfigError(error.problem, key=key)
        return
    if not path:
        yield ConfigError("the path of the directory is empty", key=key)
    elif os.path.exists(directory) and not os.path.isdir(directory):
        yield ConfigError(f"{path!r} is not a directory; a store is a directory of its own", key=key)


def _placed(error: ConfigError, lines: Mapping[str, int | None], file: str | None) -> ConfigError:
    """Return `error` with the line of its key, or of the nearest enclosing key that is in the file."""
    tail = (error.key or "").rpartition("iii-worker-manager.config.")[2]
    places = [line for path, line in lines.items() if tail and path.endswith(f".{tail}")]
    line = places[0] if places else lines.get("iii-worker-manager.config", lines.get("iii-worker-manager"))
    return ConfigError(error.problem, file=file, line=line, key=error.key)


def as_mapping(config: Config) -> dict[str, Any]:
    """Return a configuration in the form of its file, with all defaults and without secrets."""
    workers: list[dict[str, Any]] = [{"name": "iii-state", "config": {"adapter": _plain(config.adapter)}}]
    if config.server is not None:
        workers.append({"name": "iii-worker-manager", "config": _plain(config.server)})
    return {
        "workers": workers,
        "functions": {function_id: reference.target for function_id, reference in config.functions.items()},
        "triggers": _plain(config.triggers),
        "scopes": _plain(config.scopes),
        "limits": _plain(config.limits),
    }


def _plain(value: object, name: str = "") -> Any:
    if isinstance(value, FunctionRef | TypeRef):
        return value.target
    if isinstance(value, SchemaRef):
        return value.path or value.schema.json_schema()
    if isinstance(value, msgspec.Struct):
        return {field: _plain(getattr(value, field), field) for field in value.__struct_fields__}
    if isinstance(value, tuple | list):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, str(key)) for key, item in value.items()}
    if value is not None and not isinstance(value, bool) and name in _SECRET:
        return MASK
    return without_password(value) if isinstance(value, str) else value


def without_password(text: str) -> str:
    """Mask the password of an address, as in `redis://:secret@host`."""
    if "://" not in text or "@" not in text:
        return text
    parts = urlsplit(text)
    credentials, _, place = parts.netloc.rpartition("@")
    if not credentials:
        return text
    user, colon, _ = credentials.partition(":")
    return urlunsplit(parts._replace(netloc=f"{user}{colon and ':' + MASK}@{place}"))
