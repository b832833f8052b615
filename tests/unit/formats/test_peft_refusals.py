"""What of PEFT's directories is refused, and what the refusal says: other methods, other features, fields of the wrong type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.formats.support import SMALLEST, folder, pair
from weft.errors import FormatError, UnsupportedError
from weft.formats.peft import read

Q = "model.layers.0.q_proj"


def config(**fields: Any) -> dict[str, Any]:
    return {**SMALLEST, **fields}


OTHER_METHODS = [
    ("base_model.model.x.lora_E", "AdaLoRA"), ("base_model.model.x.lora_diag", "KaSA"), ("base_model.model.x.token_adapter.trainable_tokens_delta", "trainable tokens"),
    ("base_model.model.x.hada_w1_a", "LoHa"), ("base_model.model.x.lokr_w1", "LoKr"), ("base_model.model.x.ia3_l", "IA3"), ("prompt_embeddings", "prompt tuning"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "method"), OTHER_METHODS)
def test_tensors_of_other_methods(key: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=method) as caught:
        read(folder(tmp_path, pair(Q) | {key: torch.ones(3)}))
    assert caught.value.key == key


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "IA3", "ADALORA", "LOHA", "XLORA", "WHATEVER"])
def test_other_methods(method: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"this is {method}, not LORA") as caught:
        read(folder(tmp_path, None, {"peft_type": method}))
    assert caught.value.key == "peft_type"
    assert caught.value.path.endswith("adapter_config.json")


FEATURES = {
    "use_qalora": True, "layer_replication": [[0, 2]], "megatron_config": {"a": 1}, "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 3},
    "use_bdlora": {"a": 1}, "kasa_config": {"beta": 1}, "monteclora_config": {"num_samples": 8}, "trainable_token_indices": [1],
}  # fmt: skip


@pytest.mark.parametrize("field", FEATURES)
def test_features_that_weft_has_not(field: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="which weft has not: ") as caught:
        read(folder(tmp_path, pair(Q), config(**{field: FEATURES[field]})))
    assert caught.value.key == field


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "PiSSA"])
def test_starts_that_rewrote_the_base(start: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="wrote the start of this adapter into its base") as caught:
        read(folder(tmp_path, pair(Q), config(init_lora_weights=start)))
    assert caught.value.key == "init_lora_weights"
    assert ("base=model" in str(caught.value)) == (start.lower() in ("pissa", "olora"))


FIELDS: list[tuple[str, Any]] = [
    ("r", 0), ("r", -4), ("r", 4.5), ("r", "4"), ("r", True), ("r", [4]), ("lora_alpha", "8"), ("lora_alpha", 0), ("lora_alpha", [8]), ("lora_alpha", 10**400), ("r", 10**400), ("rank_pattern", {"q": 10**400}),
    ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("target_modules", 3), ("target_modules", [3]), ("target_modules", [""]), ("target_modules", "(("),
    ("target_modules", {"a": 1}), ("target_modules", "a" * 70_000), ("modules_to_save", "score"), ("modules_to_save", [None]), ("bias", "some"), ("bias", ["none"]),
    ("rank_pattern", {"q": 0}), ("rank_pattern", {"(": 2}), ("alpha_pattern", {"(?i)Q": 2}), ("rank_pattern", [1]), ("alpha_pattern", {"q": "x"}), ("layers_to_transform", [-1]),
    ("layers_to_transform", "0"), ("layers_pattern", 7), ("use_dora", "yes"), ("use_rslora", 1), ("lora_bias", None.__class__.__name__), ("fan_in_fan_out", 2),
    ("enable_lora", [1, 0]), ("enable_lora", []), ("target_parameters", "x"), ("init_lora_weights", 3), ("peft_type", 3), ("base_model_name_or_path", 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"), FIELDS, ids=[f"{index}-{field}" for index, (field, _) in enumerate(FIELDS)]
)
def test_fields_of_the_wrong_type(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read(folder(tmp_path, pair(Q), config(**{field: value})))
    assert caught.value.key == field
    assert caught.value.path.endswith("adapter_config.json")


def test_no_method(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match='add "peft_type": "LORA"'):
        read(folder(tmp_path, pair(Q), {"r": 4}))
