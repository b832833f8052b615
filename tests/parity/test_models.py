"""Forward, gradients and 50 training steps as in PEFT, on every architecture and feature that PEFT has.

Both sides start from the same base and the same random factors (none of them zero), see the same batches and use AdamW. Everything runs
in float64, where agreement is to ten digits, and once more in float32. Files in both directions are compared in
``test_formats_peft.py`` and ``test_formats_born.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import ARCHITECTURES, TinyCNN, batch_for
from tests.tolerances import TOLERANCES, Tolerance, assert_close
from weft.core.bank import Bank, attach
from weft.spec import LoraSpec

peft = pytest.importorskip("peft", reason="needs peft to compare with")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 50
RATE = 5e-3

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"targets": "all-linear"}),
    "llama, rslora": ("llama", {"targets": ["q_proj", "down_proj"], "rslora": True, "alpha": 5}),
    "llama, patterns": ("llama", {
        "targets": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3, r"v_\w+": 7},
    }),
    "llama, regular expression": ("llama", {"targets": r".*layers\.1\.(self_attn\.[qv]|mlp\.up)_proj"}),
    "llama, one layer": ("llama", {"targets": ["q_proj", "up_proj"], "layers": [1], "layers_pattern": "layers"}),
    "llama, exclude": ("llama", {"targets": "all-linear", "exclude": ["down_proj", "layers.0.self_attn.k_proj"]}),
    "llama, dora": ("llama", {"targets": "all-linear", "dora": True}),
    "llama, bias of B": ("llama", {"targets": ["q_proj", "o_proj"], "lora_bias": True}),
    "llama, embedding and head": ("llama", {"targets": ["embed_tokens", "lm_head", "v_proj"]}),
    "llama, a norm trained whole": ("llama", {"targets": ["q_proj"], "save_modules": ["model.norm"]}),
    "gpt2": ("gpt2", {"targets": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, dora and biases": ("gpt2", {"targets": ["c_attn", "c_proj"], "dora": True, "bias": "all", "fan_in_fan_out": True}),
    "gpt2, embedding, dora": ("gpt2", {"targets": ["wpe"], "dora": True}),
    "bert": ("bert", {"targets": ["query", "key", "value", "dense"], "save_modules": ["classifier"]}),
    "bert, all biases": ("bert", {"targets": ["query", "value"], "bias": "all"}),
    "bert, their biases": ("bert", {"targets": ["query", "intermediate.dense"], "bias": "lora_only"}),
    "bert, embedding": ("bert", {"targets": ["word_embeddings", "query"]}),
    "t5": ("t5", {"targets": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}),
    "t5, dora": ("t5", {"targets": ["q", "v"], "dora": True}),
    "vit": ("vit", {"targets": "all-linear", "save_modules": ["classifier"]}),
    "vit, patches": ("vit", {"targets": ["projection"]}),
    "vit, patches, dora": ("vit", {"targets": ["projection"], "dora": True}),
    "mixtral, attention": ("mixtral", {"targets": ["q_proj", "v_proj"]}),
    "mixtral, experts": ("mixtral", {"targets": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rslora": True}),
    "mixtral, experts and attention": ("mixtral", {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "cnn": ("cnn", {"targets": ["conv1", "conv2", "linear"]}),
    "cnn, dora": ("cnn", {"targets": ["conv1", "linear"], "dora": True}),
    "cnn, biases": ("cnn", {"targets": ["conv1"], "bias": "all", "save_modules": ["linear"]}),
    "attention": ("attention", {"targets": ["attn.in_proj_weight"]}),
    "attention, matrix, embedding": (
        "attention", {"targets": ["attn.in_proj_weight", "embed", "head"], "target_parameters": ["inner.mix"], "rslora": True},
    ),
}  # fmt: skip


class Inside(nn.Module):
    """PEFT adapts no parameter of the outermost module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Tensor) -> Tensor:
        return self.inner(*batch.values())


