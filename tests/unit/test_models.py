"""The tiny models themselves: each gives finite numbers, a loss and gradients, in float32 and float64."""

from __future__ import annotations

import pytest
import torch

from tests.models import ARCHITECTURES, batch_for
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[name](dtype=dtype)
    batch = batch_for(model)
    output = model(**batch)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    loss = logits.square().mean() + (0 if isinstance(output, torch.Tensor) else output.loss)
    loss.backward()
    assert logits.dtype == dtype
    assert torch.isfinite(loss)
    assert [path for path, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "cnn"])
def test_train_mode_gives_the_same_numbers(name: str) -> None:
    model = ARCHITECTURES[name]()
    batch = batch_for(model)
    outputs = [model.train(mode)(**batch) for mode in (False, True)]
    evaluated, trained = (out if isinstance(out, torch.Tensor) else out.logits for out in outputs)
    assert_close(trained, evaluated, torch.float32, name)
