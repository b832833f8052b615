"""YAML as people expect it: the core schema of YAML 1.2, and no key twice.

PyYAML reads YAML 1.1, where ``3e-4`` is text, ``no`` is false and ``1:30`` is ninety. This module does not know what the
values mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weft.errors import RecipeError

__all__ = ["dump", "parse", "parse_file"]


class _Loader(yaml.SafeLoader):
    """A safe loader with the core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


_FastDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's is ten times as fast, where it is there


class _Dumper(_FastDumper):  # type: ignore[misc]
    """A safe dumper that quotes text which a reader of YAML 1.2 would take for a number."""


def _represent_text(dumper: Any, text: str) -> Any:
    looks_else = any(pattern.match(text) for found in _Loader.yaml_implicit_resolvers.values() for _, pattern in found)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if looks_else else None)


_Dumper.add_representer(str, _represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse(text: str, what: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.
        what: what it is, for the error.

    Raises:
        RecipeError: it is no YAML; says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} is no YAML that can be read: {error}") from error


def parse_file(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a file that holds one mapping; an empty file is an empty mapping.

    Raises:
        RecipeError: not there, not text, no YAML, no mapping, a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: this file can't be read: {error}") from error
    values = parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{path}: got {type(values).__name__}; expected a mapping with lines such as 'learning_rate: 3e-4'"
        )
    return values


def dump(values: Mapping[str, Any], headline: str) -> str:
    """YAML text that a reader of either version understands, in the order of the mapping, after a comment."""
    return f"# {headline}\n" + yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
