"""Files between weft and PEFT, in both directions: the same updates and the same outputs, for every feature."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import formats_cases as cases
from tests.parity.formats_cases import CASES, Case
from tests.tolerances import Tolerance, assert_close
from weft.adapter import Adapter
from weft.core.bank import attach
from weft.formats import peft as format_peft

pytest.importorskip("peft", reason="compares with peft, which is not installed")

WORKS = [pytest.param(case, id=case.name) for case in CASES]
CLOSE = Tolerance(2e-5, 1e-5, "float32 through a few layers, with updates as large as the weights")


def outputs(base: Any, adapter: Adapter, batch: dict[str, Any]) -> torch.Tensor:
    model = copy.deepcopy(base)
    with attach(model, {}) as bank:
        bank.load("read", adapter)
        bank.use("read")
        return cases.logits(model.eval(), batch)


def same(one: Adapter, other: Adapter) -> None:
    assert list(one.factors) == list(other.factors)
    for path, item in one.factors.items():
        twin = other.factors[path]
        assert (item.kind, item.kernel, item.groups) == (twin.kind, twin.kernel, twin.groups)
        assert item.scale == pytest.approx(twin.scale, rel=1e-12)
        for name, tensor in item.tensors().items():
            assert torch.equal(tensor, twin.tensors()[name]), (path, name)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("case", WORKS)
def test_read_what_peft_wrote(case: Case, tmp_path: Path) -> None:
    base = case.model()
    model = cases.peft_model(base, case.config)
    cases.save(model, tmp_path / "peft")
    adapter = format_peft.read(tmp_path / "peft", base=base if case.needs_base else None)
    expected = cases.delta_weights(model)
    assert {path for path, item in adapter.factors.items() if item.groups == 1} == set(expected)
    if case.config.get("init_lora_weights") not in ("pissa", "olora"):
        for path, delta in expected.items():
            found = adapter.factors[path].delta()
            if path.endswith("attn.out_proj"):
                found = found / 2  # PEFT adds it twice, see the outputs below
            assert_close(found.reshape(delta.shape), delta, what=path)
    batch = cases.inputs(base)
    assert_close(outputs(base, adapter, batch), cases.logits(model, batch), CLOSE, "outputs")


@pytest.mark.parametrize("case", WORKS)
def test_write_what_peft_reads(case: Case, tmp_path: Path) -> None:
    base = case.model()
    model = cases.peft_model(base, case.config)
    cases.save(model, tmp_path / "peft")
    adapter = format_peft.read(tmp_path / "peft", base=base if case.needs_base else None)
    format_peft.write(adapter, tmp_path / "weft")
    batch = cases.inputs(base)
    expected = cases.logits(model, batch)
    again = cases.load(base, tmp_path / "weft")
    assert_close(cases.logits(again, batch), expected, CLOSE, "what PEFT makes of weft's directory")
    assert format_peft.read(tmp_path / "weft").digest == adapter.digest
    (tmp_path / "weft" / "weft.json").unlink()
    same(format_peft.read(tmp_path / "weft", base=base if case.name == "matrices" else None), adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    base = cases.tiny_attention()
    model = cases.peft_model(base, {"target_modules": ["attn", "embed", "head"]})
    cases.save(model, tmp_path / "peft")
    adapter = format_peft.read(tmp_path / "peft").map(lambda tensor: tensor.to(dtype))
    format_peft.write(adapter, tmp_path / "weft")
    back = format_peft.read(tmp_path / "weft")
    assert back.digest == adapter.digest
    assert {tensor.dtype for tensor in back.tensors().values()} == {dtype}
    cases.load(base, tmp_path / "weft")


def test_smallest_config(tmp_path: Path) -> None:
    base = cases.tiny_llama()
    model = cases.peft_model(base, {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8})
    cases.save(model, tmp_path / "peft")
    smallest = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(smallest))
    adapter = format_peft.read(tmp_path / "peft")
    batch = cases.inputs(base)
    assert_close(outputs(base, adapter, batch), cases.logits(model, batch), CLOSE, "outputs")
