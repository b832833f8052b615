"""Runs that were killed, stopped or spread over processes end as if they had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.unit.train.support import byte_base, same
from weft.errors import RecipeError, RunError, RunStoppedError
from weft.train import checkpoints
from weft.train.recipe import Recipe
from weft.train.session import Session

QUICK = Recipe(max_steps=6, learning_rate=2e-2, batch_size=8, eval_every=2)
SPEC = weft.LoraSpec(rank=4, dropout=0.1)
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(weft.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
}


@pytest.mark.slow
def test_kill_minus_nine_and_resume_gives_the_same_adapter(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path]
) -> None:
    """A real SIGKILL in the middle, with dropout, length-grouped batches and several epochs."""
    recipe = Recipe(
        max_steps=30, learning_rate=1e-2, batch_size=4, accumulation=2, eval_every=6, save_every=3, spec=SPEC
    )
    given: dict[str, Any] = {"base": base_dir, "data": task[0], "eval_data": task[1]}
    whole = weft.train(**given, recipe=recipe, out=tmp_path / "whole", progress=False)
    recipe.save(tmp_path / "recipe.yaml")
    code = (
        "import sys, weft\n"
        "base, data, valid, recipe, out = sys.argv[1:]\n"
        "weft.train(base=base, data=data, eval_data=valid, recipe=weft.Recipe.load(recipe), out=out, progress=False)"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", code, *map(str, (base_dir, *task, tmp_path / "recipe.yaml", out))]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        deadline = time.monotonic() + 200
        while (
            len(checkpoints.steps(out / "checkpoints")) < 2 and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "report.json").exists()
    assert checkpoints.steps(out / "checkpoints")[-1] < 30
    partial = weft.load(checkpoints.newest(out / "checkpoints"))
    assert partial.sites == whole.adapter.sites, "a killed run leaves an adapter that can be used"
    resumed = weft.train(out=out, resume=True, progress=False)
    assert same(resumed.adapter, whole.adapter)
    assert resumed.adapter.digest == whole.adapter.digest
    plain = [
        {key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in whole.log
    ]
    again = [
        {key: value for key, value in row.items() if "second" not in key and "runtime" not in key}
        for row in resumed.log
    ]
    assert again == plain, "and the log is that of one run"
    assert weft.train(out=out, resume=True).adapter == resumed.adapter, "a finished run is returned as it is"


def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.train import trainer

    given: dict[str, Any] = {"base": base_dir, "data": task[0], "eval_data": task[1], "progress": False}
    recipe = QUICK.replace(max_steps=8, eval_every=4, spec=SPEC)
    whole = weft.train(**given, recipe=recipe, out=tmp_path / "whole")
    step = trainer.AdapterTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.AdapterTrainer, "training_step", interrupted)
        with pytest.raises(RunStoppedError, match="stopped at step 3 of 8.*weft train --resume"):
            weft.train(**given, recipe=recipe, out=tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoints.steps(tmp_path / "cut" / "checkpoints") == [3]
    assert same(weft.train(out=tmp_path / "cut", resume=True, progress=False).adapter, whole.adapter)


def test_a_resumed_run_keeps_base_data_and_recipe(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(task[0].read_text())
    model, tokenizer = weft.load_base(base_dir)
    monkeypatch.setattr(Session, "run", lambda self: (_ for _ in ()).throw(OSError("on purpose")))
    with pytest.raises(OSError, match="on purpose"):
        weft.train(base=(model, tokenizer), data=data, recipe=QUICK.replace(eval_every=None), out=tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(RunError, match="base was an object"):
        weft.train(out=tmp_path / "run", resume=True)
    with pytest.raises(RecipeError, match="differs in learning_rate"):
        weft.train(
            base=base_dir, out=tmp_path / "run", resume=True, recipe=QUICK.replace(eval_every=None, learning_rate=1.0)
        )
    other, _ = byte_base()
    with pytest.raises(RunError, match="another base"):
        weft.train(base=(other, tokenizer), out=tmp_path / "run", resume=True)
    data.write_text(task[1].read_text())
    with pytest.raises(RunError, match="the data changed"):
        weft.train(base=base_dir, out=tmp_path / "run", resume=True)
    data.write_text(task[0].read_text())
    assert weft.train(base=base_dir, out=tmp_path / "run", resume=True, progress=False).report.steps == 6


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(
    tmp_path: Path, base_dir: Path, task: tuple[Path, Path]
) -> None:
    """DDP over gloo: the same order, the same loss normalisation, the same evaluation."""
    spec = weft.LoraSpec(rank=4)
    recipe = Recipe(max_steps=6, learning_rate=1e-2, batch_size=8, eval_every=3, spec=spec)
    alone = weft.train(
        base=base_dir, data=task[0], eval_data=task[1], recipe=recipe, out=tmp_path / "one", progress=False
    )
    recipe.replace(batch_size=4).save(tmp_path / "recipe.yaml")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, weft, torch\n"
        "base, data, valid, recipe, out = sys.argv[1:]\n"
        "run = weft.train(base=base, data=data, eval_data=valid, recipe=weft.Recipe.load(recipe), out=out, progress=False)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
               *map(str, (base_dir, *task, tmp_path / "recipe.yaml", tmp_path / "two"))]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, "\n".join(
        line for line in done.stderr.splitlines() if "rank0" in line or "Error" in line
    )[-3000:]
    both = weft.Run.open(tmp_path / "two")
    for name, tensor in alone.adapter.tensors().items():
        torch.testing.assert_close(both.adapter.tensors()[name], tensor, rtol=1e-4, atol=1e-6)
    assert both.report.adapter["loss"] == pytest.approx(alone.report.adapter["loss"], rel=1e-5)
    assert both.report.tokens == alone.report.tokens
