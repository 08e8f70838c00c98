"""`adapter: {name: redis, config: ...}`: what a file may say, and that no mistake in it shows a password."""

from __future__ import annotations

import logging
import re
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scopestate import config
from scopestate.config import AdapterConfig, RedisOptions
from scopestate.config.nodes import Problems
from scopestate.config.sections import read_text
from scopestate.errors import ConfigError
from scopestate.persistence.redis.options import (
    RedisAddress,
    parse_redis_url,
    parse_sentinel,
    without_credentials,
    without_password,
)

REDIS = "workers:\n- name: iii-state\n  config:\n    adapter:\n      name: redis\n      config:\n"
AT = "workers[0].config.adapter.config"
WRITE = "write redis://host:port, rediss://host:port for TLS, or unix:///path of a socket"
ENCODE = "in a user name, a password or a path write `@`, `/`, `?`, `#`, `[`, `]` and spaces as %40, %2F, %3F, ..."
BEFORE_AT = f"what stands before the `@` of the address cannot be read; {ENCODE}"
NO_PORT = (
    "the port is not a whole number from 1 to 65535; write host:port, a password before it as in "
    "redis://:PASSWORD@host:port, an IPv6 address in brackets"
)
NO_DATABASE = (
    "the database in the address is not a whole number from 0 to 2147483647; write redis://host:port/2, "
    "or unix:///path?db=2"
)
NO_SOCKET = "the address names no socket; write its path, as in unix:///run/redis.sock"
HOST_OF_SOCKET = "a socket has no host: begin its path with a slash, as in unix:///run/redis.sock"
NO_TLS = "the connection has no TLS; write rediss:// in `redis_url`, or remove this"
ONE_ENTRY = "a Sentinel is `host:port`, each an entry of its own, as in [one:26379, two:26379]"
ALONE = (
    "a Sentinel is `host:port` alone; `sentinel_username` and `sentinel_password` say as whom to log in, "
    "and rediss:// in `redis_url` to use TLS"
)
ONLY_DB = "and only `db` is read there; the other options are fields beside `redis_url`"
NO_SENTINELS = "there are no `sentinels`; name them, or remove this"


def redis_of(options: str) -> RedisOptions:
    """Load a file whose redis adapter has these lines as its `config`."""
    loaded = config.loads(REDIS + textwrap.indent(textwrap.dedent(options), " " * 8), file="engine.yaml").adapter
    assert loaded.name == "redis"
    assert isinstance(loaded.config, RedisOptions)
    return loaded.config


def mistakes_of(options: str) -> list[tuple[int | None, str | None, str]]:
    """Return line (7 is the first of the options), key and text of each mistake of such a file."""
    text = REDIS + textwrap.indent(options, " " * 8)
    errors = read_text(text, None, Problems("engine.yaml"))[1]
    assert [error.file for error in errors] == ["engine.yaml"] * len(errors)
    return [(error.line, error.key, error.problem) for error in errors]


