"""The work of `scopestate store`: show what a store holds, check it, export and import it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import msgspec
from rich.filesize import decimal
from rich.table import Table

from scopestate.cli.client import with_client
from scopestate.cli.files import output, source_of
from scopestate.cli.people import many, moment, number
from scopestate.cli.progress import Advance, ended_by_signals, percent, progress, run_beside, said_if_interrupted, size
from scopestate.cli.rules import Found, Migration, Rules, names_config, rules_for
from scopestate.cli.terminal import (
    Exit,
    errors_to_exit_codes,
    json_of,
    note_json,
    out,
    print_rich,
    shown,
    standard_error,
)
from scopestate.config import AdapterConfig, BridgeOptions, Config, KvOptions, RedisOptions, load, validate
from scopestate.errors import ConfigError, DeserializationError, StorageError, StoreLocked, StoreUnusable
from scopestate.ops.turns import Range
from scopestate.paths import expand_home
from scopestate.persistence.redis.options import without_credentials
from scopestate.persistence.sqlite.adapter import FileAdapter
from scopestate.persistence.sqlite.reading import StoreFacts, StoreReader
from scopestate.transfer import (
    BATCH_KEYS,
    Imported,
    Reader,
    SharedReader,
    SharedState,
    export_lines,
    import_in_steps,
    import_whole,
)
from scopestate.wire.address import Address
from scopestate.wire.client import Client

ENGINE_ADDRESS: Final = ("ws://", "wss://", "ws+unix://")
REDIS_ADDRESS: Final = ("redis://", "rediss://", "unix://")
_HOST_AND_PORT: Final = re.compile(r"[A-Za-z0-9_.-]+:[0-9]{1,5}")


def info(where: str, *, exact_times: bool, as_json: bool) -> None:
    """See `store.info`."""
    with errors_to_exit_codes(as_json=as_json):
        _info(where, exact_times=exact_times, as_json=as_json)


def _info(where: str, *, exact_times: bool, as_json: bool) -> None:
    with _reader(where) as reader:
        sizes, facts = reader.sizes(), reader.facts()
        keys, size = sum(one.keys for one in sizes), reader.size_bytes()
    if as_json:
        whole = {"directory": reader.directory, "size_bytes": size, "keys": keys, "scopes": sizes}
        out(json_of({**whole, **msgspec.structs.asdict(facts)}))
        return
    out(shown(f"{reader.directory}: {many(len(sizes), 'scope')}, {many(keys, 'key')}, {decimal(size)} on disk"))
    out(f"id {facts.id}, {_said(facts, exact_times=exact_times)}")
    if sizes:
        table = Table("scope", box=None, header_style="bold")
        for name in ("keys", "bytes", "last write", "with a deadline"):
            table.add_column(name, justify="right")
        for one in sizes:
            numbers = (one.keys, one.bytes, one.revision, one.expiring)
            table.add_row(ascii(one.scope)[1:-1] or '""', *map(number, numbers))
        print_rich(table)


def _said(facts: StoreFacts, *, exact_times: bool) -> str:
    parts = ["in use, or not closed cleanly" if facts.in_use else "closed cleanly"]
    if facts.saved_ms:
        parts.append(f"last saved {moment(facts.saved_ms, exactly=exact_times)}")
    if facts.ends:
        parts.append(f"not closed cleanly {many(facts.ends, 'time')} before")
    if facts.expired:
        parts.append(f"{many(facts.expired, 'key')} expired and not removed yet")
    if facts.answers:
        parts.append(f"{many(facts.answers, 'kept answer')} to calls with an idempotency key")
    return ", ".join(parts)


def keys(
    where: str,
    scope: str,
    prefix: str | None,
    start: str | None,
    after: str | None,
    end: str | None,
    limit: int | None,
    *,
    reverse: bool,
    as_json: bool,
) -> None:
    """See `store.keys`."""
    with errors_to_exit_codes(as_json=as_json), _reader(where) as reader:
        found = reader.keys(scope, Range(prefix, start, after, end, reverse, limit))
        for key in found:
            out(json_of(key))


def verify(where: str, config: str | None, *, as_json: bool) -> None:
    """See `store.verify`."""
    with (
        errors_to_exit_codes(as_json=as_json),
        ended_by_signals(),
        said_if_interrupted("the check has not ended; nothing was changed"),
    ):
        _verify(where, rules_for(where, config), as_json=as_json)


def _verify(where: str, rules: Rules, *, as_json: bool) -> None:
    misfits = Found()
    with _reader(where) as reader:
        steps = reader.steps_to_check()
        with progress("checking the database", steps, percent) as advance:
            problems = run_beside(lambda: reader.problems(advance), reader.interrupt)
            advance(steps)
        if not problems and rules:
            _check_values(reader, rules, misfits)
    ok = not (problems or misfits.count)
    if as_json:
        out(json_of({"ok": ok, "problems": problems, **(misfits.facts() if rules else {})}))
    else:
        for problem in (*problems, *misfits.lines()):
            standard_error().print(shown(problem), markup=False)
        count = len(problems) + misfits.count
        out(shown(f"{reader.directory}: {many(count, 'problem') if count else 'ok'}"))
    if not ok:
        raise SystemExit(Exit.STORE)


def _check_values(reader: StoreReader, rules: Rules, misfits: Found) -> None:
    """Check the values of each scope that has a rule."""
    ruled = [one for one in reader.sizes() if rules.of(one.scope) is not None]
    done = 0
    with progress("checking values", sum(one.keys for one in ruled)) as advance:
        for one in ruled:
            for key, entry in reader.entries(one.scope):
                misfits.check(rules, one.scope, key, entry.json)
                done += 1
                if done % BATCH_KEYS == 0:
                    advance(done)
        advance(done)


def migrate(where: str, config: str | None, scope: str | None, *, dry_run: bool, as_json: bool) -> None:
    """See `store.migrate`."""
    with errors_to_exit_codes(as_json=as_json), ended_by_signals():
        rules = rules_for(where, config)
        if not rules:
            raise ConfigError("no configuration file: name one with --config, whose rules have versions")
        migration = Migration(rules, scope, dry_run=dry_run)
        with said_if_interrupted(migration):
            _migrate(directory_of(where), migration, as_json=as_json)


def _migrate(directory: str, migration: Migration, *, as_json: bool) -> None:
    from scopestate.opening import open_store  # noqa: PLC0415 - not needed for most commands

    with ExitStack() as stack:
        store = None
        if not migration.dry_run:
            StoreReader(directory).close()  # raises if there is no store; opening would create one
            store = open_store(KvOptions("file_based", directory))
            stack.callback(store.close)
        reader = stack.enter_context(StoreReader(directory))
        total = sum(one.keys for one in reader.sizes() if migration.concerns(one.scope))
        advance = stack.enter_context(progress("migrating", total))
        try:
            migration.run(reader, store, advance)
        except Exception:
            if not as_json:
                standard_error().print(shown(f"stopped: {migration}"), markup=False)
            raise
    found = migration.found
    if as_json:
        out(json_of({**migration.facts(), **found.facts()}))
    else:
        for line in found.lines():
            standard_error().print(shown(line), markup=False)
        out(shown(f"{directory}: {migration.summary()}"))
    if found.count:
        raise SystemExit(Exit.STORE)


def export(where: str, to: str, token: str | None, ca_file: str | None, *, as_json: bool) -> None:
    """See `store.export`."""
    with errors_to_exit_codes(as_json=as_json), ended_by_signals(), ExitStack() as stack:
        reader: Reader
        total: int | None = None
        if _is_elsewhere(where):
            state = _open_shared(where, token, ca_file)
            stack.callback(state.close)
            reader = SharedReader(state)
        else:
            reader = stack.enter_context(_reader(where))
            total = sum(one.keys for one in reader.sizes())
        written = stack.enter_context(output(to, reader))
        with progress("exporting", total) as advance:
            for line in export_lines(reader, advance):
                written.write(line)
        stack.close()  # gives the file its name
        _report("exported", advance.done, to, written.remark, as_json=as_json)


def import_(
    target: str, source: str, config: str | None, token: str | None, ca_file: str | None, *, merge: bool, as_json: bool
) -> None:
    """See `store.import_`."""
    imported = _Imported(_shown(target))
    with (
        errors_to_exit_codes(as_json=as_json),
        ended_by_signals(),
        said_if_interrupted(imported),
        ExitStack() as stack,
    ):
        file = stack.enter_context(source_of(source))
        rules = rules_for(target, config)
        with progress("checking the file", file.size(), size) as advance:
            total = file.count_keys(rules.check if rules else bool, advance)
        store = _open_target(target, token, ca_file)
        stack.callback(store.close)
        if not merge and store.scopes():
            raise StoreUnusable(
                f"{_shown(target)} already holds keys; use --merge to add to them, or choose an empty one"
            )
        whole = isinstance(store, FileAdapter)
        if not whole and not as_json:
            begins = f"importing {many(total, 'key')} to {_shown(target)}"
            standard_error().print(shown(f"{begins}; if this is interrupted, repeat it with --merge"), markup=False)
        with progress("importing", total) as advance, _said_if_it_fails(imported):
            imported.begin(advance, total, whole=whole)
            if isinstance(store, FileAdapter):
                done = import_whole(file.lines(), store, advance)
            else:
                done = import_in_steps(file.lines(), store, advance)
            imported.end(done.keys)
        stack.close()
        if as_json:
            left = {"expired": done.expired, "answers_left_out": done.left_out, "new_revisions": done.renumbered}
            note_json({"imported": done.keys, **{name: value for name, value in left.items() if value}})
        else:
            _report("imported", done.keys, _shown(target), as_json=False)
            for remark in _remarks(done):
                standard_error().print(remark, markup=False)


def _remarks(done: Imported) -> Iterator[str]:
    if done.expired:
        yield f"left out: {many(done.expired, 'key')} that had expired"
    if done.left_out:
        answers = many(done.left_out, "kept answer")
        yield f"left out: {answers}; a call that is repeated with its idempotency key will be carried out again"
    if done.renumbered:
        yield "keys have other revisions than in the file: a write that expects one of those is refused"


class _Imported:
    """What an import has written so far. Its text is used as the end of a message."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._advance: Advance | None = None
        """None before writing begins."""
        self._total = 0
        self._whole = True
        self._ended: int | None = None

    def begin(self, advance: Advance, total: int, *, whole: bool) -> None:
        """Note that writing begins. `whole`: in one transaction."""
        self._advance, self._total, self._whole = advance, total, whole

    def end(self, keys: int) -> None:
        """Note that everything is written: `keys` keys."""
        self._ended = keys

    def __str__(self) -> str:
        if self._ended is not None:
            return f"all {self._ended:,} keys were imported to {self._target}"
        if self._advance is None or self._whole:
            return f"nothing was imported to {self._target}"
        return (
            f"about {self._advance.done:,} of {self._total:,} keys were imported to {self._target}; to continue, "
            "repeat the import with --merge"
        )


