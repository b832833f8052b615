"""Two towers: features, losses over pairs, heads over both, and CLIP-like models through the same door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.processes import in_two_processes, leave, meet
from weft import LoraSpec, TwoTower
from weft.errors import SpecError, TargetError
from weft.models.fusion import FUSIONS
from weft.models.pair_losses import DUPLICATES, LOSSES, pair_loss, positives
from weft.models.towers import spread_spec


class Words(nn.Module):
    """(B, T) -> (B, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.mix = nn.Linear(6, 6)
        self.d_model = 6

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.mix(self.embedding(input_ids)).tanh()


class Small(nn.Module):
    """A CNN with a classifier, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 7, 3)
        self.conv3 = nn.Conv2d(7, 7, 1)
        self.fc = nn.Linear(7, 4)

    def features(self, images: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(images).relu()).relu()).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images))


def batch(rows: int = 5) -> dict[str, Tensor]:
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[1, 3:] = 0
    return {
        "input_ids": torch.randint(0, 20, (rows, 6)),
        "attention_mask": mask,
        "pixel_values": torch.randn(rows, 3, 6, 6),
    }


def unit(rows: int, width: int) -> Tensor:
    return nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def test_features_are_masked_means_and_what_goes_into_the_classifier() -> None:
    words, images = Words(), Small()
    model = TwoTower(words, images, dim=3).eval()
    assert model.features_from == "fc"
    inputs = batch()
    states = words(inputs["input_ids"])
    means = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    found = model.encode_text(inputs["input_ids"], inputs["attention_mask"])[:2]
    torch.testing.assert_close(found, nn.functional.normalize(model.text_projection(means), dim=1))
    wanted = model.vision_projection(images.features(inputs["pixel_values"]))
    torch.testing.assert_close(model.encode_image(inputs["pixel_values"]), nn.functional.normalize(wanted, dim=1))
    assert not images.fc._forward_pre_hooks
    assert TwoTower(words, images, features="output", vision_width=4).vision_projection.in_features == 4
    with pytest.raises(SpecError, match="conv3"):
        TwoTower(words, images, features="conv33")
    with pytest.raises(SpecError, match="vision_width"):
        TwoTower(words, nn.Sequential(nn.Conv2d(3, 4, 1)))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_losses_are_what_loops_say(loss: str, duplicates: str) -> None:
    text, image = unit(6, 4), unit(6, 4)
    scale, bias = torch.rand((), dtype=torch.float64) * 5 + 1, torch.randn((), dtype=torch.float64)
    ids, pictures = torch.tensor([0, 1, 0, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 3, 4])
    same = positives(ids, pictures)
    total = 0.0
    if loss == "softmax":
        for left, right in ((text, image), (image, text)):
            for i in range(6):
                kept = [j for j in range(6) if duplicates != "mask" or j == i or not same[i, j]]
                logs = torch.log_softmax(torch.stack([scale * (left[i] @ right[j]) for j in kept]), 0)
                wanted = [j for j in kept if j == i or (duplicates == "targets" and same[i, j])]
                total += -sum(float(logs[kept.index(j)]) for j in wanted) / len(wanted) / 12
    else:
        for i in range(6):
            for j in range(6):
                if i != j and same[i, j] and duplicates == "mask":
                    continue
                right = i == j or (duplicates == "targets" and bool(same[i, j]))
                logit = scale * (text[i] @ image[j]) + bias
                total += -float(nn.functional.logsigmoid(logit if right else -logit)) / 6
    found = pair_loss(text, image, scale, bias, ids, pictures, loss=loss, duplicates=duplicates)
    assert float(found) == pytest.approx(total, rel=1e-9)


def _worker(rank: int, folder: str) -> None:
    meet(rank, folder)
    given = torch.load(f"{folder}/in.pt", weights_only=True)
    rows = slice(3 * rank, 3 * rank + 3)
    weight = given["weight"].clone().requires_grad_()
    scale = given["scale"].clone().requires_grad_()
    parts = [nn.functional.normalize(given[name][rows] @ weight, dim=1) for name in ("text", "image")]
    found = {}
    for loss in LOSSES:
        value = pair_loss(*parts, scale, given["bias"], given["ids"][rows], given["pictures"][rows], loss=loss)
        gradients = torch.autograd.grad(value, [weight, scale], retain_graph=True)
        found[loss] = [value.detach(), *(_mean(part) for part in gradients)]
    torch.save(found, f"{folder}/out{rank}.pt")
    leave()


def _mean(tensor: Tensor) -> Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor / 2


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    f64 = torch.float64
    given = {"text": torch.randn(6, 4, dtype=f64), "image": torch.randn(6, 4, dtype=f64), "weight": torch.randn(4, 3, dtype=f64),
             "scale": torch.rand((), dtype=f64) + 2, "bias": torch.randn((), dtype=f64), "ids": torch.tensor([0, 1, 2, 0, 3, 4]),
             "pictures": torch.tensor([0, 1, 2, 3, 1, 4])}  # fmt: skip
    torch.save(given, tmp_path / "in.pt")
    in_two_processes(_worker, str(tmp_path))
    weight, scale = given["weight"].clone().requires_grad_(), given["scale"].clone().requires_grad_()
    parts = [nn.functional.normalize(given[name] @ weight, dim=1) for name in ("text", "image")]
    for loss in LOSSES:
        value = pair_loss(*parts, scale, given["bias"], given["ids"], given["pictures"], loss=loss)
        wanted = [value.detach(), *torch.autograd.grad(value, [weight, scale], retain_graph=True)]
        for rank in range(2):
            for left, right in zip(
                torch.load(tmp_path / f"out{rank}.pt", weights_only=True)[loss], wanted, strict=True
            ):
                torch.testing.assert_close(left, right)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_heads_pass_a_gradient_check(fusion: str) -> None:
    head = FUSIONS[fusion](4, 3).double()
    for parameter in head.parameters():
        parameter.data.normal_(0, 0.5)
    pair = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(head, pair)
    changed = [torch.randn(2, 4, dtype=torch.float64), pair[1].detach()]
    assert not torch.allclose(head(*pair), head(*changed)), "the text is read"
    assert not torch.allclose(head(*pair), head(changed[1], changed[0]))


def test_modality_dropout_blanks_one_side_of_some_rows() -> None:
    model = TwoTower(Words(), Small(), dim=4, fusion="concat", classes=2, modality_dropout=0.5)
    text, image = torch.rand(400, 4) + 1, torch.rand(400, 4) + 1
    blanked = model._blanked(text, image)
    gone = [(part == 0).all(1) for part in blanked]
    assert not (gone[0] & gone[1]).any()
    assert 0.05 < float(gone[0].float().mean()) < 0.45
    assert 0.05 < float(gone[1].float().mean()) < 0.45
    with pytest.raises(SpecError, match="modality_dropout"):
        TwoTower(Words(), Small(), modality_dropout=0.5)


def test_heads_go_with_the_adapter(tmp_path: Path) -> None:
    model = TwoTower(Words(), Small(), dim=3).eval()
    inputs = batch()
    with weft.attach(model, {"mine": {"vision_model": LoraSpec(rank=2, targets=["conv2"])}}) as bank:
        for _, parameter in bank.named_parameters("mine"):
            parameter.data.normal_(0, 0.5)
        adapter = bank.adapter("mine")
        wanted = model(**inputs).logits
    assert set(adapter.modules) == {"text_projection", "vision_projection", "temperature"}
    adapter.save(tmp_path / "a")
    again = TwoTower(model.text_model, model.vision_model, dim=3, seed=7).eval()
    with weft.attach(again, {}) as bank:
        bank.load("it", weft.load(tmp_path / "a"))
        bank.use("it")
        torch.testing.assert_close(again(**inputs).logits, wanted)


def test_one_spec_is_spread_over_the_towers() -> None:
    model = TwoTower(Words(), Small(), dim=3)
    towers = ("text_model", "vision_model")
    spec = spread_spec(model, LoraSpec(rank=3), towers, (), model.weft_heads)
    assert spec.towers["vision_model"].targets == ("conv2", "conv3")
    named = spread_spec(model, LoraSpec(rank=3, targets=["mix", "conv1"]), towers, (), ())
    assert {name: part.targets for name, part in named.towers.items()} == {
        "text_model": ("mix",),
        "vision_model": ("conv1",),
    }
    none = spread_spec(model, LoraSpec(), towers, towers, model.weft_heads)
    assert not none.towers
    with weft.attach(model, none) as bank:
        assert not bank.adapter("default").sites
    with pytest.raises(TargetError, match="conv9"):
        spread_spec(model, LoraSpec(targets=["mix", "conv9"]), towers, (), ())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_models_with_both_towers_go_through_the_same_door(kind: str) -> None:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": 20,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**small, "image_size": 8, "patch_size": 4}
    if kind == "clip":
        model: nn.Module = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.eval()
    specs = {
        "text_model": LoraSpec(rank=2, targets=["q_proj", "v_proj"]),
        "vision_model": LoraSpec(rank=3, targets=["fc1"]),
    }
    inputs = {"input_ids": torch.randint(2, 20, (3, 5)), "pixel_values": torch.randn(3, 3, 8, 8)}
    before = model(**inputs).logits_per_text.detach()
    with weft.attach(model, {"mine": specs}) as bank:
        for _, parameter in bank.named_parameters("mine"):
            parameter.data.normal_(0, 0.5)
        assert not torch.allclose(model(**inputs).logits_per_text, before)
        adapter = bank.adapter("mine")
    assert adapter.towers == ("text_model", "vision_model")
    with weft.attach(model.vision_model, {}) as bank:
        bank.load("half", adapter.tower("vision_model"))
