"""Train the embedded base from nothing: ``python scripts/train_embedded_base --out DIR [--steps N | --minutes M]``.

The world (``world.py``) writes the text, ``vocabulary.py`` makes the tokenizer, and this file trains a small Llama on an endless
stream of new documents: every document is seen once. The same seed, steps and machine give the same weights. DIR gets the model in
Hugging Face layout, ``training_log.jsonl`` and, while it trains, ``checkpoint.pt``.

Matrices inside the blocks are trained with Muon, the rest with AdamW.

Source: Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; for language models Liu et al. 2025, arXiv:2502.16982.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from start import start
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import train_tokenizer
from words import word_list
from world import documents

VOCABULARY, CONTEXT, ROTARY, ROW, ROWS = 2560, 512, 100_000.0, 256, 16
SHAPE = {
    "hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
MATRIX_RATE, OTHER_RATE, WARMUP, DECAY, LONG = 0.02, 0.003, 0.02, 0.6, 0.15  # the last three are shares of the steps


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal by five Newton-Schulz steps."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; ``closure`` is not used."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(momentum, group["momentum"]))
                weight.add_(update, alpha=-group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values moved near one: (rows, columns), float32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def token_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Packed rows of ROW tokens without end: ``<bos>document<eos><bos>document<eos>…``, cut wherever a row is full."""
    stream, kept = documents(seed), []
    while True:
        texts = ["<bos>" + text + "<eos>" for text in itertools.islice(stream, 1000)]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            kept += encoding.ids
        whole = len(kept) // ROW * ROW
        yield from torch.tensor(kept[:whole]).view(-1, ROW)
        kept = kept[whole:]


@torch.no_grad()
def measure(model: LlamaForCausalLM, rows: Tensor, assistant: int, eos: int) -> dict[str, float]:
    """Held-out loss a token, and the share of the assistant's turns of which every token is the likeliest one."""
    total, turns, right = 0.0, 0, 0
    for ids in rows.split(ROWS):
        logits = model(input_ids=ids).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item() * len(ids)
        good = (logits.argmax(-1) == ids[:, 1:]).tolist()
        for tokens, hits in zip(ids.tolist(), good, strict=True):
            begun = None
            for i, token in enumerate(tokens):
                begun = i if token == assistant else begun
                if token == eos and begun is not None:
                    turns, right, begun = turns + 1, right + all(hits[begun:i]), None
    return {"heldout_loss": round(total / len(rows), 4), "heldout_turns_right": round(right / max(turns, 1), 4)}


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: a short warm-up, a plateau, a long linear decay."""
    done = step / steps
    return min(1.0, (done + 1 / steps) / WARMUP, (1 - done) / DECAY)


def untrained(seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The tokenizer, trained, and the model as it starts."""
    torch.manual_seed(seed)
    texts = itertools.chain(itertools.islice(documents(seed), 40_000), [word_list()] * 1000)
    tokenizer = train_tokenizer(texts, VOCABULARY, CONTEXT)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY},
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    start(model, tokenizer)
    return model, tokenizer


def train(args: argparse.Namespace) -> None:
    """Train, write the log and the files."""
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = untrained(args.seed)
    tokenizer.save_pretrained(args.out)
    marks = (tokenizer.convert_tokens_to_ids("<assistant>"), tokenizer.eos_token_id)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, model.lm_head.weight, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers = [
        Muon(matrices, MATRIX_RATE),
        torch.optim.AdamW(others, OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    stream = token_rows(tokenizer, args.seed)
    heldout = torch.stack(list(itertools.islice(token_rows(tokenizer, args.seed + 1), 64)))
    log = (args.out / "training_log.jsonl").open("w")
    parameters = sum(p.numel() for p in model.parameters())
    write(
        log,
        seed=args.seed,
        parameters=parameters,
        vocabulary=VOCABULARY,
        tokens_a_step=ROW * ROWS,
        torch=torch.__version__,
    )
    steps, step, running, started = args.steps, 0, 0.0, time.perf_counter()
    while step < steps:
        if step == 20 and args.minutes:
            steps = max(100, int(args.minutes * 60 / (time.perf_counter() - started) * 20))
        rows = torch.stack(list(itertools.islice(stream, ROWS)))
        if step >= (1 - LONG) * steps:
            rows = rows.view(ROWS * ROW // CONTEXT, CONTEXT)
        logits = model(input_ids=rows).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, full in zip(optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = full * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        if step % args.log_every == 0 or step == steps:
            done = step * ROW * ROWS
            speed = round(done / (time.perf_counter() - started))
            write(
                log,
                step=step,
                steps=steps,
                loss=round(running, 4),
                tokens=done,
                tokens_per_second=speed,
                **measure(model, heldout, *marks),
            )
            torch.save({"step": step, "model": model.state_dict()}, args.out / "checkpoint.pt")
    log.close()
    (args.out / "checkpoint.pt").unlink()
    save(model, args.out)


def write(log: TextIO, **values: object) -> None:
    """One line of the log, shown too."""
    line = json.dumps(values)
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in float16 with a config that asks for float32, so that they load as float32."""
    model.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded base from text that the project generates itself.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, the tokenizer and the log")
    parser.add_argument("--steps", type=int, default=900, help="steps of 4096 tokens; fixes the result")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="choose the steps so that it takes about this long on this machine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50, help="steps between two lines of the log")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
