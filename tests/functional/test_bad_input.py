"""What the block does not accept is refused by name, before anything is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune

import dlfast
from dlfast import _native

pytestmark = pytest.mark.skipif(
    _native.native.module is None, reason="without the extension PyTorch's own checks speak"
)

X = torch.randn(2, 4, 8, 8)
W = torch.randn(6, 4, 3, 3)
B = torch.randn(6)

REFUSED = [
    ("input", RuntimeError, lambda: dlfast.conv_relu_pool2d(X[0, 0], W)),
    ("weight", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W[0])),
    ("weight", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W[0], padding="same")),
    ("channels", RuntimeError, lambda: dlfast.conv_relu_pool2d(X[:, :3], W)),
    ("groups", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, groups=4)),
    ("groups", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, groups=0)),
    ("bias", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, B[:5])),
    ("bias", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, B[:, None])),
    ("stride", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, stride=0)),
    ("stride", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, stride=(1, -1))),
    ("stride", (RuntimeError, ValueError), lambda: dlfast.conv_relu_pool2d(X, W, stride=(1, 1, 1))),
    ("padding", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, padding=-1)),
    ("padding", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, padding=2**40)),
    ("padding", ValueError, lambda: dlfast.conv_relu_pool2d(X, W, padding="half")),
    ("padding", ValueError, lambda: dlfast.conv_relu_pool2d(X, W, padding="same", stride=2)),
    ("dilation", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, dilation=0)),
    ("larger than the padded input", RuntimeError, lambda: dlfast.conv_relu_pool2d(X[:, :, :2], W)),
    ("larger than the padded input", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, dilation=4)),
    ("pool_size", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, pool_size=0)),
    ("pool_size", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, pool_size=7)),
    ("pool_size", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, pool_size=70000, pool_padding=35000)),
    ("pool_size", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, pool_size=8, pool_stride=2, ceil_mode=True)),
    ("pool_stride", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, pool_stride=0)),
    ("pool_padding", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, pool_padding=2)),
    ("pool_padding", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, pool_padding=-1)),
    ("pool", ValueError, lambda: dlfast.conv_relu_pool2d(X, W, pool="sum")),
    ("activation", ValueError, lambda: dlfast.conv_relu_pool2d(X, W, activation="gelu")),
    ("input", RuntimeError, lambda: dlfast.conv_relu_pool2d(X[:, :, :0], W, padding=2)),
    ("weight", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W[:0])),
    ("weight", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W.double())),
    ("bias", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W, B.half())),
    ("input", NotImplementedError, lambda: dlfast.conv_relu_pool2d(X.long(), W.long())),
    (
        "input",
        NotImplementedError,
        lambda: dlfast.conv_relu_pool2d(X.to(torch.complex64), W.to(torch.complex64)),
    ),
    ("input", RuntimeError, lambda: dlfast.conv_relu_pool2d(X.to_sparse(), W)),
    ("weight", RuntimeError, lambda: dlfast.conv_relu_pool2d(X, W.to_sparse())),
]


@pytest.mark.parametrize(("named", "error", "call"), REFUSED, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSED)])
def test_refused_by_name(named, error, call):
    with pytest.raises(error, match=named):
        call()


BACKWARD = {"window": ["relu", "max", [2, 2], [2, 2], [0, 0], False]}


@pytest.mark.parametrize(
    ("named", "grad", "winner_mask"),
    [
        ("grad_output", torch.ones(2, 6, 4, 4), torch.zeros(2, 6, 3, 3, dtype=torch.uint8)),
        ("winner_mask", torch.ones(2, 6, 3, 3), torch.zeros(2, 6, 3, 2, dtype=torch.uint8)),
        ("winner_mask", torch.ones(2, 6, 3, 3), torch.zeros(2, 6, 3, 3)),
        ("winner_mask", torch.ones(2, 6, 3, 3), torch.zeros(0, dtype=torch.uint8)),
    ],
)
def test_backward_operator_checks_what_it_reads(named, grad, winner_mask):
    """The operator is public in torch.ops: a winner_mask that does not fit must not be read out of bounds."""
    with pytest.raises(RuntimeError, match=named):
        torch.ops.dlfast._conv_relu_pool2d_backward(
            grad, X, W, winner_mask, [1, 1], [0, 0], [1, 1], 1, *BACKWARD["window"], [True, True, True]
        )
    with pytest.raises(RuntimeError, match=named):
        torch.ops.dlfast._relu_pool2d_backward(grad, winner_mask, [6, 6], *BACKWARD["window"])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [4, 200, 254])
def test_a_made_up_code_stays_inside_memory(value, channels_last):
    """Positions that a 2x2 window does not have: nothing is read or written outside, and nothing is passed on."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    winner_mask = torch.full((2, 6, 3, 3), value, dtype=torch.uint8).contiguous(memory_format=layout)
    grad = torch.ones(2, 6, 3, 3).contiguous(memory_format=layout)
    window = ["relu", "max", [2, 2], [2, 2], [1, 1], False]
    small = torch.ops.dlfast._relu_pool2d_backward(grad, winner_mask, [5, 5], *window)
    assert small.shape == (2, 6, 5, 5)
    assert small.isfinite().all()
    back = torch.ops.dlfast._relu_pool2d_transpose(torch.ones(2, 6, 5, 5), winner_mask, *window)
    assert back.isfinite().all()
    grads = torch.ops.dlfast._conv_relu_pool2d_backward(
        grad, X[:, :, :7, :7].clone(), W, winner_mask, [1, 1], [0, 0], [1, 1], 1, *window, [True, True, True]
    )
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("plan", ["direct", "pytorch"])
def test_expanded_and_overlapping_tensors(plan, monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", plan)
    expanded = torch.randn(1, 1, 8, 8).expand(2, 4, 8, 8)
    overlapping = torch.randn(200).as_strided((2, 4, 8, 8), (16, 4, 2, 1))
    for input in (expanded, overlapping):
        torch.testing.assert_close(dlfast.conv_relu_pool2d(input, W, B), dlfast.reference.conv_relu_pool2d(input, W, B))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 20000, "dilation": 40000, "pool_size": 1},
        {"padding": 2**30 - 1, "dilation": 2**31 - 1, "pool_size": 1},
    ],
    ids=str,
)
def test_huge_padding_takes_no_scratch_to_match(options, monkeypatch):
    """The padded input would have up to 2**62 elements; PyTorch never makes it, and neither do we."""
    monkeypatch.setenv("DLFAST_ALGORITHM", "direct")
    input, weight = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(
        dlfast.conv_relu_pool2d(input, weight, **options), dlfast.reference.conv_relu_pool2d(input, weight, **options)
    )


