"""The Dockerfile, the compose file, the units and the alerts of the how-to pages are such as their tools take."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from scopestate.figures import families
from tests.docs.walking import ROOT, blocks

HOW_TO = ROOT / "docs" / "how-to"
DEPLOYMENT = {block.name: block.text for block in blocks(HOW_TO / "docker-and-systemd.md") if block.name}
MONITORING = {block.name: block.text for block in blocks(HOW_TO / "monitoring.md") if block.name}
UNITS = sorted(name for name in DEPLOYMENT if name.endswith((".service", ".timer")))
INSTRUCTION = re.compile(r"^[A-Z]+(?= )")
INSTRUCTIONS = {"CMD", "COPY", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "VOLUME", "WORKDIR"}


def _unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(DEPLOYMENT[name])
    return parser


def test_the_page_shows_two_services_and_a_timer() -> None:
    assert UNITS == ["poll-backup.service", "poll-backup.timer", "poll.service"]


@pytest.mark.parametrize("name", UNITS)
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    unit = _unit(name)
    assert unit.has_section("Timer" if name.endswith(".timer") else "Service")
    verify = shutil.which("systemd-analyze")
    if verify is None:
        return  # parsed above; machines without systemd have no more to ask
    for other in UNITS:
        program = re.sub(r"^(ExecStart)=\S+", r"\1=/bin/true", DEPLOYMENT[other], flags=re.MULTILINE)
        (tmp_path / other).write_text(program, encoding="utf-8")

    done = subprocess.run(
        [verify, "verify", "--man=no", tmp_path / name], capture_output=True, text=True, timeout=60, check=False
    )

    complaints = [line for line in done.stderr.splitlines() if "poll" in line]
    assert complaints == []


def test_the_service_has_more_time_to_end_than_the_engine_takes() -> None:
    assert int(_unit("poll.service")["Service"]["TimeoutStopSec"]) > 5


def test_the_backup_runs_as_the_user_that_may_enter_the_directory() -> None:
    service, backup = _unit("poll.service")["Service"], _unit("poll-backup.service")["Service"]

    assert service["User"] == backup["User"]
    assert service["Environment"].partition("=")[2].partition("=")[2] in backup["ExecStart"]


def test_each_instruction_of_the_dockerfile_exists_and_its_commands_are_json() -> None:
    lines = DEPLOYMENT["Dockerfile"].splitlines()

    assert {match[0] for line in lines if (match := INSTRUCTION.match(line))} == INSTRUCTIONS
    commands = [json.loads(line.partition("CMD ")[2]) for line in lines if "CMD [" in line]
    assert [command[0] for command in commands] == ["python", "uvicorn"]


def test_compose_keeps_the_directory_that_the_image_declares() -> None:
    service: dict[str, Any] = yaml.safe_load(DEPLOYMENT["compose.yaml"])["services"]["poll"]
    volume = re.search(r"^VOLUME (\S+)$", DEPLOYMENT["Dockerfile"], re.MULTILINE)
    assert volume is not None

    assert service["volumes"] == [f"state:{volume[1]}"]
    assert service["stop_grace_period"] == "15s"


def test_each_alert_asks_for_a_metric_that_exists() -> None:
    rules = yaml.safe_load(MONITORING["alerts.yml"])["groups"][0]["rules"]
    asked = {name for rule in rules for name in re.findall(r"scopestate_\w+", rule["expr"])}

    assert len(asked) >= 6
    assert asked <= {family.name for family in families({}, read=False)}
    assert all(rule["alert"].isidentifier() for rule in rules)


def test_prometheus_reads_the_alerts_that_the_page_shows() -> None:
    config = yaml.safe_load(MONITORING["prometheus.yml"])

    assert [name for name in config["rule_files"] if name not in MONITORING] == []
