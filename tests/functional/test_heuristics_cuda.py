"""The heuristics on CUDA: what it predicts, what it measures, what it is made to do."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.utils.checkpoint

import dlfast
from dlfast import ran
from dlfast._measurements import Keeper, connect, identify
from dlfast._native import native
from tests.functional.test_conv_cuda import on_cuda
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("DLFAST_ALGORITHM", raising=False)
    native.module.forget_measurements()
    yield
    native.module.forget_measurements()


def block(channels: int, dtype: torch.dtype = torch.float16) -> dlfast.nn.ConvReLUPool2d:
    module = dlfast.nn.ConvReLUPool2d(channels, 64, 3, padding=1, device="cuda", dtype=dtype)
    return module.to(memory_format=torch.channels_last)


def tensor(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return on_cuda(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_first_layers_take_one_kernel():
    """They are bound by what they write, which is a quarter then, without what eager keeps."""
    choice = dlfast.explain(block(3), tensor(64, 3, 224, 224))
    if "emulator" not in torch.cuda.get_device_name():  # whose four processors compute longer than they write
        assert choice.forward == "single"
    assert [c.algorithm for c in choice.parts[0].candidates] == ["eager", "pytorch", "single"]
    eager, epilogue, single = choice.parts[0].candidates
    assert single.bytes < epilogue.bytes / 2 < eager.bytes / 4
    assert choice.floor < single.seconds
    assert choice.floor < epilogue.seconds < eager.seconds
    assert (choice.forward == "single") == (single.seconds < 0.9 * epilogue.seconds)
    # Input, weight, output and one byte for each of its elements.
    assert single.bytes == 2 * 64 * 3 * 224**2 + 2 * 64 * 27 + 3 * 64 * 64 * 112**2
    assert "single" in str(choice)


def test_what_has_no_single_kernel_says_so():
    contiguous = torch.randn(2, 16, 16, 16, device="cuda", dtype=torch.float64)
    choice = dlfast.explain(block(16, torch.float64).to(memory_format=torch.contiguous_format), contiguous)
    assert choice.forward == choice.grad_weight == "pytorch"
    assert "do not take" in choice.reason


@pytest.mark.parametrize("training", [True, False])
def test_benchmark_measures_once_and_takes_the_fastest(training, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    module, x = block(16).requires_grad_(training), tensor(2, 16, 16, 16)
    predicted = dlfast.explain(module, x)
    with torch.set_grad_enabled(training):
        first, second = module(x), module(x)
        assert torch.equal(first, second)
        measured = dlfast.explain(module, x)
    wanted = dlfast.reference.conv_relu_pool2d(x.cpu().float(), module.weight.cpu().float(), module.bias.cpu().float(),
                                               padding=1)  # fmt: skip
    torch.testing.assert_close(first.cpu().float(), wanted, rtol=1e-2, atol=1e-2)
    # PyTorch's kernels one by one are measured as a whole block, not in parts.
    assert [c.algorithm for c in measured.parts[0].candidates] == ["pytorch", "single"]
    epilogue, single = measured.parts[0].candidates
    assert {epilogue.seconds, single.seconds}.isdisjoint(c.seconds for c in predicted.parts[0].candidates)
    assert measured.parts[0].chosen.seconds == min(epilogue.seconds, single.seconds)
    assert "measured as a whole" in measured.reason
    if training:
        first.float().sum().backward()
        assert module.weight.grad.isfinite().all()
        backward = dlfast.explain(module, x).parts[1]
        assert [c.algorithm for c in backward.candidates] == ["pytorch", "single"]
        assert backward.chosen.seconds == min(c.seconds for c in backward.candidates)


def test_a_block_that_eager_runs_faster_says_so(monkeypatch):
    """What the emulator finds faster is as good as chance: both answers are told as they were measured."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    module, x = block(16), tensor(2, 16, 16, 16)
    module(x)
    choice = dlfast.explain(module, x)
    eager, ours = (float(number) for number in re.findall(r"([\d.e+-]+) ms", choice.reason))
    if eager < ours:
        assert (choice.forward, choice.grad_weight, choice.predicted_gain) == ("eager", "eager", 1.0)
    else:
        assert choice.forward in ("pytorch", "single")
        assert choice.predicted_gain == pytest.approx(eager / ours, rel=0.02)


