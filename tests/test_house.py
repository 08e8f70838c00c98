"""What a user installs: one import name, four dependencies, typed, quick to import, the same from any folder."""

from __future__ import annotations

import email
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import scopestate

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "config", "console", "engine", "integrations", "ops", "persistence", "wire")
IN_SOURCE = (
    *(
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "Makefile",
    ),
    *PACKAGES,
    *("docs", "examples", "tests"),
)
"""What the source distribution holds."""
IMPORT_BUDGET_S = 0.100
MOST_IMPORTS = 60

# Building and installing fetch packages; the other tests' time limit is for code that does not wait for a network.
pytestmark = pytest.mark.timeout(300)


def _run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this test run's import path; return what it printed, fail with what it complained."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "COV", "PIP_USER"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the source distribution, and of the wheel that was built from it alone."""
    # From a copy: setuptools packs what an earlier build left in `build/lib`, and a test leaves nothing in the tree.
    source = tmp_path_factory.mktemp("source")
    for name in IN_SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("built")
    _run(sys.executable, "-m", "build", "--outdir", target, source, cwd=source)
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    (found,) = built.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def fresh_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new environment that has the wheel and what it requires, and nothing else."""
    home = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    # By the pip of these tests: another one in the new environment would take five seconds.
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    _run(*pip, "install", "--quiet", wheel, cwd=home)
    return python


def _files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_installs_no_top_level_name_but_scopestate(wheel: Path) -> None:
    top = {name.split("/")[0] for name in _files(wheel)}

    assert {name for name in top if not name.endswith(".dist-info")} == {"scopestate"}


def test_the_wheel_holds_every_source_file_under_its_import_name(wheel: Path) -> None:
    expected = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            inside = file.relative_to(ROOT / package).as_posix()
            expected.add(f"scopestate/{inside}" if package == "engine" else f"scopestate/{package}/{inside}")

    assert {name for name in _files(wheel) if name.endswith(".py")} == expected


def test_the_wheel_is_typed_and_brings_the_default_configuration(wheel: Path) -> None:
    assert {"scopestate/py.typed", "scopestate/config/engine.yaml"} <= set(_files(wheel))


def test_the_wheel_brings_the_pages_of_the_console(wheel: Path) -> None:
    expected = {
        f"scopestate/console/{file.parent.name}/{file.name}"
        for folder in ("static", "templates")
        for file in (ROOT / "console" / folder).iterdir()
    }

    assert len(expected) >= 12
    assert expected <= set(_files(wheel))


def test_the_wheel_holds_no_tests_and_nothing_that_was_made_beside_the_source(wheel: Path) -> None:
    inside = [Path(name) for name in _files(wheel) if ".dist-info/" not in name]

    made = {".pyc", ".md", ".db", ".orig", ".rej"}
    assert [str(path) for path in inside if path.suffix in made or {"tests", "docs"} & set(path.parts)] == []


def test_the_source_distribution_holds_documentation_examples_and_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert set(IN_SOURCE) <= names
    for folder in IN_SOURCE:
        for file in (ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else ():
            assert file.relative_to(ROOT).as_posix() in names
    assert [name for name in names if "__pycache__" in name or name.startswith((".", "build/"))] == []


def test_a_package_index_accepts_both(built: Path) -> None:
    files = sorted(built.iterdir())

    assert len(files) == 2
    assert _run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built).count("PASSED") == 2


def test_the_version_stands_in_one_place(
    project: dict[str, Any], wheel: Path, sdist: Path, fresh_python: Path, tmp_path: Path
) -> None:
    version = project["project"]["version"]

    assert scopestate.__version__ == version
    assert (wheel.name.split("-")[1], sdist.name) == (version, f"scopestate-{version}.tar.gz")
    assert _run(fresh_python, "-c", "import scopestate; print(scopestate.__version__)", cwd=tmp_path) == f"{version}\n"
    elsewhere = [
        file
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        if f'"{version}"' in file.read_text(encoding="utf-8").replace(f'such as "{version}"', "")
    ]
    assert elsewhere == []


def test_the_command_says_which_extra_it_needs(fresh_python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [fresh_python.parent / "scopestate"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'scopestate[cli]'" in done.stderr


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in _files(wheel))


def test_the_base_install_requires_exactly_four_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    required = metadata.get_all("Requires-Dist", [])

    base = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in required if "extra ==" not in line}

    assert base == {"msgspec", "pykka", "pyyaml", "watchdog"}


def test_each_dependency_has_its_reason_written_down(project: dict[str, Any]) -> None:
    pages = sorted((ROOT / "docs" / "design").glob("*.md"))
    reasons = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    tables = "\n".join(line for line in reasons.splitlines() if line.startswith("|"))
    listed = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        listed.extend(extra)
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in listed} - {"scopestate"}

    assert {name for name in names if name not in tables} == set()


def test_a_fresh_install_works_from_any_folder(fresh_python: Path, tmp_path: Path) -> None:
    program = "from scopestate import Engine\nwith Engine() as e: e.set('s', 'k', 1); print(e.get('s', 'k'))"

    assert _run(fresh_python, "-W", "error", "-c", program, cwd=tmp_path) == "1\n"


def test_a_fresh_install_works_from_the_repository_root(fresh_python: Path) -> None:
    # Here the folders `config/`, `ops/`, ... come first on the import path; nothing of ours may go for them.
    program = (
        "import sys, scopestate, scopestate.config\n"
        "from scopestate import Engine\n"
        "with Engine() as e: e.set('s', 'k', 1)\n"
        "assert 'site-packages' in scopestate.config.__file__, scopestate.config.__file__\n"
        f"print(sorted(set(sys.modules) & set({PACKAGES!r})))"
    )

    assert _run(fresh_python, "-W", "error", "-c", program, cwd=ROOT) == "[]\n"


def test_a_fresh_install_leaves_the_common_names_free(fresh_python: Path, tmp_path: Path) -> None:
    program = f"import importlib.util as u; print([n for n in {PACKAGES!r} if u.find_spec(n)])"

    assert _run(fresh_python, "-c", program, cwd=tmp_path) == "[]\n"


def test_the_import_loads_no_optional_library(fresh_python: Path, tmp_path: Path) -> None:
    optional = {"redis", "websockets", "picows", "uvloop", "typer", "rich", "numpy", "pandas"}
    program = f"import sys; from scopestate import Engine; print(sorted({optional!r} & set(sys.modules)))"

    assert _run(fresh_python, "-c", program, cwd=tmp_path) == "[]\n"


def test_the_import_loads_no_slow_module_that_few_need(fresh_python: Path, tmp_path: Path) -> None:
    slow = {
        "asyncio",
        "concurrent.futures",
        "hashlib",
        "multiprocessing",
        "socket",
        "sqlite3",
        "ssl",
        "subprocess",
        "tempfile",
    }
    program = f"import sys; from scopestate import Engine; print(sorted({slow!r} & set(sys.modules)))"

    assert _run(fresh_python, "-c", program, cwd=tmp_path) == "[]\n"


def test_import_costs_at_most_a_tenth_of_a_second(fresh_python: Path, tmp_path: Path) -> None:
    def used() -> float:
        """Return the processor time of ended child processes: unlike elapsed time, other programs do not add to it."""
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def cost(program: str) -> float:
        """Return what one run of the program takes, in seconds."""
        before = used()
        _run(fresh_python, "-c", program, cwd=tmp_path)
        return used() - before

    programs = (
        "pass",
        # Beside other load all processor time counts for more, that of what every program imports too.
        "import asyncio, dataclasses, inspect, logging, msgspec, pykka, uuid",
        "from scopestate import Engine",
    )
    least = [sys.float_info.max] * len(programs)
    # In turn, so that a load that comes and goes meets all of them; the least of many runs, as noise only ever adds.
    for tried in range(MOST_IMPORTS):
        least = list(map(min, least, map(cost, programs)))
        nothing, parts, all_of_it = least
        if tried > 5 and all_of_it - nothing <= max(IMPORT_BUDGET_S, 2.5 * (parts - nothing)):
            return
    pytest.fail(f"importing scopestate took {all_of_it - nothing:.3f} s, its parts {parts - nothing:.3f} s")
