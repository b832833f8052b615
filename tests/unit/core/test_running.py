"""An attached model in every way that models are run: autocast, checkpoints, compilers, accumulation, several processes."""

from __future__ import annotations

import contextlib
import copy
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models import ARCHITECTURES, batch_for, tiny_llama
from tests.processes import in_two_processes, leave, meet
from tests.tolerances import assert_close
from tests.unit.core.support import State, checkpoints, fill, grads_of, outputs_of
from weft.core import ops
from weft.core.bank import Bank, attach
from weft.spec import LoraSpec

TEXT = {
    "llama": {"targets": "all-linear"},
    "gpt2": {"targets": ["c_attn", "c_fc"]},
    "bert": {"targets": ["query", "key", "dense"]},
    "t5": {"targets": ["q", "k", "v", "wi_0", "wo"]},
    "mixtral": {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


def ready(name: str, dtype: torch.dtype = torch.float32, **spec: Any) -> tuple[nn.Module, Bank, dict[str, Tensor]]:
    model = ARCHITECTURES[name](dtype=dtype)
    batch = batch_for(model)
    bank = attach(model, {"a": LoraSpec(**({"rank": 3} | TEXT[name] | spec))})
    fill(bank)
    return model.train(), bank, batch


def step(model: nn.Module, bank: Bank, batch: dict[str, Tensor], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of one training step."""
    for _, parameter in bank.named_parameters("a"):
        parameter.grad = None
    torch.manual_seed(seed)
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), grads_of(bank, "a")


def same(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]], tolerance: Any = None) -> None:
    assert_close(one[0], two[0], tolerance, "logits")
    assert one[1].keys() == two[1].keys()
    largest = max(float(grad.abs().max()) for grad in two[1].values())
    assert largest > 0
    for name, grad in one[1].items():
        assert_close(grad, two[1][name], tolerance, name)


# gradient checkpointing


@pytest.mark.parametrize(
    ("name", "dropout"), [(name, p) for name in TEXT for p in (0.0, 0.1) if p == 0 or name != "mixtral"]
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_change_no_gradient(name: str, reentrant: bool, dropout: float) -> None:
    model, bank, batch = ready(name, torch.float64, dropout=dropout)  # in float32 the order of sums alone shows in T5
    twin = copy.deepcopy(model)
    checkpoints(twin, reentrant=reentrant)
    for _ in range(2):
        same(step(twin, twin.__dict__["_weft_bank"], batch), step(model, bank, batch), torch.float64)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_under_autocast(reentrant: bool) -> None:
    model, bank, batch = ready("llama", dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        without = step(model, bank, batch)
        checkpoints(model, reentrant=reentrant)
        again = step(model, bank, batch)
    assert again[0].dtype == without[0].dtype == torch.bfloat16
    for name, grad in again[1].items():
        assert float((grad - without[1][name]).norm() / without[1][name].norm()) < 0.1, name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("crossed", "dropout"), [(False, 0.0), (False, 0.1), (False, 0.5), (True, 0.0)])
def test_checkpoints_of_torch_itself(reentrant: bool, crossed: bool, dropout: float) -> None:
    """Crossed: keys from another tensor than queries, in a block whose name doesn't say so."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))
            self.conv = nn.Conv1d(6, 6, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y = y if crossed else x
            x = x + torch.tanh(self.q_proj(x)) * self.k_proj(y) + self.v_proj(y)
            return x + self.conv(x.mT).mT

    model = nn.ModuleList([Block(), Block()])
    bank = attach(model, {"a": LoraSpec(rank=2, targets=["q_proj", "k_proj", "v_proj", "conv"], dropout=dropout)})
    fill(bank)
    model.train()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 5, 6, requires_grad=True)
    found = []
    for blocks in (model, twin):
        torch.manual_seed(0)
        y = x
        for block in blocks:
            y = checkpoint(block, y, x, use_reentrant=reentrant) if blocks is twin else block(y, x)
        y.square().sum().backward()
        found.append((y, x.grad.clone(), *grads_of(blocks.__dict__["_weft_bank"], "a").values()))
        x.grad = None
    for got, want in zip(*found, strict=True):
        assert_close(got, want)


def test_evaluation_between_checkpointed_steps() -> None:
    model, bank, batch = ready("llama")
    without = step(model, bank, batch)
    checkpoints(model, reentrant=True)
    for _ in range(2):
        same(step(model, bank, batch), without, torch.float32)
        model.eval()
        with torch.no_grad():
            assert_close(outputs_of(model, batch), without[0])
        model.train()


# autocast and dtypes


@pytest.mark.parametrize("name", list(TEXT))
def test_autocast_forward_and_backward(name: str) -> None:
    model, bank, batch = ready(name)
    exact = step(model, bank, batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, bank, batch)
    assert all(grad.dtype == torch.float32 for grad in got[1].values())
    if name != "mixtral":  # a rounded router chooses other experts
        error = (got[0].float() - exact[0]).abs().mean()
        assert float(error) < 0.1 * float(exact[0].abs().mean())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_bfloat16_base_with_float32_factors(name: str) -> None:
    model, bank, batch = ready(name, torch.bfloat16, dropout=0.1)
    logits, grads = step(model, bank, batch)
    assert logits.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads.values())
    assert {p.dtype for n, p in model.named_parameters() if ".weft." not in n} == {torch.bfloat16}


def test_float64_is_plain_double_precision() -> None:
    model, bank, batch = ready("llama", torch.float64)
    assert {p.dtype for _, p in bank.named_parameters("a")} == {torch.float64}
    assert step(model, bank, batch)[0].dtype == torch.float64


# several backwards


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model, bank, _ = ready("llama", torch.float64)
    rows = torch.randint(3, 64, (4, 6))
    for part in rows.split(1):
        outputs_of(model, {"input_ids": part}).square().sum().backward()
    got = grads_of(bank, "a")
    for _, parameter in bank.named_parameters("a"):
        parameter.grad = None
    outputs_of(model, {"input_ids": rows}).square().sum().backward()
    for name, grad in grads_of(bank, "a").items():
        assert_close(got[name], grad, what=name)


def test_a_kept_graph_and_second_derivatives_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank, batch = ready("llama", torch.float64)
    model.set_attn_implementation("eager")  # torch's fused attention has no second derivative
    parameters = [p for _, p in bank.named_parameters("a")]

    def derivatives() -> tuple[list[Tensor], list[Tensor]]:
        loss = model(**batch).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        again = torch.autograd.grad(loss, parameters, retain_graph=True)
        for left, right in zip(first, again, strict=True):
            assert_close(left, right)
        return list(first), list(torch.autograd.grad(sum(grad.square().sum() for grad in first), parameters))

    ours = derivatives()
    monkeypatch.setattr(ops, "use_plain", lambda x: True)
    for got, want in zip(ours, derivatives(), strict=True):
        for left, right in zip(got, want, strict=True):
            assert_close(left, right)


def test_saved_tensors_may_live_elsewhere() -> None:
    model, bank, batch = ready("llama", dropout=0.1)
    expected = step(model, bank, batch)
    with torch.autograd.graph.save_on_cpu():
        same(step(model, bank, batch), expected)


def test_generation_with_a_cache() -> None:
    model, bank, _ = ready("llama")
    model.eval()
    prompt = torch.randint(3, 64, (2, 5))
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    with torch.no_grad():
        cached, plain = (
            model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=use, **settings)
            for use in (True, False)
        )
        bank.use(None)
        base = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, base)


