"""The exception tree: complete, drawn, and every error is what its docstring says."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from weft import errors
from weft.errors import BaseMismatchError, FormatError, KeysError, TargetError, WeftError, did_you_mean, some_names

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, WeftError)]


def test_every_error_is_public_drawn_and_documented() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert {item.__name__ for item in CLASSES} == {*drawn, "WeftError"}
    for item in CLASSES:
        assert item.__name__ in errors.__all__
        assert item.__doc__
        assert item.__module__ == "weft.errors"
    assert set(errors.__all__) == {item.__name__ for item in CLASSES} | {"did_you_mean", "some_names"}


def test_the_drawing_is_the_tree() -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if "── " in line]
    parents: list[tuple[int, str]] = [(0, "WeftError")]
    for line in lines:
        depth, name = re.search(r"[├└]", line).start(), re.search(r"── (\w+)", line)[1]
        while parents[-1][0] >= depth:
            parents.pop()
        item = getattr(errors, name)
        assert item.__bases__[0].__name__ == parents[-1][1], name
        for builtin in re.findall(r"\(also an? (\w+)\)", line):
            assert issubclass(item, getattr(__builtins__, builtin, None) or __builtins__[builtin]), name
        parents.append((depth, name))


@pytest.mark.parametrize("item", CLASSES, ids=lambda item: item.__name__)
def test_an_error_carries_its_message_through_a_pickle(item: type[WeftError]) -> None:
    problem = pickle.loads(pickle.dumps(item("what, where, next")))  # noqa: S301
    assert type(problem) is item
    assert str(problem) == "what, where, next"


def test_a_file_error_names_the_file_and_the_key() -> None:
    problem = KeysError("has no site", path="dir/adapter_model.safetensors", key="a.lora_A")
    assert str(problem) == "dir/adapter_model.safetensors: key 'a.lora_A': has no site"
    assert (problem.path, problem.key) == ("dir/adapter_model.safetensors", "a.lora_A")
    assert str(FormatError("is empty", path="x")) == "x: is empty"
    assert str(FormatError("bad", key="k")) == "key 'k': bad"
    assert issubclass(TargetError, ValueError)
    assert not issubclass(BaseMismatchError, ValueError)
    again = pickle.loads(pickle.dumps(problem))  # noqa: S301
    assert str(again) == str(problem)


def test_hints() -> None:
    assert did_you_mean("qproj", ["q_proj", "v_proj", "lm_head"]) == " Did you mean 'q_proj' or 'v_proj'?"
    assert did_you_mean("zzz", ["q_proj"]) == ""
    assert did_you_mean("x", []) == ""
    assert some_names(["a", "b"]) == "'a', 'b'"
    assert some_names(map(str, range(9)), limit=2) == "'0', '1' … and 7 more"
    assert some_names([]) == ""
