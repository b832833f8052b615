"""What was made of what: the ancestors of an adapter as a graph, as text and as a picture.

    graph = lineage(store, "mixed")
    print(graph.text());  Path("graph.svg").write_text(graph.svg())

A parent is known by its digest; one that the owner doesn't have is drawn with its digest alone.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.store.records import Version, moment

if TYPE_CHECKING:
    from weft.store.store import Store

__all__ = ["Lineage", "Node", "lineage"]

MAX_NODES = 500

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 216, 62, 28, 64, 24
_STYLE = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1c2330; }
.name { font-weight: 600; font-size: 13px; }
.faint { fill: #5b6675; font-size: 11px; }
rect.node { fill: #f4f7fb; stroke: #7c90ad; }
rect.asked { fill: #e3efff; stroke: #2f6fd6; stroke-width: 2; }
rect.lost { fill: #fbfbfb; stroke: #a9b2bf; stroke-dasharray: 5 4; }
path { fill: none; stroke: #7c90ad; stroke-width: 1.4; }
.weight { fill: #33506f; font-size: 11px; }
.paper { fill: #ffffff; }
"""


@dataclass(frozen=True)
class Node:
    """An adapter in a graph.

    Attributes:
        versions: of the owner that have this digest, oldest first; none: it is not in the store.
        parents: digests and weights.
    """

    digest: str
    versions: tuple[Version, ...]
    parents: tuple[tuple[str, float | None], ...]

    @property
    def label(self) -> str:
        """Its references, the newest first; else the digest."""
        names = [str(version) for version in reversed(self.versions)]
        return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "") if names else self.digest[:12]

    @property
    def line(self) -> str:
        """What is known of it, on one line."""
        if not self.versions:
            return "not in the store"
        version = self.versions[-1]
        said = [f"rank {version.rank}", *(f"{name} {value:.4g}" for name, value in list(version.metrics.items())[:2])]
        return ", ".join(said)