# compilers


@contextlib.contextmanager
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_agrees() -> None:
    model = tiny_llama(layers=1)
    batch = batch_for(model)
    bank = attach(model, {"a": LoraSpec(rank=3)})
    fill(bank)
    expected = step(model, bank, batch)
    with fresh_dynamo():
        same(step(torch.compile(model, backend="aot_eager", fullgraph=True), bank, batch), expected, torch.float32)


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embed(ids))
        x = x + self.conv(x.mT).mT
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(F.linear(x, self.mix))


ZOO: dict[str, Any] = {"targets": ["embed", "linear", "conv", "attn"], "target_parameters": ["mix"]}


@pytest.mark.parametrize("spec", [
    {"bias": "lora_only", "save_modules": ["head"]},
    {"targets": ["embed", "linear", "conv", "attn.out_proj"], "target_parameters": [], "dora": True},
], ids=["biases and a head", "dora"])  # fmt: skip
def test_compiled_layers_of_every_kind(spec: dict[str, Any]) -> None:
    model = Zoo()
    bank = attach(model, {"a": LoraSpec(**({"rank": 2} | ZOO | spec))})
    fill(bank)
    ids = torch.randint(16, (3, 5))
    found = []
    with fresh_dynamo():
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            for _, parameter in bank.named_parameters("a"):
                parameter.grad = None
            y = run(ids)
            y.square().sum().backward()
            found.append((y.detach(), grads_of(bank, "a")))
        bank.use(None)
        assert_close(run(ids), model(ids))
    same(found[1], found[0], torch.float32)