class TestFile:
    def test_every_option_is_read(self) -> None:
        assert redis_of(
            """\
            redis_url: rediss://far:6380/1
            username: me
            password: s3cret
            database: 2
            key_prefix: "app:"
            sentinels: ["one:26380", two, "[::1]:26379"]
            sentinel_service: primary
            sentinel_username: watcher
            sentinel_password: h1dden
            tls_ca_file: ca.pem
            tls_cert_file: cert.pem
            tls_key_file: key.pem
            tls_verify: false
            connect_timeout_ms: 1
            connect_wait_ms: 2
            call_timeout_ms: 3
            pool_size: 4
            update_attempts: 5
            events: shared
            events_kept: 6
            journal_events: 7
            journal_when_full: pause
            """
        ) == RedisOptions(
            redis_url="rediss://far:6380/1",
            username="me",
            password="s3cret",
            database=2,
            key_prefix="app:",
            sentinels=("one:26380", "two", "[::1]:26379"),
            sentinel_service="primary",
            sentinel_username="watcher",
            sentinel_password="h1dden",
            tls_ca_file="ca.pem",
            tls_cert_file="cert.pem",
            tls_key_file="key.pem",
            tls_verify=False,
            connect_timeout_ms=1,
            connect_wait_ms=2,
            call_timeout_ms=3,
            pool_size=4,
            update_attempts=5,
            events="shared",
            events_kept=6,
            journal_events=7,
            journal_when_full="pause",
        )

    @pytest.mark.parametrize("rest", ["", ", config: ", ", config: ~", ", config: {}"])
    def test_left_out_it_is_the_redis_of_this_machine_in_the_layout_of_iii(self, rest: str) -> None:
        adapter = config.loads(f"- name: iii-state\n  config: {{adapter: {{name: redis{rest}}}}}").adapter

        assert adapter == AdapterConfig("redis", RedisOptions())
        assert isinstance(adapter.config, RedisOptions)
        assert adapter.config.address == "redis://localhost:6379"
        assert adapter.config.key_prefix == "state:"

    def test_a_password_comes_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PASSWORD_OF_A_TEST", "s3cret")

        assert redis_of("password: ${PASSWORD_OF_A_TEST}").password == "s3cret"
        assert redis_of("password: ${NO_PASSWORD_OF_A_TEST:}").password is None

    def test_rules_for_scopes_may_stand_beside_it(self) -> None:
        text = REDIS + "        pool_size: 1\nscopes:\n"
        for durability in ("memory", "interval", "commit"):
            text += f"- {{name: {durability}, durability: {durability}}}\n"

        assert [rule.durability for rule in config.loads(text).scopes] == ["memory", "interval", "commit"]

    def test_the_default_file_shows_every_option_at_its_default(self) -> None:
        lines = re.search(r"      # adapter:\n(?:      #  .*\n)+", config.DEFAULT_FILE.read_text())
        assert lines is not None
        block = textwrap.indent(re.sub(r"^      # ", "", lines[0], flags=re.MULTILINE), "  ")

        assert config.loads(f"-\n{block}").adapter == AdapterConfig("redis", RedisOptions())
        shown = re.findall(r"^ +(\w+):", block, flags=re.MULTILINE)
        assert shown == ["adapter", "name", "config", *RedisOptions.__struct_fields__]

    def test_a_config_that_was_built_may_hold_what_a_file_may(self) -> None:
        built = RedisOptions("rediss://h", sentinels=("a:1", "b"), tls_verify=False, sentinel_password="p", database=0)

        config.validate(config.Config(adapter=AdapterConfig("redis", built)))


