"""On the CPU: the same call, the same checks and the same numbers, without a graph."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dlfast
from tests.graphed.cases import assert_equal, batches, everything, network, plainly, twins


def sgd(params):
    return dlfast.optim.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.5)


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_is_the_loop(accumulation_steps, scaled):
    (model, optimizer), (other, other_optimizer) = twins(sgd)
    scaler, other_scaler = (torch.amp.GradScaler("cpu") if scaled else None for _ in range(2))
    data = batches(6, last=2)
    step = dlfast.graphed_step(
        model, F.cross_entropy, optimizer, data[0], scaler=scaler, accumulation_steps=accumulation_steps
    )
    assert not step.is_graphed
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost here by another shape
        losses = [step(*batch) for batch in data]
    found = everything(model, optimizer, scaler)
    torch.manual_seed(5)
    expected_losses = plainly(other, other_optimizer, data, other_scaler, accumulation_steps)
    assert_equal(found, everything(other, other_optimizer, other_scaler))
    assert all(map(torch.equal, losses, expected_losses))
    assert not losses[0].requires_grad


def test_making_it_changes_nothing():
    model = network()
    optimizer = sgd(model.parameters())
    before = everything(model, optimizer)
    dlfast.graphed_step(model, F.cross_entropy, optimizer, batches(1)[0])
    assert_equal(everything(model, optimizer), before)


def test_output_is_what_the_model_returned():
    model = network().eval()
    images, target = batches(1)[0]
    expected = model(images)
    step = dlfast.graphed_step(model, F.cross_entropy, dlfast.optim.SGD(model.parameters(), lr=0.1), (images, target))
    step(images, target)
    assert torch.equal(step.output, expected)
    assert not step.output.requires_grad


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0))

        def forward(self, a, b):
            return {"sum": self.weight * (a + b), "difference": a - b}

    model = Two()
    optimizer = dlfast.optim.SGD(model.parameters(), lr=0.5)
    inputs = (torch.ones(2), torch.ones(2), torch.zeros(2))
    step = dlfast.graphed_step(model, lambda output, target: (output["sum"] - target).sum(), optimizer, inputs)
    assert step(*inputs).item() == 12
    assert model.weight.item() == 1
    assert torch.equal(step.output["sum"], torch.full((2,), 6.0))


def test_autocast_is_on_in_forward_and_loss_alone():
    model = network()
    dtypes = []
    model[-1].weight.register_hook(lambda grad: dtypes.append(torch.is_autocast_enabled("cpu")))
    images, target = batches(1)[0]
    step = dlfast.graphed_step(model, F.cross_entropy, sgd(model.parameters()), (images, target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(images, target)
        first = step.output
        step(images, target)
    assert first.dtype is torch.bfloat16
    assert dtypes == [False, False]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda a: a | {"model": torch.relu}, TypeError, "model must be a torch.nn.Module, got builtin"),
        (lambda a: a | {"loss_fn": 3}, TypeError, "loss_fn must be callable, got int"),
        (lambda a: a | {"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer, got int"),
        (lambda a: a | {"scaler": 3}, TypeError, "scaler must be a torch.amp.GradScaler or None, got int"),
        (lambda a: a | {"example_inputs": [1]}, TypeError, "example_inputs must be a tuple of tensors, got list"),
        (lambda a: a | {"example_inputs": (torch.ones(1),)}, ValueError, r"inputs and a target, got 1 tensor"),
        (lambda a: a | {"example_inputs": (1, 2)}, TypeError, r"example_inputs\[0\] must be a tensor, got int"),
        (lambda a: a | {"accumulation_steps": 0}, ValueError, "accumulation_steps must be at least 1, got 0"),
        (lambda a: a | {"accumulation_steps": 1.5}, TypeError, "accumulation_steps must be an int, got float"),
        (lambda a: a | {"num_warmup_iters": 0}, ValueError, "num_warmup_iters must be at least 1, got 0"),
    ],
)
def test_arguments_are_refused_by_name(change, error, said):
    model = network()
    arguments = {
        "model": model,
        "loss_fn": F.cross_entropy,
        "optimizer": sgd(model.parameters()),
        "example_inputs": batches(1)[0],
    }
    with pytest.raises(error, match=said):
        dlfast.graphed_step(**change(arguments))


@pytest.mark.parametrize(
    ("inputs", "error", "said"),
    [
        (lambda x, y: (x,), TypeError, "step takes 2 tensors .* got 1"),
        (lambda x, y: (x, 3), TypeError, r"inputs\[1\] must be a tensor, got int"),
        (lambda x, y: (x.double(), y), RuntimeError, r"inputs\[0\] must be of torch.float32 .* got torch.float64"),
        (lambda x, y: (x.to("meta"), y), RuntimeError, r"inputs\[0\] must be on cpu, got meta"),
        (lambda x, y: (x.requires_grad_(), y), RuntimeError, r"inputs\[0\] requires a gradient"),
    ],
)
def test_inputs_of_a_call_are_refused_by_name(inputs, error, said):
    model = network()
    optimizer = sgd(model.parameters())
    batch = batches(1)[0]
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, batch)
    before = everything(model, optimizer)
    with pytest.raises(error, match=said):
        step(*inputs(*batch))
    assert_equal(everything(model, optimizer), before)
