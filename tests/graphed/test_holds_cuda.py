"""What changes after the capture is noticed: captured anew, or refused by name, never replayed as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dlfast
from dlfast.graphed.capture import Captured
from tests.graphed.cases import assert_equal, batches, everything, network, plainly, twins
from tests.support.native import CUDA_KERNELS

pytestmark = [*CUDA_KERNELS, pytest.mark.usefixtures("graphs")]


@pytest.fixture
def captures(monkeypatch):
    """How many there have been."""
    count = []
    original = Captured.__init__

    def init(self, *args):
        count.append(None)
        original(self, *args)

    monkeypatch.setattr(Captured, "__init__", init)
    return count


def adam(params):
    return dlfast.optim.Adam(params, lr=torch.tensor(0.05, device="cuda"))


def replaced_parameter(model, optimizer):
    old = optimizer.param_groups[0]["params"].pop()
    del optimizer.state[old]
    model[-1].bias = nn.Parameter(torch.ones_like(model[-1].bias))
    optimizer.add_param_group({"params": [model[-1].bias]})


def moved_data(model, optimizer):
    model[-1].weight.data = model[-1].weight.data * 2


def assigned_state(model, optimizer):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"][:] = model.parameters()
    optimizer.state.clear()


CHANGES = {
    "optimizer.load_state_dict": lambda model, optimizer: optimizer.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    ),
    "a parameter replaced": replaced_parameter,
    "param.data": moved_data,
    "model.load_state_dict, assign": assigned_state,
    "a buffer replaced": lambda model, optimizer: setattr(model[2], "running_mean", torch.ones(8, device="cuda")),
    "a layer replaced": lambda model, optimizer: model.__setitem__(4, nn.Identity()),
    "eval": lambda model, optimizer: model.eval(),
    "frozen": lambda model, optimizer: model[0].requires_grad_(False),
    "lr replaced": lambda model, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.5, device="cuda")),
    "clipping": lambda model, optimizer: setattr(optimizer, "max_grad_norm", 0.1),
    "maximize": lambda model, optimizer: optimizer.param_groups[0].update(maximize=True),
    "a fixed scale": lambda model, optimizer: setattr(optimizer, "grad_scale", torch.tensor(8.0, device="cuda")),
    "a hook": lambda model, optimizer: model[0].register_forward_hook(lambda module, args, output: output * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_is_captured_anew(name, captures):
    data = batches(3, "cuda")
    (model, optimizer), (other, other_optimizer) = twins(adam, "cuda")
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0])
    torch.manual_seed(5)
    step(*data[0])
    CHANGES[name](model, optimizer)
    for batch in data[1:]:
        step(*batch)
    assert len(captures) == 2
    found = everything(model, optimizer)
    torch.manual_seed(5)
    plainly(other, other_optimizer, data[:1])
    CHANGES[name](other, other_optimizer)
    plainly(other, other_optimizer, data[1:])
    assert_equal(found, everything(other, other_optimizer))


def test_a_checkpoint_may_bring_another_number(captures):
    model = network("cuda")
    optimizer = dlfast.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    data = batches(1, "cuda")[0]
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data)
    step(*data)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(saved)
    before = model[-1].weight.clone()
    step(*data)
    assert torch.equal(model[-1].weight, before)
    assert len(captures) == 2


def test_what_is_written_in_place_is_seen_by_the_same_graph(captures):
    data = batches(3, "cuda")
    (model, optimizer), (other, other_optimizer) = twins(adam, "cuda")
    saved = copy.deepcopy(model.state_dict())
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0])
    torch.manual_seed(5)
    step(*data[0])
    model.load_state_dict(saved)
    optimizer.param_groups[0]["lr"].fill_(0.2)
    model.eval()
    model.train()
    step(*data[1])
    found = everything(model, optimizer)
    assert len(captures) == 1
    torch.manual_seed(5)
    plainly(other, other_optimizer, data[:1])
    other.load_state_dict(saved)
    other_optimizer.param_groups[0]["lr"].fill_(0.2)
    plainly(other, other_optimizer, data[1:2])
    assert_equal(found, everything(other, other_optimizer))


def test_captured_anew_between_accumulated_batches(captures):
    data = batches(4, "cuda")
    (model, optimizer), (other, other_optimizer) = twins(adam, "cuda")
    torch.manual_seed(5)
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0], accumulation_steps=2)
    for i, batch in enumerate(data):
        if i == 3:
            moved_data(model, optimizer)
        step(*batch)
    assert len(captures) == 2
    found = everything(model, optimizer)
    torch.manual_seed(5)
    for i, (images, target) in enumerate(data):
        if i == 3:
            moved_data(other, other_optimizer)
        if i % 2 == 0:
            other_optimizer.zero_grad()
        (F.cross_entropy(other(images), target) / 2).backward()
        if i % 2 == 1:
            other_optimizer.step()
    assert_equal(found, everything(other, other_optimizer))


class Loose(nn.Module):
    """Holds tensors that are no buffers, one of which it writes to, and leaves one behind that it computes."""

    def __init__(self):
        super().__init__()
        self.factor = torch.tensor(2.0, device="cuda")
        self.calls = torch.zeros((), device="cuda")
        self.computed = None

    def forward(self, x):
        self.calls += 1
        self.computed = x * self.factor
        return self.computed + self.calls


def test_tensors_that_are_no_buffers(captures):
    data = batches(4, "cuda")
    models = [nn.Sequential(Loose(), network("cuda")) for _ in range(2)]
    optimizers = [adam(model.parameters()) for model in models]
    torch.manual_seed(5)
    step = dlfast.graphed_step(models[0], F.cross_entropy, optimizers[0], data[0])
    assert models[0][0].calls == 0
    step(*data[0])
    step(*data[1])
    assert len(captures) == 1
    models[0][0].factor = torch.tensor(3.0, device="cuda")
    step(*data[2])
    models[0][0].computed = None
    step(*data[3])
    assert len(captures) == 2
    assert models[0][0].calls == 4
    found = everything(models[0], optimizers[0])
    torch.manual_seed(5)
    plainly(models[1], optimizers[1], data[:2])
    models[1][0].factor = torch.tensor(3.0, device="cuda")
    plainly(models[1], optimizers[1], data[2:])
    assert_equal(found, everything(models[1], optimizers[1]))


def test_a_grad_scaler_that_is_set(captures):
    data = batches(4, "cuda")
    (model, optimizer), (other, other_optimizer) = twins(lambda p: dlfast.optim.SGD(p, lr=0.1, fused=True), "cuda")
    scaler, other_scaler = (torch.amp.GradScaler("cuda", init_scale=4.0, growth_interval=1) for _ in range(2))
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0], scaler=scaler)
    torch.manual_seed(5)
    step(*data[0])
    scaler.update(32.0)  # in place
    step(*data[1])
    assert len(captures) == 1
    scaler.set_growth_factor(8.0)
    step(*data[2])
    scaler.load_state_dict(scaler.state_dict())
    step(*data[3])
    assert len(captures) == 2
    found = everything(model, optimizer, scaler)
    torch.manual_seed(5)
    plainly(other, other_optimizer, data[:1], other_scaler)
    other_scaler.update(32.0)
    plainly(other, other_optimizer, data[1:2], other_scaler)
    other_scaler.set_growth_factor(8.0)
    plainly(other, other_optimizer, data[2:], other_scaler)
    assert_equal(found, everything(other, other_optimizer, other_scaler))


def test_autocast_that_is_switched_on(captures):
    data = batches(2, "cuda")
    model = network("cuda")
    step = dlfast.graphed_step(model, F.cross_entropy, adam(model.parameters()), data[0])
    step(*data[0])
    assert step.output.dtype is torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype=dtype):
            step(*data[1])
            step(*data[1])
        assert step.output.dtype is dtype
    assert len(captures) == 3


@pytest.mark.parametrize("make", [dlfast.optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_changed_number_is_refused_by_name(make, on_cpu):
    model = network("cuda")
    lr = torch.tensor(0.5) if on_cpu and make is dlfast.optim.SGD else 0.5
    optimizer = make(model.parameters(), lr=lr)
    data = batches(2, "cuda")
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0])
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(*data[0])  # "initial_lr" is none of the step's numbers
    if isinstance(lr, torch.Tensor):
        lr.fill_(0.25)
    else:
        optimizer.param_groups[0]["lr"] = 0.25
    before = everything(model, optimizer)
    said = r"lr of param_groups\[0\] was 0.5 .* is 0.25, .* torch.tensor\(0.5, device='cuda'\), as its lr"
    with pytest.raises(RuntimeError, match=said):
        step(*data[1])
    assert_equal(everything(model, optimizer), before)


@pytest.mark.gpu_only
def test_memory_of_a_graph_is_its_own():
    """What others allocate and free between two replays is none of it."""
    data = batches(4, "cuda")
    (model, optimizer), (other, other_optimizer) = twins(adam, "cuda")
    torch.manual_seed(5)
    step = dlfast.graphed_step(model, F.cross_entropy, optimizer, data[0], accumulation_steps=2)
    losses = []
    for batch in data:
        model.zero_grad() if len(losses) % 2 == 0 else None
        torch.cuda.empty_cache()
        litter = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
        losses.append(step(*batch))
        del litter
    found = everything(model, optimizer)
    torch.manual_seed(5)
    expected = plainly(other, other_optimizer, data, accumulation_steps=2)
    assert_equal(found, everything(other, other_optimizer))
    assert all(map(torch.equal, losses, expected))
