"""What is to be mixed, and by which method: checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from weft.compose.methods import Method, Options
from weft.compose.parents import Parent, Weight, check_bases
from weft.compose.updates import Ground
from weft.errors import BaseMismatchError, MixError

__all__ = ["Job", "prepare"]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What is to be mixed, checked.

    Attributes:
        parents: all that were given. live: those whose weights are not all 0.
    """

    parents: tuple[Parent, ...]
    method: Method
    options: Options
    whole: str
    ground: Ground | None
    allow_other_base: bool
    notes: tuple[str, ...]

    @property
    def live(self) -> tuple[Parent, ...]:
        """The parents that have a part in it."""
        return tuple(parent for parent in self.parents if not parent.is_idle)

    @property
    def is_plain_sum(self) -> bool:
        """Whether the exact sum is asked for, as it is."""
        plain = self.method.name in ("exact", "layerwise", "task_arithmetic")
        return plain and not self.options.limit and self.options.scaling in (None, 1.0)

    def weighted(self, weights: Sequence[Weight], method: Method | None = None, options: Options | None = None) -> Job:
        """The same with other weights, or another method."""
        parents = tuple(dataclasses.replace(p, weight=w) for p, w in zip(self.parents, weights, strict=True))
        return dataclasses.replace(self, parents=parents, method=method or self.method, options=options or self.options)


def prepare(
    parents: tuple[Parent, ...], method: Method, options: Options, whole: str = "same", ground: Ground | None = None,
    allow_other_base: bool = False,
) -> Job:  # fmt: skip
    """Check that parents fit together, and on the base where it is given.

    Raises:
        MixError, BaseMismatchError: they don't.
    """
    notes: list[str] = []
    if ground is None:
        notes += check_bases(parents, allow_other_base)
    for parent in parents:
        if ground is not None:
            _check_on(ground, parent, allow_other_base)
        if parent.is_idle:
            notes.append(f"{parent.name!r} has weight 0 and no part in the mixture")
    if method.name == "layerwise" and not any(isinstance(parent.weight, Mapping) for parent in parents):
        raise MixError(
            "method 'layerwise' needs an adapter with weights by pattern; with one weight for all sites, method='exact' is meant"
        )
    return Job(parents, method, options, whole, ground, allow_other_base, tuple(notes))


def _check_on(ground: Ground, parent: Parent, allow_other_base: bool) -> None:
    try:
        ground.check(parent.adapter, allow_other_base)
    except BaseMismatchError as problem:
        raise BaseMismatchError(f"{parent.name!r}: {problem}") from None
