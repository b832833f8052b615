"""Planned against measured memory: real trainings of random weights.

Measured is the peak of torch's CPU allocator: every allocation and every free, from torch.profiler. `measure_resident` measures how much
the resident memory of a process grows, `measure_on_gpu` the same as `torch.cuda.max_memory_allocated`; that one was not run yet.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CASES", "measure", "measure_on_gpu"]

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 12000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen2", "vocab_size": 32000, "tie_word_embeddings": True, "num_hidden_layers": 5}
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 12000, "n_positions": 1024,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_local_experts": 4,
    "num_attention_heads": 6, "num_experts_per_tok": 2,
}  # fmt: skip

CASES: tuple[dict[str, Any], ...] = (
    {"name": "Llama", "config": LLAMA},
    {"name": "Llama", "config": LLAMA, "rank": 64, "recipe": {"mixed_precision": "bf16"}},
    {"name": "Llama", "config": LLAMA, "padded": True, "seq": 384, "rows": 2},
    {"name": "Llama", "config": LLAMA, "recipe": {"gradient_checkpointing": True}},
    {"name": "Llama", "config": LLAMA, "recipe": {"gradient_checkpointing": "selective"}},
    {"name": "Llama", "config": LLAMA, "recipe": {"gradient_checkpointing": 4, "accumulation": 2}, "rows": 1},
    {"name": "Llama", "config": LLAMA, "recipe": {"loss_chunk": 64}},
    {"name": "Llama", "config": LLAMA, "recipe": {"freeze_below": 4, "dropout": 0.1}},
    {"name": "Llama", "config": LLAMA, "recipe": {"dora": True}, "rank": 8},
    {"name": "Llama, 20 layers", "config": LLAMA | {"num_hidden_layers": 20}, "rows": 1, "recipe": {"dtype": "bfloat16"}},
    {"name": "Llama", "config": LLAMA, "rank": 64, "recipe": {"optimizer": "adafactor", "gradient_checkpointing": True, "loss_chunk": 64}},
    {"name": "Qwen2, large vocabulary", "config": QWEN},
    {"name": "GPT-2", "config": GPT2, "seq": 192},
    {"name": "Mixtral, 4 experts", "config": MIXTRAL},
    {"name": "Llama, all weights", "config": LLAMA | {"num_hidden_layers": 5}, "full": True},
)  # fmt: skip
"""Settings of the trainings; rank 16 at all linear layers, 2 rows of 192 tokens, float32, unless it says something else."""

THROUGH_TRAIN: tuple[dict[str, Any], ...] = (
    {"name": "Llama, through weft.train", "config": LLAMA, "train": True},
    {"name": "Llama, through weft.train", "config": LLAMA, "train": True, "recipe": {"quantize": "int8"}},
    {"name": "Llama, through weft.train", "config": LLAMA, "train": True, "recipe": {"quantize": "nf4"}},
)


def recipe_of(case: dict[str, Any]) -> Any:
    """The case's recipe, spec included."""
    from weft import Recipe

    changes = {
        "max_steps": 2,
        "rank": 16,
        "targets": "all-linear",
        "batch_size": 2,
        "patience": 0,
        "device": "cpu",
        "log_every": 1,
    }
    if "rows" in case:
        changes["batch_size"] = case["rows"]
    if "rank" in case:
        changes["rank"] = case["rank"]
    return Recipe().replace(**changes, **case.get("recipe", {}))


def planned(case: dict[str, Any]) -> dict[str, Any]:
    """What the plan says, from the configuration alone."""
    from weft.plan.memory import Gauge
    from weft.plan.skeleton import find_config
    from weft.plan.subject import Subject

    recipe = recipe_of(case)
    subject = Subject(find_config(case["config"]), None if case.get("full") else recipe.spec)
    memory = Gauge(subject, case.get("seq", 192), padded=case.get("padded", False)).memory(recipe)
    return {"bytes": memory.own, "when": memory.when, "parts": memory.parts, "flops": memory.flops}


