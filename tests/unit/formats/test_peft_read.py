"""PEFT's directories, as versions from 0.2 on and people's scripts left them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.formats.support import PREFIX, SMALLEST, folder, pair
from weft.core.factors import compact_groups
from weft.errors import FormatError, KeysError
from weft.formats.peft import read

Q = "model.layers.0.q_proj"


def config(**fields: Any) -> dict[str, Any]:
    return {**SMALLEST, **fields}


def notes(at: Path, **options: Any) -> str:
    return "\n".join(read(at, **options).provenance.notes)


def test_smallest(tmp_path: Path) -> None:
    tensors = pair(Q)
    adapter = read(folder(tmp_path, tensors))
    item = adapter.factors[Q]
    assert (item.rank, item.scale, item.kind, adapter.spec.targets, adapter.spec.alpha) == (
        4,
        2.0,
        "linear",
        ("q_proj",),
        8.0,
    )
    assert torch.equal(item.A, tensors[f"{PREFIX}{Q}.lora_A.weight"])
    assert torch.equal(item.B, tensors[f"{PREFIX}{Q}.lora_B.weight"])
    assert adapter.provenance.base is None


def test_missing_and_null_fields_get_defaults(tmp_path: Path) -> None:
    adapter = read(folder(tmp_path / "a", pair(Q, rank=8), {"peft_type": "LORA"}))
    assert (adapter.spec.rank, adapter.spec.alpha, adapter.spec.targets) == (8, 8.0, (Q,))
    nulls = {
        "peft_type": "LORA",
        "r": None,
        "lora_alpha": None,
        "bias": None,
        "modules_to_save": None,
        "rank_pattern": None,
        "target_modules": None,
    }
    assert read(folder(tmp_path / "b", pair(Q, rank=8), nulls)).spec.rank == 8


def test_pickle(tmp_path: Path) -> None:
    tensors = pair(Q)
    assert torch.equal(
        read(folder(tmp_path, tensors, pickled=True)).factors[Q].A, tensors[f"{PREFIX}{Q}.lora_A.weight"]
    )


def test_fused_query_key_value_of_old_peft(tmp_path: Path) -> None:
    A, B = torch.randn(8, 6), torch.randn(10, 4, 1)  # r = 4, two of three parts, groups = 2
    said = config(enable_lora=[True, False, True], merge_weights=False, fan_in_fan_out=True, target_modules=["c_attn"])
    adapter = read(
        folder(tmp_path, {f"{PREFIX}h.0.c_attn.lora_A.weight": A, f"{PREFIX}h.0.c_attn.lora_B.weight": B}, said)
    )
    item = adapter.factors["h.0.c_attn"]
    x = torch.randn(7, 6)
    thin = nn.functional.conv1d((x @ A.T).T[None], B, groups=2)[0].T
    expected = torch.zeros(7, 15)
    expected[:, :5], expected[:, 10:] = 2.0 * thin[:, :5], 2.0 * thin[:, 5:]
    torch.testing.assert_close(x @ item.delta().T, expected, atol=1e-5, rtol=1e-5)
    assert adapter.spec.rank_at("h.0.c_attn") == item.rank == 8
    assert adapter.spec.scale_at("h.0.c_attn") == pytest.approx(item.scale)


def test_fused_layer_of_another_shape(tmp_path: Path) -> None:
    said = config(enable_lora=[True, True, True])
    with pytest.raises(FormatError, match="3 of 3 fused parts"):
        read(
            folder(
                tmp_path,
                {f"{PREFIX}{Q}.lora_A.weight": torch.randn(8, 6), f"{PREFIX}{Q}.lora_B.weight": torch.randn(10, 4, 1)},
                said,
            )
        )


def test_unknown_fields_are_said(tmp_path: Path) -> None:
    said = notes(
        folder(
            tmp_path,
            pair(Q),
            config(use_magic=True, lora_aplha=3, peft_version="0.99.0", auto_mapping={"base_model_class": "GPT2Model"}),
        )
    )
    assert "'lora_aplha', 'use_magic'" in said
    assert "lora_alpha" in said
    assert "GPT2Model" in said


def test_names_of_wrappers_and_of_the_adapter(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}_orig_mod.model.layers.0._checkpoint_wrapped_module.q_proj.lora_A.mine.weight": torch.randn(4, 6),
        f"{PREFIX}_orig_mod.model.layers.0._checkpoint_wrapped_module.q_proj.lora_B.mine.weight": torch.randn(5, 4),
    }
    at = folder(tmp_path, tensors)
    assert read(at).sites == (Q,)
    assert "torch.compile" in notes(at)
    assert "'mine'" in notes(at)
    twice = {
        **pair("a.q_proj"),
        f"{PREFIX}b.q_proj.lora_A.one.weight": torch.ones(4, 6),
        f"{PREFIX}b.q_proj.lora_B.two.weight": torch.ones(5, 4),
    }
    with pytest.raises(KeysError, match="several adapters, 'one', 'two'"):
        read(folder(tmp_path / "two", twice))


def test_ddp_prefix_and_no_prefix(tmp_path: Path) -> None:
    assert read(folder(tmp_path / "ddp", pair(Q, prefix=f"module.{PREFIX}"))).sites == (Q,)
    at = folder(tmp_path / "bare", pair(Q, prefix=""))
    assert read(at).sites == (Q,)
    assert "don't begin with" in notes(at)


def test_heads(tmp_path: Path) -> None:
    head = {f"{PREFIX}score.weight": torch.randn(2, 6), f"{PREFIX}score.bias": torch.randn(2)}
    listed = read(folder(tmp_path / "a", pair(Q) | head, config(modules_to_save=["score", "classifier"])))
    assert set(listed.modules["score"]) == {"weight", "bias"}
    assert listed.spec.save_modules == ("score",)
    assert "'classifier', of which the file has nothing" in notes(tmp_path / "a")
    unlisted = read(folder(tmp_path / "b", pair(Q) | head))
    assert set(unlisted.modules["score"]) == {"weight", "bias"}
    assert not unlisted.biases
    assert "'score', which modules_to_save doesn't list" in notes(tmp_path / "b")
    deep = {f"{PREFIX}classifier.dense.weight": torch.randn(3, 3), f"{PREFIX}classifier.out.weight": torch.randn(2, 3)}
    assert set(
        read(folder(tmp_path / "c", pair(Q) | deep, config(modules_to_save=["classifier"]))).modules["classifier"]
    ) == {"dense.weight", "out.weight"}
    assert set(read(folder(tmp_path / "d", pair(Q) | deep)).modules) == {"classifier.dense", "classifier.out"}


def test_a_listed_module_that_is_lost(tmp_path: Path) -> None:
    at = folder(tmp_path, pair(Q), config(modules_to_save=["lm_head"]))
    with pytest.raises(KeysError, match=r"'lm_head', of which the file has nothing") as caught:
        read(at)
    assert caught.value.key == "modules_to_save"
    assert "'lm_head', of which" in notes(at, allow_partial=True)


def test_head_as_a_state_dict_has_it(tmp_path: Path) -> None:
    tensors = pair(Q) | {
        f"{PREFIX}score.original_module.weight": torch.zeros(2, 6),
        f"{PREFIX}score.modules_to_save.default.weight": torch.ones(2, 6),
        f"{PREFIX}other.modules_to_save.bias": torch.ones(2),
        f"{PREFIX}other.bias": torch.zeros(2),
        f"{PREFIX}other.weight": torch.zeros(2, 2),
    }
    adapter = read(folder(tmp_path, tensors, config(modules_to_save=["score", "other"])))
    assert torch.equal(adapter.modules["score"]["weight"], torch.ones(2, 6))
    assert torch.equal(adapter.modules["other"]["bias"], torch.zeros(2))
    assert "the base's own weights beside modules trained whole" in notes(tmp_path)


def test_resized_embeddings_are_said(tmp_path: Path) -> None:
    at = folder(tmp_path, pair(Q) | {f"{PREFIX}model.embed_tokens.weight": torch.randn(9, 6)})
    assert set(read(at).modules) == {"model.embed_tokens"}
    assert "vocabulary was resized" in notes(at)


def embedding(vocabulary: int = 9) -> dict[str, Tensor]:
    return {
        f"{PREFIX}embed.lora_embedding_A": torch.randn(4, vocabulary),
        f"{PREFIX}embed.lora_embedding_B": torch.randn(6, 4),
    }


def test_embedding_and_its_copy(tmp_path: Path) -> None:
    at = folder(
        tmp_path,
        embedding() | {f"{PREFIX}embed.base_layer.weight": torch.randn(9, 6)},
        config(target_modules=["embed"]),
    )
    adapter = read(at)
    assert (adapter.factors["embed"].kind, adapter.factors["embed"].d_in, adapter.factors["embed"].d_out) == (
        "embedding",
        9,
        6,
    )
    assert not adapter.modules
    assert "copies of the base's weights of 'embed'" in notes(at)


def test_a_copy_of_another_size(tmp_path: Path) -> None:
    at = folder(
        tmp_path,
        embedding() | {f"{PREFIX}embed.base_layer.weight": torch.randn(10, 6)},
        config(target_modules=["embed"]),
    )
    with pytest.raises(FormatError, match=r"\(10, 6\).*\(9, 6\).*resized") as caught:
        read(at)
    assert caught.value.key == f"{PREFIX}embed.base_layer.weight"
    with pytest.raises(KeysError, match="belongs to nothing"):
        read(folder(tmp_path / "b", pair(Q) | {f"{PREFIX}embed.base_layer.weight": torch.randn(10, 6)}))


def test_biases(tmp_path: Path) -> None:
    own = {f"{PREFIX}{Q}.base_layer.bias": torch.randn(5), f"{PREFIX}norm.bias": torch.randn(5)}
    adapter = read(folder(tmp_path / "new", pair(Q) | own, config(bias="all")))
    assert set(adapter.biases) == {f"{Q}.bias", "norm.bias"}
    old = {f"{PREFIX}{Q}.bias": torch.randn(5), f"{PREFIX}attention.relative_attention_bias.weight": torch.randn(8, 2)}
    adapter = read(folder(tmp_path / "old", pair(Q) | old, config(bias="all")))
    assert set(adapter.biases) == {f"{Q}.bias", "attention.relative_attention_bias.weight"}
    at = folder(tmp_path / "none", pair(Q) | own)
    assert set(read(at).biases) == {f"{Q}.bias", "norm.bias"}
    assert "the config says bias: none" in notes(at)
    head = {f"{PREFIX}score.weight": torch.randn(2, 6), f"{PREFIX}score.bias": torch.randn(2)}
    adapter = read(folder(tmp_path / "head", pair(Q) | own | head, config(bias="all", modules_to_save=["score"])))
    assert (set(adapter.biases), set(adapter.modules)) == ({f"{Q}.bias", "norm.bias"}, {"score"})


def test_scales(tmp_path: Path) -> None:
    tensors = pair("a.q_proj") | pair("b.q_proj", rank=2) | pair("b.v_proj", rank=2)
    said = config(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"b.q_proj": 2, "v_proj": 2},
        alpha_pattern={r"b\..*": 3},
        use_rslora=True,
    )
    adapter = read(folder(tmp_path, tensors, said))
    scales = {path: item.scale for path, item in adapter.factors.items()}
    assert scales == {"a.q_proj": 8 / 2, "b.q_proj": 3 / math.sqrt(2), "b.v_proj": 3 / math.sqrt(2)}
    assert adapter.spec.rank_pattern == said["rank_pattern"]
    assert all(adapter.spec.scale_at(path) == pytest.approx(scale) for path, scale in scales.items())


def test_patterns_that_match_nothing_are_said(tmp_path: Path) -> None:
    at = folder(tmp_path, pair(Q), config(rank_pattern={"k_proj": 2}, alpha_pattern={"nothing": 2}))
    assert read(at).spec.rank_pattern == {}
    assert "rank_pattern has entries that match nothing" in notes(at)


def test_another_rank_than_the_config_says(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"rank 8 and 8; expected rank 4.*adapter_config\.json says") as caught:
        read(folder(tmp_path, pair(Q, rank=8)))
    assert caught.value.key == f"{PREFIX}{Q}.lora_A.weight"
    bad = pair(Q) | {f"{PREFIX}{Q}.lora_B.weight": torch.randn(5, 3)}
    with pytest.raises(FormatError, match="rank 4 and 3"):
        read(folder(tmp_path / "b", bad))


def test_dora(tmp_path: Path) -> None:
    magnitude = torch.rand(5)
    for ending in ("", ".weight", ".default", ".default.weight"):
        tensors = pair(Q) | {f"{PREFIX}{Q}.lora_magnitude_vector{ending}": magnitude}
        if ending.startswith(".default"):
            tensors = {
                key.replace(".weight", ".default.weight") if "lora_A" in key or "lora_B" in key else key: t
                for key, t in tensors.items()
            }
        adapter = read(folder(tmp_path / f"x{ending}", tensors, config(use_dora=True)))
        assert torch.equal(adapter.factors[Q].magnitude, magnitude)  # type: ignore[arg-type]
        assert adapter.spec.dora
    with pytest.raises(KeysError, match="has no lora_magnitude_vector"):
        read(folder(tmp_path / "lost", pair(Q), config(use_dora=True)))
    with pytest.raises(KeysError, match="use_dora: false"):
        read(folder(tmp_path / "extra", pair(Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": magnitude}))
    with pytest.raises(FormatError, match="expected 5 numbers"):
        read(
            folder(
                tmp_path / "long",
                pair(Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": torch.rand(6)},
                config(use_dora=True),
            )
        )


def test_dora_of_a_convolution(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}conv.lora_A.weight": torch.randn(4, 3, 2, 3), f"{PREFIX}conv.lora_B.weight": torch.randn(5, 4, 1, 1),
        f"{PREFIX}conv.lora_magnitude_vector": torch.rand(1, 5, 1, 1),
    }  # fmt: skip
    item = read(folder(tmp_path, tensors, config(target_modules=["conv"], use_dora=True))).factors["conv"]
    assert (item.kind, item.kernel, item.d_in, item.d_out, tuple(item.magnitude.shape)) == ("conv", (2, 3), 18, 5, (5,))  # type: ignore[union-attr]


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(kernel: tuple[int, ...], groups: int, tmp_path: Path) -> None:
    B = torch.randn(8, 4 // groups, *(1,) * len(kernel))
    tensors = {f"{PREFIX}conv.lora_A.weight": torch.randn(4, 8, *kernel), f"{PREFIX}conv.lora_B.weight": B}
    item = read(folder(tmp_path, tensors, config(target_modules=["conv"]))).factors["conv"]
    assert (item.kernel, item.groups, item.rank, item.d_in) == (kernel, groups, 4, 8 * math.prod(kernel))
    assert torch.equal(compact_groups(item.B, groups), B.flatten(1))


def test_lora_bias(tmp_path: Path) -> None:
    tensors = pair(Q) | {f"{PREFIX}{Q}.lora_B.bias": torch.randn(5)}
    assert read(folder(tmp_path / "a", tensors, config(lora_bias=True))).factors[Q].bias is not None
    with pytest.raises(KeysError, match="lora_bias: false"):
        read(folder(tmp_path / "b", tensors))
    with pytest.raises(KeysError, match=r"no lora_B\.bias"):
        read(folder(tmp_path / "c", pair(Q), config(lora_bias=True)))


def test_half_a_pair(tmp_path: Path) -> None:
    lonely = {f"{PREFIX}other.q_proj.lora_A.weight": torch.randn(4, 6)}
    at = folder(tmp_path, pair(Q) | lonely)
    with pytest.raises(KeysError, match=r"'other\.q_proj' has no lora_B") as caught:
        read(at)
    assert caught.value.key == f"{PREFIX}other.q_proj.lora_A.weight"
    assert read(at, allow_partial=True).sites == (Q,)
    assert "left out: 'other.q_proj'" in notes(at, allow_partial=True)


def test_keys_that_belong_to_nothing(tmp_path: Path) -> None:
    for key, words in ((f"{PREFIX}loose", "belongs to nothing"), (f"{PREFIX}x.lora_C.weight", "LoRA variant"), (f"{PREFIX}x.lora_A.bias", "only lora_B"),
                       (f"{PREFIX}x.lora_A.a.b.weight", "no key of a LoRA file"), ("lora_A.weight", "no key of a LoRA file")):  # fmt: skip
        with pytest.raises(FormatError, match=words) as caught:
            read(folder(tmp_path / words[:4], pair(Q) | {key: torch.ones(3)}))
        assert caught.value.key == key


def test_quantised_factors(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 6, dtype=torch.int8),
        f"{PREFIX}{Q}.lora_B.weight": torch.ones(5, 4),
    }
    with pytest.raises(FormatError, match=r"torch\.int8: factors are") as caught:
        read(folder(tmp_path, tensors))
    assert caught.value.key == f"{PREFIX}{Q}.lora_A.weight"


def test_empty_factors(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 0), f"{PREFIX}{Q}.lora_B.weight": torch.ones(5, 4)}
    with pytest.raises(FormatError, match="shards were not gathered"):
        read(folder(tmp_path, tensors))


def test_integers_in_a_module_trained_whole(tmp_path: Path) -> None:
    tensors = pair(Q) | {f"{PREFIX}norm.num_batches_tracked": torch.tensor(7), f"{PREFIX}norm.weight": torch.ones(3)}
    assert read(folder(tmp_path, tensors, config(modules_to_save=["norm"]))).modules["norm"]["num_batches_tracked"] == 7


def test_a_file_of_heads_only(tmp_path: Path) -> None:
    head = {f"{PREFIX}score.weight": torch.ones(2, 3)}
    with pytest.raises(KeysError, match="factors for none"):
        read(folder(tmp_path, head, config(modules_to_save=["score"])))
    adapter = read(
        folder(tmp_path / "b", head, config(modules_to_save=["score"], target_modules="dummy-target-modules"))
    )
    assert adapter.sites == ()
    assert set(adapter.modules) == {"score"}


def test_targets_that_differ_from_the_file(tmp_path: Path) -> None:
    at = folder(tmp_path / "a", pair(Q), config(target_modules=["v_proj"]))
    assert read(at).spec.targets == (Q,)
    assert "the spec names those in the file" in notes(at)
    at = folder(tmp_path / "b", pair(Q), config(target_modules="all-linear"))
    assert read(at).spec.targets == (Q,)
    at = folder(tmp_path / "c", pair("xq_proj"), config(target_modules=["q_proj"]))  # PEFT 0.2 compared letters
    assert read(at).spec.targets == ("xq_proj",)


def test_layers(tmp_path: Path) -> None:
    adapter = read(folder(tmp_path, pair(Q), config(layers_to_transform=[0], layers_pattern=["layers", "h"])))
    assert (adapter.spec.layers, adapter.spec.layers_pattern) == ((0,), "(?:layers)|(?:h)")
    assert read(folder(tmp_path / "b", pair(Q), config(layers_to_transform=0))).spec.layers == (0,)
    with pytest.raises(FormatError, match="can't stand beside a regular expression"):
        read(folder(tmp_path / "c", pair(Q), config(target_modules=".*q_proj", layers_to_transform=[0])))


def experts(module: str, *, nested: int, rank: int = 4, E: int = 3) -> dict[str, Tensor]:
    key = f"{PREFIX}{module}" + ".base_layer" * nested
    return {
        f"{key}.lora_A.weight": torch.randn(E * rank, 6 + nested),
        f"{key}.lora_B.weight": torch.randn(5 + nested, rank * E),
    }


def test_experts(tmp_path: Path) -> None:
    tensors = experts("mlp.experts", nested=1) | experts("mlp.experts", nested=0)
    said = config(target_modules=[], target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    adapter = read(folder(tmp_path, tensors, said))
    assert adapter.sites == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    inner = adapter.factors["mlp.experts.gate_up_proj"]
    assert (inner.kind, tuple(inner.A.shape), tuple(inner.B.shape)) == ("parameter", (3, 4, 7), (3, 6, 4))
    A, B = (
        tensors[f"{PREFIX}mlp.experts.base_layer.lora_A.weight"],
        tensors[f"{PREFIX}mlp.experts.base_layer.lora_B.weight"],
    )
    expected = torch.einsum("ore,eri->eoi", B.reshape(6, 4, 3), A.reshape(3, 4, 7)) * 2.0
    torch.testing.assert_close(inner.delta(), expected)


def test_parameters_whose_order_nobody_knows(tmp_path: Path) -> None:
    tensors = experts("mlp", nested=1) | experts("mlp", nested=0)
    said = config(target_modules=[], target_parameters=["mlp.alpha", "mlp.beta"])
    with pytest.raises(KeysError, match=r"pass the base, weft\.load\(path, base=model\)"):
        read(folder(tmp_path, tensors, said))
    base = nn.Module()
    base.mlp = nn.Module()
    base.mlp.beta, base.mlp.other, base.mlp.alpha = (nn.Parameter(torch.zeros(3, 2, 2)) for _ in range(3))
    assert read(tmp_path, base=base).sites == ("mlp.beta", "mlp.alpha")
    with pytest.raises(KeysError, match="the base has no module 'mlp'"):
        read(tmp_path, base=nn.Module())


def test_wrappers_that_nothing_explains(tmp_path: Path) -> None:
    tensors = experts("mlp", nested=1) | experts("mlp", nested=0)
    with pytest.raises(KeysError, match="target_parameters name no parameter"):
        read(folder(tmp_path, tensors, config(target_modules=["mlp"])))
    with pytest.raises(KeysError, match="which is which can't be known"):
        read(folder(tmp_path / "b", experts("mlp", nested=0), config(target_modules=[], target_parameters=["a", "b"])))
    with pytest.raises(FormatError, match=r"expected \(E · 4, d_in\)"):
        read(folder(tmp_path / "c", pair("mlp", rank=6), config(target_modules=[], target_parameters=["mlp.a"])))


def test_attention(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}attn.lora_A.weight": torch.randn(4, 8), f"{PREFIX}attn.lora_B.weight": torch.randn(24, 4),
        f"{PREFIX}attn.base_layer.out_proj.lora_A.weight": torch.randn(4, 8), f"{PREFIX}attn.base_layer.out_proj.lora_B.weight": torch.randn(8, 4),
    }  # fmt: skip
    adapter = read(folder(tmp_path, tensors, config(target_modules=["attn"])))
    kinds = {path: (item.kind, item.scale) for path, item in adapter.factors.items()}
    assert kinds == {"attn.in_proj_weight": ("attention", 2.0), "attn.out_proj": ("attention", 4.0)}
    assert "twice" in notes(tmp_path)
    tensors[f"{PREFIX}attn.lora_B.weight"] = torch.randn(23, 4)
    with pytest.raises(FormatError, match="3 · 8 rows"):
        read(folder(tmp_path / "b", tensors, config(target_modules=["attn"])))


def test_untrained(tmp_path: Path) -> None:
    tensors = {key: tensor * ("lora_A" in key) for key, tensor in pair(Q).items()}
    assert "every B is zero" in notes(folder(tmp_path, tensors))


def test_config_only(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError,
        match=r"looked for adapter_model\.safetensors and adapter_model\.bin\. The folder holds 'adapter_config\.json'",
    ):
        read(folder(tmp_path, None))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such directory"):
        read(tmp_path / "no")


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    at = folder(tmp_path / "a", pair(Q))
    (at / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (at / "adapter_model.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(FormatError, match="outside of its folder"):
        read(at)


def test_nothing_is_read_before_names_and_shapes_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("tensors were read before their shapes were checked")

    at = folder(tmp_path, pair(Q, rank=8))
    monkeypatch.setattr("weft.formats.peft.read_tensors", never)
    with pytest.raises(FormatError, match="expected rank 4"):
        read(at)
