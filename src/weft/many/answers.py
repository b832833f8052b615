"""Answers to many requests in one batch, each by its own adapter, by the base, or by an exact mixture.

Stands on the bank's routes and the model's own ``generate``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.adapter import Adapter
from weft.data import read_table
from weft.errors import BankError, DataError, did_you_mean, some_names
from weft.formats import load
from weft.many.folder import ManyFolder, failure
from weft.models.attach import attach
from weft.train.generation import Prompt, Sampling, continue_tokens, encode_as
from weft.train.opening import BaseLike, open_base, trained_format

__all__ = ["Request", "answer", "find_adapters", "read_requests"]

Source = Adapter | str | os.PathLike[str]


@dataclass(frozen=True)
class Request:
    """A prompt and who answers it.

    Attributes:
        prompt: text, or a list of messages.
        adapter: a name; None: the base; or weights by name: their exact mixture.
        row: what else stands in the request; is handed back.
    """

    prompt: Prompt
    adapter: str | Mapping[str, float] | None = None
    row: Mapping[str, Any] | None = None


def answer(
    *,
    base: BaseLike = None,
    adapters: Mapping[str, Source],
    requests: Sequence[Request],
    chat: bool | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
    allow_other_base: bool = False,
) -> list[str]:
    """Answers in the order of the requests; a batch holds rows of any adapters.

    Args:
        base: as in `weft.train`.
        adapters: by the names that requests use; those that no request names are not loaded.
        chat: put texts into the chat template; None: as the row's adapter was trained.
        batch_size: rows at once.

    Raises:
        BankError: a request names an adapter that was not given. DataError: an empty prompt.
        BaseMismatchError: an adapter was made for another base.
    """
    wanted = _wanted(requests, adapters)
    model, tokenizer = open_base(base, dtype=dtype)
    if not isinstance(base, tuple):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    values: dict[str, Adapter] = {}
    for name in wanted:
        source = adapters[name]
        values[name] = source if isinstance(source, Adapter) else _load(name, source)
    formats = {name: trained_format(value) for name, value in values.items()}
    with _bank(model, values, allow_other_base) as (bank, slots):
        tokens = [
            encode_as(model, tokenizer, formats.get(_first(request), {}), [request.prompt], chat)[0]
            for request in requests
        ]
        entries = [_entry(request.adapter, slots) for request in requests]
        found = continue_tokens(
            model, tokenizer, tokens, sampling or Sampling(), batch_size,
            routed=lambda chosen: bank.route([entries[index] for index in chosen]),
        )  # fmt: skip
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def _load(name: str, source: str | os.PathLike[str]) -> Adapter:
    """The adapter in a folder; of one whose training failed it is said why."""
    why = failure(source)
    if why:
        raise BankError(f"there is no adapter {name!r}: its training failed: {why}")
    return load(source)


@contextlib.contextmanager
def _bank(model: Any, values: Mapping[str, Adapter], allow_other_base: bool) -> Iterator[tuple[Any, dict[str, str]]]:
    """A bank with these adapters for a time, on a model that may have one already."""
    bank = model.__dict__.get("_weft_bank")
    own = bank is None
    bank = attach(model, {}) if bank is None else bank
    slots: dict[str, str] = {}
    try:
        for name, value in values.items():
            slot = f"answers/{name}"
            bank.load(slot, value, allow_other_base=allow_other_base)
            slots[name] = slot
        yield bank, slots
    finally:
        if own:
            bank.detach()
        else:
            for slot in slots.values():
                bank.drop(slot)


def _wanted(requests: Sequence[Request], adapters: Mapping[str, Source]) -> list[str]:
    """Names that requests use, in their order.

    Raises:
        BankError: one that was not given.
    """
    found: list[str] = []
    for number, request in enumerate(requests, 1):
        names = [request.adapter] if isinstance(request.adapter, str) else list(request.adapter or ())
        for name in names:
            if name not in adapters:
                hint = did_you_mean(name, adapters)
                raise BankError(
                    f"request {number} asks for adapter {name!r}, which was not given.{hint} There are: {some_names(adapters) or 'none'}"
                )
            found.append(name)
    return list(dict.fromkeys(found))


def _first(request: Request) -> str:
    names = [request.adapter] if isinstance(request.adapter, str) else list(request.adapter or ())
    return names[0] if names else ""


def _entry(adapter: str | Mapping[str, float] | None, slots: Mapping[str, str]) -> Any:
    if isinstance(adapter, Mapping):
        return {slots[name]: weight for name, weight in adapter.items()}
    return None if adapter is None else slots[adapter]


def find_adapters(given: Sequence[str]) -> dict[str, str]:
    """Adapters by name, as the command line gives them: ``"alice=DIR"``, or the folder of a many-run for all in it.

    Raises:
        DataError: neither; or a name twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        folder = ManyFolder(text)
        if folder.users.is_file():
            users = {user: str(folder.root / key) for user, key in folder.read_users()[0].items()}
        elif equals and name and path:
            users = {name: path}
        else:
            raise DataError(f"{text!r} names no adapter; expected NAME=DIR, or the folder that weft train-many wrote")
        for user, place in users.items():
            if user in found:
                raise DataError(f"two adapters are called {user!r}: {found[user]} and {place}")
            found[user] = place
    return found


def read_requests(source: Any) -> list[Request]:
    """Requests from JSON lines: ``{"prompt": …, "adapter": "alice" | null | {"alice": 0.7, "bob": 0.3}}``.

    Raises:
        DataError: names the line.
    """
    table = read_table(source)
    found = []
    for index, row in enumerate(table.rows):
        prompt, adapter = row.get("prompt", row.get("messages")), row.get("adapter")
        if not isinstance(prompt, str | list) or not prompt:
            raise DataError(f'{table.where(index)}: expected a text under "prompt" (or messages), got {_short(prompt)}')
        weights = isinstance(adapter, Mapping) and adapter and all(map(_is_weight, adapter.values()))
        if adapter is not None and not isinstance(adapter, str) and not weights:
            raise DataError(
                f'{table.where(index)}: "adapter" is {_short(adapter)}; expected a name, null for the base, or weights by name'
            )
        found.append(Request(prompt, adapter, row))
    return found


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) < 60 else text[:60] + "…"
