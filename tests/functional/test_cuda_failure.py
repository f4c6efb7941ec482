"""What goes wrong on a GPU is named, and leaves everything as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

import dlfast
from dlfast import _native
from tests.support.native import built_for_cuda

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, built_for_cuda])]


@pytest.mark.parametrize(
    ("capability", "code", "runs"),
    [
        ((8, 0), ["sm_80", "compute_80"], "sm_80"),
        ((8, 6), ["sm_80", "sm_86", "sm_89"], "sm_86"),
        ((8, 9), ["sm_75", "sm_80"], "sm_80"),
        ((9, 0), ["sm_80", "compute_80"], "compute_80"),
        ((12, 1), ["sm_90", "sm_100", "sm_120", "compute_120"], "sm_120"),
        ((10, 3), ["sm_100f"], "sm_100f"),
        ((9, 0), ["sm_90a"], "sm_90a"),
        ((10, 0), ["sm_90", "sm_90a", "compute_90a"], None),
        ((8, 0), ["sm_86"], None),
        ((7, 5), ["sm_80", "compute_80"], None),
        ((8, 0), [], None),
    ],
)
def test_code_that_a_gpu_runs(capability, code, runs):
    assert _native.code_for(capability, code) == runs


def test_unknown_code_is_refused():
    with pytest.raises(ValueError, match="not a CUDA architecture: 'ampere'"):
        _native.code_for((8, 0), ["ampere"])


@pytest.fixture
def build_for_newer(monkeypatch):
    """A build with kernels for CUDA, none of which runs on the GPU there is, or pretends to be."""
    build = {**_native.native.build, "cuda": True, "cuda_code": ["sm_90", "compute_90"]}
    monkeypatch.setattr(_native, "native", _native.Native(_native.native.module, "", build))
    monkeypatch.setattr(_native, "NATIVE_DEVICES", frozenset({"cpu", "meta", "cuda"}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old GPU")
    _native._look_for_code.cache_clear()
    yield
    _native._look_for_code.cache_clear()


def test_a_gpu_without_code_is_named_once_with_the_way_to_build(build_for_newer):
    gpu = torch.device("cuda", 0)
    with pytest.warns(RuntimeWarning, match="Old GPU") as caught:
        asked = [_native.runs_on(gpu) for _ in range(3)]
    assert asked == [False, False, False]
    (warning,) = caught
    said = str(warning.message)
    assert "holds CUDA code for sm_90, compute_90, none of which runs on" in said
    assert "compute capability 7.5" in said
    assert "TORCH_CUDA_ARCH_LIST=7.5 pip install" in said
    assert _native.runs_on(torch.device("cpu"))


def test_a_build_without_cuda_code_says_so_where_there_is_a_gpu(build_for_newer, monkeypatch):
    build = {**_native.native.build, "cuda": False, "cuda_code": []}
    monkeypatch.setattr(_native, "native", _native.Native(_native.native.module, "", build))
    monkeypatch.setattr(_native, "NATIVE_DEVICES", frozenset({"cpu", "meta"}))
    with pytest.warns(RuntimeWarning, match="holds no CUDA code for Old GPU") as caught:
        assert [_native.runs_on(torch.device("cuda", 0)) for _ in range(3)] == [False] * 3
    (warning,) = caught
    assert "TORCH_CUDA_ARCH_LIST=7.5 pip install" in str(warning.message)


@pytest.mark.cuda
@built_for_cuda
def test_a_gpu_without_code_runs_plain_pytorch(build_for_newer):
    layer = dlfast.nn.ConvReLUPool2d(3, 8, 3, padding=1).cuda()
    optimizer = dlfast.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output = layer(x)
            output.sum().backward()
            before = [p.detach().clone() for p in layer.parameters()]
            optimizer.step()
        assert dlfast.explain(layer, x).forward == "reference"
    assert not [event.name for event in profile.events() if event.name.startswith("dlfast::")]
    expected = F.max_pool2d(F.relu(F.conv2d(x, before[0], before[1], padding=1)), 2)
    torch.testing.assert_close(output, expected)
    for p, old in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad)


@pytest.mark.cuda
@built_for_cuda
def test_a_gpu_with_code_runs_ours():
    x, weight = torch.randn(2, 3, 8, 8, device="cuda"), torch.randn(8, 3, 3, 3, device="cuda")
    assert _native.runs_on(x.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dlfast.conv_relu_pool2d(x, weight)
    assert any(event.name.startswith("dlfast::") for event in profile.events())


@pytest.mark.cuda
@built_for_cuda
def test_dynamo_sees_a_constant():
    """Asking for the GPU's capability breaks no graph."""
    x, weight = torch.randn(2, 3, 8, 8, device="cuda"), torch.randn(8, 3, 3, 3, device="cuda")
    compiled = torch.compile(dlfast.conv_relu_pool2d, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), dlfast.conv_relu_pool2d(x, weight))


