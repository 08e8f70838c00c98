"""What is known of the functions at the other end of a connection."""

from __future__ import annotations

from scopestate.ops.functions import BUILT_IN
from scopestate.wire.features import may_change


def test_the_built_in_functions_that_change_nothing_are_those_without_the_right_to_write() -> None:
    for row in BUILT_IN.values():
        assert may_change(row.function_id) is ("write" in row.rights), row.function_id
    assert may_change("f")
