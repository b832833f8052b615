"""`weft.train`: from files to a run folder, and a base that is what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.unit.train.support import byte_base, same
from weft.errors import BankError, BaseError, DataError, NotFiniteError, RecipeError, RunError, SpecError
from weft.train.recipe import Recipe
from weft.train.session import Session

QUICK = Recipe(max_steps=6, learning_rate=2e-2, batch_size=8, eval_every=2)
SPEC = weft.LoraSpec(rank=4, dropout=0.1)


def look(model: nn.Module) -> dict[str, Any]:
    """Everything by which a model could be told from what it was."""
    modules = {
        name: (type(module), id(module), module.training, sorted(module.__dict__))
        for name, module in model.named_modules()
    }
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }
    tensors = {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()}
    return {"modules": modules, "hooks": hooks, "tensors": tensors, "config": model.config.to_dict()}  # type: ignore[union-attr, operator]


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_training_leaves_a_run_folder_and_the_base_as_it_was(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path]
) -> None:
    model, tokenizer = weft.load_base(base_dir)
    model.train()
    before, content, state = look(model), bytes_of(model), torch.random.get_rng_state()
    run = weft.train(
        base=(model, tokenizer),
        data=task[0],
        eval_data=task[1],
        spec=SPEC,
        recipe=QUICK,
        out=tmp_path / "run",
        progress=False,
    )
    assert look(model) == before
    assert all(torch.equal(tensor, content[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())

    found = {child.name for child in run.path.iterdir()}
    assert {
        "recipe.yaml",
        "environment.json",
        "log.jsonl",
        "checkpoints",
        "adapter",
        "report.json",
        "report.md",
        "curve.svg",
    } <= found
    steps = [row["step"] for row in run.log if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= run.log[-2].keys()
    assert run.report.adapter["loss"] < run.report.base["loss"] - 0.05
    assert run.report.adapter["loss"] == min(row["eval_loss"] for row in run.log if "eval_loss" in row)
    assert run.report.data["train"]["examples"] == 32
    assert json.loads((run.path / "report.json").read_text())["digest"] == run.adapter.digest

    again = weft.Run.open(run.path)
    assert again.adapter == run.adapter == weft.load(run.path)
    assert again.report == run.report
    kept = Recipe.load(run.path / "recipe.yaml")
    assert (kept.kind, kept.spec, kept.learning_rate) == ("completion", SPEC, 2e-2)


def test_the_adapter_carries_where_it_is_from(tmp_path: Path, base_dir: Path, task: tuple[Path, Path]) -> None:
    run = weft.train(
        base=base_dir, data=task[0], eval_data=task[1], spec=SPEC, recipe=QUICK, out=tmp_path / "run", progress=False
    )
    came = weft.load(run.path).provenance
    model, _ = weft.load_base(base_dir)
    assert came.base is not None
    assert came.base.weights == weft.fingerprint(model).weights
    assert [part["role"] for part in came.data] == ["train", "eval"]
    assert came.data[0]["digest"] == run.report.data["train"]["digest"]
    assert came.recipe is not None
    assert came.recipe["learning_rate"] == 2e-2
    assert came.evaluation["eval_loss"] == pytest.approx(run.report.adapter["loss"])
    assert came.evaluation["base_loss"] == pytest.approx(run.report.base["loss"])
    assert {"weft", "torch", "transformers"} <= came.versions.keys()
    assert run.adapter.proof["logits"].shape[0] == len(run.adapter.proof["input_ids"]) >= 2


def test_the_restored_adapter_is_the_one_that_was_measured(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path]
) -> None:
    """The loss in the report is the loss that the saved adapter has."""
    run = weft.train(
        base=base_dir, data=task[0], eval_data=task[1], spec=SPEC, recipe=QUICK, out=tmp_path / "run", progress=False
    )
    found = weft.evaluate(base=base_dir, adapter=run.path, data=task[1], generation=False)
    assert found.adapter is not None
    assert found.adapter["loss"] == pytest.approx(run.report.adapter["loss"], rel=1e-5)
    assert found.base["loss"] == pytest.approx(run.report.base["loss"], rel=1e-5)


def test_one_seed_is_one_adapter(tmp_path: Path, base_dir: Path, task: tuple[Path, Path]) -> None:
    runs = [
        weft.train(
            base=base_dir,
            data=task[0],
            recipe=QUICK.replace(eval_every=None, seed=seed, spec=SPEC),
            out=tmp_path / name,
            progress=False,
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert same(runs[0].adapter, runs[1].adapter)
    assert not same(runs[0].adapter, runs[2].adapter)
    assert any("no evaluation data" in note for note in runs[0].report.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"batching": "packed"}, {"batching": "random"}, {"lora_plus_ratio": 16.0}, {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "reentrant": True}, {"init": "pissa"}, {"init": "eva"},
        {"accumulation": 3}, {"report_to": ["tensorboard"]}, {"dora": True, "bias": "lora_only"}, {"dtype": "bfloat16"},
        {"schedule": "constant", "warmup_steps": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_recipe_can_ask_for_learns(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path], change: dict[str, Any]
) -> None:
    recipe = QUICK.replace(spec={"rank": 4}).replace(**change)
    run = weft.train(
        base=base_dir, data=task[0], eval_data=task[1], recipe=recipe, out=tmp_path / "run", progress=False
    )
    assert run.report.adapter["loss"] < run.report.base["loss"]
    assert ("report_to" in change) == any((run.path / "trackers").rglob("events.out*"))
    model, _ = weft.load_base(base_dir, dtype=change.get("dtype"))
    assert weft.prove(run.adapter, model).ok, "the proof is not the autocast's or the checkpointing's"


def test_checkpointing_changes_memory_not_numbers(tmp_path: Path, base_dir: Path, task: tuple[Path, Path]) -> None:
    plain = weft.train(
        base=base_dir,
        data=task[0],
        spec=weft.LoraSpec(rank=4),
        recipe=QUICK.replace(eval_every=None),
        out=tmp_path / "p",
        progress=False,
    )
    for reentrant in (False, True):
        recipe = QUICK.replace(eval_every=None, gradient_checkpointing=True, reentrant=reentrant)
        run = weft.train(
            base=base_dir,
            data=task[0],
            spec=weft.LoraSpec(rank=4),
            recipe=recipe,
            out=tmp_path / str(reentrant),
            progress=False,
        )
        for name, tensor in run.adapter.tensors().items():
            torch.testing.assert_close(tensor, plain.adapter.tensors()[name], rtol=1e-4, atol=1e-6)


def test_a_classification_trains_its_head_and_keeps_the_labels(
    tmp_path: Path, base_dir: Path, labelled: list[dict[str, str]]
) -> None:
    recipe = QUICK.replace(max_steps=20, batch_size=4, eval_every=5, metric="eval_accuracy")
    run = weft.train(
        base=base_dir, data=labelled, eval_data=labelled, spec=SPEC, recipe=recipe, out=tmp_path / "run", progress=False
    )
    assert run.report.adapter["accuracy"] > run.report.base["accuracy"]
    adapter = weft.load(run.path)
    assert adapter.modules.keys() == {"score"}
    assert adapter.spec.save_modules == ("score",)
    assert list(adapter.provenance.data[0]["labels"]) == ["consonant", "vowel"]
    found = weft.evaluate(base=base_dir, adapter=run.path, data=labelled)
    assert found.adapter is not None
    assert found.adapter["accuracy"] == pytest.approx(run.report.adapter["accuracy"])
    assert found.adapter["macro_f1"] == pytest.approx(run.report.adapter["macro_f1"])
    with pytest.raises(BaseError, match="classifies"):
        weft.generate(base=base_dir, adapter=run.path, prompts=["apple"])


def test_a_chat_recipe_reaches_resume_evaluation_and_generation(tmp_path: Path, task: tuple[Path, Path]) -> None:
    """Rows of {prompt, completion} in the tokenizer's chat template, without saying it again."""
    model, tokenizer = byte_base()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + (eos_token if m['role'] == 'assistant' else ';') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    base = (model, tokenizer)
    recipe = QUICK.replace(as_chat=True, spec=SPEC)
    run = weft.train(base=base, data=task[0], eval_data=task[1], recipe=recipe, out=tmp_path / "run", progress=False)
    assert Recipe.load(run.path / "recipe.yaml").kind == "completion"
    (run.path / "report.json").unlink()
    assert weft.train(base=base, out=run.path, resume=True, progress=False).adapter == run.adapter
    found = weft.evaluate(base=base, adapter=run.path, data=task[1], limit=2, max_new_tokens=2)
    assert found.kind == "chat"
    assert found.adapter is not None
    assert found.adapter["loss"] == pytest.approx(run.report.adapter["loss"], rel=1e-5)
    seen: list[str] = []
    generate = model.generate
    model.generate = lambda input_ids, **rest: (
        seen.append(tokenizer.decode(input_ids[0])),
        generate(input_ids=input_ids, **rest),
    )[1]  # type: ignore[method-assign]
    weft.generate(base=base, adapter=run.path, prompts=["ab?"], sampling=weft.train.Sampling(max_new_tokens=1))
    assert seen == ["u:ab?;a:"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": None}, DataError, "no training data"),
        ({"data": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"base": "missing-folder/model"}, BaseError, "missing-folder"),
        ({"spec": weft.LoraSpec(targets=("q_prj",))}, SpecError, "q_proj"),
        ({"recipe": Recipe(spec=weft.LoraSpec(rank=2))}, RecipeError, "differ in rank"),
        ({"recipe": Recipe(optimizer="adamv")}, RecipeError, "unknown"),
        ({"recipe": Recipe(report_to=("tensorbord",))}, RecipeError, "Did you mean 'tensorboard'"),
        ({"recipe": Recipe(max_length=10_000)}, RecipeError, "go up to 64 tokens"),
        ({"recipe": Recipe(metric="eval_accuracy")}, RecipeError, "never reported"),
        ({"recipe": Recipe(max_steps=3, warmup_ratio=1.0)}, RecipeError, "not shorter than the run"),
        ({"eval_data": None, "recipe": Recipe(patience=3)}, RecipeError, "needs evaluation data"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_before_anything_is_written(
    tmp_path: Path,
    base_dir: Path,
    task: tuple[Path, Path],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given: dict[str, Any] = {"base": base_dir, "data": task[0], "eval_data": task[1], "spec": SPEC, "recipe": QUICK}
    with pytest.raises(error, match=message):
        weft.train(**(given | change), out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_refused(tmp_path: Path, base_dir: Path, task: tuple[Path, Path]) -> None:
    given: dict[str, Any] = {
        "base": base_dir,
        "data": task[0],
        "recipe": QUICK.replace(eval_every=None, max_steps=2),
        "progress": False,
    }
    weft.train(**given, out=tmp_path / "run")
    with pytest.raises(RunError, match="there is a run in this folder"):
        weft.train(**given, out=tmp_path / "run")
    digest = weft.load(tmp_path / "run").digest
    run = weft.train(**(given | {"recipe": given["recipe"].replace(seed=5)}), out=tmp_path / "run", overwrite=True)
    assert weft.load(tmp_path / "run").digest == run.adapter.digest != digest


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, NotFiniteError])
def test_after_an_exception_the_base_is_what_it_was(
    tmp_path: Path, task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    model, tokenizer = byte_base()
    before, content = look(model), bytes_of(model)
    train = Session._train

    def broken(self: Session, *args: Any) -> None:
        train(self, *args)
        raise failure("on purpose")

    monkeypatch.setattr(Session, "_train", broken)
    recipe = QUICK.replace(gradient_checkpointing=True, reentrant=True, mixed_precision="bf16")
    with pytest.raises(failure):
        weft.train(
            base=(model, tokenizer),
            data=task[0],
            eval_data=task[1],
            spec=SPEC,
            recipe=recipe,
            out=tmp_path / "run",
            progress=False,
        )
    assert look(model) == before
    assert all(torch.equal(tensor, content[name]) for name, tensor in model.state_dict().items())


def test_a_model_with_a_bank_is_refused(tmp_path: Path, task: tuple[Path, Path]) -> None:
    model, tokenizer = byte_base()
    with weft.attach(model, {"mine": SPEC}) as bank:
        with pytest.raises(BankError, match="has a bank already"):
            weft.train(
                base=(model, tokenizer), data=task[0], recipe=QUICK.replace(eval_every=None), out=tmp_path / "run"
            )
        assert bank.names == ("mine",)


def test_early_stopping_ends_the_run_and_keeps_the_best(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path]
) -> None:
    recipe = Recipe(
        max_steps=60,
        learning_rate=3.0,
        clip=0,
        batch_size=8,
        eval_every=1,
        warmup_steps=0,
        patience=2,
        spec=weft.LoraSpec(rank=2),
    )
    run = weft.train(
        base=base_dir, data=task[0], eval_data=task[1], recipe=recipe, out=tmp_path / "run", progress=False
    )
    assert run.report.stopped == "early"
    assert run.report.best_step is not None
    assert run.report.steps == run.report.best_step + 2
