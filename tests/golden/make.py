"""Write the golden adapters of this version: ``python -m tests.golden.make``. Done once for a release, never again.

One small directory a feature, with random numbers that are nowhere zero, and ``expected.json`` with what has to be read from them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import weft
from weft.adapter import Adapter, Provenance
from weft.core.factors import Factors, spread_groups
from weft.formats.peft import write
from weft.identity import Fingerprint
from weft.spec import LoraSpec

HERE = Path(__file__).parent
BASE = Fingerprint(
    "TinyModel", "c" * 64, "1" * 64, "2" * 64, "float32", "3" * 64, name="example/tiny", commit="0123abc"
)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, none of them small."""
    numbers = torch.randn(shape)
    return (numbers.sign() * (0.25 + numbers.abs())).to(dtype)


def linear(
    rank: int = 4,
    d_in: int = 6,
    d_out: int = 5,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    **parts: Tensor,
) -> Factors:
    """Factors of a linear layer."""
    return Factors(normal(rank, d_in, dtype=dtype), normal(d_out, rank, dtype=dtype), scale, **parts)


def adapters() -> dict[str, Adapter]:
    """An adapter for each feature of the format."""
    layers = [f"model.layers.{index}" for index in range(2)]
    plain = {f"{layer}.self_attn.{name}": linear() for layer in layers for name in ("q_proj", "v_proj")}
    spec = LoraSpec(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    provenance = Provenance(BASE, data=({"source": "train.jsonl", "digest": "d" * 64, "examples": 12},), recipe={"learning_rate": 2e-4, "steps": 30},
                            versions={"weft": "0.1.0", "torch": "2.13.0"}, evaluation={"eval_loss": 1.25}, created="2025-01-01T00:00:00Z")  # fmt: skip
    uneven = {
        f"{layer}.q_proj": linear(rank, scale=3.0 / rank**0.5) for layer, rank in zip(layers, (2, 3), strict=True)
    }
    heads = {"score": {"weight": normal(2, 6), "bias": normal(2)}}
    attention = {
        "attn.in_proj_weight": Factors(normal(2, 8), normal(24, 2), 0.5, "attention"),
        "attn.out_proj": Factors(normal(2, 8), normal(8, 2), 0.5, "attention"),
    }
    experts = {
        "mlp.experts.gate_up_proj": Factors(normal(3, 2, 6), normal(3, 8, 2), 1.5, "parameter"),
        "mlp.experts.down_proj": Factors(normal(3, 2, 4), normal(3, 6, 2), 1.5, "parameter"),
    }
    convs = {
        "conv1": Factors(normal(4, 3 * 9), normal(6, 4), 2.0, "conv", (3, 3)),
        "conv2": Factors(normal(4, 6 * 2), spread_groups(normal(8, 2), 2), 2.0, "conv", (2,), groups=2),
    }
    return {
        "linear": Adapter(spec, plain, provenance=provenance),
        "proof": Adapter(spec, plain, provenance=provenance, proof={"input_ids": torch.arange(6).view(2, 3), "logits": normal(2, 7)}),
        "bfloat16": Adapter(spec, plain).map(lambda tensor: tensor.bfloat16()),
        "patterns": Adapter(LoraSpec(rank=2, alpha=3, targets=("q_proj",), rslora=True, rank_pattern={r"layers\.1\..*": 3}), uneven),
        "layers": Adapter(LoraSpec(rank=4, alpha=8, targets="all-linear", layers=(1,), exclude=("v_proj",)), {"model.layers.1.q_proj": linear()}),
        "dora": Adapter(LoraSpec(rank=4, alpha=8, targets=("q_proj",), dora=True), {"a.q_proj": linear(magnitude=normal(5).abs())}),
        "lora_bias": Adapter(LoraSpec(rank=4, alpha=8, targets=("q_proj",), lora_bias=True), {"a.q_proj": linear(bias=normal(5))}),
        "heads": Adapter(LoraSpec(rank=4, alpha=8, targets=("q_proj",), bias="all", save_modules=("score",)), {"a.q_proj": linear()}, heads, {"a.q_proj.bias": normal(5)}),
        "embedding": Adapter(LoraSpec(rank=4, alpha=8, targets=("embed",)), {"embed": Factors(normal(4, 9), normal(6, 4), 2.0, "embedding")}),
        "convolutions": Adapter(LoraSpec(rank=4, alpha=8, targets=("conv1", "conv2")), convs),
        "attention": Adapter(LoraSpec(rank=2, alpha=1, targets=("attn",)), attention),
        "experts": Adapter(LoraSpec(rank=2, alpha=3, targets=(), target_parameters=("gate_up_proj", "down_proj")), experts),
        "matrix": Adapter(LoraSpec(rank=2, alpha=3, targets=(), target_parameters=("mix.weight",)), {"mix.weight": Factors(normal(2, 6), normal(5, 2), 1.5, "parameter")}),
        "weft-alone": Adapter(LoraSpec(rank=2, alpha=3, targets=(), target_parameters=("mix",)), {"mix": Factors(normal(2, 6), normal(5, 2), 1.5, "parameter")}),
    }  # fmt: skip


def main() -> int:
    """Write the directories of this version, if there are none."""
    target = HERE / weft.__version__
    if target.exists():
        print(f"{target} exists: golden adapters are written once", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    expected = {}
    for name, adapter in adapters().items():
        write(adapter, target / name, for_peft=name != "weft-alone")
        norms = {path: item.map(lambda tensor: tensor.double()).norm() for path, item in adapter.factors.items()}
        expected[name] = {"digest": adapter.digest, "norms": norms, "parameters": adapter.num_parameters}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
