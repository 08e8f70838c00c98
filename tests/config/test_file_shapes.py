"""Which files load, and what they mean."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import msgspec
import pytest

from scopestate import config
from scopestate.config import AdapterConfig, Config, KvOptions, LimitsConfig, RetryConfig, ScopeRule, TriggerConfig
from scopestate.errors import ConfigError
from scopestate.ops.deliveries import Retry
from scopestate.ops.triggers import OPTIONS

IN_MEMORY = AdapterConfig("kv", KvOptions())

FULL = """\
workers:
  - name: iii-state
    config:
      adapter:
        name: kv
        config:
          store_method: file_based
          file_path: ./data/state_store
          save_interval_ms: 250
          durability: commit
functions:
  app::parse: json:loads
  app::join: "os:path.join"
triggers:
  - function_id: app::parse
    scope: users
    key: profile
    condition_function_id: app::is_adult
    id: greet
  - {function_id: app::later}
scopes:
  - {name: orders, durability: commit}
  - {prefix: "session:", durability: memory}
limits:
  max_value_bytes: 1048576
  handler_when_full: drop_oldest
"""


def test_a_full_file_gives_every_field() -> None:
    loaded = config.loads(FULL)

    assert loaded.adapter == AdapterConfig(
        "kv",
        KvOptions(store_method="file_based", file_path="./data/state_store", save_interval_ms=250, durability="commit"),
    )
    assert {name: (ref.target, ref.callable) for name, ref in loaded.functions.items()} == {
        "app::parse": ("json:loads", json.loads),
        "app::join": ("os:path.join", os.path.join),
    }
    assert loaded.triggers == (
        TriggerConfig("app::parse", "users", "profile", "app::is_adult", "greet"),
        TriggerConfig("app::later"),
    )
    assert loaded.scopes == (
        ScopeRule(name="orders", durability="commit"),
        ScopeRule(prefix="session:", durability="memory"),
    )
    assert loaded.limits == LimitsConfig(max_value_bytes=1048576, handler_when_full="drop_oldest")
    assert loaded.source is None


def test_functions_keep_the_order_of_the_file() -> None:
    text = "functions:\n  z: json:loads\n  a: json:dumps\n  m: json:load\n"

    assert list(config.loads(text).functions) == ["z", "a", "m"]


SAMPLE = """\
- name: iii-state
  config:
    adapter:
      name: kv
      config:
        store_method: file_based
        file_path: ./data/state_store
        save_interval_ms: 5000
"""

INSTALL_SNIPPET = """\
- adapter:
    config:
      file_path: ./data/state_store.db
      store_method: file_based
    name: kv
"""


def test_the_references_sample_pasted_alone_loads() -> None:
    assert config.loads(SAMPLE).adapter == AdapterConfig(
        "kv", KvOptions(store_method="file_based", file_path="./data/state_store", save_interval_ms=5000)
    )


def test_the_references_install_snippet_pasted_alone_loads() -> None:
    assert config.loads(INSTALL_SNIPPET).adapter == AdapterConfig(
        "kv", KvOptions(store_method="file_based", file_path="./data/state_store.db")
    )


def test_an_entry_with_only_an_adapter_counts_as_iii_state() -> None:
    with pytest.raises(ConfigError, match="a second iii-state entry; the first is on line 1") as caught:
        config.loads(INSTALL_SNIPPET + SAMPLE)

    assert (caught.value.line, caught.value.key) == (6, "[1]")


@pytest.mark.parametrize("section", ["workers", "modules"])
def test_both_lists_of_iii_load(section: str) -> None:
    text = f"{section}:\n- name: iii-state\n  config: {{adapter: {{name: kv, config: {{save_interval_ms: 7}}}}}}\n"

    assert config.loads(text).adapter.config.save_interval_ms == 7


def test_modules_and_workers_together_are_one_list() -> None:
    text = "modules: [{name: iii-http}]\nworkers: [{name: iii-state}]\n"

    assert config.loads(text).adapter == IN_MEMORY


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "workers:",
        "workers: []",
        "- name: iii-state",
        "- name: iii-state\n  config:",
        "- name: iii-state\n  config: {}",
        "- name: iii-state\n  config: {adapter: null}",
        "- name: iii-state\n  config: {adapter: {name: kv}}",
        "- name: iii-state\n  config: {adapter: {name: kv, config: null}}",
        "- name: iii-state\n  config: {adapter: {name: kv, config: {}}}",
        "functions:\ntriggers: ~\nscopes: null\nlimits:\n",
    ],
)
def test_what_is_left_out_or_null_means_kv_in_memory(text: str) -> None:
    assert config.loads(text) == Config(adapter=IN_MEMORY)


UPSTREAM = """\
workers:
  - name: iii-worker-manager
    config: {port: 49134}
  - name: iii-http
    image: ghcr.io/iii/http
    config:
      cors: {allowed_origins: ["*"]}
      url: ${NO_SUCH_VARIABLE_HERE}
      on: yes
  - name: iii-stream
    config: [anything, {at: all}]
  - name: iii-state
    image: ghcr.io/iii/state
    replicas: 3
    config: {adapter: {name: kv, config: {save_interval_ms: 9}}}
  - name: queue
