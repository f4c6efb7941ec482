"""What a graph cannot hold is refused by name, with its line, and leaves no trace."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import dlfast
from tests.graphed.cases import assert_equal, batches, everything, network
from tests.support.native import CUDA_KERNELS

pytestmark = [*CUDA_KERNELS, pytest.mark.usefixtures("graphs")]
HERE = Path(__file__)


def line_of(mark):
    """The number of the line that ends in the comment `mark`."""
    return next(i for i, line in enumerate(HERE.read_text().splitlines(), 1) if line.endswith(f"# {mark}"))


class Layer(nn.Module):
    """One that a graph can hold unless `what` asks for something else."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.register_buffer("seen", torch.zeros((), device="cuda"))
        self.scale = torch.tensor(2.0)

    def forward(self, x):
        if self.what == "item" and x.sum().item() > 1e9:  # item
            return x * 2
        if self.what == "branch" and x.sum() > 1e9:  # branch
            return x * 2
        if self.what == "cpu":
            return x * x.mean().cpu().to(x.device)  # cpu
        if self.what == "mask":
            return x + x[x > 0].sum()  # mask
        if self.what == "nonzero":
            return x + (x > 0).nonzero().sum()  # nonzero
        if self.what == "number on the cpu":
            return x * self.scale  # number on the cpu
        if self.what == "random on the cpu":
            return x * torch.rand(())  # random on the cpu
        if self.what == "only under capture" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not permitted")  # only under capture
        if self.what == "synchronize":
            torch.cuda.synchronize()  # synchronize
        if self.what == "buffer":
            self.seen = self.seen + 1
        return x


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()  # in backward


class Waits(nn.Module):
    def forward(self, x):
        return Backward.apply(x)


def refused(model, loss_fn=F.cross_entropy, make=dlfast.optim.Adam, scaler=None, **options):
    """The message, after a look at everything."""
    optimizer = make(model.parameters(), **options)
    torch.manual_seed(5)
    before, states = everything(model, optimizer, scaler), dict(optimizer.state)
    with pytest.raises(RuntimeError) as error:
        dlfast.graphed_step(model, loss_fn, optimizer, batches(1, "cuda")[0], scaler=scaler)
    assert_equal(everything(model, optimizer, scaler), before)
    assert optimizer.state == states
    return str(error.value)


@pytest.mark.parametrize("what", ["item", "branch", "cpu", "mask", "nonzero", "number on the cpu", "random on the cpu"])
def test_a_line_of_the_model(what):
    said = refused(nn.Sequential(Layer(what), network("cuda")))
    assert f"{HERE}, line {line_of(what)}, in forward, " in said
    assert ("on the CPU" if "cpu" in what else "waits for the device") in said


@pytest.mark.parametrize("what", ["only under capture", pytest.param("synchronize", marks=pytest.mark.gpu_only)])
def test_a_line_that_fails_under_capture(what):
    """Which no step before it shows."""
    said = refused(nn.Sequential(Layer(what), network("cuda")))
    assert f"{HERE}, line {line_of(what)}, in forward, fails: " in said


def test_a_line_of_the_loss():
    def loss_fn(output, target):
        loss = F.cross_entropy(output, target)
        print(float(loss.detach()))  # in the loss
        return loss

    said = refused(network("cuda"), loss_fn)
    assert f"{HERE}, line {line_of('in the loss')}, in the loss, waits for the device" in said
    assert "print(float(loss.detach()))" in said


def test_a_line_of_backward():
    said = refused(nn.Sequential(network("cuda"), Waits()))
    assert f"{HERE}, line {line_of('in backward')}, in backward, waits for the device" in said


def test_a_replaced_buffer():
    model = nn.Sequential(Layer("buffer"), network("cuda"))
    seen = model[0].seen
    assert re.search("another tensor in the place of '0.seen'.* in place", refused(model))
    assert model[0].seen is seen


