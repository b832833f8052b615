"""Layers of a mixed batch whose products can't be shared: each adapter computes its own rows, by the code of a single adapter.

Convolutions, embeddings, modules that are trained whole and biases of other layers go this way. It is also the obvious form of every
route: an exact mixture is the base's output plus the weighted differences that its adapters make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.core.dropout import own_stream
from weft.core.joint import stream
from weft.core.routes import Route
from weft.core.slots import State
from weft.errors import BankError

__all__ = ["BiasSite", "by_parts", "by_rows", "route_of", "whole_by_parts"]

if TYPE_CHECKING:
    from torch.nn import Module as _Base
else:
    _Base = object

Terms = Sequence[tuple[tuple[Any, float], ...]]


def by_parts(
    route: Route, path: str, x: Tensor, terms: Terms, single: Callable[[Any, Tensor], Tensor],
    base: Callable[[Tensor], Tensor], features: int, seeded: bool = False,
) -> Tensor:  # fmt: skip
    """Compute every row with its own adapters.

    Args:
        route: which row is whose. path: of the site, for messages and for dropout.
        x: the input: its first dimension is rows, or (packed) its leading dimensions are tokens.
        terms: by part what ``single`` takes, and weights.
        single: one adapter's output for some of the rows. base: the base's.
        features: how many of x's last dimensions belong to a token (0: x holds ids).
        seeded: ``single`` draws dropout: with the route's seeds every row draws on its own.
    """
    lead = tuple(x.shape[: x.dim() - features]) if route.lengths is not None else tuple(x.shape[:1])
    if route.lengths is None:
        whole = tuple(x.shape[: max(1, x.dim() - features)])
        count, _ = route.view(whole, path)
        rows = x
    else:
        count, length = route.view(lead, path)
        rows = x.reshape(count * length, *x.shape[x.dim() - features :])
    each = rows.shape[0] // count
    found: list[Tensor] = []
    order: list[Tensor] = []
    for part, numbers, seed in _shares(route, count, bool(seeded and route.seeds)):
        index = (torch.tensor(numbers, device=x.device)[:, None] * each + torch.arange(each, device=x.device)).reshape(
            -1
        )
        mine = rows.index_select(0, index)
        with own_stream(None if seed is None else stream(seed, path)):
            found.append(_mixture(mine, terms[part] if part >= 0 else (), single, base))
        order.append(index)
    out = torch.cat(found).index_select(0, torch.cat(order).argsort())
    return out if route.lengths is None else out.reshape(*lead, *out.shape[1:])


def _shares(route: Route, count: int, one_by_one: bool) -> list[tuple[int, list[int], int | None]]:
    """(part, its rows, a seed): rows of one part together, or every row by itself."""
    keys = route.row_keys(count) if not route.whole else list(route.keys)
    if one_by_one and route.seeds is not None:
        if route.lengths is None or route.even:
            return [(key, [row], seed) for row, (key, seed) in enumerate(zip(keys, route.seeds, strict=True))]
        found, at = [], 0
        for key, length, seed in zip(route.keys, route.lengths, route.seeds, strict=True):
            found.append((key, list(range(at, at + length)), seed))
            at += length
        return [share for share in found if share[1]]
    by_part: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        by_part.setdefault(key, []).append(row)
    return [(key, numbers, None) for key, numbers in by_part.items()]


def _mixture(x: Tensor, terms: Sequence[tuple[Any, float]], single: Any, base: Any) -> Tensor:
    if len(terms) == 1 and terms[0][1] == 1:
        return single(terms[0][0], x)  # type: ignore[no-any-return]
    out: Tensor = base(x)
    total = out
    for item, weight in terms:
        total = total + weight * (single(item, x) - out)
    return total


def by_rows(site: Any, x: Tensor, single: Any, base: Any, features: int, channels: tuple[int, ...] = ()) -> Tensor:
    """`by_parts` for a convolution or an embedding with `Rows`, trained biases included.

    Args:
        site: the `Rows`. single: (slot, x) -> output. base: x -> output.
        channels: how a bias (o,) is viewed beside an output of one row.
    """
    placed, route = site.placed, site.route
    own: Tensor | None = placed.site.module._parameters.get("bias")

    def one(pair: tuple[str, Any], rows: Tensor) -> Tensor:
        kind, item = pair
        if kind == "slot":
            return single(item, rows)  # type: ignore[no-any-return]
        out = base(rows)
        return out + (item.to(out.dtype) - (0 if own is None else own.to(out.dtype))).view(channels)  # type: ignore[no-any-return]

    terms = []
    for slots, biases in zip(site.terms, site.biases, strict=True):
        both = [(("slot", slot), weight) for slot, weight in slots] + [(("bias", b), weight) for b, weight in biases]
        terms.append(tuple(both))
    if any(len(item) > 1 for item in terms):
        return _sums(route, placed.site.path, x, terms, one, base, features)
    return by_parts(route, placed.site.path, x, terms, one, base, features, seeded=placed.site.module.training)


def _sums(route: Route, path: str, x: Tensor, terms: Terms, one: Any, base: Any, features: int) -> Tensor:
    return by_parts(route, path, x, terms, one, base, features, seeded=True)


def whole_by_parts(route: Route, state: State, copies: Terms, base: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A module of which rows use different copies.

    Raises:
        BankError: a call with other than one tensor, or a mixture of modules that are not linear in their weights.
    """
    tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
    if len(tensors) != 1 or (not args and len(kwargs) != 1):
        raise BankError(
            f"{state.path!r} is trained whole and is called with {len(tensors)} tensors: rows of different adapters can't be told apart in "
            "it; route all rows to one adapter"
        )
    mixed = any(len(terms) > 1 or any(weight != 1 for _, weight in terms) for terms in copies)
    if mixed and state.original not in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        raise BankError(
            f"{state.path!r} is a {state.original.__name__} that is trained whole: its copies have no exact mixture; route each row to one "
            "adapter"
        )
    x = tensors[0]
    features = 0 if not x.is_floating_point() else 1
    return by_parts(route, state.path, x, copies, lambda module, rows: module(rows), base, features)


