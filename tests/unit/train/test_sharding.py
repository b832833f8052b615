"""Parameters that FSDP has cut up come together for the snapshot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import weft

SCRIPT = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from tests.models import tiny_llama
from weft.core.bank import attach
from weft.errors import WeftError
from weft.spec import LoraSpec
from weft.train.sharding import check_whole, whole_parameters

dist.init_process_group("gloo")
for kind in (1, 2):
    torch.manual_seed(0)
    model = tiny_llama()
    bank = attach(model, {"t": LoraSpec(rank=4)}, seed=0)
    with torch.no_grad():
        for _, parameter in bank.named_parameters("t"):
            parameter.add_(0.02 * torch.randn_like(parameter))
    begin = bank.adapter("t")
    if kind == 1:
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        for part in (*model.model.layers, model):
            wrapped = fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        wrapped = model
    tokens = torch.randint(3, 60, (2, 8))
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    try:
        check_whole(bank.adapter("t"), begin)
        raise AssertionError("pieces were not noticed")
    except WeftError:
        pass
    with whole_parameters(wrapped, dict(bank.named_parameters("t"))):
        after = bank.adapter("t")
    check_whole(after, begin)
    assert all(torch.equal(tensor, after.tensors()[name]) for name, tensor in begin.tensors().items())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_slot_is_gathered(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join([str(Path(weft.__file__).parents[1]), str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
