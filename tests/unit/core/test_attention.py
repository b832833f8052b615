"""nn.MultiheadAttention with updates: the same as PyTorch's with the dense weights, in every way it can be called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import assert_close
from tests.unit.core.support import State, fill, grads_of, made, saved_tensors, spread
from weft.core import dropout as dropping
from weft.core.bank import Bank, attach
from weft.errors import ShapeError, SpecError, TargetError
from weft.spec import LoraSpec

N, L, S, E, H = 3, 5, 7, 8, 2


def attention(**settings: Any) -> nn.ModuleDict:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, H, **({"batch_first": True} | settings))}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def attached(
    targets: Any = ("attn",), spec: dict[str, Any] | None = None, **settings: Any
) -> tuple[nn.MultiheadAttention, Bank, nn.MultiheadAttention]:
    """An adapted attention, its bank, and PyTorch's own with the dense weights."""
    model = attention(**settings)
    bank = attach(model, {"a": LoraSpec(**({"rank": 2, "targets": list(targets)} | (spec or {})))})
    fill(bank)
    return model["attn"], bank, spread(model, bank.adapter())["attn"]


def tokens(length: int, batch_first: bool = True, width: int = E) -> Tensor:
    x = torch.randn(N, length, width, dtype=torch.float64)
    return x if batch_first else x.transpose(0, 1).contiguous()


def masks(S: int) -> dict[str, dict[str, Any]]:
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, S - 2 :] = True
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    minus = torch.zeros(L, S, dtype=torch.float64).masked_fill(causal, float("-inf"))
    by_head = torch.rand(N * H, L, S) > 0.7
    by_head[..., 0] = False  # a query that sees no key is NaN in PyTorch too
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "padding, float": {"key_padding_mask": torch.zeros(N, S, dtype=torch.float64).masked_fill(padding, -3.0)},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": minus},
        "any float": {"attn_mask": torch.randn(L, S, dtype=torch.float64)},
        "by head": {"attn_mask": by_head},
        "by head, float": {"attn_mask": torch.randn(N * H, L, S, dtype=torch.float64)},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "both, float": {"attn_mask": minus, "key_padding_mask": padding.double().mul(-2)},
        "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64), "is_causal": True},
        "causal and padding": {"attn_mask": minus, "key_padding_mask": torch.zeros(N, S, dtype=torch.float64), "is_causal": True},
    }  # fmt: skip


def compare(ours: nn.Module, dense: nn.Module, *inputs: Tensor, **settings: Any) -> None:
    inputs = tuple(x.requires_grad_() for x in inputs)
    unique = list({id(x): x for x in inputs}.values())
    found = []
    for module in (ours, dense):
        out, weights = module(*inputs, **settings)
        grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        loss = (out * grad).sum() + (0 if weights is None else weights.square().sum())
        found.append((out, weights, *torch.autograd.grad(loss, unique)))
    for got, want in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_close(got, want)
    with torch.no_grad():
        out, weights = ours(*inputs, **settings)
        assert_close(out, found[1][0])
        assert (weights is None) == (found[1][1] is None)


@pytest.mark.parametrize("mask", list(masks(S)))
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(mask: str, need_weights: bool, batch_first: bool) -> None:
    same = "causal" in mask
    ours, _, dense = attached(batch_first=batch_first)
    settings = masks(L if same else S)[mask]
    query = tokens(L, batch_first)
    key = query if same else tokens(S, batch_first)
    compare(ours, dense, query, key, key, need_weights=need_weights, **settings)


@pytest.mark.parametrize("targets", [["attn"], ["attn.in_proj_weight"], ["attn.out_proj"]], ids=str)
@pytest.mark.parametrize("how", ["self", "cross", "three", "key is query"])
def test_inputs(targets: list[str], how: str) -> None:
    ours, _, dense = attached(targets)
    x, y, z = tokens(L), tokens(L), tokens(L)
    inputs = {"self": (x, x, x), "cross": (x, y, y), "three": (x, y, z), "key is query": (x, x, z)}[how]
    compare(ours, dense, *inputs)


