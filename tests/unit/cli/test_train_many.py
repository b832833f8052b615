"""`weft train-many` and requests of many adapters, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import weft
from tests.unit.cli.support import World, write_rows
from weft.formats import load

FAST = "--set max_steps=3 --set rank=2 --set learning_rate=1e-2 --set batch_size=4 --quiet"


@pytest.fixture(scope="module")
def many(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A many-run of three users in one file."""
    folder = tmp_path_factory.mktemp("many")
    rows = [
        {"who": who, "prompt": f"say {word} ", "completion": who[-1] * 3}
        for who in ("ann", "bob", "../eve")
        for word in "abcdefgh"
    ]
    write_rows(folder / "all.jsonl", rows)
    done = weft(
        f"train-many --base {world.base} --data {folder / 'all.jsonl'} --by who --eval 0.25 --out {folder / 'runs'} {FAST}"
    )
    assert "3 of 3 adapters trained" in done.out
    assert done.err == ""
    return folder / "runs"


def test_one_run_folder_a_user(many: Path) -> None:
    assert {"ann", "bob", "eve", "report.html", "report.json", "users.json"} <= {path.name for path in many.iterdir()}
    assert load(many / "ann").digest != load(many / "bob").digest
    assert "rank" in weft(f"inspect {many / 'eve'}").out


def test_one_adapter_a_file_and_broken_ones_are_said(world: World, tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{letter}?", "completion": name} for letter in "abcd"])
    (tmp_path / "cut.jsonl").write_text('{"prompt": "x", ')
    files = " ".join(str(tmp_path / f"{name}.jsonl") for name in ("ann", "bob", "cut"))  # as a shell expands *.jsonl
    done = weft(f"train-many --base {world.base} --data {files} --out {tmp_path / 'runs'} {FAST} --json", ok=False)
    assert done.status == 1
    assert [(row["name"], row["status"]) for row in done.json["rows"]] == [
        ("cut", "failed"),
        ("ann", "end"),
        ("bob", "end"),
    ]
    assert "invalid JSON" in done.json["rows"][0]["reason"]
    assert "Traceback" not in done.err
    file = write_rows(tmp_path / "requests.jsonl", [{"prompt": "a?", "adapter": "cut"}])
    asked = weft(f"generate --base {world.base} --adapter {tmp_path / 'runs'} --jsonl {file}", ok=False)
    assert "no adapter 'cut': its training failed" in asked.err
    assert "invalid JSON" in asked.err


def test_a_finished_run_is_resumed_to_itself(many: Path) -> None:
    before = load(many / "ann")
    assert "3 of 3" in weft(f"train-many --resume {many}").out
    assert load(many / "ann") == before
    assert "resume it" in weft(f"train-many --data x --out {many}", ok=False).err


def test_a_sweep_and_its_winner(world: World, tmp_path: Path) -> None:
    sweep = "--sweep rank=1,2 --sweep learning_rate=1e-6,2e-2 --eval 0.3"
    done = weft(
        f"train-many --base {world.base} --data {world.train} {sweep} --set max_steps=4 --set eval_every=2 --out {tmp_path / 'sweep'}"
    )
    assert f"next:    weft train --base {world.base} --recipe {tmp_path / 'sweep' / 'winner.yaml'} --data" in done.err
    assert "learning_rate: 0.02 is best in" in done.out
    recipe = tmp_path / "sweep" / "winner.yaml"
    assert "learning_rate: 0.02" in recipe.read_text()
    weft(
        f"train --base {world.base} --data {world.train} --recipe {recipe} --eval 0.3 --out {tmp_path / 'run'} --quiet"
    )


def test_requests_are_answered_by_the_adapter_that_they_name(world: World, many: Path, tmp_path: Path) -> None:
    mixed = {"ann": 0.5, "bob": 0.5}
    rows = [
        {"prompt": "say a ", "adapter": who, "id": number}
        for number, who in enumerate(["ann", "bob", None, "../eve", mixed])
    ]
    file = write_rows(tmp_path / "requests.jsonl", rows * 3)
    done = weft(f"generate --base {world.base} --adapter {many} --jsonl {file} --max-new-tokens 6 --batch-size 4")
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [{key: row[key] for key in ("prompt", "adapter", "id")} for row in found] == rows * 3
    for who, folder in (("ann", "ann"), ("bob", "bob"), ("../eve", "eve")):
        alone = weft(
            f"generate --base {world.base} --adapter {many / folder} --max-new-tokens 6 --json", "say a "
        ).json["text"]
        assert {row["text"] for row in found if row["adapter"] == who} == {alone}
    base = weft(f"generate --base {world.base} --max-new-tokens 6 --json", "say a ").json["text"]
    assert {row["text"] for row in found if row["adapter"] is None} == {base}
    named = weft(
        f"generate --base {world.base} --adapter x={many / 'ann'} --jsonl -", "--max-new-tokens", 6, stdin="", ok=False
    )
    assert named.status == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ""}', "line 1: expected a text"), ('{"adapter": "a"}', "line 1: expected a text"),
        ('{"prompt": "x", "adapter": 3}', "expected a name, null"), ('{"prompt": "x", "adapter": {"a": "b"}}', "weights by name"),
        ('{"prompt": "x", "adapter": {"a": NaN}}', "line 1: \"adapter\" is"),
    ],
)  # fmt: skip
def test_requests_that_say_nothing(line: str, message: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text(line + "\n")
    done = weft(f"generate --base {world.base} --jsonl {tmp_path / 'requests.jsonl'}", ok=False)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
