"""How many kernels of ours a layer launches in training: what the host of a GPU is busy with."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS

# Says to stderr which part begins; between, the emulator's trace or, on a GPU, the profiler says what was launched.
SCRIPT = """
import os
import sys
import torch
import dlfast

layer = dlfast.nn.{layer}.cuda()
x = torch.randn(2, 8, 8, 8, device="cuda").contiguous(memory_format=torch.{memory_format}).requires_grad_()
grad = torch.randn_like(layer(x))

def part(name, run):
    print("PART", name, file=sys.stderr, flush=True)
    if torch.cuda.get_device_name().startswith("CUDA emulator"):
        return run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = run()
        torch.cuda.synchronize()
    for event in profile.events():
        print("LAUNCH", event.name, file=sys.stderr, flush=True)
    return result

layer(x).backward(grad)
y = part("forward", lambda: layer(x))
part("backward", lambda: y.backward(grad))
print("PART end", file=sys.stderr, flush=True)
os._exit(0)  # the emulator does not wait for the threads of autograd
"""


def launches(layer, memory_format):
    """Names of our kernels by part."""
    script = SCRIPT.format(layer=layer, memory_format=memory_format)
    # cuDNN's convolution, whatever this GPU would have.
    env = {**os.environ, "CUDA_EMULATOR_TRACE": "1", "DLFAST_ALGORITHM": "pytorch"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stderr.splitlines():
        if line.startswith("PART "):
            part = found.setdefault(line.removeprefix("PART "), [])
        elif found and (kernel := re.search(r"(?:CUDA emulator|LAUNCH).*?dlfast::.*?(\w+_kernel)<", line)):
            part.append(kernel[1])
    return found


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize(
    ("layer", "forward", "backward"),
    [
        # Sums, what is computed of them (running statistics too), the pass; PyTorch has as many for the
        # normalisation alone in channels_last, and ReLU and pooling beside it.
        ("ConvBNReLUPool2d(8, 8, 3, padding=1, bias=False, pool=None)", 3, 3),
        ("ConvBNReLUPool2d(8, 8, 3, padding=1, bias=False)", 3, 3),
        ("BNReLUPool2d(8, pool=None)", 3, 3),
        ("ConvReLUPool2d(8, 8, 3, padding=1, bias=False)", 1, 1),
        ("ConvReLUPool2d(8, 8, 3, padding=1, bias=False, pool=None)", 1, 1),
        ("ConvReLUPool2d(8, 8, 3, padding=1, bias=False, pool=None, activation=None)", 0, 0),
    ],
)
def test_kernels_of_a_layer(layer, forward, backward, memory_format):
    found = launches(layer, memory_format)
    assert (len(found["forward"]), len(found["backward"])) == (forward, backward), found