def route_of(state: State) -> Route | None:
    """The route that is on for a module in this thread."""
    ring = state.ring
    found: Route | None = None if ring is None or not ring.routed else ring.current()
    return found


class BiasSite(_Base):
    """A layer that ends in adding its bias, and of which adapters have biases of their own: norms, linear layers that are no site."""

    _weft: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own arguments and result."""
        out = super().forward(*args, **kwargs)
        state = self._weft
        if state.sites:
            return out
        route = route_of(state)
        if route is None or route.alone() is not None:
            return out
        biases = route.biases_at(f"{state.path}.bias" if state.path else "bias")
        if not any(biases):
            return out
        own = self._parameters["bias"]
        assert own is not None
        sums = [torch.zeros_like(own)]
        for terms in biases:
            sums.append(sum((weight * (value.to(own.dtype) - own) for value, weight in terms), torch.zeros_like(own)))
        lead = tuple(out.shape[:-1]) if _is_last(self) else tuple(out.shape[:1])
        count, length = route.view(lead, state.path)
        keys = torch.tensor(route.row_keys(count) if not route.whole else list(route.keys), device=out.device) + 1
        each = torch.stack(sums).index_select(0, keys)
        if _is_last(self):
            return (out.reshape(count, length, -1) + each.unsqueeze(1).to(out.dtype)).view(out.shape)
        shaped = each.view(count, 1, -1, *(1,) * (out.dim() - 2)).to(out.dtype)
        return (out.view(count, length, *out.shape[1:]) + shaped).view(out.shape)


def _is_last(module: nn.Module) -> bool:
    """Whether the bias belongs to the last dimension; else to the second, as in convolutions and norms of channels."""
    kinds = (
        nn.modules.batchnorm._BatchNorm,
        nn.GroupNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.modules.conv._ConvNd,
    )
    return not isinstance(module, kinds)
