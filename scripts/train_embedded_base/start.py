"""Where the weights start: small random numbers, and the means to copy, which minutes of training do not find by themselves.

To copy from its context a model needs heads that find the right place, and a way from the token at that place to the output. Large
models find both after a long plateau (an induction circuit); this one starts with them. Some numbers of the residual stream have a
fixed meaning:

    one number     the same for every token; layer 0 reads positions from it
    identity       a random code of the token at hand; no layer writes here
    before         the code of the token before it, written by a head of layer 0
    output         what heads copied; the output layer reads codes from here

Three heads of layer 0 look one, two and three tokens back. Three heads of layer 1 look for places whose ``before`` is the identity at
hand. In each layer from 1 on, half of the heads copy the identity of what they look at to ``output``; where they look is learned.
The two forms of a word, with and without the space in front, share their code.

Source: Olsson et al. 2022, In-context learning and induction heads, arXiv:2209.11895.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STD, CODE = 0.02, 0.2
POSITION, MATCH, COPY = 1.2, 2.2, 0.04
NEAR, FAR = 4, 7  # rotary pairs that tell neighbours apart, and the first pair that hardly turns within a row


@torch.no_grad()
def start(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set all weights of ``model``; draws from torch's random numbers."""
    head = model.config.head_dim
    still = torch.cat([torch.arange(FAR, head // 2), torch.arange(FAR + head // 2, head)])
    identity = torch.arange(1, 1 + head)
    before = identity[-1] + 1 + torch.arange(len(still))
    output = before[-1] + 1 + torch.arange(head)
    for layer in model.model.layers:
        for matrix in (p for p in layer.parameters() if p.ndim == 2):
            torch.nn.init.normal_(matrix, std=STD)
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            matrix.zero_()
            hold(matrix, torch.cat([identity, before]))
    _start_words(model, tokenizer, identity, before, output)

    group = model.config.num_attention_heads // model.config.num_key_value_heads
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[:head] = picked(identity, model)
        hold(layer.self_attn.v_proj.weight, slice(0, head))
    for attention in (first, second):
        hold(attention.q_proj.weight, slice(0, group * head))
        hold(attention.k_proj.weight, slice(0, head))
    pairs = torch.arange(NEAR)
    speed = model.config.rope_parameters["rope_theta"] ** (-2.0 * pairs / head)
    first.k_proj.weight[:head] = 0
    first.k_proj.weight[pairs, 0] = POSITION
    second.k_proj.weight[:head] = 0
    second.k_proj.weight[still] = MATCH * picked(before, model)
    for number in range(group):
        part = slice(number * head, (number + 1) * head)
        back = number + 1
        query = torch.zeros(head, model.config.hidden_size)
        query[pairs, 0] = POSITION * torch.cos(back * speed)
        query[pairs + head // 2, 0] = -POSITION * torch.sin(back * speed)
        first.q_proj.weight[part] = query
        query = torch.zeros(head, model.config.hidden_size)
        query[still] = MATCH * picked(identity[still], model)
        second.q_proj.weight[part] = query
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight[:, part] = COPY * picked(output, model).T
    free = slice(int(output[-1]) + 1, None)
    first.o_proj.weight[free, head : group * head] = (
        torch.randn_like(first.o_proj.weight[free, head : group * head]) * STD
    )
    first.o_proj.weight[before, still] = CODE / 1.83  # so that a code is as large here as in ``identity``


def _start_words(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, identity: Tensor, before: Tensor, output: Tensor
) -> None:
    """Codes and random numbers for every token, at the input and at the output."""
    read, write = model.model.embed_tokens.weight, model.lm_head.weight
    codes = CODE * torch.randn(len(read), len(identity))
    for weight in (read, write):
        torch.nn.init.normal_(weight, std=STD)
    shift = STD * torch.randn(read.shape[1])
    vocabulary = tokenizer.get_vocab()
    for token, number in sorted(vocabulary.items()):
        if token.startswith("Ġ") and token[1:] in vocabulary:
            for weight in (read, write):
                weight[number] = weight[vocabulary[token[1:]]] + shift + STD * 0.3 * torch.randn(read.shape[1])
            codes[number] = codes[vocabulary[token[1:]]]
    read[:, 0], write[:, 0] = 1.0, 0.0
    read[:, identity], read[:, before] = codes, 0.0
    write[:, identity], write[:, before], write[:, output] = 0.0, 0.0, codes
    hold(read, (slice(None), torch.cat([torch.tensor([0]), identity, before])))
    hold(write, (slice(None), output))


def picked(numbers: Tensor, model: LlamaForCausalLM) -> Tensor:
    """A matrix that picks these numbers of the residual stream: (len(numbers), hidden_size)."""
    return torch.eye(model.config.hidden_size)[numbers]


def hold(weight: Tensor, part: object) -> None:
    """Keep one part of a weight as it is: its gradient is zero."""
    mask = torch.ones_like(weight)
    mask[part] = 0
    weight.register_hook(lambda gradient: gradient * mask)