# The option's line, the key under `config` (None: the same as the option's) and the problem.
DURABLE = (
    "give the trigger a name, `durable: NAME`, in its own section: of all engines that have a trigger of this name "
    "one gets each event, and another engine gets it if that one does not handle it within `ack_wait`"
)
MISTAKES: list[tuple[str, str | None, str]] = [
    # The scheme.
    ("redis_url: ''", None, f"the address does not begin with redis://, rediss:// or unix://; {WRITE}"),
    ("redis_url: localhost:6379", None, f"the address does not begin with redis://, rediss:// or unix://; {WRITE}"),
    ("redis_url: redis:far", None, f"the address does not begin with redis://, rediss:// or unix://; {WRITE}"),
    ("redis_url: tcp://far", None, f"`tcp://` is not the address of a Redis server; {WRITE}"),
    ("redis_url: ws://far:1", None, f"`ws://` is the address of another engine, for `name: bridge`; {WRITE}"),
    ("redis_url: WSS://far:1", None, f"`wss://` is the address of another engine, for `name: bridge`; {WRITE}"),
    ("redis_url: http://far", None, f"`http://` is the address of a web server; {WRITE}"),
    ("redis_url: https://far", None, f"`https://` is the address of a web server; {WRITE}"),
    ("redis_url: valkey://far", None, f"Valkey has the address of Redis too; {WRITE}"),
    ("redis_url: redis+sentinel://far", None, f"Sentinels are named in `sentinels`; {WRITE}"),
    ("redis_url: 12", None, 'expected a string, found the integer 12; quote it: "12"'),
    # Host and port.
    ("redis_url: 'redis://'", None, "the address names no host; write host:port"),
    ("redis_url: redis:///2", None, "the address names no host; write host:port"),
    ("redis_url: redis://:6379", None, "the address names no host; write host:port"),
    ("redis_url: redis://me:pw@", None, "the address names no host; write host:port"),
    ("redis_url: redis://far:x", None, NO_PORT),
    ("redis_url: redis://far:0", None, NO_PORT),
    ("redis_url: redis://far:65536", None, NO_PORT),
    ("redis_url: redis://far:-1", None, NO_PORT),
    ("redis_url: redis://one:1,two:2", None, NO_PORT),
    ("redis_url: redis://::1", None, NO_PORT),
    ("redis_url: redis://one,two", None, "the host in the address contains an invalid character; write host:port"),
    ("redis_url: redis://$HOST:1", None, "the host in the address contains an invalid character; write host:port"),
    (
        "redis_url: 'redis://x[::1]:1'",
        None,
        "the host in the address contains an invalid character; write host:port",
    ),
    (
        "redis_url: 'redis://[::1]x:1'",
        None,
        "the host in the address contains an invalid character; write host:port",
    ),
    (
        "redis_url: 'redis://[far]:1'",
        None,
        "the host in the address contains an invalid character; write host:port",
    ),
    ("redis_url: 'redis://[::1'", None, f"this is not an address; {ENCODE}; write an IPv6 address in brackets"),
    # The database.
    ("redis_url: redis://far/x", None, NO_DATABASE),
    ("redis_url: redis://far/-1", None, NO_DATABASE),
    ("redis_url: redis://far/2/", None, NO_DATABASE),
    ("redis_url: redis://far//2", None, NO_DATABASE),
    ("redis_url: redis://far/2147483648", None, NO_DATABASE),
    ("redis_url: redis://far/" + "9" * 5000, None, NO_DATABASE),
    ("redis_url: redis://far?db=", None, NO_DATABASE),
    ("redis_url: unix:///run/r.sock?db=one", None, NO_DATABASE),
    ("redis_url: redis://far/2?db=2", None, "the address names its database more than once; keep one of them"),
    ("redis_url: redis://far?db=1&db=2", None, "the address names its database more than once; keep one of them"),
    ("database: -1", None, "expected a whole number from 0 to 2147483647 or null, found the integer -1"),
    # What else an address may not have.
    (
        "redis_url: redis://far?ssl_cert_reqs=none",
        None,
        "the address has query option `ssl_cert_reqs`, and only `db` is read there; use the field `tls_verify`",
    ),
    (
        "redis_url: redis://far?max_connections=5",
        None,
        "the address has query option `max_connections`, and only `db` is read there; use the field `pool_size`",
    ),
    (
        "redis_url: unix:///run/r.sock?pass=pw",
        None,
        "the address has query option `pass`, and only `db` is read there; use the field `password`",
    ),
    (
        "redis_url: redis://far?protocol=3",
        None,
        f"the address has query option `protocol`, {ONLY_DB}",
    ),
    (
        "redis_url: redis://far?$pw!",
        None,
        f"the address has a query option, {ONLY_DB}",
    ),
    ("redis_url: redis://far#2", None, f"the address has a `#` in it; {ENCODE}"),
    ("redis_url: 'redis://far#'", None, f"the address has a `#` in it; {ENCODE}"),
    (
        "redis_url: redis://:%ff@far",
        None,
        "the address has a %-code in it that is not UTF-8",
    ),
    (
        "redis_url: 'redis://far '",
        None,
        f"the address has a space or an unprintable character in it; {ENCODE}",
    ),
    (
        'redis_url: "redis://fa\\nr"',
        None,
        f"the address has a space or an unprintable character in it; {ENCODE}",
    ),
    ("redis_url: redis://far/a@b", None, BEFORE_AT),
    ("redis_url: redis://far?a@b", None, BEFORE_AT),
    ("redis_url: redis://far#a@b", None, BEFORE_AT),
    # Sockets.
    ("redis_url: 'unix://'", None, NO_SOCKET),
    ("redis_url: unix:///", None, NO_SOCKET),
    ("redis_url: unix:///run/", None, NO_SOCKET),
    ("redis_url: unix://run/redis.sock", None, HOST_OF_SOCKET),
    ("redis_url: unix://me:pw@run/redis.sock", None, HOST_OF_SOCKET),
    ("redis_url: unix:///run/%00", None, "the path of the socket has a NUL character in it"),
    # TLS.
    ("tls_ca_file: ca.pem", None, NO_TLS),
    ("tls_cert_file: cert.pem", None, NO_TLS),
    ("tls_verify: false", None, NO_TLS),
    ("{redis_url: unix:///r.sock, tls_verify: false}", "tls_verify", NO_TLS),
    (
        "{redis_url: rediss://far, tls_key_file: key.pem}",
        "tls_key_file",
        "a key without its certificate; give `tls_cert_file` too",
    ),
    # Sentinels.
    ("sentinels: one:1", None, "expected a list, found the string 'one:1'"),
    ("sentinels: [1]", "sentinels[0]", 'expected a string, found the integer 1; quote it: "1"'),
    ("sentinels: ['one:1,two:2']", "sentinels[0]", ONE_ENTRY),
    ("sentinels: ['']", "sentinels[0]", ONE_ENTRY),
    ("sentinels: ['one two']", "sentinels[0]", ONE_ENTRY),
    ("sentinels: [one, two/3]", "sentinels[1]", ONE_ENTRY),
    ("sentinels: ['one:x']", "sentinels[0]", NO_PORT),
    ("sentinels: ['one:0']", "sentinels[0]", NO_PORT),
    ("sentinels: ['fe80::1']", "sentinels[0]", NO_PORT),
    ("sentinels: [':26379']", "sentinels[0]", "the address names no host; write host:port"),
    ("sentinels: ['redis://one:1']", "sentinels[0]", ALONE),
    ("sentinels: ['me:pw@one:1']", "sentinels[0]", ALONE),
    (
        "{redis_url: unix:///run/r.sock, sentinels: [one]}",
        "sentinels",
        "Sentinels name a server by host and port; `redis_url` cannot be unix:// with them",
    ),
    ("sentinel_service: primary", None, NO_SENTINELS),
    ("sentinel_username: me", None, NO_SENTINELS),
    ("sentinel_password: pw", None, NO_SENTINELS),
    # Events.
    ("delivery: one", None, f"`delivery` is gone: {DURABLE}"),
    ("group: g", None, f"`group` is gone: {DURABLE}"),
    ("claim_after_ms: 100", None, f"`claim_after_ms` is gone: {DURABLE}"),
    ("events: remote", None, "expected `local` or `shared`, found the string 'remote'"),
    # Ranges and names.
    ("connect_timeout_ms: 0", None, "expected a whole number from 1 to 86400000, found the integer 0"),
    ("connect_wait_ms: 86400001", None, "expected a whole number from 1 to 86400000, found the integer 86400001"),
    ("call_timeout_ms: 5s", None, "expected a whole number from 1 to 86400000, found the string '5s'"),
    ("pool_size: 1001", None, "expected a whole number from 1 to 1000, found the integer 1001"),
    ("update_attempts: 0", None, "expected a whole number from 1 to 1000000, found the integer 0"),
    ("events_kept: 0", None, "expected a whole number from 1 to 1000000000, found the integer 0"),
    ("journal_events: 0", None, "expected a whole number from 1 to 1000000000, found the integer 0"),
    ("journal_when_full: reject", None, "expected `block` or `pause`, found the string 'reject'"),
    ("redis_ulr: redis://far", None, "unknown key `redis_ulr`, did you mean `redis_url`?"),
    ("bridge_url: ws://far", None, "unknown key `bridge_url`, did you mean `redis_url`?"),
]


