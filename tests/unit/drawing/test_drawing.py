"""Elements, ticks, fewer points, places of sites."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import pytest

from weft.drawing import axes_of, clean, document, element, html_page, line, place_of, smooth, text, thinned, ticks

HOSTILE = "<script>alert('x')</script>\"&\x00\x1b\ud800\u202eabc"


def test_hostile_text_is_harmless_and_is_xml() -> None:
    said = clean(HOSTILE)
    assert not set("<>\"'\x00\x1b\ud800\u202e") & set(said)
    picture = document([text(1, 2, HOSTILE), element("rect", title=HOSTILE, x=1, aria_label=HOSTILE)], 10, 10)
    root = ET.fromstring(picture)
    assert len(list(root)) == 3
    assert "alert" in (root[1].text or "")
    assert "<script" not in html_page(HOSTILE, "", "")


def test_elements() -> None:
    assert element("g") == "<g/>"
    assert (
        element("line", x1=1.0, x2=2.25, class_="a", stroke_width=2, fill=None)
        == '<line x1="1" x2="2.2" class="a" stroke-width="2"/>'
    )
    assert element("p", "in", title="<") == "<p><title>&lt;</title>in</p>"
    assert line([(0, 1), (2.26, 3)]) == '<polyline points="0.0,1.0 2.3,3.0" fill="none" stroke-linejoin="round"/>'


@pytest.mark.parametrize("most", [4, 6, 8])
def test_ticks_enclose_and_are_few(most: int) -> None:
    for _ in range(200):
        low = random.uniform(-1e3, 1e3)
        high = low + 10 ** random.uniform(-6, 6)
        found = ticks(low, high, most)
        assert found[0] <= low + 1e-9 * abs(low)
        assert found[-1] >= high - 1e-9 * abs(high)
        assert 2 <= len(found) <= most + 3
        whole = ticks(low, high, most, whole=True)
        assert all(float(value).is_integer() for value in whole)


def test_thinned_keeps_spikes_and_order() -> None:
    points = [(float(x), random.random()) for x in range(5000)]
    points[2345] = (2345.0, 99.0)
    found = thinned(points, 300)
    assert len(found) <= 300
    assert (2345.0, 99.0) in found
    assert found == sorted(found)
    assert thinned(points[:300], 300) == points[:300]


def test_smooth_starts_at_the_first_point_and_keeps_a_constant() -> None:
    assert smooth([(1, 4.0), (2, 4.0)]) == [(1, 4.0), (2, pytest.approx(4.0))]


def test_places_of_sites() -> None:
    assert place_of("model.layers.3.mlp.up_proj") == ("mlp.up_proj", "3")
    assert place_of("lm_head") == ("lm_head", "")
    assert place_of("blocks.0") == ("blocks", "0")
    kinds, layers = axes_of(["l.10.q", "l.2.q", "head", "l.2.v"])
    assert (kinds, layers) == (["q", "head", "v"], ["2", "10", ""])
