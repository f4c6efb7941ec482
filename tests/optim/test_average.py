"""The moving average of the weights: whose, when, and swapped in."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dlfast.optim
from dlfast.optim import step_in_backward
from tests.optim.cases import OPTIONS, by_name, engines, set_grads

DECAY = 0.75


@by_name
@engines
def test_averages_of_parameters_without_gradient_go_on_as_averagedmodel(name, fused):
    """A parameter has no gradient in some steps; the first step starts all averages."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 70))
    opt = getattr(dlfast.optim, name)(model.parameters(), **OPTIONS[name], ema_decay=DECAY, fused=fused)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    theirs.update_parameters(model)  # the first call copies
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        set_grads(generator, params)
        if step in (3, 4, 5):
            params[0].grad = params[3].grad = None
        before = params[0].detach().clone()
        opt.step()
        theirs.update_parameters(model)
        assert torch.equal(params[0], before) is (step in (3, 4, 5))
        for p, average in zip(params, theirs.module.parameters(), strict=True):
            torch.testing.assert_close(opt.state[p]["ema"], average.detach(), rtol=1e-5, atol=1e-6)


@engines
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_averages_of_masters_go_on(dtype, fused):
    """The average is that of the float32 numbers, of which the parameter is the rounded value."""
    busy, idle = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=dtype))
    opt = dlfast.optim.SGD([busy, idle], lr=1.0, master_weights=True, ema_decay=0.5, fused=fused)
    busy.grad, idle.grad = torch.ones(4), torch.full((4,), -(2.0**-13), dtype=dtype)
    opt.step()
    idle.grad = None
    assert torch.equal(idle, torch.ones(4, dtype=dtype))
    for steps in (2, 3, 4):
        opt.step()
        expected = 1 + 2**-13 * (1 - 2**-steps)
        torch.testing.assert_close(opt.state[idle]["ema"], torch.full((4,), expected), rtol=0, atol=2e-7)


@engines
@pytest.mark.parametrize("how", ["found_inf", "itself"])
def test_averages_stand_still_where_there_is_no_step(how, fused):
    busy, idle = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = dlfast.optim.SGD([busy, idle], lr=1.0, ema_decay=0.5, fused=fused)
    for p in (busy, idle):
        p.grad = torch.ones(4)
    opt.step()
    idle.grad = None
    average = opt.state[idle]["ema"].clone()
    opt.grad_scale = torch.tensor(1.0)
    if how == "found_inf":
        opt.found_inf = torch.tensor(1.0)
    else:
        busy.grad[1] = torch.inf
    opt.step()
    assert opt.step_was_skipped
    assert torch.equal(opt.state[idle]["ema"], average)
    del opt.grad_scale
    opt.found_inf = None
    busy.grad = None
    opt.step()  # no gradients: nothing to do
    assert torch.equal(opt.state[idle]["ema"], average)
    busy.grad = torch.ones(4)
    opt.step()
    assert not torch.equal(opt.state[idle]["ema"], average)


def test_updates_in_backward_move_the_average_of_their_own_parameter():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = dlfast.optim.SGD([first, second], lr=1.0, ema_decay=0.5)
    with step_in_backward(opt):
        (first.sum() + second.sum()).backward()
        average = opt.state[second]["ema"].clone()
        first.sum().backward()
        opt.step()
    assert torch.equal(opt.state[second]["ema"], average)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
def test_swapped_ema_leaves_the_grad_mode_as_it_is(mode):
    p = nn.Parameter(torch.ones(3))
    opt = dlfast.optim.SGD([p], lr=1.0, ema_decay=0.5)
    p.grad = torch.ones(3)
    opt.step()
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with context():
        expected = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with opt.swapped_ema():
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == expected
            assert torch.equal(p.detach(), torch.full((3,), 0.5))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == expected
    assert torch.equal(p.detach(), torch.zeros(3))