@pytest.mark.cuda
@built_for_cuda
@pytest.mark.parametrize("misplaced", ["weight", "bias"])
def test_mixed_devices_are_refused(misplaced):
    tensors = {"input": torch.randn(2, 3, 8, 8), "weight": torch.randn(8, 3, 3, 3), "bias": torch.randn(8)}
    arguments = {name: t if name == misplaced else t.cuda() for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match=rf"{misplaced} must be on the device of input \(cuda:0\), got cpu"):
        dlfast.conv_relu_pool2d(**arguments)
    arguments = {name: t.cuda() if name == misplaced else t for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match="device"):
        dlfast.conv_relu_pool2d(**arguments)


@pytest.mark.cuda
@built_for_cuda
def test_a_code_on_another_device_is_refused():
    z = torch.randn(2, 4, 8, 8, device="cuda")
    pooling = ("max", (2, 2), (2, 2), (0, 0), False)
    output, winner_mask = torch.ops.dlfast._relu_pool2d(z, None, "relu", *pooling, True)
    with pytest.raises(RuntimeError, match=r"winner_mask must be on the device of the gradient \(cuda:0\), got cpu"):
        torch.ops.dlfast._relu_pool2d_backward(output, winner_mask.cpu(), [8, 8], "relu", *pooling)


LAUNCHES = {
    "pass": (
        "torch.ops.dlfast._relu_pool2d(torch.randn(2, 4, 8, 8, device='cuda'), None, 'relu', 'max', (3, 3), (2, 2),"
        " (0, 0), False, True)",
        ["in relu_pool_kernel<dlfast::ForwardStaged<float", "blocks of 256 threads", "[2, 4, 8, 8], with max pooling"],
    ),
    "step": (
        "p = torch.nn.Parameter(torch.zeros(9, device='cuda')); p.grad = torch.ones_like(p);"
        "dlfast.optim.SGD([p], lr=1.0).step()",
        ["in plain_step_kernel of sgd", "for 1 tensors"],
    ),
}


@pytest.mark.cuda
@built_for_cuda
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_failing_launch_is_named(launch):
    """The emulator ends a kernel after as many steps as it is told; a GPU cannot be made to fail on purpose."""
    if "emulator" not in torch.cuda.get_device_name():
        pytest.skip("needs the emulator")
    code, names = LAUNCHES[launch]
    program = (
        f"import torch, dlfast\ntry:\n    {code}\nexcept torch.AcceleratorError as error:\n    print('raised', error)"
    )
    environment = {**os.environ, "CUDA_EMULATOR_MAX_STEPS": "3"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("raised"), done.stderr[-3000:]
    for name in names:
        assert name in done.stdout


@pytest.mark.cuda
@built_for_cuda
def test_running_out_of_memory_in_backward_leaves_no_gradient():
    """A gradient of 2**34 elements; nothing of it is allocated, and what was there is as it was."""
    if "emulator" not in torch.cuda.get_device_name():
        pytest.skip("a GPU may have the memory")
    code = torch.zeros(1, 1, 1, 1, device="cuda", dtype=torch.uint8)
    grad = torch.ones(1, 1, 1, 1, device="cuda", dtype=torch.float16)
    side = 2**17
    with pytest.raises((torch.OutOfMemoryError, RuntimeError), match="memory"):
        torch.ops.dlfast._relu_pool2d_backward(
            grad, code, [side, side], "relu", "max", (2, 2), (side, side), (0, 0), False
        )
    assert grad.item() == 1
    assert code.item() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("algorithm", ["SGD", "Adam"])
def test_a_step_that_runs_out_of_memory_can_be_repeated(algorithm, device, monkeypatch):
    """Whichever allocation of a state it is: parameters are as before, and the next step is the first."""

    def parameters():
        generator = torch.Generator().manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in (3, 70, 1)]
        for p in made:
            p.grad = torch.ones_like(p)
        return made

    def optimizer_of(params):
        options = {"lr": 0.1, "momentum": 0.9} if algorithm == "SGD" else {"lr": 0.1}
        return getattr(dlfast.optim, algorithm)(params, **options)

    undisturbed = parameters()
    optimizer_of(undisturbed).step()
    full_like = torch.full_like
    failures = 0
    for allowed in range(12):
        left = [allowed]

        def scarce(*args, left=left, **kwargs):
            if left[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
            left[0] -= 1
            return full_like(*args, **kwargs)

        params = parameters()
        before = [p.detach().clone() for p in params]
        optimizer = optimizer_of(params)
        monkeypatch.setattr(torch, "full_like", scarce)
        try:
            optimizer.step()
        except torch.OutOfMemoryError:
            failures += 1
            assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
            monkeypatch.setattr(torch, "full_like", full_like)
            optimizer.step()
        monkeypatch.setattr(torch, "full_like", full_like)
        for p, expected in zip(params, undisturbed, strict=True):
            assert torch.equal(p, expected)
    assert 0 < failures < 12