def config_of(spec: LoraSpec) -> Any:
    """The same wish in PEFT's words."""
    if not isinstance(spec.targets, str):
        spec = spec.replace(targets=[name.removesuffix(".in_proj_weight") for name in spec.targets])
    fields: dict[str, Any] = {
        "r": spec.rank, "lora_alpha": spec.alpha, "rank_pattern": spec.rank_pattern, "alpha_pattern": spec.alpha_pattern,
        "target_modules": spec.targets if isinstance(spec.targets, str) else list(spec.targets), "use_rslora": spec.rslora,
        "use_dora": spec.dora, "bias": spec.bias, "lora_bias": spec.lora_bias, "fan_in_fan_out": bool(spec.fan_in_fan_out),
        "modules_to_save": list(spec.save_modules) or None, "target_parameters": list(spec.target_parameters) or None,
        "exclude_modules": list(spec.exclude) or None,
        "layers_to_transform": None if spec.layers is None else list(spec.layers), "layers_pattern": spec.layers_pattern,
    }  # fmt: skip
    return peft.LoraConfig(**fields)


@dataclass
class Pair:
    """One trained tensor on both sides: PEFT's, and how it is laid out in weft."""

    theirs: nn.Parameter
    as_ours: Callable[[Tensor], Tensor]


def pairs(wrapped: nn.Module) -> Iterator[tuple[str, Pair]]:
    """Everything that PEFT trains, by the name that weft has for it (slot ``a``)."""
    inner = wrapped.base_model.model
    for raw, module in inner.named_modules():
        path = raw.replace(".base_layer", "")
        if type(module).__name__ == "ModulesToSaveWrapper":
            for name, parameter in module.modules_to_save["default"].named_parameters():
                yield f"{path}.weft.a.{name}", Pair(parameter, lambda t: t)
        elif (
            hasattr(module, "lora_A")
            and "default" in getattr(module, "scaling", {})
            and not path.endswith("attn.out_proj")
        ):
            yield from _factor_pairs(path, module)
    for raw, parameter in inner.named_parameters():
        name = raw.replace(".base_layer", "")
        if parameter.requires_grad and name.endswith("bias") and "lora_" not in name and "modules_to_save" not in name:
            owner, _, leaf = name.rpartition(".")
            yield f"{owner}.weft.a:biases.{leaf}", Pair(parameter, lambda t: t)


def _factor_pairs(path: str, module: Any) -> Iterator[tuple[str, Pair]]:
    kind = type(module).__name__
    slot = f"{path}.weft.a"
    if kind == "ParamWrapper":
        slot = f"{path}.weft.a:{module.parameter_name}".lstrip(".")
        E = module.num_experts
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        if module._param_ndim == 3:
            yield f"{slot}.lora_A", Pair(A, lambda t: t.reshape(E, -1, t.shape[-1]))
            yield f"{slot}.lora_B", Pair(B, lambda t: t.reshape(t.shape[0], -1, E).permute(2, 0, 1))
            return
    elif kind == "MultiheadAttention":
        slot = f"{path}.weft.a:in_proj_weight"
    if kind == "Embedding":
        A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    else:
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    yield f"{slot}.lora_A", Pair(A, lambda t: t)
    yield f"{slot}.lora_B", Pair(B, lambda t: t.flatten(1))
    own = getattr(module.lora_B["default"], "bias", None) if "default" in module.lora_B else None
    if own is not None:
        yield f"{slot}.bias", Pair(own, lambda t: t)
    if "default" in getattr(module, "lora_magnitude_vector", {}):
        yield f"{slot}.magnitude", Pair(module.lora_magnitude_vector["default"].weight, lambda t: t.flatten())


