"""Everything that can be typed wrong: a status of 2, one message that names the thing, never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import weft
from tests.unit.cli.support import World, write_rows

# What is typed, with {base} {other} {adapter} {train} {t} (an own folder, see `spoilt`); and what the message names.
MISUSE = {
    "unknown verb": ("trian", "trian train"),
    "unknown option": ("train --bsae x", "--bsae --base"),
    "train without data": ("train --out {t}/r", "--data"),
    "train without a place": ("train --data {train}", "--out --resume"),
    "train with two places": ("train --data {train} --out {t}/a --resume {t}/b", "--out --resume"),
    "resume and overwrite": ("train --resume {t}/b --overwrite", "--resume --overwrite"),
    "missing data file": ("train --base {base} --data {t}/no.jsonl --out {t}/r", "no.jsonl"),
    "empty data": ("train --base {base} --data {t}/empty.jsonl --out {t}/r", "empty.jsonl"),
    "data without a shape": ("train --base {base} --data {t}/odd.jsonl --out {t}/r", "odd.jsonl 'a'"),
    "missing evaluation data": ("train --base {base} --data {train} --out {t}/r --eval {t}/no.jsonl", "no.jsonl"),
    "a share that is none": ("train --base {base} --data {train} --out {t}/r --eval 1.5", "1.5"),
    "unknown setting": ("train --data {train} --out {t}/r --set learning_rat=1", "learning_rat learning_rate"),
    "setting without =": ("train --data {train} --out {t}/r --set rank", "rank name=value"),
    "setting of a wrong type": ("train --data {train} --out {t}/r --set rank=many", "rank many"),
    "a contradiction": ("train --data {train} --out {t}/r --set epochs=1 --set max_steps=9", "epochs max_steps"),
    "targets without a match": ("train --base {base} --data {train} --out {t}/r --set targets=[q_prj]", "q_prj q_proj"),
    "missing recipe": ("train --data {train} --out {t}/r --recipe {t}/no.yaml", "no.yaml"),
    "columns without =": ("train --data {train} --out {t}/r --columns prompt", "--columns prompt"),
    "columns twice": ("train --data {train} --out {t}/r --columns prompt=a,prompt=b", "--columns prompt"),
    "unknown kind": ("train --base {base} --data {train} --out {t}/r --task poetry", "poetry"),
    "unknown dtype": ("train --base {base} --data {train} --out {t}/r --dtype float31", "float31"),
    "a place that is taken": ("train --base {base} --data {train} --out {t}/there", "there"),
    "resume of nothing": ("train --resume {t}/no", "no"),
    "missing base": ("train --base {t}/none --data {train} --out {t}/r", "none"),
    "a base without config": ("generate --base {t}/bare x", "bare config.json"),
    "an adapter as base": ("generate --base {adapter} x", "adapter --adapter"),
    "a base as adapter": ("generate --base {base} --adapter {base} x", "base"),
    "missing adapter": ("generate --base {base} --adapter {t}/none x", "none"),
    "a damaged adapter": ("generate --base {base} --adapter {t}/damaged x", "adapter_model.safetensors"),
    "an adapter with NaN": ("inspect {t}/nan", "NaN"),
    "another base": ("generate --base {other} --adapter {adapter} x", "base weights"),
    "evaluation on another base": ("eval --base {other} --adapter {adapter} --data {train}", "base weights"),
    "proof on another base": ("inspect {adapter} --base {other} --prove", "base weights"),
    "a base without --prove": ("inspect {adapter} --base {base}", "--prove"),
    "inspection of nothing": ("inspect {t}/none", "none"),
    "inspection of a base": ("inspect {base}", "base"),
    "merge on another base": ("merge --base {other} --adapter {adapter} --out {t}/m", "base weights"),
    "merge into a place that is taken": ("merge --base {base} --adapter {adapter} --out {t}/there", "there"),
    "merge into no dtype": ("merge --base {base} --adapter {adapter} --out {t}/m --dtype int8", "int8 bfloat16"),
    "merge without an adapter": ("merge --base {base} --out {t}/m", "--adapter"),
    "conversion to nothing": ("convert {adapter} --to gguf --out {t}/c", "gguf peft vllm"),
    "conversion over an adapter": ("convert {adapter} --to peft --out {t}/damaged", "damaged"),
    "many without data": ("train-many --out {t}/r", "--data --by"),
    "many without a place": ("train-many --data {train}", "--out --resume"),
    "many, resume and overwrite": ("train-many --resume {t}/b --overwrite", "--resume --overwrite"),
    "many by an unknown column": ("train-many --base {base} --data {train} --by usr --out {t}/r", "'usr' 'prompt'"),
    "many by a pattern without files": ("train-many --base {base} --data {t}/*.parquet --out {t}/r", "*.parquet"),
    "many into a place that is taken": ("train-many --base {base} --data {train} --out {t}/there", "there"),
    "many, resume of nothing": ("train-many --resume {t}/no", "no"),
    "many with a share that is none": ("train-many --base {base} --data {train} --eval x.jsonl --out {t}/r", "x"),
    "no slots": ("train-many --data {train} --slots 0 --out {t}/r", "--slots"),
    "a sweep by users": ("train-many --data {train} --by user --sweep rank=1 --out {t}/r", "--sweep --by"),
    "a sweep of two files": ("train-many --data {train} --data {train} --sweep rank=1 --out {t}/r", "--sweep 2 files"),
    "a sweep without =": (
        "train-many --base {base} --data {train} --eval 0.2 --sweep rank --out {t}/r",
        "rank NAME=A,B,C",
    ),
    "a sweep of no field": (
        "train-many --base {base} --data {train} --eval 0.2 --sweep rnk=1,2 --out {t}/r",
        "rnk rank",
    ),
    "a sweep without evaluation": ("train-many --base {base} --data {train} --sweep rank=1,2 --out {t}/r", "--eval"),
    "random without a sweep": ("train-many --data {train} --random 3 --out {t}/r", "--random --sweep"),
    "requests of nobody": ("generate --base {base} --adapter a={adapter} --jsonl {t}/requests.jsonl", "'b' request"),
    "requests and a prompt": ("generate --base {base} --jsonl {t}/requests.jsonl hello", "--jsonl"),
    "several adapters for a prompt": ("generate --base {base} --adapter a=x --adapter b=y hello", "--jsonl"),
    "an adapter without a name": ("generate --base {base} --adapter {adapter} --jsonl {t}/requests.jsonl", "NAME=DIR"),
    "evaluation without data": ("eval --base {base}", "--data"),
    "no prompt": ("generate --base {base}", "prompt"),
    "an empty prompt": ("generate --base {base} ''", "prompt"),
    "prompts from two places": ("generate --base {base} --file {train} x", "--file"),
    "a missing file of prompts": ("generate --base {base} --file {t}/no.txt", "no.txt"),
    "prompts that are no text": ("generate --base {base} --file {t}/prompts.bin", "prompts.bin UTF-8"),
    "a file without prompts": ("generate --base {base} --file {t}/empty.jsonl", "empty.jsonl"),
    "sampling out of range": ("generate --base {base} --temperature -1 x", "temperature -1"),
    "top-p without temperature": ("generate --base {base} --top-p 0.5 x", "top_p temperature"),
    "chat without a template": ("generate --base {base} --chat x", "template"),
    "demo into a place that is taken": ("demo --out {t}/there", "there"),
}


@pytest.fixture(scope="module")
def spoilt(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that can't be used."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("spoilt")
    for name in ("there", "bare"):
        (folder / name).mkdir()
    (folder / "there" / "notes.txt").write_text("mine")
    (folder / "bare" / "model.safetensors").write_bytes(b"")
    (folder / "empty.jsonl").write_text("")
    (folder / "prompts.bin").write_bytes(b"\xff\xfe\x00")
    write_rows(folder / "odd.jsonl", [{"a": 1}])
    write_rows(folder / "requests.jsonl", [{"prompt": "x", "adapter": "b"}])
    cut = shutil.copytree(world.adapter, folder / "damaged") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    weights = shutil.copytree(world.adapter, folder / "nan") / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(world: World, spoilt: Path, name: str) -> None:
    line, named = MISUSE[name]
    before = sorted(spoilt.rglob("*"))
    done = weft(line.format(t=spoilt, **vars(world)), ok=False)
    assert done.status == (1 if "NaN" in name else 2), done.err
    assert "Traceback" not in done.out + done.err
    assert "bug in weft" not in done.err
    assert done.out == ""
    for word in named.split():
        assert word in done.err
    assert len([text for text in done.err.splitlines() if text.startswith("weft")]) == 1
    assert sorted(spoilt.rglob("*")) == before


def test_a_run_that_has_not_ended_says_how_to_go_on(world: World, tmp_path: Path) -> None:
    weft(f"train --base {world.base} --data {world.train} --out {tmp_path}/r --set max_steps=2 --quiet")
    (tmp_path / "r" / "report.json").unlink()
    done = weft(f"inspect {tmp_path}/r", ok=False)
    assert done.status == 2
    assert f"weft train --resume {tmp_path / 'r'}" in done.err


def test_an_untrained_adapter_is_said(world: World, tmp_path: Path) -> None:
    from weft.models.attach import attach
    from weft.models.load import load_base
    from weft.spec import LoraSpec

    model, _ = load_base(world.base)
    with attach(model, {"t": LoraSpec(rank=2)}) as bank:
        bank.adapter("t").save(tmp_path / "idle")
    assert "warning: untrained" in weft(f"inspect {tmp_path}/idle").out
    assert any("untrained" in text for text in json.loads(weft(f"inspect {tmp_path}/idle --json").out)["warnings"])
