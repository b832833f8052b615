"""Ranks that change in real trainings: optimizer, checkpoints, resume, processes, exports."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.unit.train.support import byte_base, moved, same
from weft.core.bank import attach
from weft.core.resizing import grown, kept_directions
from weft.train import checkpoints, ranks
from weft.train.moments import carry
from weft.train.recipe import Recipe

SPEC = weft.LoraSpec(rank=2, alpha=4, dropout=0.1)
RECIPE = Recipe(max_steps=12, learning_rate=1e-2, batch_size=4, accumulation=2, eval_every=2, spec=SPEC)
KINDS: dict[str, dict[str, Any]] = {
    "grow": {"adaptive": weft.GrowOnPlateau(max_rank=7, patience=1, min_change=0.9, warmup=2)},
    "budget": {"adaptive": weft.BudgetRanks(target_rank=2, every=2), "rank": 4},
    "shrink": {"adaptive": weft.ShrinkBySpectrum(energy=0.8, every=4), "rank": 4, "lora_plus_ratio": 4.0},
}
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(weft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_changes_its_ranks_says_so_and_resumes_to_the_same_bytes(
    kind: str, tmp_path: Path, base_dir: Path, task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"base": base_dir, "data": task[0], "eval_data": task[1], "progress": False}
    recipe = RECIPE.replace(**KINDS[kind])
    whole = weft.train(**given, recipe=recipe, out=tmp_path / "whole")
    changes, sites = whole.report.ranks["changes"], whole.report.ranks["sites"]
    assert changes
    assert {path: item.rank for path, item in whole.adapter.factors.items()} == sites
    assert {path: whole.adapter.spec.rank_at(path) for path in sites} == sites, "the spec states the ranks"
    text = whole.report.text()
    assert all(f"step {row['step']}: {row['change']}, {row['why']}" in text for row in changes)
    assert [row for row in whole.log if "change" in row] == changes
    picture = (tmp_path / "whole" / "curve.svg").read_text()
    assert ET.fromstring(picture) is not None
    assert "stroke-dasharray" in picture
    assert weft.Run.open(tmp_path / "whole").report.ranks == whole.report.ranks
    check = {"grow": lambda: max(sites.values()) == 7, "budget": lambda: sum(sites.values()) == 2 * len(sites)}
    assert check.get(kind, lambda: max(sites.values()) < 4)()

    from weft.train.trainer import AdapterTrainer

    step = AdapterTrainer.training_step
    for number, at in enumerate((5, 8)):  # between two checkpoints, and just after one

        def killed(self: Any, *args: Any, at: int = at, **kwargs: Any) -> Any:
            if self.state.global_step == at:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(AdapterTrainer, "training_step", killed)
            with pytest.raises(KeyboardInterrupt):
                weft.train(**({"recipe": recipe} | given if not number else {"resume": True}), out=tmp_path / "cut")
    assert checkpoints.steps(tmp_path / "cut" / "checkpoints")[-1] == 8
    resumed = weft.train(out=tmp_path / "cut", resume=True, progress=False)
    assert same(resumed.adapter, whole.adapter)
    assert resumed.adapter.digest == whole.adapter.digest
    assert resumed.report.ranks == whole.report.ranks
    assert [row for row in resumed.log if "change" in row] == changes


def test_an_adaptive_rank_that_has_nothing_to_do_is_a_plain_training(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path]
) -> None:
    given: dict[str, Any] = {"base": base_dir, "data": task[0], "eval_data": task[1], "progress": False}
    plain = weft.train(**given, recipe=RECIPE, out=tmp_path / "plain")
    quiet = weft.train(**given, recipe=RECIPE, adaptive=weft.GrowOnPlateau(patience=99), out=tmp_path / "quiet")
    assert same(plain.adapter, quiet.adapter)
    assert quiet.report.ranks["changes"] == []
    assert plain.report.ranks == {}
    assert quiet.report.adapter == plain.report.adapter


def test_growth_comes_before_an_early_stop(tmp_path: Path, base_dir: Path, task: tuple[Path, Path]) -> None:
    recipe = RECIPE.replace(
        adaptive={"kind": "grow", "max_rank": 8, "patience": 90},
        learning_rate=1e-9,
        patience=2,
        max_steps=40,
        eval_every=2,
    )
    run = weft.train(
        base=base_dir, data=task[0], eval_data=task[1], recipe=recipe, out=tmp_path / "run", progress=False
    )
    ends = [next(iter(row["ranks"].values())) for row in run.report.ranks["changes"]]
    if run.report.stopped == "early":  # every plateau but the last one led to a growth
        assert ends[-1][1] == 8
    assert run.report.steps > 4
    assert [pair[0] for pair in ends] == [2, 4][: len(ends)]


def test_the_optimizer_follows_growth_and_removal(seed: int) -> None:
    """Against AdamW on one vector for each direction, whose moments are then put together by hand."""
    model, _ = byte_base()
    bank = attach(model, {"t": weft.LoraSpec(rank=2, targets=["q_proj"], layers=[0])}, seed=0)
    moved(bank, "t")
    ((path, (site, slot)),) = bank.slots("t").items()
    optimizer = torch.optim.AdamW(
        [{"params": [slot.lora_A]}, {"params": [slot.lora_B], "lr": 0.05}], lr=0.01, weight_decay=0.1, amsgrad=True
    )
    generator = torch.Generator().manual_seed(seed)

    def step() -> None:
        for parameter in (slot.lora_A, slot.lora_B):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    old = {
        leaf: {k: v.clone() for k, v in optimizer.state[getattr(slot, leaf)].items()} for leaf in ("lora_A", "lora_B")
    }
    change = grown(site, slot, 4)
    assert change is not None
    assert carry(optimizer, bank.resize("t", {path: change})) == 0
    assert [
        group["params"][0] is part
        for group, part in zip(optimizer.param_groups, (slot.lora_A, slot.lora_B), strict=True)
    ]
    assert optimizer.param_groups[1]["lr"] == 0.05
    A, B = optimizer.state[slot.lora_A], optimizer.state[slot.lora_B]
    assert float(A["step"]) == float(B["step"]) == 3
    for row in range(4):
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            first = name == "exp_avg"
            expected_A = (
                old["lora_A"][name][row]
                if row < 2
                else 0 * old["lora_A"][name][0]
                if first
                else old["lora_A"][name].mean(0)
            )
            expected_B = (
                old["lora_B"][name][:, row]
                if row < 2
                else 0 * old["lora_B"][name][:, 0]
                if first
                else old["lora_B"][name].mean(1)
            )
            torch.testing.assert_close(A[name][row], expected_A)
            torch.testing.assert_close(B[name][:, row], expected_B / (2 if first else 4))
    step()
    kept = {name: value.clone() for name, value in optimizer.state[slot.lora_A].items()}
    carry(optimizer, bank.resize("t", {path: kept_directions(torch.tensor([[1, 3]]))}))
    assert torch.equal(optimizer.state[slot.lora_A]["exp_avg"], kept["exp_avg"][[1, 3]])
    step()


def test_a_state_that_cannot_be_carried_begins_anew() -> None:
    model, _ = byte_base()
    bank = attach(model, {"t": weft.LoraSpec(rank=2, targets=["q_proj"], layers=[0])}, seed=0)
    ((path, (site, slot)),) = bank.slots("t").items()
    optimizer = torch.optim.Adafactor([slot.lora_A, slot.lora_B])
    for parameter in (slot.lora_A, slot.lora_B):
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    change = grown(site, slot, 4)
    assert change is not None
    assert carry(optimizer, bank.resize("t", {path: change})) == 2
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_peft_loads_what_has_grown_and_what_has_shrunk(tmp_path: Path, base_dir: Path, task: tuple[Path, Path]) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    for kind in ("grow", "budget"):
        recipe = RECIPE.replace(**KINDS[kind], rslora=kind == "budget")
        run = weft.train(
            base=base_dir, data=task[0], eval_data=task[1], recipe=recipe, out=tmp_path / kind, progress=False
        )
        ids = torch.randint(3, 60, (2, 9))
        model, _ = weft.load_base(base_dir)
        with weft.attach(model, {}) as bank, torch.no_grad():
            bank.load("a", run.adapter)
            bank.use("a")
            expected = model(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base_dir)
        wrapped: Any = peft.PeftModel.from_pretrained(plain, str(tmp_path / kind / "adapter")).eval()
        with torch.no_grad():
            torch.testing.assert_close(wrapped(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        found = {
            name: item.lora_A["default"].weight.shape[0]
            for name, item in wrapped.named_modules()
            if hasattr(item, "lora_A")
        }
        assert sorted(found.values()) == sorted(run.report.ranks["sites"].values())


@pytest.mark.slow
def test_two_processes_grow_as_one(tmp_path: Path, base_dir: Path, task: tuple[Path, Path]) -> None:
    recipe = RECIPE.replace(max_steps=6, batch_size=8, accumulation=1, dropout=0.0, **KINDS["grow"])
    alone = weft.train(
        base=base_dir, data=task[0], eval_data=task[1], recipe=recipe, out=tmp_path / "one", progress=False
    )
    recipe.replace(batch_size=4).save(tmp_path / "recipe.yaml")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, weft, torch\n"
        "base, data, valid, recipe, out = sys.argv[1:]\n"
        "run = weft.train(base=base, data=data, eval_data=valid, recipe=weft.Recipe.load(recipe), out=out, progress=False)\n"
        "torch.save(run.adapter.tensors(), f'{out}-{torch.distributed.get_rank()}.pt')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
               *map(str, (base_dir, *task, tmp_path / "recipe.yaml", tmp_path / "two"))]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    both = weft.Run.open(tmp_path / "two")
    assert [row["ranks"] for row in both.report.ranks["changes"]] == [
        row["ranks"] for row in alone.report.ranks["changes"]
    ]
    here, there = (torch.load(tmp_path / f"two-{number}.pt", weights_only=True) for number in (0, 1))
    for name, tensor in alone.adapter.tensors().items():
        assert torch.equal(here[name], there[name])
        torch.testing.assert_close(both.adapter.tensors()[name], tensor, rtol=1e-3, atol=1e-5)


def test_changes_in_words() -> None:
    assert ranks.describe({"a": (2, 4), "b": (2, 4), "c": (4, 8)}) == "rank 2 → 4 at 2 sites, rank 4 → 8 at 1 site"
    many = {str(k): (8, k) for k in range(1, 7)}
    assert ranks.describe(many) == "48 → 21 directions at 6 sites, ranks 8–8 → 1–6"
