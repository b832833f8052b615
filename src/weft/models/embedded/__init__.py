"""The embedded base: a small Llama of weft's own, in Hugging Face layout, as files of this package.

How it was made and what it can do is in ``docs/embedded-base.md``; ``scripts/train_embedded_base`` makes it again.
"""

from pathlib import Path

PATH = Path(__file__).resolve().parent
"""The folder with ``config.json``, ``model.safetensors`` and the tokenizer."""