def test_with_accumulated_state():
    """Also where there is something to lose."""
    model = nn.Sequential(Layer("item"), network("cuda"))
    optimizer = dlfast.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, dampening=0.5, ema_decay=0.5, fused=True)
    scaler = torch.amp.GradScaler("cuda", growth_interval=2)
    images, target = batches(1, "cuda")[0]
    scaler.scale(F.cross_entropy(model(images), target)).backward()
    scaler.step(optimizer)
    scaler.update()
    before = everything(model, optimizer, scaler)
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="waits for the device"):
        dlfast.graphed_step(model, F.cross_entropy, optimizer, (images, target), scaler=scaler)
    assert_equal(everything(model, optimizer, scaler), before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def test_an_error_between_the_steps_of_a_scaler():
    """It then goes on as if it had not been asked."""
    model = network("cuda")
    optimizer = dlfast.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    images, target = batches(1, "cuda")[0]

    def hook(*args):
        raise RuntimeError("of the hook")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "step", hook)
        with pytest.raises(RuntimeError, match="of the hook"):
            dlfast.graphed_step(model, F.cross_entropy, optimizer, (images, target), scaler=scaler)
    assert vars(optimizer).keys().isdisjoint(("grad_scale", "found_inf"))
    copy.deepcopy(scaler)  # which it refuses between its step and update


def test_an_error_of_the_model_is_its_own():
    model = nn.Sequential(network("cuda"), nn.Linear(3, 3, device="cuda"))
    assert "cannot be captured" not in refused(model)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (torch.optim.Adam, {}, "torch.optim.Adam has capturable=False.* pass capturable=True"),
        (torch.optim.Adagrad, {}, "Adagrad has no option capturable=True"),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "dampening": 0.5}, "take one step before graphed_step"),
        (dlfast.optim.Adam, {"fused": False}, "Adam has fused=False.* leave it out"),
    ],
)
def test_optimizers(make, options, said):
    assert re.search(said, refused(network("cuda"), make=make, **options))


@pytest.mark.parametrize("make", [dlfast.optim.SGD, torch.optim.SGD])
def test_an_optimizer_that_leaves_unscaling_to_the_scaler(make):
    said = refused(network("cuda"), make=make, scaler=torch.amp.GradScaler("cuda"), lr=0.1)
    assert re.search("GradScaler waits .* SGD: construct the optimizer with fused=True", said)


@pytest.mark.parametrize("of_all", [False, True])
def test_step_hooks(of_all):
    model = network("cuda")
    optimizer = dlfast.optim.Adam(model.parameters())
    register = register_optimizer_step_post_hook if of_all else optimizer.register_step_post_hook
    handle = register(lambda *args: None)
    try:
        with pytest.raises(RuntimeError, match="Adam has step hooks"):
            dlfast.graphed_step(model, F.cross_entropy, optimizer, batches(1, "cuda")[0])
    finally:
        handle.remove()


def test_a_parameter_and_a_buffer_on_the_cpu():
    model = network("cuda")
    model[-1].cpu()
    assert "parameter '6.weight' is on cpu" in refused(model)
    weight = torch.ones(5)
    assert "buffer 'loss_fn.weight' is on cpu" in refused(network("cuda"), nn.CrossEntropyLoss(weight))


class Subclass(torch.Tensor):
    pass


def test_models_whose_tensors_are_elsewhere():
    model = nn.Linear(4, 5, device="cuda")
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Subclass))
    assert "parameter 'weight' is a Subclass" in refused(model, make=torch.optim.SGD, lr=0.1)
    ddp = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(ddp)  # the rest needs processes
    ddp.module = network("cuda")
    assert "model is a DistributedDataParallel" in refused(ddp)


def test_gradients_that_are_freed():
    model = network("cuda")
    optimizer = dlfast.optim.SGD(model.parameters(), lr=0.1)
    before = everything(model, optimizer)
    with (
        dlfast.optim.step_in_backward(optimizer),
        pytest.raises(RuntimeError, match="no parameter of SGD has a gradient after backward"),
    ):
        dlfast.graphed_step(model, F.cross_entropy, optimizer, batches(1, "cuda")[0])
    assert_equal(everything(model, optimizer), before)


def test_a_step_in_plain_pytorch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, device="cuda", dtype=torch.bfloat16))
    model[1].weight.grad_dtype = torch.float32
    optimizer = dlfast.optim.SGD(model.parameters(), lr=0.1)
    images, target = batches(1, "cuda")[0]
    with pytest.raises(RuntimeError, match="the step of SGD runs in plain PyTorch here"):
        dlfast.graphed_step(model, F.cross_entropy, optimizer, (images.bfloat16(), target))


def test_a_fixed_scale_on_the_cpu():
    model = network("cuda")
    optimizer = dlfast.optim.Adam(model.parameters())
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match=r"optimizer.grad_scale is on cpu"):
        dlfast.graphed_step(model, F.cross_entropy, optimizer, batches(1, "cuda")[0])