@pytest.mark.parametrize(("option", "key", "problem"), MISTAKES, ids=[option[:60] for option, _, _ in MISTAKES])
def test_a_mistake_is_one_error_with_file_line_and_key(option: str, key: str | None, problem: str) -> None:
    key = key or option.partition(":")[0]

    assert mistakes_of(option) == [(7, f"{AT}.{key}", problem)]


def test_the_error_stands_at_the_entry_of_a_list() -> None:
    ((line, key, _),) = mistakes_of("pool_size: 2\nsentinels:\n- one\n\n- two:x\n")

    assert (line, key) == (11, f"{AT}.sentinels[1]")


def test_an_unset_variable_for_a_password_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    file = tmp_path / "redis.yaml"
    file.write_text("workers: [{name: iii-state, config: {adapter: {name: redis, config: {password: '${UNSET}'}}}}]\n")

    (error,) = config.check(file)

    assert error.key == "workers[0].config.adapter.config.password"
    assert "'UNSET' is not set" in error.problem


def test_every_mistake_is_found() -> None:
    found = mistakes_of("redis_url: redis://far:x\nsentinels: [a b, one]\ntls_key_file: k\n")

    # Whether TLS is missing cannot be said while the address is not known.
    keys = ("redis_url", "sentinels[0]", "tls_key_file")
    assert [(line, key) for line, key, _ in found] == [(7 + i, f"{AT}.{key}") for i, key in enumerate(keys)]


