"""Tests of weft. `tests.models` builds tiny models, `tests.tolerances` says how close is close."""
