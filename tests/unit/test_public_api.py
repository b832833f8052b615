"""The public names: complete, resolvable, documented, and cheap to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import weft

FIXED = {"LoraSpec", "Recipe", "WeftError", "attach", "load", "load_base", "merge", "train"}
HEAVY = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "numpy",
    "rich",
    "safetensors",
    "torch",
    "transformers",
    "typer",
    "yaml",
}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


@pytest.mark.parametrize("name", weft.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(weft, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_the_list_is_sorted_complete_and_short() -> None:
    assert weft.__all__ == sorted(weft.__all__)
    assert dir(weft) == sorted(weft.__all__)
    assert set(weft.__all__) >= FIXED
    assert len(weft.__all__) <= 36
    source = Path(weft.__file__).read_text()
    typed = re.search(r"if TYPE_CHECKING:\n((?:    .*\n)+)", source)
    assert typed is not None
    names = {name.strip() for line in typed[1].splitlines() for name in line.partition(" import ")[2].split(",")}
    assert names == set(weft.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        weft.atach  # noqa: B018


def test_import_brings_no_other_library() -> None:
    loaded = run("import sys, weft; dir(weft); print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    assert not HEAVY & set(loaded.split())


def test_the_value_of_a_spec_needs_no_torch() -> None:
    assert run("import sys, weft; weft.LoraSpec(rank=4); weft.WeftError; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    "code",
    [
        "import weft; print(callable(weft.train))",
        "import weft.train; print(callable(weft.train))",
        "from weft import train; import weft.train; print(callable(train))",
        "import weft; weft.Recipe; print(callable(weft.train))",
    ],
)
def test_train_is_a_function_in_whatever_order_things_are_imported(code: str) -> None:
    assert run(code) == "True"


def test_one_version_everywhere(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "src/weft/__init__.py"
    assert f"## {weft.__version__}" in (repository / "CHANGELOG.md").read_text()


def test_constraints_pin_every_direct_dependency(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = [
        text for group in project["optional-dependencies"].values() for text in group if not text.startswith("weft[")
    ]
    direct = {re.split(r"[<>=\[ ]", text)[0].lower() for text in (*project["dependencies"], *extras)}
    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert {name.replace("_", "-") for name in direct} <= pinned
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