SECRET = "hunter2"
WITH_SECRET = [
    # Addresses that are right but for one thing, and addresses in which the password stands where it breaks them.
    f"redis_url: http://:{SECRET}@far",
    f"redis_url: {SECRET}:x@far",
    f"redis_url: redis:{SECRET}@far",
    f"redis_url: redis://:{SECRET}",
    f"redis_url: redis://me:{SECRET}:far:6379",
    f"redis_url: redis://:{SECRET}@far:x",
    f"redis_url: redis://:{SECRET}@far:70000",
    f"redis_url: redis://:{SECRET}@far/x",
    f"redis_url: redis://:{SECRET}@far?x=1",
    f"redis_url: redis://:{SECRET}@one,two",
    f"redis_url: redis://:/{SECRET}@far",
    f"redis_url: redis://:a/{SECRET}@far",
    f"redis_url: redis://:a?{SECRET}@far",
    f"redis_url: redis://:a#{SECRET}@far",
    f"redis_url: 'redis://:[{SECRET}@far'",
    f"redis_url: 'redis://:[{SECRET}]@far'",
    f"redis_url: 'redis://:a {SECRET}@far'",
    f"redis_url: redis://:{SECRET}\N{FULLWIDTH COLON}@far",  # of which urllib's own error quotes everything
    f"redis_url: redis://:%ff{SECRET}@far",
    f"redis_url: unix://:{SECRET}@run/r.sock",
    f"redis_url: redis://far?password={SECRET}",
    f"{{redis_url: 'redis://:{SECRET}@far', events_kept: 0}}",
    f"{{redis_url: 'redis://:{SECRET}@far', tls_verify: false}}",
    f"{{password: {SECRET}, delivery: one}}",
    f"{{sentinel_password: {SECRET}}}",
    f"sentinels: ['redis://:{SECRET}@one:1']",
    f"sentinels: [':{SECRET}@one:1']",
    f"sentinels: redis://:{SECRET}@one:1",
    f"database: redis://:{SECRET}@one:1",
    f"redis://:{SECRET}@far",
    f"password: {{value: {SECRET}}}",
]


