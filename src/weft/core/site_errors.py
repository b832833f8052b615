"""What to say about targets that match nothing or match the wrong thing: near misses, and what could be meant.

This module decides nothing: `weft.core.sites` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from weft.core.patterns import Names
from weft.core.tree import Node, walk
from weft.errors import did_you_mean, some_names

__all__ = ["linears", "lost_message", "unfit_message"]


def linears(nodes: Sequence[Node]) -> str:
    """A sentence that lists the linear layers, each name once, in model order."""
    names = dict.fromkeys(
        node.path.rpartition(".")[2] for node in nodes if node.kind in ("linear", "conv1d") and node.path
    )
    return f" Linear layers here: {some_names(names, 12)}." if names else " There are no linear layers here."


def lost_message(names: Names, nodes: Sequence[Node]) -> str:
    """Entries of one field that yielded nothing: why, or the names that come near."""
    parameters = {node.path_of(name): parameter for node in nodes for name, parameter in node.parameters()}
    paths = [*parameters, *(path for node in nodes for path in node.paths)]
    known = {".".join(path.split(".")[-count:]) for path in paths for count in (1, 2)}
    lost, parts = names.unmatched(), []
    for entry in lost:
        why = names.reason(entry)
        parts.append(
            f"{entry!r} yields nothing: {why}." if why else f"{entry!r} matches nothing.{did_you_mean(entry, known)}"
        )
    message = f"LoraSpec.{names.field}: {' '.join(parts)}"
    if names.regex is not None:
        message += (
            f" A string is one regular expression over whole paths; a list, [{lost[0]!r}], holds names and suffixes."
        )
    elif names.field == "exclude" and any(names.reason(entry) for entry in lost):
        expression = rf"(.*\.)?({'|'.join(re.escape(entry) for entry in names.entries)})(\..*)?"
        message += f" To exclude all inside of it: exclude={expression!r}."
    bare = [e for e in lost if any(f".{path}".endswith(f".{e}") and p.ndim in (2, 3) for path, p in parameters.items())]
    if names.field == "targets" and bare:
        message += f" {some_names(bare)}: a bare parameter is named by target_parameters."
    return message if names.field == "exclude" else message + linears(nodes)


def unfit_message(unfit: Mapping[str, nn.Module], nodes: Sequence[Node]) -> str:
    """Modules that were named and can't be adapted, one for each name, and what could be meant."""
    parts: dict[str, str] = {}
    for path, module in unfit.items():
        tail = path.rpartition(".")[2]
        if tail not in parts:
            inside = walk(module)
            names = dict.fromkeys(
                node.path.rpartition(".")[2] for node in inside if node.kind is not None and node.path
            )
            bare = [f"{tail}.{name}" for name, parameter in inside[0].parameters() if parameter.ndim in (2, 3)]
            hint = f" (did you mean {some_names(names, 8)} inside of it?)" if names else ""
            hint += f" (its parameters are named by target_parameters={bare})" if bare else ""
            parts[tail] = f"{path!r} is {'a container, ' if module._modules else 'a '}{type(module).__name__}{hint}"
    return (
        f"LoraSpec.targets names {len(unfit)} modules that can't be adapted: {'; '.join(list(parts.values())[:6])}. "
        f"Linear, Conv1D, Conv1d/2d/3d, Embedding and MultiheadAttention can.{linears(nodes)}"
    )
