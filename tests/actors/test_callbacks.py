"""Functions of callers within turns: which thread is refused the engine, and for how long."""

from __future__ import annotations

import os
from threading import get_ident
from typing import Any

import pytest
from forking import beside_threads

from scopestate.actors.callbacks import IN_CALLBACK, refuse_in_callback, run_callback
from scopestate.errors import WouldDeadlock


def test_the_thread_of_a_function_is_refused_while_it_runs() -> None:
    def refused(argument: Any) -> Any:
        assert {get_ident(): "modify"} == IN_CALLBACK
        with pytest.raises(WouldDeadlock, match="`modify`"):
            refuse_in_callback()
        return argument

    assert run_callback("modify", "s", refused, 7) == 7
    refuse_in_callback()
    assert IN_CALLBACK == {}


def test_a_function_that_raises_leaves_no_thread_behind() -> None:
    with pytest.raises(ZeroDivisionError):
        run_callback("transact", "s", lambda argument: 1 / argument, 0)
    refuse_in_callback()
    assert IN_CALLBACK == {}


def test_a_forked_child_has_no_functions_running() -> None:
    def fork(_: Any) -> int:
        with beside_threads():
            child = os.fork()
        if child == 0:
            os._exit(bool(IN_CALLBACK))
        return os.waitpid(child, 0)[1]

    assert run_callback("transact", "s", fork, None) == 0
