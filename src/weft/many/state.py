"""Checkpoints of a many-run: all adapters at once, complete or not there.

One file of tensors (factors and moments of who is in the bank or parked, best factors) and one of plain data. A resumed run is
where the run was after that round, and does from there what it would have done. This module does not know engines' insides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.errors import RunError
from weft.many.member import Best, Course, Member
from weft.many.ranking import plain, restore
from weft.many.rounds import Rounds
from weft.train import checkpoints
from weft.train.run import plain_json, write_beside

__all__ = ["resume", "save"]

STATE = "state.safetensors"


def save(rounds: Rounds, folder: Path, done: dict[str, dict[str, Any]]) -> Path:
    """Write a checkpoint of the round just done.

    Args:
        done: rows of the report of those who have left.
    """
    tensors: dict[str, Tensor] = {}
    everybody = [*rounds.active, *(item.member for item in (*rounds.parked, *rounds.back))]
    for member in rounds.active:
        tensors |= {f"{member.key}/now/{name}": tensor for name, tensor in rounds.engine.state(member.key).items()}
    for item in (*rounds.parked, *rounds.back):
        tensors |= {f"{item.member.key}/now/{name}": tensor for name, tensor in item.state.items()}
    for member in everybody:
        best = member.best.factors if member.best is not None else {}
        tensors |= {f"{member.key}/best/{name}": tensor for name, tensor in best.items()}
        held = member.ranks.tensors() if member.ranks is not None else {}
        tensors |= {f"{member.key}/ranks/{name}": tensor.cpu() for name, tensor in held.items()}
    values = {
        "round": rounds.number, "tokens": rounds.tokens, "seconds": rounds.seconds, "waiting": rounds.waiting, "done": done,
        "active": [_plain(member, rounds.sizes(member)) for member in rounds.active],
        "parked": [_plain(item.member, item.sizes) for item in rounds.parked],
        "back": [_plain(item.member, item.sizes) for item in rounds.back],
    }  # fmt: skip
    checkpoints.clean(folder)
    target = checkpoints.beside(folder, rounds.number)
    target.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, target / STATE, metadata={"format": "pt"}
    )
    write_beside(target / checkpoints.TRAINER_STATE, json.dumps(plain_json(values)) + "\n")
    path = checkpoints.publish(folder, rounds.number)
    checkpoints.rotate(folder, 1, None)
    return path


def resume(rounds: Rounds, folder: Path, reopen: Callable[[str], Member]) -> dict[str, dict[str, Any]] | None:
    """Bring rounds to where the newest checkpoint was written.

    Args:
        reopen: reads a user's data again, and checks that they are the same.

    Returns:
        rows of the report of those who had left; None: there is no checkpoint, so the run begins anew.

    Raises:
        RunError: the checkpoint can't be read.
    """
    checkpoints.clean(folder)
    newest = checkpoints.newest(folder)
    if newest is None:
        return None
    try:
        tensors = load_file(newest / STATE)
        read = json.loads((newest / checkpoints.TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{newest}: this checkpoint can't be read: {error}; remove its folder to begin anew") from error
    split: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, kind, rest = name.split("/", 2)
        split.setdefault((key, kind), {})[rest] = tensor
    rounds.number, rounds.tokens, rounds.seconds = read["round"], read["tokens"], read["seconds"]
    rounds.waiting = list(read["waiting"])
    for values in read["active"]:
        member = _member(values, reopen, split)
        rounds.come_in(member, split[member.key, "now"], values.get("sizes", {}))
        _decide_as_before(member, values, split)
    for kind, list_ in (("parked", rounds.parked), ("back", rounds.back)):
        for values in read[kind]:
            member = _member(values, reopen, split)
            rounds.come_in(member, split[member.key, "now"], values.get("sizes", {}))
            _decide_as_before(member, values, split)
            list_.append(rounds.take_out(member, split[member.key, "now"]))
    done: dict[str, dict[str, Any]] = read["done"]
    return done


def _plain(member: Member, sizes: Mapping[str, Any]) -> dict[str, Any]:
    best = member.best
    found: dict[str, Any] = {"name": member.name, "due": member.due, "course": member.course.to_dict(), "best": None}
    if best is not None:
        found["best"] = {"metric": best.metric, "step": best.step, "metrics": best.metrics, "rows": member.best_rows, "sizes": best.sizes}  # fmt: skip
    if member.ranks is not None:
        found |= {"sizes": sizes, "ranks": plain(member.ranks)}
    return found


def _decide_as_before(
    member: Member, values: Mapping[str, Any], split: Mapping[tuple[str, str], dict[str, Tensor]]
) -> None:
    """What changes a member's ranks, as it was."""
    if member.ranks is not None:
        restore(member.ranks, values["ranks"], split.get((member.key, "ranks"), {}))


def _member(
    values: dict[str, Any], reopen: Callable[[str], Member], split: dict[tuple[str, str], dict[str, Tensor]]
) -> Member:
    member = reopen(values["name"])
    member.due, member.course = values["due"], Course(**values["course"])
    best = values["best"]
    if best is not None:
        factors = split.get((member.key, "best"), {})
        member.best = Best(best["metric"], best["step"], best["metrics"], factors, best.get("sizes", {}))
        member.best_rows = best["rows"]
    return member
