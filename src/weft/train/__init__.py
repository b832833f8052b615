"""Training, and all that is done with an adapter that was trained: evaluate, generate, prove.

    train(base=…, data=…, eval_data=…, spec=…, recipe=…, out=…) -> Run
    evaluate(base=…, adapter=…, data=…)                         -> Evaluation
    generate(base=…, adapter=…, prompts=…)                      -> list of texts
    stream(base=…, adapter=…, prompt=…)                         -> iterator of pieces of text
    prove(adapter, model)                                       -> ProofReport
    Recipe      how to train: one frozen dataclass that reads and writes YAML, and may hold the LoraSpec
    Run         the folder that a training leaves: .adapter .report .log .path

Stands on `transformers.Trainer`. Heavy imports happen when a name is first used.

How the command line calls it (every argument is by keyword, but for the first ones of `prove`)::

    recipe = Recipe.load(path)                    # or Recipe(); keys of LoraSpec may stand under `spec:` or beside the others
    recipe = recipe.set(["rank=16", "learning_rate=3e-4", "rank_pattern.q_proj=4"])   # `--set`; values by the rules of YAML 1.2
    run = train(base=None | path | hub id | (model, tokenizer), data=…, eval_data=None, spec=None, recipe=None, out=…,
                resume=False, overwrite=False, progress=None)
        # base None: the embedded base.  data: a path, a hub id or a list of dicts; eval_data: also a share, as in 0.1.
        # progress None: a bar on a terminal, plain lines elsewhere; True: plain lines; False: silence.
        # resume=True: out is enough, base, data and recipe are read from the run folder (`weft train --resume runs/NAME`)
    run.path, run.adapter, run.report, run.log
    run.report.text()                             # what to print; .to_dict() is report.json, also written as report.md
    Run.open("runs/NAME")                         # a run that was made before

    result = evaluate(base=…, adapter=None | path | Adapter, data=…, kind=None, columns=None, limit=200, generation=True,
                      max_new_tokens=128, batch_size=8, max_length=None, dtype=None, device=None, progress=None)
    result.base, result.adapter                   # {metric: number}; adapter is None without one
    result.text()                                 # a table, base and adapter side by side; .to_dict()
    result.examples                               # some {prompt, references, base, adapter}

    for piece in stream(base=…, adapter=None, prompt="text" | messages, chat=None, sampling=Sampling(max_new_tokens=128)):
        print(piece, end="", flush=True)
    texts = generate(base=…, adapter=None, prompts=[…], chat=None, sampling=Sampling(temperature=0.7, top_p=0.9, seed=0))

    report = prove(adapter, model)                # adapter: path or Adapter; model: what load_base gave
    report.ok, report.text()

Errors: `RecipeError` before anything starts; `RunError` for a folder that can't be used; `RunStoppedError` for a run that
Ctrl-C or a scheduler stopped (its message says how it goes on); `NotFiniteError` for a loss that is not finite;
`DataError`, `BaseError` and `SpecError` from below.

``weft.train`` is this package and the function at once: the module can be called, so that the name is right in
whatever order things are imported.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.train.adaptive import BudgetRanks, GrowOnPlateau, ShrinkBySpectrum
    from weft.train.evaluation import Evaluation, evaluate
    from weft.train.generation import Sampling, generate, stream
    from weft.train.proof import ProofReport, prove
    from weft.train.recipe import Recipe
    from weft.train.run import Report, Run
    from weft.train.training import train

__all__ = [
    "BudgetRanks",
    "Evaluation",
    "GrowOnPlateau",
    "ProofReport",
    "Recipe",
    "Report",
    "Run",
    "Sampling",
    "ShrinkBySpectrum",
    "evaluate",
    "generate",
    "prove",
    "stream",
    "train",
]

_HOME = {
    "BudgetRanks": "weft.train.adaptive",
    "Evaluation": "weft.train.evaluation",
    "GrowOnPlateau": "weft.train.adaptive",
    "ProofReport": "weft.train.proof",
    "Recipe": "weft.train.recipe",
    "Report": "weft.train.run",
    "Run": "weft.train.run",
    "Sampling": "weft.train.generation",
    "ShrinkBySpectrum": "weft.train.adaptive",
    "evaluate": "weft.train.evaluation",
    "generate": "weft.train.generation",
    "prove": "weft.train.proof",
    "stream": "weft.train.generation",
    "train": "weft.train.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _CallablePackage(types.ModuleType):
    """The package ``weft.train``, which is the function `weft.train` when it is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