@pytest.mark.parametrize("settings", [
    {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("mask", ["none", "both", "by head"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_settings(settings: dict[str, Any], mask: str, need_weights: bool) -> None:
    ours, _, dense = attached(**settings)
    first = settings.get("batch_first", True)
    key = tokens(S, first)
    compare(ours, dense, tokens(L, first), key, key, need_weights=need_weights, **masks(S)[mask])


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "padding", "by head"])
def test_without_a_batch(average: bool, mask: str) -> None:
    ours, _, dense = attached()
    settings = {
        "none": {}, "bool": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1)},
        "padding": {"key_padding_mask": torch.arange(S) > 4}, "by head": {"attn_mask": torch.rand(H, L, S) > 0.8},
    }[mask]  # fmt: skip
    key = tokens(S)[0].detach()
    compare(ours, dense, tokens(L)[0].detach(), key, key, average_attn_weights=average, **settings)


def test_keys_and_values_of_other_widths_have_an_out_proj_alone() -> None:
    with pytest.raises(TargetError, match="different widths"):
        attached(kdim=6, vdim=4)
    ours, bank, dense = attached(["attn.out_proj"], kdim=6, vdim=4)
    assert bank.adapter().sites == ("attn.out_proj",)
    compare(ours, dense, tokens(L), tokens(S, width=6), tokens(S, width=4))


def test_gradients_of_the_factors() -> None:
    ours, bank, _ = attached()
    x, y = tokens(L), tokens(S)
    factors = dict(bank.named_parameters("a"))
    leaves = {name: p.detach().clone().requires_grad_() for name, p in factors.items()}
    A, B = leaves["attn.weft.a:in_proj_weight.lora_A"], leaves["attn.weft.a:in_proj_weight.lora_B"]
    C, D = leaves["attn.out_proj.weft.a.lora_A"], leaves["attn.out_proj.weft.a.lora_B"]
    bank.use(None)
    weights = {"in_proj_weight": ours.in_proj_weight + B @ A, "out_proj.weight": ours.out_proj.weight + D @ C}
    expected = torch.func.functional_call(ours, weights, (x, y, y))[0]
    bank.use("a")
    got = ours(x, y, y)[0]
    assert_close(got, expected)
    for left, right in zip(torch.autograd.grad(got.square().sum(), [*factors.values()]),
                           torch.autograd.grad(expected.square().sum(), [*leaves.values()]), strict=True):  # fmt: skip
        assert_close(left, right)


@pytest.mark.parametrize(("settings", "text"), [
    ({"is_causal": True}, "there is no attn_mask"),
    ({"attn_mask": torch.ones(L, L, dtype=torch.int64)}, "attn_mask is torch.int64"),
    ({"key_padding_mask": torch.ones(N, L, dtype=torch.uint8)}, "key_padding_mask is torch.uint8"),
])  # fmt: skip
def test_what_pytorch_refuses_is_refused(settings: dict[str, Any], text: str) -> None:
    ours, bank, _ = attached()
    x = tokens(L)
    with pytest.raises(ShapeError, match=text):
        ours(x, x, x, **settings)
    bank.use(None)
    ours.train()
    with pytest.raises((RuntimeError, AssertionError)):
        ours(x, x, x, **settings)
    bank.use("a")
    with pytest.raises(ShapeError, match=r"got \(3, 5, 8, 1\)"):
        ours(x[..., None], x, x)


@pytest.mark.parametrize("targets", [["attn"], ["attn.out_proj"]], ids=str)
def test_a_subclass_with_a_forward_of_its_own_is_refused(targets: list[str]) -> None:
    class Other(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = nn.ModuleDict({"first": nn.Linear(E, E), "attn": Other(E, H)})
    before = State(model)
    with pytest.raises(SpecError, match="a forward of its own"):
        attach(model, LoraSpec(targets=["first", *targets]))
    before.check()


def test_the_base_is_pytorchs_own() -> None:
    model = attention()
    before, x = State(model), tokens(L)
    model.requires_grad_(False)  # as a bank leaves it: PyTorch takes another way then, with other rounding
    expected = model["attn"](x, x, x)
    model.requires_grad_(True)
    with attach(model, {"a": LoraSpec(rank=2)}) as bank:
        fill(bank)
        bank.use(None)
        for got, want in zip(model["attn"](x, x, x), expected, strict=True):
            assert torch.equal(got, want)
    before.check()


def test_dropout_on_the_projections(seed: int) -> None:
    ours, bank, dense = attached(spec={"dropout": 0.3}, dropout=0.0)
    x = tokens(L)
    compare(ours, dense, x, x, x)
    ours.train()
    torch.manual_seed(seed)
    got, _ = ours(x, x, x)
    torch.manual_seed(seed)
    slots = dict(bank.model.named_modules())
    in_proj, out_proj = slots["attn.weft.a:in_proj_weight"], slots["attn.out_proj.weft.a"]
    keep = dropping.drop(torch.ones_like(x).flatten(0, 1), dropping.draw(x.flatten(0, 1), 0.3)).view_as(x) / 0.7
    qkv = (
        nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias)
        + (x * keep) @ in_proj.lora_A.T @ in_proj.lora_B.T
    )
    q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    mixed = (torch.softmax(q @ k.mT / (E // H) ** 0.5, -1) @ v).transpose(1, 2).flatten(2)
    keep = dropping.drop(torch.ones_like(x).flatten(0, 1), dropping.draw(x.flatten(0, 1), 0.3)).view_as(x) / 0.7
    expected = (
        nn.functional.linear(mixed, ours.out_proj.weight, ours.out_proj.bias)
        + (mixed * keep) @ out_proj.lora_A.T @ out_proj.lora_B.T
    )
    assert_close(got, expected)


def test_attention_dropout_is_the_layers() -> None:
    ours, bank, dense = attached(dropout=0.5)
    x = tokens(L)
    for module in (ours, dense):
        module.train()
    torch.manual_seed(0)
    got = ours(x, x, x)
    torch.manual_seed(0)
    want = dense(x, x, x)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    assert bank.current == "a"


def test_dora_and_own_bias_of_out_proj() -> None:
    ours, bank, _ = attached(["attn.out_proj"], {"dora": True})
    x = tokens(L)
    slot = ours.out_proj.weft.a
    whole = ours.out_proj.weight + slot.scale * slot.lora_B @ slot.lora_A
    weight = slot.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    bank.use(None)
    expected = torch.func.functional_call(ours, {"out_proj.weight": weight}, (x, x, x))[0]
    bank.use("a")
    assert_close(ours(x, x, x)[0], expected)
    ours, bank, _ = attached(spec={"lora_bias": True})
    bank.use(None)
    own = {name: dict(ours.named_modules())[name] for name in ("weft.a:in_proj_weight", "out_proj.weft.a")}
    fields = {
        "in_proj_weight": ours.in_proj_weight
        + own["weft.a:in_proj_weight"].lora_B @ own["weft.a:in_proj_weight"].lora_A,
        "in_proj_bias": ours.in_proj_bias + own["weft.a:in_proj_weight"].bias,
        "out_proj.weight": ours.out_proj.weight + own["out_proj.weft.a"].lora_B @ own["out_proj.weft.a"].lora_A,
        "out_proj.bias": ours.out_proj.bias + own["out_proj.weft.a"].bias,
    }
    expected = torch.func.functional_call(ours, fields, (x, x, x))[0]
    bank.use("a")
    assert_close(ours(x, x, x)[0], expected)


def test_the_dense_weight_is_never_built() -> None:
    ours, bank, _ = attached()
    x = tokens(L)
    with saved_tensors() as saved:
        ours(x, x, x, need_weights=False)
    own = [*ours.parameters()]
    assert all(tensor.shape != (3 * E, E) for tensor in saved.others(*own))
    assert bank.current == "a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = attention().to(dtype)
    bank = attach(model, {"a": LoraSpec(rank=2)})
    fill(bank)
    dense = spread(model, bank.adapter())["attn"]
    x = tokens(L).to(dtype)
    for need_weights in (True, False):
        out, _ = model["attn"](x, x, x, need_weights=need_weights)
        assert out.dtype == dtype
        assert_close(out, dense(x, x, x)[0], dtype)
    out.float().square().sum().backward()
    assert all(grad.dtype == torch.float32 for grad in grads_of(bank, "a").values())
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            for need_weights in (True, False):
                mask = torch.ones(L, L, dtype=torch.bool).triu(1)
                out, _ = model["attn"](x, x, x, attn_mask=mask, need_weights=need_weights)
                assert out.dtype == torch.bfloat16
                assert_close(out, dense(x, x, x, attn_mask=mask)[0].float(), torch.bfloat16)


# nn.TransformerEncoder


def encoder(norm_first: bool = False, layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["out_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_of_an_encoder_does_not_go_past_the_adapter(targets: Any, grad: bool, padded: bool) -> None:
    model = encoder()
    before = State(model)
    x = tokens(L)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, L - 2 :] = True
    settings = {"src_key_padding_mask": padding} if padded else {}
    adapter = made(model, rank=2, targets=targets)
    dense = spread(model, adapter).train()
    with torch.no_grad():
        expected, base = dense(x, **settings), model(x, **settings)
    with attach(model, {}) as bank, torch.set_grad_enabled(grad):
        bank.load("a", adapter, trainable=True)
        bank.use("a")
        got = model(x, **settings)
        assert_close(got[~padding], expected[~padding])
        if grad:
            got.sum().backward()
            assert len(grads_of(bank, "a")) == 2 * len(adapter.sites)
        bank.use(None)
        assert_close(model(x, **settings)[~padding], base[~padding])
    before.check()


def test_biases_alone_close_the_fused_path_too() -> None:
    model = encoder()
    before, x = State(model), tokens(L)
    bank = attach(model, {"a": LoraSpec(rank=2, targets=["layers.0.linear1"], bias="all")})
    fill(bank)
    plain = spread(model, bank.adapter()).train()
    with torch.no_grad():
        for path, value in bank.adapter().biases.items():
            dict(plain.named_parameters())[path].copy_(value)
        assert_close(model(x), plain(x))
    bank.detach()
    before.check()
