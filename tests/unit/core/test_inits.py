"""Where the factors start: by the weight, by the data, and never by touching the base."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import (
    batch_for,
    tiny_attention,
    tiny_bert,
    tiny_cnn,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
)
from tests.tolerances import Tolerance, assert_close
from weft.core.data_inits import redistribute
from weft.core.data_passes import collect_activations, collect_gradients, undisturbed
from weft.core.decompose import PrincipalAxes, leading
from weft.core.inits import INITIALISERS, Start, initialise
from weft.core.site import Site
from weft.core.sites import find_sites
from weft.errors import NotFiniteError, SpecError
from weft.identity import hash_tensor
from weft.spec import INITS, LoraSpec

STREAM = Tolerance(1e-7, 1e-9, "eigenvectors of a float64 Gram matrix: the root of the precision")
TAIL = Tolerance(2e-2, 1e-3, "the tail beyond the kept directions is dropped")


def starts_of(
    model: nn.Module, seed: int | None = 0, dtype: torch.dtype | None = None, **spec: Any
) -> tuple[dict[str, Site], dict[str, Start]]:
    made = LoraSpec(**spec)
    sites = find_sites(model, made).sites
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return {site.path: site for site in sites}, initialise(sites, made, generator=generator, model=model, dtype=dtype)


def one(module: nn.Module, seed: int | None = 0, dtype: torch.dtype | None = None, **spec: Any) -> tuple[Site, Start]:
    sites, starts = starts_of(nn.ModuleDict({"it": module}), seed, dtype, **({"targets": ["it"]} | spec))
    return next(iter(sites.values())), next(iter(starts.values()))


def update(start: Start) -> Tensor:
    """The update at the start, in float64."""
    assert start.start_A is not None
    assert start.start_B is not None
    return start.scale * (start.B.double() @ start.A.double() - start.start_B.double() @ start.start_A.double())


def bytes_of(model: nn.Module) -> dict[str, str]:
    return {name: hash_tensor(tensor) for name, tensor in model.state_dict().items()}


def everything() -> nn.Module:
    """One site of every kind."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 10))

    parts = {
        "linear": nn.Linear(10, 14),
        "conv": nn.Conv2d(3, 9, (3, 2)),
        "embed": nn.Embedding(20, 8),
        "attn": nn.MultiheadAttention(8, 2),
        "experts": Experts(),
    }
    return nn.ModuleDict(parts)


EVERYTHING = {"targets": ["linear", "conv", "embed", "attn"], "target_parameters": ["gate_up_proj"], "rank": 4}


def test_every_init_of_the_spec_is_there_with_its_paper() -> None:
    assert set(INITIALISERS) == set(INITS)
    assert all(item.paper.startswith("https://") and item.function.__doc__ for item in INITIALISERS.values())


# by the weight


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes_of_every_kind(init: str, dtype: torch.dtype) -> None:
    model = everything().to(dtype)
    before = bytes_of(model)
    sites, starts = starts_of(model, **EVERYTHING, init=init)
    assert (
        list(starts)
        == list(sites)
        == ["linear", "conv", "embed", "attn.in_proj_weight", "attn.out_proj", "experts.gate_up_proj"]
    )
    for path, start in starts.items():
        site = sites[path]
        lead = () if site.experts is None else (site.experts,)
        assert start.A.shape == (*lead, 4, site.d_in)
        assert start.B.shape == (*lead, site.d_out, 4)
        assert start.A.dtype == start.B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert start.A.is_contiguous()
        assert start.B.is_contiguous()
        assert torch.isfinite(start.A).all()
        if start.start_A is not None:
            assert update(start).abs().max() == 0
            assert start.start_A.data_ptr() != start.A.data_ptr()
            assert start.start_B is not None
            assert start.start_B.data_ptr() != start.B.data_ptr()
        else:
            assert (start.B @ start.A).abs().max() < 1e-6
    assert bytes_of(model) == before


