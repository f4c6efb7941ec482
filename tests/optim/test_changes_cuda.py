"""On CUDA: numbers that only the device knows, averages without a gradient, and tensors that change devices."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import dlfast.optim
from tests.optim.cases import OPTIONS, assert_same, by_name, set_grads, tolerance
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS


def parameters(device="cuda", shapes=((37,), (5, 3), (4100,))):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def put_on_device(group):
    """Every number of a group as a tensor on the device."""
    for name in ("lr", "weight_decay", "momentum", "dampening", "alpha", "eps", "lr_decay"):
        if name in group:
            group[name] = torch.tensor(float(group[name]), dtype=torch.float64, device="cuda")
    if "betas" in group:
        group["betas"] = tuple(torch.tensor(b, dtype=torch.float64, device="cuda") for b in group["betas"])


@contextmanager
def without_waiting():
    """What waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


NESTEROV = {"lr": 0.1, "momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize(("name", "options"), [*OPTIONS.items(), ("SGD", NESTEROV)])
def test_numbers_on_the_device_are_not_waited_for(name, options):
    cpu, gpu = parameters("cpu"), parameters()
    other, opt = (getattr(dlfast.optim, name)(params, **options) for params in (cpu, gpu))
    put_on_device(opt.param_groups[0])
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        set_grads(generator, cpu, gpu)
        other.step()
        with without_waiting():
            opt.step()
    assert_same(gpu, cpu, tolerance(torch.float32, 3))


@pytest.mark.gpu_only
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_momentum_on_the_device_is_captured(name):
    cpu, gpu = parameters("cpu"), parameters()
    other, opt = (getattr(dlfast.optim, name)(params, lr=0.1, momentum=0.5) for params in (cpu, gpu))
    put_on_device(opt.param_groups[0])
    set_grads(torch.Generator().manual_seed(2), cpu, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for momentum in (0.9, 0.25):
        opt.param_groups[0]["momentum"].fill_(momentum)
        other.param_groups[0]["momentum"] = momentum
        graph.replay()
        other.step()
    assert_same(gpu, cpu, tolerance(torch.float32, 3))


@by_name
@pytest.mark.parametrize("how", ["found_inf", "itself"])
def test_averages_of_parameters_without_gradient(name, how):
    """They move, or stand still in a skipped step, and the host does not wait to know."""
    cpu, gpu = parameters("cpu"), parameters()
    other, opt = (getattr(dlfast.optim, name)(params, **OPTIONS[name], ema_decay=0.75) for params in (cpu, gpu))
    other.grad_scale, opt.grad_scale = torch.tensor(1.0), torch.tensor(1.0, device="cuda")
    generator = torch.Generator().manual_seed(2)
    for step in range(5):
        set_grads(generator, cpu, gpu)
        skipped = step == 3
        if how == "found_inf":
            other.found_inf, opt.found_inf = torch.tensor(float(skipped)), torch.tensor(float(skipped), device="cuda")
        elif skipped:
            cpu[0].grad[5] = gpu[0].grad[5] = torch.inf
        if step > 1:
            cpu[2].grad = gpu[2].grad = None
        before = opt.state[gpu[2]]["ema"].clone() if step else None
        other.step()
        with without_waiting():
            opt.step()
        if step:
            assert torch.equal(opt.state[gpu[2]]["ema"], before) is skipped
    assert_same([opt.state[p]["ema"] for p in gpu], [other.state[p]["ema"] for p in cpu], tolerance(torch.float32, 5))


@by_name
def test_moved_parameters_are_refused_by_name_before_anything_changes(name):
    """The second parameter goes to the device after a step; its states, or its gradient, stay where they were."""
    good, bad = parameters("cpu", [(5,), (7,)])
    opt = getattr(dlfast.optim, name)([("good", good), ("bad", bad)], **OPTIONS[name])
    generator = torch.Generator().manual_seed(2)
    set_grads(generator, [good, bad])
    opt.step()
    before = good.detach().clone()
    bad.data = bad.data.cuda()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'bad' .* is on cpu; it must .* be on cuda:0"):
        opt.step()
    set_grads(generator, [good, bad])
    with pytest.raises(RuntimeError, match=r" of parameter 'bad' has shape .* and is on cpu; it must .* on cuda:0"):
        opt.step()
    assert torch.equal(good, before)
    opt.load_state_dict(opt.state_dict())  # brings the states to their parameters
    opt.step()
    assert not torch.equal(good, before)


def test_a_state_dict_after_a_skipped_first_step_leaves_the_buffers():
    """A captured graph goes on writing them; in the state_dict they are not there yet."""
    (p,) = parameters(shapes=[(40,)])
    opt = dlfast.optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.25, ema_decay=0.5)
    p.grad = torch.ones_like(p)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0, device="cuda"), torch.tensor(1.0, device="cuda")
    opt.step()
    buffer = opt.state[p]["momentum_buffer"]
    assert opt.state_dict()["state"][0].keys() == {"ema"}
    assert opt.state[p]["momentum_buffer"] is buffer
    opt.found_inf.zero_()
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p, before - 1)  # undamped: the first step
    assert opt.state[p]["momentum_buffer"] is buffer
    assert torch.equal(opt.state_dict()["state"][0]["momentum_buffer"], torch.ones_like(p))


@pytest.mark.gpu_only
def test_first_step_under_capture_is_refused():
    p = nn.Parameter(torch.ones(5, device="cuda"))
    p.grad = torch.ones_like(p)
    opt = dlfast.optim.Adam([p])
    with pytest.raises(RuntimeError, match="take a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    assert torch.equal(p.detach().cpu(), torch.ones(5))
