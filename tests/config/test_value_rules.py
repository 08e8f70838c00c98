"""`type:` and `schema:` of rules: what they may name, what is refused and where, and what a reload changes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scopestate import Engine
from scopestate.config import Config, ScopeRule, check, from_mapping, load, loads, validate
from scopestate.config.loader import examine
from scopestate.errors import ConfigError, SchemaViolation
from scopestate.ops.json_schema import JsonSchema

SECONDS = 30.0

Write = Callable[[str], Path]
Module = Callable[[str, str], None]
NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


class User(msgspec.Struct):
    name: str


def rule_of(config: Config) -> ScopeRule:
    (rule,) = config.scopes
    return rule


def schema_of(config: Config) -> JsonSchema:
    found = rule_of(config).schema
    assert found is not None
    return found.schema


def test_a_type_is_imported(write: Write, module: Module) -> None:
    module(
        "shop.models", "import dataclasses\n@dataclasses.dataclass\nclass User:\n    name: str\nUsers = list[User]\n"
    )

    config = load(write("scopes:\n  - {name: users, type: 'shop.models:User', enforce: warn}\n"))
    listed = load(write("scopes:\n  - {name: users, type: 'shop.models:Users'}\n"))

    found, many = rule_of(config).type, rule_of(listed).type
    assert found is not None
    assert many is not None
    assert (found.target, found.type.__name__, rule_of(config).enforce) == ("shop.models:User", "User", "warn")
    assert many.type == list[found.type]
    assert load(write("scopes:\n  - {name: users, type: 'shop.models:User', enforce: warn}\n")) == config


@pytest.mark.parametrize(
    ("line", "key", "text"),
    [
        ("type: 'shop.models:Nothing'", "scopes[0].type", "no attribute 'Nothing'"),
        ("type: 'no_such_module:User'", "scopes[0].type", "no module 'no_such_module'"),
        ("type: User", "scopes[0].type", "package.module:Type"),
        ("type: 'shop.models:PLAIN'", "scopes[0].type", "is not a type that values can have"),
        ("type: 7", "scopes[0].type", "expected a string"),
        ("schema: none.json", "scopes[0].schema", "none.json: there is no such file"),
        ("schema: bad.json", "scopes[0].schema", "it is not JSON"),
        ("schema: list.json", "scopes[0].schema", "a JSON schema is an object"),
        ("schema: {type: objekt}", "scopes[0].schema", "not a valid JSON schema: 'objekt'"),
        ("schema: {properties: {a: {pattern: '('}}}", "scopes[0].schema", "at `$.properties.a.pattern`"),
        ("schema: {$ref: '#/$defs/none'}", "scopes[0].schema", "'#/$defs/none' leads nowhere"),
        ("schema: {$ref: 'https://example.com/a.json'}", "scopes[0].schema", "nothing is read over the network"),
        ("schema: {$ref: '../secret.json'}", "scopes[0].schema", "nor a file beside it"),
        ("schema: {$ref: 'bad.json'}", "scopes[0].schema", "it is not JSON"),
        ("schema: {$schema: 'http://json-schema.org/draft-07/schema#'}", "scopes[0].schema", "2020-12"),
        ("schema: 7", "scopes[0].schema", "expected a string"),
        ("type: 'shop.models:User'\n    schema: {}", "scopes[0].schema", "not both"),
        ("enforce: warn", "scopes[0].enforce", "has no effect without"),
        ("version: 2\n    version_field: v", "scopes[0].upgrade", "needs `upgrade`"),
        ("version: 2\n    upgrade: 'shop.models:up'", "scopes[0].version_field", "needs the name of a field"),
        ("upgrade: 'shop.models:up'", "scopes[0].upgrade", "has no effect without `version`"),
        ("strict: true\n    version_field: v", "scopes[0].version_field", "has no effect without `version`"),
        ("version: 0", "scopes[0].version", "1"),
        ("version: 2\n    version_field: v\n    upgrade: 'shop.models:later'", "scopes[0].upgrade", "plain function"),
        ("version: 2\n    version_field: v\n    upgrade: 'shop.models:PLAIN'", "scopes[0].upgrade", "cannot be called"),
        ("type: 'shop.models:User'\n    enforce: maybe", "scopes[0].enforce", "maybe"),
    ],
)
def test_what_cannot_be_used_is_refused_with_file_line_and_key(
    write: Write, module: Module, tmp_path: Path, line: str, key: str, text: str
) -> None:
    module(
        "shop.models",
        "import msgspec\nclass User(msgspec.Struct):\n    name: str\nPLAIN = 7\n"
        "def up(value, version): return value\nasync def later(value, version): return value\n",
    )
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path.parent / "secret.json").write_text("{}")
    path = write(f"scopes:\n  - name: users\n    {line}\n")

    with pytest.raises(ConfigError) as caught:
        load(path)

    assert (caught.value.file, caught.value.key) == (str(path), key)
    assert caught.value.line in (2, 3, 4, 5)
    assert text in str(caught.value)


def test_a_schema_is_read_with_the_files_beside_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    users = {"type": "object", "properties": {"at": {"$ref": "parts/address.json#/$defs/address"}}}
    address = {"$defs": {"address": {"type": "object", "properties": {"zip": {"$ref": "zip.json"}}}}}
    (tmp_path / "users.schema.json").write_text(json.dumps(users))
    (tmp_path / "parts/address.json").write_text(json.dumps(address))
    (tmp_path / "parts/zip.json").write_text('{"type": "string", "pattern": "^[0-9]{5}$"}')
    path = write("scopes:\n  - {name: users, schema: users.schema.json}\n")

    config = load(path)

    assert schema_of(config).json_schema() == users
    assert {Path(file).name for file in examine(path).files} == {"users.schema.json", "address.json", "zip.json"}
    with Engine.from_config(config) as engine:
        engine.set("users", "ada", {"at": {"zip": "12345"}})
        with pytest.raises(SchemaViolation) as caught:
            engine.set("users", "ada", {"at": {"zip": "1234"}})
    assert (caught.value.path, caught.value.type_name) == ("$.at.zip", "users.schema.json")
    assert load(path) == config
    (tmp_path / "parts/zip.json").write_text('{"type": "string"}')
    assert load(path) != config


def test_a_schema_with_a_name_of_the_web_finds_its_neighbours_beside_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text('{"$id": "https://example.com/s/users.json", "items": {"$ref": "text.json"}}')
    (tmp_path / "text.json").write_text('{"type": "string"}')

    with Engine.from_config(load(write("scopes:\n  - {name: a, schema: users.json}\n"))) as engine:
        engine.set("a", "k", ["text"])
        with pytest.raises(SchemaViolation):
            engine.set("a", "k", [7])


@pytest.mark.parametrize(
    ("format_", "good", "bad"),
    [
        ("date-time", "2026-01-02T03:04:05Z", "2026-01-02"),
        ("date", "2026-01-02", "2026-13-02"),
        ("time", "03:04:05Z", "25:00:00Z"),
        ("email", "ada@example.com", "ada"),
        ("uri", "https://example.com/a", "not a uri"),
        ("uuid", "2eb8aa08-aa98-11ea-b4aa-73b441d16380", "2eb8"),
        ("ipv4", "127.0.0.1", "127.0.0"),
        ("duration", "P1D", "a day"),
        ("json-pointer", "/a/b", "a/b"),
        ("no-format-of-the-standard", "anything", None),
    ],
)
def test_formats_are_checked(format_: str, good: str, bad: str | None) -> None:
    schema = JsonSchema("x", {"format": format_})
    schema.check(json.dumps(good).encode())
    if bad is not None:
        with pytest.raises(Exception, match="not a"):
            schema.check(json.dumps(bad).encode())


def test_a_program_gives_types_and_schemas_themselves() -> None:
    config = from_mapping({"scopes": [{"name": "a", "type": User}, {"name": "b", "schema": NAME}]})

    validate(config)
    assert [rule.type.target for rule in config.scopes if rule.type is not None] == ["User"]
    with Engine.from_config(config) as engine:
        for scope in ("a", "b"):
            with pytest.raises(SchemaViolation):
                engine.set(scope, "ada", {"name": 7})
    with pytest.raises(ConfigError, match="is not a type that values can have"):
        from_mapping({"scopes": [{"name": "a", "type": object()}]})
    with pytest.raises(ConfigError, match="no file beside"):
        from_mapping({"scopes": [{"name": "a", "schema": {"$ref": "b.json"}}]})
    with pytest.raises(ConfigError, match="no file beside"):
        loads("scopes:\n  - {name: a, schema: {$ref: b.json}}\n")


def test_a_reload_changes_the_rule_at_once_and_one_that_cannot_be_loaded_changes_nothing(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schema = tmp_path / "users.json"
    schema.write_text(json.dumps(NAME))
    path = write("scopes:\n  - {name: users, schema: users.json}\n")
    with Engine.from_config(path) as engine:

        def accepts(value: Any) -> bool:
            try:
                engine.set("users", "ada", value)
            except SchemaViolation:
                return False
            return True

        def until(condition: Callable[[], bool]) -> bool:
            pause = threading.Event()
            for _ in range(int(SECONDS / 0.02)):
                if condition():
                    return True
                pause.wait(0.02)
            return False

        assert accepts({"name": "Ada"})
        assert not accepts([])
        schema.write_text('{"type": "array"}')  # the file beside it alone
        assert until(lambda: accepts([]))
        assert not accepts({"name": "Ada"})
        schema.write_text('{"type": "objekt"}')
        assert until(lambda: "not a valid JSON schema" in caplog.text)
        assert accepts([])
        assert not accepts({"name": "Ada"})
        write("scopes:\n  - {name: users, schema: users.json, enforce: warn}\n")
        schema.write_text(json.dumps(NAME))
        assert until(lambda: accepts([]) and engine.stats().misfits > 0)
        write("scopes: []\n")

        def is_free() -> bool:
            before = engine.stats().misfits
            return accepts([]) and engine.stats().misfits == before

        assert until(is_free)


def test_check_reports_all_of_them(write: Write) -> None:
    path = write("scopes:\n  - {name: a, schema: none.json}\n  - {name: b, type: 'none:None'}\n")

    assert [error.line for error in check(path)] == [2, 3]


def test_nothing_is_imported_for_files_without_a_schema() -> None:
    code = (
        "import sys\nfrom scopestate import Engine\n"
        "class User: pass\n"
        "Engine.from_config({'scopes': [{'name': 'a', 'type': int}]}).close()\n"
        "sys.exit(' '.join(name for name in ('jsonschema', 'referencing') if name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).stderr.strip() == b""


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)

    with pytest.raises(ConfigError, match=r"pip install 'scopestate\[schema\]'"):
        from_mapping({"scopes": [{"name": "a", "schema": NAME}]})
