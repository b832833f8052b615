"""The same starting updates as PEFT's, without touching the base as PEFT does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import batch_for, tiny_bert, tiny_llama
from tests.tolerances import Tolerance, assert_close
from weft.core.inits import Start, initialise
from weft.core.site import Site
from weft.core.sites import find_sites
from weft.spec import LoraSpec

peft = pytest.importorskip("peft", reason="needs peft to compare with")
pytestmark = pytest.mark.filterwarnings("ignore")

SPEC: dict[str, Any] = {"rank": 4, "alpha": 12, "targets": ["q_proj", "k_proj", "down_proj", "gate_proj"]}
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": SPEC["targets"]}
SUBSPACE = Tolerance(2e-3, 1e-5, "PEFT's side is a randomised float32 SVD")


def ours(model: nn.Module, **spec: Any) -> tuple[dict[str, Site], dict[str, Start]]:
    batches = spec.pop("batches", None)
    made = LoraSpec(**(SPEC | spec))
    sites = find_sites(model, made).sites
    return {site.path: site for site in sites}, initialise(sites, made, batches=batches, model=model)


def theirs(model: nn.Module, **config: Any) -> dict[str, nn.Module]:
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**(CONFIG | config)))
    modules = wrapped.base_model.model.named_modules()
    return {path: module for path, module in modules if hasattr(module, "lora_A") and "default" in module.scaling}


def factors(module: Any) -> tuple[Tensor, Tensor]:
    return module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()


@pytest.mark.parametrize(("init", "tolerance"), [("pissa", "svd"), ("pissa_niter_16", "randomised"), ("olora", "svd")])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_residual_and_the_update_are_pefts(init: str, tolerance: str, rslora: bool) -> None:
    model = tiny_llama()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # falling singular values: theirs is randomised without oversampling
            U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.weight.data = U @ torch.diag(0.6 ** torch.arange(float(len(S)))) @ Vh
    sites, starts = ours(model, init=init, rslora=rslora)
    layers = theirs(model, init_lora_weights=init, use_rslora=rslora)
    assert list(layers) == list(starts)
    for path, start in starts.items():
        layer, W = layers[path], sites[path].weight.detach()
        A, B = factors(layer)
        assert layer.scaling["default"] == pytest.approx(start.scale)
        residual = layer.base_layer.weight.detach()
        assert_close(residual + start.scale * B @ A, W, torch.float32, path)
        assert start.start_A is not None
        assert start.start_B is not None
        assert_close(W - start.scale * start.start_B @ start.start_A, residual, tolerance, path)
        assert_close(start.scale * start.B @ start.A, start.scale * B @ A, tolerance, path)
        assert_close(start.A.norm(), A.norm(), tolerance, path)


def test_kaiming_and_gaussian_are_drawn_as_pefts() -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=512)
    for init, name in (("kaiming", True), ("gaussian", "gaussian")):
        layers = theirs(model, init_lora_weights=name)
        for path, start in ours(model, init=init)[1].items():
            A, B = factors(layers[path])
            assert start.A.shape == A.shape
            assert start.B.shape == B.shape
            assert not start.B.any()
            assert not B.any()
            assert float(start.A.std() / A.std()) == pytest.approx(1, abs=0.3)
            if init == "kaiming":
                assert float(start.A.abs().max() / A.abs().max()) == pytest.approx(1, abs=0.03)


def test_an_embedding_starts_as_pefts() -> None:
    model = tiny_llama()
    start = ours(model, targets=["embed_tokens"])[1]["model.embed_tokens"]
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
    layer = wrapped.get_submodule("base_model.model.model.embed_tokens")
    assert start.A.shape == layer.lora_embedding_A["default"].shape
    assert start.B.shape == layer.lora_embedding_B["default"].shape
    assert not start.A.any()
    assert not layer.lora_embedding_A["default"].any()
    assert float(start.B.std()) == pytest.approx(1, abs=0.3)


def test_orthogonal_has_pefts_size() -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=512)
    layers = theirs(model, init_lora_weights="orthogonal")
    for path, start in ours(model, init="orthogonal")[1].items():
        A, B = factors(layers[path])
        assert float(start.A.norm() / A.norm()) == pytest.approx(1, abs=0.3)
        assert float(start.B.norm() / B.norm()) == pytest.approx(1, abs=0.3)


def inputs_of(model: nn.Module, sites: dict[str, Site], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Centred input rows of each site, padding left out."""
    found, handles = {}, []
    for path, site in sites.items():

        def keep(module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            rows = args[0][batch["attention_mask"].bool()].double()
            found[path] = rows - rows.mean(0)

        handles.append(site.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("make", "targets"), [(tiny_llama, SPEC["targets"]), (tiny_bert, ["query", "key", "output.dense"])]
)
def test_eva_finds_pefts_axes_and_ranks(make: Any, targets: list[str]) -> None:
    from peft.tuners.lora.eva import get_eva_state_dict

    model = make()
    batch = {name: value for name, value in batch_for(model, rows=24, length=11).items() if name != "labels"}
    sites, starts = ours(model, init="eva", targets=targets, batches=[batch])
    config = peft.LoraConfig(
        **(CONFIG | {"target_modules": targets}), init_lora_weights="eva", eva_config=peft.EvaConfig(tau=0.999)
    )
    found = get_eva_state_dict(copy.deepcopy(model), [batch], config, show_progress_bar=False)
    assert set(found) == set(starts)
    assert sum(len(A) for A in found.values()) == sum(len(start.A) for start in starts.values())
    assert sum(abs(len(found[path]) - len(start.A)) for path, start in starts.items()) <= 4, (
        "close shares may be cut differently"
    )
    for path, rows in inputs_of(model, sites, batch).items():
        A, start = found[path].double(), starts[path]
        rank = min(len(start.A), len(A))
        mine, other = ((rows @ item[:rank].double().mT).square().sum() for item in (start.A, A))
        assert float(other / mine) == pytest.approx(1, abs=0.02), path
        spectrum = torch.linalg.svdvals(rows)
        clear = [
            k for k in range(rank) if all(abs(spectrum[k] / spectrum[j] - 1) > 0.2 for j in (k - 1, k + 1) if j >= 0)
        ]
        assert all(float(start.A[k].double() @ A[k]) > 0.98 for k in clear), "the sign as well"
        assert start.scale == 3.0


def test_lora_ga_takes_pefts_directions() -> None:
    """PEFT multiplies B by singular values and leaves A without the paper's factor: directions agree, lengths can't."""
    from peft.tuners.lora.loraga import preprocess_loraga

    model = tiny_llama()
    batches = [batch_for(model) for _ in range(2)]
    config = peft.LoraConfig(**CONFIG, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    copied = copy.deepcopy(model)

    def train_step() -> None:
        for batch in batches:
            copied(**batch).loss.backward()

    preprocess_loraga(copied, config, train_step)
    wrapped = peft.get_peft_model(copied, config)
    sites, starts = ours(model, init="lora_ga", batches=batches)
    for path, start in starts.items():
        A, B = factors(wrapped.get_submodule(f"base_model.model.{path}"))
        size = sites[path].d_out ** 0.25 / 4
        assert_close(start.A @ A.mT @ A, start.A, SUBSPACE, path)
        Q = torch.linalg.qr(B).Q
        assert_close(Q @ Q.mT @ start.B, start.B, SUBSPACE, path)
        assert float(torch.linalg.matrix_norm(start.B, 2)) == pytest.approx(size, rel=1e-4)
