"""Conditions: read by rules, never run."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import StoreError
from weft.store.predicates import And, Comparison, Not, Or, Word, comparisons, parse_condition


def test_a_condition_is_read() -> None:
    found = parse_condition("eval_loss<2 and (rank>=8 or tag.domain = health) and not note!='a b'")
    assert found == And((
        Comparison("eval_loss", "<", 2.0),
        Or((Comparison("rank", ">=", 8.0), Comparison("tag.domain", "=", "health"))),
        Not(Comparison("note", "!=", "a b")),
    ))  # fmt: skip
    assert [str(item) for item in comparisons(found)] == ["eval_loss<2", "rank>=8", "tag.domain=health", "note!='a b'"]


def test_and_binds_closer_than_or_and_a_comma_is_and() -> None:
    assert parse_condition("a<1 or b<2, c<3") == Or(
        (Comparison("a", "<", 1), And((Comparison("b", "<", 2), Comparison("c", "<", 3))))
    )
    assert parse_condition("a == -1.5e-3") == Comparison("a", "=", -0.0015)
    assert isinstance(parse_condition("a<=prod").value, Word)
    assert not isinstance(parse_condition("a='prod'").value, Word)


@pytest.mark.parametrize(
    "text",
    ["", " ", "a", "a<", "<2", "a<2 b<3", "a<2 and", "(a<2", "a<2)", "a<(1)", "a ~ 2", "a<1; DROP TABLE names", "__import__('os')", "a<2 or 1=1 --",
     "a='x", "a=\"x\0y\"", "a<1e999", "not", "é<2", "a<1" + " and a<1" * 100, "(" * 100 + "a<1" + ")" * 100, "not " * 100 + "a<1", "a" * 10_000_000],
    ids=lambda text: ascii(text[:24]),
)  # fmt: skip
def test_what_is_no_condition_says_where(text: str) -> None:
    with pytest.raises(StoreError) as problem:
        parse_condition(text)
    assert len(str(problem.value)) < 400


@given(st.text(alphabet="ab<>=!'\"() ,.0123456789andort-", max_size=60))
def test_any_text_is_a_condition_or_an_error(text: str) -> None:
    with contextlib.suppress(StoreError):
        assert comparisons(parse_condition(text))