def test_the_result_has_the_dtype_that_was_asked_for() -> None:
    for init in ("kaiming", "pissa"):
        _, start = one(nn.Linear(6, 6), rank=2, init=init, dtype=torch.bfloat16)
        assert start.A.dtype == start.B.dtype == torch.bfloat16


def test_scale_is_alpha_over_rank() -> None:
    assert one(nn.Linear(6, 6), rank=2, alpha=8)[1].scale == 4.0
    assert one(nn.Linear(6, 6), rank=4, alpha=8, rslora=True)[1].scale == 4.0
    _, starts = starts_of(
        tiny_llama(layers=1), rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 2}
    )
    assert [start.scale for start in starts.values()][:3] == [4.0, 0.5, 2.0]


def test_the_same_generator_gives_the_same_factors() -> None:
    model = tiny_llama(layers=1)
    for init in ("kaiming", "gaussian", "orthogonal", "pissa_niter_2"):
        first, again, other = (starts_of(model, seed, init=init, rank=4)[1] for seed in (5, 5, 6))
        assert all(torch.equal(first[path].A, again[path].A) for path in first)
        assert all(torch.equal(first[path].B, again[path].B) for path in first)
        assert not all(torch.equal(first[path].A, other[path].A) for path in first)


def test_a_generator_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for init in ("kaiming", "gaussian", "orthogonal", "pissa_niter_2"):
        one(_eye(), init=init, rank=2)
    assert torch.equal(torch.rand(3), expected)


