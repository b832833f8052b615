"""Rules about optimizer steps: learning rate, clipping, warm-up, underflow."""

from __future__ import annotations

__all__: list[str] = []
