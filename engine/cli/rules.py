"""Apply the rules of a configuration to stored values: check them, and migrate them to the current version."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from scopestate.actors.ports import Row, ScopeChange
from scopestate.actors.value_rules import Misfits, ValueRule
from scopestate.cli.current_folder import import_from_here
from scopestate.config import ScopeRule, load
from scopestate.errors import SchemaViolation
from scopestate.opening import value_rule_of
from scopestate.persistence import Store
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.transfer import BATCH_BYTES, BATCH_KEYS, KeyLine

_MOST_LISTED: Final = 100
"""How many values that do not fit are listed one by one."""


def names_config(where: str) -> bool:
    """Return whether `where` names a configuration file, not a directory."""
    return where.endswith((".yaml", ".yml")) and not os.path.isdir(where)


def rules_for(where: str, config: str | None) -> Rules:
    """Return the rules of the configuration file that a command names, or empty rules. Raises ConfigError."""
    file = config if config is not None else where if names_config(where) else None
    if file is None:
        return Rules(())
    import_from_here()
    return Rules(load(file).scopes)


class Rules:
    """The rules of a configuration about values. False if there are none."""

    def __init__(self, rules: tuple[ScopeRule, ...]) -> None:
        self._rules = rules
        self._misfits = Misfits()
        self._of: dict[str, ValueRule | None] = {}

    def __bool__(self) -> bool:
        return any(rule.type or rule.schema or rule.version for rule in self._rules)

    def of(self, scope: str) -> ValueRule | None:
        """Return the rule that values of a scope must fit; None: anything fits."""
        if scope not in self._of:
            self._of[scope] = value_rule_of(scope, self._rules, self._misfits)
        return self._of[scope]

    def check(self, line: KeyLine) -> None:
        """Raise SchemaViolation for a key of an export that its rule refuses."""
        rule = self.of(line.scope)
        if rule is not None:
            rule.check(line.key, line.entry.json)


class Found:
    """The values that do not fit: all are counted, the first are listed."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[SchemaViolation] = []

    def check(self, rules: Rules, scope: str, key: str, json: bytes) -> bool:
        """Check a stored value, and note it if it does not fit. Return whether it fits."""
        rule = rules.of(scope)
        violation = None if rule is None else rule.violation(key, json, written=False)
        if violation is None:
            return True
        self.count += 1
        if len(self._first) < _MOST_LISTED:
            self._first.append(violation)
        return False

    def lines(self) -> Iterator[str]:
        """Yield the problems found, as text."""
        for violation in self._first:
            yield violation.what_is_wrong()
        if self.count > len(self._first):
            yield f"and {self.count - len(self._first):,} more"

    def facts(self) -> dict[str, Any]:
        """Return the problems found, for JSON."""
        names = ("scope", "key", "path", "reason")
        listed = [{name: getattr(violation, name) for name in names} for violation in self._first]
        return {"misfits": self.count, "first_misfits": listed}


class Migration:
    """Brings the values of a store to the current versions of their rules."""

    def __init__(self, rules: Rules, scope: str | None, *, dry_run: bool) -> None:
        """`scope`: only this one. `dry_run`: write nothing."""
        self._rules = rules
        self._scope = scope
        self.dry_run = dry_run
        self.found = Found()
        self._migrated = 0
        self._current = 0

    def concerns(self, scope: str) -> bool:
        """Return whether the values of a scope have versions and are to be migrated."""
        rule = self._rules.of(scope)
        return rule is not None and rule.versions is not None and self._scope in (None, scope)

    def run(self, reader: StoreReader, store: Store | None, advance: Callable[[int], object]) -> None:
        """Rewrite every older value, in steps. `store` is None for a dry run. Raises StorageError."""
        due_ms = {} if store is None else {scope: ms for ms, scope in store.due(_EVERY)}
        seen = 0
        for scope in filter(self.concerns, reader.scopes()):
            step: dict[str, Row] = {}
            size = 0
            for key, row in reader.rows(scope):
                seen += 1
                json = self._as_current(scope, key, row.json)
                if json is not None:
                    step[key] = Row(json, row.revision, row.created, row.expires_ms)
                    size += len(json)
                if len(step) >= BATCH_KEYS or size >= BATCH_BYTES:
                    self._write(store, scope, reader.revision(scope), step, due_ms)
                    step, size = {}, 0
                if seen % BATCH_KEYS == 0:
                    advance(seen)
            self._write(store, scope, reader.revision(scope), step, due_ms)
        advance(seen)

    def _as_current(self, scope: str, key: str, json: bytes) -> bytes | None:
        """Return the value that replaces another; None: it stays."""
        rule = self._rules.of(scope)
        assert rule is not None  # the scope's values have versions
        if not self.found.check(self._rules, scope, key, json):
            return None
        current = rule.current(key, json)
        if current is json:
            self._current += 1
            return None
        return current

    def _write(
        self, store: Store | None, scope: str, revision: int, step: Mapping[str, Row], due_ms: Mapping[str, int]
    ) -> None:
        if step and store is not None:
            store.save([ScopeChange(scope, revision, dict(step), due_ms=due_ms.get(scope))])
        self._migrated += len(step)

    def __str__(self) -> str:
        """Return what was done, and how to continue, for a migration that has not ended."""
        return f"{self.summary()}; repeat the command to continue"

    def summary(self) -> str:
        """Return what was done, as text."""
        done = "would be migrated" if self.dry_run else "migrated"
        left = f", {self.found.count:,} do not fit and were left as they are" if self.found.count else ""
        return f"{self._migrated:,} values {done}, {self._current:,} are current{left}"

    def facts(self) -> dict[str, Any]:
        """Return what was done, for JSON."""
        return {"migrated": self._migrated, "current": self._current, "dry_run": self.dry_run}


_EVERY: Final = 2**62
"""Used as a limit: no limit."""