def _eye() -> nn.Module:
    module = nn.Linear(4, 4, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        module.weight.copy_(torch.eye(4))
    return module


@pytest.mark.parametrize(
    ("module", "d_in"),
    [
        (nn.Linear(900, 30), 900),
        (nn.Conv1d(100, 30, 9), 900),
        (nn.Conv2d(100, 30, (3, 3), groups=2), 900),
        (nn.MultiheadAttention(900, 2), 900),
    ],
)
def test_kaimings_fan_in_is_d_in_not_the_rank(module: nn.Module, d_in: int) -> None:
    _, start = one(module, rank=4)
    bound = 1 / math.sqrt(d_in)
    assert start.A.shape == (4, d_in)
    assert 0.98 * bound < float(start.A.abs().max()) <= bound
    assert abs(float(start.A.std()) / (bound / math.sqrt(3)) - 1) < 0.05
    assert not start.B.any()


def test_kaimings_fan_in_is_d_in_for_weights_that_are_stored_transposed() -> None:
    sites, starts = starts_of(tiny_gpt2(n_embd=64, n_inner=256), targets=["mlp.c_proj"], rank=2)
    for path, start in starts.items():
        assert start.A.shape == (2, sites[path].d_in) == (2, 256)
        assert 0.9 / 16 < float(start.A.abs().max()) <= 1 / 16


def test_kaiming_is_drawn_expert_by_expert() -> None:
    model = tiny_mixtral(layers=1)
    _, starts = starts_of(model, targets=[], target_parameters=["experts.gate_up_proj"], rank=4)
    start = next(iter(starts.values()))
    assert start.A.shape == (4, 4, 32)
    assert not torch.equal(start.A[0], start.A[1])
    assert 0.9 * 32**-0.5 < float(start.A.abs().max()) <= 32**-0.5


def test_an_embedding_starts_with_A_zero_and_B_normal() -> None:
    for init in ("kaiming", "gaussian"):
        _, start = one(nn.Embedding(50, 400), rank=8, init=init)
        assert not start.A.any()
        assert start.A.shape == (8, 50)
        assert abs(float(start.B.std()) - 1) < 0.06


def test_gaussian_has_deviation_one_over_rank() -> None:
    _, start = one(nn.Linear(2000, 10), rank=5, init="gaussian")
    assert abs(float(start.A.std()) * 5 - 1) < 0.05
    assert not start.B.any()


def test_orthogonal_has_a_zero_product_and_no_zero_factor() -> None:
    _, start = one(nn.Linear(200, 300), rank=8, init="orthogonal")
    assert (start.B.double() @ start.A.double()).abs().max() < 1e-7
    assert torch.linalg.matrix_rank(start.A) == torch.linalg.matrix_rank(start.B) == 4
    with pytest.raises(SpecError, match="rank 3 .* is odd"):
        one(nn.Linear(4, 4), rank=3, init="orthogonal")
    with pytest.raises(SpecError, match="2 groups"):
        one(nn.Conv1d(4, 4, 3, groups=2), rank=4, init="orthogonal")


@pytest.mark.parametrize("alpha", [8.0, -6.0])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_12"])
def test_pissa_carries_the_largest_singular_triplets(init: str, alpha: float) -> None:
    model = everything().double()
    sites, starts = starts_of(model, **EVERYTHING, alpha=alpha, init=init)
    for path, start in starts.items():
        W = sites[path].oriented(sites[path].weight).detach()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        best = U[..., :4] @ torch.diag_embed(S[..., :4]) @ Vh[..., :4, :]
        close = "randomised" if "niter" in init else torch.float64
        assert_close(start.scale * (start.B @ start.A), best, close, path)
        balance = start.A.square().sum(-1) - start.B.square().sum(-2)
        assert balance.abs().max() < 1e-9


def test_olora_carries_the_first_columns_of_a_qr() -> None:
    model = everything().double()
    sites, starts = starts_of(model, **EVERYTHING, init="olora")
    for path, start in starts.items():
        W = sites[path].oriented(sites[path].weight).detach()
        assert_close(start.B.mT @ start.B, torch.eye(4).double().expand(*start.B.shape[:-2], 4, 4), torch.float64, path)
        assert_close(start.B @ start.A, start.B @ start.B.mT @ W, torch.float64, path)
        assert_close((start.B @ start.A)[..., :4], W[..., :4], torch.float64, path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_reads_the_weight_says_when_it_cannot(init: str) -> None:
    with pytest.raises(SpecError, match=r"rank 8 .* 4 x 20 .* there are 4.*rank_pattern=\{'it': 4\}"):
        one(nn.Linear(20, 4), rank=8, init=init)
    with pytest.raises(SpecError, match=r"2 groups; use one of \['eva', 'kaiming', 'gaussian'\]"):
        one(nn.Conv1d(4, 4, 3, groups=2), rank=4, init=init)
    broken = nn.Linear(4, 4)
    broken.weight.data[1, 2] = math.nan
    with pytest.raises(NotFiniteError, match="'it'"):
        one(broken, rank=2, init=init)
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SpecError, match="quantised"):
        one(packed, rank=2, init=init)
    assert one(packed, rank=2)[1].A.shape == (2, 4)


def test_the_randomised_svd_is_close_on_a_large_matrix() -> None:
    W = torch.randn(600, 40).double() @ torch.diag(0.8 ** torch.arange(40.0)).double() @ torch.randn(40, 500).double()
    U, S, Vh = leading(W, 6, steps=4)
    _, S_exact, _ = torch.linalg.svd(W, full_matrices=False)
    assert_close(S, S_exact[:6], "randomised")
    assert_close(U.mT @ U, torch.eye(6).double(), torch.float64)
    assert_close(U @ torch.diag(S) @ Vh, U @ U.mT @ W, "randomised")


# principal axes of a stream


def reference_axes(X: Tensor) -> tuple[Tensor, Tensor]:
    centred = X.double() - X.double().mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    return Vh, S.square() / S.square().sum()


@pytest.mark.parametrize(("rows", "width", "keep"), [(300, 12, 12), (40, 90, 64), (2500, 20, 32), (7, 30, 16)])
def test_a_stream_has_the_axes_of_all_its_rows(rows: int, width: int, keep: int) -> None:
    X = (torch.randn(rows, width) @ torch.diag(1.2 ** -torch.arange(float(width))) + torch.randn(width)).double()
    stream = PrincipalAxes(keep)
    for part in X.split(17):
        stream.add(part)
    assert stream.axes is not None
    axes, ratios = reference_axes(X)
    found = len(stream.axes)
    assert found == min(rows - 1, width, keep)
    assert stream.count == rows
    assert_close(stream.ratios, ratios[:found], STREAM)
    overlap = (stream.axes[:5] * axes[:5]).sum(1).abs()
    assert (overlap > 1 - 1e-8).all()
    assert_close(stream.axes @ stream.axes.mT, torch.eye(found).double(), STREAM)
    assert (stream.axes.gather(1, stream.axes.abs().argmax(1, keepdim=True)) > 0).all()


def test_a_stream_that_drops_its_tail_keeps_the_leading_axes() -> None:
    X = torch.randn(3000, 200) @ torch.diag(0.9 ** torch.arange(200.0))
    stream = PrincipalAxes(32)
    for part in X.split(100):
        stream.add(part)
    assert stream.axes is not None
    axes, ratios = reference_axes(X)
    assert stream.axes.shape == (32, 200)
    assert_close(stream.ratios[:8], ratios[:8], TAIL)
    assert ((stream.axes[:4] * axes[:4]).sum(1).abs() > 0.99).all()
    centred = X.double() - X.double().mean(0)
    assert abs(stream.total / float(centred.square().sum()) - 1) < 1e-9


# EVA


def inputs_of(
    model: nn.Module, sites: list[Site], batches: list[dict[str, Tensor]], masked: bool = True
) -> dict[str, Tensor]:
    """All unmasked input rows of each site, by plain hooks."""
    rows: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    for batch in batches:
        handles = []
        mask = torch.ones(1, dtype=torch.bool)
        if masked:
            mask = batch["attention_mask"].bool()
            mask = mask & (batch["labels"] != -100) if batch["labels"].shape == mask.shape else mask
        for site in sites:

            def keep(module: nn.Module, args: tuple[Tensor, ...], path: str = site.path, mask: Tensor = mask) -> None:
                rows[path].append(args[0][mask] if masked else args[0].flatten(0, -2))

            handles.append(site.module.register_forward_pre_hook(keep))
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {path: torch.cat(parts) for path, parts in rows.items()}


def test_eva_starts_at_the_principal_axes_of_the_inputs() -> None:
    model = tiny_llama(dtype=torch.float64)
    batches = [batch_for(model, rows=4, length=9) for _ in range(3)]
    before = bytes_of(model)
    spec = LoraSpec(rank=4, alpha=8, init="eva")
    sites = find_sites(model, spec).sites
    starts = initialise(sites, spec, batches=batches, model=model)
    assert bytes_of(model) == before
    inputs = inputs_of(model, list(sites), batches)
    for site in sites:
        start, (axes, _) = starts[site.path], reference_axes(inputs[site.path])
        rank = len(start.A)
        assert start.A.dtype == torch.float64
        assert ((start.A * axes[:rank]).sum(1).abs() > 1 - 1e-8).all(), site.path
        assert start.B.shape == (site.d_out, rank)
        assert not start.B.any()
        assert start.scale == 2.0
    assert len({start.A.data_ptr() for start in starts.values()}) == len(sites)


def test_eva_shares_ranks_out_by_explained_variance() -> None:
    model = tiny_llama()
    batches = [batch_for(model, rows=4, length=9) for _ in range(3)]
    spec = LoraSpec(rank=4, init="eva", rank_pattern={"down_proj": 2})
    sites = find_sites(model, spec).sites
    starts = initialise(sites, spec, batches=batches, model=model)
    ranks = {path: len(start.A) for path, start in starts.items()}
    assert sum(ranks.values()) == sum(spec.rank_at(path) for path in ranks)
    assert all(1 <= rank <= 2 * spec.rank_at(path) for path, rank in ranks.items())
    assert len(set(ranks.values())) > 1
    inputs = inputs_of(model, list(sites), batches)
    shares = {path: reference_axes(inputs[path])[1] for path in ranks}
    least_taken = min(float(shares[path][rank - 1]) for path, rank in ranks.items() if rank > 1)
    most_left = max(float(shares[path][rank]) for path, rank in ranks.items() if rank < 2 * spec.rank_at(path))
    assert least_taken >= most_left - 1e-6


def test_ranks_are_shared_out_to_the_largest_shares() -> None:
    ratios = {"a": [0.5, 0.3, 0.2, 0.0], "b": [0.9, 0.05, 0.03, 0.02], "c": [0.01, 0.009, 0.008, 0.007]}
    assert redistribute(ratios, {"a": 2, "b": 2, "c": 2}) == {"a": 3, "b": 2, "c": 1}
    assert redistribute({"a": [0.1]}, {"a": 1}) == {"a": 1}


def test_eva_scale_follows_the_rank() -> None:
    model = tiny_llama()
    spec = LoraSpec(rank=4, alpha=8, rslora=True, init="eva")
    starts = initialise(find_sites(model, spec).sites, spec, batches=[batch_for(model, rows=4, length=9)], model=model)
    for start in starts.values():
        rank = len(start.A)
        assert math.isclose(start.scale, 8 * rank / 4 / math.sqrt(rank))


def test_sites_that_share_their_input_are_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(layers=1)
    seen = []
    monkeypatch.setattr(PrincipalAxes, "_add", _counting(PrincipalAxes._add, seen))
    axes = collect_activations(model, find_sites(model, LoraSpec()).sites, [batch_for(model)], keep=16)
    layer = {path.rpartition(".")[2]: found for path, found in axes.items()}
    assert layer["q_proj"] is layer["k_proj"] is layer["v_proj"]
    assert layer["gate_proj"] is layer["up_proj"]
    assert len({id(found) for found in axes.values()}) == 4
    assert len(seen) == 4


def _counting(function: Any, seen: list[int]) -> Any:
    def counted(self: PrincipalAxes, rows: Tensor, stored: torch.dtype) -> None:
        seen.append(len(rows))
        function(self, rows, stored)

    return counted


class Fickle(nn.Module):
    """Two layers that get the same input, until they don't."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.a(x) + self.b(x if self.calls % 2 else x.square())


class InPlace(nn.Module):
    """The second layer gets the same tensor with other numbers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return self.a(x) + self.b(x.square_())


@pytest.mark.parametrize("make", [Fickle, InPlace])
def test_inputs_that_are_not_always_shared_are_not_shared(make: type[nn.Module]) -> None:
    model = make().double()
    batches = [torch.randn(20, 6).double() for _ in range(2)]
    axes = collect_activations(model, find_sites(model, LoraSpec()).sites, batches, keep=16)
    b = torch.cat([batches[0] if make is Fickle else batches[0].square(), batches[1].square()])
    for path, rows in {"a": torch.cat(batches), "b": b}.items():
        expected, ratios = reference_axes(rows)
        assert_close(axes[path].ratios, ratios, STREAM, path)
        assert axes[path].axes is not None
        assert ((axes[path].axes * expected).sum(1).abs() > 1 - 1e-6).all()


def test_padding_and_tokens_without_a_loss_are_left_out() -> None:
    model = tiny_llama(layers=1)
    batch = batch_for(model, rows=4, length=9)
    batch["labels"][:, :3] = -100
    site = find_sites(model, LoraSpec(targets=["down_proj"])).sites[0]
    kept = (batch["attention_mask"].bool() & (batch["labels"] != -100)).sum()
    assert collect_activations(model, [site], [batch], keep=8)[site.path].count == kept
    del batch["labels"]
    assert collect_activations(model, [site], [batch], keep=8)[site.path].count == batch["attention_mask"].sum()
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    with pytest.raises(SpecError, match="masked"):
        collect_activations(model, [site], [batch], keep=8)


def test_encoder_and_decoder_have_their_own_masks() -> None:
    model = tiny_t5(layers=1)
    batch = batch_for(model, rows=4, length=9)
    batch["labels"][:, :2] = -100
    sites = find_sites(model, LoraSpec(targets=["SelfAttention.q", "EncDecAttention.k"])).sites
    axes = collect_activations(model, sites, [batch], keep=8)
    counts = {path: found.count for path, found in axes.items()}
    encoder, decoder = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    assert sorted(counts.values()) == sorted([encoder, decoder, encoder])
    assert counts["decoder.block.0.layer.0.SelfAttention.q"] == decoder


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2), (2, 4, 11)),
        (nn.Conv2d(3, 5, (3, 2), padding="same"), (2, 3, 6, 7)),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 7)),
        (nn.Conv3d(2, 5, (1, 2, 3), stride=(1, 2, 1)), (2, 2, 3, 5, 6)),
    ],
)
def test_the_rows_of_a_convolution_are_its_patches(conv: nn.Module, shape: tuple[int, ...]) -> None:
    from weft.core.data_passes import _patches

    conv = conv.double()
    x = torch.randn(shape).double()
    expected = conv(x).movedim(1, -1).flatten(0, -2)
    assert_close(_patches(conv, x) @ conv.weight.flatten(1).mT + conv.bias, expected, torch.float64)


