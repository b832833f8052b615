"""The page of a run: whatever is there is drawn, nothing from data can do harm, and it is well-formed."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from weft.diagnosis import Finding, Record
from weft.diagnosis.adapter_numbers import AgainstBase, SiteNumbers
from weft.report import RunFacts, run_page
from weft.report.charts import Series, chart
from weft.report.sites import heat_map

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\x00\u202e"
VOID = {"meta", "br", "line", "rect", "circle", "polyline"}


class Checked(HTMLParser):
    """Counts elements, and sees that each one is closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID or (tag != "meta" and tag != "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def site(path: str, **changes: Any) -> SiteNumbers:
    values: dict[str, Any] = {
        "path": path, "kind": "linear", "shape": (8, 8), "rank": 4, "scale": 1.0, "norm": 0.5, "share": 0.1, "spectrum": (0.4, 0.2, 0.1, 0.0),
        "effective_rank": 2.7, "directions": 3, "moved": True, "base": AgainstBase(2.0, 0.25, 0.4, 1, 8),
    }  # fmt: skip
    return SiteNumbers(**{**values, **changes})


def full(text: str = "plain") -> RunFacts:
    rows: list[dict[str, Any]] = [{"step": 0, "of": "base", "eval_loss": 4.0}]
    rows += [
        {"step": s, "loss": 4 - s / 20, "loss_high": 5 - s / 20, "learning_rate": 1e-3, "grad_norm": 2.0, "grad_norm_high": 3.0, "tokens_per_second": 12000.0, "padding": 0.1}
        for s in range(1, 41)
    ]  # fmt: skip
    rows += [
        {"step": 20, "eval_loss": 3.0}, {"step": 40, "eval_loss": 2.5}, {"step": 20, "of": "general", "general_loss": 3.3},
        {"step": 10, "change": f"grow {text}", "ranks": {"m.layers.0.q": [2, 4]}},
        {"step": 12, "of": "trouble", "rule": text, "seen": 15, "factor": 0.5},
        {"step": 0, "of": "weights", "weights": {"m.layers.1.q": 4.0}},
    ]  # fmt: skip
    sites = [site(f"m.layers.{i}.{kind}{text if text != 'plain' else ''}") for i in range(3) for kind in ("q", "v")]
    return RunFacts(
        name=text, place=f"runs/{text}", record=Record(rows, {"steps": 40, "kind": "completion"}, True),
        environment={"versions": {"weft": text, "torch": "2"}, "command": text, "inputs": {"base": text, "data": text}, "fingerprint": {"name": text}, "started": text},
        recipe={"clip": 1.0, "schedule": text, "batch_size": 8, "accumulation": 1, "seed": 0, "spec": {"rank": 4, "alpha": 4.0}},
        report={"steps": 40, "epochs": 1.0, "tokens": 1000, "seconds": 75.0, "best_step": 40, "digest": text, "base": {"loss": 4.0, text: 1.0}, "adapter": {"loss": 2.5},
                "learning_rate": 1e-3, "notes": [text], "data": {"train": {"source": text, "digest": "ab" * 32, "summary": text}},
                "ranks": {"sites": {"m.layers.0.q": 4}, "changes": []}},
        sites=sites, findings=[Finding(text, "high", text, text, step=15, site=text), Finding("b", "low", "e", "a")],
        samples={"kind": "completion", "rows": [{"prompt": text, "reference": text, "base": text, "adapter": text}], "note": text}, notes=[text],
    )  # fmt: skip


def test_everything_is_on_the_page() -> None:
    page = run_page(full())
    seen = Checked(page)
    words = " ".join(seen.texts)
    for wanted in ("Before and after", "Findings", "Loss", "Learning rate", "Gradient norm", "clipped above 1", "Speed", "padding", "Rank of the sites",
                   "Effective rank", "‖ΔW‖ / ‖W‖", "New directions", "Spectrum", "Answers before and after", "Data", "kept: step 40", "general text",
                   "trouble began", "ranks changed", "1 min 15 s"):  # fmt: skip
        assert wanted in words, wanted
    assert page.index('class="high"') < page.index('class="low"')
    pictures = seen.seen["svg"]
    assert pictures == 13
    assert (
        len(re.findall(r"<svg[^>]*role=\"img\" aria-label=[^>]*><title>[^<]+</title><desc>[^<]+</desc>", page))
        + len(re.findall(r"<svg[^>]*role=\"img\"[^>]*class=\"chart\"><title>[^<]+</title><desc>[^<]+</desc>", page))
        >= pictures
    )


def test_nothing_from_data_can_do_harm_and_nothing_is_fetched() -> None:
    page = run_page(full(HOSTILE))
    seen = Checked(page)
    assert not {"script", "img", "link", "iframe", "object"} & set(seen.seen)
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href")]
    assert "\x00" not in page
    assert "\u202e" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    page.encode("utf-8")


@pytest.mark.parametrize("missing", ["report", "sites", "samples", "findings", "environment", "recipe", "rows", "all"])
def test_what_is_missing_is_left_out(missing: str) -> None:
    import dataclasses

    facts = full()
    empty: dict[str, Any] = {
        "report": {}, "sites": (), "samples": {}, "findings": (), "environment": {}, "recipe": {}, "record": Record((), {}, False),
    }  # fmt: skip
    changes = (
        empty
        if missing == "all"
        else {("record" if missing == "rows" else missing): empty["record" if missing == "rows" else missing]}
    )
    page = run_page(dataclasses.replace(facts, **changes))
    Checked(page)
    assert ("Not finished" in page) == (missing in ("report", "all"))


@pytest.mark.parametrize("odd", [None, "NaN", [], {"a": 1}, 3, True])
def test_damaged_values_draw_something(odd: Any) -> None:
    facts = full()
    report = dict.fromkeys(facts.report, odd) | {"steps": odd}
    samples = {"rows": [odd], "note": odd}
    page = run_page(RunFacts(name="x", place="y", record=facts.record, environment={"versions": odd, "inputs": odd, "fingerprint": odd}, recipe={"spec": odd, "clip": odd}, report=report, samples=samples))  # fmt: skip
    Checked(page)


def test_a_chart_of_spikes_is_logarithmic_and_one_of_nothing_is_none() -> None:
    spiky = chart("a", "", [Series("x", [(s, 1.0 if s != 5 else 1e6) for s in range(10)], "one")], [])
    assert "logarithmic" in spiky
    assert "logarithmic" not in chart("a", "", [Series("x", [(s, 1.0 + s) for s in range(10)], "one")], [])
    assert chart("a", "", [Series("x", [], "one")], []) == ""
    assert chart("a", "", [Series("x", [(1, math.nan)], "one")], []) == ""
    assert "<circle" in chart("a", "", [Series("x", [(3, 2.0)], "one")], [])


def test_parts_of_a_model_have_rows_of_their_own() -> None:
    picture = heat_map(
        "a",
        "",
        {"text.layers.0.q": 1.0, "vision.layers.0.q": 2.0, "vision.layers.0.v": 3.0, "head": 0.0},
        "{:.0f}".format,
    )
    for wanted in (
        ">text.layers.q<",
        ">vision.layers.q<",
        ">v<",
        ">head<",
        "text.layers.0.q: 1",
        "vision.layers.0.q: 2",
    ):
        assert wanted in picture


def test_json_is_plain() -> None:
    import json

    found = json.loads(json.dumps(full().to_dict()))
    assert found["finished"] is True
    assert found["findings"][0]["severity"] == "high"
    assert found["sites"][0]["size"] == 0.25
    assert found["steps"] == {"done": 40, "planned": 40}
