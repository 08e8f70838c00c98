"""What every adapter that keeps scopes promises (scopestate.actors.ports)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pytest
from stored import change, values_of

from scopestate import Engine
from scopestate.actors.ports import ANSWERS_KEPT_MS
from scopestate.errors import ConfigError, StorageError
from scopestate.persistence import Answer, Row, ScopeChange, ScopeState, Store
from scopestate.persistence.local import LocalBackend


class Place(Protocol):
    """The `store` fixture of conftest.py."""

    adapter: Store

    def reopen(self) -> Store: ...


HOSTILE_NAMES = {
    "empty": "",
    "climbing path": "../../etc/passwd",
    "NUL inside": "a\x00b",
    "only NUL": "\x00",
    "control characters": "\x01\n\r\t\x1f\x7f",
    "quotes": "'; DROP TABLE state; --\"`[]",
    "SQL wildcard": "%_*?",
    "ten thousand characters": "n" * 10_000,
    "not ASCII": "Grüße",
    "beyond 16 bits": "\U0001f600\U0010ffff",
    "noncharacters": "\ufffe\uffff",
    "combining": "e\u0301",
    "precomposed": "\u00e9",
    "upper case": "USERS",
    "lower case": "users",
    "prototype": "__proto__",
    "space": " ",
    "looks like a number": "007",
    "byte order mark": "\ufeff",
}


def created(scope: str, revision: int, values: dict[str, bytes], first: int = 1) -> ScopeChange:
    """A change that creates all its keys, in the order given."""
    return change(scope, revision, dict(values), {key: first + place for place, key in enumerate(values)})


def ordered(state: ScopeState) -> list[tuple[str, bytes]]:
    return list(values_of(state).items())


def test_a_scope_never_saved_is_empty_with_revision_0(store: Place) -> None:
    state = store.adapter.load("nobody")

    assert state == ScopeState.of({}, 0)
    assert store.adapter.scopes() == []


def test_a_backend_with_a_store_keeps_and_says_so(store: Place) -> None:
    assert LocalBackend(store.adapter, lambda scope: "interval").keeps is True


def test_a_store_has_an_id_of_its_own_for_its_life(store: Place) -> None:
    given = store.adapter.id
    with Engine() as one, Engine() as other, Engine(adapter=store.reopen()) as third:
        ids = [engine._parts._around.store_id for engine in (one, other, third)]

    assert store.reopen().id == given
    assert ids[2] == given
    assert len({*ids, ""}) == 4


def test_what_was_saved_is_loaded_with_its_numbers(store: Place) -> None:
    store.adapter.save([created("users", 7, {"ada": b'{"age":36}', "bob": b"null"})])

    state = store.adapter.load("users")

    assert state == ScopeState.of({"ada": Row(b'{"age":36}', 7, 1), "bob": Row(b"null", 7, 2)}, 7)


def test_what_was_saved_is_there_after_a_restart(store: Place) -> None:
    store.adapter.save([created("users", 7, {"ada": b"1"})])

    adapter = store.reopen()

    assert adapter.load("users") == ScopeState.of({"ada": Row(b"1", 7, 1)}, 7)
    assert adapter.scopes() == ["users"]


@pytest.mark.parametrize(
    "value",
    [
        b"null", b"true", b"false", b"0", b"-0.0", b"1", b"1.0", b"1e300", b"-9223372036854775808",
        b"18446744073709551615", b'""', b'"\\u0000"', b'"\xc3\xa9\xf0\x9f\x98\x80"', b"[]", b"{}", b'{"":{"":[]}}',
        b'{"b":1,"a":2}', b'"],[1,1,\\"x\\",1"',
    ],
)  # fmt: skip
def test_a_value_comes_back_byte_for_byte(store: Place, value: bytes) -> None:
    store.adapter.save([created("s", 1, {"k": value})])

    (loaded,) = values_of(store.reopen().load("s")).values()

    assert loaded == value
    assert type(loaded) is bytes


def test_integers_floats_and_booleans_stay_different(store: Place) -> None:
    store.adapter.save([created("s", 3, {"int": b"1", "float": b"1.0", "bool": b"true"})])

    assert ordered(store.reopen().load("s")) == [("int", b"1"), ("float", b"1.0"), ("bool", b"true")]


# --- order -----------------------------------------------------------------------------------------------------------


def test_keys_come_back_in_the_order_of_their_creation_not_of_their_names(store: Place) -> None:
    store.adapter.save([change("s", 3, {"a": b"1", "b": b"2", "c": b"3"}, {"c": 1, "a": 2, "b": 3})])

    assert list(values_of(store.adapter.load("s"))) == ["c", "a", "b"]
    assert list(values_of(store.reopen().load("s"))) == ["c", "a", "b"]


def test_a_key_that_is_overwritten_keeps_its_place(store: Place) -> None:
    store.adapter.save([created("s", 3, {"a": b"1", "b": b"2", "c": b"3"})])
    store.adapter.save([change("s", 4, {"a": b"9"}, {})])

    assert ordered(store.reopen().load("s")) == [("a", b"9"), ("b", b"2"), ("c", b"3")]


def test_a_key_deleted_and_created_again_between_two_saves_goes_to_the_end(store: Place) -> None:
    store.adapter.save([created("s", 3, {"a": b"1", "b": b"2", "c": b"3"})])
    store.adapter.save([change("s", 5, {"a": b"9"}, {"a": 5})])

    assert ordered(store.reopen().load("s")) == [("b", b"2"), ("c", b"3"), ("a", b"9")]


def test_a_key_deleted_in_one_save_and_created_in_the_next_goes_to_the_end(store: Place) -> None:
    store.adapter.save([created("s", 2, {"a": b"1", "b": b"2"})])
    store.adapter.save([change("s", 3, {"a": None}, {})])
    store.adapter.save([change("s", 4, {"a": b"9"}, {"a": 4})])

    assert ordered(store.reopen().load("s")) == [("b", b"2"), ("a", b"9")]


def test_numbers_use_53_bits(store: Place) -> None:
    top = 2**53 - 1
    store.adapter.save([change("s", top, {"a": b"1", "b": b"2", "c": b"3"}, {"a": top, "b": top - 1, "c": 2**40})])

    state = store.reopen().load("s")

    assert list(state.entries) == ["c", "b", "a"]
    assert [entry.created for entry in state.entries.values()] == [2**40, top - 1, top]
    assert state.revision == top


def test_each_entry_keeps_its_numbers_and_its_deadline(store: Place) -> None:
    entries: dict[str, Row | None] = {
        "plain": Row(b"1", 9, 2), "new": Row(b"2", 11, 11), "expires": Row(b"3", 12, 3, 1_700_000_000_123)
    }  # fmt: skip
    store.adapter.save([ScopeChange("s", 12, entries, [], 1_700_000_000_123)])

    loaded = store.reopen().load("s")

    assert loaded.entries == entries
    assert list(loaded.entries) == ["plain", "expires", "new"]


def test_keys_created_far_apart_stay_in_order(store: Place) -> None:
    """They lie in several extents, some of which are emptied."""
    numbers = [1, 2**24 - 1, 2**24, 2**24 + 1, 3 * 2**24 + 5, 2**40]
    for number in numbers:
        store.adapter.save([change("s", number, {f"k{number}": b"1"}, {f"k{number}": number})])
        store.adapter.save([change("other", number, {f"k{number}": b"1"}, {f"k{number}": number})])
    assert list(store.reopen().load("s").entries) == [f"k{number}" for number in numbers]

    gone = numbers[1:4]
    store.adapter.save([change("s", 2**41, {f"k{number}": None for number in gone})])
    store.adapter.save([change("s", 2**41 + 1, {"last": b"1"}, {"last": 2**41 + 1})])

    state = store.reopen().load("s")
    assert list(state.entries) == ["k1", f"k{3 * 2**24 + 5}", f"k{2**40}", "last"]
    assert [entry.created for entry in state.entries.values()] == [1, 3 * 2**24 + 5, 2**40, 2**41 + 1]
    assert len(store.adapter.load("other").entries) == 6


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_scopes_are_listed_by_when_their_first_key_expires(store: Place) -> None:
    batch = [ScopeChange(f"s{due}", 1, {"k": Row(b"1", 1, 1, due)}, [], due) for due in (30, 10, 20)]
    store.adapter.save([*batch, created("without", 1, {"k": b"1"})])

    assert store.reopen().due(2) == [(10, "s10"), (20, "s20")]
    assert store.adapter.due(9) == [(10, "s10"), (20, "s20"), (30, "s30")]


def test_a_scope_whose_deadlines_are_gone_is_not_due(store: Place) -> None:
    store.adapter.save([ScopeChange("s", 1, {"k": Row(b"1", 1, 1, 10)}, [], 10)])
    store.adapter.save([ScopeChange("s", 2, {"k": Row(b"2", 2, 1)})])

    assert store.reopen().due(9) == []


@pytest.mark.parametrize("count", [1, 3, 4, 5, 31, 33, 255, 256, 257, 999, 1000, 1001, 2500])
def test_any_number_of_keys_is_saved_overwritten_and_deleted(store: Place, count: int) -> None:
    names = [f"k{number * 7919 % count}" for number in range(count)]
    values = {name: b"[%d]" % place for place, name in enumerate(names)}
    store.adapter.save([created("s", count, values), created("t", 1, {"only": b"1"})])
    assert ordered(store.reopen().load("s")) == list(values.items())

    doubled = {name: b"[%s]" % value for name, value in values.items()}
    store.adapter.save([change("s", count + 1, dict(reversed(doubled.items())), {})])
    assert ordered(store.reopen().load("s")) == list(doubled.items())

    store.adapter.save([change("s", count + 2, dict.fromkeys(names[1:]), {})])
    assert ordered(store.reopen().load("s")) == [(names[0], doubled[names[0]])]
    assert ordered(store.adapter.load("t")) == [("only", b"1")]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES.keys())
def test_any_text_is_a_scope_name(store: Place, name: str) -> None:
    store.adapter.save([created(name, 1, {"k": b"1"})])

    adapter = store.reopen()

    assert adapter.scopes() == [name]
    assert ordered(adapter.load(name)) == [("k", b"1")]


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES.keys())
def test_any_text_is_a_key(store: Place, name: str) -> None:
    store.adapter.save([created("s", 2, {name: b"1", name + "2": b"2"})])
    store.adapter.save([change("s", 3, {name: b"3"}, {})])
    assert ordered(store.reopen().load("s")) == [(name, b"3"), (name + "2", b"2")]

    store.adapter.save([change("s", 4, {name: None}, {})])
    assert ordered(store.reopen().load("s")) == [(name + "2", b"2")]


def test_names_that_look_alike_stay_apart(store: Place) -> None:
    """docs/reference/semantics.md 8.20 to 8.22: no name is lost, cut or mixed up with another."""
    names = list(HOSTILE_NAMES.values())
    store.adapter.save([created(name, 1, {"k": str(place).encode()}) for place, name in enumerate(names)])

    adapter = store.reopen()

    assert sorted(adapter.scopes()) == sorted(names)
    assert {name: values_of(adapter.load(name))["k"] for name in names} == {
        name: str(place).encode() for place, name in enumerate(names)
    }


@pytest.mark.parametrize("where", ["scope", "key"])
def test_a_name_that_is_not_text_is_refused_and_nothing_is_written(store: Place, where: str) -> None:
    surrogate = "\ud800"
    bad = created(surrogate, 1, {"k": b"1"}) if where == "scope" else created("s", 1, {surrogate: b"1"})

    with pytest.raises(StorageError):
        store.adapter.save([created("good", 1, {"k": b"1"}), bad])

    assert store.reopen().scopes() == []


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mebibytes", [1, 9, 64])
def test_large_values_are_kept(store: Place, mebibytes: int) -> None:
    value = b'"' + b"x" * (mebibytes << 20) + b'"'
    store.adapter.save([created("s", 3, {"before": b"1", "large": value, "after": b"2"})])

    state = store.reopen().load("s")

    assert list(values_of(state)) == ["before", "large", "after"]
    assert values_of(state)["large"] == value
    assert (values_of(state)["before"], values_of(state)["after"]) == (b"1", b"2")


def test_many_middle_sized_values_are_kept_in_order(store: Place) -> None:
    values = {f"k{number}": b'"' + bytes([65 + number % 26]) * 400_000 + b'"' for number in range(60)}
    store.adapter.save([created("s", 60, values)])

    assert ordered(store.reopen().load("s")) == list(values.items())


def test_small_and_large_values_mix(store: Place) -> None:
    sizes = [10, 9_000_000, 10, 300_000, 1, 5_000_000, 9_000_000, 0] + [20] * 1500
    values = {f"k{place}": b'"' + b"x" * size + b'"' for place, size in enumerate(sizes)}
    store.adapter.save([created("s", len(values), values)])

    assert ordered(store.reopen().load("s")) == list(values.items())


# --- scopes and revisions ---------------------------------------------------------------------------------------------


def test_an_emptied_scope_is_not_listed_and_keeps_its_revision(store: Place) -> None:
    store.adapter.save([created("s", 1, {"k": b"1"}), created("t", 1, {"k": b"1"})])
    store.adapter.save([change("s", 2, {"k": None}, {})])

    adapter = store.reopen()

    assert adapter.scopes() == ["t"]
    assert adapter.load("s") == ScopeState.of({}, 2)


def test_the_revision_never_goes_back(store: Place) -> None:
    store.adapter.save([created("s", 9, {"k": b"1"})])
    store.adapter.save([change("s", 5, {"k": b"2"}, {})])

    assert store.reopen().load("s").revision == 9


def test_a_change_without_entries_saves_the_revision_only(store: Place) -> None:
    store.adapter.save([change("s", 4, {}, {})])

    adapter = store.reopen()

    assert adapter.load("s") == ScopeState.of({}, 4)
    assert adapter.scopes() == []


def test_deleting_a_key_that_is_not_there_is_no_error(store: Place) -> None:
    store.adapter.save([change("s", 1, {"ghost": None}, {})])

    assert store.adapter.load("s") == ScopeState.of({}, 1)


def test_an_empty_batch_changes_nothing(store: Place) -> None:
    store.adapter.save([])

    assert store.adapter.scopes() == []


def test_thousands_of_scopes_are_listed(store: Place) -> None:
    names = [f"scope-{number}" for number in range(2500)]
    store.adapter.save([created(name, 1, {"k": b"1"}) for name in names])

    assert sorted(store.reopen().scopes()) == sorted(names)


def test_a_scope_twice_in_a_batch_the_later_change_wins(store: Place) -> None:
    store.adapter.save(
        [
            created("s", 2, {"a": b"1", "b": b"2"}),
            created("t", 1, {"k": b"1"}),
            change("s", 4, {"a": None, "b": b"3"}, {}),
            change("s", 5, {"a": b"4"}, {"a": 5}),
        ]
    )

    assert ordered(store.adapter.load("s")) == [("b", b"3"), ("a", b"4")]
    assert store.reopen().load("s").revision == 5


def test_in_one_batch_a_create_before_a_delete_ends_deleted(store: Place) -> None:
    store.adapter.save([created("s", 1, {"a": b"1"}), change("s", 2, {"a": None}, {})])

    assert store.reopen().load("s") == ScopeState.of({}, 2)


@pytest.mark.parametrize("number", [2**53, 2**63, -1, -(2**63) - 1])
def test_a_number_over_53_bits_is_refused_and_nothing_is_written(store: Place, number: int) -> None:
    with pytest.raises(StorageError):
        store.adapter.save([created("good", 1, {"k": b"1"}), change("s", number, {"k": b"1"}, {"k": 1})])

    assert store.reopen().scopes() == []


# --- closing ---------------------------------------------------------------------------------------------------------


def test_closing_twice_is_harmless(store: Place) -> None:
    store.adapter.close()
    store.adapter.close()


@pytest.mark.parametrize("call", ["load", "scopes", "save"])
def test_a_closed_adapter_refuses(store: Place, call: str) -> None:
    store.adapter.close()
    calls = {
        "load": lambda: store.adapter.load("s"),
        "scopes": store.adapter.scopes,
        "save": lambda: store.adapter.save([created("s", 1, {"k": b"1"})]),
    }

    with pytest.raises(StorageError, match="closed"):
        calls[call]()


# --- the backend of local scopes -------------------------------------------------------------------------------------


def test_a_backend_without_a_store_keeps_nothing() -> None:
    backend = LocalBackend(None, lambda scope: "interval")

    assert backend.keeps is False
    assert backend.store is None
    assert backend.scopes() == []
    assert backend.problem() is None
    backend.close()
    backend.close()


def test_a_scope_of_durability_memory_is_not_among_the_saved_ones(store: Place) -> None:
    backend = LocalBackend(store.adapter, lambda scope: "memory" if scope == "sessions" else "interval")
    store.adapter.save([created("users", 1, {"k": b"1"}), created("sessions", 1, {"k": b"1"})])

    assert backend.scopes() == ["users"]


def test_a_local_backend_has_the_limits_of_its_store(store: Place) -> None:
    backend = LocalBackend(store.adapter, lambda scope: "interval")

    assert (backend.largest_value, backend.longest_name) == (store.adapter.largest_value, store.adapter.longest_name)
    assert LocalBackend(None, lambda scope: "interval").largest_value == 0  # no limit


def test_every_value_that_a_store_needs_to_answer_for_has_a_default() -> None:
    class Least(Store):
        def load(self, scope: str) -> ScopeState:
            return ScopeState.of({}, 0)

        def scopes(self) -> list[str]:
            return []

        def save(self, batch: Sequence[ScopeChange]) -> None:
            pass

        def close(self) -> None:
            pass

    with Engine(adapter=Least()) as engine:
        engine.set("s", "k", 1)
        engine.flush()
        assert engine.health().ok
        assert engine.stats().store == {}


def test_what_is_neither_a_store_nor_a_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`adapter` is a Store or a Backend .*, not dict"):
        Engine(adapter={})  # type: ignore[arg-type]


# --- deadlines, kept answers and the time -----------------------------------------------------------------------------


def test_a_deadline_comes_back_and_can_be_changed_without_a_revision(store: Place) -> None:
    store.adapter.save([ScopeChange("s", 1, {"k": Row(b"1", 1, 1, 5_000)}, due_ms=5_000)])
    store.adapter.save([ScopeChange("s", 1, {"k": Row(b"1", 1, 1, 9_000)}, due_ms=9_000)])

    assert store.reopen().load("s") == ScopeState.of({"k": Row(b"1", 1, 1, 9_000)}, 1)
    assert store.adapter.due(10) == [(9_000, "s")]

    store.adapter.save([ScopeChange("s", 1, {"k": Row(b"1", 1, 1, None)})])
    assert store.reopen().load("s").entries["k"].expires_ms is None
    assert store.adapter.due(10) == []


def test_scopes_that_fall_due_come_in_the_order_of_their_deadlines(store: Place) -> None:
    for scope, due_ms in {"c": 30, "a": 10, "none": None, "b": 20}.items():
        store.adapter.save([ScopeChange(scope, 1, {"k": Row(b"1", 1, 1, due_ms)}, due_ms=due_ms)])

    assert store.adapter.due(2) == [(10, "a"), (20, "b")]
    assert store.reopen().due(10) == [(10, "a"), (20, "b"), (30, "c")]


def answer(number: int, time_ms: int | None = None) -> Answer:
    return Answer(b"digest", b"\x00\xff%d" % number, number if time_ms is None else time_ms)


def test_kept_answers_come_back_the_oldest_first(store: Place) -> None:
    kept = {"z": answer(1), "\x00": answer(2), "\U0001f600": answer(3), "a": answer(4)}
    store.adapter.save([ScopeChange("s", 3, {"k": Row(b"1", 3, 1)}, answers=dict(kept))])
    store.adapter.save([ScopeChange("s", 3, {}, answers={"later": answer(5)})])
    store.adapter.save([ScopeChange("t", 1, {}, answers={"z": answer(9)})])

    state = store.reopen().load("s")

    assert list(state.answers.items()) == [*kept.items(), ("later", answer(5))]
    assert store.adapter.load("t") == ScopeState.of({}, 1, {"z": answer(9)})


def test_an_answer_that_is_kept_no_longer_is_gone(store: Place) -> None:
    many: dict[str, Answer | None] = {f"{number:x}": answer(number) for number in range(1500)}
    store.adapter.save([ScopeChange("s", 1, {}, answers=dict(many)), ScopeChange("t", 1, {}, answers=dict(many))])
    store.adapter.save([ScopeChange("s", 1, {}, answers=dict.fromkeys(list(many)[:1400]))])

    assert list(store.reopen().load("s").answers.items()) == list(many.items())[1400:]
    assert len(store.adapter.load("t").answers) == 1500


def test_of_two_changes_of_a_scope_in_one_save_the_later_one_holds_for_answers(store: Place) -> None:
    keep = ScopeChange("s", 1, {}, answers={"a": answer(1), "b": answer(2)})
    drop = ScopeChange("s", 1, {}, answers={"a": None, "b": answer(3)})
    store.adapter.save([keep, drop])
    store.adapter.save(
        [ScopeChange("t", 1, {}, answers={"a": None}), ScopeChange("t", 1, {}, answers={"a": answer(4)})]
    )

    assert store.adapter.load("s").answers == {"b": answer(3)}
    assert store.adapter.load("t").answers == {"a": answer(4)}


def test_answers_that_are_a_day_old_are_removed_also_of_scopes_that_are_not_written(store: Place) -> None:
    begin = 1_800_000_000_000
    store.adapter.clock_ms = begin
    answers: dict[str, Answer | None] = {f"{number}": answer(number, begin + number) for number in range(2500)}
    store.adapter.save([ScopeChange("idle", 1, {}, answers=answers)])

    def after(ms: int) -> list[str]:
        store.adapter.clock_ms = begin + ms
        store.adapter.save([ScopeChange("other", 1, {"k": Row(b"1", 1, 1)})])
        return list(store.adapter.load("idle").answers)

    assert len(after(ANSWERS_KEPT_MS - 1)) == 2500
    assert after(ANSWERS_KEPT_MS + 4)[0] == "5"
    for _ in range(3):
        left = after(ANSWERS_KEPT_MS + 2400)
    assert left[0] == "2401"
    store.reopen()
    assert after(2 * ANSWERS_KEPT_MS) == []


def test_a_large_answer_is_kept(store: Place) -> None:
    large = Answer(b"digest", bytes(10_000_000), 1)
    kept = {"a": answer(0), "large": large, "z": answer(2)}
    store.adapter.save([ScopeChange("s", 1, {}, answers=dict(kept))])

    assert store.reopen().load("s").answers == kept


def test_a_store_tells_the_time_of_its_last_save(store: Place) -> None:
    assert store.adapter.clock_ms == 0
    store.adapter.clock_ms = 5_000_000
    store.adapter.save([created("s", 1, {"k": b"1"})])
    assert store.reopen().clock_ms == 5_000_000

    store.adapter.clock_ms = 5_000_400
    assert store.reopen().clock_ms == 5_000_400

    store.adapter.clock_ms = 4_000_000
    store.adapter.save([change("s", 2, {"k": b"2"}, {})])
    assert store.reopen().clock_ms == 5_000_400
