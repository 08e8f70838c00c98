"""The official clients, unmodified, as subprocesses against a server: what their users do works."""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
from pathlib import Path
from typing import Any

import pytest
from raw import PATIENCE_S
from sdks import HERE, NODE, SDKS, installed
from serving import OpenSdk, OpenServer

from scopestate import Engine
from scopestate.server.server import Server

pytestmark = pytest.mark.timeout(600)  # the first use of an SDK installs it

CREATED = {"type": "state", "event_type": "state:created"}


@pytest.mark.parametrize("sdk", SDKS)
def test_the_six_functions(sdk: str, start_sdk: OpenSdk) -> None:
    worker = start_sdk(sdk)
    place = {"scope": "users", "key": "profile"}

    assert worker.call("state::set", {**place, "value": {"n": 1}}) == {"old_value": None, "new_value": {"n": 1}}
    assert worker.call("state::get", place) == {"n": 1}
    ops = [{"type": "increment", "path": "n", "by": 2}, {"type": "increment", "path": "__proto__", "by": 1}]
    updated = worker.call("state::update", {**place, "ops": ops})
    assert updated["new_value"] == {"n": 3}
    assert [error["op_index"] for error in updated["errors"]] == [1]
    assert worker.call("state::list", {"scope": "users"}) == [{"n": 3}]
    assert worker.call("state::list_groups", {}) == {"groups": ["users"]}
    assert worker.call("state::delete", place) == {"n": 3}

    assert worker.stop() == 0


@pytest.mark.parametrize("sdk", SDKS)
def test_the_functions_that_scopestate_adds(sdk: str, start_sdk: OpenSdk) -> None:
    worker = start_sdk(sdk)

    def call(name: str, **fields: Any) -> Any:
        return worker.call(f"state::{name}", {"scope": "s", **fields})

    written = call("set", key="a", value={"n": 1}, if_absent=True)
    assert written == {"old_value": None, "new_value": {"n": 1}, "revision": 1}
    assert call("get-entry", key="a") == {"value": {"n": 1}, "revision": 1}
    assert call("get-entry", key="absent") is None
    assert call("compare-and-set", key="a", expected={"n": 1}, value=2) == {"swapped": True}
    assert call("compare-and-set", key="a", expected=1, value=3) == {"swapped": False, "current": 2}
    ops = [{"type": "set", "key": "b", "value": "x", "ttl_ms": 60_000}, {"type": "delete", "key": "a"}]
    committed = call("transaction", checks=[{"key": "a", "revision": 2}], ops=ops, idempotency_key="once")
    assert (committed["committed"], committed["revision"]) == (True, 4)
    assert call("transaction", checks=[{"key": "a", "revision": 2}], ops=ops, idempotency_key="once")["replayed"]
    refused = call("transaction", checks=[{"key": "a", "revision": 2}], ops=ops)
    assert refused == {"committed": False, "conflicts": [{"index": 0, "key": "a", "revision": 0}], "errors": []}
    call("set", key="c", value=3)
    assert call("list_keys") == {"keys": ["b", "c"]}
    assert call("count", prefix="b") == {"count": 1}
    page = call("list_entries", limit=1)
    assert (page["entries"], page["total"], page["done"]) == ([["b", "x"]], 2, False)
    assert call("list_entries", cursor=page["next_cursor"])["entries"] == [["c", 3]]
    assert call("touch", key="b", ttl_ms=None) == {"touched": True}
    assert call("delete-range", prefix="") == {"deleted": 2, "more": False}
    late = worker.error_of("state::set", {"scope": "s", "key": "b", "value": 1, "if_revision": 4})
    assert late["code"] == "CONFLICT"
    assert "expected to have revision 4 but does not exist" in late["message"]

    assert worker.stop() == 0


@pytest.mark.parametrize("sdk", SDKS)
def test_no_value_and_stored_null(sdk: str, start_sdk: OpenSdk) -> None:
    worker = start_sdk(sdk)
    worker.call("state::set", {"scope": "s", "key": "null", "value": None})

    missing = worker.do("call", function_id="state::get", payload={"scope": "s", "key": "missing"})
    null = worker.do("call", function_id="state::get", payload={"scope": "s", "key": "null"})

    assert missing["result"] is None
    assert null["result"] is None
    if worker.is_node:  # where `undefined` and null differ, and iii's own tests want the former
        assert missing["undefined"] is True
        assert null["undefined"] is False


