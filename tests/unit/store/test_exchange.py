"""Push, pull and export: directories, other stores, a server of the S3 protocol, a web server; and catalogs that lie."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.unit.store.support import make_adapter
from weft.errors import DamagedError, FormatError, NotInStoreError, StoreError, WeftError
from weft.store import Store
from weft.store.pages import make_server, write_pages


@pytest.fixture
def filled(store: Store) -> Store:
    for number, value in ((1, 1.5), (2, 1.2)):
        store.put(
            make_adapter(number, evaluation={"eval_loss": value}, notes=(f"note {number}",)),
            "medical",
            tags={"domain": "health"},
            note="a remark",
        )
    store.put(make_adapter(3), "polite")
    store.promote("medical@1", "prod")
    return store


@pytest.fixture
def other(open_store: Callable[..., Store], tmp_path: Path) -> Store:
    return open_store(tmp_path / "other")


@pytest.fixture(params=["directory", "s3", "store", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, open_store: Callable[..., Store]) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    if request.param == "store":
        open_store(tmp_path / "shelf")
    return str(tmp_path / "shelf")


def test_there_and_back(filled: Store, other: Store, place: str) -> None:
    done = filled.push(place)
    assert set(done.moved) == {"medical@1", "medical@2", "polite@1"}
    assert filled.push(place).moved == ()
    done = other.pull(place)
    assert len(done.moved) == 3
    assert other.pull(place).moved == ()
    for ref in ("medical@1", "medical@2", "medical@prod", "polite"):
        assert other.get(ref) == filled.get(ref)
        assert other.get(ref).provenance == filled.get(ref).provenance
        mine, theirs = filled.version(ref), other.version(ref)
        assert (mine.tags, mine.metrics, mine.note, mine.aliases) == (
            theirs.tags,
            theirs.metrics,
            theirs.note,
            theirs.aliases,
        )
    assert other.verify().ok


def test_some_of_it(filled: Store, other: Store, place: str) -> None:
    filled.push(place, "medical@prod", "polite")
    assert other.pull(place, "medical", name="doctor").moved == ("doctor@1",)
    with pytest.raises(NotInStoreError, match=r"has no 'medical@2'"):
        other.pull(place, "medical@2")
    with pytest.raises(NotInStoreError, match="Did you mean 'medical'"):
        other.pull(place, "medcal")
    with pytest.raises(StoreError, match="several names"):
        other.pull(place, name="x")


def test_versions_never_change_elsewhere_either(filled: Store, other: Store, place: str) -> None:
    other.put(make_adapter(9), "medical")
    filled.push(place)
    with pytest.raises(StoreError, match="medical@1 is there already with another adapter"):
        other.push(place)
    with pytest.raises(StoreError, match="medical@1 is there already with another adapter"):
        other.pull(place, "medical")
    assert other.get("medical@1") == make_adapter(9)


def test_an_alias_that_points_elsewhere_stays(filled: Store, other: Store, tmp_path: Path) -> None:
    filled.push(str(tmp_path / "shelf"))
    other.pull(str(tmp_path / "shelf"), "medical")
    other.promote("medical@2", "prod")
    assert "stays at medical@2" in other.pull(str(tmp_path / "shelf")).notes[0]


def test_nothing_to_pull_and_itself(filled: Store, tmp_path: Path) -> None:
    with pytest.raises(NotInStoreError, match="nothing to pull"):
        filled.pull(str(tmp_path / "nothing"))
    with pytest.raises(StoreError, match="is this store itself"):
        filled.push(filled.place)
    for wrong in ("", "nosuch://x/y"):
        with pytest.raises(WeftError):
            filled.push(wrong)


def test_damage_is_not_pushed(filled: Store, tmp_path: Path) -> None:
    version = filled.version("medical@1")
    path = Path(filled.place) / "blobs" / version.digest[:2] / version.digest / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError):
        filled.push(str(tmp_path / "shelf"), "medical")
    assert not list((tmp_path / "shelf").rglob("*.json"))


def test_a_store_whose_blobs_are_on_s3(s3: str, open_store: Callable[..., Store], tmp_path: Path) -> None:
    store = open_store(s3, index=f"sqlite:///{tmp_path}/index.sqlite")
    store.put(make_adapter(1), "m")
    assert not store.put(make_adapter(1), "m").is_new
    store.put(make_adapter(2), "m")
    assert store.get("m@1") == make_adapter(1)
    assert store.verify().ok
    store.remove("m@2")
    assert store.gc(grace=0).blobs == (make_adapter(2).digest,)
    assert store.gc(grace=0).leftovers == 0
    with pytest.raises(NotInStoreError):
        store.get("m@2")
    filesystem = store.blobs.filesystem  # type: ignore[attr-defined]
    digest = make_adapter(1).digest
    path = f"{s3.removeprefix('s3://')}/blobs/{digest[:2]}/{digest}/adapter_model.safetensors"
    whole = filesystem.cat_file(path)
    filesystem.pipe_file(path, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedError):
        store.get("m")
    assert not store.verify().ok
    filesystem.pipe_file(path, whole[:-1])
    with pytest.raises(DamagedError):
        store.get("m")
    store.put(make_adapter(1), "m")
    assert store.get("m") == make_adapter(1)
    with pytest.raises(StoreError, match="need an index elsewhere"):
        Store(s3)


def test_s3_that_cannot_be_reached(filled: Store, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="bucket"):
        filled.push("s3://no-such-bucket/x")


def test_export_is_a_plain_directory(filled: Store, tmp_path: Path) -> None:
    out = filled.export("medical@prod", tmp_path / "out")
    assert weft.load(out) == make_adapter(1)
    assert weft.load(out).provenance.notes == ("note 1",)
    with pytest.raises(FormatError, match="holds an adapter already"):
        filled.export("medical@prod", tmp_path / "out")


# catalogs that lie


@pytest.mark.parametrize(
    "lie",
    [
        lambda said: said.update(name="../../x"),
        lambda said: said.update(name="polite"),
        lambda said: said.update(number=7),
        lambda said: said.update(digest="0" * 64, address="0" * 64),
        lambda said: said.update(address="../" * 30),
        lambda said: said.update(files={"../../x": [3, "0" * 64]}),
        lambda said: said.update(files={**said["files"], "evil.py": [3, "0" * 64]}),
        lambda said: said["files"]["adapter_model.safetensors"].__setitem__(0, 1 << 45),
        lambda said: said["files"]["adapter_model.safetensors"].__setitem__(0, 10),
        lambda said: said["files"]["adapter_model.safetensors"].__setitem__(0, -1),
        lambda said: said["files"]["weft.json"].__setitem__(1, "0" * 64),
        lambda said: said["files"].pop("weft.json"),
        lambda said: said.update(tags={"a b": "c"}),
        lambda said: said.update(metrics={"x": "y"}),
        lambda said: said.update(note="\u202e"),
        lambda said: said.update(provenance={"base": {"x": 1}}),
        lambda said: said.update(provenance=[]),
        lambda said: said.update(provenance={"base": None}),
        lambda said: said.update(format=9),
        lambda said: said.pop("digest"),
    ],
)  # fmt: skip
def test_records_that_lie(filled: Store, other: Store, tmp_path: Path, lie: Callable[[dict[str, Any]], object]) -> None:
    shelf = tmp_path / "shelf"
    filled.push(str(shelf), "medical")
    path = shelf / "catalog" / "medical" / "1.json"
    said = json.loads(path.read_text())
    lie(said)
    path.write_text(json.dumps(said))
    with pytest.raises(WeftError) as problem:
        other.pull(str(shelf), "medical@1")
    assert len(str(problem.value)) < 1000
    assert other.find() == []
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"format": 1}', b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"format": 1, "format": 1}']
)
def test_records_that_are_none(filled: Store, other: Store, tmp_path: Path, data: bytes) -> None:
    filled.push(str(tmp_path / "shelf"), "polite")
    (tmp_path / "shelf" / "catalog" / "polite" / "1.json").write_bytes(data)
    with pytest.raises(WeftError):
        other.pull(str(tmp_path / "shelf"))


def test_headers_that_lie_about_sizes(filled: Store, other: Store, tmp_path: Path) -> None:
    import hashlib

    shelf = tmp_path / "shelf"
    filled.push(str(shelf), "polite")
    path = shelf / "catalog" / "polite" / "1.json"
    said = json.loads(path.read_text())
    weights = next((shelf / "blobs").rglob("adapter_model.safetensors"))
    for head in (
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[9999999999999],"data_offsets":[0,4]}}',
    ):
        weights.write_bytes(head)
        said["files"][weights.name] = [len(head), hashlib.sha256(head).hexdigest()]
        path.write_text(json.dumps(said))
        with pytest.raises(WeftError):
            other.pull(str(shelf))
    assert other.find() == []


# pages


@pytest.fixture
def server(filled: Store) -> Iterator[str]:
    running = make_server(filled)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()
    thread.join()


def fetch(address: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as problem:
        with problem:
            return problem.code, problem.read()


def test_a_served_index_is_read_and_pulled_from(filled: Store, other: Store, server: str) -> None:
    assert b"medical" in fetch(f"{server}/")[1]
    assert b"prod" in fetch(f"{server}/medical.html")[1]
    said = json.loads(fetch(f"{server}/index.json")[1])
    assert said["catalog"] == {"medical": [1, 2], "polite": [1]}
    assert len(other.pull(server).moved) == 3
    assert other.get("medical@prod") == filled.get("medical@prod")
    other.put(make_adapter(8), "new")
    with pytest.raises(StoreError, match="not pushed to"):
        other.push(server, "new")


@pytest.mark.parametrize("path", ["/nothing.html", "/../index.sqlite", "/%2e%2e/index.sqlite", "/blobs/../index.sqlite", "/blobs/ab/" + "ab" * 32 + "/weft.json",
                                  "/catalog/medical/99.json", "/catalog/../x/1.json", "/index.sqlite", "/" + "x" * 5000])  # fmt: skip
def test_what_is_not_served(server: str, path: str) -> None:
    assert fetch(server + path)[0] == 404


def test_the_server_answers_this_machine_and_reads_only(server: str) -> None:
    assert fetch(server, Host="evil.example")[0] == 403
    request = urllib.request.Request(f"{server}/index.json", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as problem:
        urllib.request.urlopen(request, timeout=20)
    assert problem.value.code == 501
    problem.value.close()


def test_another_owner_s_blobs_are_not_served(filled: Store, server: str, open_store: Callable[..., Store]) -> None:
    other = open_store(owner="bob").put(make_adapter(77), "secret")
    assert fetch(f"{server}/blobs/{other.digest[:2]}/{other.digest}/weft.json")[0] == 404
    mine = filled.version("polite").digest
    assert fetch(f"{server}/blobs/{mine[:2]}/{mine}/weft.json")[0] == 200
    assert b"secret" not in fetch(f"{server}/index.json")[1]


def test_pages_as_files(filled: Store, other: Store, tmp_path: Path) -> None:
    filled.put(make_adapter(4, notes=("<script>",)), "x", note="<script>alert(1)</script>", tags={"t": "<b>"})
    assert write_pages(filled, tmp_path / "site", with_blobs=True) == 3
    assert b"<script>" not in (tmp_path / "site" / "x.html").read_bytes()
    assert len(other.pull(str(tmp_path / "site")).moved) == 4
    with pytest.raises(StoreError, match="something is there already"):
        write_pages(filled, tmp_path / "site")


def test_lineage_as_text_and_picture(store: Store) -> None:
    from xml.etree import ElementTree

    a, b = make_adapter(1), make_adapter(2)
    store.put(a, "a")
    store.put(b, "b")
    mixed = make_adapter(3, parents=({"digest": a.digest, "weight": 0.7}, {"digest": b.digest, "weight": 0.3}))
    store.put(mixed, "mixed")
    store.put(
        make_adapter(
            4,
            parents=(
                {"digest": mixed.digest, "weight": 1.0},
                {"digest": "ab" * 32, "weight": None},
                {"digest": a.digest},
            ),
        ),
        "small",
    )
    store.promote("a", "prod")
    found = store.lineage("small")
    lines = found.text().splitlines()
    named = [re.search(r"\w+@1( \(prod\))?|(ab){6}", line) for line in lines]
    assert [match and match[0] for match in named] == [
        "small@1",
        "mixed@1",
        "a@1 (prod)",
        "b@1",
        "ab" * 6,
        "a@1 (prod)",
    ]
    assert "0.7 × a@1" in lines[2]
    assert "not in the store" in lines[4]
    picture = ElementTree.fromstring(found.svg())
    said = "".join(picture.itertext())
    assert all(word in said for word in ("small@1", "mixed@1", "a@1 (prod)", "b@1", "0.7", "0.3"))


def test_a_lineage_that_goes_round_ends(store: Store) -> None:
    a = make_adapter(1, parents=({"digest": make_adapter(2).digest},))
    store.put(a, "a")
    store.put(make_adapter(2, parents=({"digest": a.digest},)), "b")
    assert "a@1" in store.lineage("a").text()
    assert store.lineage("a").svg()


def test_differences(store: Store) -> None:
    store.put(make_adapter(1, evaluation={"eval_loss": 1.5}), "m", tags={"a": "1"})
    store.put(make_adapter(2, rank=2, evaluation={"eval_loss": 1.2}), "m")
    found = store.diff("m@1", "m@2")
    assert found.facts["metric.eval_loss"] == (1.5, 1.2)
    assert found.facts["spec.rank"] == (4, 2)
    assert found.facts["tag.a"] == ("1", None)
    one, two = store.get("m@1"), store.get("m@2")
    site = one.sites[0]
    dense = float((one.delta(site).double() - two.delta(site).double()).norm() / one.delta(site).double().norm())
    assert found.sites[site] == pytest.approx(dense, rel=1e-6)
    same = store.diff("m@1", "m@1")
    assert same.same
    assert (same.relative, same.cosine) == (0.0, pytest.approx(1.0))