def test_eva_on_images_and_attention() -> None:
    cnn = tiny_cnn(dtype=torch.float64)
    spec = LoraSpec(rank=4, targets=["conv1", "conv2", "linear"], init="eva")
    sites = find_sites(cnn, spec).sites
    starts = initialise(sites, spec, batches=[batch_for(cnn, rows=16)], model=cnn)
    assert starts["conv2"].A.shape[0] == 4, "a grouped convolution keeps its rank"
    assert sum(len(start.A) for start in starts.values()) == 12
    vit = tiny_vit()
    spec = LoraSpec(
        rank=2, targets=["q_proj", "projection"] if "q_proj" in str(vit) else ["query", "projection"], init="eva"
    )
    assert initialise(find_sites(vit, spec).sites, spec, batches=[batch_for(vit, rows=8)], model=vit)
    for batch_first in (True, False):
        model = tiny_attention(batch_first=batch_first)
        spec = LoraSpec(rank=2, targets=["in_proj_weight", "head"], init="eva")
        batch = batch_for(model, rows=5)
        starts = initialise(find_sites(model, spec).sites, spec, batches=[batch], model=model)
        axes, _ = reference_axes(model.embed(batch["input_ids"]).flatten(0, 1).detach())
        A = starts["attn.in_proj_weight"].A
        assert ((A.double() * axes[: len(A)]).sum(1).abs() > 1 - 1e-5).all()


