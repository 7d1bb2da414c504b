"""Values as people write them: read by their type, written back, refused with what the type takes."""

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sora_jax.values import check, kind_of, read, takes, write

PAIRS = tuple[tuple[float, float], tuple[float, float]]
GROUPS = tuple[tuple[int, int, int], ...]
TABLE = Mapping[str, float]

READ = [
    (bool, "true", True),
    (bool, "False", False),
    (bool, "no", False),
    (bool, "1", True),
    (int, "-1", -1),
    (int, "20_000", 20000),
    (int, "1e5", 100000),
    (float, "3", 3.0),
    (float, "-2.5e-3", -0.0025),
    (str, "none", "none"),
    (str, "", ""),
    (int | None, "None", None),
    (int | None, "null", None),
    (int | None, "4", 4),
    (str | None, "none", None),
    (bool | None, "false", False),
    (Literal["a", "b"], "b", "b"),
    (Literal[1, 2], "2", 2),
    (tuple[int, int, int], "1,2,2", (1, 2, 2)),
    (tuple[int, int, int], "(1, 2, 2)", (1, 2, 2)),
    (tuple[int, int, int], "[1,2,2]", (1, 2, 2)),
    (tuple[int, ...], "", ()),
    (tuple[int, ...], "()", ()),
    (tuple[int, ...], "5", (5,)),
    (tuple[int, ...], "5,", (5,)),
    (tuple[float, ...], "-1,2", (-1.0, 2.0)),
    (tuple[str, ...], "16:9,1:1", ("16:9", "1:1")),
    (tuple[str, ...], "('16:9', '1:1')", ("16:9", "1:1")),
    (tuple[str, ...], '"a,b",c', ("a,b", "c")),
    (tuple[int, str], "1,x", (1, "x")),
    (PAIRS, "(64,0.25),(8,0.125)", ((64.0, 0.25), (8.0, 0.125))),
    (PAIRS, "((64, 0.25), (8, 0.125))", ((64.0, 0.25), (8.0, 0.125))),
    (GROUPS, "(2,2,2)", ((2, 2, 2),)),
    (GROUPS, "((2,2,2),)", ((2, 2, 2),)),
    (GROUPS, "[[2,2,2],[1,2,2]]", ((2, 2, 2), (1, 2, 2))),
    (GROUPS, "()", ()),
    (TABLE, '{"a": 1, "b": 0.5}', {"a": 1.0, "b": 0.5}),
    (TABLE, "{'a': 1}", {"a": 1.0}),
    (TABLE, "{}", {}),
    (Any, "x", "x"),
    (Any, "[1, 2]", (1, 2)),
]

REFUSED = [
    *((bool, text) for text in ("2", "maybe", "")),
    *((int, text) for text in ("1.5", "1e-3", "x", "", "einf", "1e999", "True")),
    *((float, text) for text in ("fast", "nan", "inf", "-inf", "1,2", "")),
    *((Literal["a", "b"], text) for text in ("c", "", "a,b")),
    *((int | None, text) for text in ("x", "1.5")),
    *(
        (tuple[int, int, int], text)
        for text in ("1,2.5,2", "1,2", "2", "", "1,2,2,2", "1,,2", "1,2,)", "(1,2,2")
    ),
    *((tuple[int, ...], text) for text in (",", "1,,2", "1)", "a")),
    *((tuple[str, ...], text) for text in ("a,,b", "a,(b", "'a")),
    *((PAIRS, text) for text in ("64,0.25,8,0.1", "(64,0.25)", "(64,0.25),(8)", "(64,x),(8,1)")),
    *((GROUPS, text) for text in ("2,2,2", "(2,2)", "(2,2,2),(1,2)")),
    *((TABLE, text) for text in ("x", '{"a": "b"}', '{"a": true}', "[1]", "1", '{"a": NaN}')),
]

WRONG = [
    (int, True),
    (int, 1.0),
    (int, "1"),
    (float, "1"),
    (float, True),
    (float, float("nan")),
    (bool, 1),
    (str, 1),
    (str, None),
    (tuple[int, int], [1, 2, 3]),
    (tuple[int, int], "12"),
    (tuple[int, ...], 1),
    (TABLE, {1: 1.0}),
    (TABLE, {"a": "b"}),
    (TABLE, [("a", 1.0)]),
    (Literal[1], True),
    (int | None, "x"),
]


@pytest.mark.parametrize(("kind", "text", "value"), READ)
def test_text_is_read_by_its_type_and_written_back(kind, text, value):
    found = read(kind, text)
    assert found == value and type(found) is type(value)
    assert read(kind, write(found)) == found == check(kind, found)


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_text_of_another_kind_or_length_is_refused(kind, text):
    with pytest.raises(ValueError):
        read(kind, text)


@pytest.mark.parametrize(("kind", "value"), WRONG)
def test_values_of_another_kind_or_length_are_refused(kind, value):
    with pytest.raises(ValueError):
        check(kind, value)


def test_lists_become_tuples_and_whole_numbers_floats():
    assert check(PAIRS, [[64, 1], [8, 1]]) == ((64.0, 1.0), (8.0, 1.0))
    assert check(TABLE, {"a": 1}) == {"a": 1.0}
    assert type(check(float, 1)) is float
    assert kind_of([1, 2.5]) == tuple[float, ...] and kind_of(True) is bool


def test_what_a_type_takes_is_said_in_words():
    assert takes(tuple[int, int, int]) == "3 whole numbers separated by commas"
    assert takes(tuple[float, ...]) == "numbers separated by commas"
    assert takes(PAIRS) == "2 groups of 2 numbers separated by commas"
    assert takes(Literal["a", "b"]) == "one of a, b"
    assert takes(int | None) == "a whole number or none"


numbers = st.floats(allow_nan=False, allow_infinity=False)
KINDS = st.sampled_from(
    [
        (tuple[str, ...], st.lists(st.text()).map(tuple)),
        (tuple[float, ...], st.lists(numbers).map(tuple)),
        (GROUPS, st.lists(st.tuples(*3 * [st.integers()])).map(tuple)),
        (tuple[tuple[str, ...], ...], st.lists(st.lists(st.text(), min_size=1).map(tuple)).map(tuple)),
        (TABLE, st.dictionaries(st.text(), numbers)),
        (int, st.integers()),
        (str, st.text()),
    ]
)


@given(KINDS.flatmap(lambda pair: st.tuples(st.just(pair[0]), pair[1])))
@example((tuple[str, ...], (",\\",)))  # ends with a backslash, which escapes no quote
def test_whatever_is_written_is_read_again(pair):
    kind, value = pair
    assert read(kind, write(value)) == value


def test_a_whole_number_larger_than_any_float_is_none_of_its_type():
    with pytest.raises(ValueError):
        check(float, 10**400)