def twins(case: str, dtype: torch.dtype, size: float = 0.2) -> tuple[nn.Module, Bank, nn.Module, dict[str, Pair]]:
    """A model with weft's bank, a copy with PEFT's layers, and the pairs of their tensors with the same random numbers."""
    name, fields = CASES[case]
    model = ARCHITECTURES[name](dtype=dtype)
    if isinstance(model, TinyCNN):  # PEFT's A ignores dilation
        model.conv2 = nn.Conv2d(8, 12, (3, 2), stride=2, padding=(2, 1), groups=2).to(dtype)
    if name == "attention":
        model = Inside(model)
    spec = LoraSpec(**({"rank": 4, "alpha": 6} | fields))
    wrapped = peft.get_peft_model(copy.deepcopy(model), config_of(spec), autocast_adapter_dtype=False).eval()
    for path, module in wrapped.named_modules():
        if path.endswith(
            "attn.base_layer.out_proj"
        ):  # PEFT adapts it whenever in_proj, adds its update twice, and differentiates it once
            module.scaling["default"] = 0.0
    bank = attach(model, {"a": spec})
    ours, found = dict(bank.named_parameters("a")), dict(pairs(wrapped))
    missing = set(ours) ^ set(found)
    assert not missing, f"trained on one side only: {sorted(missing)}"
    with torch.no_grad():
        for key, pair in found.items():
            near = key.endswith(("magnitude", ".a.weight", "bias"))
            pair.theirs.copy_(
                pair.theirs + torch.randn_like(pair.theirs) * 0.1 if near else torch.randn_like(pair.theirs) * size
            )
            ours[key].copy_(pair.as_ours(pair.theirs).view_as(ours[key]))
    return model, bank, wrapped, found


def size_for(case: str) -> float:
    """How large the random factors are. T5 doesn't scale its attention scores: with larger ones the softmax saturates, and 50 steps
    of 5e-3 then enlarge a last bit that is changed in PEFT's own factors a hundred million times (0.1 % of the loss in float32)."""
    return 0.05 if case.startswith("t5") else 0.2


def random_batch(model: nn.Module, **sizes: int) -> dict[str, Tensor]:
    return batch_for(model.inner if isinstance(model, Inside) else model, **sizes)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    out = model(**batch)
    if isinstance(out, Tensor):
        target = torch.arange(out.shape[0], device=out.device) % out.shape[-1]
        return F.cross_entropy(out, target), out
    return out.loss, out.logits


def compare_gradients(bank: Bank, found: dict[str, Pair], tolerance: Any) -> None:
    for key, parameter in bank.named_parameters("a"):
        theirs = found[key].theirs.grad
        if theirs is None or not theirs.any():  # an embedding that the forward of this architecture does not use
            assert parameter.grad is None or not parameter.grad.any(), key
            continue
        assert parameter.grad is not None, key
        assert_close(parameter.grad, found[key].as_ours(theirs).view_as(parameter), tolerance, key)


@pytest.mark.parametrize("case", list(CASES))
def test_forward_gradients_and_training_are_pefts(case: str) -> None:
    model, bank, wrapped, found = twins(case, torch.float64, size=size_for(case))
    batch = random_batch(model)
    loss, logits = loss_of(model, batch)
    their_loss, their_logits = loss_of(wrapped.base_model.model, batch)
    assert_close(logits, their_logits, torch.float64, "logits")
    loss.backward()
    their_loss.backward()
    compare_gradients(bank, found, Tolerance(1e-9, 1e-12, "sums of gradients over a few layers"))
    tolerance = Tolerance(1e-7, 1e-9, "Adam enlarges last bits where a gradient is nearly zero")
    train(model, bank, wrapped, found, tolerance, tolerance)


def train(
    model: nn.Module,
    bank: Bank,
    wrapped: nn.Module,
    found: dict[str, Pair],
    tolerance: Any,
    of_losses: Any,
    rate: float = RATE,
    eps: float = 1e-6,
) -> None:
    settings: dict[str, Any] = {"lr": rate, "weight_decay": 0.01, "eps": eps}
    ours = torch.optim.AdamW([p for _, p in bank.named_parameters("a")], **settings)
    theirs = torch.optim.AdamW([pair.theirs for pair in found.values()], **settings)
    batches = [random_batch(model, rows=2, length=5) for _ in range(5)]
    losses = []
    for index in range(STEPS):
        for side, optimizer in ((model, ours), (wrapped.base_model.model, theirs)):
            optimizer.zero_grad()
            loss, _ = loss_of(side, batches[index % len(batches)])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    of_weft, of_peft = torch.tensor(losses, dtype=torch.float64).view(-1, 2).unbind(1)  # float32 would round them
    assert_close(of_weft, of_peft, of_losses, "losses")
    assert sum(losses[-10:]) < sum(losses[:10]), "it learns"
    for key, parameter in bank.named_parameters("a"):
        assert_close(parameter, found[key].as_ours(found[key].theirs).view_as(parameter), tolerance, key)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "t5", "vit", "cnn", "mixtral, attention"])