@dataclass(frozen=True)
class Lineage:
    """A graph of adapters, children before their parents.

    Attributes:
        asked: digest of the adapter that was asked for.
        nodes: by digest.
        cut: whether there are more ancestors than are shown.
    """

    asked: str
    nodes: Mapping[str, Node]
    cut: bool = False

    def text(self) -> str:
        """The graph for a terminal: a tree, in which what was drawn already is named only."""
        lines: list[str] = []
        drawn: set[str] = set()

        def draw(digest: str, start: str, mark: str, below: str, weight: float | None) -> None:
            node = self.nodes.get(digest)
            if node is None:
                return
            share = f"{weight:g} × " if weight is not None else ""
            aliases = [alias for version in node.versions for alias in version.aliases]
            named = f" ({', '.join(aliases)})" if aliases else ""
            again = digest in drawn and bool(node.parents)
            lines.append(
                f"{start}{mark}{share}{node.label}{named}  {digest[:12]}  {'… as above' if again else node.line}"
            )
            if again:
                return
            drawn.add(digest)
            for place, (parent, own) in enumerate(node.parents):
                last = place == len(node.parents) - 1
                draw(parent, start + below, "└─ " if last else "├─ ", "   " if last else "│  ", own)

        draw(self.asked, "", "", "", None)
        if self.cut:
            lines.append(f"… and further ancestors: {MAX_NODES} are shown")
        return "\n".join(lines)

    def svg(self) -> str:
        """The graph as a picture: the adapter on top, its parents below."""
        rows = self._rows()
        places = {digest: (x, y) for y, row in enumerate(rows) for x, digest in enumerate(row)}
        widest = max(len(row) for row in rows)
        width = 2 * _MARGIN + widest * _WIDTH + (widest - 1) * _GAP_X
        height = 2 * _MARGIN + len(rows) * _HEIGHT + (len(rows) - 1) * _GAP_Y

        def corner(digest: str) -> tuple[float, float]:
            x, y = places[digest]
            own = len(rows[y]) * _WIDTH + (len(rows[y]) - 1) * _GAP_X
            return (width - own) / 2 + x * (_WIDTH + _GAP_X), _MARGIN + y * (_HEIGHT + _GAP_Y)

        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
            f"<title>Lineage of {html.escape(self.nodes[self.asked].label)}</title><style>{_STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" style="fill:#7c90ad;stroke:none"/></marker></defs>',
            f'<rect class="paper" width="{width}" height="{height}"/>',
        ]
        labels = []
        for node in self.nodes.values():
            x, y = corner(node.digest)
            known = [(parent, weight) for parent, weight in node.parents if parent in places]
            for number, (parent, weight) in enumerate(known):
                px, py = corner(parent)
                x1, y1 = x + _WIDTH * (number + 1) / (len(known) + 1), y + _HEIGHT
                x2, y2 = px + _WIDTH / 2, py
                middle = (y1 + y2) / 2
                parts.append(
                    f'<path d="M{x1:.0f},{y1:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}" marker-end="url(#tip)"/>'
                )
                if weight is not None:
                    at = 0.3 if py - y < 2 * (_HEIGHT + _GAP_Y) else 0.15
                    lx, ly = x1 + (x2 - x1) * at**2 * (3 - 2 * at), y1 + (y2 - y1) * at
                    side, away = ("end", -6) if x2 < x1 else ("start", 6)  # on the outer side of the curve
                    labels.append(
                        f'<text class="weight" text-anchor="{side}" x="{lx + away:.0f}" y="{ly + 4:.0f}">{weight:g}</text>'
                    )
        parts += [self._box(node, *corner(node.digest)) for node in self.nodes.values()]
        return "\n".join([*parts, *labels, "</svg>"]) + "\n"

    def _box(self, node: Node, x: float, y: float) -> str:
        kind = "asked" if node.digest == self.asked else "node" if node.versions else "lost"
        aliases = ", ".join(alias for version in node.versions for alias in version.aliases)
        lines = (("name", node.label + (f" ({aliases})" if aliases else "")), ("", node.line),
                 ("faint", node.digest[:12] + (f" · {moment(node.versions[-1].created)[:10]}" if node.versions else "")))  # fmt: skip
        said = "".join(
            f'<text class="{style}" x="{x + 12:.0f}" y="{y + 20 + 16 * number:.0f}">{html.escape(_short(text))}</text>'
            for number, (style, text) in enumerate(lines)
        )
        return f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>{said}'

    def _rows(self) -> list[list[str]]:
        """Digests by their longest distance from the adapter; in a row near their children."""
        depth = {self.asked: 0}
        for _ in range(len(self.nodes)):
            changed = False
            for digest, node in self.nodes.items():
                for parent, _ in node.parents:
                    if (
                        digest in depth
                        and parent in self.nodes
                        and depth.get(parent, -1) < depth[digest] + 1 <= len(self.nodes)
                    ):
                        depth[parent], changed = depth[digest] + 1, True
            if not changed:
                break
        rows: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
        for digest in self.nodes:
            rows[depth.get(digest, 0)].append(digest)
        for above, row in itertools.pairwise(rows):
            seats: dict[str, list[int]] = {}
            for place, digest in enumerate(above):
                for parent, _ in self.nodes[digest].parents:
                    seats.setdefault(parent, []).append(place)
            row.sort(key=lambda digest: sum(seats.get(digest, [0])) / max(1, len(seats.get(digest, [0]))))
        return [row for row in rows if row]


def _short(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:31]}…"


def lineage(store: Store, ref: str | Version) -> Lineage:
    """The ancestors of an adapter, as far as the store knows them.

    Raises:
        NotInStoreError: no such adapter.
    """
    asked = store.version(ref)
    nodes: dict[str, Node] = {}
    level = [asked.digest]
    while level and len(nodes) < MAX_NODES:
        held = store.index.holding(level)
        following: list[str] = []
        for digest in level[: MAX_NODES - len(nodes)]:
            versions = tuple(held.get(digest, ()))
            parents = next((version.parents for version in reversed(versions) if version.parents), ())
            parents = tuple((parent, weight) for parent, weight in parents if parent and parent != digest)
            nodes[digest] = Node(digest, versions, parents)
            following += [parent for parent, _ in parents]
        level = [digest for digest in dict.fromkeys(following) if digest not in nodes]
    return Lineage(asked.digest, nodes, bool(level))
