"""The context of a trace: what is read from headers, and how it goes with a depth."""

from __future__ import annotations

import copy
import pickle

import pytest

from scopestate.ops.trace_context import LONGEST_STATE, TraceContext, TracedDepth, context_of, read_context, read_text

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_valid_header_is_read() -> None:
    assert read_context(PARENT) == TraceContext(PARENT)
    assert read_context(PARENT, "a=1,b=2") == TraceContext(PARENT, "a=1,b=2")


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "",
        "tp",
        PARENT.upper(),
        PARENT[:-1],
        PARENT + "0",
        PARENT + "-more",
        PARENT + "\n",
        "ff" + PARENT[2:],
        "00-" + "0" * 32 + PARENT[35:],
        PARENT[:36] + "0" * 16 + "-01",
        PARENT.replace("b7", "\u0662\u0663"),
        "01" + PARENT[2:] + "-" + "x" * 1000,
    ],
)
def test_what_is_not_a_header_of_the_recommendation_is_ignored(bad: str | None) -> None:
    assert read_context(bad, "a=1") is None


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert read_context("cc" + PARENT[2:] + "-what-the-future-brings") == TraceContext(PARENT)
    assert read_context("cc" + PARENT[2:]) == TraceContext(PARENT)


@pytest.mark.parametrize("state", ["a=1\n", "a=\u00e4", "a=" + "x" * LONGEST_STATE, ""])
def test_a_bad_state_is_dropped_alone(state: str) -> None:
    assert read_context(PARENT, state) == TraceContext(PARENT)


@pytest.mark.parametrize("context", [TraceContext(PARENT), TraceContext(PARENT, "a=1, b=2")])
def test_its_text_is_read_back(context: TraceContext) -> None:
    assert read_text(context.text) == context


def test_a_depth_with_a_context_is_a_number_in_every_other_way() -> None:
    context = TraceContext(PARENT)
    depth = TracedDepth.of(3, context)

    assert depth == 3
    assert context_of(depth) == context
    assert context_of(3) is None
    assert type(TracedDepth.of(depth, None)) is int
    assert type(depth + 1) is int
    assert copy.copy(depth) is depth
    assert copy.deepcopy(depth) is depth
    assert type(pickle.loads(pickle.dumps(depth))) is int
