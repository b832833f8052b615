"""The page and the samples of real trainings: written at their end, again by `weft report`, and from folders that are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.command_line import weft as command
from weft.errors import BaseMismatchError, RunError
from weft.train import page, training
from weft.train.generation import Sampling
from weft.train.page import gather
from weft.train.recipe import Recipe
from weft.train.run import Run


def train(base: Path, task: tuple[Path, Path] | tuple[Path, None], out: Path, **recipe: Any) -> Run:
    settings = {
        "max_steps": 6,
        "batch_size": 4,
        "eval_every": 3,
        "log_every": 1,
        "learning_rate": 5e-3,
        "samples": 2,
        **recipe,
    }
    return weft.train(
        base=str(base), data=str(task[0]), eval_data=task[1] and str(task[1]), spec=weft.LoraSpec(rank=4, targets="all-linear"),
        recipe=Recipe(**settings), out=out, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(base_dir: Path, task: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base_dir, task, tmp_path_factory.mktemp("runs") / "one").path


def test_a_training_leaves_its_page_and_its_samples(run: Path) -> None:
    drawn = (run / "report.html").read_text(encoding="utf-8")
    for wanted in (
        "<h1>one</h1>",
        "Before and after",
        "Loss",
        "Spectrum",
        "Answers before and after",
        "kept: the checkpoint of step",
    ):
        assert wanted in drawn
    samples = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert samples["kind"] == "completion"
    assert len(samples["rows"]) == 2
    asked = [row["prompt"] for row in samples["rows"]]
    assert all(prompt.endswith("?") for prompt in asked)
    assert all(set(row) == {"prompt", "reference", "base", "adapter"} for row in samples["rows"])
    assert all(row["reference"] and set(row["reference"]) <= set("acegikmoqs") for row in samples["rows"])
    known = [
        json.loads(line)["prompt"]
        for line in (Path(json.loads((run / "environment.json").read_text())["inputs"]["eval_data"]))
        .read_text()
        .splitlines()
    ]
    assert set(asked) <= set(known)


def test_samples_are_what_generate_says(run: Path, base_dir: Path) -> None:
    rows = json.loads((run / "samples.json").read_text(encoding="utf-8"))["rows"]
    prompts = [row["prompt"] for row in rows]
    for name, adapter in (("base", None), ("adapter", run / "adapter")):
        said = weft.generate(base=str(base_dir), adapter=adapter, prompts=prompts, sampling=Sampling(max_new_tokens=48))
        assert said == [row[name] for row in rows]


def test_samples_can_be_switched_off_and_change_nothing(
    run: Path, base_dir: Path, task: tuple[Path, Path], tmp_path: Path
) -> None:
    without = train(base_dir, task, tmp_path / "none", samples=0)
    assert not (without.path / "samples.json").exists()
    assert (without.path / "report.html").is_file()
    assert without.adapter == Run.open(run).adapter


def test_what_a_picture_costs_is_never_the_training(
    base_dir: Path,
    task: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no picture today")

    monkeypatch.setattr(training, "record_samples", broken)
    monkeypatch.setattr(page, "run_page", broken)
    found = weft.train(
        base=str(base_dir),
        data=str(task[0]),
        recipe=Recipe(max_steps=1, batch_size=4),
        out=tmp_path / "r",
        progress=True,
    )
    assert Run.open(tmp_path / "r").adapter == found.adapter
    said = capfd.readouterr().err
    assert "no samples were written (ValueError: no picture today)" in said
    assert "report.html was not written" in said


def test_classes_show_predictions(base_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} {i}", "label": label} for i in range(8) for word, label in (("good", "yes"), ("bad", "no"))
    ]
    found = weft.train(
        base=str(base_dir),
        data=rows,
        eval_data=rows[:6],
        recipe=Recipe(max_steps=2, batch_size=4, samples=3),
        out=tmp_path / "r",
        progress=False,
    )
    samples = json.loads((found.path / "samples.json").read_text())
    assert [row["reference"] in ("yes", "no") for row in samples["rows"]] == [True] * 3
    assert all(
        row["adapter"].partition(" ")[0] in ("yes", "no") and row["adapter"].endswith("%)") for row in samples["rows"]
    )
    assert "Answers before and after" in (found.path / "report.html").read_text()


def test_plain_text_and_packed_rows(base_dir: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat sat on the mat " * 2} for _ in range(12)]
    for batching in ("length", "packed"):
        found = weft.train(
            base=str(base_dir),
            data=rows,
            recipe=Recipe(max_steps=1, batch_size=2, samples=2, batching=batching),
            out=tmp_path / batching,
            progress=False,
        )
        samples = json.loads((found.path / "samples.json").read_text())
        assert samples["note"].startswith("Rows of the training data")
        assert all(row["prompt"].startswith("the cat") and row["reference"] for row in samples["rows"])


def test_the_verb(run: Path, base_dir: Path, tmp_path: Path) -> None:
    assert command("report", run).out.strip() == str(run / "report.html")
    done = command("report", run, "--out", tmp_path / "p.html", "--base", base_dir)
    assert done.out.strip() == str(tmp_path / "p.html")
    assert "New directions" in (tmp_path / "p.html").read_text()
    found = command("report", run, "--json").json
    assert (found["finished"], found["name"], len(found["sites"])) == (True, "one", 14)
    assert found["samples"]["kind"] == "completion"


def test_runs_that_are_not_whole(run: Path, tmp_path: Path) -> None:
    open_run = tmp_path / "open"
    open_run.mkdir()
    for name in ("recipe.yaml", "environment.json"):
        (open_run / name).write_text((run / name).read_text())
    assert "There is no log yet" in " ".join(gather(open_run).notes)
    log = (run / "log.jsonl").read_text()
    (open_run / "log.jsonl").write_text(log[: len(log) // 2] + "\n[1]\nnonsense\n")
    done = command("report", open_run)
    drawn = (open_run / "report.html").read_text()
    assert "Not finished" in drawn
    assert "lines can&#x27;t be read" in drawn
    assert "has not ended" in done.err
    (open_run / "samples.json").write_text("{")
    (open_run / "recipe.yaml").write_text("a: [")
    assert {note.partition(" ")[0] for note in gather(open_run).notes} == {"log.jsonl:", "samples.json", "recipe.yaml"}


def test_what_is_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a run, got nothing"):
        gather(tmp_path / "nothing")
    assert command("report", tmp_path, ok=False).status == 2
    (tmp_path / "users.json").write_text("{}")
    with pytest.raises(RunError, match="run of many adapters"):
        gather(tmp_path)
    done = command("report", run, "--out", tmp_path / "no" / "p.html", ok=False)
    assert done.status == 2
    assert "can't be written here" in done.err
    assert "Traceback" not in done.err


def test_another_base(run: Path, tmp_path: Path) -> None:
    from tests.unit.train.support import byte_base

    model, tokenizer = byte_base()
    with pytest.raises(BaseMismatchError):
        gather(run, base=(model, tokenizer))
