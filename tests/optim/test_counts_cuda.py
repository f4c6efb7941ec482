"""Launches and memory traffic of CUDA steps, as the emulator counts them: one process for each of both."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.support.native import CUDA_KERNELS

pytestmark = [
    *CUDA_KERNELS,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "emulator" not in torch.cuda.get_device_name(),
        reason="the CUDA emulator counts, a GPU does not",
    ),
]
PROGRAM = """
import sys, torch, dlfast.optim
from torch import nn
torch.manual_seed(0)
for case, (name, dtype, tensors, numel, extra, scale) in enumerate({cases}):
    params = [nn.Parameter(torch.randn(numel, device="cuda", dtype=dtype)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = getattr(dlfast.optim, name)(params, lr=0.01, **extra)
    if scale:
        opt.grad_scale = torch.tensor(2.0, device="cuda")
    print("case", case, file=sys.stderr, flush=True)
    opt.step()
    assert not any(p.isnan().any() for p in params)
"""

TAIL = {"ema_decay": 0.9, "max_grad_value": 1.0, "zero_grad_after_step": True, "state_dtype": "int8"}
# Algorithm, options, whether it looks for infinities; kernels.
LAUNCHES = [
    ("AdamW", {}, False, ["plain_step"]),
    ("AdamW", TAIL, False, ["full_step"]),
    ("SGD", {"momentum": 0.9, "max_grad_norm": 1.0}, False, ["grad_norm", "full_step"]),
    ("Adam", {}, True, ["grad_norm", "full_step"]),
    ("Lion", {**TAIL, "max_grad_norm": 1.0}, True, ["grad_norm", "full_step"]),
    ("LAMB", {}, False, ["measure", "trust", "full_step"]),
    ("LAMB", {"max_grad_norm": 1.0}, False, ["grad_norm", "measure", "trust", "full_step"]),
]
# Algorithm, dtype, options, kernel; bytes of an element that have to be read and written. No kernel twice.
NUMEL, TENSORS = 20_011, 4
TRAFFIC = [
    ("SGD", torch.float32, {"momentum": 0.9}, "plain_step_kernel<dlfast::optim::Sgd, float>", 12, 8),
    ("Adam", torch.float32, {}, "plain_step_kernel<dlfast::optim::Adam, float>", 16, 12),
    ("Adam", torch.float64, {}, "plain_step_kernel<dlfast::optim::Adam, double>", 32, 24),
    ("Adam", torch.bfloat16, {}, "plain_step_kernel<dlfast::optim::Adam, __nv_bfloat16>", 8, 6),
    (
        "Adam",
        torch.float32,
        {"ema_decay": 0.9, "zero_grad_after_step": True},
        "full_step_kernel<dlfast::optim::Adam, float>",
        20,
        20,
    ),
    (
        "Adam",
        torch.bfloat16,
        {"master_weights": True, "state_dtype": torch.float32},
        "full_step_kernel<dlfast::optim::Adam, __nv_bfloat16>",
        14,
        12,
    ),
    ("Lion", torch.float32, {"state_dtype": "int8"}, "full_step_kernel<dlfast::optim::Lion, float>", 9.02, 5.02),
    ("RMSprop", torch.float32, {"max_grad_norm": 1.0}, "grad_norm_kernel<float>", 4, 0),
]


def run(cases, **environment):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(cases=cases)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stderr


def test_launches_of_a_step():
    """The same for any number of tensors: here some in arguments, and more than these hold."""
    cases = [(name, torch.float32, tensors, 300, extra, scale)
             for tensors in (4, 40) for name, extra, scale, _ in LAUNCHES]  # fmt: skip
    parts = re.split(r"^case \d+$", run(cases, CUDA_EMULATOR_TRACE="1"), flags=re.MULTILINE)[1:]
    found = [re.findall(r"(\w+)_kernel(?:<.*>)?\(", part) for part in parts]
    assert found == 2 * [kernels for *_, kernels in LAUNCHES]


def test_memory_traffic_is_what_it_must_be(tmp_path):
    file = tmp_path / "profile.json"
    cases = [(name, dtype, TENSORS, NUMEL, extra, False) for name, dtype, extra, *_ in TRAFFIC]
    run(cases, CUDA_EMULATOR_PROFILE=str(file))
    kernels = {k["name"].split("::", 3)[-1].split("(dlfast")[0]: k for k in json.loads(file.read_text())["kernels"]}
    for *_, name, read, written in TRAFFIC:
        counted = kernels[name]
        assert counted["launches"] == 1
        sectors = counted["global_read"]["sectors"] + counted["global_write"]["sectors"]
        ideal = TENSORS * NUMEL * (read + written)
        # The table, counters and sectors that a tensor's end leaves open come on top.
        touched = counted["footprint_read_bytes"] + counted["footprint_written_bytes"]
        assert ideal <= touched <= 1.01 * ideal, name
        assert ideal <= 32 * sectors <= 1.05 * ideal, name