"""


def test_other_workers_load_and_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "scopestate.config"):
        loaded = config.loads(UPSTREAM, file="iii.yaml")

    assert loaded.adapter.config.save_interval_ms == 9
    assert loaded.server == config.ServerConfig(port=49134)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "iii.yaml: key `workers[3].replicas` of iii-state is not known and was ignored"),
        ("INFO", "iii.yaml: ignored workers that are not iii-state: iii-http, iii-stream, queue"),
    ]


def test_a_file_with_only_other_workers_warns_that_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    assert config.loads("- name: iii-http") == Config()

    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["<string>: has no iii-state among its workers; state is kept in memory only"]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("iii-stat", "iii-state"),
        ("iii-sate", "iii-state"),
        ("iiistate", "iii-state"),
        ("iii-states", "iii-state"),
        ("iii-worker-manger", "iii-worker-manager"),
        ("iii_worker_manager", "iii-worker-manager"),
        ("iii-workers-manager", "iii-worker-manager"),
    ],
)
def test_a_worker_whose_name_is_nearly_ours_is_a_mistake_unless_ours_is_there_too(name: str, ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.loads(f"- name: iii-stream\n- name: {name}\n")

    assert f"there is no worker {ours} in this file; is {name!r} meant to be it?" in caught.value.problem
    assert (caught.value.line, caught.value.key) == (2, "[1].name")
    assert config.loads(f"- name: {ours}\n- name: {name}\n").source is None


@pytest.mark.parametrize("name", ["iii-stream", "iii-queue", "iii-http", "iii-status", "iii-cron", "iii-exec", "state"])
def test_other_workers_are_not_taken_for_ours(name: str) -> None:
    assert config.loads(f"- name: {name}\n") == Config()


def test_condition_is_an_alias() -> None:
    assert config.loads("triggers: [{function_id: a, condition: b}]").triggers == (
        TriggerConfig("a", condition_function_id="b"),
    )


def test_a_null_filter_matches_everything_and_an_empty_one_is_a_filter() -> None:
    (trigger,) = config.loads('triggers: [{function_id: a, scope: null, key: ""}]').triggers

    assert (trigger.scope, trigger.key) == (None, "")


def test_anchors_and_aliases_stand_for_their_value() -> None:
    text = "triggers:\n- &t {function_id: &f a, scope: s1}\n- {function_id: *f, scope: s2}\n"

    assert config.loads(text).triggers == (TriggerConfig("a", "s1"), TriggerConfig("a", "s2"))


def test_a_trigger_has_all_options_of_a_program() -> None:
    text = """
triggers:
  - function_id: f
    scope_prefix: "orders:"
    prefix: o-
    only_if_changed: true
    fields: [status, "1"]
    order: key
    concurrency: 3
    durable: ship
    retry: {attempts: 3, first: 0.5}
    ack_wait: 60
    start: earliest
    on_giving_up: skip
    max_dead: 10
    debounce: 0.5
    debounce_max: 5
    batch: 100
    batch_wait: .25
    metadata:
      team: shipping
      limits: [1, 2.5, true, ~, {deep: "7"}]
