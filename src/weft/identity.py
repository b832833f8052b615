"""Who is who: the fingerprint of a base and the digest of an adapter.

Two bases with the same fingerprint give the same numbers for the same input; two adapters with the same digest are
the same adapter. Knows torch, not transformers: a config is anything with ``to_dict``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from weft.hashes import WORKERS

__all__ = ["Fingerprint", "TensorHashes", "digest_of", "fingerprint", "hash_tensor"]

SAMPLE_ABOVE = 1 << 31
"""A base of more numbers than this is sampled: 1 MiB evenly spread over each tensor. Numbers, not bytes, so that one base is
treated alike at every precision."""

_SAMPLE_BYTES = 1 << 20
_VOLATILE = frozenset({"_name_or_path", "pad_token_id", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures",
                       "_attn_implementation_autoset", "_attn_implementation", "attn_implementation", "_commit_hash"})  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a base model.

    Attributes:
        architecture: class name of the model.
        config: sha256 over the configuration, without fields that don't change the numbers; empty without one.
        layout: sha256 over names and shapes of all weights.
        weights: sha256 over the bytes of all weights, in the order of their names.
        dtype: dtype of the largest share of the weights, as text.
        rounded: like ``weights``, over values rounded to bfloat16: one base, loaded at another precision, keeps it.
        sampled: only a sample of the bytes was hashed (huge models).
        name: what it was loaded from; for people, not compared.
        commit: hub commit, where there was one; for people, not compared.
    """

    architecture: str
    config: str
    layout: str
    weights: str
    dtype: str
    rounded: str = ""
    sampled: bool = False
    name: str | None = None
    commit: str | None = None

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, in words; empty if both are the same base."""
        found = []
        for field, meaning in (("architecture", "model class"), ("config", "configuration"),
                               ("layout", "names or shapes of weights")):  # fmt: skip
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                found.append(f"{meaning}: {_short(mine)} here, {_short(theirs)} there")
        if self.dtype != other.dtype:
            found.append(f"dtype of the weights: {self.dtype} here, {other.dtype} there")
        elif (self.weights, self.sampled) != (other.weights, other.sampled):
            found.append(f"bytes of the weights: {_short(self.weights)} here, {_short(other.weights)} there")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The inverse of `to_dict`; keys of later versions are dropped."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known)


def fingerprint(model: nn.Module, weights: Iterable[tuple[str, Tensor]] | None = None) -> Fingerprint:
    """Fingerprint of a base model.

    Args:
        model: the base; its ``config``, ``name_or_path`` and commit are used where they exist.
        weights: the (name, tensor) pairs that are the base; default: the model's parameters and persistent buffers.
            A bank passes its own list, so that factors and trained copies don't count.

    Returns:
        The fingerprint; hashing costs about a second a gigabyte. Above `SAMPLE_ABOVE` it is sampled, and says so.
    """
    named = sorted(weights if weights is not None else model.state_dict().items(), key=lambda item: item[0])
    sampled = sum(tensor.numel() for _, tensor in named) > SAMPLE_ABOVE
    layout, content, rounded = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    by_dtype: dict[str, int] = {}
    seen: dict[Any, tuple[str, str]] = {}
    for name, tensor in named:
        layout.update(f"{name}:{tuple(tensor.shape)};".encode())
        dtype = str(tensor.dtype).removeprefix("torch.")
        by_dtype[dtype] = by_dtype.get(dtype, 0) + tensor.numel()
        stored = tensor.device.type != "meta" and tensor.numel() > 0
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if stored else name
        if key not in seen:
            short = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            seen[key] = hash_tensor(tensor, sample=sampled), hash_tensor(short, sample=sampled)
        content.update(f"{name}:{seen[key][0]};".encode())
        rounded.update(f"{name}:{seen[key][1]};".encode())
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
    return Fingerprint(
        architecture=type(model).__name__,
        config=_hash_json(_settled(settings)) if settings else "",
        layout=layout.hexdigest(),
        weights=content.hexdigest(),
        dtype=max(by_dtype, key=lambda dtype: by_dtype[dtype]) if by_dtype else "none",
        rounded=rounded.hexdigest(),
        sampled=sampled,
        name=getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or None,
        commit=getattr(config, "_commit_hash", None),
    )


class TensorHashes:
    """sha256 of tensors' bytes, each computed once however often it is asked for, by threads.

    For the time of one writing or reading, in which nobody changes a tensor: bytes are known by where they are.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, "weft-hash")
        self._known: dict[Any, tuple[Tensor, Future[str]]] = {}  # the tensor, so that its place stays its own

    def __enter__(self) -> TensorHashes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def ask(self, tensor: Tensor) -> Future[str]:
        """The hash of a tensor's bytes, see `hash_tensor`, as soon as it is known."""
        key: Any = id(tensor)
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            key = (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        if key not in self._known:
            self._known[key] = tensor, self._pool.submit(hash_tensor, tensor)
        return self._known[key][1]


def digest_of(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], hashes: TensorHashes | None = None) -> str:
    """Content address: sha256 over named tensors (name, dtype, shape, bytes) and plain facts.

    Args:
        hashes: where hashes of these tensors are known, or are computed for others as well.
    """
    asked = {name: hashes.ask(tensor) for name, tensor in tensors.items()} if hashes is not None else {}
    total = hashlib.sha256(_hash_json(facts).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = asked[name].result() if asked else hash_tensor(tensor)
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{found};".encode())
    return total.hexdigest()


def hash_tensor(tensor: Tensor, sample: bool = False) -> str:
    """sha256 over a tensor's bytes (row-major), or over an even sample of one mebibyte of them."""
    if tensor.device.type == "meta":
        return "meta"
    flat = tensor.detach().reshape(-1)
    if sample and flat.numel() * flat.element_size() > _SAMPLE_BYTES:
        step = max(1, flat.numel() * flat.element_size() // _SAMPLE_BYTES)
        flat = flat[::step]
    raw = flat.cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _settled(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {str(key): _settled(value) for key, value in settings.items() if key not in _VOLATILE}
    return settings


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _short(text: str) -> str:
    return text[:12] if len(text) == 64 else text
