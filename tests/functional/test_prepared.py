"""Calls that spare the dispatcher come to what the dispatcher comes to, and are as visible."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import dlfast
from dlfast.functional import prepared
from tests.support.native import needs_native

pytestmark = needs_native

LAYERS = {
    "conv": lambda **pool: dlfast.nn.ConvReLUPool2d(3, 4, 3, padding=1, **pool),
    "norm": lambda **pool: dlfast.nn.BNReLUPool2d(3, **pool),
    "chain": lambda **pool: dlfast.nn.ConvBNReLUPool2d(3, 4, 3, padding=1, **pool),
}
POOLS = {"max": {}, "avg": {"pool": "avg"}, "none": {"pool": None}, "linear": {"pool": None, "activation": None}}


class LooksOn(TorchDispatchMode):
    """With which every call goes through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def made(kind, pool, dtype=torch.float32):
    torch.manual_seed(0)
    return LAYERS[kind](**POOLS[pool]).to(dtype)


def ran(layer, x, lower):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=lower):
        y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("lower", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_same_bits_with_and_without_the_dispatcher(kind, pool, lower):
    x = torch.randn(4, 3, 9, 8)
    plain = ran(made(kind, pool), x, lower)
    with LooksOn() as mode:
        dispatched = ran(made(kind, pool), x, lower)
    assert "dlfast" in mode.seen or (kind, pool) == ("conv", "linear")  # which is PyTorch's convolution
    # A chain normalises with PyTorch's gradient of the convolution or with ours, which sum in another order.
    close = {"rtol": 1e-2, "atol": 1e-2} if lower else {"rtol": 1e-5, "atol": 1e-5}
    for one, other in zip(plain, dispatched, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        if kind == "chain":
            torch.testing.assert_close(one, other, **close)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", LAYERS)
def test_no_call_of_plain_tensors_reaches_the_dispatcher(kind, pool, monkeypatch):
    layer, x = made(kind, pool), torch.randn(4, 3, 9, 8)

    def refuse(*args, **kwargs):
        raise AssertionError("through the dispatcher")

    for name in ("conv_relu_pool2d", "_conv_relu_pool2d", "_batch_norm_relu_pool2d"):
        monkeypatch.setattr(getattr(torch.ops.dlfast, name), "default", refuse)
    layer(x).sum().backward()
    layer.eval()(x).sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", ["max", "none", "linear"])
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_a_chain(pool, bias, training):
    torch.manual_seed(0)
    layer = dlfast.nn.ConvBNReLUPool2d(2, 3, 3, bias=bias, **POOLS[pool]).double().train(training)
    with torch.no_grad():
        layer.bn.bias.normal_()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return torch.func.functional_call(layer, {**dict(zip(names, values, strict=True)), **buffers}, (x,))

    assert gradcheck(call, (x, *parameters))
    assert gradgradcheck(call, (x, *parameters), atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("conv", "conv_relu_pool2d"), ("norm", "batch_norm_relu_pool2d"),
                                            ("chain", "conv_batch_norm_relu_pool2d")])  # fmt: skip
def test_a_profiler_sees_forward_and_backward(kind, name):
    layer, x = made(kind, "max"), torch.randn(2, 3, 8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert f"dlfast::{name}" in names
    backward = {"conv": "ConvReluPoolBackward", "norm": "BatchNormReluPoolBackward",
                "chain": "ConvBatchNormReluPoolBackward"}[kind]  # fmt: skip
    assert backward in names
    assert layer(x).grad_fn.name() == backward


def test_a_convolution_that_refuses_counts_no_batch():
    layer = made("chain", "max")
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5, 8, 8))
    assert layer.bn.num_batches_tracked == 0
    layer(torch.randn(2, 3, 8, 8))
    assert layer.bn.num_batches_tracked == 1


def test_an_average_of_all_batches_moves_alike():
    """momentum=None: the first batch moves the statistics all the way, the second half of it."""
    torch.manual_seed(0)
    layer = dlfast.nn.ConvBNReLUPool2d(3, 4, 3, momentum=None)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None))
    plain[0].load_state_dict({"weight": layer.weight, "bias": layer.bias})
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        layer(x), plain(x)
    torch.testing.assert_close(layer.bn.running_mean, plain[1].running_mean)
    torch.testing.assert_close(layer.bn.running_var, plain[1].running_var)
    assert layer.bn.num_batches_tracked == 3


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_node_keeps_is_watched(kind):
    layer, x = made(kind, "max"), torch.randn(2, 3, 8, 8, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        y = layer(x)
    assert x.shape in packed
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y = layer(x)
    with torch.no_grad():
        (layer.bn if kind == "chain" else layer).weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_options_are_kept_once():
    prepared.conv_block.cache_clear()
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    for _ in range(3):
        dlfast.conv_relu_pool2d(x, weight, padding=1)
    dlfast.conv_relu_pool2d(x, weight, padding=[1, 1])  # which cannot be kept
    assert prepared.conv_block.cache_info().misses == 1
    with pytest.raises(RuntimeError, match="stride must be at least 1"):
        dlfast.conv_relu_pool2d(x, weight, stride=0)
    with pytest.raises(ValueError, match="pool must be 'max', 'avg' or None, got 'min'"):
        dlfast.conv_relu_pool2d(x, weight, pool="min")
    with pytest.raises((TypeError, RuntimeError)):
        dlfast.conv_relu_pool2d(x, weight, stride="one")