"""
    (trigger,) = config.loads(text).triggers

    assert trigger == TriggerConfig(
        "f",
        scope_prefix="orders:",
        prefix="o-",
        only_if_changed=True,
        fields=("status", "1"),
        order="key",
        concurrency=3,
        durable="ship",
        retry=RetryConfig(attempts=3, first=0.5),
        ack_wait=60,
        start="earliest",
        on_giving_up="skip",
        max_dead=10,
        debounce=0.5,
        debounce_max=5,
        batch=100,
        batch_wait=0.25,
        metadata={"team": "shipping", "limits": [1, 2.5, True, None, {"deep": "7"}]},
    )
    assert set(OPTIONS) == set(TriggerConfig.__struct_fields__) - {"function_id", "id"}
    assert msgspec.structs.asdict(RetryConfig()) == {
        name: getattr(Retry(), name) for name in RetryConfig.__struct_fields__
    }
    config.validate(config.Config(triggers=(trigger,)))


@pytest.mark.parametrize(("text", "events"), [("[expired, created]", ("expired", "created")), ("~", None), ("", None)])
def test_a_trigger_names_kinds_of_events_or_all(text: str, events: tuple[str, ...] | None) -> None:
    (trigger,) = config.loads(f"triggers:\n- function_id: a\n  events: {text}\n").triggers

    assert trigger.events == events


def test_core_tags_are_taken() -> None:
    text = 'triggers: !!seq [!!map {function_id: !!str 12, scope: ! on}]\nlimits: {scope_mailbox: !!int "7"}\n'
    loaded = config.loads(text)

    assert loaded.triggers == (TriggerConfig("12", "on"),)
    assert loaded.limits.scope_mailbox == 7


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), ("+12", 12), ("0x10", 16), (str(10**9), 10**9), ('!!int "5"', 5)]
)
def test_whole_numbers(text: str, number: int) -> None:
    assert config.loads(f"limits: {{scope_mailbox: {text}}}").limits.scope_mailbox == number


def test_load_remembers_the_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine.yaml").write_text(FULL)
    monkeypatch.chdir(tmp_path)

    loaded = config.load("engine.yaml")

    assert loaded.source == str(tmp_path / "engine.yaml")
    assert msgspec.structs.replace(loaded, source=None) == config.loads(FULL)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())

    assert msgspec.structs.replace(config.load(path), source=None) == config.loads(FULL)


class TestDefaultFile:
    def test_it_loads_as_file_based(self) -> None:
        loaded = config.load(config.DEFAULT_FILE)

        assert loaded == Config(
            adapter=AdapterConfig("kv", KvOptions(store_method="file_based", file_path="./data/state_store")),
            source=str(config.DEFAULT_FILE),
        )
        assert config.check(config.DEFAULT_FILE) == []

    def test_it_shows_every_option_at_its_default(self) -> None:
        text = config.DEFAULT_FILE.read_text()
        shown = dict(re.findall(r"^ +# (\w+): (\S+)$", text, flags=re.MULTILINE))
        shown_set = dict(re.findall(r"^ +(\w+): (\S+)$", text, flags=re.MULTILINE))

        for default in (KvOptions(), LimitsConfig()):
            for name in default.__struct_fields__:
                if name not in ("store_method", "file_path"):
                    value = getattr(default, name)
                    assert shown.get(name) == ("auto" if name == "share" else str(value)), name
        assert set(shown_set) == {"name", "store_method", "file_path"}

    def test_its_examples_are_valid(self) -> None:
        uncommented = re.sub(
            r"^(?:functions|triggers|scopes): .*\n", "", config.DEFAULT_FILE.read_text(), flags=re.MULTILINE
        )
        uncommented = re.sub(r"^# ((?:functions|triggers|scopes):|  .*)$", r"\1", uncommented, flags=re.MULTILINE)
        uncommented = re.sub(r"^( +)# (\w+: \S+)$", r"\1\2", uncommented, flags=re.MULTILINE)
        uncommented = re.sub(r"app\.handlers:\w+", "json:loads", uncommented)
        loaded = config.loads(uncommented)

        assert list(loaded.functions) == ["app::greet", "app::is_adult"]
        assert loaded.triggers == (
            TriggerConfig("app::greet", "users", "profile", "app::is_adult", "greet-adults"),
            TriggerConfig(
                "app::greet",
                scope_prefix="users:",
                prefix="profile",
                events=("created", "updated"),
                fields=("name", "email"),
                debounce=0.5,
                metadata={"template": "short"},
            ),
            TriggerConfig(
                "app::greet",
                scope="users",
                events=("created",),
                order="key",
                concurrency=8,
                durable="greet-users",
                retry=RetryConfig(),
                ack_wait=30,
                start="now",
                on_giving_up="skip",
                max_dead=100_000,
            ),
        )
        assert [(rule.name, rule.prefix, rule.durability) for rule in loaded.scopes] == [
            ("orders", None, "commit"),
            (None, "session:", "memory"),
            (None, "cart:", None),
        ]
        assert loaded.limits == LimitsConfig()


class TestFromMapping:
    def test_the_same_shape_as_the_file(self) -> None:
        mapping = {
            "workers": [
                {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": {"save_interval_ms": 3}}}}
            ],
            "functions": {"f": "json:loads", "g": print},
            "triggers": ({"function_id": "f", "scope": None, "condition": "g"},),
            "limits": {"max_value_bytes": 2**63 - 1},
        }
        loaded = config.from_mapping(mapping)

        assert loaded.adapter.config.save_interval_ms == 3
        assert loaded.functions["f"].callable is json.loads
        assert (loaded.functions["g"].target, loaded.functions["g"].callable) == ("builtins:print", print)
        assert loaded.triggers == (TriggerConfig("f", condition_function_id="g"),)
        assert loaded.limits.max_value_bytes == 2**63 - 1
        assert loaded.source is None

    def test_a_bare_list_of_workers(self) -> None:
        assert config.from_mapping([{"name": "iii-state"}]) == Config()

    def test_a_callable_object_is_named_by_its_class(self) -> None:
        class Greeter:
            def __call__(self, event: object) -> None: ...

        greeter = Greeter()
        ref = config.from_mapping({"functions": {"g": greeter}}).functions["g"]

        assert ref.callable is greeter
        assert ref.target.endswith("Greeter")

    def test_text_is_taken_as_it_is(self) -> None:
        (trigger,) = config.from_mapping(
            {"triggers": [{"function_id": "${HOME}", "scope": "on", "key": "12"}]}
        ).triggers

        assert trigger == TriggerConfig("${HOME}", "on", "12")

    def test_a_config_built_by_code_can_be_validated(self) -> None:
        config.validate(config.loads(FULL))
        config.validate(Config())