@contextmanager
def _said_if_it_fails(imported: _Imported) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{error}; {imported}", code=error.code) from error
    except DeserializationError as error:
        raise StorageError(
            f"{error} (the file has changed since it was checked); {imported}", code=error.code
        ) from error


# ------------------------------------------------------------------------------------------------------------ places


def _reader(where: str) -> StoreReader:
    if _is_elsewhere(where):
        raise StoreUnusable(
            f"{_shown(where)} is not a store on this disk; give the directory of one, or use `store export`"
        )
    return StoreReader(directory_of(where))


def _is_elsewhere(where: str) -> bool:
    """Tell whether the state is in another engine or in Redis."""
    if where.startswith((*ENGINE_ADDRESS, *REDIS_ADDRESS)):
        return True
    return names_config(where) and isinstance(load(where).adapter.config, (BridgeOptions, RedisOptions))


def _shown(where: str) -> str:
    return without_credentials(where) if where.startswith(REDIS_ADDRESS) else where


def directory_of(where: str) -> str:
    """Return the directory that an argument names. Raises ConfigError."""
    if not names_config(where):
        if _HOST_AND_PORT.fullmatch(where) and not os.path.exists(where):
            raise StoreUnusable(
                f"there is no store in {where}; for Redis write redis://{where}, for a running engine ws://{where}, "
                f"for a directory ./{where}"
            )
        if "://" in where and not os.path.exists(where):
            raise StoreUnusable(
                f"{where} is not the address of a store: that of a running engine begins with ws://, wss:// or "
                "ws+unix://, that of Redis with redis://, rediss:// or unix://"
            )
        return expand_home(where)
    config = load(where).adapter.config
    if not isinstance(config, KvOptions) or config.store_method != "file_based":
        raise ConfigError("this configuration has no file_based store", file=where)
    return config.file_path


