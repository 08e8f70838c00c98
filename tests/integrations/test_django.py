"""The cache backend for Django: Django's own tests of caches, and what they do not look at."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import django
import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpResponse, HttpResponseNotFound
from django.utils.functional import lazystr
from django.utils.safestring import SafeString, mark_safe
from node_packages import kept
from reliability.living import untraced_environment

from scopestate import Engine
from scopestate.errors import InvalidValue
from scopestate.integrations import django as backend
from scopestate.integrations.django import StateCache

if not settings.configured:
    settings.configure(USE_TZ=True)

ENGINE: Engine
"""What `OPTIONS["engine"]` names in a test."""

PATIENCE_S = 250.0
"""For what fetches a package once, and waits for keys to expire."""

PICKLED = {
    "test_add_fail_on_pickleerror",
    "test_set_fail_on_pickleerror",
    "test_cache_read_for_model_instance",
    "test_cache_read_for_model_instance_with_deferred",
    "test_cache_write_for_model_instance_with_deferred",
    "test_data_types",
}
"""Tests of Django that want models, functions and classes to be pickled: not without a serializer that does so."""

SUITE = """
import os

from django.test import TestCase, SimpleTestCase, override_settings
from cache.tests import (
    BaseCacheTests, CacheI18nTest, CacheMiddlewareTest, TestWithTemplateResponse, caches_setting_for_tests,
)
from scopestate.integrations.django import StateCache, _caches

BACKEND = "scopestate.integrations.django.StateCache"
DIRECTORY = os.environ["STATE_DIRECTORY"]
PICKLE = "django.core.cache.backends.redis.RedisSerializer"


def cache_settings(**options):
    # Culling is tested by counts that locmem, files and databases keep to exactly.
    return caches_setting_for_tests(
        BACKEND=BACKEND, LOCATION=DIRECTORY, OPTIONS=options, exclude={"cull", "zero_cull"}
    )


class Cleared:
    def tearDown(self):
        super().tearDown()
        for cache in list(_caches.values()):
            cache.clear()


@override_settings(CACHES=cache_settings(scope="plain"))
class PlainTests(Cleared, BaseCacheTests, TestCase):
    pass


@override_settings(CACHES=cache_settings(scope="pickled", serializer=PICKLE))
class PickledTests(Cleared, BaseCacheTests, TestCase):
    pass


def page_settings(name):
    default = {"BACKEND": BACKEND, "LOCATION": DIRECTORY, "OPTIONS": {"scope": name}}
    other = {**default, "OPTIONS": {"scope": name + "-other"}, "TIMEOUT": "1"}
    return {"default": default, "other": other}


@override_settings(CACHES=page_settings("pages"))
class PageTests(Cleared, CacheMiddlewareTest):
    pass


@override_settings(CACHES=page_settings("translated"))
class TranslatedPageTests(Cleared, CacheI18nTest):
    pass


@override_settings(CACHES=page_settings("templates"))
class TemplateTests(Cleared, TestWithTemplateResponse):
    pass
"""


def fetch_tests(folder: Path) -> None:
    """Put Django's own tests into a folder. They are in no wheel, and pip makes ready to build what it downloads."""
    fetched = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    name = f"django=={django.__version__}"
    subprocess.run([*fetched, "--no-binary", ":all:", "--dest", folder, name], check=True, timeout=PATIENCE_S)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (tests,) = folder.glob("*/tests")
    tests.rename(folder / "tests")
    shutil.rmtree(next(folder.glob("*/pyproject.toml")).parent)
    archive.unlink()


@pytest.mark.timeout(600)
def test_djangos_own_tests_of_caches_pass(tmp_path: Path) -> None:
    """Without the few that pickle what no cache of ours holds; with Django's own serializer those too."""
    tests = kept(f"django-{django.__version__}", fetch_tests) / "tests"
    ours = tests / "cache" / f"test_state.py.{os.getpid()}"  # not below `tmp_path`, which may be on another disk
    ours.write_text(SUITE)
    ours.replace(tests / "cache" / "test_state.py")

    environment = {**untraced_environment(), "STATE_DIRECTORY": str(tmp_path / "cache")}
    # Beside one another: most of the time they wait for keys to expire.
    command = [sys.executable, "runtests.py", "--parallel", "1", "--verbosity", "2"]
    runs = [
        subprocess.Popen(
            [*command, *[f"cache.test_state.{name}" for name in names]],
            cwd=tests, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for names in (["PlainTests"], ["PickledTests"], ["PageTests", "TranslatedPageTests", "TemplateTests"])
    ]  # fmt: skip
    said = "".join([run.communicate(timeout=PATIENCE_S)[1] for run in runs])

    failed = re.findall(r"^(?:ERROR|FAIL): (test_\w+) \(cache.test_state.(\w+)", said, re.MULTILINE)
    assert {(name, "PlainTests") for name in PICKLED} == set(failed), said
    ran = sum(map(int, re.findall(r"^Ran (\d+) tests", said, re.MULTILINE)))
    skipped = sum(map(int, re.findall(r"skipped=(\d+)", said)))
    assert (ran >= 130, skipped) == (True, 6), said  # culling, three in each


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., StateCache]]:
    def made(location: Any = tmp_path / "cache", **options: Any) -> StateCache:
        return StateCache(location, {"OPTIONS": options})

    before = set(backend._caches)
    yield made
    for name in set(backend._caches) - before:
        backend._caches.pop(name).close()


HELD = [
    None,
    {"n": [1, 2.5, "ü", None]},
    {"_auth_user_id": "1", "at": datetime(2026, 1, 2, tzinfo=UTC)},
    (1, b"bytes", {2, 3}),
    ["~", {"~": "~"}],
]