def test_in_float32(case: str) -> None:
    model, bank, wrapped, found = twins(case, torch.float32, size=size_for(case))
    batch = batch_for(model)
    loss, logits = loss_of(model, batch)
    their_loss, their_logits = loss_of(wrapped.base_model.model, batch)
    assert_close(logits, their_logits, torch.float32, "logits")
    loss.backward()
    their_loss.backward()
    compare_gradients(bank, found, Tolerance(2e-5, 1e-6, TOLERANCES[torch.float32].reason + ", and again backwards"))
    # a larger eps than Adam's usual one: a second moment of nearly nothing would enlarge last bits a million times
    train(model, bank, wrapped, found, "steps", "losses", rate=1e-3, eps=1e-5)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts(how: str) -> None:
    case = "mixtral, experts and attention"
    model, bank, wrapped, found = twins(case, torch.float32)
    for side in (model, wrapped.base_model.model):
        side.set_experts_implementation(how)
    batch = batch_for(model)
    loss, logits = loss_of(model, batch)
    their_loss, their_logits = loss_of(wrapped.base_model.model, batch)
    assert_close(logits, their_logits, torch.float32, "logits")
    loss.backward()
    their_loss.backward()
    compare_gradients(bank, found, "steps")


def bfloat16_errors(size: float) -> list[float]:
    """Errors of the logits of weft and of PEFT, bfloat16 base and float32 factors of the given size, over float64."""
    exact_model, exact_bank, _, _ = twins("llama", torch.float64, size)
    adapter = exact_bank.adapter("a")
    batch = batch_for(exact_model)
    with torch.no_grad():
        exact = exact_model(**batch).logits
    exact_bank.detach()
    model = exact_model.to(torch.bfloat16)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config_of(LoraSpec(rank=4, alpha=6))).eval()
    with attach(model, {}) as bank, torch.no_grad():
        bank.load("a", adapter, trainable=True, allow_other_base=True)
        bank.use("a")
        assert {p.dtype for _, p in bank.named_parameters("a")} == {torch.float32}
        for key, pair in pairs(wrapped):
            pair.theirs.copy_(dict(bank.named_parameters("a"))[key])
        ours, theirs = model(**batch).logits.double(), wrapped(**batch).logits.double()
    return [float((side - exact).norm() / exact.norm()) for side in (ours, theirs)]


@pytest.mark.parametrize(("size", "limit"), [(0.07, 1.08), (0.2, 1.25)])
def test_a_bfloat16_base_with_float32_factors(size: float, limit: float) -> None:
    """PEFT's default for low precision. Roundings are luck, and logits of one model go wrong together, so it is the mean of ten models.

    Updates below the base's product, as training makes them: as near to float64 as PEFT (0.99 of its error over 30 models, 5 % from
    one to the next). Updates as large as the base's product: 1.06 (10 % from one to the next), since weft's thin products are in
    bfloat16 where PEFT casts x to float32.
    """
    ratios = [math.log(ours / theirs) for ours, theirs in (bfloat16_errors(size) for _ in range(10))]
    assert math.exp(sum(ratios) / len(ratios)) < limit


def test_dropout_is_the_same_in_distribution() -> None:
    """Other random numbers, the same mean and spread of the loss."""
    model, bank, wrapped, _ = twins("llama", torch.float32)
    batch = batch_for(model)
    for slot in bank._members["a"].sites.values():
        slot.__dict__["dropout"] = 0.3
    for module in wrapped.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.3)
    model.train()
    wrapped.train()
    with torch.no_grad():
        sides = [
            torch.stack([loss_of(side, batch)[0] for _ in range(150)]).double()
            for side in (model, wrapped.base_model.model)
        ]
    means, spreads = [side.mean() for side in sides], [side.std() for side in sides]
    assert float(abs(means[0] - means[1])) < 5 * float((spreads[0] ** 2 / 150 + spreads[1] ** 2 / 150).sqrt())
    assert 0.6 < float(spreads[0] / spreads[1]) < 1.6
