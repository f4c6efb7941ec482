"""A small network with everything that a step must keep right, and the loop that a graphed step stands for."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

import dlfast

CLASSES = 5


def network(device="cpu"):
    torch.manual_seed(3)
    model = nn.Sequential(
        dlfast.nn.ConvReLUPool2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, CLASSES),
    )
    return model.to(device)


def batches(count, device="cpu", size=4, last=None):
    generator = torch.Generator().manual_seed(7)
    sizes = [size] * (count if last is None else count - 1) + ([] if last is None else [last])
    return [
        (
            torch.randn(n, 3, 8, 8, generator=generator).to(device),
            torch.randint(CLASSES, (n,), generator=generator).to(device),
        )
        for n in sizes
    ]


def plainly(model, optimizer, data, scaler=None, accumulation_steps=1, after=lambda: None):
    """The losses of a loop without graphs."""
    losses = []
    for i, (images, target) in enumerate(data):
        if i % accumulation_steps == 0:
            model.zero_grad()
        loss = F.cross_entropy(model(images), target)
        scaled = loss / accumulation_steps if accumulation_steps > 1 else loss
        (scaled if scaler is None else scaler.scale(scaled)).backward()
        if i % accumulation_steps == accumulation_steps - 1:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            after()
        losses.append(loss.detach())
    return losses


def everything(model, optimizer, scaler=None):
    """Copies of all that training has come to, by name."""
    found = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        found |= {f"state.{i}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    if scaler is not None:
        found |= {f"scaler.{name}": torch.as_tensor(value) for name, value in scaler.state_dict().items()}
    found["random numbers"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        found["random numbers of the GPU"] = torch.cuda.get_rng_state(device)
    return {name: t.detach().clone() for name, t in found.items()}


def assert_equal(found, expected):
    """Bit for bit; NaN, of a step that was skipped for it, is equal to itself."""
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0, equal_nan=True)


def twins(make_optimizer, device="cpu"):
    """Twice the same model, with an optimizer each."""
    model = network(device)
    other = copy.deepcopy(model)
    return (model, make_optimizer(model.parameters())), (other, make_optimizer(other.parameters()))
