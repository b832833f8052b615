"""Many-runs that were killed, stopped or spread over processes end as if they had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.tolerances import TOLERANCES
from tests.unit.many.support import furthest, user_rows
from tests.unit.train.support import same
from weft.errors import RecipeError, RunError, RunStoppedError
from weft.many import Runs, sweep
from weft.many.desk import FolderDesk
from weft.many.rounds import Rounds
from weft.train import checkpoints
from weft.train.recipe import Recipe

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(weft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
}
RECIPE = Recipe(
    weft.LoraSpec(rank=3, dropout=0.1), max_steps=12, learning_rate=1e-2, batch_size=3, accumulation=2, eval_every=4
)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Data of five users on disk."""
    paths = []
    for number in range(5):
        paths.append(tmp_path / f"user{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in user_rows(number)))
    return paths


def check_same(found: Runs, expected: Runs) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert same(found[name].adapter, expected[name].adapter), name
        plain = [
            [{key: value for key, value in row.items() if key != "seconds"} for row in runs[name].log]
            for runs in (found, expected)
        ]
        assert plain[0] == plain[1], "and the log is that of one run"
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in runs.report.rows]
        for runs in (found, expected)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_kill_minus_nine_and_resume_gives_the_same_adapters(tmp_path: Path, small_dir: Path, files: list[Path]) -> None:
    """A real SIGKILL, with some users done, some in the batch and some waiting, one with broken data."""
    (tmp_path / "user1.jsonl").write_text("{broken\n")
    recipe = RECIPE.replace(max_steps=30, eval_every=6)
    given: dict[str, Any] = {"base": small_dir, "data": files, "eval_data": 0.2, "slots": 2, "save_every": 7}
    whole = weft.train_many(**given, recipe=recipe, out=tmp_path / "whole", progress=False)
    recipe.save(tmp_path / "recipe.yaml")
    code = (
        "import sys, weft\n"
        "base, recipe, out, *data = sys.argv[1:]\n"
        "weft.train_many(base=base, data=data, eval_data=0.2, slots=2, save_every=7, recipe=weft.Recipe.load(recipe), out=out, progress=False)"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", code, *map(str, (small_dir, tmp_path / "recipe.yaml", out, *files))]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if (there := checkpoints.steps(out / "checkpoints")) and there[-1] >= 35:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "report.json").exists()
    assert (out / "user0" / "report.json").exists(), "somebody was done"
    assert not (out / "user4" / "report.json").exists(), "and somebody was not"
    resumed = weft.train_many(out=out, resume=True, progress=False)
    check_same(resumed, whole)
    assert weft.train_many(out=out, resume=True)["user0"].adapter == resumed["user0"].adapter, (
        "a finished run is returned as it is"
    )


@pytest.mark.parametrize("after", [2, 9, 20])
def test_a_run_that_is_stopped_says_how_it_goes_on_and_does(
    after: int, tmp_path: Path, small_dir: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "base": small_dir,
        "data": files[:3],
        "eval_data": 0.2,
        "slots": 2,
        "progress": False,
        "recipe": RECIPE,
    }
    whole = weft.train_many(**given, out=tmp_path / "whole")
    done = FolderDesk.round_done

    def interrupted(self: FolderDesk, rounds: Rounds) -> bool:
        if rounds.number == after:
            os.kill(os.getpid(), signal.SIGINT)
        return done(self, rounds)

    monkeypatch.setattr(FolderDesk, "round_done", interrupted)
    with pytest.raises(RunStoppedError, match="weft train-many --resume"):
        weft.train_many(**given, out=tmp_path / "stopped")
    monkeypatch.undo()
    check_same(weft.train_many(out=tmp_path / "stopped", resume=True, progress=False), whole)


def test_a_killed_process_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, small_dir: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "base": small_dir,
        "data": files[:2],
        "progress": False,
        "recipe": RECIPE.replace(max_steps=4, eval_every=None),
    }
    whole = weft.train_many(**given, out=tmp_path / "whole")

    def power_cut(self: FolderDesk, rounds: Rounds) -> bool:
        if rounds.number == 2:
            raise MemoryError
        return True

    monkeypatch.setattr(FolderDesk, "round_done", power_cut)
    with pytest.raises(MemoryError):
        weft.train_many(**given, out=tmp_path / "cut")
    monkeypatch.undo()
    check_same(weft.train_many(out=tmp_path / "cut", resume=True, progress=False), whole)


