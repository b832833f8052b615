"""`weft combine`, `compare` and `shrink` as they are typed: results, files, and misuse without a traceback."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

import weft as api
from tests.command_line import weft
from tests.tolerances import assert_close
from tests.unit.cli.support import World
from tests.unit.compose.support import adapter_of
from weft.cli.combine import operand, with_patterns
from weft.cli.options import Usage


@dataclass(frozen=True)
class Shelf:
    """Paths of adapters of one base, and of one of another base."""

    folder: Path
    base: Path
    data: Path


@pytest.fixture(scope="module")
def shelf(world: World, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    model, _ = api.load_base(world.base)
    for seed, name in enumerate("abc", 1):
        adapter_of(model, seed, rank=2 * seed, size=0.1).save(folder / name)
    adapter_of(model, 9, rank=2, dora=True, size=0.1).save(folder / "dora")
    adapter_of(api.load_base(world.other)[0], 5, rank=2).save(folder / "other")
    return Shelf(folder, world.base, world.valid)


@pytest.fixture(autouse=True)
def there(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf.folder)


def test_the_exact_mixture(tmp_path: Path) -> None:
    done = weft("combine a=0.7 b=-0.3 --out", tmp_path / "mixed")
    assert "nothing was left out" in done.out
    assert "0.7 ×" in done.out
    mixed, a, b = (api.load(path) for path in (tmp_path / "mixed", "a", "b"))
    for path in mixed.sites:
        assert_close(mixed.delta(path), 0.7 * a.delta(path) - 0.3 * b.delta(path))
    assert (tmp_path / "mixed/adapter_config.json").is_file()
    said = weft("inspect", tmp_path / "mixed").out
    assert "0.7 × a (" in said
    assert "exact; relative error 0.00%" in said


def test_an_approximation_says_its_error_site_by_site(tmp_path: Path) -> None:
    done = weft("combine a b c --method ties --density 0.3 --rank 4 --out", tmp_path / "mixed")
    mixed = api.load(tmp_path / "mixed")
    assert sum("%" in line and "_proj" in line for line in done.out.splitlines()) >= len(mixed.sites)
    assert "relative error" in done.out
    assert mixed.ranks() == "4"
    told = weft("combine a b c --method ties --density 0.3 --rank 4 --json --out", tmp_path / "again").json
    assert told["digest"] == mixed.digest
    assert len(told["sites"]) == len(mixed.sites)
    assert mixed.provenance.mixture is not None
    assert told["relative_error"] == pytest.approx(mixed.provenance.mixture["relative_error"])


def test_a_search_and_losses(shelf: Shelf, tmp_path: Path) -> None:
    done = weft(f"combine a b --search {shelf.data} --base {shelf.base} --evaluations 6 --out", tmp_path / "best")
    assert "6 evaluations" in done.out
    assert "6/6: loss" in done.err
    assert "loss: base" in done.out
    quiet = weft(
        f"combine a b --search {shelf.data} --base {shelf.base} --evaluations 6 --quiet --out", tmp_path / "quiet"
    )
    assert quiet.err == ""
    told = weft(f"shrink a --rank 1 --data {shelf.data} --base {shelf.base} --json --out", tmp_path / "small").json
    assert set(told["losses"]) == {"base", "a", "sum", "mixture"}


def test_layer_wise_weights(tmp_path: Path) -> None:
    weft(r"combine a=0.5 b --at 'layers\.0\..*:a=2' --out", tmp_path / "mixed")
    mixed, a, b = (api.load(path) for path in (tmp_path / "mixed", "a", "b"))
    for path in mixed.sites:
        assert_close(mixed.delta(path), (2 if ".0." in path else 0.5) * a.delta(path) + b.delta(path))


def test_dora_needs_its_base(shelf: Shelf, tmp_path: Path) -> None:
    refused = weft("combine dora=0.5 a --out", tmp_path / "mixed", ok=False)
    assert refused.status == 2
    assert "--base" in refused.err
    weft(f"combine dora=0.5 a --base {shelf.base} --out", tmp_path / "mixed")
    assert api.load(tmp_path / "mixed").spec.dora


@pytest.mark.parametrize("limit", ["--energy 0.9", "--rank 2", "--error 0.2"])
def test_shrink(limit: str, tmp_path: Path) -> None:
    done = weft(f"shrink c {limit} --out", tmp_path / "small")
    assert "relative error" in done.out
    assert api.load(tmp_path / "small").num_parameters < api.load("c").num_parameters


def test_compare_and_its_picture(tmp_path: Path) -> None:
    done = weft("compare a b c --picture", tmp_path / "map.svg")
    for pair in ("a  and  b", "a  and  c", "b  and  c"):
        assert pair in done.out
    assert ElementTree.fromstring((tmp_path / "map.svg").read_text()).tag.endswith("svg")
    told = weft("compare a b --json").json
    assert len(told["sites"]) == 14
    assert weft("compare a b --sites").out.count("q_proj") == 2
    assert weft("compare a b").out.count("q_proj") == 1


@pytest.mark.parametrize(("line", "said"), [
    ("combine a=x b --out m", "'x' is no weight"),
    ("combine a=nan b --out m", "is nan"),
    ("combine a a=0.5 --out m", "are the same adapter"),
    ("combine a none --out m", "no such file"),
    ("combine a other --out m", "different bases"),
    ("combine a b --method tise --out m", "Did you mean 'ties'"),
    ("combine a b --method svd --out m", "needs rank=16 (--rank 16), or energy="),
    ("combine a b --rank 2 --out m", "method='svd' does"),
    ("combine a b --out a", "exists already"),
    ("combine a b", "--out"),
    ("combine --out m", "PATH"),
    ("combine a b --at q_proj=1 --out m", "expected PATTERN:PATH=WEIGHT"),
    ("combine a b --at q_proj:a=x --out m", "'x' is no number"),
    ("combine a b --at nothing:a=1 --out m", "'nothing' matches the end of none"),
    ("combine a b --search x.jsonl --data y.jsonl --out m", "--data with --search"),
    ("combine a b --search none.jsonl --out m", "none.jsonl: no such file"),
    ("combine a=1e308 b --out m", "take smaller ones"),
    ("combine a=0 --out m", "all weights are 0"),
    ("shrink a --out m", "needs rank=16 (--rank 16), or energy="),
    ("shrink a --energy 2 --out m", "energy=2.0"),
    ("shrink a --rank 2 --out b", "exists already"),
    ("compare a", "at least 2"),
    ("compare a other", "different bases"),
    ("compare a b --picture x.png", "end the name in .svg"),
    ("compare a b --picture a/weft.json.svg/x.svg", "there is no directory"),
])  # fmt: skip
def test_misuse(line: str, said: str) -> None:
    done = weft(line, ok=False)
    assert done.status in (1, 2)
    assert said in done.err
    assert "Traceback" not in done.err
    assert not os.path.lexists("m"), "nothing is left behind"


def test_operands() -> None:
    assert operand("a") == ("a", 1.0)
    assert operand("runs/a=b=-0.5") == ("runs/a=b", -0.5)
    Path("odd=name").mkdir()
    assert operand("odd=name") == ("odd=name", 1.0)
    Path("odd=name").rmdir()
    with pytest.raises(Usage):
        operand("odd=name")
    rules = ["x:runs/a=0.5", "y.*:a=2", "z:a=3"]
    assert with_patterns([("a", 1.0), ("runs/a", 0.25)], rules) == {
        "a": {"y.*": 2.0, "z": 3.0, "default": 1.0},
        "runs/a": {"x": 0.5, "default": 0.25},
    }


@pytest.mark.parametrize(
    ("text", "said"), [("=0.5", "no path before"), ("a=", "'' is no weight"), ("a=x", "'x' is no weight")]
)
def test_operands_that_are_none(text: str, said: str) -> None:
    with pytest.raises(Usage, match=said):
        operand(text)


@pytest.mark.parametrize("rules", [["default:a=0.2"], ["q_proj:a=1", "q_proj:a=2"]])
def test_a_rule_that_would_do_nothing(rules: list[str]) -> None:
    with pytest.raises(Usage, match="meant for all other sites|stands twice"):
        with_patterns([("a", 1.0)], rules)


def test_a_picture_without_a_directory(tmp_path: Path) -> None:
    done = weft("compare a b --picture", tmp_path / "no/such.svg", ok=False)
    assert done.status == 2
    assert "make it first" in done.err
