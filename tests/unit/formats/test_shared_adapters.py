"""Adapters that others saved and published: each loads, on a base of the right shape, or is refused for the right reason."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weft
from weft.errors import FormatError, UnsupportedError


@pytest.fixture(scope="session")
def adapters(shared_dir: Path) -> Path:
    folder = shared_dir / "data" / "adapters"
    if not folder.is_dir():
        pytest.skip(f"needs published adapters in {folder}, which is not here")
    return folder


def account(adapter: weft.Adapter) -> str:
    return "\n".join(adapter.provenance.notes)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_inner=64))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=64, max_position_embeddings=32, intermediate_size=64, num_labels=2)
    )


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, max_position_embeddings=32, hidden_dim=64, num_labels=2)
    )


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).view(2, 6)).logits


CASES = [("bhavesh_gpt_lora", gpt2, 12), ("hareshjethani_bert", bert, 24), ("tashu_distilbert_imdb", distilbert, 12)]


@pytest.mark.parametrize(("name", "make", "sites"), CASES)
def test_loads_on_a_base_of_the_right_shape(
    name: str, make: type[nn.Module], sites: int, adapters: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="compares with peft, which is not installed")
    adapter = weft.load(adapters / name)
    assert len(adapter.sites) == sites
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    adapter.save(tmp_path / "again")
    with weft.attach(model, {}) as bank:
        bank.load("theirs", adapter)
        base = outputs(model)
        bank.use("theirs")
        ours = outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = outputs(peft.PeftModel.from_pretrained(twin, tmp_path / "again"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    trained = bool(adapter.modules) or any(bool(item.B.any()) for item in adapter.factors.values())
    assert trained == (not torch.allclose(base, ours))


def test_untrained_gpt2(adapters: Path) -> None:
    said = account(weft.load(adapters / "bhavesh_gpt_lora"))
    assert "names the base gpt2" in said
    assert "base is a GPT2LMHeadModel" in said
    assert "lists 'classifier', of which the file has nothing" in said
    assert "every B is zero" in said


def test_heads(adapters: Path) -> None:
    bert_head = weft.load(adapters / "hareshjethani_bert")
    assert set(bert_head.modules) == {"classifier"}
    assert "'score', of which the file has nothing" in account(bert_head)
    both = weft.load(adapters / "tashu_distilbert_imdb")
    assert set(both.modules) == set(both.spec.save_modules) == {"classifier", "pre_classifier"}
    assert "'pre_classifier', which modules_to_save names by its last letters only" in account(both)


def test_stable_diffusion(adapters: Path) -> None:
    folder = adapters / "timohavdk_sd15_diffusers"
    adapter = weft.load(folder)
    assert (len(adapter.sites), adapter.ranks()) == (128, "4")
    assert adapter.provenance.notes[:2] == (
        "read from pytorch_lora_weights.safetensors",
        "keys of diffusers, for the unet of a pipeline; paths count from that model",
    )
    unet = skeleton({path: (item.d_in, item.d_out) for path, item in adapter.factors.items()})
    with weft.attach(unet, {}) as bank:
        bank.load("style", adapter)
    flat = weft.load(folder / "new.safetensors", base=unet)
    assert set(flat.sites) == set(adapter.sites)
    stored = load_file(folder / "new.safetensors")
    for path, item in flat.factors.items():
        assert torch.equal(item.A, stored[f"lora_unet_unet_{path.replace('.', '_')}_lora_down.weight"])


def skeleton(sites: dict[str, tuple[int, int]]) -> nn.Module:
    """A module tree that has these linear layers."""
    root = nn.Module()
    for path, (d_in, d_out) in sites.items():
        *owners, leaf = path.split(".")
        module = root
        for name in owners:
            if name not in module._modules:
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(leaf, nn.Linear(d_in, d_out, device="meta"))
    return root.to_empty(device="cpu")


@pytest.mark.parametrize(
    "name", ["configonly_regex_targets_guanyuch_colpali", "configonly_unet_diffusers_Oxa5", "csequenc_dora_configonly"]
)
def test_configs_without_weights(name: str, adapters: Path) -> None:
    with pytest.raises(
        FormatError, match=r"the weights are missing: looked for adapter_model\.safetensors and adapter_model\.bin"
    ) as caught:
        weft.load(adapters / name)
    assert not isinstance(caught.value, UnsupportedError)
    assert name in caught.value.path


def test_prompt_tuning(adapters: Path) -> None:
    with pytest.raises(UnsupportedError, match="this is PROMPT_TUNING, not LORA") as caught:
        weft.load(adapters / "negative_prompt_tuning_isabee426")
    assert caught.value.key == "peft_type"


def test_all_folders_are_known(adapters: Path) -> None:
    """A new folder wants a test of its own."""
    known = {"bhavesh_gpt_lora", "hareshjethani_bert", "tashu_distilbert_imdb", "timohavdk_sd15_diffusers", "negative_prompt_tuning_isabee426",
             "configonly_regex_targets_guanyuch_colpali", "configonly_unet_diffusers_Oxa5", "csequenc_dora_configonly"}  # fmt: skip
    assert {path.name for path in adapters.iterdir() if path.is_dir()} == known
