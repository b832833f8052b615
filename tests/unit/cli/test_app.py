"""The door: verbs, help, version, what becomes of each kind of error, and what starting costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from tests.command_line import weft
from weft import __version__, errors
from weft.cli import app as door


def fresh(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, **environment}
    )
    return done.stdout.strip()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Put a verb in the place of all others that raises."""

    def put(error: BaseException) -> None:
        verb = typer.Typer(pretty_exceptions_enable=False)

        @verb.command()
        def broken() -> None:
            raise error

        monkeypatch.setattr(door._Verbs, "get_command", lambda self, ctx, name: typer.main.get_command(verb))

    return put


def test_help_names_every_verb_and_what_it_does() -> None:
    text = weft("--help").out
    for verb in door.VERBS:
        line = next(line for line in text.splitlines() if line.strip().startswith(verb + " "))
        assert line.endswith(".")
        assert not line.endswith("...")


@pytest.mark.parametrize("verb", door.VERBS)
def test_every_verb_has_help_in_80_columns(verb: str) -> None:
    done = weft(f"{verb} --help")
    assert done.out.startswith(f"Usage: weft {verb} ")
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("verb", "wanted"),
    [
        ("train", "--base --data --eval --out --recipe --set --resume --columns --task --dtype --overwrite --json"),
        ("eval", "--base --adapter --data --limit --columns --task --dtype --json --quiet"),
        (
            "generate",
            "--base --adapter --file --chat --dtype --json --max-new-tokens --temperature --top-p --top-k --seed",
        ),
        ("inspect", "--base --prove --dtype --json"),
        ("merge", "--base --adapter --out --dtype --task --json --quiet"),
        ("convert", "--to --out --overwrite --json"),
        ("demo", "--out --quiet"),
    ],
)
def test_options(verb: str, wanted: str) -> None:
    text = weft(f"{verb} --help").out
    assert [option for option in wanted.split() if option not in text] == []


def test_version() -> None:
    assert weft("--version").out == f"weft {__version__}\n"


def test_nothing_is_help_and_a_usage_error() -> None:
    done = weft(ok=False)
    assert done.status == 2
    assert "Commands:" in done.err


def test_settings_that_help_names_are_settings() -> None:
    from dataclasses import fields

    from weft.cli.train import EPILOG
    from weft.spec import LoraSpec
    from weft.train.recipe import Recipe

    named = EPILOG.removeprefix("Often set: ").partition(".")[0].split()
    assert set(named) <= {item.name for kind in (LoraSpec, Recipe) for item in fields(kind)}


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "weft", "inspcet"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("weft: No such command 'inspcet'. Did you mean 'inspect'?")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (errors.DataError("train.jsonl, line 3: no prompt"), 2, "weft: train.jsonl, line 3: no prompt\n"),
        (errors.FormatError("not JSON", path="x", key="k"), 2, "weft: x: key 'k': not JSON\n"),
        (errors.RunStoppedError("stopped at step 3"), 1, "weft: stopped at step 3\n"),
        (errors.NotFiniteError("the loss is NaN"), 1, "weft: the loss is NaN\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "weft: a.txt: No such file or directory\n"),
        (OSError(28, "No space left on device"), 1, "weft: No space left on device\n"),
        (MemoryError(), 1, "weft: out of memory."),
        (KeyboardInterrupt(), 130, "\nweft: stopped\n"),
        (ZeroDivisionError("by zero"), 1, "weft: this is a bug in weft, or in a library below it: ZeroDivisionError: by zero\nWEFT_DEBUG=1"),
        (typer.Exit(7), 7, ""),
    ],
)  # fmt: skip
def test_an_error_is_a_status_and_one_message(
    failing: Callable[[BaseException], None], error: BaseException, status: int, said: str
) -> None:
    failing(error)
    done = weft("train", ok=False)
    assert done.status == status
    assert done.err.startswith(said)
    assert "Traceback" not in done.err + done.out


def test_debugging_shows_the_traceback(
    failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(errors.DataError("no rows"))
    monkeypatch.setenv("WEFT_DEBUG", "1")
    with pytest.raises(errors.DataError, match="no rows"):
        weft("train")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    code = "import sys; from weft.cli import main; sys.exit(main(['--help']))"
    program = f'{sys.executable} -c "{code}"'
    script = f"set -o pipefail; {program} 2>{tmp_path}/err | true; echo $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("0", "1")
    assert (tmp_path / "err").read_text() == ""


def test_help_and_usage_errors_import_no_heavy_library() -> None:
    heavy = set("torch transformers datasets yaml numpy rich safetensors accelerate huggingface_hub".split())
    for words in (["--help"], ["train", "--help"], ["trian"], ["train"]):
        code = f"import sys; from weft.cli import main; main({words!r}); print(sorted({heavy} & set(sys.modules)), file=sys.stdout)"
        assert fresh(code).splitlines()[-1] == "[]"


def test_one_verb_does_not_import_the_others() -> None:
    code = "import sys; from weft.cli import main; main(['merge', '--help']); print(sorted(n for n in sys.modules if n.startswith('weft.cli.')))"
    loaded = fresh(code).splitlines()[-1]
    assert "weft.cli.merge" in loaded
    assert "weft.cli.train" not in loaded


def test_starting_is_quick() -> None:
    """The real limits are 0.15 s and 0.4 s, see `make bench`; shared machines get five times that."""

    def seconds(*words: str) -> float:
        found = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True, timeout=120)
            found.append(time.perf_counter() - start)
        return min(found)

    start = seconds("-c", "pass")
    assert seconds("-c", "import weft") - start <= 5 * 0.15
    assert seconds("-m", "weft", "--help") - start <= 5 * 0.4


def test_libraries_are_quiet_and_a_users_own_settings_stay() -> None:
    code = "import os; from weft.cli.quiet import quiet_libraries; quiet_libraries(); print(os.environ['TRANSFORMERS_VERBOSITY'])"
    assert fresh(code) == "error"
    assert fresh(code, TRANSFORMERS_VERBOSITY="info") == "info"
    code = "import os; from weft.cli.quiet import quiet_libraries; quiet_libraries(); print(os.environ.get('TRANSFORMERS_VERBOSITY'))"
    assert fresh(code, WEFT_DEBUG="1") == "None"
