"""Values with versions: a field of the value has its version, and a function of the program upgrades older values.

Pure, apart from calling that function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from scopestate.errors import InvalidValue
from scopestate.ops.callbacks import plain_answer
from scopestate.ops.value_types import Misfit
from scopestate.ops.values import class_name, decode, encode

Upgrade = Callable[[Any, int], Any]
"""Takes a value and its version, and returns the value in the form of the next version."""


class Versions:
    """The versions that the values of some scopes have. It has no state: any thread may use it."""

    def __init__(self, version: int, field: str, upgrade: Upgrade | None) -> None:
        """`version`: the current one. `field`: a top-level field of an object; a value without it has version 1."""
        self.version: Final = version
        self.field: Final = field
        self._upgrade = upgrade
        kind = msgspec.defstruct("Versioned", [("version", Any, 1)], rename={"version": field})
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(kind).decode

    def of(self, json: bytes) -> int:
        """Return the version of a value. Raises Misfit if it is not a number from 1 on."""
        if not json.lstrip().startswith(b"{"):
            return 1
        version = self._decode(json).version
        if type(version) is not int or version < 1:
            raise Misfit(f"$.{self.field}", f"a version is a whole number of 1 or more, not {str(version)[:40]}")
        return version

    def current(self, json: bytes) -> bytes:
        """Return a value in the form of the current version. A value that is not older is returned unchanged.

        Raises Misfit. If the function raised an exception, that is its cause.
        """
        version = self.of(json)
        if version >= self.version:
            return json
        value = decode(json)
        while version < self.version:
            value = self._next(value, version)
            version += 1
        try:
            return encode(value)
        except InvalidValue as error:
            raise Misfit(error.path, f"what the upgrade has returned is not JSON: {error.problem}") from error

    def _next(self, value: Any, version: int) -> Any:
        assert self._upgrade is not None  # a rule of a later version has one
        step = f"the upgrade from version {version}"
        try:
            value = plain_answer("upgrade", self._upgrade(value, version))
        except Exception as error:
            raise Misfit("$", f"{step} raised {class_name(error)}: {error}") from error
        if type(value) is not dict:
            raise Misfit("$", f"{step} returned {class_name(value)}: a value with a version is an object, as a dict")
        value[self.field] = version + 1
        return value

    def is_too_new(self, json: bytes) -> Misfit | None:
        """Return the error for a value of a version later than the current one; None for any other value."""
        version = self.of(json)
        if version <= self.version:
            return None
        return Misfit(
            f"$.{self.field}", f"it has version {version}, newer than {self.version}, which this engine knows"
        )
