"""Putting, getting, finding, promoting, removing: on each database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weft
from tests.unit.store.support import BASE, make_adapter
from weft.adapter import Provenance
from weft.core.factors import Factors
from weft.errors import NotFiniteError, NotInStoreError, RequirementError, StoreError
from weft.store import Store


def loss(value: float) -> dict[str, dict[str, float]]:
    return {"evaluation": {"eval_loss": value}}


def test_what_was_put_is_what_comes_back(any_store: Store) -> None:
    adapter = make_adapter(
        1, data=({"digest": "d1" * 32, "source": "train.jsonl", "examples": 9},), notes=("a note",), **loss(1.5)
    )
    ref = any_store.put(adapter, name="medical", tags={"domain": "health"}, metrics={"bleu": 31.0}, note="first")
    assert str(ref) == "medical@1"
    assert ref.is_new
    for text in (
        "medical",
        "medical@1",
        "medical@latest",
        adapter.digest,
        adapter.digest[:8],
        f"sha256:{adapter.digest[:6]}",
        ref,
    ):
        found = any_store.get(text)
        assert found == adapter
        assert found.provenance == adapter.provenance
    version = any_store.version("medical")
    assert (version.tags, version.metrics, version.note) == (
        {"domain": "health"},
        {"eval_loss": 1.5, "bleu": 31.0},
        "first",
    )
    assert (version.base, version.base_name, version.rank, version.sites) == (BASE.weights, "models/tiny", 4, 2)
    assert version.data[0]["source"] == "train.jsonl"
    assert any_store.find() == [version]


def test_a_proof_is_kept_and_makes_a_blob_of_its_own(store: Store) -> None:
    adapter = make_adapter(1)
    proved = adapter.replace(proof={"input_ids": torch.randint(0, 9, (2, 3)), "logits": torch.randn(2, 5)})
    store.put(adapter, "a")
    store.put(proved, "a")
    assert store.get("a@1").proof == {}
    assert torch.equal(store.get("a@2").proof["logits"], proved.proof["logits"])
    assert store.verify().blobs == 2


def test_one_blob_for_one_adapter_and_each_version_its_own_provenance(any_store: Store, tmp_path: Path) -> None:
    any_store.put(make_adapter(1, **loss(1.5)), "a")
    any_store.put(make_adapter(1, notes=("again",), **loss(1.4)), "b")
    assert any_store.verify().blobs == 1
    assert any_store.get("a").provenance.evaluation == {"eval_loss": 1.5}
    assert any_store.get("b").provenance.notes == ("again",)


def test_a_put_can_be_tried_again(any_store: Store) -> None:
    first = any_store.put(make_adapter(1, **loss(1.5)), "a", tags={"x": "y"})
    again = any_store.put(make_adapter(1, **loss(1.5)), "a", tags={"x": "y"})
    assert (str(again), again.is_new, first.is_new) == ("a@1", False, True)
    assert str(any_store.put(make_adapter(1, **loss(1.5)), "a", tags={"x": "z"})) == "a@2"
    assert str(any_store.put(make_adapter(1, **loss(1.5)), "a", tags={"x": "z"}, again=True)) == "a@3"


def test_what_peft_cannot_hold_is_kept_all_the_same(store: Store, tmp_path: Path) -> None:
    layers = {
        "a.b": Factors(torch.randn(2, 3), torch.randn(4, 2), 0.3),
        "c.b": Factors(torch.randn(3, 3), torch.randn(4, 3), 0.7, magnitude=torch.rand(4)),
    }
    adapter = make_adapter(1).replace(factors=layers, spec=weft.LoraSpec(rank=3, targets=("a.b", "c.b"), dora=True))
    store.put(adapter, "odd")
    assert store.get("odd") == adapter
    assert weft.load(store.export("odd", tmp_path / "out")) == adapter


def test_broken_adapters_are_refused_and_leave_nothing(store: Store) -> None:
    bad = make_adapter(1).map(lambda tensor: tensor * float("nan"))
    with pytest.raises(NotFiniteError):
        store.put(bad, "bad")
    assert store.find() == []
    assert not list((Path(store.place) / "tmp").iterdir())


@pytest.mark.parametrize("name", ["../x", "/abs", "a\0b", "x" * 10_000_000, "мedical", ""])
def test_hostile_names_touch_nothing(store: Store, tmp_path: Path, name: str) -> None:
    before = sorted(path for path in tmp_path.rglob("*"))
    for call in (lambda: store.put(make_adapter(1), name), lambda: store.get(name), lambda: store.promote(name, "prod"), lambda: store.remove(name),
                 lambda: store.export(name, tmp_path / "out"), lambda: store.find(name=name or "?")):  # fmt: skip
        with pytest.raises(StoreError):
            call()
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_names_never_differ_by_case_alone(any_store: Store) -> None:
    any_store.put(make_adapter(1), "Medical")
    with pytest.raises(StoreError, match="'Medical' already"):
        any_store.put(make_adapter(1), "medical")
    with pytest.raises(NotInStoreError, match="Did you mean 'Medical'"):
        any_store.get("medical")


@pytest.mark.parametrize("bad", [{"tags": {"a b": "c"}}, {"tags": {"a": "b\0"}}, {"tags": {"a": 3}}, {"metrics": {"x": float("nan")}}, {"metrics": {"x": "1"}},
                                 {"note": "x\u202e"}, {"note": "x" * 5000}, {"tags": dict.fromkeys(map(str, range(100)), "")}])  # fmt: skip
def test_bad_tags_metrics_and_notes(store: Store, bad: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        store.put(make_adapter(1), "a", **bad)  # type: ignore[arg-type]
    assert store.find() == []


# filters


@pytest.fixture
def filled(any_store: Store) -> Store:
    for number in range(1, 7):
        base = BASE if number % 2 else None
        data = ({"digest": f"{number:02d}" * 32, "source": f"part{number}.jsonl"},)
        adapter = make_adapter(
            number, rank=2 * number, base=base, base_name=None if base else "other/model", data=data, **loss(number / 2)
        )
        any_store.put(adapter, f"n{number}", tags={"domain": "health" if number < 4 else "law", "odd": str(number % 2)})
    any_store.put(make_adapter(9, **loss(0.1)), "n1")
    any_store.promote("n1@1", "prod")
    return any_store


FILTERS: list[tuple[dict[str, object], str]] = [
    ({}, "n1@2 n6 n5 n4 n3 n2"),
    ({"all_versions": True}, "n1@2 n6 n5 n4 n3 n2 n1"),
    ({"where": "eval_loss<2"}, "n1@2 n3 n2"),
    ({"where": "eval_loss<2 and rank>=6"}, "n3"),
    ({"where": "tag.domain=law or name='n2'"}, "n6 n5 n4 n2"),
    ({"where": "not tag.odd=1"}, "n1@2 n6 n4 n2"),
    ({"where": "tag.odd=1.0"}, ""),
    ({"where": "tag.odd!=1"}, "n6 n4 n2"),
    ({"where": "base=tiny"}, "n1@2 n5 n3"),
    ({"where": "base!=tiny"}, "n6 n4 n2"),
    ({"where": "data=0606"}, "n6"),
    ({"where": "metric.eval_loss>=3, version<2"}, "n6"),
    (
        {"where": "created>'2000-01-01' and bytes>10 and parameters>1 and sites=2 and note=''"},
        "n1@2 n6 n5 n4 n3 n2",
    ),
    ({"where": "name=\"x' OR '1'='1\""}, ""),
    ({"where": "tag.domain='%'"}, ""),
    ({"tags": {"domain": "health", "odd": "1"}}, "n3"),
    ({"base": BASE.weights[:8]}, "n1@2 n5 n3"),
    ({"base": "model"}, "n6 n4 n2"),
    ({"base": "models/tiny"}, "n1@2 n5 n3"),
    ({"data": "part3.jsonl"}, "n3"),
    ({"data": "05" * 32}, "n5"),
    ({"name": "n2"}, "n2"),
    ({"name": "n*"}, "n1@2 n6 n5 n4 n3 n2"),
    ({"alias": "prod"}, "n1"),
    ({"limit": 2}, "n1@2 n6"),
    ({"where": "no_such_metric<3"}, ""),
]


def test_filters(filled: Store) -> None:
    found = [" ".join(str(version).removesuffix("@1") for version in filled.find(**asked)) for asked, _ in FILTERS]  # type: ignore[arg-type]
    assert dict(zip(map(str, FILTERS), found, strict=True)) == {str(item): item[1] for item in FILTERS}


@pytest.mark.parametrize("asked", [{"where": "rank='x'"}, {"where": "eval_loss<prod"}, {"where": "created<'yesterday'"}, {"where": "data<aa"},
                                   {"where": "tag.a b=3"}, {"limit": 0}, {"limit": True}, {"base": ""}, {"base": "x\0"}, {"name": "a/*"}, {"alias": "a b"}, {"tags": {"a/b": "c"}}])  # fmt: skip
def test_filters_that_cannot_be(store: Store, asked: dict[str, object]) -> None:
    with pytest.raises(StoreError):
        store.find(**asked)  # type: ignore[arg-type]


# references


def test_unknown_references_name_near_ones(any_store: Store) -> None:
    for number in (1, 2):
        any_store.put(make_adapter(number), "medical")
    any_store.promote("medical@1", "prod")
    for text, words in (
        ("medcal", "Did you mean 'medical'"),
        ("medical@9", "has no version 9; it has 2, 1"),
        ("medical@prd", "Did you mean 'prod'"),
        ("0" * 12, "has no '0000"),
    ):
        with pytest.raises(NotInStoreError, match=words):
            any_store.get(text)


def test_an_ambiguous_digest_is_an_error(any_store: Store) -> None:
    digests: dict[str, int] = {}
    with pytest.raises(NotInStoreError):
        any_store.get("abcdef")
    version = any_store.put(make_adapter(1), "a")
    any_store.put(make_adapter(2), "a")
    near = version.digest[:-1] + ("0" if version.digest[-1] != "0" else "1")
    import sqlalchemy as sa

    from weft.store import tables as t

    any_store.index.database.write(
        lambda c: c.execute(sa.update(t.versions).where(t.versions.c.number == 2).values(digest=near))
    )
    with pytest.raises(StoreError, match="give more digits"):
        any_store.version(version.digest[:10])
    assert any_store.version(version.digest) == any_store.version("a@1")
    assert digests == {}


def test_a_name_goes_before_a_digest(store: Store) -> None:
    first = store.put(make_adapter(1), "a")
    store.put(make_adapter(2), first.digest[:8])
    assert store.version(first.digest[:8]).name == first.digest[:8]
    assert store.version(f"sha256:{first.digest[:8]}") == store.version("a")


# aliases


def test_promote_require_rollback(any_store: Store) -> None:
    for number, value in enumerate((1.5, 1.2, 1.4), 1):
        any_store.put(make_adapter(number, **loss(value)), "m")
    any_store.put(make_adapter(4), "m")
    assert any_store.promote("m@1", "prod", require="eval_loss<=prod").before is None
    assert any_store.promote("m@2", "prod", require="eval_loss<=prod").before == 1
    with pytest.raises(RequirementError, match=r"eval_loss is 1\.4, required is <= 1\.2, that of m@2, which is prod"):
        any_store.promote("m@3", "prod", require="eval_loss<=prod")
    with pytest.raises(RequirementError, match="has no metric 'eval_loss'"):
        any_store.promote("m@4", "prod", require="eval_loss<=prod")
    with pytest.raises(RequirementError, match="'staging', which m has not"):
        any_store.promote("m@3", "prod", require="eval_loss<=staging")
    with pytest.raises(RequirementError, match="not"):
        any_store.promote("m@3", "prod", require="not eval_loss<2")
    assert str(any_store.version("m@prod")) == "m@2"
    any_store.promote("m@3", "prod", require="eval_loss<1.3 or eval_loss<2")
    assert any_store.rollback("m", "prod").after == 2
    assert any_store.rollback("m", "prod").after == 1
    with pytest.raises(NotInStoreError, match="no version before"):
        any_store.rollback("m", "prod")
    assert any_store.version("m@1").aliases == ("prod",)
    moves = [(move.kind, move.before, move.after, move.undone) for move in any_store.moves("m")]
    assert moves == [
        ("rollback", 2, 1, False),
        ("rollback", 3, 2, False),
        ("promote", 2, 3, True),
        ("promote", 1, 2, True),
        ("promote", None, 1, False),
    ]
    any_store.promote("m@3", "prod")
    assert any_store.rollback("m", "prod").after == 1


def test_moves_that_mean_nothing(any_store: Store) -> None:
    any_store.put(make_adapter(1), "m")
    any_store.promote("m", "prod")
    assert any_store.promote("m", "prod").before == 1
    assert len(any_store.moves("m")) == 1
    with pytest.raises(NotInStoreError, match="no move to take back"):
        any_store.rollback("m", "prd")
    with pytest.raises(StoreError, match="always the newest"):
        any_store.promote("m", "latest")
    any_store.unalias("m", "prod")
    with pytest.raises(NotInStoreError):
        any_store.version("m@prod")
    with pytest.raises(NotInStoreError):
        any_store.unalias("m", "prod")


def test_a_rollback_to_a_version_that_was_removed(any_store: Store) -> None:
    for number in (1, 2):
        any_store.put(make_adapter(number), "m")
        any_store.promote(f"m@{number}", "prod")
    any_store.remove("m@1")
    with pytest.raises(NotInStoreError, match="m@1, was removed"):
        any_store.rollback("m", "prod")
    assert str(any_store.version("m@prod")) == "m@2"


# tags, metrics, removal


def test_tags_change_and_metrics_do_not(any_store: Store) -> None:
    any_store.put(make_adapter(1, **loss(1.5)), "m", tags={"a": "1", "b": "2"})
    assert any_store.tag("m", {"a": "3", "c": "医学"}, remove=["b"], metrics={"bleu": 30}).tags == {
        "a": "3",
        "c": "医学",
    }
    assert any_store.version("m").metrics == {"eval_loss": 1.5, "bleu": 30.0}
    assert any_store.tag("m", metrics={"bleu": 30}).metrics["bleu"] == 30
    with pytest.raises(StoreError, match="doesn't change"):
        any_store.tag("m", metrics={"eval_loss": 1.0})
    with pytest.raises(NotInStoreError, match="Did you mean"):
        any_store.tag("m", remove=["cc"])


def test_numbers_are_never_given_again(any_store: Store) -> None:
    for number in (1, 2, 3):
        any_store.put(make_adapter(number), "m")
    any_store.promote("m@1", "prod")
    with pytest.raises(StoreError, match="'m@prod' points to it"):
        any_store.remove("m")
    any_store.remove("m@3")
    assert str(any_store.version("m")) == "m@2"
    any_store.unalias("m", "prod")
    assert [str(version) for version in any_store.remove("m")] == ["m@1", "m@2"]
    with pytest.raises(NotInStoreError):
        any_store.versions("m")
    assert any_store.find() == []
    assert str(any_store.put(make_adapter(1), "m")) == "m@4"


def test_gc_removes_what_nothing_refers_to(any_store: Store) -> None:
    for number in (1, 2):
        any_store.put(make_adapter(number), "m")
    any_store.put(make_adapter(1), "other")
    any_store.remove("m")
    assert any_store.gc().blobs == ()
    assert any_store.gc().kept == 1
    dry = any_store.gc(grace=0, dry_run=True)
    assert dry.blobs == (make_adapter(2).digest,) == any_store.gc(grace=0).blobs
    assert any_store.get("other") == make_adapter(1)
    assert any_store.gc(grace=0).blobs == ()
    any_store.put(make_adapter(2), "m")
    assert any_store.get("m") == make_adapter(2)


# owners


def test_owners_see_their_own(open_store: Callable[..., Store], index: str | None) -> None:
    alice, bob = (open_store(index=index, owner=owner) for owner in ("alice", "bob"))
    private = make_adapter(1, notes=("alice's",), **loss(1.0))
    alice.put(private, "medical", tags={"secret": "1"})
    alice.promote("medical", "prod")
    assert bob.find(all_versions=True) == []
    for text in ("medical", "medical@1", "medical@prod", private.digest, private.digest[:8]):
        with pytest.raises(NotInStoreError, match="nothing yet"):
            bob.get(text)
    for call in (lambda: bob.remove("medical"), lambda: bob.promote("medical", "x"), lambda: bob.tag("medical", {"a": "b"}), lambda: bob.versions("medical"),
                 lambda: bob.rollback("medical", "prod"), lambda: bob.lineage(private.digest)):  # fmt: skip
        with pytest.raises(NotInStoreError):
            call()
    bob.put(make_adapter(1, notes=("bob's",)), "medical")
    assert bob.get("medical").provenance.notes == ("bob's",)
    assert bob.get(private.digest).provenance.notes == ("bob's",)
    assert alice.get("medical").provenance.notes == ("alice's",)
    assert bob.verify().blobs == 1
    alice.unalias("medical", "prod")
    alice.remove("medical")
    alice.gc(grace=0)
    assert bob.get("medical") == private


@pytest.mark.parametrize("owner", ["", "../x", "a/b", "é"])
def test_an_owner_has_a_name(open_store: Callable[..., Store], owner: str) -> None:
    with pytest.raises(StoreError, match="owner"):
        open_store(owner=owner)


# what comes from other tools


def test_a_directory_of_peft_is_put(store: Store, tmp_path: Path) -> None:
    make_adapter(3).save(tmp_path / "plain")
    (tmp_path / "plain" / "weft.json").unlink()
    version = store.put(tmp_path / "plain", "foreign")
    assert version.base == ""
    assert torch.equal(
        store.get("foreign").delta("model.layers.0.self_attn.q_proj"),
        weft.load(tmp_path / "plain").delta("model.layers.0.self_attn.q_proj"),
    )


def test_a_blob_is_a_directory_that_peft_reads(store: Store) -> None:
    peft = pytest.importorskip("peft")
    version = store.put(make_adapter(3), "a")
    folder = Path(store.place) / "blobs" / version.digest[:2] / version.digest
    assert peft.LoraConfig.from_pretrained(folder).r == 4
    assert weft.load(folder) == make_adapter(3)


def test_parents_can_be_searched(any_store: Store) -> None:
    parents = ({"digest": "aa" * 32, "weight": 0.7}, {"digest": "bb" * 32, "weight": 0.3})
    mixed = make_adapter(5).replace(provenance=Provenance(base=BASE, parents=parents))
    any_store.put(mixed, "mixed")
    assert any_store.version("mixed").parents == (("aa" * 32, 0.7), ("bb" * 32, 0.3))
    assert [str(version) for version in any_store.find(where="parent='bbbb'")] == ["mixed@1"]
    assert any_store.find(where="parent='cccc'") == []
