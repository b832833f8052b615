"""An adapter by site, as pictures: heat maps of layer × projection, and the spectrum of each site as a small multiple."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from weft.diagnosis.adapter_numbers import SiteNumbers
from weft.drawing import axes_of, clean, element, line, place_of, short, text
from weft.report.facts import RunFacts

__all__ = ["heat_map", "site_pictures"]

MOST = 2000
"""Sites up to which they are drawn one by one."""
_ROW = 22


def site_pictures(facts: RunFacts) -> list[str]:
    """All pictures of sites that there are numbers for."""
    sites = [site for site in facts.sites if site.finite]
    if not sites or len(sites) > MOST:
        return []
    ranks = {site.path: float(site.rank) for site in sites}
    used = {site.path: site.effective_rank for site in sites}
    sizes = {path: size for path, size in facts.sizes().items() if math.isfinite(size)}
    found = [
        heat_map("Rank", "of each site", ranks, "{:.0f}".format),
        heat_map("Effective rank", "directions that the update really uses", used, "{:.1f}".format, top=max(ranks.values())),
        heat_map("Size of the update", "‖ΔW‖", {site.path: site.norm for site in sites}, short),
        heat_map("Size against the base", "‖ΔW‖ / ‖W‖", sizes, short),
        heat_map("Turn", "‖ΔW‖₂ / ‖W‖₂", {s.path: s.base.turn for s in sites if s.base and math.isfinite(s.base.turn)}, short),
        heat_map("New directions", "of the leading ones of W + ΔW, those that W has not", {s.path: float(s.base.intruders) for s in sites if s.base}, "{:.0f}".format, top=10.0),
        spectra(sites),
    ]  # fmt: skip
    return [picture for picture in found if picture]


class _Grid:
    """Rows, columns and sizes of a grid of sites. Parts of a model that begin differently have rows of their own."""

    def __init__(self, paths: Sequence[str], least: float, most: float) -> None:
        _, self.layers = axes_of(paths)
        self.keys = {path: self._key(path) for path in paths}
        self.rows = list(dict.fromkeys(self.keys.values()))
        names = self._names()
        self.left = 20 + 6.3 * max(len(name) for name in names.values())
        self.names = names
        self.cell = max(least, min(most, 640 / len(self.layers)))
        self.width = max(self.left + self.cell * len(self.layers) + 8, 300.0)
        self.height = 44.0 + _ROW * len(self.rows) + 26

    @staticmethod
    def _key(path: str) -> tuple[str, str]:
        kind, layer = place_of(path)
        before = path[: -len(f"{layer}.{kind}")] if layer and path.endswith(f"{layer}.{kind}") else ""
        return before, kind

    def _names(self) -> dict[tuple[str, str], str]:
        """A row's label: the kind, and where kinds of several parts have one name, the part before it."""
        parts = [key[1] for key in self.rows]
        found = {}
        for before, kind in self.rows:
            name = kind if parts.count(kind) == 1 else f"{before}{kind}"
            found[before, kind] = name if len(name) <= 36 else f"…{name[-35:]}"
        return found

    def corner(self, path: str) -> tuple[float, float]:
        layer = place_of(path)[1]
        return self.left + self.cell * self.layers.index(layer), 44.0 + _ROW * self.rows.index(self.keys[path])

    def frame(self, title: str, beside: str, body: str, said: str) -> str:
        head = clean(title) + element("tspan", clean(beside), dx=9.0, font_size=11, class_="beside")
        parts = [element("text", head, x=2, y=15, font_size=14, class_="head")]
        for index, row in enumerate(self.rows):
            parts.append(
                text(self.left - 7, 44 + _ROW * index + 15, self.names[row], size=11, anchor="end", class_="soft")
            )
        every = max(1, math.ceil(26 / self.cell))
        for index, layer in enumerate(self.layers):
            if layer and index % every == 0:
                parts.append(
                    text(self.left + self.cell * (index + 0.5), 38, layer, size=11, anchor="middle", class_="soft")
                )
        wide = max(self.width, 20 + 9.4 * len(title) + 6.5 * len(beside))
        svg = element(
            "svg", f"<title>{clean(title)}</title><desc>{clean(said)}</desc>" + "".join(parts) + body,
            viewBox=f"0 0 {wide:.0f} {self.height:.0f}", width=f"{wide:.0f}", height=f"{self.height:.0f}", role="img", aria_label=f"{title}. {said}",
        )  # fmt: skip
        return f'<div class="wide">{svg}</div>'


