"""Passes over the user's data that leave the model as it was: input axes and weight gradients of sites.

While a pass runs, the model is in eval mode (no dropout, no running statistics). Afterwards, also after an exception, modes,
`requires_grad` flags and gradients are those that were there, and no hook is left. Sites of an adapter that is in use are not
the base: switch it off first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.core.decompose import PrincipalAxes
from weft.core.site import Site
from weft.errors import NotFiniteError, SpecError

__all__ = ["call_model", "collect_activations", "collect_gradients", "loss_of", "undisturbed"]

_IGNORED = -100


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter with a gradient inside; all as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _, _ in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def collect_activations(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Any], *, keep: int
) -> dict[str, PrincipalAxes]:
    """Principal axes of what flows into each site. Sites that share their input share one object, computed once.

    Args:
        model: has all sites in it.
        sites: of kind linear, conv (its patches are the rows) or attention.
        batches: inputs of the model: mappings are passed by keyword. ``attention_mask`` and ``labels`` of the shape of the
            tokens leave out padding and tokens without a loss.
        keep: directions to keep, see `PrincipalAxes`.

    Raises:
        SpecError: nothing flowed into a site, or all its tokens were masked.
    """
    batches, apart = list(batches), set[str]()
    while True:
        watch = _Inputs(keep, apart)
        with undisturbed(model), torch.no_grad(), ExitStack() as hooks:
            for site in sites:
                handle = site.module.register_forward_pre_hook(watch.hook(site), with_kwargs=True)
                hooks.callback(handle.remove)
            for batch in batches:
                watch.masks, watch.last = _masks(model, batch), None
                call_model(model, batch)
        wrong = watch.not_shared()
        if not wrong:
            break
        apart |= wrong
    for site in sites:
        axes = watch.axes_of.get(site.path)
        if axes is None or axes.axes is None:
            raise SpecError(_nothing_seen(site, called=axes is not None))
    return watch.axes_of


class _Inputs:
    """Hooks that feed the inputs of sites into principal axes.

    A site whose input is the very tensor that the site before it got shares that site's axes. This is seen in the first call,
    and checked in all others: `not_shared` names those for which it did not stay true.
    """

    def __init__(self, keep: int, apart: set[str]) -> None:
        self.keep, self.apart = keep, apart
        self.masks: list[Tensor] = []
        self.axes_of: dict[str, PrincipalAxes] = {}
        self.leader: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.last: tuple[str, Tensor, int] | None = None
        self.wrong: set[str] = set()

    def hook(self, site: Site) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if site.kind == "attention":
                given = [*args[:3], *(kwargs.get(name) for name in ("query", "key", "value")[len(args) :])]
            else:
                given = [*args, *kwargs.values()][:1]
            self._see(site, [item for item in given if isinstance(item, Tensor)])

        return see

    def _see(self, site: Site, used: list[Tensor]) -> None:
        if not used:
            return
        path, x = site.path, used[0]
        self.calls[path] = self.calls.get(path, 0) + 1
        version = -1 if x.is_inference() else x._version
        shares = site.kind == "linear" and path not in self.apart
        before = self.last[0] if shares and self.last and self.last[1] is x and self.last[2] == version else path
        if path not in self.leader:
            self.leader[path] = before
            self.axes_of[path] = self.axes_of[before] if before != path else PrincipalAxes(self.keep)
        if self.leader[path] != path:
            if before != self.leader[path]:
                self.wrong.add(path)
            return
        self.last = (path, x, version) if site.kind == "linear" else None
        for item in dict.fromkeys(used):
            rows = _rows(site, item, self.masks)
            if rows.shape[0]:
                self.axes_of[path].add(rows)

    def not_shared(self) -> set[str]:
        """Sites that shared another one's input once, but not always."""
        return self.wrong | {path for path, leader in self.leader.items() if self.calls[path] != self.calls[leader]}


