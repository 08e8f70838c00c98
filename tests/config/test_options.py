"""What the options of every backend can do, whichever it is: a new backend adds a row to the table, and no test."""

from __future__ import annotations

import msgspec
import pytest

from scopestate.config import AdapterConfig, Config, from_mapping, validate
from scopestate.config.schema import ADAPTERS, AdapterOptions

each_kind = pytest.mark.parametrize("kind", ADAPTERS.values(), ids=ADAPTERS)


@each_kind
def test_the_defaults_have_no_mistakes(kind: type[AdapterOptions]) -> None:
    assert list(kind().mistakes()) == []


@each_kind
def test_they_say_where_the_state_is_and_show_no_secret(kind: type[AdapterOptions]) -> None:
    secrets = [name for name in kind.__struct_fields__ if name in {"token", "password", "sentinel_password"}]
    options = kind(**dict.fromkeys(secrets, "s3cret"))

    assert options.described()
    assert "s3cret" not in options.described() + repr(options)


@each_kind
def test_an_option_is_immutable_and_documented(kind: type[AdapterOptions]) -> None:
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.forbid_unknown_fields
    assert kind.__doc__


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_file_is_read_straight_into_them(name: str) -> None:
    adapter = from_mapping([{"name": "iii-state", "config": {"adapter": {"name": name, "config": {}}}}]).adapter

    assert adapter == AdapterConfig(name, ADAPTERS[name]())  # type: ignore[arg-type]
    assert type(adapter.config) is ADAPTERS[name]
    validate(Config(adapter))


@each_kind
def test_only_a_bridge_can_lead_back_to_the_engines_own_server(kind: type[AdapterOptions]) -> None:
    fields = {name: "ws://other.example:1" for name in kind.__struct_fields__ if name == "bridge_url"}

    msgspec.structs.replace(kind(), **fields).refuse_server("127.0.0.1", 49134)
