"""The trainer: what the optimizer holds, how losses are normalised, what a checkpoint is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.unit.train.support import Rows, collate, moved, trainer_for
from weft.core.bank import attach
from weft.errors import NotFiniteError, RunError
from weft.spec import LoraSpec
from weft.train import checkpoints
from weft.train.recipe import Recipe
from weft.train.scoring import Score, keeps_logits, losses, score, wanted_positions
from weft.train.trainer import parameter_groups


def factors(trainer: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer._trained.items()}


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def test_losses_are_those_of_the_whole_logits() -> None:
    batch = collate([Rows(4)[index] for index in range(4)])
    model = tiny_llama()
    with torch.no_grad():
        full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        some = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=wanted_positions(batch["labels"]),
        ).logits
    assert keeps_logits(model)
    assert some.shape[1] < full.shape[1]
    wanted = F.cross_entropy(full[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    for logits in (full, some):
        values, rows = losses(logits, batch["labels"])
        assert len(values) == int((batch["labels"][:, 1:] != -100).sum()) == len(rows)
        torch.testing.assert_close(values.sum(), wanted)


def test_an_evaluation_is_a_mean_over_tokens_not_over_batches() -> None:
    model, rows = tiny_llama(), Rows(7)
    one = score(model, [collate(list(rows.rows))], classifies=False)
    three = score(model, [collate(rows.rows[:1]), collate(rows.rows[1:3]), collate(rows.rows[3:])], classifies=False)
    assert one["loss"] == pytest.approx(three["loss"], rel=1e-6)
    means = [score(model, [collate([row])], classifies=False)["loss"] for row in rows.rows]
    assert abs(sum(means) / len(means) - one["loss"]) > 1e-4, "the test must tell the two apart"


def test_a_classifier_is_scored_by_label() -> None:
    total = Score(classifies=True)
    total.add(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
    total.add(torch.tensor([[0.0, 9.0]]), torch.tensor([1]))
    found = total.metrics()
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_accumulation_equals_the_large_batch(tmp_path: Path, build: Any) -> None:
    """The loss is a mean over all target tokens of an optimizer step, however it is cut."""
    torch.manual_seed(0)
    model = build()
    ends = []
    for name, recipe in (("a", Recipe(batch_size=8)), ("b", Recipe(batch_size=2, accumulation=4))):
        with attach(model, {"t": LoraSpec(rank=4)}, seed=0) as bank:
            trainer = trainer_for(
                tmp_path / name, model, recipe.replace(max_steps=4, learning_rate=1e-2, eval_every=10), bank=bank
            )
            trainer.train()
            ends.append(factors(trainer))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_lora_plus_gives_b_its_own_rate_and_biases_do_not_decay() -> None:
    model = tiny_bert()
    with attach(model, {"t": LoraSpec(rank=2, dora=True, bias="lora_only", save_modules=("classifier",))}) as bank:
        groups = parameter_groups(model, 1e-3, 0.01, 16)
        names = {id(parameter): name for name, parameter in bank.named_parameters("t")}
        held = [names[id(parameter)] for group in groups for parameter in group["params"]]
        assert sorted(held) == sorted(names.values()), "all that is trained, once, and nothing else"
        assert groups[0]["lr"] == 1e-3, "the first group is what the log reports"
        for group in groups:
            for parameter in group["params"]:
                leaf = names[id(parameter)].rpartition(".")[2]
                assert group["lr"] == (16e-3 if leaf == "lora_B" else 1e-3)
                assert group["weight_decay"] == (0 if leaf in ("bias", "magnitude") else 0.01)


def test_trap_using_another_adapter_does_not_change_what_is_trained(tmp_path: Path) -> None:
    """Elsewhere, choosing an adapter flips requires_grad, and the optimizer goes on with the wrong tensors."""
    model = tiny_llama()
    with attach(model, {"t": LoraSpec(rank=4), "other": LoraSpec(rank=2)}, seed=0) as bank:
        bank.drop("other")
        other = bank.adapter("t")
        bank.load("other", other)
        moved(bank, "other")
        before = {name: parameter.clone() for name, parameter in bank.named_parameters("other")}
        trainer = trainer_for(tmp_path, model, Recipe(max_steps=2, learning_rate=1e-2, best=False), bank=bank)
        start = factors(trainer)
        for name in ("other", None, "t"):
            bank.use(name)
        trainer.train()
        assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
            id(p) for _, p in bank.named_parameters("t")
        }
        assert all(not torch.equal(tensor, start[name]) for name, tensor in factors(trainer).items())
        for name, parameter in bank.named_parameters("other"):
            assert torch.equal(parameter, before[name])
            assert not parameter.requires_grad


def test_a_checkpoint_holds_factors_and_no_base(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = trainer_for(tmp_path, model, Recipe(max_steps=6, learning_rate=1e-2, eval_every=2, keep=1))
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert checkpoints.steps(folder)[-1] == 6
    assert len(checkpoints.steps(folder)) <= 2
    from safetensors.torch import load_file

    saved = load_file(checkpoints.path_of(folder, 6) / checkpoints.STATE)
    assert saved.keys() == {name for name, _ in trainer.setup.bank.named_parameters("t")}
    weights = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert sum(tensor.numel() for tensor in saved.values()) < weights
    assert not (checkpoints.path_of(folder, 6) / "training_args.bin").exists(), "no pickle that needs trust"


def test_the_best_checkpoint_comes_back_and_rotation_spares_it(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, tiny_llama(), Recipe(max_steps=8, learning_rate=1e-2, eval_every=1, keep=1, patience=0)
    )
    values = iter([3.0, 1.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    kept: dict[str, Tensor] = {}

    def loop(*_: Any, **__: Any) -> EvalLoopOutput:
        value = next(values)
        if value == 1.0:
            kept.update(factors(trainer))
        return EvalLoopOutput(None, None, {"eval_loss": value}, 8)

    trainer.evaluation_loop = loop  # type: ignore[method-assign]
    trainer.train()
    assert checkpoints.steps(Path(trainer.args.output_dir)) == [2, 8]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in factors(trainer).items())
    checkpoints.load_state(checkpoints.path_of(Path(trainer.args.output_dir), 8) / checkpoints.STATE, trainer._trained)
    assert any(not torch.equal(tensor, kept[name]) for name, tensor in factors(trainer).items())
    assert trainer.restore_best() == 2
    assert all(torch.equal(tensor, kept[name]) for name, tensor in factors(trainer).items())


def test_a_checkpoint_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of the writing is the last one, the newest checkpoint can be resumed from."""
    model = tiny_llama()
    recipe = Recipe(max_steps=4, learning_rate=1e-2, eval_every=2)
    for method in ("_save_optimizer_and_scheduler", "_save_rng_state", "publish"):
        folder = tmp_path / method
        with attach(model, {"t": LoraSpec(rank=4)}, seed=0) as bank:
            trainer = trainer_for(folder, model, recipe, bank=bank)
            owner = checkpoints if method == "publish" else trainer
            real = getattr(owner, method)

            def killed(*args: Any, real: Any = real, trainer: Any = trainer, **kwargs: Any) -> Any:
                if trainer.state.global_step == 4:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, method, killed)
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
            assert checkpoints.steps(Path(trainer.args.output_dir)) == [2]
            assert list(Path(trainer.args.output_dir).glob(".partial-*"))
            again = trainer_for(folder, model, recipe, bank=bank)
            again.train(resume_from_checkpoint=str(checkpoints.newest(Path(again.args.output_dir))))
            assert checkpoints.steps(Path(again.args.output_dir)) == [2, 4]
            assert not list(Path(again.args.output_dir).glob(".partial-*"))


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_resumed_run_ends_with_the_same_factors(tmp_path: Path, stop: int) -> None:
    """Also in the middle of an epoch, at its end, with dropout and with a moved run folder."""
    model = tiny_llama()
    spec = LoraSpec(rank=4, dropout=0.2)
    recipe = Recipe(max_steps=8, batch_size=4, accumulation=2, learning_rate=1e-2, eval_every=2, save_every=1)
    with attach(model, {"t": spec}, seed=0) as bank:
        whole = trainer_for(tmp_path / "whole", model, recipe, bank=bank)
        whole.train()
        expected, history = factors(whole), whole.state.log_history
    with attach(model, {"t": spec}, seed=0) as bank, pytest.raises(InterruptedError):
        trainer_for(tmp_path / "cut", model, recipe, bank=bank, callbacks=[Stop(stop)]).train()
    os.rename(tmp_path / "cut", tmp_path / "elsewhere")
    torch.manual_seed(12345)
    with attach(model, {"t": spec}, seed=99) as bank:
        again = trainer_for(tmp_path / "elsewhere", model, recipe, bank=bank)
        last = checkpoints.newest(Path(again.args.output_dir))
        assert last is not None
        assert last.name == f"checkpoint-{stop - 1}"
        again.train(resume_from_checkpoint=str(last))
        for name, tensor in factors(again).items():
            assert torch.equal(tensor, expected[name]), name
        assert [row["loss"] for row in again.state.log_history if "loss" in row] == [
            row["loss"] for row in history if "loss" in row
        ]
        assert again.restore_best() == whole.state.best_global_step


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, tiny_llama(), Recipe(max_steps=8, learning_rate=1e-2, eval_every=2))
    broken = next(parameter for name, parameter in trainer.setup.bank.named_parameters("t") if name.endswith("lora_B"))

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                broken.data[0, 0] = float("nan")

    trainer.add_callback(Break())
    with pytest.raises(NotFiniteError, match="at step 4 of 8; the last good factors are in .*checkpoint-2") as caught:
        trainer.train()
    advice = str(caught.value)
    assert "lower learning rate" in advice
    assert "longer warm-up" in advice
    assert "lower clip" in advice, "raising the threshold against explosion is wrong advice"
    assert checkpoints.steps(Path(trainer.args.output_dir)) == [2]


def test_factors_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, tiny_llama(), Recipe(max_steps=2, learning_rate=1e-2, eval_every=5))
    broken = next(iter(trainer._trained.values()))

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                broken.data[0, 0] = float("inf")

    trainer.evaluation_loop = lambda *_, **__: EvalLoopOutput(None, None, {"eval_loss": 1.0}, 8)  # type: ignore[method-assign]
    trainer.add_callback(Break())
    with pytest.raises(NotFiniteError, match="no checkpoint is written"):
        trainer.train()


def test_a_checkpoint_of_another_spec_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    with attach(model, {"t": LoraSpec(rank=4)}, seed=0) as bank:
        trainer_for(tmp_path, model, Recipe(max_steps=1, learning_rate=1e-2), bank=bank).train()
    for spec in (LoraSpec(rank=2), LoraSpec(rank=4, targets=("q_proj",))):
        with attach(model, {"t": spec}, seed=0) as bank:
            again = trainer_for(tmp_path, model, Recipe(max_steps=1, learning_rate=1e-2), bank=bank)
            with pytest.raises(RunError, match="base and spec must be those of the run"):
                again.train(resume_from_checkpoint=str(checkpoints.newest(Path(again.args.output_dir))))
