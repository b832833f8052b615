"""What every test has: an environment that is set before torch is imported, a fresh seed, and the shared real data."""

from __future__ import annotations

import gc
import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault(
    "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"
)  # some virtual machines announce AMX and then fault on it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_DISABLED"] = "true"
os.environ["WEFT_STORE"] = os.path.join(os.sep, "nonexistent", "weft-store")  # nobody's own store takes part
os.environ.pop("WEFT_STORE_INDEX", None)
os.environ.pop("WEFT_OWNER", None)
os.environ["NO_COLOR"] = "1"
os.environ.pop("FORCE_COLOR", None)
os.environ["COLUMNS"] = "120"

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

settings.register_profile("weft", deadline=None, max_examples=50, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "weft"))

REPOSITORY = Path(__file__).resolve().parent.parent


def _unsynced(fd: int) -> None:
    """Stands for ``os.fsync``: no test pulls the plug, and a flush costs milliseconds where a test writes hundreds of files."""
    os.fstat(fd)  # a closed file is still an error


if os.environ.get("WEFT_TEST_FSYNC") != "1":
    os.fsync = _unsynced


def pytest_collection_finish() -> None:
    """What the imports left is not garbage: accelerate collects after every training, over a million objects of the libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """A fresh seed for every test, shown when it fails; ``WEFT_TEST_SEED=123`` repeats one."""
    given = os.environ.get("WEFT_TEST_SEED")
    value = int(given) if given else secrets.randbelow(2**31)
    request.node.stash[_SEED] = value
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    dtype = torch.get_default_dtype()
    yield value
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


_SEED = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the seed to the report of a failed test."""
    report = yield
    if report.failed and _SEED in item.stash:
        report.sections.append(("seed", f"repeat with WEFT_TEST_SEED={item.stash[_SEED]}"))
    return report


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real models and data beside the repository; a test that needs it is skipped where there is none."""
    folder = Path(os.environ.get("WEFT_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"needs real models and data in {folder} (or where WEFT_SHARED points), which is not here")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared_dir: Path) -> Path:
    """A small pretrained Llama in Hugging Face layout: 64 wide, 5 layers, vocabulary 512, context 512."""
    return shared_dir / "models" / "stories260k"


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """A CUDA device; a test that needs it is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")
    return torch.device("cuda")
