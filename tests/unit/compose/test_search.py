"""Weights by search, losses of mixtures, comparison, truncation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tests.models import tiny_cnn, tiny_llama, tiny_mixtral
from tests.tolerances import assert_close
from tests.unit.compose.support import adapter_of, change_of, delta, three
from tests.unit.train.support import byte_base
from weft.adapter import Adapter
from weft.compose import combine, compare, shrink
from weft.compose.search import BOUND, minimise
from weft.errors import DataError, MixError
from weft.models.attach import attach
from weft.train import evaluate

DATA = [{"text": text} for text in ("one two three", "some text that is longer", "x y z", "and so on and on")]


# search


def test_a_search_finds_the_minimum_of_a_bowl_and_is_repeatable() -> None:
    target = (0.6, -0.2, 0.9)

    def bowl(weights: Any) -> float:
        return sum((weight - wanted) ** 2 for weight, wanted in zip(weights, target, strict=True))

    state = np.random.get_state()[1].copy()
    found = list(minimise(bowl, (1.0, 1.0, 1.0), 120, seed=0))
    assert len(found) == 120
    assert min(value for _, value in found) < 1e-3
    assert found == list(minimise(bowl, (1.0, 1.0, 1.0), 120, seed=0))
    assert found != list(minimise(bowl, (1.0, 1.0, 1.0), 120, seed=1))
    assert all(abs(weight) <= BOUND for weights, _ in found for weight in weights)
    assert np.array_equal(state, np.random.get_state()[1]), "numpy's own random state is left alone"


def test_what_is_tried_first() -> None:
    found = [weights for weights, _ in minimise(lambda weights: 1.0, (0.3, 0.7), 5, seed=0)]
    assert found[:4] == [(0.3, 0.7), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
    assert len(list(minimise(lambda weights: math.nan, (0.3, 0.7), 9, seed=0))) == 9


@pytest.fixture(scope="module")
def base() -> Any:
    return byte_base()


@pytest.fixture(scope="module")
def adapters(base: Any) -> list[Adapter]:
    return [adapter_of(base[0], seed, rank=2, size=0.1) for seed in (1, 2)]


@pytest.mark.parametrize("method", ["exact", "ties"])
def test_searched_weights_are_never_worse_than_what_was_there(base: Any, adapters: list[Adapter], method: str) -> None:
    options: dict[str, Any] = {"density": 0.5, "rank": 4} if method == "ties" else {}
    mixed = combine(adapters, search=DATA, base=base, evaluations=12, method=method, progress=False, **options)
    report = mixed.report
    assert len(report.trials) == 12
    best = min(report.trials, key=lambda trial: trial["loss"])
    weights = [parent["weight"] for parent in mixed.provenance.parents]
    assert weights == list(best["weights"].values())
    assert report.losses is not None
    assert report.losses["mixture"] == pytest.approx(best["loss"], rel=1e-5)
    if method == "exact":
        names = [parent["name"] for parent in mixed.provenance.parents]
        assert report.losses["mixture"] <= min(report.losses[name] for name in names) + 1e-6
    assert mixed.provenance.mixture is not None
    assert len(mixed.provenance.mixture["trials"]) == 12
    again = combine(adapters, search=DATA, base=base, evaluations=12, method=method, progress=False, **options)
    assert again.digest == mixed.digest
    assert not [name for name, _ in base[0].named_parameters() if "weft" in name], "the base is what it was"


def test_a_search_says_what_it_does(base: Any, adapters: list[Adapter], capsys: pytest.CaptureFixture[str]) -> None:
    combine(adapters, search=DATA, base=base, evaluations=5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[4].startswith("5/5: loss ")


def test_searches_that_can_not_be(base: Any, adapters: list[Adapter]) -> None:
    with pytest.raises(MixError, match="at least two adapters"):
        combine(adapters[:1], search=DATA, base=base)
    with pytest.raises(MixError, match="needs at least 4"):
        combine(adapters, search=DATA, base=base, evaluations=3)
    with pytest.raises(MixError, match="weights by pattern"):
        combine([(adapters[0], {"default": 1.0}), adapters[1]], search=DATA, base=base)
    with pytest.raises(MixError, match="tokenizer is needed"):
        combine(adapters, search=DATA, base=base[0])
    with pytest.raises(DataError):
        combine(adapters, search="none.jsonl", base=base)


def test_the_change_of_loss_is_that_of_an_evaluation(base: Any, adapters: list[Adapter]) -> None:
    pairs = list(zip(adapters, (1.0, -0.5), strict=True))
    exact = combine(pairs)
    mixed = combine(pairs, method="svd", rank=1, base=base, data=DATA)
    losses = mixed.report.losses
    assert losses is not None
    for name, value in (("sum", exact), ("mixture", mixed), (adapters[0].digest[:12], adapters[0])):
        found = evaluate(base=base, adapter=value, data=DATA, generation=False, progress=False)
        assert found.adapter is not None
        assert losses[name] == pytest.approx(found.adapter["loss"], rel=1e-5)
        assert losses["base"] == pytest.approx(found.base["loss"], rel=1e-5)
    assert mixed.report.loss_change == pytest.approx(losses["mixture"] - losses["sum"])
    assert mixed.report.loss_change != 0
    assert "the method changes the loss" in mixed.report.summary()
    plain = combine(pairs, base=base, data=DATA)
    assert plain.report.loss_change == 0.0


def test_losses_beside_a_bank_that_is_in_use(base: Any, adapters: list[Adapter]) -> None:
    with attach(base[0], {}) as bank:
        bank.load("mine", adapters[0])
        bank.use("mine")
        combine(adapters, base=base, data=DATA)
        assert (bank.names, bank.current) == (("mine",), "mine")


# comparison


def test_measures_by_the_dense_matrices() -> None:
    model = tiny_llama(dtype=torch.float64)
    values = three(model)
    found = compare(values)
    assert len(found.pairs) == 3
    assert len(found.sites) == 3 * 14
    by_name = dict(zip(found.names, values, strict=True))
    for site in found.sites[::5]:
        one, two = (torch.as_tensor(delta(by_name[name], site.path)) for name in (site.one, site.other))
        assert site.cosine == pytest.approx(float((one * two).sum() / one.norm() / two.norm()))
        assert site.norms == pytest.approx((float(one.norm()), float(two.norm())))
        assert site.conflict == pytest.approx(
            1 - float((one + two).abs().sum() / (one.abs().sum() + two.abs().sum())), abs=1e-5
        )
        spaces = []
        for update in (one, two):
            U, S, Vh = torch.linalg.svd(update, full_matrices=False)
            count = int((S.square().cumsum(0) < 0.95 * S.square().sum()).sum()) + 1
            spaces.append((U[:, :count], Vh[:count].mT, count))
        for measure, chance, side in (("overlap_out", "chance_out", 0), ("overlap_in", "chance_in", 1)):
            left, right = spaces[0][side], spaces[1][side]
            assert getattr(site, measure) == pytest.approx(
                float((left.mT @ right).square().sum()) / min(spaces[0][2], spaces[1][2])
            )
            assert getattr(site, chance) == pytest.approx(max(spaces[0][2], spaces[1][2]) / left.shape[0])


def test_an_adapter_and_its_opposite_and_a_multiple() -> None:
    adapter = adapter_of(tiny_llama(), 1)
    opposite, twice = combine([(adapter, -1.0)]), combine([(adapter, 2.0)])
    found = compare([adapter, opposite, twice])
    against, along = (found.overall(pair) for pair in found.pairs[:2])
    assert (against["cosine"], along["cosine"]) == (pytest.approx(-1), pytest.approx(1))
    assert (against["conflict"], along["conflict"]) == (pytest.approx(1, abs=1e-5), pytest.approx(0, abs=1e-5))
    for measure in ("overlap_in", "overlap_out"):
        assert against[measure] == pytest.approx(1)
        assert along[measure] == pytest.approx(1)


def test_unrelated_updates_of_one_size_lose_29_percent() -> None:
    model = tiny_llama(hidden_size=64, layers=1)
    values = [adapter_of(model, seed, rank=32, targets=["q_proj", "o_proj"]) for seed in (1, 2)]
    assert compare(values).sites[0].conflict == pytest.approx(0.29, abs=0.04)


def test_sites_that_only_one_has_and_kinds_with_several_matrices() -> None:
    model = tiny_mixtral()
    one = adapter_of(model, 1, targets=["q_proj"], target_parameters=["experts.down_proj"])
    two = adapter_of(model, 2, targets=["v_proj"], target_parameters=["experts.down_proj"])
    found = compare([one, two])
    assert {site.path.rpartition(".")[2] for site in found.sites} == {"down_proj"}
    assert all(path.endswith("q_proj") for path in found.alone[found.names[0]])
    apart = compare([adapter_of(model, 3, targets=["q_proj"]), adapter_of(model, 4, targets=["k_proj"])])
    assert apart.overall(apart.pairs[0]) == {}
    assert "no site is in two of them" in apart.picture()
    model = tiny_cnn()
    grouped = compare([adapter_of(model, seed, rank=4, targets=["conv2"]) for seed in (1, 2)])
    assert 0 < grouped.sites[0].conflict < 1


def test_the_picture_is_a_document_with_a_cell_for_every_number() -> None:
    values = three(tiny_llama())
    found = compare(values)
    root = ElementTree.fromstring(found.picture())
    cells = root.findall(".//{http://www.w3.org/2000/svg}title")
    assert len(cells) == len(found.sites) * 4
    assert cells[0].text is not None
    assert "model.layers.0.self_attn.q_proj: cosine" in cells[0].text


# truncation


@pytest.mark.parametrize("limit", [{"rank": 2}, {"energy": 0.8}, {"error": 0.3}])
def test_shrink(limit: dict[str, Any], tmp_path: Path) -> None:
    adapter = adapter_of(tiny_llama(dtype=torch.float64), 1, rank=6, alpha=9)
    small = shrink(adapter.save(tmp_path / "a"), **limit)
    for site in small.report.sites:
        wanted = torch.as_tensor(delta(adapter, site.path))
        assert site.relative_error == pytest.approx(
            float((small.delta(site.path) - wanted).norm() / wanted.norm()), abs=1e-9
        )
        assert site.rank < 6
        assert site.relative_error <= limit.get("error", (1 - limit.get("energy", 0.0)) ** 0.5)
    assert small.provenance.base == adapter.provenance.base
    again = small.save(tmp_path / "small")
    assert (again / "adapter_config.json").exists()
    kept = shrink(adapter, rank=99)
    assert kept.report.relative_error == 0.0
    assert_close(kept.delta(kept.sites[0]), adapter.delta(kept.sites[0]))


def test_shrinking_a_dora_adapter_with_and_without_its_base(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64)
    adapter = adapter_of(model, 1, rank=6, dora=True)
    alone, known = shrink(adapter, rank=3), shrink(adapter, rank=3, base=model)
    assert "before the magnitude" in alone.report.notes[0]
    for path in alone.sites:
        magnitudes = alone.factors[path].magnitude, adapter.factors[path].magnitude
        assert magnitudes[0] is not None
        assert magnitudes[1] is not None
        assert torch.equal(magnitudes[0], magnitudes[1])
    wanted, got = change_of(model, adapter), change_of(model, known)
    site = known.report.sites[0]
    name = f"{site.path}.weight"
    assert site.relative_error == pytest.approx(
        float((got[name] - wanted[name]).norm() / wanted[name].norm()), rel=1e-6
    )
    for number, value in enumerate((alone, known)):
        value.save(tmp_path / str(number))


def test_what_is_trained_whole_is_kept_when_an_adapter_is_shrunk() -> None:
    from tests.models import tiny_bert

    model = tiny_bert()
    for dora in (False, True):
        adapter = adapter_of(model, 1, targets=["query"], save_modules=["classifier"], bias="lora_only", dora=dora)
        small = shrink(adapter, rank=1)
        assert small.modules.keys() == adapter.modules.keys()
        assert small.biases.keys() == adapter.biases.keys()
        with attach(model, {}) as bank:
            bank.load("small", small)


def test_limits_of_shrink() -> None:
    adapter = adapter_of(tiny_llama(), 1)
    for limits in ({}, {"rank": 1, "error": 0.1}):
        with pytest.raises(MixError):
            shrink(adapter, **limits)