@pytest.mark.parametrize("sdk", SDKS)
def test_errors_keep_their_code_and_words(sdk: str, start_sdk: OpenSdk) -> None:
    worker = start_sdk(sdk)

    assert worker.error_of("nobody::home", {})["code"] == "function_not_found"
    misfit = worker.error_of("state::get", {"scope": "s"})
    assert misfit["code"] == "deserialization_error"
    assert "Failed to deserialize input for state::get: missing field `key`" in misfit["message"]


@pytest.mark.parametrize("sdk", SDKS)
def test_an_enqueued_call_is_refused_and_a_void_call_is_run(sdk: str, start_sdk: OpenSdk, engine: Engine) -> None:
    worker = start_sdk(sdk)

    refused = worker.do("call", function_id="job.run", payload={}, queue="default")
    worker.do("call", function_id="state::set", payload={"scope": "s", "key": "k", "value": 1}, void=True)

    assert refused["error"]["code"] == "enqueue_error"
    worker.settle()
    assert engine.get("s", "k") == 1


@pytest.mark.parametrize("caller", SDKS)
@pytest.mark.parametrize("executor", SDKS)
def test_two_workers_call_each_other(caller: str, executor: str, start_sdk: OpenSdk) -> None:
    first, second = start_sdk(caller), start_sdk(executor)
    second.do("register", id="math.echo", answer="echo")
    second.do("register", id="math.nothing", answer="value")
    second.do("register", id="math.fail", answer="raise", value="no such number")
    second.settle()

    echoed = first.call("math.echo", {"n": 1, "deep": [{"x": None}]})
    assert isinstance(echoed.pop("_caller_worker_id"), str)
    assert echoed == {"n": 1, "deep": [{"x": None}]}
    assert first.call("math.echo", [1, "two"]) == [1, "two"]
    assert first.call("math.nothing", {}) is None
    failed = first.error_of("math.fail", {})
    assert failed["code"] == "invocation_failed"
    assert "no such number" in failed["message"]


@pytest.mark.parametrize("sdk", SDKS)
def test_a_handler_in_a_worker_sees_what_the_embedding_program_writes(
    sdk: str, start_sdk: OpenSdk, engine: Engine
) -> None:
    worker = start_sdk(sdk)
    worker.do("register", id="app.changed", answer="value")
    worker.do("trigger", name="t", type="state", function_id="app.changed", config={"scope": "users", "key": "profile"})
    worker.settle()

    engine.set("users", "other", 0)
    engine.set("users", "profile", {"n": 1})

    assert worker.received() == {
        **CREATED,
        "scope": "users",
        "key": "profile",
        "old_value": None,
        "new_value": {"n": 1},
    }

    worker.do("untrigger", name="t")
    worker.settle()
    engine.set("users", "profile", {"n": 2})
    engine.drain(timeout=PATIENCE_S)
    assert worker.events.empty()


@pytest.mark.parametrize("sdk", SDKS)
def test_a_handler_in_the_embedding_program_sees_what_a_worker_writes(
    sdk: str, start_sdk: OpenSdk, engine: Engine
) -> None:
    events: queue.Queue[Any] = queue.Queue()
    engine.on_change(scope="users")(events.put)
    worker = start_sdk(sdk)

    worker.call("state::set", {"scope": "users", "key": "k", "value": [1]})
    worker.call("state::delete", {"scope": "users", "key": "k"})

    assert events.get(timeout=PATIENCE_S).new_value == [1]
    assert events.get(timeout=PATIENCE_S).event_type == "state:deleted"


@pytest.mark.parametrize("sdk", SDKS)
def test_the_embedding_program_calls_a_worker_and_a_worker_the_program(
    sdk: str, start_sdk: OpenSdk, engine: Engine
) -> None:
    engine.register_function("app.double", lambda data: data["n"] * 2)
    worker = start_sdk(sdk)
    worker.do("register", id="worker.echo", answer="echo")
    worker.settle()

    assert engine.call("worker.echo", {"n": 1}) == {"n": 1}
    assert worker.call("app.double", {"n": 21}) == 42