@pytest.mark.parametrize("value", HELD, ids=range(len(HELD)))
def test_values_come_back_as_they_were(make: Callable[..., StateCache], value: Any) -> None:
    cache = make()
    cache.set("k", value)
    found = cache.get("k", "default")
    assert (found, type(found)) == (value, type(value))


def test_pages_and_fragments_come_back(make: Callable[..., StateCache]) -> None:
    cache = make()
    page = HttpResponseNotFound("nothing here: ü", headers={"X-Mine": "1", "Expires": "never"}, reason="Gone fishing")
    page.set_cookie("seen", 'a "b"; c', max_age=60, secure=True, httponly=True, samesite="Lax")
    page.set_cookie("other", "1")
    cache.set_many({"page": page, "fragment": mark_safe("<b>"), "nested": [mark_safe("<i>")], "lazy": lazystr("text")})

    found = cache.get("page")
    assert type(found) is HttpResponse
    assert (found.status_code, found.reason_phrase, found.content) == (404, "Gone fishing", page.content)
    assert found.headers == page.headers
    assert found.cookies.output() == page.cookies.output()
    assert (type(cache.get("fragment")), cache.get("fragment")) == (SafeString, "<b>")
    assert type(cache.get("nested")[0]) is SafeString
    assert cache.get("lazy") == "text"


def test_what_it_does_not_hold_is_refused_with_its_place(make: Callable[..., StateCache]) -> None:
    cache = make()
    for write in (cache.set, cache.add, lambda key, value: cache.set_many({"a": 1, key: value})):
        with pytest.raises(InvalidValue, match=r"does not hold a object.*\$\.user"):
            write("k", {"user": object()})
    assert cache.get_many(["a", "k"]) == {}


def test_nothing_that_was_pickled_by_others_is_unpickled(make: Callable[..., StateCache]) -> None:
    pickles = make(serializer="django.core.cache.backends.redis.RedisSerializer")
    pickles.set("k", {1, 2})
    assert pickles.get("k") == {1, 2}
    found = make().get("k")
    assert type(found) is bytes


def test_asyncio_does_what_threads_do(make: Callable[..., StateCache]) -> None:
    async def main() -> None:
        cache = make()
        await cache.aset("k", HttpResponse("x"), 60)
        assert (await cache.aget("k")).content == b"x"
        assert await cache.aget("none", "default") == "default"
        assert await cache.aadd("k", 1) is False
        assert await cache.aadd("n", 1) is True
        assert await cache.aincr("n", 4) == 5
        assert await cache.adecr("n") == 4
        with pytest.raises(ValueError, match="not found"):
            await cache.aincr("none")
        assert await cache.atouch("n", 0) is True
        assert await cache.ahas_key("n") is False
        assert await cache.atouch("n") is False
        await cache.aset("gone", 1, -1)
        assert await cache.aget("gone") is None
        assert await cache.aset_many({"a": 1, "b": (2,)}, None) == []
        assert await cache.aget_many(["a", "b", "c"]) == {"a": 1, "b": (2,)}
        assert await cache.aget_or_set("c", lambda: 3) == 3
        assert await cache.adelete("a") is True
        await cache.adelete_many(["b", "c"])
        await cache.aclear()
        assert await cache.aget("k") is None

    asyncio.run(main())


def test_many_entries_are_bounded_if_settings_say_so(make: Callable[..., StateCache]) -> None:
    cache = make(MAX_ENTRIES=100)
    for number in range(500):
        cache.set(str(number), number)
    cache.set_many({f"many-{number}": number for number in range(1_000)})
    asyncio.run(cache.aset("last", 1))
    assert len(cache._cache) <= 120
    assert cache.get("last") == 1


def test_a_transaction_that_is_too_large_is_made_in_parts(make: Callable[..., StateCache]) -> None:
    cache = make(size_limit=None)
    large = "x" * 1_000_000
    cache.set_many({str(number): large for number in range(20)})
    assert sum(cache.get(str(number)) == large for number in range(20)) == 20
    cache.delete_many(map(str, range(20)))
    assert len(cache._cache) == 0


def test_threads_and_aliases_with_the_same_settings_share_an_engine(make: Callable[..., StateCache]) -> None:
    one, other, elsewhere = make(), make(), make(scope="elsewhere")
    one.set("k", 1)
    assert other.get("k") == 1
    assert elsewhere.get("k") is None
    assert one._cache.engine is other._cache.engine is elsewhere._cache.engine
    elsewhere.set("k", 2)
    elsewhere.clear()
    assert one.get("k") == 1


def test_an_engine_of_the_program_may_have_the_entries(make: Callable[..., StateCache]) -> None:
    with Engine() as engine:
        globals()["ENGINE"] = engine
        for given in (engine, lambda: engine, f"{__name__}.ENGINE"):
            cache = make("", engine=given)
            cache.set("k", 1, version=2)
            assert engine.get("django", ":2:k") == 1
    with pytest.raises(ImproperlyConfigured, match="is an Engine, a function"):
        make("", engine=dict).get("k")


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImproperlyConfigured, match="does not know colour in OPTIONS; it knows cull_frequency, durab"):
        StateCache("", {"OPTIONS": {"colour": "red"}})
    with pytest.raises(ImproperlyConfigured, match="not both"):
        StateCache(tmp_path, {"OPTIONS": {"engine": dict}})


def test_without_a_location_it_is_in_the_memory_of_the_process(make: Callable[..., StateCache]) -> None:
    cache = make("")
    cache.set("k", 1)
    assert make("").get("k") == 1
    assert cache._cache.directory is None
