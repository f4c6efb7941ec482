"""The optimizers under DDP, ZeRO, FSDP2 and distributed checkpoints: two gloo processes each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

PROGRAM = Path(__file__).with_name("distributed_program.py")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("case", ["ddp", "zero", "zero_norm", "fsdp", "checkpoint", "in_backward"])
def test_two_processes(case, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(tmp_path / "store"), case],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0, output
