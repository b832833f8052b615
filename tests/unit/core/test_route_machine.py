"""Random sequences of load, drop, route, exception, training and generate: no row ever gets another adapter's output."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from tests.models import tiny_llama
from tests.unit.core.support import made
from weft.adapter import Adapter
from weft.core.bank import Bank, attach
from weft.spec import LoraSpec

NAMES = ["ann", "ben", "cy", "dee"]
SPECS = [
    LoraSpec(rank=2),
    LoraSpec(rank=2, alpha=7),
    LoraSpec(rank=5),
    LoraSpec(rank=3, targets=["q_proj", "down_proj"]),
    LoraSpec(rank=2, dora=True, targets=["v_proj", "up_proj"]),
]


class Failing(Exception):
    """What a test throws."""


@functools.cache
def world() -> tuple[nn.Module, list[Adapter], Tensor, dict[Any, Tensor], dict[Any, list[int]]]:
    """A model, adapters, a prompt, and what each adapter says to it alone; computed on plain banks of one."""
    torch.manual_seed(11)
    model = tiny_llama(layers=1, dtype=torch.float64)
    adapters = [made(model, spec, size=0.5) for spec in SPECS]
    prompt = torch.randint(3, 64, (1, 5))
    logits, tokens = {}, {}
    for number in (None, *range(len(adapters))):
        with attach(model, {}) as bank, torch.no_grad():
            if number is not None:
                bank.load("alone", adapters[number])
                bank.use("alone")
            logits[number] = model(input_ids=prompt).logits[0]
            tokens[number] = said(model, prompt)[0]
    assert len({tuple(answer) for answer in tokens.values()}) == len(tokens), (
        "every adapter has something of its own to say"
    )
    return model, adapters, prompt, logits, tokens


def said(model: nn.Module, prompt: Tensor, **options: Any) -> list[list[int]]:
    whole = model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        **options,
    )
    return whole[:, prompt.shape[1] :].tolist()


class Bankers(RuleBasedStateMachine):
    """A bank, and a plain dictionary of what has to be in it."""

    @initialize()
    def start(self) -> None:
        self.model, self.adapters, self.prompt, self.logits, self.tokens = world()
        self.bank: Bank = attach(self.model, {})
        self.pool = self.bank.pool()
        self.there: dict[str, int] = {}
        self.in_pool: set[str] = set()
        self.used: str | None = None
        self.held: list[tuple[Any, list[Any]]] = []

    def teardown(self) -> None:
        if hasattr(self, "bank"):
            self.bank.detach()

    @rule(
        name=st.sampled_from(NAMES),
        number=st.integers(0, len(SPECS) - 1),
        how=st.sampled_from(["fixed", "trainable", "pool"]),
    )
    def load(self, name: str, number: int, how: str) -> None:
        if name in self.there:
            self.drop(name)
        if how == "pool":
            self.pool.load(name, self.adapters[number])
            self.in_pool.add(name)
        else:
            self.bank.load(name, self.adapters[number], trainable=how == "trainable")
        self.there[name] = number

    @precondition(lambda self: self.there)
    @rule(name=st.sampled_from(NAMES))
    def drop(self, name: str) -> None:
        if name not in self.there:
            return
        self.bank.drop(name)
        del self.there[name]
        if self.used == name:
            self.used = None
        if name in self.in_pool:  # lines of a pool are given to the next one
            self.in_pool.discard(name)
            self.held = [item for item in self.held if name not in item[2]]  # type: ignore[misc]

    @rule(name=st.sampled_from([None, *NAMES]))
    def use(self, name: str | None) -> None:
        if name is None or name in self.there:
            self.bank.use(name)
            self.used = name

    def entries(self, wanted: list[str | None]) -> list[str | None]:
        return [name if name in self.there else None for name in wanted]

    def expected(self, entries: list[str | None]) -> list[Any]:
        return [None if name is None else self.there[name] for name in entries]

    def check(self, numbers: list[Any], how: str) -> None:
        rows = self.prompt.expand(len(numbers), -1)
        if how == "generate":
            assert said(self.model, rows) == [self.tokens[number] for number in numbers]
        elif how == "beams":
            said(self.model, rows, num_beams=2)
        with torch.set_grad_enabled(how == "grad"):
            got = self.model(input_ids=rows).logits
        for row, number in enumerate(numbers):
            assert torch.allclose(got[row], self.logits[number], atol=1e-8), f"row {row} of {numbers}, {how}"

    @rule(
        wanted=st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=5),
        how=st.sampled_from(["forward", "grad", "generate", "beams"]),
    )
    def route(self, wanted: list[str | None], how: str) -> None:
        entries = self.entries(wanted)
        with self.bank.route(entries):
            self.check(self.expected(entries), how)

    @rule(
        wanted=st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=3), name=st.sampled_from([None, *NAMES])
    )
    def nested(self, wanted: list[str | None], name: str | None) -> None:
        entries, inner = self.entries(wanted), name if name in self.there else None
        with self.bank.route(entries):
            with self.bank.route(inner):
                self.check([None if inner is None else self.there[inner]], "forward")
            self.check(self.expected(entries), "forward")

    @rule(
        wanted=st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=3),
        child=st.sampled_from(["q_proj", "v_proj"]),
    )
    def exception(self, wanted: list[str | None], child: str) -> None:
        module = getattr(self.model.model.layers[0].self_attn, child)

        def fail(module: nn.Module, args: Any) -> None:
            raise Failing

        handle = module.register_forward_pre_hook(fail)
        try:
            with self.bank.route(self.entries(wanted)):
                self.model(input_ids=self.prompt.expand(len(wanted), -1))
        except Failing:
            pass
        finally:
            handle.remove()

    @rule(wanted=st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=3))
    def hold(self, wanted: list[str | None]) -> None:
        entries = self.entries(wanted)
        self.held.append((self.bank.route(entries), self.expected(entries), set(entries)))  # type: ignore[arg-type]

    @precondition(lambda self: self.held)
    @rule(how=st.sampled_from(["forward", "generate"]))
    def enter_held(self, how: str) -> None:
        route, numbers, _ = self.held.pop(0)  # type: ignore[misc]
        with route:
            self.check(numbers, how)

    @invariant()
    def outside_of_routes_it_is_the_one_in_use(self) -> None:
        if hasattr(self, "bank"):
            with torch.no_grad():
                got = self.model(input_ids=self.prompt).logits[0]
            number = None if self.used is None else self.there[self.used]
            assert torch.allclose(got, self.logits[number], atol=1e-8)


TestBankers = Bankers.TestCase
TestBankers.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