def test_unknown_plan_is_refused(monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", "fastest")
    with pytest.raises((RuntimeError, ValueError), match="DLFAST_ALGORITHM"):
        dlfast.conv_relu_pool2d(X, W)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dlfast.nn.ConvReLUPool2d(3, 8, 3, pool="median"),
        lambda: dlfast.nn.ConvReLUPool2d(3, 8, 3, activation="tanh"),
        lambda: dlfast.nn.ConvReLUPool2d(3, 8, 3, pool_size=0),
        lambda: dlfast.nn.ConvReLUPool2d(3, 8, 3, pool_padding=2),
        lambda: dlfast.nn.ConvReLUPool2d(3, 8, 3, groups=2),
        lambda: dlfast.nn.ConvReLUPool2d.from_modules(torch.nn.Conv2d(1, 1, 1), torch.nn.MaxPool2d(2, dilation=2)),
    ],
)
def test_modules_refuse(make):
    with pytest.raises(ValueError, match=r"pool|activation|groups|divisible"):
        make()


@pytest.mark.parametrize(
    ("conv", "pool"),
    [
        (torch.nn.ConvTranspose2d(1, 1, 1), torch.nn.MaxPool2d(2)),
        (torch.nn.Conv2d(1, 1, 1), torch.nn.AdaptiveMaxPool2d(2)),
    ],
)
def test_from_modules_refuses_other_layers(conv, pool):
    with pytest.raises(TypeError, match=r"must be an? (plain )?nn"):
        dlfast.nn.ConvReLUPool2d.from_modules(conv, pool)


def with_hook():
    conv = torch.nn.Conv2d(1, 1, 1)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    "make",
    [with_hook, lambda: torch.nn.utils.prune.l1_unstructured(torch.nn.Conv2d(1, 2, 3), "weight", 0.5)],
    ids=["hook", "pruned"],
)
def test_from_modules_refuses_what_it_would_lose(make):
    with pytest.raises(ValueError, match="conv must have"):
        dlfast.nn.ConvReLUPool2d.from_modules(make())


def test_from_modules_refuses_a_fused_layer():
    with pytest.raises(TypeError, match=r"plain nn\.Conv2d"):
        dlfast.nn.ConvReLUPool2d.from_modules(dlfast.nn.ConvReLUPool2d(1, 2, 3))