def heat_map(
    title: str, beside: str, values: Mapping[str, float], shape: Callable[[float], str], *, top: float | None = None
) -> str:
    """One number a site, as a colour and, where there is room, as text; ``""`` of nothing.

    Args:
        values: by path; finite and at least 0. shape: how a number is written.
        top: what has the full colour; None: the largest.
    """
    if not values:
        return ""
    grid, top = _Grid(list(values), 15, 56), top or max(values.values()) or 1.0
    body = []
    for path, value in values.items():
        x, y = grid.corner(path)
        share = min(1.0, max(0.0, value / top))
        said = f"{path}: {shape(value)}"
        inside = ""
        if grid.cell >= 7.5 * len(shape(value)) + 4:
            look = "on" if share > 0.55 else "off"
            inside = text(x + grid.cell / 2, y + 14.5, shape(value), size=11, anchor="middle", class_=f"cell {look}")
        body.append(
            element(
                "rect",
                title=said,
                x=x,
                y=y,
                width=grid.cell - 1,
                height=_ROW - 1,
                class_="heat",
                style=f"fill-opacity:{0.06 + 0.94 * share:.3f}",
            )
        )
        body.append(inside)
    y = grid.height - 14
    for index in range(10):
        body.append(
            element(
                "rect",
                x=grid.left + 9.0 * index,
                y=y,
                width=9.0,
                height=7,
                class_="heat",
                style=f"fill-opacity:{0.06 + 0.094 * (index + 0.5):.3f}",
            )
        )
    body.append(text(grid.left - 5, y + 8, "0", size=10, anchor="end", class_="soft"))
    body.append(text(grid.left + 95, y + 8, shape(top), size=10, class_="soft"))
    low, high = min(values, key=lambda path: values[path]), max(values, key=lambda path: values[path])
    said = f"{len(values)} sites, from {shape(values[low])} at {low} to {shape(values[high])} at {high}"
    return grid.frame(title, beside, "".join(body), said)


def spectra(sites: Sequence[SiteNumbers]) -> str:
    """The singular values of each site's ΔW, each against its own largest; the page's style colours them."""
    told = [site for site in sites if site.moved and site.spectrum and site.spectrum[0] > 0]
    if not told:
        return ""
    grid = _Grid([site.path for site in told], 30, 84)
    body = []
    for site in told:
        x, y = grid.corner(site.path)
        wide, high, top = grid.cell - 6, _ROW - 5, site.spectrum[0]
        said = f"{site.path}: effective rank {site.effective_rank:.1f} of {site.rank}; singular values {', '.join(f'{v:.3g}' for v in site.spectrum[:12])}{' …' if len(site.spectrum) > 12 else ''}"
        count = len(site.spectrum)
        body.append(element("rect", title=said, x=x, y=y, width=grid.cell - 2, height=_ROW - 2, class_="panel"))
        if count <= 24:
            step = wide / count
            body += [
                element("rect", x=x + 2 + step * i, y=y + 1.5 + high * (1 - v / top), width=max(step - 1, 1.0), height=max(high * v / top, 0.4), class_="bar")
                for i, v in enumerate(site.spectrum)
            ]  # fmt: skip
        else:
            body.append(
                line(
                    [
                        (x + 2 + wide * i / (count - 1), y + 1.5 + high * (1 - v / top))
                        for i, v in enumerate(site.spectrum)
                    ],
                    class_="line one",
                )
            )
    return grid.frame(
        "Spectrum",
        "singular values of ΔW, each site against its largest",
        "".join(body),
        f"{len(told)} sites, their singular values in falling order",
    )