def allocated(work: Callable[[], object]) -> int:
    """Bytes at the highest moment of torch's CPU allocator while something runs: every allocation and free, in their order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    sizes: list[tuple[int, int]] = []
    waiting = list(seen.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag.name == "Allocation" and event.typed[1].device.type == "cpu":
            sizes.append((event.start_time_ns, event.typed[1].alloc_size))
    live = best = 0
    for _, size in sorted(sizes):
        live += size
        best = max(best, live)
    return best


def resident(work: Callable[[], object]) -> int:
    """Bytes that the process' resident memory grows by, at most, while something runs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def on_gpu(work: Callable[[], object]) -> int:
    """Bytes at the highest moment of CUDA's allocator."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


METERS = {"allocated": allocated, "resident": resident, "gpu": on_gpu}


def run_one(case: dict[str, Any], meter: str) -> int:
    """Measure one training in this process, after a small one of the same kind that loads all libraries."""
    config = case["config"]
    small = {
        "hidden_size": 64,
        "n_embd": 96,
        "vocab_size": 256,
        "intermediate_size": 64,
    }  # as many layers, which recipes count
    tiny = (
        config
        | {name: value for name, value in small.items() if name in config}
        | ({"head_dim": 8} if "head_dim" in config else {})
    )
    tiny |= {name: 4 for name in ("num_attention_heads",) if name in config} | {
        name: 2 for name in ("num_key_value_heads",) if name in config
    }
    run_once({**case, "config": tiny, "rows": 1, "seq": 8})
    if case.get("train"):
        with tempfile.TemporaryDirectory() as folder:
            base = _saved(case["config"], Path(folder))
            return METERS[meter](lambda: _through_train(case, base, Path(folder)))
    return METERS[meter](lambda: run_once(case))


def _model(config: dict[str, Any], dtype: str) -> Any:
    import torch

    from weft.plan.skeleton import _class_of, find_config

    found = find_config(config)
    torch.set_default_dtype(torch.float32)
    model = _class_of(found, False)._from_config(found, dtype=getattr(torch, dtype if dtype != "auto" else "float32"))
    return model.requires_grad_(False)


def run_once(case: dict[str, Any]) -> None:
    """Two optimizer steps of the real trainer, on random tokens."""
    import torch
    from transformers import Trainer, TrainerCallback

    from weft.core.bank import attach
    from weft.train.recompute import above, checkpointing
    from weft.train.run import Folder
    from weft.train.schedule import Facts, settle
    from weft.train.session import training_arguments
    from weft.train.trainer import AdapterTrainer, Setup

    recipe = recipe_of(case)
    length, count = case.get("seq", 192), 2 * recipe.batch_size * recipe.accumulation
    model = _model(case["config"], recipe.dtype)
    vocabulary = model.config.vocab_size

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Any:
            cut = 1 if case.get("padded") and index % 2 else 0
            ids = torch.randint(1, vocabulary, (length,), generator=torch.Generator().manual_seed(index))
            mask = torch.ones_like(ids)
            mask[length - cut :] = 0
            return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    class InOrder(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            pass

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    schedule = settle(recipe, Facts(count, False, "text", 768, "llama"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe, schedule, Folder(folder), packed=False)
        arguments.save_strategy = "no"  # type: ignore[assignment]
        if case.get("full"):
            model.requires_grad_(True)
            Trainer(
                model, arguments, train_dataset=Rows(), data_collator=collate, callbacks=[], compute_loss_func=_loss
            ).train()
            return
        bank = attach(model, {"t": above(model, recipe.spec, recipe.freeze_below)}, seed=0)
        setup = Setup(bank, "t", schedule, InOrder(Rows()), [], keep=1, loss_chunk=recipe.loss_chunk)
        silent: list[TrainerCallback] = []
        with checkpointing(model, recipe):
            trainer = AdapterTrainer(
                model,
                arguments,
                setup,
                train_dataset=Rows(),
                eval_dataset=None,
                data_collator=collate,
                callbacks=silent,
            )
            trainer.train()


def _loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    from weft.train.scoring import losses

    values, _ = losses(outputs.logits, labels)
    return values.sum() / len(values)


def _saved(config: dict[str, Any], folder: Path) -> Path:
    """The model as a directory, with a tokenizer of one token a byte."""
    from tests.unit.train.support import byte_tokenizer

    base = folder / "base"
    model = _model(config, "float32")
    model.save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(base)
    del model
    return base


def _through_train(case: dict[str, Any], base: Path, folder: Path) -> None:
    import weft

    recipe = recipe_of(case).replace(max_length=case.get("seq", 192), log_every=1, save_every=2)
    rows = [{"text": "abcdefgh" * 64} for _ in range(2 * recipe.batch_size)]
    weft.train(base=str(base), data=rows, recipe=recipe, out=folder / "run", progress=False)


def _in_its_own_process(case: dict[str, Any], what: str) -> Any:
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.results.plan", what, json.dumps(case)],
        env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{what} of {case['name']}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _label(case: dict[str, Any]) -> list[Any]:
    recipe = recipe_of(case)
    more = [f"{name}={value}" for name, value in case.get("recipe", {}).items() if name != "dtype"]
    more += ["rows of two lengths"] if case.get("padded") else []
    rank = None if case.get("full") else recipe.spec.rank
    dtype = recipe.dtype if recipe.dtype != "auto" else "float32"
    return [case["name"], rank, f"{recipe.batch_size} × {case.get('seq', 192)}", dtype, ", ".join(more)]


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Plan and measure every case on the CPU; in one process, for the allocator's bytes are those of the case alone."""
    rows, errors = [], []
    page: dict[str, Any] = {}
    for case in (*CASES, *THROUGH_TRAIN):
        plan, real = planned(case), run_one(case, "allocated")
        errors.append(plan["bytes"] / real - 1)
        rows.append([*_label(case), plan["bytes"] / 1e6, real / 1e6, f"{errors[-1]:+.1%}"])
        print(rows[-1], flush=True)
        page = _page(
            rows,
            errors,
            "Planned and measured memory, CPU",
            "the peak of torch's CPU allocator over two optimizer steps",
        )
        (folder / "plan.json").write_text(
            json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )  # as far as it is
    return page


