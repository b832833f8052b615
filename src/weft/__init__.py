"""weft: the whole life of a LoRA adapter. The base model is the warp, which stays still; adapters are the weft.

    model, tokenizer = weft.load_base("path or hub id")
    bank = weft.attach(model, {"mine": weft.LoraSpec(rank=16, targets="all-linear")})
    ...                                    # any PyTorch loop, transformers.Trainer or TRL's trainers
    adapter = bank.adapter("mine")         # an immutable value
    adapter.save("out/mine")               # a directory that PEFT loads
    bank.detach()                          # the model that was there before

Or in one call: ``run = weft.train(base=…, data=…, out=…)``, then ``run.adapter``.

The names in `__all__` are the public API. Each is imported when it is first used: ``import weft`` costs milliseconds
and imports no other library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft import sources

if TYPE_CHECKING:
    from weft.adapter import Adapter, Provenance
    from weft.compose import combine, compare, shrink
    from weft.core.bank import Bank
    from weft.core.factors import Factors
    from weft.core.merge import merge
    from weft.diagnosing import diagnose
    from weft.diagnosis.finding import Finding
    from weft.errors import WeftError
    from weft.formats import convert, load
    from weft.identity import Fingerprint, fingerprint
    from weft.many import train_many
    from weft.models.attach import attach
    from weft.models.load import load_base
    from weft.models.two_tower import TwoTower
    from weft.plan import plan
    from weft.spec import LoraSpec
    from weft.store import Store
    from weft.train import Evaluation, Recipe, Run, evaluate, generate, prove, stream, train
    from weft.train.adaptive import BudgetRanks, GrowOnPlateau, ShrinkBySpectrum
    from weft.train.watching import Watch

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Bank",
    "BudgetRanks",
    "Evaluation",
    "Factors",
    "Finding",
    "Fingerprint",
    "GrowOnPlateau",
    "LoraSpec",
    "Provenance",
    "Recipe",
    "Run",
    "ShrinkBySpectrum",
    "Store",
    "TwoTower",
    "Watch",
    "WeftError",
    "__version__",
    "attach",
    "combine",
    "compare",
    "convert",
    "diagnose",
    "evaluate",
    "fingerprint",
    "generate",
    "load",
    "load_base",
    "merge",
    "plan",
    "prove",
    "shrink",
    "stream",
    "train",
    "train_many",
]

_HOME = {
    "Adapter": "weft.adapter",
    "Bank": "weft.core.bank",
    "BudgetRanks": "weft.train.adaptive",
    "Evaluation": "weft.train",
    "Factors": "weft.core.factors",
    "Finding": "weft.diagnosis.finding",
    "Fingerprint": "weft.identity",
    "GrowOnPlateau": "weft.train.adaptive",
    "LoraSpec": "weft.spec",
    "Provenance": "weft.adapter",
    "Recipe": "weft.train",
    "Run": "weft.train",
    "ShrinkBySpectrum": "weft.train.adaptive",
    "Store": "weft.store",
    "TwoTower": "weft.models.two_tower",
    "Watch": "weft.train.watching",
    "WeftError": "weft.errors",
    "attach": "weft.models.attach",
    "combine": "weft.compose",
    "compare": "weft.compose",
    "convert": "weft.formats",
    "diagnose": "weft.diagnosing",
    "evaluate": "weft.train",
    "fingerprint": "weft.identity",
    "generate": "weft.train",
    "load": "weft.formats",
    "load_base": "weft.models.load",
    "merge": "weft.core.merge",
    "plan": "weft.plan",
    "prove": "weft.train",
    "shrink": "weft.compose",
    "stream": "weft.train",
    "train": "weft.train",
    "train_many": "weft.many",
}

sources.register("weft.store.finder:find")  # what formats can't know: the store stands above them


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    if name in (
        "plan",
        "train",
    ):  # the package can be called: weft.train(...) trains, weft.train.Sampling is still found
        return module
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
