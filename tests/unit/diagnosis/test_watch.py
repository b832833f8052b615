"""`weft.Watch` in a trainer that knows nothing of weft: with a bank and without; and that watching changes nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import weft
from tests.models import tiny_llama
from tests.unit.diagnosis.support import GOOD, HELD, STEEP, TRAIN
from tests.unit.train.support import Rows, collate, same
from weft.errors import RecipeError
from weft.train.session import Session
from weft.train.trainer import AdapterTrainer


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    plain: dict[str, Any] = {
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
    }
    return TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, **(plain | fields),
    )  # fmt: skip


def stranger(folder: Path, *callbacks: TrainerCallback, bank: bool = True, **fields: Any) -> tuple[Trainer, nn.Module]:
    torch.manual_seed(3)
    model = tiny_llama()
    if bank:
        weft.attach(model, {"mine": weft.LoraSpec(rank=4)}, seed=0)
    trainer = Trainer(
        model, arguments(folder, **fields), train_dataset=Rows(64), data_collator=collate, callbacks=list(callbacks)
    )
    for silent in list(trainer.callback_handler.callbacks):
        if type(silent).__name__ == "PrinterCallback":
            trainer.remove_callback(silent)
    trainer.train()
    return trainer, model


@pytest.mark.parametrize("bank", [True, False])
def test_it_records_and_changes_nothing(tmp_path: Path, bank: bool) -> None:
    watch = weft.Watch()
    watched, model = stranger(tmp_path, watch, bank=bank)
    alone, other = stranger(tmp_path, bank=bank)
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (watched, alone)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert [row["step"] for row in watch.rows if "loss" in row and "of" not in row] == list(range(1, 21))
    sites = [row for row in watch.rows if row.get("of") == "sites"]
    assert bool(sites) is bank
    assert watch.facts["steps"] == 20
    assert [item.rule for item in watch.findings if item.severity == "high"] == []
    assert weft.diagnose(watch) == watch.findings


def test_a_weft_run_is_the_same_without_its_watch(
    tmp_path: Path, skilled: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter, losses and gradients, bit by bit."""
    given: dict[str, Any] = {"base": skilled, "data": TRAIN, "eval_data": HELD, "progress": False}
    recipe = weft.Recipe.from_dict(GOOD | {"max_steps": 10, "dropout": 0.1})
    watched = weft.train(**given, recipe=recipe, out=tmp_path / "watched")
    make = Session._trainer

    def unwatched(self: Session, callbacks: list[Any]) -> AdapterTrainer:
        trainer = make(self, callbacks)
        trainer.remove_callback(self._watch)
        object.__setattr__(trainer.setup, "watch", None)
        return trainer

    monkeypatch.setattr(Session, "_trainer", unwatched)
    alone = weft.train(**given, recipe=recipe, out=tmp_path / "alone")
    assert same(watched.adapter, alone.adapter)
    for name in ("loss", "grad_norm", "eval_loss"):
        values = [
            [row[name] for row in run.log if name in row and row.get("of") != "sites"] for run in (watched, alone)
        ]
        assert values[0] == values[1]
    assert not any(row.get("of") == "sites" for row in alone.log)


def test_a_stranger_is_told_of_trouble_and_stopped(tmp_path: Path) -> None:
    told: list[str] = []
    watch = weft.Watch("stop", tell=told.append)
    trainer, _ = stranger(tmp_path, watch, learning_rate=1e30, optim="sgd", max_grad_norm=0.0)
    assert trainer.state.global_step < 20
    assert any("not-finite" in line or "loss-explosion" in line for line in told)
    assert {item.rule for item in watch.findings if item.severity == "high"} & {"not-finite", "loss-explosion"}


def test_ignored(tmp_path: Path) -> None:
    told: list[str] = []
    watch = weft.Watch("ignore", tell=told.append)
    stranger(tmp_path, watch, learning_rate=3.0, max_grad_norm=0.0)
    assert told == []
    assert "learning-rate-too-high" in {item.rule for item in watch.findings}, "it is still there to be asked for"


def test_an_unknown_answer() -> None:
    with pytest.raises(RecipeError, match=r"on_trouble='sya': expected one of say, stop, ignore.*Did you mean 'say'"):
        weft.Watch("sya")
    with pytest.raises(RecipeError, match="on_trouble"):
        weft.Recipe(on_trouble="stop")


def test_several_lines_stay_readable_beside_the_bar(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, skilled: Any
) -> None:
    recipe = weft.Recipe.from_dict(GOOD | STEEP | {"max_steps": 30, "warmup_steps": 25})
    with contextlib.suppress(weft.WeftError):
        weft.train(base=skilled, data=TRAIN, eval_data=HELD, recipe=recipe, out=tmp_path / "run", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(("high: ", "medium: ")) for line in lines)
