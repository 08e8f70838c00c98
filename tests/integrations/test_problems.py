"""Which errors are answers, with which status, and what a client is told of them."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import msgspec
import pytest

from scopestate import errors
from scopestate.integrations.problems import STATUSES, problem_of

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "web-frameworks.md"


def body(error: Exception) -> dict[str, object]:
    problem = problem_of(error)
    assert problem is not None
    decoded: dict[str, object] = msgspec.json.decode(problem.body())
    return decoded


def test_a_conflict_says_what_it_has_found() -> None:
    found = body(errors.Conflict("s", [errors.KeyConflict(0, "k", 3, 4), errors.KeyConflict(2, "j", 0, 1)]))
    assert (found["status"], found["scope"], found["key"], found["revision"]) == (409, "s", "k", 4)
    assert [conflict["key"] for conflict in found["conflicts"]] == ["k", "j"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "applied"),
    [
        (errors.ReplyTimeout("s", 30.0), True),
        (errors.CallTimeout("state::set", 30.0, sent=True), True),
        (errors.CallTimeout("state::set", 30.0, sent=False), False),
        (errors.CallTimeout("state::get", 30.0, sent=True, may_be_applied=False), False),
        (errors.ConnectionLost("state::get", "ws://secret.host", "reset", may_be_applied=False), False),
        (errors.StorageError("/var/secret is full"), False),
        (errors.Overloaded("full"), False),
    ],
    ids=repr,
)
def test_what_failed_for_now_is_503_and_its_text_is_in_the_log_only(
    error: Exception, applied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "scopestate.integrations"):
        problem = problem_of(error, "PUT /users/1")
    assert problem is not None
    assert (problem.status, problem.headers()["Retry-After"], problem.close_code) == (503, "1", 1013)
    assert problem.facts["may_be_applied"] is applied
    assert ("idempotency key" in problem.detail) is applied
    assert b"secret" not in problem.body()
    assert str(error) in caplog.text
    assert "PUT /users/1: answered with status 503" in caplog.text


def test_a_write_that_may_be_applied_is_seen_through_the_error_of_a_bridge() -> None:
    outer = errors.StorageError("the bridge has failed")
    outer.__cause__ = errors.CallTimeout("state::set", 1.0, sent=True)
    problem = problem_of(outer)
    assert problem is not None
    assert problem.facts["may_be_applied"] is True


def test_a_bridge_that_may_not_is_403_without_the_text_of_the_other_engine() -> None:
    outer = errors.StorageError("worker 'secret' may not write scope 's'")
    outer.__cause__ = errors.RemoteFailure("state::set", "FORBIDDEN", "worker 'secret' may not")
    problem = problem_of(outer)
    assert problem is not None
    assert problem.status == 403
    assert b"secret" not in problem.body()


def test_mistakes_of_the_program_are_no_answers() -> None:
    for error in (
        errors.ConfigError("no such key"),
        errors.EngineForked("open one in each process"),
        errors.SchemaViolation("s", "k", "$", "expected `int`", "User", written=False),
        errors.WouldDeadlock("a turn"),
        LookupError("mine"),
    ):
        assert problem_of(error) is None, error
    written = problem_of(errors.SchemaViolation("s", "k", "$.n", "expected `int`", "User"))
    assert written is not None
    assert written.status == 422
    assert written.facts["path"] == "$.n"
    assert written.close_code == 1008


def test_the_page_names_each_error_of_the_table() -> None:
    rows = {line.split("|")[1].strip()[:3]: line for line in PAGE.read_text().splitlines() if line.startswith("| ")}
    for kind, (status, _) in STATUSES.items():
        name = "InvalidValue" if kind is errors.DeserializationError else kind.__name__
        assert f"`{name}`" in rows[str(status)], name
    known = {found for _, found in inspect.getmembers(errors, inspect.isclass)}
    assert set(STATUSES) <= known
