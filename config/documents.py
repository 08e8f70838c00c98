"""A whole document, YAML text or Python data, as a `Config` and the list of its mistakes."""

from __future__ import annotations

from scopestate.config.nodes import Node, Problems, from_python, parse
from scopestate.config.schema import Config
from scopestate.config.sections import SectionReader
from scopestate.errors import ConfigError

Outcome = tuple[Config | None, list[ConfigError]]
"""The configuration, which counts only if the list beside it is empty; the mistakes are in the order of their lines."""


def read_text(text: str, file: str, source: str | None) -> Outcome:
    """Read YAML text; mistakes name it `file`."""
    return examine_text(text, source, Problems(file))


def examine_text(text: str, source: str | None, problems: Problems) -> Outcome:
    """Read YAML text; `problems` then also has the doubts, and the lines of the keys."""
    try:
        root = parse(text, problems)
    except ConfigError as error:
        problems.errors.append(error)
        return None, problems.by_line()
    if root is None:
        # Refused: reading it as "all defaults". A file caught while it is truncated and rewritten looks like this.
        return None, [problems.error("the configuration is empty; for the defaults write `workers: []`", 1)]
    return _read(root, problems, source)


def read_python(data: object) -> Outcome:
    """Read mappings and lists; mistakes have neither file nor line."""
    problems = Problems(None)
    try:
        root = from_python(data, problems)
    except ConfigError as error:
        return None, [error]
    return _read(root, problems, None)


def _read(root: Node, problems: Problems, source: str | None) -> Outcome:
    config = SectionReader(problems).read(root, source)
    return config, problems.by_line()
