"""Tiny models with random weights, one function for each architecture; built in milliseconds.

Every parameter is redrawn, norms and biases too: zeros and ones would hide a wrong forward. Dropout of the base is off, so that
train mode and eval mode give the same numbers. Models come in eval mode, with all parameters requiring gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ARCHITECTURES",
    "TinyAttention",
    "TinyCNN",
    "batch_for",
    "randomise",
    "tiny_attention",
    "tiny_bert",
    "tiny_cnn",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_mixtral",
    "tiny_t5",
    "tiny_vit",
]


def randomise(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Redraw every parameter (matrices ~ 1/sqrt(fan_in), vectors ~ their start + 0.1 normal), cast, switch to eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, (parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]) ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def tiny_llama(*, layers: int = 2, tie: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """Llama for causal language modelling: 32 wide, grouped-query attention 4/2, SwiGLU 48, vocabulary 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tie, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return randomise(LlamaForCausalLM(LlamaConfig(**(settings | config))), dtype)


def tiny_gpt2(*, layers: int = 2, tie: bool = True, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """GPT-2 for causal language modelling: Conv1D layers (weights stored as (d_in, d_out)), 32 wide, vocabulary 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": 64, "n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64, "n_inner": 48, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": tie, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return randomise(GPT2LMHeadModel(GPT2Config(**(settings | config))), dtype)


def tiny_bert(*, layers: int = 2, labels: int = 3, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """BERT for sequence classification: 32 wide, head ``classifier``."""
    from transformers import BertConfig, BertForSequenceClassification

    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": labels,
    }  # fmt: skip
    return randomise(BertForSequenceClassification(BertConfig(**(settings | config))), dtype)


def tiny_t5(*, layers: int = 2, tie: bool = True, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """T5 encoder and decoder for sequence to sequence: 32 wide, gated feed-forward."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4, "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": tie, "decoder_start_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    return randomise(T5ForConditionalGeneration(T5Config(**(settings | config))), dtype)


def tiny_vit(*, layers: int = 2, labels: int = 3, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """ViT for image classification: 16×16 images in patches of 8, 32 wide."""
    from transformers import ViTConfig, ViTForImageClassification

    settings = {
        "image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": labels,
    }  # fmt: skip
    return randomise(ViTForImageClassification(ViTConfig(**(settings | config))), dtype)


def tiny_mixtral(*, layers: int = 2, experts: int = 4, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """Mixtral, a mixture of experts: stacked parameters ``mlp.experts.gate_up_proj`` and ``down_proj``, two experts a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": experts, "num_experts_per_tok": 2,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(**(settings | config)))
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    return randomise(model, dtype)


class TinyCNN(nn.Module):
    """Two convolutions with batch norm (the second with groups, stride, padding and dilation), and a head."""

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, (3, 2), stride=2, padding=(2, 1), dilation=2, groups=2)
        self.bn2 = nn.BatchNorm2d(12)
        self.linear = nn.Linear(12, labels)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 3, height, width) -> (rows, labels)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


class TinyAttention(nn.Module):
    """An embedding, one `nn.MultiheadAttention`, a bare matrix parameter and a head."""

    def __init__(self, vocabulary: int = 32, width: int = 16, labels: int = 3, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=batch_first)
        self.mix = nn.Parameter(torch.empty(width, width))
        self.head = nn.Linear(width, labels)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(rows, length) -> (rows, labels)."""
        x = self.embed(input_ids)
        if not self.attn.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.attn(x, x, x, need_weights=False)
        if not self.attn.batch_first:
            y = y.transpose(0, 1)
        return self.head(torch.tanh(nn.functional.linear(y, self.mix)).mean(1))


def tiny_cnn(*, labels: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`TinyCNN` with random weights and random statistics in its batch norms."""
    return randomise(TinyCNN(labels), dtype)


def tiny_attention(*, batch_first: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`TinyAttention` with random weights."""
    return randomise(TinyAttention(batch_first=batch_first), dtype)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "t5": tiny_t5,
    "vit": tiny_vit,
    "mixtral": tiny_mixtral,
    "cnn": tiny_cnn,
    "attention": tiny_attention,
}
"""All factories by name; each takes ``dtype``."""


def batch_for(model: nn.Module, *, rows: int = 3, length: int = 7, labels: bool = True) -> dict[str, Tensor]:
    """Random inputs that fit a model of this file, by keyword: ``model(**batch_for(model))``; its loss is in the output.

    Text batches are padded on the right, with a mask, and ignored labels (-100) in the padding. `TinyCNN` and `TinyAttention`
    get no labels: their forward gives logits.
    """
    dtype = next(model.parameters()).dtype
    if isinstance(model, TinyCNN):
        return {"x": torch.randn(rows, 3, 8, 8, dtype=dtype)}
    if isinstance(model, TinyAttention):
        return {"input_ids": torch.randint(0, model.embed.num_embeddings, (rows, length))}
    config: Any = model.config
    if config.model_type == "vit":
        batch = {"pixel_values": torch.randn(rows, 3, config.image_size, config.image_size, dtype=dtype)}
        return batch | ({"labels": torch.randint(0, config.num_labels, (rows,))} if labels else {})
    ids = torch.randint(3, config.vocab_size, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels and config.model_type == "bert":
        batch["labels"] = torch.randint(0, config.num_labels, (rows,))
    elif config.model_type == "t5":
        batch["labels"] = torch.randint(3, config.vocab_size, (rows, length - 2))
    elif labels:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    return batch
