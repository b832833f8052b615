"""A plan in words and tables."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from weft.plan.sizes import in_words

if TYPE_CHECKING:
    from weft.plan.planning import Plan

__all__ = ["text"]

_WIDTH = 80

_PARTS = {
    "weights": "weights of the base", "factors": "factors", "gradients": "gradients", "optimizer": "optimizer state",
    "activations": "activations", "logits": "logits", "temporary": "temporary buffers", "overhead": "before the model",
}  # fmt: skip


def text(plan: Plan) -> str:
    """Everything that a person asks: what it takes by part, beside full training, what each measure does, what was chosen."""
    recipe, counts = plan.recipe, plan.counts
    rows = f"{recipe.batch_size} x {plan.seq_len} tokens" + (
        f", {recipe.accumulation} times" if recipe.accumulation > 1 else ""
    )
    lines = [
        f"{plan.model}: {counts.base:,} parameters" + (f", {counts.layers} layers" if counts.layers else ""),
        f"LoRA trains {counts.trained:,} of them at {counts.sites} sites: {counts.trained / counts.base:.2%}, {in_words(counts.factors)} as a file"
        if counts.sites
        else f"trained: {counts.trained:,}",
        f"a step: {rows}, on {'a GPU' if plan.device == 'cuda' else 'the CPU'}; {plan.flops:.3g} floating point operations",
    ]
    if plan.seconds and plan.speed:
        lines.append(
            f"  at least {plan.seconds:.3g} s: products alone, {plan.speed.flops:.3g} a second as measured here"
        )
    lines += ["", *_memory(plan)]
    if plan.budget is not None:
        changed = ", ".join(f"{name}={value}" for name, value in plan.changes.items())
        said = f"budget {in_words(plan.budget)}: " + (f"fits with {changed}" if changed else "fits as it is")
        lines += ["", *wrap(said, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)]
    if plan.measures:
        lines += ["", "Each measure alone:", *_measures(plan)]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    """Bytes by part at the highest moment."""
    columns = {"LoRA": plan.bytes} | ({"all weights": plan.full} if plan.full else {})
    head = ["at the highest moment", *columns]
    table = [[title, *(in_words(memory.parts[name]) for memory in columns.values())] for name, title in _PARTS.items()]
    table.append(["together", *(in_words(memory.total) for memory in columns.values())])
    table.append(["it is in the", *(memory.when for memory in columns.values())])
    return _aligned([head, *table])


def _measures(plan: Plan) -> list[str]:
    """What is known of each as a table, and why the others can't be used."""
    table = [["measure", "saves", "of all", "computing", "result"]]
    for measure in plan.measures:
        if measure.applies or measure.saving:
            sign = "-" if measure.saving < 0 else ""
            share = measure.saving / plan.given.total
            size = f"{sign}{in_words(abs(measure.saving))}"
            table.append([measure.name, size, f"{share:.0%}", f"{measure.extra_flops:+.0%}", measure.effect])
    without = [f"not here: {measure.name} ({measure.why})" for measure in plan.measures if not measure.applies]
    if any("offload" in measure.changes and measure.applies for measure in plan.measures):
        without.insert(0, "off-loaded: what is moved counts as what a GPU could compute meanwhile")
    return [
        *_aligned(table, left={0, 4}),
        *(line for text in without for line in wrap(text, _WIDTH, subsequent_indent="  ")),
    ]


def _aligned(table: list[list[str]], left: set[int] | None = None) -> list[str]:
    """Columns of one width; the first one, or those in ``left``, on the left."""
    sides = {0} if left is None else left
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    cells = (
        [
            cell.ljust(width) if at in sides else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in table
    )
    return ["  ".join(row).rstrip() for row in cells]
