"""Models from configurations that exist nowhere here: as many parameters as are known of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.errors import BaseError
from weft.plan.skeleton import find_config, skeleton

LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 2 7B": (LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                            "vocab_size": 32000}, 6_738_415_616),
    "Llama 2 70B": (LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                             "num_key_value_heads": 8, "vocab_size": 32000}, 68_976_648_192),
    "Mistral 7B": ({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000,
                    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}, 7_241_732_096),
    "Qwen 2.5 7B": ({"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064,
                     "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}, 7_615_616_512),
    "Gemma 2B": ({"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "vocab_size": 256000,
                  "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True}, 2_506_172_416),
    "Mixtral 8x7B": ({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "tie_word_embeddings": False}, 46_702_792_704),
    "GPT-2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, 124_439_808),
    "BERT base": ({"model_type": "bert", "architectures": ["BertModel"]}, 109_482_240),
    "T5 small": ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 512, "d_ff": 2048, "num_layers": 6,
                  "num_heads": 8, "vocab_size": 32128}, 60_506_624),
    "ViT base": ({"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_labels": 1000}, 86_567_656),
    "CLIP B/32": ({"model_type": "clip", "architectures": ["CLIPModel"]}, 151_277_313),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_that_are_known(name: str) -> None:
    config, count = KNOWN[name]
    model = skeleton(find_config(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_directory_a_file_and_a_dict_are_the_same(tmp_path: Path) -> None:
    values = LLAMA | {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    found = [
        find_config(base) for base in (tmp_path, str(tmp_path), tmp_path / "config.json", values, find_config(values))
    ]
    assert len({json.dumps(config.to_dict(), default=str, sort_keys=True) for config in found}) == 1
    assert str(next(skeleton(found[0]).parameters()).dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"hidden_size": 3}, "no 'model_type'"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "configuration"),
        ("/no/such/folder", "there is no directory or config.json"),
    ],
)
def test_what_is_no_base_is_refused(base: Any, message: str) -> None:
    with pytest.raises(BaseError, match=message):
        skeleton(find_config(base))
