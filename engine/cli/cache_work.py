"""The work of `scopestate cache`: bring the entries of another cache into one of scopestate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from scopestate.cli.rules import names_config
from scopestate.cli.store_work import directory_of
from scopestate.cli.terminal import Exit, errors_to_exit_codes, json_of, out, shown, standard_error
from scopestate.config import Config, load
from scopestate.engine import Engine
from scopestate.errors import StorageError
from scopestate.integrations.cache import Cache, from_diskcache

_SHOWN: Final = 20
"""How many of the entries that were left out are shown one by one."""
_REASONS: Final = {
    "present": "already there",
    "expired": "expired",
    "pickled_keys": "the key is a pickle",
    "pickled_values": "the value is a pickle",
    "missing_files": "the file of the value is missing",
    "damaged": "damaged",
    "refused": "the cache does not accept such a key or value",
    "changed": "removed meanwhile",
}


def import_diskcache(
    source: str, target: str, scope: str, left_out: str | None, *, overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    """See `cache.import_diskcache_`."""
    with errors_to_exit_codes(as_json=as_json), _listed(left_out, as_json=as_json) as note:
        if dry_run:
            report = from_diskcache.import_diskcache(source, Cache(scope=scope), dry_run=True, left_out=note)
        else:
            with _opened(target, scope) as cache:
                report = from_diskcache.import_diskcache(source, cache, overwrite=overwrite, left_out=note)
                cache.engine.flush()
        _tell(report, target, dry_run=dry_run, as_json=as_json)
        if not report.ok:
            raise SystemExit(Exit.STORE)


@contextmanager
def _opened(target: str, scope: str) -> Iterator[Cache]:
    """Open the cache without a size limit, and without the triggers of a configuration."""
    if not names_config(target):
        with Cache(directory_of(target), scope=scope, size_limit=None) as cache:
            yield cache
        return
    config = load(target)
    with Engine(Config(config.adapter, scopes=config.scopes, limits=config.limits)) as engine:
        yield Cache(engine, scope=scope, size_limit=None)


@contextmanager
def _listed(file: str | None, *, as_json: bool) -> Iterator[Callable[[from_diskcache.LeftOut], None]]:
    """Yield a function that notes an entry that was left out: in a file, or the first ones on standard error."""
    if file is not None:
        try:
            stream = open(file, "w", encoding="utf-8")  # noqa: SIM115 - closed below
        except OSError as error:
            raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error
        with stream:
            yield lambda entry: print(json_of(_facts(entry)), file=stream)
        return
    told = 0

    def note(entry: from_diskcache.LeftOut) -> None:
        nonlocal told
        if as_json or entry.reason in ("present", "expired"):
            return
        told += 1
        if told <= _SHOWN:
            name = f"row {entry.row}" if entry.key is None else f"{entry.key!r:.80}"
            standard_error().print(shown(f"left out: {name}: {_REASONS[entry.reason]}"), markup=False)

    yield note
    if told > _SHOWN:
        standard_error().print(f"and {told - _SHOWN} more; --left-out FILE writes all of them to a file", markup=False)


def _facts(entry: from_diskcache.LeftOut) -> dict[str, object]:
    facts = msgspec.structs.asdict(entry)
    if not isinstance(entry.key, (str, int, float, type(None))):
        facts["key"] = repr(entry.key)
    return facts


def _tell(report: from_diskcache.Report, target: str, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        out(json_of({**msgspec.structs.asdict(report), "ok": report.ok, "dry_run": dry_run}))
        return
    for problem in report.problems:
        standard_error().print(shown(problem), markup=False)
    done = "would be imported" if dry_run else "imported"
    out(shown(f"{report.imported} of {report.read} entries {done} to {target}"))
    for reason, text in _REASONS.items():
        count = getattr(report, reason)
        if count:
            out(f"{count} left out: {text}")
