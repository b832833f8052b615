"""load_base: what it gives, and every ordinary mistake as an error that says what to do."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import weft
from tests.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from tests.tolerances import assert_close
from weft.errors import BaseError
from weft.models.load import TASKS, load_base, new_modules


def tokenizer(size: int = 64, **special: str) -> PreTrainedTokenizerFast:
    """Words w3, w4 … and three special tokens."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **({"unk_token": "<unk>", "eos_token": "</s>"} | special))


def save(folder: Path, model: Any = None, **special: str) -> Path:
    """A base on disk, a tiny Llama unless another model is given."""
    (model or tiny_llama()).save_pretrained(folder)
    tokenizer(**special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that no test writes into."""
    return save(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def test_a_base_is_frozen_in_eval_mode_and_has_its_numbers(tmp_path: Path) -> None:
    original = tiny_llama()
    model, words = load_base(save(tmp_path, original))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = words("w5 w6 w7", return_tensors="pt").input_ids
    assert ids.tolist() == [[5, 6, 7]]
    assert_close(model(ids).logits, original(ids).logits, torch.float32)
    assert new_modules(model) == ()


def test_a_path_may_be_text_or_relative_to_home(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base.parent))
    assert load_base("~/base")[0].config.model_type == "llama"
    monkeypatch.chdir(base.parent)
    assert load_base("base")[0].name_or_path == "base"


@pytest.mark.parametrize(
    ("asked", "got"), [("bfloat16", torch.bfloat16), (torch.float64, torch.float64), (None, torch.float32)]
)
def test_dtype(saved: Path, asked: Any, got: torch.dtype) -> None:
    assert load_base(saved, dtype=asked)[0].dtype == got


def test_device(saved: Path) -> None:
    assert load_base(saved, device="meta")[0].device.type == "meta"


def test_the_same_base_has_the_same_fingerprint(saved: Path, base: Path) -> None:
    first, copy = (weft.fingerprint(load_base(folder)[0]) for folder in (saved, base))
    assert first.differences(copy) == []


def test_pads_with_the_end_token_and_says_so(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "weft.models"):
        model, words = load_base(saved)
    assert (words.pad_token, words.pad_token_id, len(words)) == ("</s>", 2, 64)
    assert model.generation_config.pad_token_id is not None
    assert "padding with '</s>'" in caplog.text


def test_keeps_a_padding_token(tmp_path: Path) -> None:
    assert load_base(save(tmp_path, pad_token="w9"))[1].pad_token == "w9"


def test_a_pickled_checkpoint_is_read_where_there_is_no_other(base: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    expected = weft.fingerprint(load_base(base)[0])
    (base / "model.safetensors").unlink()
    assert expected.differences(weft.fingerprint(load_base(base)[0])) == []


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def test_a_pickle_with_code_is_not_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    (base / "model.safetensors").unlink()
    torch.save({"a": _Evil()}, base / "pytorch_model.bin")
    with pytest.raises(BaseError, match="can't be loaded"):
        load_base(base)
    assert not Path("was-run").exists()


def test_sharded_weights(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_base(tmp_path)[0]
    assert all(torch.equal(loaded.get_parameter(name), weight) for name, weight in model.named_parameters())
    shards[0].unlink()
    with pytest.raises(BaseError, match=f"lists shards that are not there: '{shards[0].name}'"):
        load_base(tmp_path)


@pytest.mark.parametrize(
    ("task", "build", "kind"),
    [
        ("causal-lm", tiny_gpt2, "GPT2LMHeadModel"),
        ("seq2seq", tiny_t5, "T5ForConditionalGeneration"),
        ("encoder", tiny_bert, "BertModel"),
        ("auto", tiny_bert, "BertForSequenceClassification"),
        ("auto", tiny_t5, "T5ForConditionalGeneration"),
        ("image-classification", tiny_vit, "ViTForImageClassification"),
        ("auto", tiny_vit, "ViTForImageClassification"),
    ],
)
def test_tasks(tmp_path: Path, task: str, build: Any, kind: str) -> None:
    model, words = load_base(save(tmp_path, build()), task=task)
    assert type(model).__name__ == kind
    assert (words is None) == (task == "image-classification")


def test_images_come_with_their_processor(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    tiny_vit().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    processor = load_base(tmp_path, task="image-classification")[1]
    assert processor(torch.zeros(3, 20, 20), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


# Heads


def test_a_new_head_has_the_labels_and_is_the_same_every_time(saved: Path) -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(load_base(saved, task="classification", labels=["no", "maybe", "yes"])[0])
    assert models[0].config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert new_modules(models[0]) == ("score",)
    assert models[0].score.weight.std() > 0.01
    assert weft.fingerprint(models[0]).differences(weft.fingerprint(models[1])) == []
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 2]])
    assert models[0](ids, attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])).logits.shape == (2, 3)


def test_a_missing_pooler_is_new_too(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert new_modules(load_base(tmp_path, task="classification", labels=2)[0]) == ("bert.pooler", "classifier")


def test_a_head_of_the_checkpoint_is_kept(tmp_path: Path) -> None:
    original = tiny_bert(labels=3)
    save(tmp_path, original)
    kept = load_base(tmp_path, task="classification")[0]
    assert torch.equal(kept.classifier.weight, original.classifier.weight)
    named = load_base(tmp_path, task="classification", labels=["a", "b", "c"])[0]
    assert new_modules(named) == ()
    assert torch.equal(named.classifier.weight, original.classifier.weight)


def test_a_head_of_another_size_is_new(tmp_path: Path) -> None:
    model = load_base(save(tmp_path, tiny_bert(labels=3)), task="classification", labels=5)[0]
    assert model.classifier.weight.shape[0] == 5
    assert new_modules(model) == ("classifier",)
    assert torch.isfinite(model.classifier.weight).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "classification"}, "no labels of its own; say them"),
        ({"task": "classification", "labels": []}, "at least one label"),
        ({"task": "classification", "labels": ["a", "a"]}, "no name twice"),
        ({"labels": 2}, "are for the tasks classification"),
        ({"task": "clasification"}, "Did you mean 'classification'"),
        (
            {"task": "seq2seq"},
            "a llama model can't be loaded for 'seq2seq'; it can for 'causal-lm', 'classification', 'encoder'",
        ),
        ({"dtype": "int7"}, "dtype='int7' is no floating-point type"),
        ({"revision": "main"}, "is for hub ids"),
    ],
)
def test_arguments_that_make_no_sense(saved: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BaseError, match=message):
        load_base(saved, **arguments)


def test_every_task_names_a_class_of_transformers() -> None:
    import transformers

    assert all(hasattr(transformers, name) for task, name in TASKS.items() if task != "auto")


# Folders that are no base


def test_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "llama-1b").mkdir()
    with pytest.raises(BaseError, match=r"there is no directory .*nothing-here.* holds 'llama-1b'"):
        load_base(tmp_path / "nothing-here")


@pytest.mark.parametrize("name", ["./nope", "../nope/deeper", "~/nope", "a/b/c", "with space"])
def test_what_can_only_be_a_path_is_never_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(BaseError, match="there is no directory"):
        load_base(name)


def test_a_missing_folder_beside_others_is_a_path(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent.parent)
    with pytest.raises(BaseError, match="there is no directory.*holds 'base'"):
        load_base(f"{base.parent.name}/other")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseError, match="is a file. GGUF"):
        load_base(tmp_path / "model.gguf")


def test_an_adapter_in_the_place_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/llama"}')
    with pytest.raises(BaseError, match=r"this is an adapter; pass it as --adapter.*\(org/llama\)"):
        load_base(tmp_path)


def test_a_run_in_the_place_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseError, match="this is a run folder"):
        load_base(tmp_path)


def test_an_adapter_inside_of_a_base_is_never_loaded_along(base: Path) -> None:
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BaseError, match="holds a base and an adapter"):
        load_base(base)


def test_the_base_is_one_level_deeper(base: Path) -> None:
    with pytest.raises(BaseError, match="it has no config.json, but 'base' inside of it has"):
        load_base(base.parent)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="it holds nothing"):
        load_base(tmp_path)


def test_no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseError, match="no weights: expected model.safetensors"):
        load_base(base)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer(base: Path, file: str) -> None:
    (base / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n")
    with pytest.raises(BaseError, match=f"{file} is a Git LFS pointer.*git lfs pull"):
        load_base(base)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(base: Path, keep: int) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BaseError, match=r"model.safetensors \([\d,]+ bytes\) is damaged or cut short"):
        load_base(base)


def test_a_damaged_pickle(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(BaseError, match="can't be loaded"):
        load_base(base)


@pytest.mark.parametrize(
    "index", ["[]", "{}", "no json", '{"weight_map": {}}', '{"weight_map": {"a": "../../etc/passwd"}}']
)
def test_a_bad_index_of_shards(base: Path, index: str) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BaseError, match="model.safetensors.index.json"):
        load_base(base)


# Folders whose parts don't fit


def change_config(base: Path, **changes: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("config", ["{", "[1]", "{}", '{"model_type": 3}'])
def test_a_bad_config(base: Path, config: str) -> None:
    (base / "config.json").write_text(config)
    with pytest.raises(BaseError, match=r"config\.json"):
        load_base(base)


def test_an_architecture_that_transformers_has_not(base: Path) -> None:
    change_config(base, model_type="llamma", auto_map={"AutoModelForCausalLM": "modeling.Llamma"})
    (base / "modeling.py").write_text("raise SystemExit('was run')")
    with pytest.raises(BaseError, match=r"has no architecture 'llamma'\. Did you mean 'llama'.*which weft never runs"):
        load_base(base)


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "none such"}])
def test_a_config_with_wrong_values(base: Path, changes: dict[str, Any]) -> None:
    change_config(base, **changes)
    with pytest.raises(BaseError, match="base"):
        load_base(base)


def test_weights_of_another_shape(base: Path) -> None:
    change_config(base, intermediate_size=40)
    with pytest.raises(BaseError, match="can't be loaded for 'causal-lm'"):
        load_base(base)


def test_an_encoder_decoder_is_told_the_way(tmp_path: Path) -> None:
    tiny_t5().save_pretrained(tmp_path)
    with pytest.raises(BaseError, match=r"a t5 model can't be loaded for 'causal-lm'.*Seq2SeqTrainer.*weft\.attach"):
        load_base(tmp_path)


def test_weights_that_are_missing(base: Path) -> None:
    change_config(base, num_hidden_layers=3)
    with pytest.raises(BaseError, match=r"the files lack.* 9 weights of LlamaForCausalLM: 'model.layers.2"):
        load_base(base)


def test_weights_of_another_model(base: Path) -> None:
    tiny_gpt2().save_pretrained(base.parent / "gpt2")
    shutil.copy(base.parent / "gpt2" / "model.safetensors", base)
    with pytest.raises(BaseError, match="They are of another model"):
        load_base(base)


def test_weights_that_are_not_used_are_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_config(base, num_hidden_layers=1)
    load_base(base)
    assert "9 weights of the files are not used: 'model.layers.1" in caplog.text


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="a model but no tokenizer"):
        load_base(tmp_path)
    assert load_base(tmp_path, task="auto")[1] is None


def test_a_tokenizer_that_can_not_be_read(base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseError, match="its tokenizer or processor can't be loaded"):
        load_base(base)


def test_a_tokenizer_of_another_model(base: Path) -> None:
    tokenizer(size=70).save_pretrained(base)
    with pytest.raises(BaseError, match="the tokenizer has 70 tokens, but the model has embeddings for 64"):
        load_base(base)


# The hub


def refuse(kind: str, status: int | None = None) -> Any:
    """A stand-in for the hub's client that fails as the real one does."""
    import huggingface_hub.errors as hub

    error = getattr(hub, kind)

    def download(*_: Any, **__: Any) -> str:
        problem = error.__new__(error)
        problem.args = (f"{kind} of the hub",)
        raise problem

    return download


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "it is gated: ask for access"),
        ("RepositoryNotFoundError", "the hub has no such model, or it is private"),
        ("RevisionNotFoundError", "it has no revision 'v2'"),
        ("LocalEntryNotFoundError", "not in the local cache and HF_HUB_OFFLINE is set"),
        ("HFValidationError", "HFValidationError"),
    ],
)
def test_what_the_hub_says(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse(kind))
    with pytest.raises(
        BaseError, match=f"no directory is called 'org/name', and as a hub id it can't be had: .*{message}"
    ):
        load_base("org/name", revision="v2")


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match="not in the local cache"):
        load_base("org/some-model-that-nobody-has")


def test_a_model_of_the_hub_brings_its_commit(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "0123abcd"
    asked: list[str] = []

    def download(name: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
        assert (name, revision) == ("org/name", "main")
        asked.extend(allow_patterns)
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in saved.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load_base("org/name", revision="main")[0]
    mark = weft.fingerprint(model)
    assert (mark.name, mark.commit) == ("org/name", "0123abcd")
    assert mark.differences(weft.fingerprint(load_base(saved)[0])) == []
    assert "pytorch_model.bin" not in asked


def test_an_adapter_of_the_hub_downloads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    calls: list[Any] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append(k) or str(tmp_path))
    with pytest.raises(BaseError, match="this is an adapter"):
        load_base("org/adapter")
    assert len(calls) == 1


# Real files


def test_a_real_llama(stories260k: Path) -> None:
    model, words = load_base(stories260k)
    start = torch.tensor([[words.bos_token_id]])
    text = words.decode(model.generate(start, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


def test_real_adapters_are_no_bases(shared_dir: Path) -> None:
    for folder in sorted((shared_dir / "data" / "adapters").iterdir()):
        with pytest.raises(BaseError):
            load_base(folder)
