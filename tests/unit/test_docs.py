"""What the documentation says exists: paths, commands, options, recipes; and both READMEs say the same."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import weft
from tests.tolerances import assert_close
from weft.train import Recipe

READMES = ("README.md", "README.zh-CN.md")
PAGES = (*READMES, "ARCHITECTURE.md", "CONTRIBUTING.md", "examples/medical_zh/README.md")


def blocks(text: str) -> list[str]:
    """Fenced blocks, without their comments."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"[ \t]+#.*$", "", block, flags=re.MULTILINE).strip() for block in found]


def commands(text: str) -> Iterator[list[str]]:
    """Every ``weft VERB …`` in a block or in backticks, split into words."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    for line in (*lines, *re.findall(r"`(weft [^`]*)`", text)):
        words = shlex.split(line.partition("|")[0]) if line.lstrip().startswith("weft ") else []
        if len(words) > 1 and re.fullmatch(r"[a-z]+(-[a-z]+)*", words[1]):
            yield words[1:]


def test_both_readmes_have_the_same_blocks_numbers_and_headings(repository: Path) -> None:
    english, chinese = ((repository / name).read_text(encoding="utf-8") for name in READMES)
    assert blocks(english) == blocks(chinese)
    for pattern in (r"^#+ ", r"^\| ", r"\]\([^)]+\)", r"\d+\.\d+"):
        found = [sorted(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        languages = {"](README.md)", "](README.zh-CN.md)"}
        assert [item for item in found[0] if item not in languages] == [
            item for item in found[1] if item not in languages
        ]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(repository: Path, page: str) -> None:
    for verb, *words in commands((repository / page).read_text(encoding="utf-8")):
        module = importlib.import_module(f"weft.cli.{verb.replace('-', '_')}")
        command = typer.main.get_command(module.app)
        named = [word for word in words[:1] if hasattr(command, "commands") and not word.startswith("-")]
        parts = [command, *(command.commands[word] for word in named)]
        known = {option for part in parts for parameter in part.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, f"weft {verb}"
        values = [words[index + 1] for index, word in enumerate(words[:-1]) if word == "--set"]
        assert Recipe().set(value for value in values if value != "NAME=VALUE") is not None


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(repository: Path, page: str) -> None:
    text = (repository / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    files = re.findall(r"`((?:src|tests|docs|scripts|examples|benchmarks)/[\w./-]+)`", text)
    if page == "ARCHITECTURE.md":
        files += [
            f"src/weft/{name}"
            for name in re.findall(r"`([\w/]+/[\w]+\.py|[a-z]+\.py)`", text)
            if not name.startswith(("src", "tests", "scripts"))
        ]
    missing = [name for name in files if not (repository / name).exists()]
    assert missing + [link for link in links if not ((repository / page).parent / link).exists()] == []


def test_the_map_is_the_one_that_is_checked(repository: Path) -> None:
    contracts = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    inside = next(contract for contract in contracts if contract.get("containers") == ["weft.core"])
    levels = [tuple(level.split(" | ")) for level in inside["layers"]]
    tree = (repository / "ARCHITECTURE.md").read_text(encoding="utf-8").split("core/  ")[1].split("adapter.py")[0]
    drawn = [tuple(line.strip().split("   ")[0].split("  ")) for line in tree.splitlines()[1:] if line.strip()]
    assert drawn == levels


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml")), ids=lambda path: path.name
)
def test_recipes_of_the_examples_are_valid(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.spec is not None
    assert recipe.spec.rank >= 8


def test_python_of_the_readme_uses_public_names(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(code) == 5
    for block in code:
        compile(block, "README.md", "exec")
        assert set(re.findall(r"\bweft\.(\w+)", re.sub(r"#.*", "", block))) <= set(weft.__all__)


def test_the_first_example_of_the_readme_runs(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.search(
        r"^```python\n(.*?)^```", (repository / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["adapter"] == weft.load("out/mine")
    merged, model = names["merged"], names["model"]
    assert merged is not model


def test_the_weight_manager_of_the_readme(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    code = next(
        block for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "Store()" in block
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEFT_STORE", str(tmp_path / "store"))
    model, _ = weft.load_base()
    for name in ("medical", "polite"):
        with weft.attach(model, {name: weft.LoraSpec(rank=2, targets="all-linear")}) as bank:
            for _, factor in bank.named_parameters(name):
                torch.nn.init.normal_(factor, std=0.05)
            bank.adapter(name).save(f"runs/{name}")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    answer, routed = names["answer"], names["routed"]
    plain = model(**names["batch"]).logits
    assert not torch.allclose(answer, plain)
    assert_close(routed, answer)
    assert torch.equal(names["model"](**names["batch"]).logits, plain)
