"""The page: what a run was, what came of it, what is wrong with it, and how it went. Worst things first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weft.drawing import clean, html_page
from weft.report.charts import curves
from weft.report.facts import RunFacts, as_map, as_number
from weft.report.sites import MOST, site_pictures
from weft.report.style import STYLE

__all__ = ["run_page"]

_LONGEST = 1200
"""Characters of a sample that are shown."""


def run_page(facts: RunFacts) -> str:
    """The page of a run, as HTML: no network, no script, every text from data escaped."""
    parts = [
        f"<header><h1>{clean(facts.name)}</h1>{_state(facts)}{_header(facts)}</header>",
        _section("Before and after", _metrics(facts)),
        _section("Findings", _findings(facts)),
        _section("How it went", _figures(curves(facts), "two") or "<p>Nothing was logged that could be drawn.</p>"),
        _section("The adapter, site by site", _sites(facts)),
        _section("Answers before and after", _samples(facts)),
        _section("Data", _data(facts)),
        _section("Recipe and machine", _details(facts)),
    ]
    return html_page(
        f"{facts.name} · weft", STYLE, "<main>\n" + "\n".join(part for part in parts if part) + "\n</main>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{clean(title)}</h2>\n{body}</section>" if body else ""


def _figures(pictures: Sequence[str], look: str) -> str:
    return (
        f'<div class="{look}">' + "".join(f"<figure>{picture}</figure>" for picture in pictures) + "</div>"
        if pictures
        else ""
    )


def _state(facts: RunFacts) -> str:
    """How far it is, and what could not be read."""
    record, report = facts.record, facts.report
    if facts.finished:
        stopped = " (stopped early)" if report.get("stopped") == "early" else ""
        said = f"{_whole(report.get('steps'))} steps{stopped}, {_plain(report.get('epochs'))} epochs, {_whole(report.get('tokens'))} tokens in {_seconds(report.get('seconds'))}"
        if report.get("best_step") is not None:
            said += f"; kept: the checkpoint of step {_whole(report.get('best_step'))}"
        body = f'<p class="state">{clean(said)}</p>'
    else:
        body = f'<p class="state open">Not finished: {record.step:,} of {record.steps:,} steps. What is there is drawn; go on with <code>weft train --resume {clean(facts.place)}</code></p>'
    notes = [*facts.notes, *_list(report.get("notes"))]
    return body + "".join(f'<p class="soft">{clean(note)}</p>' for note in notes)


def _header(facts: RunFacts) -> str:
    environment, recipe = facts.environment, facts.recipe
    inputs, print_ = as_map(environment.get("inputs")), as_map(environment.get("fingerprint"))
    spec = as_map(recipe.get("spec"))
    base = [
        print_.get("name") or inputs.get("base") or "the embedded base",
        print_.get("architecture"),
        print_.get("dtype"),
    ]
    sources = [
        str(part.get("source")) for part in as_map(facts.report.get("data")).values() if isinstance(part, Mapping)
    ]
    data = "; ".join(sources) or ", ".join(str(value) for key in ("data", "eval_data") if (value := inputs.get(key)))
    rate = facts.report.get("learning_rate") or facts.record.fact("learning_rate")
    told = [
        f"rank {spec.get('rank')}, alpha {_plain(spec.get('alpha'))}" if spec and not spec.get("towers") else "",
        f"learning rate {_plain(rate)}" if rate else "",
        f"{recipe.get('schedule')}" if recipe.get("schedule") else "",
        f"batch {recipe.get('batch_size')} × {recipe.get('accumulation')}" if recipe.get("batch_size") else "",
        f"seed {recipe.get('seed')}" if recipe.get("seed") is not None else "",
    ]
    versions = as_map(environment.get("versions"))
    rows = [
        ("base", ", ".join(str(value) for value in base if value)),
        ("data", data),
        ("recipe", ", ".join(filter(None, told))),
        ("trained", f"{_whole(facts.report.get('trainable'))} numbers" if facts.report.get("trainable") else ""),
        ("digest", facts.report.get("digest") or ""),
        ("versions", ", ".join(f"{name} {versions[name]}" for name in ("weft", "torch", "transformers", "python") if name in versions)),
        ("started", environment.get("started") or ""),
    ]  # fmt: skip
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{clean(value)}</dd>" for name, value in rows if value) + "</dl>"


def _metrics(facts: RunFacts) -> str:
    base, adapter = as_map(facts.report.get("base")), as_map(facts.report.get("adapter"))
    names = list(dict.fromkeys([*base, *adapter]))
    if not names:
        return (
            "<p>There was no evaluation data, so nothing was measured before and after.</p>" if facts.finished else ""
        )
    rows = []
    for name in names:
        before, after = as_number(base.get(name)), as_number(adapter.get(name))
        change, look = "", ""
        if before is not None and after is not None:
            better = after < before if name in ("loss", "perplexity") else after > before
            change, look = f"{after - before:+.4g}", "good" if better else "bad" if after != before else ""
        rows.append(
            f'<tr><th scope="row">{clean(name)}</th><td>{_shown(before)}</td><td>{_shown(after)}</td><td class="{look}">{change}</td></tr>'
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "base", "adapter", "change"))
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _findings(facts: RunFacts) -> str:
    if not facts.findings:
        return "<p>No rule found anything wrong.</p>" if facts.record.rows or facts.sites else ""
    rows = []
    for found in facts.findings:
        step = f"step {found.step:,}" if found.step is not None else ""
        where = ", ".join(filter(None, (step, f"at {found.site}" if found.site else "")))
        rows.append(
            f'<li class="{clean(found.severity)}"><p><span class="badge">{clean(found.severity)}</span> <b>{clean(found.rule)}</b>'
            f'{f" <span class=soft>{clean(where)}</span>" if where else ""}</p><p>{clean(found.evidence)}</p><p class="advice">→ {clean(found.advice)}</p></li>'
        )
    return f'<ol class="findings">{"".join(rows)}</ol>'


def _sites(facts: RunFacts) -> str:
    if not facts.sites:
        return ""
    if len(facts.sites) > MOST:
        return f"<p>{len(facts.sites):,} sites are too many to draw; weft inspect lists them.</p>"
    bad = [site.path for site in facts.sites if not site.finite]
    note = (
        f'<p class="bad">{len(bad)} sites have NaN or infinite values and are left out: {clean(", ".join(bad[:5]))}</p>'
        if bad
        else ""
    )
    legend = "<p class=soft>Layers across, projections down; point at a cell for its numbers.</p>"
    return note + legend + _figures(site_pictures(facts), "sites")


def _samples(facts: RunFacts) -> str:
    samples, rows = facts.samples, _list(facts.samples.get("rows"))
    note = f"<p class=soft>{clean(samples['note'])}</p>" if samples.get("note") else ""
    if not rows:
        return note
    found = []
    for row in rows:
        row = as_map(row)
        blocks = [
            f'<div class="{look}"><h3>{name}</h3><p dir="auto">{_cut(row[key]) or "<i>(nothing)</i>"}</p></div>'
            for key, name, look in (("prompt", "prompt", "asked"), ("base", "base", "was"), ("adapter", "adapter", "is"), ("reference", "expected", "soft"))
            if row.get(key) is not None
        ]  # fmt: skip
        found.append(f"<article>{''.join(blocks)}</article>")
    return note + "".join(found)


def _cut(value: object) -> str:
    said = str(value)
    return clean(said if len(said) <= _LONGEST else said[:_LONGEST] + " …")


def _data(facts: RunFacts) -> str:
    parts = {name: as_map(part) for name, part in as_map(facts.report.get("data")).items()}
    if not parts:
        counts = as_map(facts.record.fact("data"))
        parts = {name: {"account": as_map(part)} for name, part in counts.items()}
    rows = []
    for name, part in parts.items():
        account = as_map(part.get("account"))
        facts_ = (
            [str(part["summary"])]
            if part.get("summary")
            else [
                f"{key} {_whole(account[key])}" for key in ("examples", "kept", "features", "tokens") if key in account
            ]
        )
        digest = f" <code>{clean(str(part['digest'])[:12])}</code>" if part.get("digest") else ""
        rows.append(
            f"<dt>{clean(name)}</dt><dd>{clean(part.get('source') or '')}{digest}<br>{clean('; '.join(facts_))}</dd>"
        )
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _details(facts: RunFacts) -> str:
    recipe = {name: value for name, value in facts.recipe.items() if value not in (None, [], {})}
    machine = {
        name: facts.environment.get(name)
        for name in ("platform", "processors", "accelerators", "command", "versions")
        if facts.environment.get(name)
    }
    found = []
    for title, values in (("Recipe", recipe), ("Machine and command", machine)):
        if values:
            found.append(f"<details><summary>{title}</summary><pre>{clean(_yaml(values))}</pre></details>")
    return "".join(found)


def _yaml(values: Mapping[str, Any], inside: str = "") -> str:
    """Plain data, one a line, for people."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{inside}{name}:", _yaml(value, inside + "  ")]
        else:
            lines.append(
                f"{inside}{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}"
            )
    return "\n".join(lines)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else []


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _plain(value: Any) -> str:
    found = as_number(value)
    return "?" if found is None else f"{found:.4g}"


def _whole(value: Any) -> str:
    found = as_number(value)
    return "?" if found is None or not math.isfinite(found) else f"{int(found):,}"


def _seconds(value: Any) -> str:
    found = as_number(value)
    if found is None or not math.isfinite(found):
        return "?"
    minutes, seconds = divmod(round(found), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {seconds} s"
        if minutes
        else f"{found:.0f} s"
    )
