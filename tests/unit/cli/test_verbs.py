"""Each verb once as it is meant, on a tiny base: what is printed, what is written, what is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import Done, weft
from tests.unit.cli.support import World, write_classifier, write_rows

QUICK = "--set max_steps=2 --set batch_size=4 --set rank=2 --set learning_rate=1e-2"
WRITTEN = {"recipe.yaml", "environment.json", "log.jsonl", "adapter", "report.json", "report.md"}


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run folder that the command line made, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, weft(f"train --base {world.base} --data {world.train} --eval {world.valid} --out {folder} {QUICK}")


def test_train(run: tuple[Path, Done], world: World) -> None:
    folder, done = run
    assert "2 steps" in done.out
    assert "base     adapter" in done.out
    assert "completion" in done.err  # the kind that was recognised is said
    assert "step 2/2" in done.err
    assert f"--adapter {folder}" in done.err
    assert {path.name for path in folder.iterdir()} >= WRITTEN


def test_train_says_json_and_nothing_else(world: World, tmp_path: Path) -> None:
    done = weft(f"train --base {world.base} --data {world.train} --eval 0.2 --out {tmp_path}/r --json --quiet {QUICK}")
    assert done.json["steps"] == 2
    assert done.json["path"] == str(tmp_path / "r")
    assert done.json["data"]["eval"]["examples"] == 2
    assert done.err == ""


def test_train_with_a_recipe_file_and_other_names(world: World, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("max_steps: 2\nrank: 2\nbatch_size: 4\n")
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": f"number {n} ", "a": str(n)} for n in range(8)])
    data = f"--data {rows} --columns prompt=q,completion=a --task completion"
    recipe = f"--recipe {tmp_path}/recipe.yaml --set rank=3 --dtype float32"
    done = weft(f"train --base {world.base} {data} {recipe} --out {tmp_path}/r --json")
    written = (tmp_path / "r" / "recipe.yaml").read_text()
    assert "rank: 3" in written
    assert "prompt: q" in written
    assert done.json["data"]["train"]["kind"] == "completion"


def test_a_finished_run_is_resumed_to_itself(run: tuple[Path, Done]) -> None:
    folder, _ = run
    before = (folder / "report.json").read_bytes()
    weft(f"train --resume {folder}")
    assert (folder / "report.json").read_bytes() == before


def test_overwrite_replaces_a_run(world: World, tmp_path: Path) -> None:
    line = f"train --base {world.base} --data {world.train} --out {tmp_path}/r --quiet {QUICK}"
    weft(line)
    done = weft(line, ok=False)
    assert done.status == 2
    assert "--overwrite" in done.err
    weft(f"{line} --overwrite")


def test_eval_shows_both_sides(world: World) -> None:
    line = f"eval --base {world.base} --adapter {world.adapter} --data {world.valid} --max-new-tokens 4"
    text = weft(line).out
    assert "base     adapter" in text
    assert "exact_match" in text
    assert "wanted" in text
    found = weft(f"{line} --json").json
    assert found["base"]["loss"] != found["adapter"]["loss"]
    assert set(found["base"]) == set(found["adapter"])


def test_eval_of_the_base_alone(world: World) -> None:
    found = weft(f"eval --base {world.base} --data {world.valid} --max-new-tokens 4 --limit 1 --json").json
    assert found["adapter"] is None
    assert found["generated"] == 1


def test_generate(world: World) -> None:
    line = f"generate --base {world.base} --max-new-tokens 6"
    alone, other = weft(line, "hello"), weft(f"{line} --adapter {world.adapter}", "hello")
    assert alone.out.endswith("\n")
    assert alone.out != other.out
    assert alone.err == ""


def test_generate_several_from_anywhere(world: World, tmp_path: Path) -> None:
    line = f"generate --base {world.base} --max-new-tokens 5 --temperature 0.7 --seed 3"
    text = weft(line, "one", "two").out
    assert text.startswith("> one\n")
    assert "\n\n> two\n" in text
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert weft(f"{line} --file {tmp_path}/prompts.txt").out == text
    assert weft(f"{line} --file -", stdin="one\ntwo\n").out == text
    rows = [json.loads(row) for row in weft(f"{line} --json", "one", "two").out.splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two"]


def test_all_of_stdin_is_one_prompt(world: World) -> None:
    line = f"generate --base {world.base} --max-new-tokens 5"
    assert weft(line, stdin="one\ntwo\n").out == weft(line, "one\ntwo").out


def test_inspect(world: World) -> None:
    text = weft(f"inspect {world.adapter}").out
    for said in ("digest", "rank 2", "self_attn.q_proj", "model.layers.*", "32×32", "eff.", "LlamaForCausalLM"):
        assert said in text
    assert "warning" not in text
    found = weft(f"inspect {world.adapter} --json").json
    assert len(found["sites"]) == 14
    assert found["golden_prompts"] == 2


def test_inspect_a_run(run: tuple[Path, Done]) -> None:
    text = weft(f"inspect {run[0]}").out
    assert "2 steps" in text
    assert "base     adapter" in text


def test_prove(world: World, run: tuple[Path, Done]) -> None:
    assert "proved" in weft(f"inspect {world.adapter} --base {world.base} --prove").out
    assert weft(f"inspect {run[0]} --base {world.base} --prove --json").json["proof"]["ok"] is True


def test_merge(world: World, tmp_path: Path) -> None:
    line = f"merge --base {world.base} --adapter {world.adapter}"
    assert "14 sites merged in float32" in weft(f"{line} --out {tmp_path}/m").out
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    report = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert len(report["sites"]) == 14
    merged = weft(f"generate --base {tmp_path}/m --max-new-tokens 8 hello").out
    assert merged == weft(f"generate --base {world.base} --adapter {world.adapter} --max-new-tokens 8 hello").out
    half = weft(f"{line} --out {tmp_path}/h --dtype bfloat16 --json").json
    assert half["dtype"] == "bfloat16"
    assert 0.5 < half["survived"] < 1


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_convert(world: World, tmp_path: Path, form: str) -> None:
    done = weft(f"convert {world.adapter} --to {form} --out {tmp_path}/c")
    assert str(tmp_path / "c") in done.out
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["r"] == (2 if form == "peft" else config["lora_alpha"])
    norm = weft(f"inspect {tmp_path}/c --json").json["norm"]
    assert norm == pytest.approx(weft(f"inspect {world.adapter} --json").json["norm"], rel=1e-6)


def test_a_classifier_through_all_verbs(tmp_path: Path) -> None:
    base = write_classifier(tmp_path / "bert")
    rows = [{"text": f"{'good' if n % 2 else 'bad'} number {n}", "label": "yes" if n % 2 else "no"} for n in range(12)]
    data, run = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "r"
    weft(f"train --base {base} --data {data} --eval {data} --out {run} {QUICK} --set best=false")
    assert "accuracy" in weft(f"eval --base {base} --adapter {run} --data {data}").out
    assert "whole" in weft(f"inspect {run}").out
    assert weft(f"inspect {run} --base {base} --prove --json").json["proof"]["ok"] is True
    weft(f"merge --base {base} --adapter {run} --out {tmp_path}/m")
    assert "classif" in weft(f"generate --base {base} --adapter {run} hello", ok=False).err
