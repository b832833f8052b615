"""Rules about data: copies between training and evaluation, truncation, empty answers, one label, prompts that are learned."""

from __future__ import annotations

__all__: list[str] = []
