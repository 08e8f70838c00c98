"""The command line of `serve` means the same, whether or not Typer reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import run

from scopestate.cli import serve, serve_line

BY_ITSELF = [
    "serve",
    "serve engine.yaml",
    "serve ./a.yaml --port 0",
    "serve --host 0.0.0.0 -p 8080 --json",
    "serve --host=::1 --port=65535 a.yaml",
    "serve --log-level debug --log-level=error",
    "serve --port 1 --port 2 --json --json",
    "serve --port 00080",
]
LEFT_TO_TYPER = [
    "",
    "get a b",
    "--help",
    "serve --help",
    "serve --unknown",
    "serve a.yaml b.yaml",
    "serve --port",
    "serve --port many",
    "serve --port 65536",
    "serve --port -1",
    "serve --host=",
    "serve -p8080",
    "serve -- a.yaml",
    "serve --log-level loud",
    "serve --json=1",
]


@pytest.mark.parametrize("line", BY_ITSELF)
def test_a_usual_line_is_read_as_typer_reads_it(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def note(config: Path | None, host: str | None, port: int | None, log_level: str, *, as_json: bool) -> None:
        told.append({"config": config, "host": host, "port": port, "log_level": log_level, "as_json": as_json})

    monkeypatch.setattr(serve, "run", note)
    assert run(*line.split()).code == 0

    assert [serve_line.read(line.split(), {})] == told


@pytest.mark.parametrize("line", LEFT_TO_TYPER)
def test_any_other_line_is_left_to_typer(line: str) -> None:
    assert serve_line.read(line.split(), {}) is None


def test_completion_is_left_to_typer() -> None:
    assert serve_line.read(["serve"], {"_SCOPESTATE_COMPLETE": "complete_bash"}) is None


def test_a_missing_library_is_left_to_what_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_line.importlib.util, "find_spec", lambda name: None)

    assert serve_line.read(["serve"], {}) is None


def test_an_error_of_a_line_read_without_typer_is_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = serve_line.read(["serve", str(tmp_path / "missing.yaml")], {})
    assert arguments is not None

    with pytest.raises(SystemExit) as ended:
        serve_line.serve(arguments)

    assert ended.value.code == 3
    assert "there is no such file" in capsys.readouterr().err
