"""Routes: which adapter each row (or packed token) of a batch uses, and with what weight.

A `Route` is made from entries, entered as often as one likes, and keeps what it was made with: an adapter that is dropped or replaced
meanwhile stays what it was in here. Sites ask `Route.at`: one slot for all rows (then the code of a single adapter runs), None
(the base), or `Rows`. This module knows which rows belong together; what a layer computes for them is in
`weft.core.joint` and `weft.core.by_parts`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.members import Member
from weft.core.parameters import lazy_weight
from weft.core.ring import Ring
from weft.core.slots import Placed, State
from weft.errors import BankError, did_you_mean, some_names

__all__ = ["Entry", "Mixed", "Part", "Route", "Rows", "parse"]

Entry = str | None | Mapping[str, float]
"""What a row uses: an adapter, the base, or adapters with weights: ``Σ wᵢ ΔWᵢ``, exactly."""

Part = tuple[tuple[Member, float], ...]
"""An entry with the adapters themselves; empty for the base."""

_MISSING = object()


class Mixed:
    """A weighted sum of slots in the place of one slot, for all rows: its factors above each other."""

    by_row = False
    plain = True
    solo = False
    magnitude = bias = None
    scale = 1.0
    dropout = 0.0

    def __init__(self, terms: Sequence[tuple[Any, float]]) -> None:
        self.terms = terms

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (…, R, d_in) and B (…, d_out, R), weights and scales in B."""
        pairs = [(*slot.pair(), slot.scale * weight) for slot, weight in self.terms]
        return torch.cat([A for A, _, _ in pairs], dim=-2), torch.cat([B * scale for _, B, scale in pairs], dim=-1)

    @property
    def lora_A(self) -> Tensor:
        """A of `pair`."""
        return self.pair()[0]

    @property
    def lora_B(self) -> Tensor:
        """B of `pair`."""
        return self.pair()[1]


class Rows:
    """What a route says at one site whose rows differ.

    Attributes:
        terms: by part the slots at this site and their weights. biases: by part the difference to the base's bias, as (bias, weight).
    """

    __slots__ = ("biases", "home", "placed", "route", "terms")
    by_row = True
    plain = False
    magnitude = None

    def __init__(
        self, route: Route, placed: Placed, terms: list[tuple[tuple[Any, float], ...]],
        biases: list[tuple[tuple[Tensor, float], ...]],
    ) -> None:  # fmt: skip
        self.route, self.placed, self.terms, self.biases = route, placed, terms, biases
        self.home: Any = None

    @property
    def simple(self) -> bool:
        """Updates and nothing else: no magnitude, no bias of any kind."""
        slots = [slot for terms in self.terms for slot, _ in terms]
        return all(slot.plain for slot in slots) and not any(self.biases)

    @property
    def fixed(self) -> bool:
        """No number in here can change."""
        return all(getattr(slot, "fixed", False) for terms in self.terms for slot, _ in terms)