@pytest.mark.parametrize("option", WITH_SECRET)
def test_no_error_shows_a_password(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        redis_of(option)

    # The traceback has the errors that it was made from, as a log has.
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_password_taken_for_a_port_is_not_in_the_traceback_either() -> None:
    # urllib's own error quotes it: "Port could not be cast to integer value as ...".
    assert SECRET not in _said(lambda: parse_redis_url(f"redis://:{SECRET}"))


_PIECES = st.lists(st.sampled_from([*":/?#[]@%.=& a1,\t", "%40", "::1", "?db=1", "unix:///", "\N{FULLWIDTH COLON}"]))


@given(_PIECES.map("".join), _PIECES.map("".join), st.sampled_from(["redis://", "rediss://", "unix://", "http://"]))
def test_whatever_stands_around_a_password_it_is_not_shown(before: str, after: str, scheme: str) -> None:
    url = f"{scheme}{before}:{SECRET}@{after}"

    assert SECRET not in without_credentials(url)
    assert SECRET not in without_password(url)
    assert SECRET not in _said(lambda: parse_redis_url(url))
    assert SECRET not in _said(lambda: parse_sentinel(url.removeprefix("redis://")))


def _said(parse: Callable[[], object]) -> str:
    """Return the repr of what is parsed, or the traceback as a log shows it."""
    try:
        return repr(parse())
    except ConfigError as error:
        return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("number", ["90125", "1e3", "true", "2026-01-31", "0x1F", "9.5"])
@pytest.mark.parametrize("key", ["password", "sentinel_password"])
def test_a_password_that_is_no_text_is_not_shown(key: str, number: str) -> None:
    assert mistakes_of(f"{key}: {number}") == [
        (7, f"{AT}.{key}", "expected a string; put it in quotes (it is not shown here)")
    ]
    assert redis_of(f"{{{key}: '{number}', sentinels: [one]}}") == RedisOptions(sentinels=("one",), **{key: number})


def test_the_address_as_the_name_of_the_adapter_shows_no_password() -> None:
    with pytest.raises(ConfigError) as caught:
        config.loads(f"- adapter: {{name: 'redis://:{SECRET}@far'}}")

    assert caught.value.problem == ("there is no adapter 'redis://***@far'; this version has: kv, redis, bridge")


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "address"),
        [
            ("redis://far", RedisAddress("far", 6379)),
            ("REDIS://Far:1/", RedisAddress("far", 1)),
            ("redis://far:/", RedisAddress("far", 6379)),
            ("redis://10.0.0.1:65535/0", RedisAddress("10.0.0.1", 65535, database=0)),
            ("redis://my_redis.local.:7/15", RedisAddress("my_redis.local.", 7, database=15)),
            ("redis://far?db=2147483647", RedisAddress("far", 6379, database=2147483647)),
            ("redis://[::1]:7", RedisAddress("::1", 7)),
            ("rediss://[2001:DB8::1]/3", RedisAddress("2001:db8::1", 6379, tls=True, database=3)),
            ("redis://[fe80::1%eth0]:7", RedisAddress("fe80::1%eth0", 7)),
            ("redis://me:pw@[::1]:7", RedisAddress("::1", 7, username="me", password="pw")),
            ("redis://:pw@far", RedisAddress("far", 6379, password="pw")),
            ("redis://me@far", RedisAddress("far", 6379, username="me")),
            ("redis://me:@far", RedisAddress("far", 6379, username="me")),
            ("redis://:@far", RedisAddress("far", 6379)),
            ("redis://a:b:c@far", RedisAddress("far", 6379, username="a", password="b:c")),
            ("redis://a:b@c@far", RedisAddress("far", 6379, username="a", password="b@c")),
            (
                "redis://m%40il:%3A%2F%3F%23%5B%5D%40%20%25+%C3%BC@far",
                RedisAddress(
                    "far", 6379, username="m@il", password=":/?#[]@ %+\N{LATIN SMALL LETTER U WITH DIAERESIS}"
                ),
            ),
            ("unix:///run/redis.sock", RedisAddress("", 0, "/run/redis.sock")),
            (
                "unix://me:pw@/run/re%20dis%40.sock?db=4",
                RedisAddress("", 0, "/run/re dis@.sock", username="me", password="pw", database=4),
            ),
        ],
    )
    def test_its_parts(self, url: str, address: RedisAddress) -> None:
        assert parse_redis_url(url) == address
        assert redis_of(f"redis_url: '{url}'").redis_url == url

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("one", ("one", 26379)),
            ("one:1", ("one", 1)),
            ("10.0.0.1:26380", ("10.0.0.1", 26380)),
            ("[::1]", ("::1", 26379)),
            ("[::1]:65535", ("::1", 65535)),
        ],
    )
    def test_of_a_sentinel(self, text: str, place: tuple[str, int]) -> None:
        assert parse_sentinel(text) == place

    def test_a_field_goes_before_the_same_part_of_the_address(self) -> None:
        url = "rediss://a:b@far:1/2"

        assert RedisOptions(url).server == RedisAddress("far", 1, None, True, "a", "b", 2)
        assert RedisOptions(url, username="me").server == RedisAddress("far", 1, None, True, "me", "b", 2)
        assert RedisOptions(url, password="pw").server == RedisAddress("far", 1, None, True, "a", "pw", 2)
        assert RedisOptions(url, database=0).server == RedisAddress("far", 1, None, True, "a", "b", 0)
        assert redis_of(f"redis_url: {url}\ndatabase: 3").database == 3

    def test_its_repr_masks_the_password(self) -> None:
        assert repr(parse_redis_url("redis://me:hunter2@far/1")) == (
            "RedisAddress(host='far', port=6379, unix_path=None, tls=False, username='me', password=***, database=1)"
        )
        assert "password=None" in repr(parse_redis_url("redis://far"))


