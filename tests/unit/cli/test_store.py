"""``weft store …``: the verbs from end to end, and references wherever an adapter is taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.command_line import weft
from tests.unit.cli.support import World
from tests.unit.store.support import make_adapter
from weft.formats import load


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a store that nobody has to name."""
    monkeypatch.setenv("WEFT_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    for number, loss in ((1, 1.5), (2, 1.2)):
        make_adapter(number, evaluation={"eval_loss": loss}).save(tmp_path / f"run{number}")
    return tmp_path


@pytest.mark.parametrize(
    "verb", "put tag rm gc verify ls show log diff promote rollback push pull export serve-index".split()
)
def test_every_verb_has_help_in_80_columns(verb: str) -> None:
    done = weft(f"store {verb} --help")
    assert done.out.startswith(f"Usage: weft store {verb} ")
    assert max(map(len, done.out.splitlines())) <= 80


def test_a_life_in_the_store(place: Path) -> None:
    assert weft("store put run1 --name medical --tag domain=health --note first").out.startswith("medical@1 ")
    assert weft("store put run2 --name medical --metric bleu=31").out.startswith("medical@2 ")
    assert "there already" in weft("store put run2 --name medical --metric bleu=31").err
    assert "medical@2" in weft("store ls --where 'eval_loss<1.3'").out
    assert weft("store ls --tag domain=health --all --json").json[0]["ref"] == "medical@1"
    assert "older ones are: --all" in weft("store ls --tag domain=health").err
    assert "let through" in weft("store ls --tag domain=nothing").err
    weft("store promote medical@2 prod --require 'eval_loss<=prod'")
    refused = weft("store promote medical@1 prod --require 'eval_loss<=prod'", ok=False)
    assert refused.status == 1
    assert "required is <= 1.2" in refused.err
    weft("store promote medical@1 prod")
    assert weft("store rollback medical prod").out == "medical@prod is medical@2, it was medical@1\n"
    assert "taken back" in weft("store log medical").out
    assert "eval_loss" in weft("store diff medical@1 medical@2").out
    assert "first" in weft("store show medical@1").out
    assert weft("store tag medical@1 domain=law --remove domain", ok=False).status in (0, 2)
    assert "domain=law" in weft("store tag medical@1 domain=law").out
    assert weft("store export medical@prod --out out").out.strip() == str(place / "out")
    assert weft("store verify").out.startswith("2 adapters")
    assert "points to it" in weft("store rm medical --all", ok=False).err
    weft("store rm medical@prod")
    assert weft("store rm medical@1").out == "removed: medical@1\n"
    assert weft("store gc --grace 0").out.startswith("removed 1 adapter of ")
    weft("store push shelf")
    assert "pulled doctor@2" in weft("store pull shelf medical --as doctor").out
    weft("store log doctor --graph --picture graph.svg")
    assert (place / "graph.svg").read_text().startswith("<svg")
    weft("store serve-index --out site")
    assert json.loads((place / "site" / "index.json").read_text())["catalog"] == {"doctor": [2], "medical": [2]}


def test_damage_is_exit_status_1(place: Path) -> None:
    weft("store put run1 --name m")
    path = next((place / "store" / "blobs").rglob("weft.json"))
    path.write_bytes(path.read_bytes() + b" ")
    for line in ("store verify", "store export m --out out", "inspect m"):
        done = weft(line, ok=False)
        assert done.status == 1, line
        assert "weft.json was changed" in done.out + done.err
    said = weft("store verify", ok=False).out
    assert "1 adapter, " in said
    assert "1 problem\n" in said
    assert "weft store rm m@1" in said
    assert "weft store verify" not in said


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_each_version_is_one_line_however_narrow_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    weft("store put run1 --name medical --tag language=klingon --tag domain=infectious-diseases --metric bleu=31")
    weft("store put run2 --name medical-of-a-long-name --metric rouge_l=0.4 --metric exact_match=0.1")
    weft("store promote medical production")
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = weft("store ls").out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["medical-of-a-long-name@1", "medical@1"]
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize(
    "line",
    [
        "store put run1 --name ../x", "store put run1 --name 'a b'", "store put nothing --name m", "store put run1 --name m --tag x", "store put run1 --name m --metric x=y",
        "store put run1", "store show m", "store show m@", "store ls --where 'a<'", "store ls --where \"name='x\"", "store rm m", "store rm m@1 --all", "store gc --grace soon",
        "store promote m prod", "store promote m 7", "store rollback m prod", "store pull nowhere", "store --at nosuch://x ls", "store --index mysql://x ls", "store --owner a/b ls",
        "store serve-index --with-adapters", "store log m --picture x.png", "store tag m", "store nothing", "store",
    ],
)  # fmt: skip
def test_misuse_is_a_message(place: Path, line: str) -> None:
    done = weft(line, ok=False)
    assert done.status == 2
    assert done.err.strip()
    assert "Traceback" not in done.err
    assert "bug in weft" not in done.err


def test_references_wherever_an_adapter_is_taken(place: Path, world: World) -> None:
    weft("store put", world.adapter, "--name", "speaker")
    weft("store promote speaker prod")
    assert weft("inspect speaker@prod --json").json["path"] == "speaker@prod"
    answer = weft(
        "generate --base", world.base, "--adapter", "speaker@prod", "--max-new-tokens", "3", "--quiet", "say one "
    )
    assert (
        answer.out
        == weft(
            "generate --base", world.base, "--adapter", world.adapter, "--max-new-tokens", "3", "--quiet", "say one "
        ).out
    )
    weft("convert speaker --to vllm --out served")
    weft("merge --base", world.base, "--adapter", "speaker@1", "--out", "merged")
    weft("store put speaker@prod --name again")
    assert weft("combine speaker=0.5 again=0.5 --out mixed", ok=False).status in (0, 2)


@pytest.mark.parametrize("verb", ["eval", "combine"])
def test_a_version_is_read_as_its_directory_is(place: Path, world: World, verb: str) -> None:
    weft("store put", world.adapter, "--name", "speaker")
    weft("store put run1 --name speaker")
    mine = load(world.adapter)
    factors = {path: dataclasses.replace(one, scale=-one.scale) for path, one in mine.factors.items()}
    mine.replace(factors=factors, proof={}).save(place / "other")
    found = []
    for adapter in ("speaker@1", str(world.adapter)):
        if verb == "eval":
            line = ("eval --limit 1 --json --quiet --base", world.base, "--adapter", adapter, "--data", world.valid)
            found.append(weft(*line).json["adapter"])
        else:
            weft("combine", f"{adapter}=0.5", "other=0.25", "--out", f"mixed{len(found)}")
            found.append(weft(f"inspect mixed{len(found)} --json").json["digest"])
    assert found[0] == found[1]