def test_a_resumed_run_keeps_base_data_and_recipes(
    tmp_path: Path, small_dir: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "base": small_dir,
        "data": files[:2],
        "progress": False,
        "save_every": 1,
        "recipe": RECIPE.replace(max_steps=4, eval_every=None),
    }

    def cut(self: Rounds) -> None:
        if self.number == 2:
            raise MemoryError
        done(self)

    done = Rounds.round
    monkeypatch.setattr(Rounds, "round", cut)
    with pytest.raises(MemoryError):
        weft.train_many(**given, out=tmp_path / "cut")
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="keeps its recipes"):
        weft.train_many(out=tmp_path / "cut", resume=True, recipe=RECIPE)
    with pytest.raises(RunError, match="other users"):
        weft.train_many(out=tmp_path / "cut", resume=True, data=files[:3])
    from tests.unit.train.support import byte_base

    with pytest.raises(RunError, match="another base"):
        weft.train_many(out=tmp_path / "cut", resume=True, base=byte_base(layers=1))
    text = files[0].read_text()
    files[0].write_text(text + json.dumps({"prompt": "new", "completion": "row"}) + "\n")
    with pytest.raises(RunError, match="the data of 'user0' changed"):
        weft.train_many(out=tmp_path / "cut", resume=True)
    files[0].write_text(text)
    assert len(weft.train_many(out=tmp_path / "cut", resume=True, progress=False)) == 2


def test_a_sweep_is_resumed_at_its_rungs(
    tmp_path: Path, small_dir: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "base": small_dir, "data": files[2], "eval_data": 0.3, "slots": 2, "progress": False, "halving": 2, "save_every": 1,
        "recipe": Recipe(max_steps=8, batch_size=4, eval_every=1), "grid": {"rank": [1, 2], "learning_rate": [1e-3, 1e-2]},
    }  # fmt: skip
    whole = sweep(**given, out=tmp_path / "whole")
    done = Rounds.round
    for number in (2, 5):

        def cut(self: Rounds, number: int = number) -> None:
            if self.number == number:
                raise MemoryError
            done(self)

        monkeypatch.setattr(Rounds, "round", cut)
        with pytest.raises(MemoryError):
            sweep(**given, out=tmp_path / f"cut{number}")
        monkeypatch.undo()
        again: Any = weft.train_many(out=tmp_path / f"cut{number}", resume=True, progress=False)
        assert again.winner == whole.winner
        assert again.report.table == whole.report.table
        check_same(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["users", "rows"])
def test_two_processes(mode: str, tmp_path: Path, small_dir: Path, files: list[Path]) -> None:
    """Users apart: each process its own, and nothing else changes. Rows shared: the batches of a doubled batch size."""
    recipe = RECIPE.replace(max_steps=6, eval_every=3, dropout=0.0, batch_size=2, accumulation=1, batching="random")
    recipe.save(tmp_path / "recipe.yaml")
    script = tmp_path / "many.py"
    script.write_text(
        "import sys, torch, weft\n"
        "base, recipe, mode, out, *data = sys.argv[1:]\n"
        "runs = weft.train_many(base=base, data=data, eval_data=0.2, slots=2, recipe=weft.Recipe.load(recipe), processes=mode, out=out, progress=False)\n"
        "assert len(runs) == 5\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(small_dir),
               str(tmp_path / "recipe.yaml"), mode, str(tmp_path / mode), *map(str, files)]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert not done.returncode, done.stderr[-3000:]
    alike = recipe if mode == "users" else recipe.replace(batch_size=4)
    expected = weft.train_many(
        base=small_dir, data=files, eval_data=0.2, slots=2, recipe=alike, out=tmp_path / "one", progress=False
    )
    found = Runs.open(tmp_path / mode)
    assert set(found) == set(expected)
    for name in expected:
        if mode == "rows" and len(found[name].log) and found[name].report.data["train"]["examples"] % 4:
            continue  # the last, incomplete batch of an epoch is filled up so that every process has rows
        error, size = furthest(found[name].adapter, expected[name].adapter)
        assert error <= TOLERANCES["steps"].atol + TOLERANCES["steps"].rtol * size, name
        assert found[name].report.steps == expected[name].report.steps
