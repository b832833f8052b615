"""What can be a name, and what a reference means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import StoreError
from weft.store.names import LATEST, Reference, check_label, check_name, check_text, parse, parse_name

HOSTILE = [
    "", "../x", "..", ".", "a/../b", "/etc/passwd", "\\\\host\\share", "C:\\x", "a/b", "a\0b", "\0", "a\nb", "a b", "~", "-rf", ".hidden", "a..b", "a.",
    "con", "NUL", "com1.txt", "м" + "edical", "ｍedical", "med‮ical", "me\u200bdical", "médical", "medicaⅼ", "a@b", "a%2fb", "x" * 129, "x" * 10_000_000,
    "0123456789abcdef" * 4, "';DROP TABLE names;--",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:20]))
def test_hostile_names_are_refused_by_a_short_message(name: str) -> None:
    with pytest.raises(StoreError) as problem:
        check_name(name)
    assert len(str(problem.value)) < 400
    assert str(problem.value).isprintable()


@pytest.mark.parametrize("name", ["a", "medical", "Medical-v2.1_b", "7", "x" * 128, "deadbeef", "console"])
def test_plain_names_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", [None, 3, b"medical", ["a"]])
def test_a_name_is_text(name: object) -> None:
    with pytest.raises(StoreError, match="is text"):
        check_name(name)


def test_a_look_alike_is_named_by_its_letter() -> None:
    with pytest.raises(StoreError, match="CYRILLIC SMALL LETTER ER"):
        check_name("рolite")
    with pytest.raises(StoreError, match="looks like 'm'"):
        check_name("ｍedical")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("medical", ("medical", None, LATEST, "")),
        ("medical@3", ("medical", 3, "", "")),
        ("medical@prod", ("medical", None, "prod", "")),
        ("medical@latest", ("medical", None, LATEST, "")),
        ("9f2c41d0", ("9f2c41d0", None, LATEST, "9f2c41d0")),
        ("sha256:9f2c41d0", ("", None, "", "9f2c41d0")),
        ("ab" * 32, ("", None, "", "ab" * 32)),
        ("abc", ("abc", None, LATEST, "")),
    ],
)
def test_references(text: str, expected: tuple[str, int | None, str, str]) -> None:
    assert parse(text) == Reference(text, *expected)


@pytest.mark.parametrize(
    "text",
    [
        "medical@",
        "medical@0",
        "@3",
        "a@b@c",
        "medical@../x",
        "medical@" + "9" * 20,
        "medical@٣",
        "x" * 10_000_000,
        3,
        "medical@Latest",
    ],
)
def test_what_is_no_reference(text: object) -> None:
    with pytest.raises(StoreError) as problem:
        parse(text)
    assert len(str(problem.value)) < 400


def test_an_alias_is_no_number_and_not_latest() -> None:
    assert check_label("prod") == "prod"
    for wrong in ("7", "latest", "LATEST"):
        with pytest.raises(StoreError):
            check_label(wrong)
    with pytest.raises(StoreError, match="without a version"):
        parse_name("medical@3")


def test_text_is_one_form_of_each_letter_and_visible() -> None:
    assert check_text("café 医学", "note") == "café 医学"
    for wrong in ("a\0b", "a\u202eb", "a\u200bb", "x" * 2000, "\ud800"):
        with pytest.raises(StoreError):
            check_text(wrong, "note")


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    try:
        found = parse(text)
    except StoreError as error:
        problem = str(error)
    else:
        assert found.name or found.prefix
        assert not {"/", "\\", "\0"} & set(text)
        problem = text
    assert problem.isprintable()
