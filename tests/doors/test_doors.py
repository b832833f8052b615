"""One scenario through every door, the SDK and the command line: the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import weft
from tests.command_line import weft as command
from tests.unit.cli.support import World, make_world
from weft.train import Sampling

RECIPE = weft.Recipe(max_steps=3, batch_size=4, learning_rate=1e-2, spec=weft.LoraSpec(rank=3))
SETTINGS = "--set max_steps=3 --set batch_size=4 --set learning_rate=1e-2 --set rank=3"
PROMPTS = ["say two ", "say seven "]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[weft.Run, Path]:
    """The same training by both doors."""
    place = tmp_path_factory.mktemp("runs")
    run = weft.train(
        base=world.base, data=world.train, eval_data=world.valid, recipe=RECIPE, out=place / "sdk", progress=False
    )
    command(f"train --base {world.base} --data {world.train} --eval {world.valid} --out {place}/cli --quiet {SETTINGS}")
    return run, place / "cli"


def test_training_gives_the_same_adapter(runs: tuple[weft.Run, Path]) -> None:
    run, folder = runs
    other = weft.load(folder)
    assert any(factors.B.any() for factors in other.factors.values())
    assert other == run.adapter
    assert weft.Run.open(folder).report.adapter == run.report.adapter
    assert command(f"inspect {folder} --json").json["digest"] == run.adapter.digest


def test_evaluation_gives_the_same_numbers(runs: tuple[weft.Run, Path], world: World) -> None:
    run, folder = runs
    found = weft.evaluate(base=world.base, adapter=run.adapter, data=world.valid, max_new_tokens=5)
    other = command(f"eval --base {world.base} --adapter {folder} --data {world.valid} --max-new-tokens 5 --json").json
    assert other["base"] == pytest.approx(dict(found.base))
    assert other["adapter"] == pytest.approx(dict(found.adapter or {}))
    assert other["base"]["loss"] != other["adapter"]["loss"]


def test_generation_gives_the_same_text(runs: tuple[weft.Run, Path], world: World) -> None:
    run, folder = runs
    sampling = Sampling(max_new_tokens=6)
    texts = weft.generate(base=world.base, adapter=run.adapter, prompts=PROMPTS, sampling=sampling)
    streamed = "".join(weft.stream(base=world.base, adapter=run.adapter, prompt=PROMPTS[0], sampling=sampling))
    line = f"generate --base {world.base} --adapter {folder} --max-new-tokens 6"
    assert streamed == texts[0]
    assert command(line, PROMPTS[0]).out == texts[0] + "\n"
    assert command(line, *PROMPTS).out == f"> {PROMPTS[0]}\n{texts[0]}\n\n> {PROMPTS[1]}\n{texts[1]}\n"


def test_merging_gives_the_same_weights(runs: tuple[weft.Run, Path], world: World, tmp_path: Path) -> None:
    run, folder = runs
    model, _ = weft.load_base(world.base)
    merged, report = weft.merge(model, run.adapter)
    told = command(f"merge --base {world.base} --adapter {folder} --out {tmp_path}/m --json").json
    assert told["survived"] == pytest.approx(report.survived)
    written = load_file(tmp_path / "m" / "model.safetensors")
    here = merged.state_dict()
    assert all(torch.equal(tensor, here[name]) for name, tensor in written.items())
    assert len(written) == len(here)


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_conversion_gives_the_same_file(runs: tuple[weft.Run, Path], tmp_path: Path, form: str) -> None:
    run, folder = runs
    weft.convert(run.path, to=form, out=tmp_path / "sdk")
    command(f"convert {folder} --to {form} --out {tmp_path}/cli")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sdk", "cli"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_proof_is_the_same(runs: tuple[weft.Run, Path], world: World) -> None:
    run, folder = runs
    model, _ = weft.load_base(world.base)
    report = weft.prove(run.adapter, model)
    assert report.ok
    assert command(f"inspect {folder} --base {world.base} --prove --json").json["proof"] == report.to_dict()
