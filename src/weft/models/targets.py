"""The usual sites of an architecture: what ``targets="default"`` means.

Weft adapts every projection of attention and feed-forward: low rank everywhere beats high rank in attention alone
(Schulman et al. 2025, LoRA without regret). Embeddings, norms, heads, routers and poolers stay out, and so do stacked
experts, which `LoraSpec.target_parameters` names. This module knows names only; it loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from weft.errors import TargetError, did_you_mean, some_names
from weft.spec import LoraSpec

__all__ = ["DEFAULT_TARGETS", "in_parts", "resolve_default"]

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED_LLAMA = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_LATENT = (
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
_LINEAR_ATTENTION = (*_LLAMA, "in_proj_qkv", "in_proj_z", "in_proj_qkvz", "linear_attn.out_proj")
_GPT2 = ("c_attn", "c_proj", "c_fc")
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_BERT = ("query", "key", "value", "intermediate.dense", "output.dense")
_T5 = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
_SPEECH = ("q_proj", "k_proj", "v_proj", "attention.out_proj", "intermediate_dense", "output_dense")
_VIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2",
        "query", "key", "value", "intermediate.dense", "output.dense")  # fmt: skip
_CLIP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_MAMBA = ("in_proj", "x_proj", "out_proj")


def _table(*rows: tuple[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {kind: names for kinds, names in rows for kind in kinds.split()}


DEFAULT_TARGETS: dict[str, tuple[str, ...]] = _table(
    (
        "llama llama4_text mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text olmo olmo2 olmo3 smollm3",
        _LLAMA,
    ),
    (
        "cohere cohere2 granite stablelm exaone4 seed_oss ernie4_5 internlm3 hunyuan_v1_dense helium apertus arcee nemotron",
        _LLAMA,
    ),
    ("mixtral qwen2_moe qwen3_moe olmoe granitemoe gpt_oss phimoe glm4_moe ernie4_5_moe minimax", _LLAMA),
    ("phi3 glm glm4", _FUSED_LLAMA),
    ("minicpm3 deepseek_v2 deepseek_v3", _LATENT),
    ("qwen3_next qwen3_5_text qwen3_5_moe_text", _LINEAR_ATTENTION),
    ("gpt2 gpt_bigcode", _GPT2),
    ("starcoder2", ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")),
    ("gpt_neo", ("q_proj", "k_proj", "v_proj", "attention.out_proj", "c_fc", "c_proj")),
    ("gpt_neox bloom falcon", _NEOX),
    ("gptj codegen", ("q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj", "fc_in", "fc_out")),
    ("phi", ("q_proj", "k_proj", "v_proj", "self_attn.dense", "fc1", "fc2")),
    ("mpt", ("Wqkv", "attn.out_proj", "up_proj", "down_proj")),
    ("lfm2", ("q_proj", "k_proj", "v_proj", "self_attn.out_proj", "w1", "w2", "w3")),
    ("mamba mamba2 falcon_mamba", _MAMBA),
    ("bert roberta xlm-roberta camembert electra", _BERT),
    ("distilbert", ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")),
    ("deberta deberta-v2", ("in_proj", "query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense")),
    ("albert", ("query", "key", "value", "attention.dense", "ffn", "ffn_output")),
    ("mpnet", ("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense")),
    ("modernbert", ("Wqkv", "Wo", "Wi")),
    ("t5 mt5 umt5", _T5),
    ("opt bart mbart marian pegasus whisper", _BART),
    ("wav2vec2 hubert", _SPEECH),
    ("vit deit beit dinov2 swin", _VIT),
    ("dinov3_vit", ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
    ("clip clip_vision_model clip_text_model siglip siglip_vision_model", _CLIP),
    ("resnet", ("convolution",)),
    ("cifar_resnet", ("conv1", "conv2")),
    ("convnext", ("pwconv1", "pwconv2")),
)
"""Names by ``config.model_type``. A name that a variant of the architecture has not is left out for it."""

_TOWERS = "vision|visual|audio|image"
_BETWEEN = r"projector|connector|\bmerger\b|modality_projection"


def resolve_default(model: nn.Module, spec: LoraSpec) -> LoraSpec:
    """Put the architecture's usual names in the place of ``targets="default"``; any other spec is given back as it is.

    A model of several parts (images and text) is adapted in its language model only.

    Raises:
        TargetError: the architecture is unknown, or has none of its usual names; lists the names of the linear layers.
    """
    if spec.targets != "default":
        return spec
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    paths = [path for path, module in model.named_modules() if _has_matrix(module)]
    if kind in DEFAULT_TARGETS:
        return spec.replace(targets=_present(DEFAULT_TARGETS[kind], paths, kind))
    if text in DEFAULT_TARGETS:
        language = [path for path in paths if not re.search(_TOWERS, path)]
        names = "|".join(re.escape(name) for name in _present(DEFAULT_TARGETS[text], language, text))
        return spec.replace(targets=rf"(?!.*({_TOWERS})).*\.({names})")
    raise TargetError(
        f'targets="default": no usual sites are known for {_called(model, kind)}.{did_you_mean(str(kind), DEFAULT_TARGETS)} '
        f'Use targets="all-linear", or name some of its layers: {_suffixes(paths)}'
    )


def in_parts(model: nn.Module, spec: LoraSpec, *, language: bool, vision: bool, projector: bool) -> LoraSpec:
    """Put the usual sites of some parts of a vision-language model in the place of ``"default"`` and ``"all-linear"``.

    Args:
        language: projections of attention and feed-forward of the language model.
        vision: the same of what reads images.
        projector: the linear layers between the two.

    Raises:
        TargetError: a part that is asked for has no site; names the layers that there are.
    """
    if spec.towers or spec.targets not in ("default", "all-linear"):
        return spec
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    between = [path for path in linear if re.search(_BETWEEN, path)]
    seeing = [path for path in linear if re.search(_TOWERS, path) and path not in between]
    outputs: Any = getattr(model, "get_output_embeddings", None)
    head = outputs() if outputs is not None else None
    speaking = [path for path in linear if path not in {*between, *seeing} and model.get_submodule(path) is not head]
    chosen: list[str] = []
    for name, asked, paths in (
        ("language", language, speaking),
        ("vision", vision, seeing),
        ("projector", projector, between),
    ):
        usual = [path for path in paths if not re.search(r"head|patch_embed|embeddings", path)]
        if asked and not usual:
            raise TargetError(f'targets="{spec.targets}": this {_called(model, None)} has no linear layer in its {name} part; its layers are called '
                              f"{_suffixes(linear)}. Set vision.{name}=false, or name sites in LoraSpec.targets")  # fmt: skip
        chosen += usual if asked else []
    return spec.replace(targets=tuple(chosen))


def _present(names: Iterable[str], paths: list[str], kind: str) -> tuple[str, ...]:
    """The names that end some path."""
    found = tuple(name for name in names if any(_ends(path, name) for path in paths))
    if not found:
        raise TargetError(f'targets="default": this {kind} model has none of the usual {some_names(names, 12)}; its layers are '
                          f"called {_suffixes(paths)}. Name them in LoraSpec.targets")  # fmt: skip
    return found


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2 and not isinstance(module, nn.Embedding)


def _suffixes(paths: Iterable[str]) -> str:
    named = dict.fromkeys(part for path in paths for part in path.split(".")[-1:] if not part.isdigit())
    return some_names(named, 16) if named else "none has a name"


def _called(model: nn.Module, kind: str | None) -> str:
    return f"the architecture {kind!r}" if kind else f"a {type(model).__name__}, which has no config.model_type"
