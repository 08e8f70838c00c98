"""The program that works on a scope larger than memory, with a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import larger_than_memory as program


def test_a_scope_that_is_larger_than_the_limit_is_worked_on_and_every_answer_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([str(tmp_path / "store"), "--keys", "20000", "--limit-mb", "1", "--seconds", "1"])

    assert "calls, all right" in capsys.readouterr().out


def test_a_wrong_answer_ends_the_program(tmp_path: Path) -> None:
    directory = str(tmp_path / "store")
    program.build(directory, 5_000)
    work = program.Work(directory, 5_000, 1, 1)
    work.check()
    with work._engine as engine:
        engine.set(program.SCOPE, program.key_of(7), "another value")
        work._versions[7] = 1

        with pytest.raises(SystemExit, match="wrong: user:00000007 is 'another value'"):
            work.check()
