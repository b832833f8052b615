"""An attached model in other people's loops: plain PyTorch, transformers.Trainer, TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import tiny_llama
from tests.unit.train.support import Rows, byte_base, collate, moved
from weft.core.bank import Bank, attach
from weft.spec import LoraSpec


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".weft." not in name}


def check_trained(model: nn.Module, bank: Bank, base: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Every factor moved, no byte of the base did, and detach gives the model back."""
    for name, parameter in bank.named_parameters("t"):
        assert not torch.equal(parameter, start[name]), name
    adapter = bank.adapter("t")
    assert adapter.num_parameters == sum(tensor.numel() for tensor in start.values())
    bank.detach()
    after = model.state_dict()
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())


def prepared(model: nn.Module) -> tuple[Bank, dict[str, Tensor], dict[str, Tensor]]:
    base = bytes_of(model)
    bank = attach(model, {"t": LoraSpec(rank=4, dropout=0.1)}, seed=0)
    moved(bank, "t")
    return bank, base, {name: parameter.detach().clone() for name, parameter in bank.named_parameters("t")}


def test_any_pytorch_loop() -> None:
    model, rows = tiny_llama(), Rows(8)
    bank, base, start = prepared(model)
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(**collate(rows.rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_trained(model, bank, base, start)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_transformers_trainer(tmp_path: Path, reentrant: bool | None) -> None:
    """Also with gradient checkpointing of both kinds, over embeddings that are frozen."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    bank, base, start = prepared(model)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, logging_strategy="no",
        activation_checkpointing=reentrant is not None, activation_checkpointing_kwargs={"use_reentrant": bool(reentrant)},
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=Rows(12), data_collator=collate).train()
    check_trained(model, bank, base, start)


def test_trl_sft_trainer(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = byte_base()
    bank, base, start = prepared(model)
    data = Dataset.from_list([{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(8)])
    args: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_length": 32, "bf16": False, "dataloader_pin_memory": False,
        "activation_checkpointing": True,
    }  # fmt: skip
    SFTTrainer(model=model, args=SFTConfig(**args), train_dataset=data, processing_class=tokenizer).train()
    check_trained(model, bank, base, start)