@pytest.mark.parametrize("sdk", SDKS)
def test_a_condition_in_a_worker_decides(sdk: str, start_sdk: OpenSdk, engine: Engine) -> None:
    handling, deciding = start_sdk(sdk), start_sdk("py-0.11.6")
    handling.do("register", id="app.changed", answer="value")
    deciding.do("register", id="app.no", answer="value", value=False)
    deciding.do("register", id="app.zero", answer="value", value=0)
    deciding.settle()
    for name, condition in (("a", "app.no"), ("b", "app.zero")):
        config = {"scope": name, "condition_function_id": condition}
        handling.do("trigger", name=name, type="state", function_id="app.changed", config=config)
    handling.settle()

    engine.set("a", "k", 1)
    engine.set("b", "k", 2)
    engine.drain(timeout=PATIENCE_S)

    assert handling.received()["scope"] == "b"
    assert handling.events.empty()


@pytest.mark.parametrize("sdk", SDKS)
def test_workers_come_back_after_a_restart_of_the_server(
    sdk: str, server: Server, open_server: OpenServer, start_sdk: OpenSdk, engine: Engine
) -> None:
    worker = start_sdk(sdk)
    worker.do("register", id="app.echo", answer="echo")
    worker.do("trigger", name="t", type="state", function_id="app.echo", config={"scope": "users"})
    worker.settle()
    server.stop()

    open_server(port=server.port)
    worker.settle()  # waits in the SDK until it has come back
    assert engine.call("app.echo", [1]) == [1]
    assert worker.received() == [1]
    engine.set("users", "k", 1)
    assert worker.received()["key"] == "k"


@pytest.mark.parametrize("sdk", SDKS)
def test_telemetry_is_swallowed(sdk: str, start_sdk: OpenSdk) -> None:
    worker = start_sdk(sdk, telemetry=True)
    worker.do("register", id="app.calls", answer="call", value="state::list_groups")
    worker.do("register", id="app.echo", answer="echo")
    worker.settle()

    other = start_sdk("py-0.11.6")
    assert other.call("app.calls", {}) == {"groups": []}
    assert other.call("app.echo", "x") == "x"

    assert worker.stop() == 0  # Node 0.11.6 would hang here for 30 s without `/otel`


@pytest.mark.parametrize("sdk", [name for name in SDKS if name != "py-0.11.6"])
def test_a_value_of_five_megabytes(sdk: str, start_sdk: OpenSdk) -> None:
    worker = start_sdk(sdk)
    big = "é" * 2_500_000

    worker.call("state::set", {"scope": "s", "key": "big", "value": big}, void=True)

    assert worker.call("state::get", {"scope": "s", "key": "big"}) == big


SAMPLE = """\
const handler = iii.registerFunction({ id: 'profile::changed' }, async (event) => {
  console.log('State changed:', event.event_type, event.key)
  console.log('Previous:', event.old_value)
  console.log('Current:', event.new_value)
  return {}
})
iii.registerTrigger({ type: 'state', function_id: handler.id, config: { scope: 'users', key: 'profile' } })
"""
"""A handler for one key, in the form that the reference documents: `registerFunction` takes an object with the id."""


@pytest.mark.parametrize("sdk", ["node-0.11.6", "node-0.22.1"])
def test_a_handler_in_the_documented_form_is_told_of_a_change(
    sdk: str, server: Server, engine: Engine, tmp_path: Path
) -> None:
    script = tmp_path / "sample.mjs"
    imports = f"import {{ iii, settled }} from '{(HERE / 'sdk' / 'sample_imports.mjs').as_uri()}'"
    end = "await settled()\nconsole.log('registered')"
    script.write_text(f"{imports}\n{SAMPLE}\n{end}\n", encoding="utf-8")
    environment = {**os.environ, "III_URL": server.url, "SDK_FOLDER": str(installed(sdk))}

    with subprocess.Popen([NODE, script], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = (line.rstrip() for line in process.stdout if not line.startswith("["))  # the SDK's own remarks
        assert next(said) == "registered"
        engine.set("users", "profile", {"name": "Ada"})
        engine.drain(timeout=PATIENCE_S)
        lines = list(itertools.islice(said, 3))
        process.kill()

    assert lines == [
        "State changed: state:created profile",
        "Previous: null",
        "Current: { name: 'Ada' }",
    ]