def _rows(site: Site, x: Tensor, masks: list[Tensor]) -> Tensor:
    """The rows (N, d_in) that A multiplies, without masked tokens."""
    if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _patches(site.module, x)
    if site.kind == "attention" and not getattr(site.module, "batch_first", True) and x.ndim == 3:
        x = x.transpose(0, 1)
    fitting = [mask for mask in masks if mask.shape == x.shape[:-1]]
    if fitting:
        x = x[fitting[-1 if "decoder" in site.path else 0].to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _patches(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """The patches that a convolution looks at: (N * positions, in_channels * prod(kernel))."""
    dimensions = len(conv.kernel_size)
    x = x if x.dim() == dimensions + 2 else x.unsqueeze(0)
    x = F.pad(
        x, conv._reversed_padding_repeated_twice, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode
    )
    for axis, (kernel, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    order = (0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions))
    return x.permute(order).flatten(0, dimensions).flatten(1)


def _masks(model: nn.Module, batch: Any) -> list[Tensor]:
    """Masks of the tokens that count, (rows, length): of the encoder (or only) sequence first, of a decoder's last."""
    if not isinstance(batch, Mapping):
        return []
    mask, labels, own = (_matrix(batch.get(name)) for name in ("attention_mask", "labels", "decoder_attention_mask"))
    mask = None if mask is None else mask.bool()
    kept = None if labels is None else labels != _IGNORED
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [item for item in (mask, kept if own is None else own.bool()) if item is not None]
    if mask is not None and kept is not None and mask.shape == kept.shape:
        return [mask & kept]
    return [item for item in (kept, mask) if item is not None]


def _matrix(value: Any) -> Tensor | None:
    """A (rows, length) tensor of whole numbers or truth values."""
    whole = isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()
    return value if whole else None


def _nothing_seen(site: Site, called: bool) -> str:
    if site.host is not None:
        return (
            f"init='eva': what flows into {site.path!r} can't be seen: {site.host!r} is an nn.MultiheadAttention, which uses "
            "this weight without calling the layer; exclude it or use another init"
        )
    why = "all its tokens are masked by attention_mask or labels" if called else "its forward was never called"
    return f"init='eva': no batch reached the site {site.path!r} ({why}); give batches that use it, exclude it, or use another init"


def collect_gradients(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Any], *, budget: int = 1 << 30
) -> Iterator[tuple[Site, Tensor]]:
    """Gradients of the mean loss by the weights of sites, summed in float32 and handed out one by one.

    Only as many sites as fit into ``budget`` are summed at a time, each time over all batches; a single weight's gradient is
    freed as soon as it is added.

    Args:
        model: has all sites in it; its output has a loss (``output.loss``, ``output["loss"]``, or is one number).
        sites: of any kind whose weight is floating point.
        batches: inputs of the model with labels.
        budget: bytes for the sums.

    Yields:
        site, and a gradient in the shape in which the weight is stored, float32 (float64 for a float64 base).

    Raises:
        SpecError: no loss, no gradient at a site, or a quantised weight.
        NotFiniteError: a loss or gradient that is NaN or infinite.
    """
    batches = list(batches)
    for group in _groups(sites, budget):
        sums = _summed(model, group, batches)
        for site in group:
            gradient = sums[id(site.weight)] / len(batches)
            if not bool(torch.isfinite(gradient).all()):
                raise NotFiniteError(
                    f"init='lora_ga': the gradient at {site.path!r} is NaN or infinite on the batches that were given"
                )
            yield site, gradient


def _groups(sites: Sequence[Site], budget: int) -> Iterator[list[Site]]:
    group, used = list[Site](), 0
    for site in sites:
        size = site.weight.numel() * (8 if site.weight.dtype == torch.float64 else 4)
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(site)
        used += size
    if group:
        yield group


def _summed(model: nn.Module, group: list[Site], batches: list[Any]) -> dict[int, Tensor]:
    """Sum over batches of the gradients of some weights, by the weight's identity."""
    sums: dict[int, Tensor] = {}

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        found = weight.grad.detach().to_dense() if weight.grad.is_sparse else weight.grad.detach()
        wide = found.to(torch.float64 if found.dtype == torch.float64 else torch.float32)
        sums[id(weight)] = sums[id(weight)].add_(wide) if id(weight) in sums else wide.clone()
        weight.grad = None

    with undisturbed(model), torch.enable_grad(), ExitStack() as hooks:
        for weight in {id(site.weight): site.weight for site in group}.values():
            if not weight.is_floating_point():
                raise SpecError(
                    f"init='lora_ga': a weight of {weight.dtype} has no gradient (quantised base); use another init"
                )
            weight.requires_grad_(True)
            handle = weight.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
            hooks.callback(handle.remove)
        for batch in batches:
            loss = loss_of(call_model(model, batch))
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
    for site in group:
        if id(site.weight) not in sums:
            raise SpecError(
                f"init='lora_ga': no gradient reached {site.path!r}; give batches that use it, exclude it, or switch off the adapter "
                "that is in use (bank.use(None))"
            )
    return sums


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model on one batch, a mapping or arguments in order, moved to its device."""
    device = next(
        (parameter.device for parameter in model.parameters() if parameter.device.type != "meta"), torch.device("cpu")
    )

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: move(value) for name, value in batch.items()})
    return model(*(move(value) for value in batch)) if isinstance(batch, tuple | list) else model(move(batch))


def loss_of(output: Any, asker: str = "init='lora_ga'") -> Tensor:
    """The loss in a model's output, one number.

    Args:
        output: has a loss (``output.loss``, ``output["loss"]``), or is one number.
        asker: who needs it, for messages.

    Raises:
        SpecError: no loss. NotFiniteError: a loss that is NaN or infinite.
    """
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise SpecError(f"{asker} needs a loss, and the model's output has none: give batches with 'labels'")
    if not bool(torch.isfinite(found)):
        raise NotFiniteError(f"{asker}: the loss of a batch is {float(found.detach())}; expected a finite number")
    return found.reshape(())