class TestWhatIsShown:
    @pytest.mark.parametrize(
        ("options", "shown"),
        [
            (RedisOptions(), "redis://localhost:6379"),
            (RedisOptions("redis://me:pw@far/2"), "redis://far:6379/2"),
            (RedisOptions("redis://far/2", database=0), "redis://far:6379/0"),
            (RedisOptions("rediss://:pw@[::1]:7"), "rediss://[::1]:7"),
            (RedisOptions("unix://me:pw@/run/r.sock"), "unix:///run/r.sock"),
            (RedisOptions("unix:///run/r.sock?db=3"), "unix:///run/r.sock?db=3"),
            (RedisOptions(sentinels=("one:1", "two")), "'mymaster' of the Sentinels one:1, two"),
            (RedisOptions(sentinels=(":pw@one:1",)), "'mymaster' of the Sentinels ***"),
            # Addresses that are none have no part that could safely be shown.
            (RedisOptions("redis://:pw"), "redis://***"),
            (RedisOptions("pw@far"), "***"),
        ],
    )
    def test_the_address_for_messages_has_no_credentials(self, options: RedisOptions, shown: str) -> None:
        assert options.address == shown

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://far", "redis://far:6379"),
            ("redis://me:hunter2@far/1", "redis://me:***@far:6379/1"),
            ("rediss://:hunter2@far", "rediss://:***@far:6379"),
            ("redis://hunter2@far", "redis://***@far:6379"),
            ("unix://me:hunter2@/run/r.sock?db=1", "unix://me:***@/run/r.sock?db=1"),
            ("redis://:hunter2", "redis://***"),
            ("hunter2", "***"),
        ],
    )
    def test_the_repr_masks_the_password_of_the_address(self, url: str, shown: str) -> None:
        assert f"redis_url={shown!r}, " in repr(RedisOptions(url))
        assert SECRET not in repr(AdapterConfig("redis", RedisOptions(url)))

    def test_the_repr_masks_every_password_and_shows_the_rest(self, caplog: pytest.LogCaptureFixture) -> None:
        options = RedisOptions(
            password=SECRET, sentinel_password=SECRET, sentinels=(f":{SECRET}@one", "two"), key_prefix="g"
        )

        with caplog.at_level(logging.INFO):
            logging.getLogger("scopestate.test").info("%s %r", options, options)

        assert SECRET not in caplog.text
        assert "password='***', database=None" in repr(options)
        assert "sentinel_password='***'" in repr(options)
        assert "sentinels=('***', 'two')" in repr(options)
        assert "key_prefix='g'" in repr(options)
        assert "password=None" in repr(RedisOptions())
