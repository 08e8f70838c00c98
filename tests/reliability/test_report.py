"""The table in docs/explanation/reliability.md is about tests that exist, and is what the command writes."""

from __future__ import annotations

from tests.reliability import report


def test_every_row_names_tests_that_exist() -> None:
    assert report.missing_tests() == []


def test_every_row_is_on_the_page_with_its_promise() -> None:
    page = report.PAGE.read_text()

    for row in report.ROWS:
        assert f"| {row.fault} | {row.promise} |" in page


def test_figures_that_were_recorded_are_shown() -> None:
    row = report.Row("f", "p", (), ("kills*",))

    assert report._figures(row, {"kills under load": {"kills": 200, "oldest_ms": 57.5}}) == (
        "kills under load: kills 200, oldest ms 57.5"
    )
    assert report._figures(row, {}) == "not run yet"
