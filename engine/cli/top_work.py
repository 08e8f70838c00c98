"""The work of `scopestate top`: the figures of an engine, live."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import msgspec
import typer

from scopestate.cli.client import run_until_signal
from scopestate.cli.people import number
from scopestate.cli.rules import names_config
from scopestate.cli.store_work import ENGINE_ADDRESS, REDIS_ADDRESS, directory_of
from scopestate.cli.terminal import Exit, errors_to_exit_codes, json_of, out, shown
from scopestate.cli.top_figures import Rates, Reading, summary
from scopestate.cli.top_sources import EngineSource, RedisSource, Source, StoreSource
from scopestate.config import AdapterConfig, BridgeOptions, Config, RedisOptions, load, validate
from scopestate.paths import expand_home
from scopestate.persistence.redis.options import without_credentials
from scopestate.wire.address import Address


def top(
    where: str | None, interval: float, url: str, token: str | None, ca_file: str | None, *, once: bool, as_json: bool
) -> None:
    """See `top.top`."""
    for_people = sys.stdout is not None and sys.stdout.isatty() and not as_json
    with errors_to_exit_codes(as_json=as_json):
        source = source_of(url if where is None else where, token, ca_file)
        if once or not for_people:
            reading, rates = run_until_signal(_read_twice(source, interval))
            if for_people:
                for line in (*summary(reading, rates), *_largest(reading)):
                    out(shown(line, keep=""))
            else:
                out(json_of({**msgspec.to_builtins(reading), "per_second": rates}))
            return
        _show(source, interval)


def source_of(where: str, token: str | None, ca_file: str | None) -> Source:
    """Return the source of a place's figures. Raises ConfigError if `where` does not name a place."""
    if where.startswith(ENGINE_ADDRESS):
        return EngineSource(Address(where, token=token, tls_ca_file=ca_file))
    if where.startswith(REDIS_ADDRESS):
        config = Config(AdapterConfig("redis", RedisOptions(where, tls_ca_file=ca_file)))
        validate(config)
        return RedisSource(config, without_credentials(where))
    if names_config(where):
        config = msgspec.structs.replace(load(where), functions={}, triggers=())
        options = config.adapter.config
        if isinstance(options, RedisOptions):
            return RedisSource(config, options.described())
        if isinstance(options, BridgeOptions):
            return EngineSource(
                Address(
                    options.bridge_url,
                    token=options.token,
                    tls_ca_file=options.tls_ca_file,
                    tls_verify=options.tls_verify,
                )
            )
    return StoreSource(expand_home(directory_of(where)))


async def _read_twice(source: Source, interval_s: float) -> tuple[Reading, dict[str, float]]:
    rates = Rates()
    try:
        rates.of(await source.read())
        await asyncio.sleep(interval_s)
        reading = await source.read()
        return reading, rates.of(reading)
    finally:
        await source.close()


def _largest(reading: Reading) -> list[str]:
    return [
        f"  {one.scope or '(empty name)'}: {number(one.keys)} keys"
        + ("" if one.writes_per_s is None else f", {number(one.writes_per_s)} writes/s")
        for one in reading.scopes[:10]
    ]


def _show(source: Source, interval_s: float) -> None:
    """Run the live view. Ends the program if it was interrupted, or if its library is not installed."""
    try:
        from scopestate.cli.top_screen import TopScreen  # noqa: PLC0415 - its library is an extra of its own
    except ImportError as error:
        if (error.name or "").startswith("scopestate"):
            raise
        raise typer.BadParameter(
            f"the live view needs the extra `tui` ({error}): pip install 'scopestate[tui]'; --once works without it"
        ) from error
    # Log lines would be written over the view, which shows the same facts.
    nowhere = logging.NullHandler()
    logging.getLogger().addHandler(nowhere)
    try:
        code: Any = TopScreen(source, interval_s).run()
    finally:
        logging.getLogger().removeHandler(nowhere)
    if code == Exit.INTERRUPTED:
        raise SystemExit(Exit.INTERRUPTED)
