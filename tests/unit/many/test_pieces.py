"""Which rows go through the base together."""

from __future__ import annotations

import random

from weft.many.pieces import Piece, compose, computed


def piece(key: str, *lengths: int, **rest: object) -> Piece:
    return Piece(key, [{"input_ids": [0] * length} for length in lengths], **rest)  # type: ignore[arg-type]


def reference(pieces: list[Piece], budget: int, overhead: int) -> int:
    """The least cost over all ways to cut the list that is sorted by length, tried one by one."""
    ordered = sorted(pieces, key=lambda item: -item.length)
    best = None
    for cuts in range(2 ** (len(ordered) - 1)):
        parts, part = [], [ordered[0]]
        for index, item in enumerate(ordered[1:]):
            if cuts >> index & 1:
                parts.append(part)
                part = []
            part.append(item)
        parts.append(part)
        sizes = [sum(item.rows for item in part) * max(item.length for item in part) for part in parts]
        if all(size <= budget or len(part) == 1 for size, part in zip(sizes, parts, strict=True)):
            cost = sum(sizes) + overhead * len(parts)
            best = cost if best is None else min(best, cost)
    assert best is not None
    return best


def test_no_other_cut_computes_less() -> None:
    for _ in range(100):
        pieces = [
            piece(str(number), *(random.randint(1, 40) for _ in range(random.randint(1, 4))))
            for number in range(random.randint(1, 7))
        ]
        budget, overhead = random.choice([30, 100, 400, 10_000]), random.choice([0, 5, 60])
        found = compose(pieces, budget, overhead)
        assert sorted(item.key or "" for part in found for item in part) == sorted(item.key or "" for item in pieces)
        assert computed(found) + overhead * len(found) == reference(pieces, budget, overhead)


def test_a_budget_bounds_a_forward_and_one_large_piece_is_never_cut() -> None:
    found = compose([piece("a", 100, 100), piece("b", 50), piece("c", 50)], budget=100)
    assert [[item.key for item in part] for part in found] == [["a"], ["b", "c"]]


def test_short_users_cost_little() -> None:
    """One long and thirty short ones: padding all to the longest would compute ten times as much."""
    pieces = [piece("long", 500), *(piece(str(number), 10) for number in range(30))]
    assert computed(compose(pieces, 4096)) == 500 + 300


def test_kinds_and_micro_batches_are_never_mixed() -> None:
    pieces = [
        piece("a", 5),
        piece("a", 5, micro=1),
        piece("b", 5, packed=True),
        piece("c", 5, classifies=True),
        piece("d", 5, micro=1),
    ]
    found = compose(pieces, 4096)
    assert sorted("".join(item.key or "" for item in part) for part in found) == ["a", "ad", "b", "c"]
    assert [part[0].micro for part in found] == sorted(part[0].micro for part in found)


def test_within_a_forward_adapters_keep_their_order() -> None:
    found = compose([piece("a", 4), piece("b", 5), piece("c", 6)], 4096)
    assert [item.key for item in found[0]] == ["a", "b", "c"]
