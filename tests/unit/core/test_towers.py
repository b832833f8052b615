"""A spec by part of a model: one adapter, whose parts can be used alone; statistics of normalisations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import weft
from weft import LoraSpec
from weft.errors import BaseMismatchError, SpecError, TargetError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv2(self.bn1(self.conv1(images)).relu()).mean((2, 3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 5))
        self.vision_model = Net()
        self.head = nn.Linear(5, 5)

    def forward(self, text: Tensor, images: Tensor) -> Tensor:
        return self.head(self.text_model(text) + self.vision_model(images))


TEXT = LoraSpec(rank=2, targets=["0", "1"])
VISION = LoraSpec(rank=3, alpha=6, targets=["conv1", "conv2"])
SPECS: dict[str, LoraSpec | Mapping[str, LoraSpec]] = {
    "one directory": {"text_model": TEXT, "vision_model": VISION},
    "rsLoRA in one": {"text_model": TEXT, "vision_model": VISION.replace(rslora=True)},
    "two directories": {"text_model": TEXT.replace(dropout=0.25), "vision_model": VISION.replace(batch_norm="saved")},
    "with a head": LoraSpec(
        towers={"text_model": TEXT.replace(dora=True), "vision_model": VISION.replace(batch_norm="adapted")},
        save_modules=["head"],
    ),
    "one tower": {"vision_model": VISION},
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 7).double(), torch.randn(4, 3, 6, 6).double()


def trained(model: nn.Module, spec: LoraSpec | Mapping[str, LoraSpec]) -> weft.Adapter:
    """An adapter of which nothing is zero."""
    with weft.attach(model, {"mine": spec}) as bank:
        for name, parameter in bank.named_parameters("mine"):
            if parameter.requires_grad and not name.endswith("magnitude"):
                parameter.data.normal_(0, 0.3)
        model.train()
        model(*batch())
        model.eval()
        return bank.adapter("mine")


def answer(model: nn.Module, adapter: weft.Adapter, *inputs: Tensor) -> Tensor:
    with weft.attach(model, {}) as bank, torch.no_grad():
        bank.load("it", adapter)
        bank.use("it")
        return model(*inputs)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_one_adapter_one_digest_one_directory(
    spec: LoraSpec | Mapping[str, LoraSpec], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = Pair().double().eval()
    adapter = trained(model, spec)
    adapter.save(tmp_path / "a")
    again = weft.load(tmp_path / "a")
    assert again == adapter
    assert again.spec == adapter.spec
    assert again.towers == tuple(adapter.spec.towers)
    apart = "two" in request.node.callspec.id or "head" in request.node.callspec.id
    assert (tmp_path / "a" / "vision_model").is_dir() == apart
    inputs = batch()
    assert torch.equal(answer(model, again, *inputs), answer(model, adapter, *inputs))
    assert not torch.allclose(answer(model, again, *inputs), model(*inputs))
    again.save(tmp_path / "a", overwrite=True)
    assert weft.load(weft.convert(again, "towers", tmp_path / "b")) == adapter
    weft.convert(again, "towers", tmp_path / "b", overwrite=True)
    assert weft.load(tmp_path / "b") == adapter


def test_another_layout_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    adapter = trained(Pair().double(), SPECS["one directory"])
    weft.convert(adapter, "towers", tmp_path / "a")
    (tmp_path / "a" / "vision_model" / "mine.txt").write_text("kept")
    adapter.save(tmp_path / "a", overwrite=True)
    left = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*")}
    assert left == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "weft.json",
        "vision_model",
        "vision_model/mine.txt",
    }


def test_each_tower_alone_is_an_adapter_of_that_part(tmp_path: Path) -> None:
    model = Pair().double().eval()
    adapter = trained(model, SPECS["with a head"])
    text, images = batch()
    halves = {name: adapter.tower(name) for name in adapter.towers}
    alone = {"text_model": answer(model.text_model, halves["text_model"], text),
             "vision_model": answer(model.vision_model, halves["vision_model"], images)}  # fmt: skip
    head = nn.functional.linear(sum(alone.values()), *adapter.modules["head"].values())  # type: ignore[arg-type]
    torch.testing.assert_close(answer(model, adapter, text, images), head)
    halves["vision_model"].save(tmp_path / "v")
    with pytest.raises(BaseMismatchError):
        answer(Net(), weft.load(tmp_path / "v"), images.float())
    assert weft.Adapter.of_towers(halves, adapter) == adapter
    small = weft.shrink(halves["vision_model"], rank=1)
    mixed = adapter.with_tower("vision_model", small)
    assert mixed.tower("vision_model").ranks() == "1"
    assert mixed.tower("text_model") == halves["text_model"]
    with pytest.raises(BaseMismatchError, match="text_model"):
        adapter.with_tower("text_model", small)
    with pytest.raises(TargetError, match="'vision_model'"):
        adapter.tower("vision")


def test_whole_adapters_are_mixed_and_their_towers_stay() -> None:
    model = Pair().double().eval()
    one, two = (trained(model, SPECS["one directory"]) for _ in range(2))
    mixed = weft.combine([(one, 0.5), (two, 0.25)])
    assert mixed.towers == one.towers
    half = mixed.tower("vision_model")
    wanted = weft.combine([(one.tower("vision_model"), 0.5), (two.tower("vision_model"), 0.25)])
    for site in half.sites:
        torch.testing.assert_close(half.delta(site), wanted.delta(site))
    assert weft.shrink(one, rank=1).towers == one.towers


def test_rows_of_a_batch_use_towers_of_different_adapters() -> None:
    model = Pair().double().eval()
    one, two = trained(model, SPECS["one directory"]), trained(model, SPECS["rsLoRA in one"])
    inputs = batch()
    with weft.attach(model, {}) as bank, torch.no_grad():
        bank.load("one", one)
        bank.load("two", two)
        with bank.route(["one", None, "two", "one"]):
            rows = model(*inputs)
    for row, adapter in enumerate((one, None, two, one)):
        wanted = model(*inputs) if adapter is None else answer(model, adapter, *inputs)
        torch.testing.assert_close(rows[row], wanted[row])


def test_an_unknown_tower_is_named_with_what_there_is() -> None:
    with pytest.raises(TargetError, match=r"'text_modl'.*'text_model'"):
        weft.attach(Pair(), {"mine": {"text_modl": TEXT}})
    with pytest.raises(TargetError, match="conv9"):
        weft.attach(Pair(), {"mine": {"vision_model": LoraSpec(targets=["conv9"])}})


def test_contradictions_of_towers_are_refused() -> None:
    with pytest.raises(SpecError, match="rank"):
        LoraSpec(rank=4, towers={"text_model": TEXT})
    with pytest.raises(SpecError, match="each other"):
        LoraSpec(towers={"vision_model": VISION, "vision_model.fc": TEXT})
    with pytest.raises(SpecError, match="towers itself"):
        LoraSpec(towers={"all": LoraSpec(towers={"text_model": TEXT})})
    with pytest.raises(SpecError, match="in a tower"):
        weft.attach(Pair(), {"mine": LoraSpec(towers={"vision_model": VISION}, save_modules=["vision_model.fc"])})
    spec = LoraSpec(towers={"text_model": TEXT, "vision_model": VISION}, save_modules=["head"])
    assert LoraSpec.from_dict(spec.to_dict()) == spec
    assert spec.rank_at("vision_model.conv1") == 3


@pytest.mark.parametrize("kind", ["frozen", "adapted", "saved"])
def test_statistics_are_the_bases_or_the_adapters(kind: str) -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with weft.attach(model, {"mine": VISION.replace(batch_norm=kind)}) as bank:
        assert any("running statistics" in note for note in bank.notes("mine"))
        grown = dict(bank.named_parameters("mine"))
        assert any("bn1" in name and p.requires_grad for name, p in grown.items()) == (kind == "saved")
        model.train()
        for _ in range(3):
            model(torch.randn(8, 3, 6, 6) + 2)
        adapter = bank.adapter("mine")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    if kind == "frozen":
        assert not adapter.modules
        return
    assert not torch.equal(adapter.modules["bn1"]["running_mean"], before["bn1.running_mean"])
    model.eval()
    images = torch.randn(2, 3, 6, 6)
    assert not torch.allclose(answer(model, adapter, images), model(images))
