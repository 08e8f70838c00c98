"""Every mistake is one clear error with file, line and key."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scopestate import config
from scopestate.config import (
    AdapterConfig,
    Config,
    FunctionRef,
    KvOptions,
    LimitsConfig,
    RedisOptions,
    ScopeRule,
    TriggerConfig,
)
from scopestate.errors import ConfigError

WHOLE = "expected a whole number from 1 to 1000000000"
KV = "workers:\n- name: iii-state\n  config:\n    adapter:\n      name: kv\n      config:\n        "
AT = "workers[0].config.adapter.config"
BUILT_IN = "this function is built in and cannot be replaced: choose another id"
LIST = "a mapping with `workers:`, or a list of workers"


# Text, line, key and problem.
MISTAKES: list[tuple[str, int | None, str | None, str]] = [
    # The document.
    ("", 1, None, "the configuration is empty; for the defaults write `workers: []`"),
    ("# only a comment\n", 1, None, "the configuration is empty; for the defaults write `workers: []`"),
    ("~", 1, None, f"expected {LIST}, found null"),
    ("\n\nhello", 3, None, f"expected {LIST}, found the string 'hello'"),
    ("12", 1, None, f"expected {LIST}, found the integer 12"),
    ("a: 1\n---\nb: 2\n", 2, None, "a second YAML document starts here; a configuration is one document"),
    # Unknown keys.
    ("worker: []", 1, "worker", "unknown key `worker`, did you mean `workers`?"),
    (
        "\nzzz: 1",
        2,
        "zzz",
        "unknown key `zzz`; known here: workers, modules, functions, triggers, scopes, limits",
    ),
    (
        "limits:\n  max_value_byte: 1",
        2,
        "limits.max_value_byte",
        "unknown key `max_value_byte`, did you mean `max_value_bytes`?",
    ),
    (
        "limits: {max-value-bytes: 1}",
        1,
        "limits.max-value-bytes",
        "unknown key `max-value-bytes`, did you mean `max_value_bytes`?",
    ),
    (
        KV + "save_intervall_ms: 1",
        7,
        f"{AT}.save_intervall_ms",
        "unknown key `save_intervall_ms`, did you mean `save_interval_ms`?",
    ),
    (
        KV + "Store_Method: in_memory",
        7,
        f"{AT}.Store_Method",
        "unknown key `Store_Method`, did you mean `store_method`?",
    ),
    (
        "- name: iii-state\n  config: {adaptor: {name: kv}}",
        2,
        "[0].config.adaptor",
        "unknown key `adaptor`, did you mean `adapter`?",
    ),
    (
        "- name: iii-state\n  config: {adapter: {name: kv, conf: {}}}",
        2,
        "[0].config.adapter.conf",
        "unknown key `conf`, did you mean `config`?",
    ),
    ("- name: iii-state\n  confg: {}", 2, "[0].confg", "unknown key `confg`, did you mean `config`?"),
    ("triggers:\n- function_id: a\n  scop: b", 3, "triggers[0].scop", "unknown key `scop`, did you mean `scope`?"),
    ("limits: {<<: {a: 1}}", 1, "limits.<<", "YAML merge keys are not read here; write the keys out"),
    # Keys.
    (
        "limits: {}\nscopes: []\nlimits: {}",
        3,
        "limits",
        "this key appears twice, first on line 1; keep one of them",
    ),
    (
        "limits:\n  scope_mailbox: 1\n  'scope_mailbox': 2",
        3,
        "limits.scope_mailbox",
        "this key appears twice, first on line 2; keep one of them",
    ),
    ("- name: x\n- {a: 1, a: 2, name: y}", 2, "[1].a", "this key appears twice, first on line 2; keep one of them"),
    ("limits: {[a]: 1}", 1, "limits", "a key must be plain text, not a list or a mapping"),
    ("limits: {? {a: 1} : 1}", 1, "limits", "a key must be plain text, not a list or a mapping"),
    ("scopes: &s []\nlimits: {*s : 1}", 2, "limits", "a key must be plain text, not a list or a mapping"),
    ("functions: {12: json:loads}", 1, "functions.12", 'expected a string, found the integer 12; quote it: "12"'),
    # Sections of the wrong shape.
    ("workers: {}", 1, "workers", "expected a list, found a mapping"),
    ("workers: 5", 1, "workers", "expected a list, found the integer 5"),
    ("workers: [5]", 1, "workers[0]", "expected a mapping with `name` and `config`, found the integer 5"),
    ("workers: [[]]", 1, "workers[0]", "expected a mapping with `name` and `config`, found a list"),
    ("functions: []", 1, "functions", "expected a mapping, found a list"),
    ("functions:\n  '': json:loads", 2, "functions.", "a function id is a non-empty string, not ''"),
    ("triggers:\n  - scope: a\n    function_id: ''", 3, "triggers[0].function_id", "expected a non-empty string"),
    ("triggers:\n  - function_id: f\n    id: ''", 3, "triggers[0].id", "expected a non-empty string"),
    ("functions:\n  state::set: json:loads", 2, "functions.state::set", BUILT_IN),
    ("functions: {f: [a]}", 1, "functions.f", "expected a string, found a list"),
    ("triggers: {}", 1, "triggers", "expected a list, found a mapping"),
    ("triggers: [a]", 1, "triggers[0]", "expected a mapping, found the string 'a'"),
    ("triggers: [~]", 1, "triggers[0].function_id", "`function_id` is missing"),
    ("limits: 5", 1, "limits", "expected a mapping, found the integer 5"),
    ('limits: ""', 1, "limits", "expected a mapping, found the string ''"),
    ("limits: {scope_mailbox: {}}", 1, "limits.scope_mailbox", f"{WHOLE}, found a mapping"),
    # Workers and the adapter.
    ("- config: {}", 1, "[0].name", "this entry has no `name`"),
    ("- name: 5", 1, "[0].name", 'expected a string, found the integer 5; quote it: "5"'),
    ("- name: iii_state", 1, "[0].name", "write `iii-state`, found 'iii_state'"),
    ("- name: III-State", 1, "[0].name", "write `iii-state`, found 'III-State'"),
    (
        "- name: iii-state\n- name: x\n- name: iii-state",
        3,
        "[2]",
        "a second iii-state entry; the first is on line 1, keep one",
    ),
    (
        "modules:\n- name: iii-state\nworkers:\n- name: iii-state",
        2,
        "modules[0]",
        "a second iii-state entry; the first is on line 4, keep one",
    ),
    ("- name: iii-state\n  config: []", 2, "[0].config", "expected a mapping, found a list"),
    (
        "- name: iii-state\n  config: {adapter: kv}",
        2,
        "[0].config.adapter",
        "expected a mapping with `name` and `config`, found the string 'kv'",
    ),
    (
        "- name: iii-state\n  config: {adapter: {config: {}}}",
        2,
        "[0].config.adapter.name",
        "the adapter has no `name`; write `name: kv`",
    ),
    (
        "- name: iii-state\n  config:\n    adapter:\n      name: etcd",
        4,
        "[0].config.adapter.name",
        "there is no adapter 'etcd'; this version has: kv, redis, bridge",
    ),
    (
        "- name: iii-state\n  config: {adapter: {name: brigde}}",
        2,
        "[0].config.adapter.name",
        "there is no adapter 'brigde', did you mean `bridge`?; this version has: kv, redis, bridge",
    ),
    (
        "- name: iii-state\n  config: {adapter: {name: KV}}",
        2,
        "[0].config.adapter.name",
        "there is no adapter 'KV', did you mean `kv`?; this version has: kv, redis, bridge",
    ),
    (
        "- name: iii-state\n  config: {adapter: {name: ~}}",
        2,
        "[0].config.adapter.name",
        "expected a string, found null",
    ),
    (
        KV + "store_method: filebased",
        7,
        f"{AT}.store_method",
        "expected `file_based` or `in_memory`, found the string 'filebased', did you mean `file_based`?",
    ),
    (KV + "store_method: 5", 7, f"{AT}.store_method", "expected `file_based` or `in_memory`, found the integer 5"),
    (KV + "file_path: 12", 7, f"{AT}.file_path", 'expected a string, found the integer 12; quote it: "12"'),
    (KV + "file_path:", 7, f"{AT}.file_path", "expected a string, found null"),
    # Triggers and scopes.
    ("triggers:\n- {scope: s}", 2, "triggers[0].function_id", "`function_id` is missing"),
    (
        "triggers: [{function_id: a, condition: b, condition_function_id: c}]",
        1,
        "triggers[0].condition_function_id",
        "`condition` and `condition_function_id` mean the same; keep one of them",
    ),
    (
        "triggers: [{function_id: a, condition_function_id: b, condition: c}]",
        1,
        "triggers[0].condition",
        "`condition` and `condition_function_id` mean the same; keep one of them",
    ),
    ("triggers: [{function: a}]", 1, "triggers[0].function", "unknown key `function`, did you mean `function_id`?"),
    (
        "triggers:\n- {function_id: a, id: t}\n- {function_id: b, id: t}",
        3,
        "triggers[1]",
        "trigger id 't' stands on line 2 already; remove one or give it another id",
    ),
    (
        "triggers:\n- {function_id: a}\n- {function_id: a, scope: ~}",
        3,
        "triggers[1]",
        "this trigger stands on line 2 already; remove one or give it another id",
    ),
    (
        "triggers:\n- {function_id: a, events: []}",
        2,
        "triggers[0].events",
        "an empty list would never fire; leave it out for every kind",
    ),
    (
        "triggers:\n- {function_id: a, events: [expird]}",
        2,
        "triggers[0].events[0]",
        "expected `created`, `deleted`, `expired` or `updated`, found the string 'expird', did you mean `expired`?",
    ),
    ("scopes:\n- {durability: commit}", 2, "scopes[0]", "give either `name` or `prefix`, found neither"),
    (
        "scopes:\n- {durability: commit, name: a, prefix: b}",
        2,
        "scopes[0]",
        "give either `name` or `prefix`, found both",
    ),
    (
        "scopes:\n- {name: a}",
        2,
        "scopes[0]",
        "give `durability`, `ttl_ms`, `strict`, `type`, `schema`, `version` or `history`, found none",
    ),
    (
        "scopes:\n- name: a\n  durability: commit\n  ttl_from: write",
        4,
        "scopes[0].ttl_from",
        "`ttl_from` has no effect without `ttl_ms`",
    ),
    (
        "scopes: [{name: a, ttl_ms: -1}]",
        1,
        "scopes[0].ttl_ms",
        "expected a whole number from 0 to 3153600000000 or null, found the integer -1",
    ),
    (
        "scopes: [{name: a, ttl_ms: 1, ttl_from: creation}]",
        1,
        "scopes[0].ttl_from",
        "expected `create` or `write`, or null, found the string 'creation', did you mean `create`?",
    ),
    ("scopes: [{name: a, ttl: 60}]", 1, "scopes[0].ttl", "unknown key `ttl`, did you mean `ttl_ms`?"),
    (
        "scopes: [{name: a, durability: commt}]",
        1,
        "scopes[0].durability",
        "expected `commit`, `interval` or `memory`, or null, found the string 'commt', did you mean `commit`?",
    ),
    # YAML that builds more than data.
    (
        "limits: !!python/object/apply:os.system ['exit 1']",
        1,
        "limits",
        "YAML tag !!python/object/apply:os.system is not allowed; write a plain value",
    ),
    ("a: &x [*x]", 1, "a[0]", "alias *x is inside the value that it refers to"),
    ("a: *nowhere", 1, "a", "alias *nowhere refers to no anchor above it"),
    ('limits: "\\uD800"', 1, "limits", "text with a lone surrogate escape, which no file or JSON can hold"),
]


@pytest.mark.parametrize(("text", "line", "key", "problem"), MISTAKES)
def test_a_mistake_is_one_error_with_file_line_and_key(
    text: str, line: int | None, key: str | None, problem: str, write: Callable[[str], Path]
) -> None:
    path = write(text)

    with pytest.raises(ConfigError) as caught:
        config.load(path)

    error = caught.value
    assert (error.problem, error.line, error.key, error.file) == (problem, line, key, str(path))
    assert str(error).startswith(f"{path}:{line}")
    assert error.code == "CONFIG_ERROR"


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ('"100"', "the string '100'"),
        ("-1", "the integer -1"),
        ("0", "the integer 0"),
        ("86400001", "the integer 86400001"),
        ("1.5", "the number 1.5"),
        ("5.0", "the number 5.0"),
        ("true", "the boolean true"),
        ("null", "null"),
        ("5s", "the string '5s'"),
        (".inf", "the number .inf"),
        ("1e3", "`1e3`, which YAML 1.1 reads as text"),
        ("0o17", "`0o17`, which YAML 1.1 reads as text"),
        ("010", "`010`, which YAML 1.1 reads as an octal number"),
        ("1:30", "`1:30`, which YAML 1.1 reads as a number"),
        ("1_000", "`1_000`, which YAML 1.1 reads as a number"),
        ("yes", "`yes`, which YAML 1.1 reads as a boolean"),
        ("9" * 5000, "the integer " + "9" * 57 + "..."),
        ("[1]", "a list"),
    ],
)
def test_save_interval_ms_takes_a_whole_number_of_its_range_only(written: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.loads(KV + f"save_interval_ms: {written}")

    assert caught.value.problem == f"expected a whole number from 1 to 86400000, found {found}"
    assert (caught.value.line, caught.value.key) == (7, f"{AT}.save_interval_ms")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("on", "`on`, which YAML 1.1 reads as a boolean"),
        ("No", "`No`, which YAML 1.1 reads as a boolean"),
        ("12", "the integer 12"),
        ("1.5", "the number 1.5"),
        ("true", "the boolean true"),
        ("2026-01-31", "`2026-01-31`, which YAML 1.1 reads as a date"),
        ("190:20:30", "`190:20:30`, which YAML 1.1 reads as a number"),
        ("1e3", "`1e3`, which YAML 1.1 reads as text"),
        ("=", "`=`, which YAML 1.1 reads as a default key"),
    ],
)
@pytest.mark.parametrize("field", ["scope", "key"])
def test_what_only_looks_like_text_must_be_quoted(field: str, written: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.loads(f"triggers:\n- function_id: f\n  {field}: {written}\n")

    assert caught.value.problem == f'expected a string or null, found {found}; quote it: "{written}"'
    assert (caught.value.line, caught.value.key) == (3, f"triggers[0].{field}")

    (trigger,) = config.loads(f"triggers:\n- function_id: f\n  {field}: '{written}'\n").triggers
    assert getattr(trigger, field) == written


def test_check_returns_every_mistake_in_the_order_of_the_lines(write: Callable[[str], Path]) -> None:
    path = write(
        "limits: {scope_mailbox: 0}\n"
        "workers:\n"
        "- name: iii-state\n"
        "  config: {adapter: {name: etcd}}\n"
        "functions: {a: 'json:nope', b: no.such.module.at:all}\n"
        "triggers: [{key: 12}]\n"
        "limits: {}\n"
        "extra: 1\n"
    )
    errors = config.check(path)

    assert [(error.line, error.key) for error in errors] == [
        (1, "limits.scope_mailbox"),
        (4, "workers[0].config.adapter.name"),
        (5, "functions.a"),
        (5, "functions.b"),
        (6, "triggers[0].key"),
        (6, "triggers[0].function_id"),
        (7, "limits"),
        (8, "extra"),
    ]
    assert {error.file for error in errors} == {str(path)}
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert str(caught.value) == str(errors[0])


def test_check_of_a_good_file_is_empty_and_of_bad_yaml_one(write: Callable[[str], Path]) -> None:
    assert config.check(write("workers: []")) == []
    assert [error.line for error in config.check(write("limits: {a: 1, a: 2}\nb: [\n"))] == [1, 3]


class TestUnreadable:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert self.text_for(tmp_path / "no.yaml") == "there is no such file"

    def test_a_missing_file_by_a_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert self.text_for(Path("no.yaml")) == f"there is no such file in {tmp_path}"

    def test_a_directory(self, tmp_path: Path) -> None:
        assert self.text_for(tmp_path) == "this is a directory; name the file in it"

    def test_a_file_where_a_directory_should_be(self, write: Callable[[str], Path]) -> None:
        assert self.text_for(write("") / "engine.yaml") == "the file cannot be read: Not a directory"

    def test_a_path_that_no_system_takes(self, tmp_path: Path) -> None:
        assert self.text_for(tmp_path / "a\0b") == "the file cannot be read: embedded null byte"

    def test_a_file_that_may_not_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # By replacing `open`: tests may run as root, whom no permission stops.
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        assert self.text_for(Path("engine.yaml")) == "the file cannot be read: Permission denied"

    def test_a_file_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / "big.yaml"
        path.write_bytes(b"#" * (1024 * 1024 + 1))

        assert self.text_for(path) == "the file is larger than 1048576 bytes; this is not a configuration"

    def test_a_file_that_is_not_utf_8(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.yaml"
        path.write_bytes("limits: {}\n# Zürich\n".encode("latin-1"))

        assert self.text_for(path, line=2) == "not UTF-8 text: byte 0xfc at offset 14"

    def text_for(self, path: Path, line: int | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            config.load(path)
        assert (caught.value.file, caught.value.line, caught.value.key) == (str(path), line, None)
        assert [str(error) for error in config.check(path)] == [str(caught.value)]
        return caught.value.problem


def test_text_too_long() -> None:
    with pytest.raises(ConfigError, match="longer than 1048576 characters"):
        config.loads("#" * (1024 * 1024 + 1))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: [1,\nb: }", 2, "(line 2, column 4)"),
        ("workers:\n\t- name: x", 2, "found character '\\t' that cannot start any token (line 2, column 1)"),
        ("a: 'open", 1, "found unexpected end of stream"),
        ("a: b: c", 1, "mapping values are not allowed here (line 1, column 5)"),
        ("a: 1\nb: \x07", 2, "character #x0007 is not allowed (line 2, column 4)"),
        ('a: "\\UFFFFFFFF"', 1, "not valid YAML"),
        ("%YAML 1." + "9" * 5000 + "\n--- a\n", 1, "not valid YAML"),
        ("a: [${X:1}", 1, "not valid YAML"),
        ("limits: !${X:1} {", 1, "not valid YAML"),
    ],
)
def test_bad_yaml_names_line_and_column(text: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.loads(text, file="x.yaml")

    assert caught.value.problem.startswith("not valid YAML: ")
    assert said in caught.value.problem
    assert (caught.value.file, caught.value.line) == ("x.yaml", line)


class TestFromMapping:
    @pytest.mark.parametrize(
        ("data", "key", "problem"),
        [
            (None, None, f"expected {LIST}, found null"),
            (5, None, f"expected {LIST}, found the integer 5"),
            ({"limits": {1: 2}}, "limits", "a key must be a string, found 1"),
            ({"limits": {"scope_mailbox": True}}, "limits.scope_mailbox", f"{WHOLE}, found the boolean true"),
            ({"limits": {"scope_mailbox": 2.0}}, "limits.scope_mailbox", f"{WHOLE}, found the number 2.0"),
            ({"limits": {"scope_mailbox": "2"}}, "limits.scope_mailbox", f"{WHOLE}, found the string '2'"),
            (
                {"limits": {"scope_mailbox": 1 << 100000}},
                "limits.scope_mailbox",
                f"{WHOLE}, found the integer of 100001 bits",
            ),
            ({"limits": {"scope_mailbox": b"2"}}, "limits.scope_mailbox", f"{WHOLE}, found a Python bytes"),
            (
                {"triggers": [{"function_id": "f", "key": dt.date(2026, 1, 31)}]},
                "triggers[0].key",
                "expected a string or null, found a Python date",
            ),
            (
                {"workers": [{"name": "iii-state"}, {"name": "iii-state"}]},
                "workers[1]",
                "a second iii-state entry; the first is at `workers[0]`, keep one",
            ),
            (
                {"triggers": [{"function_id": "f"}, {"function_id": "f"}]},
                "triggers[1]",
                "this trigger stands at `triggers[0]` already; remove one or give it another id",
            ),
            ({"worker": []}, "worker", "unknown key `worker`, did you mean `workers`?"),
        ],
    )
    def test_a_mistake_names_the_key_and_no_file(self, data: Any, key: str | None, problem: str) -> None:
        with pytest.raises(ConfigError) as caught:
            config.from_mapping(data)

        error = caught.value
        assert (error.problem, error.file, error.line, error.key) == (problem, None, None, key)

    @pytest.mark.parametrize("text", ["engine.yaml", b"workers: []"])
    def test_text_is_refused_with_the_way_out(self, text: Any) -> None:
        with pytest.raises(ConfigError, match="use `loads` for YAML text and `load` for a path"):
            config.from_mapping(text)

    def test_data_that_holds_itself(self) -> None:
        data: dict[str, object] = {}
        data["limits"] = data

        with pytest.raises(ConfigError, match="nested more than 64 levels deep, or holding themselves"):
            config.from_mapping(data)

    def test_too_much_data(self) -> None:
        with pytest.raises(ConfigError, match="more than 100000 values"):
            config.from_mapping({"workers": [None] * 100_001})


@pytest.mark.parametrize(
    ("built", "key"),
    [
        (Config(adapter=AdapterConfig("kv", KvOptions(save_interval_ms=0))), f"{AT}.save_interval_ms"),
        (Config(adapter=AdapterConfig("etcd")), "workers[0].config.adapter.name"),  # type: ignore[arg-type]
        (Config(adapter=AdapterConfig("redis")), f"{AT}.store_method"),
        (Config(adapter=AdapterConfig("redis", RedisOptions(tls_key_file="k"))), f"{AT}.tls_key_file"),
        (Config(adapter=AdapterConfig("redis", RedisOptions(sentinels=("a", "b:c")))), f"{AT}.sentinels[1]"),
        (Config(limits=LimitsConfig(handler_attempts=0)), "limits.handler_attempts"),
        (Config(scopes=(ScopeRule("commit"),)), "scopes[0]"),
        (Config(triggers=(TriggerConfig(5),)), "triggers[0].function_id"),  # type: ignore[arg-type]
        (Config(functions={"f": FunctionRef("x:y", 5)}), "functions.f"),  # type: ignore[arg-type]
        (Config(functions={"f": 5}), "functions.f"),  # type: ignore[dict-item]
    ],
)
def test_validate_finds_in_a_built_config_what_a_file_could_not_hold(built: Config, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.validate(built)

    assert caught.value.key == key


def test_a_path_may_be_a_string(write: Callable[[str], Path]) -> None:
    path = write("zzz: 1")

    with pytest.raises(ConfigError) as caught:
        config.load(os.fspath(path))
    assert caught.value.file == str(path)
