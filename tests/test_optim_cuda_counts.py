"""Launches and memory traffic of CUDA steps, as the emulator counts them in a process of their own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dlfast._native import native

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not native.build.get("cuda"), reason="built without CUDA"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or "emulator" not in torch.cuda.get_device_name(),
        reason="the CUDA emulator counts, a GPU does not",
    ),
]
SECTOR = 32
# Tensors that fill what the arguments of a kernel hold, and more; lengths that no vector width divides.
FEW, MANY = 4, 40
NUMEL = 20_011

PROGRAM = """
import torch, dlfast.optim
from torch import nn
torch.manual_seed(0)
params = [nn.Parameter(torch.randn({numel}, device="cuda", dtype={dtype})) for _ in range({tensors})]
for p in params:
    p.grad = torch.randn_like(p)
opt = dlfast.optim.{name}(params, lr=0.01, **{extra})
{before}
opt.step()
assert not any(p.isnan().any() for p in params)
"""


def profile(tmp_path, name, dtype=torch.float32, tensors=FEW, numel=NUMEL, before="", **extra):
    """The kernels of one step: {name up to its template arguments: counters}."""
    file = tmp_path / "profile.json"
    program = PROGRAM.format(name=name, dtype=dtype, tensors=tensors, numel=numel, before=before, extra=extra)
    environment = {**os.environ, "CUDA_EMULATOR_PROFILE": str(file)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    kernels = {}
    for kernel in json.loads(file.read_text())["kernels"]:
        short = kernel["name"].split("<dlfast")[0].split("::")[-1].split("<")[0].split("(")[0]
        assert short not in kernels
        kernels[short] = kernel
    return kernels


def launches(kernels):
    return {name: kernel["launches"] for name, kernel in kernels.items()}


@pytest.mark.parametrize("tensors", [FEW, MANY])
@pytest.mark.parametrize(
    ("name", "extra", "expected"),
    [
        ("AdamW", {}, {"plain_step_kernel": 1}),
        (
            "AdamW",
            {"ema_decay": 0.9, "max_grad_value": 1.0, "zero_grad_after_step": True, "state_dtype": "int8"},
            {"full_step_kernel": 1},
        ),
        ("SGD", {"momentum": 0.9, "max_grad_norm": 1.0}, {"grad_norm_kernel": 1, "full_step_kernel": 1}),
        ("LAMB", {}, {"measure_kernel": 1, "trust_kernel": 1, "full_step_kernel": 1}),
        (
            "LAMB",
            {"max_grad_norm": 1.0},
            {"grad_norm_kernel": 1, "measure_kernel": 1, "trust_kernel": 1, "full_step_kernel": 1},
        ),
    ],
    ids=str,
)
def test_launches_of_a_step(tmp_path, name, extra, expected, tensors):
    """Whatever the number of tensors."""
    assert launches(profile(tmp_path, name, tensors=tensors, numel=300, **extra)) == expected


def test_infinities_are_looked_for_in_one_launch_more(tmp_path):
    kernels = profile(tmp_path, "Adam", numel=300, before='opt.grad_scale = torch.tensor(2.0, device="cuda")')
    assert launches(kernels) == {"grad_norm_kernel": 1, "full_step_kernel": 1}


def traffic(kernel):
    return SECTOR * (kernel["global_read"]["sectors"] + kernel["global_write"]["sectors"])


# Bytes of an element that have to be read and written.
@pytest.mark.parametrize(
    ("name", "dtype", "extra", "kernel", "read", "written"),
    [
        ("SGD", torch.float32, {}, "plain_step_kernel", 8, 4),
        ("SGD", torch.float32, {"momentum": 0.9}, "plain_step_kernel", 12, 8),
        ("Adam", torch.float32, {}, "plain_step_kernel", 16, 12),
        ("Adam", torch.float64, {}, "plain_step_kernel", 32, 24),
        ("Adam", torch.bfloat16, {}, "plain_step_kernel", 8, 6),
        ("Adam", torch.float32, {"ema_decay": 0.9, "zero_grad_after_step": True}, "full_step_kernel", 20, 20),
        ("Adam", torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}, "full_step_kernel", 14, 12),
        ("Adam", torch.float32, {"state_dtype": "int8"}, "full_step_kernel", 10 + 8 / 256, 6 + 8 / 256),
        ("Adam", torch.float32, {"max_grad_norm": 1.0}, "grad_norm_kernel", 4, 0),
    ],
    ids=str,
)
def test_memory_traffic_is_what_it_must_be(tmp_path, name, dtype, extra, kernel, read, written):
    counted = profile(tmp_path, name, dtype, **extra)[kernel]
    ideal = FEW * NUMEL * (read + written)
    assert ideal <= counted["footprint_read_bytes"] + counted["footprint_written_bytes"] <= 1.01 * ideal
    assert traffic(counted) <= 1.05 * ideal
    assert counted["shared_write"]["extra_wavefronts"] <= counted["shared_write"]["instructions"]
