"""Rules about throughput: padding, waiting for batches."""

from __future__ import annotations

__all__: list[str] = []
