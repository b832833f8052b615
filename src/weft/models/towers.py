"""One spec for several towers: each gets what it knows of it, and its usual sites where nothing is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from weft.core.patterns import Names
from weft.errors import TargetError, did_you_mean
from weft.models.targets import DEFAULT_TARGETS
from weft.spec import LoraSpec

__all__ = ["sites_of_images", "spread_spec", "usual_sites"]


def usual_sites(tower: nn.Module) -> str | tuple[str, ...]:
    """What is adapted in a tower if nobody says: the architecture's usual sites; all convolutions but the first; or all linear layers."""
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    if kind in DEFAULT_TARGETS:
        return "default"
    convs = [path for path, module in tower.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    return tuple(convs[1:]) if len(convs) > 2 else "all-linear"


def sites_of_images(model: nn.Module, spec: LoraSpec) -> LoraSpec:
    """``"all-linear"`` on a network of convolutions, whose only linear layer is the classifier, means its usual sites."""
    if spec.towers or spec.targets != "all-linear":
        return spec
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return spec.replace(targets=usual_sites(model)) if len(linear) <= 1 < convs else spec


def spread_spec(
    model: nn.Module, spec: LoraSpec, towers: Sequence[str], frozen: Sequence[str], heads: tuple[str, ...]
) -> LoraSpec:
    """A spec by tower.

    Args:
        spec: by tower already; or one for all, whose target names are looked up in each tower (default targets: `usual_sites`).
        towers: names of the parts. frozen: those that get no factors.
        heads: modules outside of the towers to train whole.

    Raises:
        TargetError: a name that is in no tower.
    """
    whole = tuple(dict.fromkeys((*spec.save_modules, *heads)))
    if spec.towers:
        named = {name: own for name, own in spec.towers.items() if name not in frozen}
        return LoraSpec(towers=named, save_modules=whole) if named else LoraSpec(targets=(), save_modules=whole)
    plain = spec.replace(save_modules=())
    live = [name for name in towers if name not in frozen]
    found: dict[str, LoraSpec] = {}
    for name in live:
        tower = model.get_submodule(name)
        targets = usual_sites(tower) if plain.targets == "all-linear" else _present(plain.targets, tower)
        if targets:
            found[name] = plain.replace(targets=targets)
    if not isinstance(plain.targets, str):
        lost = [
            entry for entry in plain.targets if not any(_present((entry,), model.get_submodule(name)) for name in live)
        ]
        if lost:
            there = {
                part
                for name in live
                for path, _ in model.get_submodule(name).named_modules()
                for part in path.split(".")[-1:]
            }
            raise TargetError(
                f"LoraSpec.targets: {lost[0]!r} is in none of the towers {', '.join(live)}.{did_you_mean(lost[0], there)}"
            )
    return LoraSpec(towers=found, save_modules=whole) if found else LoraSpec(targets=(), save_modules=whole)


def _present(targets: str | tuple[str, ...], tower: nn.Module) -> str | tuple[str, ...]:
    """The names that a tower has; an expression or a keyword stays."""
    if isinstance(targets, str):
        return targets
    paths: Iterable[str] = [path for path, _ in tower.named_modules()]
    return tuple(entry for entry in targets if any(Names("targets", (entry,)).find(path) for path in paths))
