"""Captured steps come to what the loop without graphs comes to, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dlfast
from tests.graphed.cases import assert_equal, batches, everything, network, plainly, twins
from tests.optim.cases import NAMES, OPTIONS
from tests.support.native import CUDA_KERNELS

pytestmark = [*CUDA_KERNELS, pytest.mark.usefixtures("graphs")]

TORCH = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "capturable": True},
    "AdamW": {"lr": 0.01, "capturable": True, "amsgrad": True},
    "RMSprop": {"lr": 0.01, "capturable": True, "momentum": 0.5, "centered": True},
    "Adamax": {"lr": 0.01, "capturable": True},
    "NAdam": {"lr": 0.01, "capturable": True},
    "RAdam": {"lr": 0.01, "capturable": True},
    "Adadelta": {"lr": 0.1, "capturable": True},
}


def sgd(params, **options):
    return dlfast.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, "dampening": 0.5} | options)


def same_as_the_loop(make, data, make_scaler=lambda: None, accumulation_steps=1):
    """Both, one after the other, from the same random numbers; the model and optimizer that had the graph."""
    (model, optimizer), (other, other_optimizer) = twins(make, "cuda")
    scaler, other_scaler = make_scaler(), make_scaler()
    torch.manual_seed(5)
    step = dlfast.graphed_step(
        model, F.cross_entropy, optimizer, data[0], scaler=scaler, accumulation_steps=accumulation_steps
    )
    assert step.is_graphed
    losses = [step(*batch) for batch in data]
    found = everything(model, optimizer, scaler)
    torch.manual_seed(5)
    expected = plainly(other, other_optimizer, data, other_scaler, accumulation_steps)
    assert_equal(found, everything(other, other_optimizer, other_scaler))
    assert all(map(torch.equal, losses, expected))
    return model, optimizer, other_optimizer


@pytest.mark.parametrize("name", NAMES)
def test_own_optimizers(name):
    same_as_the_loop(lambda params: getattr(dlfast.optim, name)(params, **OPTIONS[name]), batches(4, "cuda"))


@pytest.mark.parametrize("name", TORCH)
def test_optimizers_of_torch(name):
    same_as_the_loop(lambda params: getattr(torch.optim, name)(params, **TORCH[name]), batches(4, "cuda"))


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1},
        {"max_grad_value": 0.01, "ema_decay": 0.5},
        {"state_dtype": torch.bfloat16},
        {"state_dtype": "int8", "zero_grad_after_step": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_own_optimizers(options):
    def make(params):
        torch.manual_seed(1)  # of random rounding
        return dlfast.optim.AdamW(params, lr=0.01, **options)

    _, optimizer, other = same_as_the_loop(make, batches(4, "cuda"))
    assert (optimizer.grad_norm is None) is (other.grad_norm is None)
    if other.grad_norm is not None:
        assert torch.equal(optimizer.grad_norm, other.grad_norm)


@pytest.mark.parametrize("accumulation_steps", [2, 3])
def test_accumulation(accumulation_steps):
    same_as_the_loop(sgd, batches(2 * accumulation_steps, "cuda"), accumulation_steps=accumulation_steps)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_accumulation_over_a_batch_of_another_shape(position):
    data = batches(6, "cuda")
    data[3 + position] = tuple(t[:3] for t in data[3 + position])
    with pytest.warns(dlfast.NotGraphedWarning):
        same_as_the_loop(sgd, data, accumulation_steps=3)


def growing():
    return torch.amp.GradScaler("cuda", init_scale=2.0**4, growth_interval=2)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: sgd(params, fused=True),
        lambda params: sgd(params, max_grad_norm=0.1),
        lambda params: torch.optim.Adam(params, capturable=True, fused=True),
    ],
    ids=["fused", "clipping", "torch"],
)
def test_grad_scaler(make, accumulation_steps):
    same_as_the_loop(make, batches(6, "cuda"), growing, accumulation_steps)


def test_a_grad_scaler_that_is_switched_off():
    same_as_the_loop(sgd, batches(2, "cuda"), lambda: torch.amp.GradScaler("cuda", enabled=False))


def test_grad_scaler_skips_and_backs_off():
    """At the first step scaled gradients are infinite, at those after it they are not."""

    def huge():
        return torch.amp.GradScaler("cuda", init_scale=3e38, backoff_factor=2.0**-100)

    def make(params):
        params = list(params)
        params[-2].data.mul_(100)
        return sgd(params, ema_decay=0.5, fused=True)

    for count in (1, 3):
        made = same_as_the_loop(make, batches(count, "cuda"), huge)
        assert [optimizer.step_was_skipped for optimizer in made[1:]] == [count == 1] * 2


@pytest.mark.parametrize("made_before", [True, False])
def test_a_schedule_writes_to_the_learning_rate(made_before):
    data = batches(4, "cuda")
    (model, optimizer), (other, other_optimizer) = twins(
        lambda params: dlfast.optim.Adam(params, lr=torch.tensor(0.1, device="cuda")), "cuda"
    )
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, other_optimizer)[not made_before :]
    ]
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0])
    if not made_before:
        schedules.insert(0, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        for batch in data:
            step(*batch)
            schedules[0].step()
    found = everything(model, optimizer)
    torch.manual_seed(5)
    plainly(other, other_optimizer, data, after=schedules[1].step)
    assert_equal(found, everything(other, other_optimizer))


def test_autocast():
    data = batches(3, "cuda")
    (model, optimizer), (other, other_optimizer) = twins(sgd, "cuda")
    torch.manual_seed(5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0])
        losses = [step(*batch) for batch in data]
    assert step.output.dtype is torch.bfloat16
    torch.manual_seed(5)
    for (images, target), loss in zip(data, losses, strict=True):
        other_optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            expected = F.cross_entropy(other(images), target)
        expected.backward()
        other_optimizer.step()
        assert torch.equal(loss, expected)
    assert_equal(model.state_dict(), other.state_dict())


def test_fused_models():
    data = batches(3, "cuda")

    def plain_network():
        torch.manual_seed(3)
        # Without a bias: its gradient is roundings alone, and the stand-in for a graph, which watches the dispatcher,
        # has the convolution and the normalisation each by itself.
        layers = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5)).cuda()

    models = [dlfast.fuse(plain_network(), inplace=True) for _ in range(2)]
    optimizers = [sgd(model.parameters()) for model in models]
    step = dlfast.graphed_step(models[0], F.cross_entropy, optimizers[0], data[0])
    for batch in data:
        step(*batch)
    plainly(models[1], optimizers[1], data)
    assert_equal(models[0].state_dict(), models[1].state_dict())
    for model in models:
        model.eval()
    with torch.no_grad():
        assert torch.equal(models[0](data[0][0]), models[1](data[0][0]))


def test_making_it_changes_nothing():
    model = network("cuda")
    optimizer = sgd(model.parameters(), ema_decay=0.5, max_grad_norm=0.1)
    scaler = growing()
    data = batches(3, "cuda")
    plainly(model, optimizer, data, scaler)
    before = everything(model, optimizer, scaler)
    norm, grads = optimizer.grad_norm, [p.grad for p in model.parameters()]
    dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0], scaler=scaler)
    assert_equal(everything(model, optimizer, scaler), before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert optimizer.grad_norm is norm
    assert optimizer.step_was_skipped is False


@pytest.mark.parametrize("count", [1, 4])
def test_warm_up_steps_and_pool(monkeypatch, count):
    pools = []
    capture = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **o: (pools.append(o["pool"]), capture(graph, **o))[1])
    pool = torch.cuda.graph_pool_handle()
    model = network("cuda")
    forwards = []
    model.register_forward_pre_hook(lambda *args: forwards.append(None))
    data = batches(1, "cuda")[0]
    step = dlfast.graphed_step(model, F.cross_entropy, sgd(model.parameters()), data, num_warmup_iters=count, pool=pool)
    assert len(forwards) == count + 3  # one makes the states, one looks for hindrances, one is captured
    assert pools == [pool]
    step(*data)
    assert len(forwards) == count + 3


def test_losses_are_tensors_of_their_own():
    model = network("cuda")
    data = batches(2, "cuda")
    step = dlfast.graphed_step(model, F.cross_entropy, sgd(model.parameters()), data[0])
    first = step(*data[0])
    kept = first.clone()
    step(*data[1])
    assert torch.equal(first, kept)
    assert not first.requires_grad


def test_another_shape_runs_without_the_graph_and_says_so_once():
    data = batches(3, "cuda", last=2)
    model = network("cuda")
    step = dlfast.graphed_step(model, F.cross_entropy, sgd(model.parameters()), data[0])
    with pytest.warns(
        dlfast.NotGraphedWarning, match=r"captured for inputs of \(4, 3, 8, 8\), \(4,\) .* \(2, 3, 8, 8\)"
    ):
        step(*data[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*data[2])
    with pytest.warns(dlfast.NotGraphedWarning):
        same_as_the_loop(sgd, data)


def test_inputs_from_the_cpu():
    data = [tuple(t.pin_memory() for t in batch) for batch in batches(3, last=2)]
    (model, optimizer), (other, other_optimizer) = twins(sgd, "cuda")
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0])
    torch.manual_seed(5)
    step(*data[0])
    step(*data[1])
    with pytest.warns(dlfast.NotGraphedWarning):
        step(*data[2])
    found = everything(model, optimizer)
    torch.manual_seed(5)
    plainly(other, other_optimizer, [tuple(t.cuda() for t in batch) for batch in data])
    assert_equal(found, everything(other, other_optimizer))


def test_gradients_that_somebody_clears_are_there_again():
    model = network("cuda")
    data = batches(2, "cuda")
    optimizer = sgd(model.parameters())
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0])
    step(*data[0])
    grads = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    step(*data[1])
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def test_versions_count():
    """Autograd and folded weights go by them."""
    model = network("cuda")
    data = batches(1, "cuda")
    step = dlfast.graphed_step(model, F.cross_entropy, sgd(model.parameters()), data[0])
    tensors = [*model.parameters(), *model.buffers()]
    before = [t._version for t in tensors]
    step(*data[0])
    assert all(t._version > version for t, version in zip(tensors, before, strict=True))