def test_checkpointing_with_benchmark(monkeypatch):
    """Nothing is measured while checkpointing watches, which must find the same tensors saved twice."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    module, x = block(16), tensor(2, 16, 16, 16).requires_grad_()
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).float().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.ne(0).any()
    assert "measured" not in dlfast.explain(module, x).reason


def test_gradients_are_the_same_with_benchmark(monkeypatch):
    grads = []
    for benchmark in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        torch.manual_seed(0)
        # Whole numbers: the winners are the same whether or not the convolution's output is rounded.
        module, x = block(16), tensor(2, 16, 16, 16).round().requires_grad_()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_((p * 8).round())
        module(x).float().square().sum().backward()
        grads.append([x.grad, module.weight.grad, module.bias.grad])
    for plain, measured in zip(*grads, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(plain, measured, rtol=0, atol=1e-2 * scale)


def test_what_was_measured_is_there_for_the_next_process(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("DLFAST_CACHE_DIR", str(tmp_path))
    compiled = native.module

    def new_process() -> Keeper:
        keeper = Keeper(compiled, partial(identify, dlfast.__version__, compiled))
        compiled.keep_measurements(load=keeper.load, save=keeper.save)
        compiled.forget_measurements()
        return keeper

    try:
        keeper, module, x = new_process(), block(16), tensor(2, 16, 16, 16)
        assert "measured as a whole" not in dlfast.explain(module, x).reason
        module(x)
        first = dlfast.explain(module, x)
        keeper.save_all()
        new_process()
        assert dlfast.explain(module, x) == first
        assert "measured as a whole" in first.reason
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        assert "predicted" in dlfast.explain(module, x).reason
    finally:
        connect(dlfast.__version__)


def test_explain_says_what_predictions_rest_on():
    """A GPU that no constant was measured on, as the emulated ones of compute capability 8.0, is told as such."""
    reason = dlfast.explain(block(16), tensor(2, 16, 16, 16)).reason
    known = torch.cuda.get_device_capability() == (9, 0)
    assert ("what an H100 measured" if known else "not measured on this GPU") in reason


@pytest.mark.parametrize("backward", [True, False])
def test_a_convolution_alone_is_pytorchs_own(backward):
    """No pass of ours copies its output, where cuDNN is chosen for all of it."""
    layer = dlfast.nn.ConvReLUPool2d(16, 8, 3, activation=None, pool=None, device="cuda", dtype=torch.float64)
    x = torch.randn(2, 16, 8, 8, device="cuda", dtype=torch.float64, requires_grad=backward)
    with torch.set_grad_enabled(backward), ran.watch() as seen:
        y = layer(x)
        if backward:
            y.sum().backward()
    assert seen == []
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, layer.weight, layer.bias))


def test_a_forced_plan_is_not_measured(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    module, x = block(16), tensor(2, 16, 16, 16)
    before = dlfast.explain(module, x).parts[0].candidates
    monkeypatch.setenv("DLFAST_ALGORITHM", "single")
    module(x)
    assert dlfast.explain(module, x).parts[0].candidates == before


@pytest.mark.gpu_only
def test_never_slower_than_eager(monkeypatch):
    """With cudnn.benchmark a block that PyTorch runs faster is PyTorch's own."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for channels, size in [(3, 224), (64, 56), (256, 14)]:
        module, x = block(channels), tensor(32, channels, size, size)

        def eager(x: torch.Tensor, module=module) -> torch.Tensor:
            return torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, module.weight, module.bias,
                                                                             padding=1).relu(), 2)  # fmt: skip

        times = {"ours": [], "eager": []}
        for _ in range(20):
            for name, function in (("ours", module), ("eager", eager)):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                function(x).float().sum().backward()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
        assert min(times["ours"]) <= 1.05 * min(times["eager"])
