"""Evaluation, generation and proof of a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.unit.train.support import byte_base
from weft.errors import BaseMismatchError, DataError, FormatError, RecipeError
from weft.train.generation import Sampling
from weft.train.proof import last_logits
from weft.train.recipe import Recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base_dir: Path, task: tuple[Path, Path]) -> weft.Run:
    """A run whose adapter learned its task."""
    recipe = Recipe(
        max_steps=60,
        learning_rate=3e-2,
        batch_size=16,
        eval_every=20,
        spec=weft.LoraSpec(rank=8, alpha=16),
        separator=" ",
    )
    return weft.train(
        base=base_dir,
        data=task[0],
        eval_data=task[0],
        recipe=recipe,
        out=tmp_path_factory.mktemp("runs") / "run",
        progress=False,
    )


def test_base_and_adapter_stand_side_by_side(run: weft.Run, base_dir: Path, task: tuple[Path, Path]) -> None:
    found = weft.evaluate(base=base_dir, adapter=run.path, data=task[0], max_new_tokens=8, limit=12)
    assert found.adapter is not None
    assert {"loss", "perplexity", "exact_match", "bleu", "rouge_l"} <= found.base.keys()
    assert found.adapter["loss"] < found.base["loss"]
    assert found.adapter["exact_match"] > 0.4 > found.base["exact_match"]
    assert found.adapter["rouge_l"] > found.base["rouge_l"]
    assert (found.kind, found.count, found.generated, found.digest) == ("completion", 32, 12, run.adapter.digest)
    assert found.examples[0].keys() == {"prompt", "references", "base", "adapter"}
    text = found.text()
    for part in ("base", "adapter", "perplexity", "12 prompts"):
        assert part in text
    alone = weft.evaluate(base=base_dir, data=task[0], generation=False)
    assert alone.adapter is None
    assert alone.base.keys() == {"loss", "perplexity"}


def test_an_evaluation_does_not_depend_on_the_batch(run: weft.Run, base_dir: Path, task: tuple[Path, Path]) -> None:
    """Padding on the left in generation and on the right in losses changes nothing."""
    results = [
        weft.evaluate(base=base_dir, adapter=run.adapter, data=task[0], max_new_tokens=8, batch_size=size)
        for size in (1, 7)
    ]
    assert results[0].adapter is not None
    assert results[1].adapter is not None
    for name, value in results[0].adapter.items():
        assert results[1].adapter[name] == pytest.approx(value, rel=1e-5), name
    assert results[0].examples == results[1].examples


def test_several_references_of_a_prompt_count_together(run: weft.Run, base_dir: Path) -> None:
    rows = [{"prompt": "ab?", "completion": answer} for answer in ("x", "a", "y")] + [
        {"prompt": "cd?", "completion": "zz"}
    ]
    found = weft.evaluate(base=base_dir, adapter=run.adapter, data=rows, max_new_tokens=8)
    assert found.generated == 2
    assert set(found.examples[0]["references"]) == {"x", "a", "y"}


def test_generation_is_the_same_in_a_batch_alone_and_as_a_stream(run: weft.Run, base_dir: Path) -> None:
    prompts = ["ab?", "ababab?", "c?", "klkl?"]
    sampling = Sampling(max_new_tokens=6)
    model, tokenizer = weft.load_base(base_dir)
    given: dict[str, Any] = {"base": (model, tokenizer), "adapter": run.adapter, "sampling": sampling}
    together = weft.generate(**given, prompts=prompts)
    assert together == [weft.generate(**given, prompts=[prompt])[0] for prompt in prompts]
    assert together == ["".join(weft.stream(**given, prompt=prompt)) for prompt in prompts]
    assert together != weft.generate(base=(model, tokenizer), prompts=prompts, sampling=sampling)
    assert "_weft_bank" not in model.__dict__


def test_generation_starts_from_the_tokens_that_training_had(run: weft.Run, base_dir: Path) -> None:
    """The separator of the recipe is put between prompt and answer without being asked for."""
    model, tokenizer = weft.load_base(base_dir)
    seen: list[list[int]] = []
    generate = model.generate
    model.generate = lambda input_ids, **rest: (
        seen.append(input_ids[0].tolist()),
        generate(input_ids=input_ids, **rest),
    )[1]  # type: ignore[method-assign]
    weft.generate(base=(model, tokenizer), adapter=run.adapter, prompts=["ab?"], sampling=Sampling(max_new_tokens=1))
    assert seen == [tokenizer("ab? ").input_ids]


def test_a_stream_that_is_left_early_stops_the_model(run: weft.Run) -> None:
    model, tokenizer = byte_base()
    for _ in weft.stream(base=(model, tokenizer), prompt="ab?", sampling=Sampling(max_new_tokens=40)):
        break
    assert "_weft_bank" not in model.__dict__


def test_a_draw_can_be_repeated_and_leaves_torchs_generator_alone(base_dir: Path) -> None:
    state = torch.random.get_rng_state()
    draws = [
        weft.generate(
            base=base_dir, prompts=["ab?", "c"], sampling=Sampling(max_new_tokens=8, temperature=1.0, seed=seed)
        )
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 5}, {"top_p": 0.5}]
)
def test_sampling_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Sampling(**values)


def test_errors_of_evaluation_and_generation(run: weft.Run, base_dir: Path, labelled: list[dict[str, str]]) -> None:
    other, tokenizer = byte_base()
    with pytest.raises(BaseMismatchError):
        weft.generate(base=(other, tokenizer), adapter=run.adapter, prompts=["a"])
    assert "_weft_bank" not in other.__dict__
    with pytest.raises(DataError, match="no head"):
        weft.evaluate(base=base_dir, adapter=run.adapter, data=labelled)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        weft.generate(base=base_dir, prompts=["a", ""])
    with pytest.raises(DataError, match="chat template"):
        weft.generate(base=base_dir, prompts=["a"], chat=True)


def test_a_proof_holds_on_its_base_and_fails_for_another_adapter(run: weft.Run, base_dir: Path, tmp_path: Path) -> None:
    model, _ = weft.load_base(base_dir)
    report = weft.prove(run.path, model)
    assert report.ok
    assert report.error < 1e-4 < report.effect
    assert (report.prompts, report.same) == (4, 4)
    assert "proved" in report.text()
    weaker = run.adapter.map(lambda tensor: tensor * 0.9)
    assert not weft.prove(weaker, model).ok
    nothing = run.adapter.map(torch.zeros_like)
    assert not weft.prove(nothing, model).ok
    with pytest.raises(FormatError, match="no golden prompts"):
        weft.prove(run.adapter.replace(proof={}), model)


def test_a_proof_leaves_a_bank_as_it_was(run: weft.Run, base_dir: Path) -> None:
    model, _ = weft.load_base(base_dir)
    with weft.attach(model, {"mine": weft.LoraSpec(rank=2)}) as bank:
        before = last_logits(model, run.adapter.proof["input_ids"])
        assert weft.prove(run.adapter, model).ok
        assert bank.names == ("mine",)
        assert bank.current == "mine"
        torch.testing.assert_close(last_logits(model, run.adapter.proof["input_ids"]), before)