def _open_target(target: str, token: str | None, ca_file: str | None) -> FileAdapter | SharedState:
    if _is_elsewhere(target):
        return _open_shared(target, token, ca_file)
    from scopestate.opening import open_store  # noqa: PLC0415 - not needed for most commands

    directory = directory_of(target)
    try:
        return open_store(KvOptions("file_based", directory))
    except StoreLocked as locked:
        socket_file = os.path.join(os.path.realpath(expand_home(directory)), "state.sock")
        if locked.alone is not None or not os.path.lexists(socket_file):
            raise
        address = Address.of_path(socket_file).url
        raise StorageError(f"{locked}. To import through its engine, give this target: {address}") from locked


def _open_shared(where: str, token: str | None, ca_file: str | None) -> SharedState:
    from scopestate.opening import open_shared  # noqa: PLC0415 - not needed for most commands

    if where.startswith(ENGINE_ADDRESS):
        adapter = AdapterConfig("bridge", BridgeOptions(where, token, ca_file))
    elif where.startswith(REDIS_ADDRESS):
        adapter = AdapterConfig("redis", RedisOptions(where, tls_ca_file=ca_file))
        validate(Config(adapter))
    else:
        adapter = load(where).adapter
    if isinstance(adapter.config, BridgeOptions):
        _refuse_if_away(adapter.config)
    if isinstance(adapter.config, RedisOptions):
        # Copying publishes no events and reads none.
        options = msgspec.structs.replace(adapter.config, events="local")
        adapter = msgspec.structs.replace(adapter, config=options)
    return open_shared(adapter)


def _refuse_if_away(bridge: BridgeOptions) -> None:
    """Raise NotConnected at once if no engine answers: a bridge would wait for it."""
    if not bridge.tls_verify:
        return  # the commands have no such option
    with_client(bridge.bridge_url, bridge.token, Client.wait_connected, as_json=False, ca_file=bridge.tls_ca_file)


def _report(what: str, keys: int, place: str, remark: str = "", *, as_json: bool) -> None:
    if as_json:
        note_json({what: keys, **({"overwritten": True} if remark else {})})
    else:
        text = f"{what} {many(keys, 'key')}{'' if place == '-' else f' to {place}'}{remark}"
        standard_error().print(shown(text), markup=False)