def test_eva_says_what_it_cannot_do() -> None:
    model = tiny_attention()
    batch = batch_for(model)

    def refused(match: str, batches: list[Any] | None, **spec: Any) -> None:
        made = LoraSpec(**({"rank": 2, "init": "eva"} | spec))
        with pytest.raises(SpecError, match=match):
            initialise(find_sites(model, made).sites, made, batches=batches, model=model)

    refused("batches=", None, targets=["head"])
    refused("batches=", [], targets=["head"])
    refused(r"'embed', which is of kind 'embedding'; use one of \[.*'lora_ga'", [batch], targets=["embed"])
    refused("kind 'parameter'", [batch], targets=[], target_parameters=["mix"])
    refused("'attn.out_proj' can't be seen: 'attn'", [batch], targets=["out_proj"])
    refused("rank 6 needs as many; give more", [batch_for(model, rows=4)], targets=["head"], rank=6)
    unused = nn.ModuleDict({"used": model, "unused": nn.Linear(3, 3)})
    unused.forward = model.forward  # type: ignore[method-assign]
    with pytest.raises(SpecError, match="never called"):
        collect_activations(unused, find_sites(unused, LoraSpec(targets=["unused"])).sites, [batch], keep=4)


# LoRA-GA


def dense_gradients(model: nn.Module, sites: tuple[Site, ...], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    weights = [site.weight for site in sites]
    loss = sum(model(**batch).loss for batch in batches) / len(batches)
    return {
        site.path: site.oriented(grad) for site, grad in zip(sites, torch.autograd.grad(loss, weights), strict=True)
    }


def labelled(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    return [batch_for(model) for _ in range(count)]


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (tiny_llama, {}),
        (tiny_gpt2, {"targets": ["c_attn", "c_proj", "wpe"]}),
        (tiny_bert, {"targets": ["query", "word_embeddings", "dense"]}),
        (tiny_mixtral, {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_lora_ga_follows_the_gradient(make: Any, spec: dict[str, Any]) -> None:
    model = make(dtype=torch.float64)
    batches, before = labelled(model), bytes_of(model)
    made = LoraSpec(rank=2, init="lora_ga", **spec)
    sites = find_sites(model, made).sites
    starts = initialise(sites, made, batches=batches, model=model)
    assert bytes_of(model) == before
    gradients = dense_gradients(model, sites, batches)
    for site in sites:
        start, gradient = starts[site.path], gradients[site.path]
        U, S, Vh = torch.linalg.svd(gradient, full_matrices=False)
        size = site.d_out**0.25 / 4
        assert update(start).abs().max() == 0
        clear = (S[..., 1] > S[..., 2] * 1.001) & (S[..., 3] > S[..., 4] * 1.001) & (S[..., 3] > S[..., 0] * 1e-6)
        for ok, A, B, u, v in zip(*(_each(item) for item in (clear, start.A, start.B, U, Vh)), strict=True):
            if ok:
                assert_close(A.mT @ A / size**2, v[:2].mT @ v[:2], STREAM, site.path)
                assert_close(B @ B.mT / size**2, u[:, 2:4] @ u[:, 2:4].mT, STREAM, site.path)


def _each(item: Tensor) -> Tensor:
    return item if item.ndim in (1, 3) else item[None]


def test_lora_gas_first_step_explains_the_full_step_better_than_chance() -> None:
    model = tiny_llama(layers=1, dtype=torch.float64)
    batches = labelled(model)
    spec = LoraSpec(rank=4, alpha=4, init="lora_ga")
    sites = find_sites(model, spec).sites
    gradients = dense_gradients(model, sites, batches)
    other = initialise(sites, LoraSpec(rank=4, init="kaiming"), model=model)
    for path, start in initialise(sites, spec, batches=batches, model=model).items():
        gradient = gradients[path]
        assert _explained(start, gradient) > max(0.5, _explained(other[path], gradient))


def _explained(start: Start, gradient: Tensor) -> float:
    """Share of the full step that one gradient step on A and B takes, at its best length."""
    step = start.B @ start.B.mT @ gradient + gradient @ start.A.mT @ start.A
    return float((step * gradient).sum() ** 2 / (step.square().sum() * gradient.square().sum()))


def test_lora_ga_uses_the_randomised_svd_for_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.core.data_inits._EXACT_BELOW", 4)
    model = tiny_llama(layers=1, dtype=torch.float64)
    batches = labelled(model)
    spec = LoraSpec(rank=2, init="lora_ga", targets=["gate_proj"])
    sites = find_sites(model, spec).sites
    start = initialise(sites, spec, batches=batches, model=model, generator=torch.Generator().manual_seed(1))[
        sites[0].path
    ]
    _, _, Vh = torch.linalg.svd(dense_gradients(model, sites, batches)[sites[0].path])
    size = 48**0.25 / 4
    assert_close(start.A.mT @ start.A / size**2, Vh[:2].mT @ Vh[:2], "randomised")


def test_a_small_matrix_gives_B_its_last_directions() -> None:
    model = tiny_bert(labels=3, dtype=torch.float64)
    spec = LoraSpec(rank=2, init="lora_ga", targets=["classifier"])
    start = initialise(find_sites(model, spec).sites, spec, batches=labelled(model), model=model)["classifier"]
    assert start.B.shape == (3, 2)
    assert torch.linalg.matrix_rank(start.B) == 2
    spec = spec.replace(rank=4)
    with pytest.raises(SpecError, match="there are 3"):
        initialise(find_sites(model, spec).sites, spec, batches=labelled(model), model=model)


def test_gradients_come_group_by_group_under_a_budget() -> None:
    model = tiny_llama(layers=1, dtype=torch.float64)
    batches = labelled(model)
    sites = find_sites(model, LoraSpec()).sites
    expected = dense_gradients(model, sites, batches)
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    for budget in (1, 20_000, 1 << 30):
        passes.clear()
        found = dict(collect_gradients(model, sites, batches, budget=budget))
        assert [site.path for site in found] == [site.path for site in sites]
        for site, gradient in found.items():
            assert_close(site.oriented(gradient), expected[site.path], torch.float64, site.path)
        groups = len(passes) / len(batches)
        assert groups == {1: len(sites), 1 << 30: 1}.get(budget, groups)
        assert groups >= 1
    hook.remove()


def test_lora_ga_says_what_it_cannot_do() -> None:
    model = tiny_llama(layers=1)
    batch = batch_for(model, labels=False)
    spec = LoraSpec(rank=2, init="lora_ga")
    sites = find_sites(model, spec).sites
    with pytest.raises(SpecError, match="give batches with 'labels'"):
        initialise(sites, spec, batches=[batch], model=model)
    with pytest.raises(SpecError, match="batches="):
        initialise(sites, spec, batches=[batch])
    detached = [dict(batch_for(model))]
    model.register_forward_hook(lambda module, args, output: _detach(output))
    with pytest.raises(SpecError, match="no gradient reached"):
        initialise(sites, spec, batches=detached, model=model)
    with pytest.raises(SpecError, match=r"2 groups; use one of \['eva', 'kaiming', 'gaussian'\]"):
        one(nn.Conv1d(4, 4, 3, groups=2), rank=4, init="lora_ga")


def _detach(output: Any) -> Any:
    output.loss = output.loss.detach()
    return output


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny_llama(layers=1)
    spec = LoraSpec(rank=2, init="lora_ga", targets=["q_proj"])
    batch = batch_for(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(NotFiniteError, match="loss"):
        initialise(find_sites(model, spec).sites, spec, batches=[batch], model=model)


# the model afterwards


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_over_the_data_leaves_no_trace(init: str, fails: bool) -> None:
    model = tiny_cnn_with_loss()
    model.train()
    model.bn1.eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    spec = LoraSpec(rank=2, targets=["conv1", "linear"], init=init)
    sites = find_sites(model, spec).sites
    batches: list[Any] = [{"x": torch.randn(8, 3, 8, 8)}] + ([{"x": torch.randn(8, 3, 8, 8, 1, 1)}] if fails else [])
    before = bytes_of(model)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    if fails:
        with pytest.raises(RuntimeError):
            initialise(sites, spec, batches=batches, model=model)
    else:
        initialise(sites, spec, batches=batches, model=model)
    assert bytes_of(model) == before
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))
    assert model.linear.weight.grad is None
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def tiny_cnn_with_loss() -> nn.Module:
    model = tiny_cnn()
    plain = model.forward
    model.__class__ = type("CNN", (type(model),), {"forward": lambda self, x: _Output(plain(x))})
    return model


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.loss = logits.square().mean()


def test_undisturbed_is_undone_after_an_exception() -> None:
    model = tiny_llama(layers=1).train()

    def inside() -> None:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batches_may_be_a_generator_and_of_any_shape() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    spec = LoraSpec(rank=2, init="eva")
    sites = find_sites(model, spec).sites
    rows = torch.randn(30, 5)
    for batches in ([rows], [(rows,)], [{"input": rows}], (part for part in rows.split(6))):
        starts = initialise(sites, spec, batches=batches, model=model)
        axes, _ = reference_axes(rows)
        A = starts["0"].A
        assert ((A.double() * axes[: len(A)]).sum(1).abs() > 1 - 1e-5).all()
