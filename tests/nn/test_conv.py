"""The layers: nn.Conv2d's constructor, parameters and state, and what they share with it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dlfast

LAYERS = [dlfast.nn.ConvReLUPool2d, dlfast.nn.ConvReLU2d, dlfast.nn.ConvPool2d]


def plain(layer: dlfast.nn.ConvReLUPool2d, conv: nn.Conv2d) -> nn.Sequential:
    steps: list[nn.Module] = [conv]
    if layer.activation:
        steps.append(nn.ReLU())
    if layer.pool == "max":
        steps.append(nn.MaxPool2d(layer.pool_size, layer.pool_stride, layer.pool_padding, ceil_mode=layer.ceil_mode))
    elif layer.pool == "avg":
        steps.append(nn.AvgPool2d(layer.pool_size, layer.pool_stride, layer.pool_padding, layer.ceil_mode))
    return nn.Sequential(*steps)


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same"])
def test_same_as_conv2d_from_the_same_seed(layer_type, padding, padding_mode):
    arguments = (3, 8, (3, 5), 1, padding, 1, 1, True, padding_mode)
    torch.manual_seed(1)
    layer = layer_type(*arguments)
    torch.manual_seed(1)
    conv = nn.Conv2d(*arguments)
    assert list(layer.state_dict()) == list(conv.state_dict())
    for key, value in conv.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
    conv.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(conv.state_dict(), strict=True)
    x = torch.randn(2, 3, 10, 12)
    torch.testing.assert_close(layer(x), plain(layer, conv)(x))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d((2, 3)),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(2, count_include_pad=False),
        None,
    ],
)
@pytest.mark.parametrize("activation", ["relu", None])
def test_from_modules_shares_parameters(pool, activation):
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False, padding_mode="reflect").eval()
    layer = dlfast.nn.ConvReLUPool2d.from_modules(conv, pool, activation=activation)
    assert layer.weight is conv.weight
    assert layer.bias is None
    assert not layer.training
    x = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(layer(x), plain(layer, conv)(x))
    assert list(layer.state_dict()) == ["weight"]


def test_from_modules_of_the_special_cases():
    conv, pool = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)
    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(dlfast.nn.ConvReLU2d.from_modules(conv)(x), conv(x).relu())
    torch.testing.assert_close(dlfast.nn.ConvPool2d.from_modules(conv, pool)(x), pool(conv(x)))


def test_repr_tells_all():
    layer = dlfast.nn.ConvReLUPool2d(
        3, 8, 3, bias=False, pool_size=3, pool_stride=2, pool_padding=1, ceil_mode=True, activation=None
    )
    text = repr(layer)
    for part in (
        "kernel_size=(3, 3)", "bias=False", "activation=None", "pool='max'", "pool_size=(3, 3)",
        "pool_stride=(2, 2)", "pool_padding=(1, 1)", "ceil_mode=True",
    ):  # fmt: skip
        assert part in text


def test_parameters_train():
    torch.manual_seed(0)
    layer = dlfast.nn.ConvReLUPool2d(1, 4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x, target = torch.randn(8, 1, 10, 10), torch.rand(8, 4, 4, 4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
