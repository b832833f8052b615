"""`weft.diagnose` and `weft doctor`: what can be looked at, and what is said of what can't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.command_line import weft as command
from tests.unit.train.support import byte_base
from weft.errors import BaseMismatchError, RunError
from weft.train.run import Folder

ROWS = [{"prompt": f"{'abcdefgh'[i % 8] * 2}{i}?", "completion": "abcdefgh"[i % 8]} for i in range(40)]
SLOW = {"max_steps": 12, "learning_rate": 1e-8, "rank": 2}


@pytest.fixture(scope="module")
def base() -> Any:
    return byte_base()


@pytest.fixture(scope="module")
def run(base: Any, tmp_path_factory: pytest.TempPathFactory) -> weft.Run:
    """A learning rate that is far too low."""
    out = tmp_path_factory.mktemp("runs") / "slow"
    return weft.train(
        base=base, data=ROWS[:32], eval_data=ROWS[32:], recipe=weft.Recipe.from_dict(SLOW), out=out, progress=False
    )


def test_a_run_by_path_object_and_command(run: weft.Run) -> None:
    found = weft.diagnose(run.path)
    assert "learning-rate-too-low" in {item.rule for item in found}
    assert weft.diagnose(run) == found
    done = command("doctor", run.path, ok=False)
    assert done.status == 1
    assert "learning-rate-too-low" in done.out
    assert "→ Raise learning_rate" in done.out
    plain = command("doctor", run.path, "--json", ok=False)
    assert [item["rule"] for item in json.loads(plain.out)["findings"]] == [item.rule for item in found]


def test_only_low_findings_are_no_failure(run: weft.Run, tmp_path: Path) -> None:
    folder = tmp_path / "fine"
    folder.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (folder / name).write_bytes((run.path / name).read_bytes())
    lines = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3, "seconds": step} for step in range(1, 13)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command("doctor", folder)
    assert done.status == 0
    assert "not ended" in done.err


def test_a_damaged_log_and_a_killed_run(run: weft.Run, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (folder / name).write_bytes((run.path / name).read_bytes())
    text = (run.path / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(text + '{"step": 7, "lo\n[1, 2]\n"text"\n{"step": "x"}\n\x00\x01\n')
    done = command("doctor", folder, ok=False)
    assert "5 of" in done.err
    assert "weft train --resume" in done.err
    assert done.status in (0, 1)


def test_what_is_no_run(run: weft.Run, tmp_path: Path) -> None:
    with pytest.raises(weft.WeftError, match="nowhere"):
        weft.diagnose(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="expected the folder of a run"):
        weft.diagnose(tmp_path / "empty")
    folder = tmp_path / "young"
    folder.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (folder / name).write_bytes((run.path / name).read_bytes())
    with pytest.raises(RunError, match="no log to look at"):
        weft.diagnose(folder)
    (folder / "log.jsonl").write_text("half a li")
    with pytest.raises(RunError, match="no line of this log can be read"):
        weft.diagnose(folder)
    (folder / "environment.json").write_text("{")
    (folder / "log.jsonl").write_bytes((run.path / "log.jsonl").read_bytes())
    with pytest.raises(RunError, match=r"environment\.json"):
        weft.diagnose(folder)
    many = tmp_path / "many"
    (many / "ann").mkdir(parents=True)
    (many / "users.json").write_text("{}")
    (many / "ann" / "recipe.yaml").write_bytes((run.path / "recipe.yaml").read_bytes())
    with pytest.raises(RunError, match="run of many adapters; look at one of them: ann"):
        weft.diagnose(many)


def test_an_adapter_and_its_base(run: weft.Run, base: Any, tmp_path: Path) -> None:
    run.adapter.save(tmp_path / "adapter")
    assert isinstance(weft.diagnose(tmp_path / "adapter"), list)
    assert weft.diagnose(run.adapter, base) is not None
    other = byte_base(num_hidden_layers=1)
    with pytest.raises(weft.WeftError):
        weft.diagnose(run.adapter, other)
    with pytest.raises(BaseMismatchError, match="another base"):
        weft.diagnose(run.adapter, byte_base())


def test_a_run_of_an_older_version(run: weft.Run, tmp_path: Path) -> None:
    """Its environment has no facts, its lines no numbers of steps and sites."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "recipe.yaml").write_bytes((run.path / "recipe.yaml").read_bytes())
    environment = json.loads((run.path / "environment.json").read_text())
    del environment["facts"]
    (folder / "environment.json").write_text(json.dumps(environment))
    kept = ("step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "eval_loss")
    rows = [{name: row[name] for name in kept if name in row} for row in Folder(run.path).read_log() if "of" not in row]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("doctor", folder, ok=False)
    assert "older" in done.err or "did not write down" in done.err
