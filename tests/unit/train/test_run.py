"""The run folder: what may be written where, the log of a killed run, the pictures."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from weft.errors import RunError
from weft.train.curve import loss_curve
from weft.train.recipe import Recipe
from weft.train.run import Folder, Report, Run, write_beside


def started(path: Path) -> Folder:
    folder = Folder(path)
    folder.create()
    folder.save_recipe(Recipe())
    folder.save_environment({"a": 1})
    return folder


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="files of others are left alone"):
            Folder(tmp_path).create(overwrite)
    assert (tmp_path / "mine.txt").read_text() == "x"
    with pytest.raises(RunError, match="this is a file"):
        Folder(tmp_path / "mine.txt").create()
    with pytest.raises(RunError, match="can't be written here"):
        Folder(tmp_path / "mine.txt" / "below").create()


def test_a_run_is_overwritten_only_when_asked(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    (folder.root / "notes.txt").write_text("kept")
    with pytest.raises(RunError, match="overwrite"):
        folder.create()
    folder.create(overwrite=True)
    assert not folder.recipe.exists(), "killed here, the folder is still one that a run can be made in"
    (folder.root / "notes.txt").rename(tmp_path / "notes.txt")
    folder.create()
    (tmp_path / "notes.txt").rename(folder.root / "notes.txt")
    assert (folder.root / "notes.txt").exists(), "a file that is not the run's stays"


def test_a_path_that_is_no_run_names_runs_near_it(tmp_path: Path) -> None:
    started(tmp_path / "first")
    with pytest.raises(RunError, match="Did you mean 'first'"):
        Folder(tmp_path / "frist").require()
    with pytest.raises(RunError, match="has not ended; continue it: weft train --resume"):
        Run.open(tmp_path / "first")


def test_the_log_of_a_killed_run_is_brought_back_to_its_checkpoint(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    for step in range(5):
        folder.append_log({"step": step, "loss": math.nan if step == 4 else 1.0})
    with folder.log.open("a") as handle:
        handle.write('{"step": 5, "lo')
    assert [row["step"] for row in folder.read_log()] == [0, 1, 2, 3, 4]
    assert folder.read_log()[-1]["loss"] == "nan"
    folder.rewind_log(2)
    folder.append_log({"step": 3})
    assert [row["step"] for row in folder.read_log()] == [0, 1, 2, 3]


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    held = folder.lock()
    with pytest.raises(RunError, match="another process"):
        Folder(folder.root).lock()
    held.close()
    Folder(folder.root).lock().close()


def test_a_report_is_read_back_and_says_the_main_things(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    folder.append_log({"step": 0, "of": "base", "eval_loss": 3.0})
    folder.append_log({"step": 1, "loss": 2.0})
    report = Report({"loss": 3.0}, {"loss": 1.5, "perplexity": math.exp(1.5)}, steps=10, best_step=8, stopped="early",
                    rate_reason="0.001: as the recipe says", notes=("watch out",))  # fmt: skip
    folder.save_report(report, "run")
    again = Report.from_dict(json.loads(folder.report.read_text()) | {"later": 1})
    assert again == report
    text = report.text()
    for part in ("stopped early", "step 8", "0.001", "watch out", "1.5"):
        assert part in text
    assert (folder.root / "report.md").read_text().startswith("# run")
    ElementTree.fromstring((folder.root / "curve.svg").read_text())


def test_write_beside_leaves_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_beside(path, "1")
    write_beside(path, "2")
    assert path.read_text() == "2"
    assert [child.name for child in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_the_curve_is_a_picture_whatever_was_logged(count: int) -> None:
    lines: list[dict[str, object]] = [{"step": step, "loss": 1 / step} for step in range(1, count + 1)]
    lines += [{"step": step, "eval_loss": 1.0} for step in range(10, count + 1, 10)]
    lines += [{"step": 1, "loss": "nan"}, {"step": 2, "eval_loss": math.inf}, {"eval_loss": 1}]
    root = ElementTree.fromstring(loss_curve(lines, "<a & b>", best_step=20))
    drawn = [child.tag.rpartition("}")[2] for child in root]
    assert drawn.count("polyline") == (0 if not count else 2 if count < 10 else 3)
