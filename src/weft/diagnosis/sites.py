"""Rules about sites: rank, sites that don't move, one that dominates."""

from __future__ import annotations

__all__: list[str] = []