def measure_resident(shared: Path, folder: Path) -> dict[str, Any]:
    """The same against the growth of the resident memory of a process, one process a case."""
    rows, errors = [], []
    for case in CASES:
        plan, real = planned(case), _in_its_own_process(case, "resident")
        errors.append(plan["bytes"] / real - 1)
        rows.append([*_label(case), plan["bytes"] / 1e6, real / 1e6, f"{errors[-1]:+.1%}"])
    how = "how much the resident memory of the process grows, with what the allocator of C keeps and what libraries load late"
    return _page(rows, errors, "Planned memory and resident memory, CPU", how)


def measure_on_gpu(shared: Path, folder: Path) -> dict[str, Any]:
    """Plan and measure every case on a GPU; written for one, not run on any yet."""
    rows, errors = [], []
    for case in CASES:
        case = {**case, "recipe": {**case.get("recipe", {}), "device": "auto"}}
        plan, real = (_in_its_own_process(case, what) for what in ("planned", "gpu"))
        errors.append(plan["bytes"] / real - 1)
        rows.append([*_label(case), plan["bytes"] / 1e6, real / 1e6, f"{errors[-1]:+.1%}"])
    return _page(
        rows, errors, "Planned and measured memory, GPU", "torch.cuda.max_memory_allocated over two optimizer steps"
    )


def _page(rows: list[Any], errors: list[float], title: str, measured: str) -> dict[str, Any]:
    inside = sum(abs(error) <= 0.1 for error in errors)
    return {
        "title": title,
        "settings": "Random weights made from a configuration, LoRA at all linear layers, the real trainer and its optimizer. Measured: "
        f"{measured}. Planned: `weft plan`'s figure without the overhead of the process, from the configuration alone, before the training. "
        "Megabytes are 10^6 bytes",
        "columns": ["model", "rank", "rows × tokens", "dtype", "more", "planned, MB", "measured, MB", "error"],
        "rows": rows,
        "summary": f"{inside} of {len(errors)} within 10 %; largest error {max(map(abs, errors)):.1%}",
    }


if __name__ == "__main__":
    what, case = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(planned(case) if what == "planned" else run_one(case, what)))
