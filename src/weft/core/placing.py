"""What a bank puts into a model and takes out again: states at sites, slots, biases, whole copies, groups, and the surroundings.

Putting is idempotent by site: an adapter whose sites are all placed already costs nothing of the model's size. This module does not
know adapters or routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weft.core import loading
from weft.core.attention import place_attention
from weft.core.by_parts import BiasSite
from weft.core.groups import form_groups
from weft.core.layers import mixin_for
from weft.core.ring import Ring
from weft.core.site import Site
from weft.core.slots import Placed, State, hold, let_go, place, restore, slot_key
from weft.core.surroundings import Surroundings
from weft.core.whole import copy_whole, place_whole, tie_copies

__all__ = ["Ground", "child_key", "state_of"]


class Ground:
    """A model with weft's sites in it.

    Attributes:
        placed: sites by path. owners: modules that have a state, by path. ring: of all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ring = Ring()
        self.placed: dict[str, Placed] = {}
        self.owners: dict[str, nn.Module] = {}
        self._blocks: list[nn.Module] = []
        self._surroundings = Surroundings(model)
        self._handles: list[Any] = []

    def freeze(self) -> None:
        """Freeze the base, once."""
        self._surroundings.freeze()

    def site(self, site: Site) -> Placed:
        """Put a site's state into the model, or find it there."""
        found = self.placed.get(site.path)
        if found is not None:
            return found
        properties = (site.weight_name,) if site.kind == "parameter" else ()
        state = place(site.module, mixin_for(site.kind), properties, site.owner, self.ring)
        self.owners.setdefault(site.owner, site.module)
        if site.kind == "attention" or site.host is not None:
            host = site.owner if site.host is None else site.host
            self.owners.setdefault(host, place_attention(self.model.get_submodule(host), host, self.ring))
        found = self.placed[site.path] = state.sites[site.weight_name] = Placed(site, self.ring)
        return found

    def bias(self, path: str, value: Tensor | None, key: str, trainable: bool) -> nn.Parameter:
        """An adapter's own bias beside the base's, started from ``value`` or from the base's."""
        owner_path, _, leaf = path.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        base = owner._parameters[leaf]
        assert base is not None
        place(owner, BiasSite if leaf == "bias" and ends_in_bias(owner) else None, (leaf,), owner_path, self.ring)
        self.owners.setdefault(owner_path, owner)
        like = base if value is None else value
        mine = nn.Parameter(like.detach().to(base.device, loading.wide(base.dtype)).clone(), requires_grad=trainable)
        holder = owner._modules.get("weft")
        child = holder._modules.get(f"{key}:biases") if holder is not None else None
        if child is None:
            child = nn.Module()
            hold(owner, f"{key}:biases", child)
        child.register_parameter(leaf, mine)
        return mine

    def whole(
        self, name: str, paths: tuple[str, ...], tensors: Mapping[str, Mapping[str, Tensor]] | None, trainable: bool
    ) -> dict[str, nn.Module]:
        """An adapter's own copies of modules, by path; filled from ``tensors`` where there are any."""
        pairs, copies = [], {}
        for path in paths:
            module = self.model.get_submodule(path)
            clone = copy_whole(module).requires_grad_(trainable)
            if tensors is not None:
                loading.fill_whole(clone, tensors[path], path)
            pairs.append((module, clone))
            copies[path] = clone
        tie_copies(pairs)
        for path, (module, clone) in zip(paths, pairs, strict=True):
            place_whole(module, path, self.ring).whole[name] = clone
            self.owners.setdefault(path, module)
            hold(module, slot_key(name), clone)
        return copies

    def settle(self) -> None:
        """After new sites: group those that share an input, close fast paths that would go around them."""
        parents: dict[str, dict[str, tuple[nn.Module, Placed]]] = {}
        for path, placed in self.placed.items():
            if placed.site.kind == "linear" and placed.site.host is None:
                parent, _, child = path.rpartition(".")
                parents.setdefault(parent, {})[child] = (placed.site.module, placed)
        known = {id(block) for block in self._blocks}
        self._blocks += [block for block in form_groups(self.model, parents) if id(block) not in known]
        self._surroundings.guard(self.owners)

    def drop_whole(self, name: str, path: str) -> None:
        """Take an adapter's copy of a module out."""
        owner = self.owners.get(path)
        if owner is not None and state_of(owner).whole.pop(name, None) is not None:
            let_go(owner, slot_key(name))

    def drop_bias(self, name: str, path: str) -> None:
        """Take an adapter's own bias out."""
        let_go(self.owners[path.rpartition(".")[0]], f"{slot_key(name)}:biases")

    def watch_calls(self) -> None:
        """From now on routes know how many rows the batch of a call has; once."""
        if self._handles:
            return

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.ring.begin(args, kwargs)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.ring.end()

        self._handles = [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self.model.register_forward_hook(end, always_call=True),
        ]

    def restore(self) -> None:
        """Give back the model that was there."""
        for module in (*self.owners.values(), *self._blocks):
            restore(module)
        for handle in self._handles:
            handle.remove()
        self.owners, self._blocks, self.placed, self._handles = {}, [], {}, []
        self._surroundings.restore()


def state_of(module: nn.Module) -> State:
    """weft's state of a module that has one."""
    state = module.__dict__["_weft"]
    assert isinstance(state, State)
    return state


def child_key(key: str, weight_name: str) -> str:
    """Name of a slot in the module tree."""
    return key if weight_name == "weight" else f"{key}:{weight_name}"


_ENDING = (
    nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm,
    nn.modules.conv._ConvNd,
)  # fmt: skip


def ends_in_bias(module: nn.Module) -> bool:
    """Whether the last thing that a layer does is to add its bias."""
    return isinstance(module, _ENDING) or any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
