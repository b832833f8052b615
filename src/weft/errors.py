"""Every error that weft raises on purpose.

    WeftError
    ├── SpecError            a LoraSpec that contradicts itself or the model it is used on   (also a ValueError)
    │   └── TargetError      a pattern, name or index without a match
    ├── ShapeError           factors that disagree with each other or with their site        (also a ValueError)
    ├── NotFiniteError       NaN or infinity where numbers were expected                     (also a ValueError)
    ├── BankError            attach, slot and route mistakes: existing or unknown names …
    ├── FormatError          a file that is refused, with .path and .key
    │   ├── UnsupportedError a file of another method or of a feature that weft has not
    │   └── KeysError        keys without a site, sites without a key
    ├── BaseError            a base model that can't be found, read or used
    │   └── BaseMismatchError  an adapter meets a base that it was not made for
    ├── MergeError           an update that can't be written into a plain model
    ├── MixError             adapters that can't be mixed as asked                           (also a ValueError)
    ├── DataError            examples that can't be read or that have no recognised shape
    │   └── ImageError       an image that can't be found, opened or decoded
    ├── RecipeError          an unknown key, a wrong type or a contradiction in a recipe     (also a ValueError)
    ├── PlanError            a budget, size or question that a plan can't read or meet       (also a ValueError)
    │   └── BudgetError      a budget that no combination of measures meets
    ├── RunError             a run folder that can't be used as asked
    │   └── RunStoppedError  a training that was asked to stop; it can go on
    ├── StoreError           a store, a name or a version that can't be used as asked
    │   ├── NotInStoreError  a reference that means nothing in this store
    │   ├── DamagedError     files that are not what the store wrote
    │   └── RequirementError  a promotion whose requirement is not met
    └── MissingDependencyError  an optional library is needed                                (also an ImportError)

A message says what failed, where, what was got, what was expected and what to do next.
This module does not know any other part of weft.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BankError",
    "BaseError",
    "BaseMismatchError",
    "BudgetError",
    "DamagedError",
    "DataError",
    "FormatError",
    "ImageError",
    "KeysError",
    "MergeError",
    "MissingDependencyError",
    "MixError",
    "NotFiniteError",
    "NotInStoreError",
    "PlanError",
    "RecipeError",
    "RequirementError",
    "RunError",
    "RunStoppedError",
    "ShapeError",
    "SpecError",
    "StoreError",
    "TargetError",
    "UnsupportedError",
    "WeftError",
    "did_you_mean",
    "some_names",
]


class WeftError(Exception):
    """The root of every error that weft raises on purpose."""


class SpecError(WeftError, ValueError):
    """A LoraSpec that contradicts itself, or the model it is used on."""


class TargetError(SpecError):
    """A pattern, a name or an index that matches nothing."""


class ShapeError(WeftError, ValueError):
    """Factors that disagree with each other or with their site."""


class NotFiniteError(WeftError, ValueError):
    """NaN or infinity where finite numbers were expected."""


class BankError(WeftError):
    """An attach, slot or route mistake: an existing or unknown name, a bank on top of a bank."""


class FormatError(WeftError):
    """A file that is refused.

    Attributes:
        path: the file or folder, as text.
        key: the key inside of it, where there is one.
    """

    def __init__(self, message: str, *, path: object = "", key: str | None = None) -> None:
        self.path = str(path)
        self.key = key
        where = ": ".join(part for part in (self.path, f"key {key!r}" if key else "") if part)
        super().__init__(f"{where}: {message}" if where else message)


class UnsupportedError(FormatError):
    """A file of another method, or with a feature that weft has not."""


class KeysError(FormatError):
    """Keys without a site, or sites without a key."""


class BaseError(WeftError):
    """A base model that can't be found, read or used."""


class BaseMismatchError(BaseError):
    """An adapter meets a base that it was not made for."""


class MergeError(WeftError):
    """An update that can't be written into a plain model."""


class MixError(WeftError, ValueError):
    """Adapters that can't be mixed as asked: unknown methods, weights that don't fit, updates that don't add."""


class DataError(WeftError):
    """Examples that can't be read, or that have no recognised shape."""


class ImageError(DataError):
    """An image that can't be found, opened or decoded."""


class RecipeError(WeftError, ValueError):
    """An unknown key, a wrong type or a contradiction in a recipe."""


class PlanError(WeftError, ValueError):
    """A budget or size that can't be read, or that can't be met; or a question that a plan can't answer."""


class BudgetError(PlanError):
    """A budget that no combination of measures meets; says by how much, and what would help most."""


class RunError(WeftError):
    """A run folder that can't be used as asked."""


class RunStoppedError(RunError):
    """A training that was asked to stop, by Ctrl-C or a scheduler's signal; the message says how it goes on."""


class StoreError(WeftError):
    """A store that can't be opened or used as asked; a name, a filter or a move that it refuses."""


class NotInStoreError(StoreError):
    """A reference (a name, a version, an alias, a digest) that means nothing in this store."""


class DamagedError(StoreError):
    """Files of a store that are not what was written: changed, cut short, lost."""


class RequirementError(StoreError):
    """A promotion whose requirement is not met; nothing was moved."""


class MissingDependencyError(WeftError, ImportError):
    """An optional library is needed for what was asked."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: ``" Did you mean 'q_proj'?"``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def some_names(names: Iterable[str], limit: int = 6) -> str:
    """At most ``limit`` names for a message, and how many more there are: ``"'a', 'b' … and 3 more"``."""
    listed = list(names)
    shown = ", ".join(repr(name) for name in listed[:limit])
    return shown if len(listed) <= limit else f"{shown} … and {len(listed) - limit} more"