class Route:
    """Adapters by row, see `weft.core.bank.Bank.route`.

    Attributes:
        parts: the distinct entries. keys: by row the number of its part, -1 for the base.
        lengths: tokens by entry of a packed batch; None: entries are rows. whole: one entry is for the whole batch.
        seeds: of dropout, by entry, or None.
        grad: whether gradients were on when it was entered last.
    """

    def __init__(
        self, ring: Ring, parts: tuple[Part, ...], keys: tuple[int, ...], *, lengths: tuple[int, ...] | None = None,
        whole: bool = False, seeds: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.ring, self.parts, self.keys = ring, parts, keys
        self.lengths, self.whole, self.seeds = lengths, whole, seeds
        self.grad = True
        self.total = sum(lengths) if lengths is not None else 0
        self.even = lengths is not None and len(set(lengths)) == 1
        self.joints: dict[Any, Any] = {}
        self._at: dict[Placed, Any] = {}
        self._shapes: dict[Any, tuple[int, int]] = {}
        self._open = threading.local()
        self._moves = ring.moves

    def __repr__(self) -> str:
        kind = "all rows" if self.whole else f"{len(self.keys)} {'rows' if self.lengths is None else 'segments'}"
        return f"Route({kind}, {len(self.parts)} adapters or mixtures)"

    def __enter__(self) -> Route:
        scopes = self._open.__dict__.setdefault("scopes", [])
        scope = self.ring.entered(self)
        self.grad = torch.is_grad_enabled()
        scope.__enter__()
        scopes.append(scope)
        return self

    def __exit__(self, *problem: Any) -> None:
        self._open.scopes.pop().__exit__(None, None, None)

    # what sites ask

    def at(self, placed: Placed) -> Any:
        """What a site computes with: a slot for all rows, None for the base, or `Rows`."""
        if self._moves != self.ring.moves:
            self._follow()
        found = self._at.get(placed, _MISSING)
        if found is _MISSING:
            found = self._at[placed] = self._resolve(placed)
        return found

    def _follow(self) -> None:
        """The model went to another device: gather anew, there. Adapters that were dropped meanwhile come along, too."""
        self._moves = self.ring.moves
        for member in (member for part in self.parts for member, _ in part):
            member.follow()
        self._at, self.joints = {}, {}

    def alone(self) -> Member | None:
        """The one adapter that all rows use, as it is; None where there is no such."""
        if len(self.parts) == 1 and len(self.parts[0]) == 1 and -1 not in self.keys and self.parts[0][0][1] == 1:
            return self.parts[0][0][0]
        return None

    def value_at(self, module: nn.Module, name: str) -> Any:
        """What reading an adapted parameter of a module gives: see `State.values`; rows that differ are seen to elsewhere."""
        state: State = module.__dict__["_weft"]
        placed = state.sites.get(name)
        if placed is not None:
            slot = self.at(placed)
            return None if slot is None else functools.partial(lazy_weight, placed, slot)
        member = self.alone()
        return None if member is None else member.biases.get(_join(state.path, name))

    def whole_at(self, state: State) -> list[tuple[tuple[nn.Module, float], ...]] | None:
        """By part the copies of a module that stand in for it, and their weights; None: no part has any."""
        found = [
            tuple((member.whole[state.path], weight) for member, weight in part if state.path in member.whole)
            for part in self.parts
        ]
        return found if any(found) else None

    def biases_at(self, path: str) -> list[tuple[tuple[Tensor, float], ...]]:
        """By part the trained biases in the place of the base's at a parameter path, and their weights."""
        return [
            tuple((member.biases[path], weight) for member, weight in part if path in member.biases)
            for part in self.parts
        ]

    def _resolve(self, placed: Placed) -> Any:
        path = placed.site.path
        terms = [
            tuple((member.sites[path], weight) for member, weight in part if path in member.sites)
            for part in self.parts
        ]
        leaf = (
            "bias" if placed.site.weight_name == "weight" else f"{placed.site.weight_name.removesuffix('_weight')}_bias"
        )
        biases = self.biases_at(_join(placed.site.owner, leaf))
        if not any(terms) and not any(biases):
            return None
        if self.alone() is not None and terms[0]:
            slot = terms[0][0][0]
            if not (self.seeds is not None and slot.dropout):
                return slot
        if placed.site.kind == "parameter":
            if len(self.parts) > 1 or -1 in self.keys:
                raise BankError(
                    f"{path!r} is a bare parameter{' of stacked experts' if placed.site.experts else ''}, which sees no rows: rows that differ "
                    "there can't be in one batch. Route all rows to one adapter or mixture"
                )
            return Mixed(terms[0])
        return Rows(self, placed, terms, biases)

    # rows

    def view(self, lead: tuple[int, ...], path: str) -> tuple[int, int]:
        """An input's leading dimensions as rows of this route: (rows, tokens a row); a segment of ragged lengths has a row a token.

        Raises:
            BankError: dimensions that can't be rows of the route; names the site and both numbers.
        """
        call = self.ring.call
        key = (lead, call)
        found = self._shapes.get(key)
        if found is None:
            found = self._shapes[key] = self._view(lead, path, call)
        return found

    def _view(self, lead: tuple[int, ...], path: str, call: Any) -> tuple[int, int]:
        tokens = math.prod(lead)
        if self.whole:
            return 1, tokens
        if self.lengths is not None:
            if tokens != self.total:
                raise BankError(
                    f"{path!r} gets {tokens} packed tokens (input {lead}), the route's lengths add up to {self.total}: give every token "
                    "a segment, the padding too (with None)"
                )
            return (len(self.keys), self.lengths[0]) if self.even else (tokens, 1)
        count, first = len(self.keys), lead[0] if lead else 1
        problem = "" if first % count == 0 else f"{first} rows are no multiple of the route's {count} entries"
        if not problem and call is not None and first != call.rows:
            flat = len(lead) == 1 and call.tokens is not None and first == call.tokens
            windows = len(lead) > 1 and first % call.rows == 0 and lead[1] != call.rows
            if not (flat or windows):
                problem = f"in a batch of {call.rows} rows this input's leading dimensions {lead} are not its rows"
        if problem:
            raise BankError(
                f"{path!r} gets an input of leading shape {lead}: {problem}. A route has one entry a row (beams and returned sequences "
                "multiply rows); a site whose input is not made of rows can't be routed by row: leave it out, or use one adapter for all rows"
            )
        return count, tokens // count

    def check_call(self, rows: int, tokens: int | None) -> None:
        """Refuse a batch of another number of rows, or of packed tokens.

        Raises:
            BankError: names both numbers.
        """
        if self.whole:
            return
        if self.lengths is not None:
            if tokens is not None and tokens != self.total:
                raise BankError(
                    f"the packed batch has {tokens} tokens, the route's lengths add up to {self.total}: give every token a segment, the "
                    "padding too (with None)"
                )
        elif rows % len(self.keys):
            raise BankError(
                f"the batch has {rows} rows, the route {len(self.keys)} entries: a route has one entry a row (beams and returned "
                "sequences multiply rows)"
            )

    def row_keys(self, rows: int) -> list[int]:
        """Part by row, where an input has as many rows as `view` said."""
        if self.lengths is not None and not self.even:
            return [key for key, length in zip(self.keys, self.lengths, strict=True) for _ in range(length)]
        assert rows == len(self.keys)
        return list(self.keys)


def parse(
    ring: Ring, members: Mapping[str, Member], entries: Entry | Sequence[Entry], lengths: Sequence[int] | None,
    seeds: Sequence[int] | None,
) -> Route:  # fmt: skip
    """A route from what a user writes.

    Raises:
        BankError: an unknown name, a weight that is no number, lengths or seeds that don't fit the entries.
    """
    whole = entries is None or isinstance(entries, str | Mapping)
    if not whole and not isinstance(entries, Sequence):
        raise BankError(f"a route is {entries!r}; expected a list with an entry a row, or one entry for all rows")
    rows: list[Any] = [entries] if whole else list(entries)  # type: ignore[arg-type]
    if not rows:
        raise BankError("a route needs at least one entry: a name, None for the base, or {name: weight}")
    if lengths is not None:
        _check_lengths(rows, lengths, whole)
    if seeds is not None and len(seeds) != len(rows):
        raise BankError(f"the route has {len(rows)} entries and {len(seeds)} seeds; one seed an entry")
    parts: dict[Any, int] = {}
    keys: list[int] = []
    found: list[Part] = []
    for number, entry in enumerate(rows):
        part = tuple(_terms(entry, members, number))
        if not part:
            keys.append(-1)
            continue
        key = tuple((id(member), weight) for member, weight in part)
        if key not in parts:
            parts[key] = len(found)
            found.append(part)
        keys.append(parts[key])
    return Route(
        ring, tuple(found), tuple(keys), lengths=None if lengths is None else tuple(int(n) for n in lengths), whole=whole,
        seeds=None if seeds is None else tuple(int(seed) for seed in seeds),
    )  # fmt: skip


def _check_lengths(rows: list[Any], lengths: Sequence[int], whole: bool) -> None:
    if whole:
        raise BankError("lengths go with a list of entries, one a segment")
    if len(lengths) != len(rows) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in lengths):
        raise BankError(
            f"the route has {len(rows)} entries and lengths {list(lengths)[:8]}; one length of at least 0 an entry"
        )


def _terms(entry: Any, members: Mapping[str, Member], number: int) -> Iterator[tuple[Member, float]]:
    if entry is None:
        return
    if isinstance(entry, str):
        yield _member(entry, members, number), 1.0
        return
    if not isinstance(entry, Mapping):
        raise BankError(
            f"entry {number} of the route is {entry!r}; expected an adapter's name, None for the base, or {{name: weight}}"
        )
    if not entry:
        raise BankError(f"entry {number} of the route is an empty mixture; None is the base")
    for name in sorted(entry, key=str):
        weight = entry[name]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise BankError(
                f"entry {number} of the route: the weight of {name!r} is {weight!r}; expected a finite number"
            )
        member = _member(name, members, number)
        if weight:
            yield member, float(weight)


def _member(name: Any, members: Mapping[str, Member], number: int) -> Member:
    if name not in members:
        raise BankError(
            f"entry {number} of the route: no adapter {name!r} in this bank.{did_you_mean(str(name), members)} There are: "
            f"{some_names(members) or 'none'}"
        )
    return members[name]


def _join(owner: str, leaf: str) -> str:
    return f"{owner}.{leaf}" if owner else leaf
