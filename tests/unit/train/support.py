"""What the tests of training share: a byte tokenizer, a tiny base, ragged token rows, and a trainer over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from tests.models import tiny_llama
from weft.adapter import Adapter
from weft.core.bank import Bank, attach
from weft.spec import LoraSpec
from weft.train.recipe import Recipe
from weft.train.run import Folder
from weft.train.schedule import Facts, settle
from weft.train.session import training_arguments
from weft.train.trainer import AdapterTrainer, Setup

__all__ = ["Order", "Rows", "byte_base", "byte_tokenizer", "collate", "moved", "same", "trainer_for"]


def byte_tokenizer() -> Any:
    """One token a byte, after <pad>, <s> and </s>; a text starts with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate(specials + letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_base(**config: Any) -> tuple[nn.Module, Any]:
    """A tiny random Llama over bytes, and its tokenizer."""
    tokenizer = byte_tokenizer()
    return tiny_llama(vocab_size=len(tokenizer), **config), tokenizer


class Rows(Dataset[Tensor]):
    """Random token rows of 6 to 14 tokens."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(6, 15, (count,), generator=generator).tolist()
        self.rows = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """Pad on the right; the first 3 tokens are a prompt and not learned."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
        labels[index, 3 : len(row)] = row[3:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Order(Sampler[int]):
    """A shuffle that is a function of the epoch."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def trainer_for(
    folder: Path, model: nn.Module, recipe: Recipe, *, spec: LoraSpec | None = None, rows: int = 32, bank: Bank | None = None,
    callbacks: list[Any] | None = None,
) -> AdapterTrainer:  # fmt: skip
    """A trainer over `Rows`, on a bank with moved factors."""
    bank = bank or attach(model, {"t": spec or LoraSpec(rank=4)}, seed=0)
    moved(bank, "t")
    schedule = settle(recipe, Facts(rows, True, "text", 32, "llama"))
    args = training_arguments(recipe, schedule, Folder(folder), packed=False)
    setup = Setup(
        bank, "t", schedule, Order(rows), list(range(8)), lora_plus_ratio=recipe.lora_plus_ratio, keep=recipe.keep
    )
    trainer = AdapterTrainer(
        model,
        args,
        setup,
        train_dataset=Rows(rows),
        eval_dataset=Rows(8, 1),
        data_collator=collate,
        callbacks=callbacks or [],
    )
    for silent in list(trainer.callback_handler.callbacks):
        if type(silent).__name__ == "PrinterCallback":
            trainer.remove_callback(silent)
    return trainer


def moved(bank: Bank, name: str) -> None:
    """Take B away from zero: with B = 0 nearly every wrong step passes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, parameter in bank.named_parameters(name):
            if path.endswith("lora_B"):
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def same(left: Adapter, right: Adapter) -> bool:
    """Two adapters with the same bytes."""
    mine, theirs = left.tensors(), right.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