def test_compiled_dropout_is_dropout() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    bank = attach(model, {"a": LoraSpec(rank=4, targets=["0"], dropout=0.5)})
    fill(bank)
    x = torch.randn(50, 64)
    with fresh_dynamo():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        model.train()
        mean = torch.stack([compiled(x).detach() for _ in range(200)]).mean(0)
        model.eval()
        exact = compiled(x).detach()
    assert_close(exact, model(x).detach())
    update = exact - F.linear(x, model[0].weight).detach()
    assert float((mean - exact).norm() / update.norm()) < 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.skipif(sys.platform != "linux", reason="needs a C++ compiler where torch looks for it")
def test_inductor() -> None:
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    bank = attach(model, {"a": LoraSpec(rank=2, targets=["0", "2"])})
    fill(bank)
    x = torch.randn(4, 8)
    found = []
    with fresh_dynamo():
        for run in (model, torch.compile(model, fullgraph=True)):
            for _, parameter in bank.named_parameters("a"):
                parameter.grad = None
            y = run(x)
            y.square().sum().backward()
            found.append((y.detach(), grads_of(bank, "a")))
    same(found[1], found[0], torch.float32)


# several processes


def _work(rank: int, folder: str, features: dict[str, Any]) -> None:
    meet(rank, folder)
    torch.manual_seed(0)
    model = Zoo()
    bank = attach(model, {"a": LoraSpec(**({"rank": 2} | ZOO | features))}, seed=1)
    fill(bank)
    ids = torch.randint(16, (4, 5))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(ids[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in bank.adapter().tensors().items()}
    torch.save(state, f"{folder}/{rank}.pt")
    if rank == 0:  # the same alone, with all rows
        torch.manual_seed(0)
        alone = Zoo()
        twin = attach(alone, {"a": LoraSpec(**({"rank": 2} | ZOO | features))}, seed=1)
        fill(twin)
        optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            alone(ids).square().mean().backward()
            optimizer.step()
        torch.save(dict(twin.adapter().tensors()), f"{folder}/alone.pt")
    leave()


@pytest.mark.slow
def test_two_processes_train_what_one_trains() -> None:
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        in_two_processes(_work, folder, {"bias": "lora_only", "save_modules": ["head"]})
        one, two, alone = (torch.load(f"{folder}/{name}.pt", weights_only=True) for name in ("0", "1", "alone"))
    assert one.keys() == alone.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
        assert_close(tensor, alone[name], torch.float32, name)


def test_running_changes_nothing_of_the_base() -> None:
    for name in TEXT:
        model = ARCHITECTURES[name]()
        before, batch = State(model), batch_for(model)
        with attach(model, {"a": LoraSpec(rank=2, **TEXT[name])}) as bank:
            fill(bank)
            model.train()
            checkpoints(model, reentrant=True)
            with torch.autocast("cpu", torch.bfloat16):
                model(**batch).loss.backward()
            before.check_bytes()
