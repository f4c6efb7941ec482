"""What changes between the steps of one optimizer, and gradients that do not fit their parameters."""

import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast.optim import step_in_backward
from tests.optim.cases import OPTIONS, by_name, engines


def parameter(size=3, dtype=torch.float32, grad=1.0):
    p = nn.Parameter(torch.ones(size, dtype=dtype))
    p.grad = None if grad is None else torch.full_like(p, grad)
    return p


@by_name
@engines
def test_a_step_without_gradients_is_followed_by_others(name, fused):
    p, q = parameter(grad=None), parameter()
    opt = getattr(dlfast.optim, name)([p], **OPTIONS[name], fused=fused)
    other = getattr(dlfast.optim, name)([q], **OPTIONS[name], fused=fused)
    opt.step()
    assert torch.equal(p, torch.ones(3))
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
        other.step()
        opt.zero_grad()
        opt.step()
    assert torch.equal(p, q)
    assert not torch.equal(p, torch.ones(3))


@engines
def test_a_step_in_backward_without_gradient_is_followed_by_others(fused):
    p = parameter(grad=None)
    opt = dlfast.optim.SGD([p], lr=1.0, fused=fused)
    opt._step(p)  # as by a hook of the user's before ours that takes the gradient away
    with step_in_backward(opt):
        p.sum().backward()
    assert torch.equal(p, torch.zeros(3))


@engines
def test_rebound_parameters(fused):
    """As accelerate does: ``group["params"]`` is another list."""
    old, new = parameter(), parameter()
    opt = dlfast.optim.SGD([old], lr=1.0, fused=fused)
    opt.step()
    opt.param_groups[0]["params"] = [new]
    opt.step()
    assert torch.equal(old, torch.zeros(3))
    assert torch.equal(new, torch.zeros(3))


@engines
@pytest.mark.parametrize("in_backward", [False, True])
def test_reordered_groups(fused, in_backward):
    p, q = parameter(), parameter()
    opt = dlfast.optim.SGD([{"params": [p], "lr": 1.0}, {"params": [q], "lr": 0.25}], fused=fused)

    def step():
        if not in_backward:
            return opt.step()
        p.grad = q.grad = None
        with step_in_backward(opt):
            (p.sum() + q.sum()).backward()

    step()
    opt.param_groups.reverse()
    step()
    assert torch.equal(p, torch.full((3,), -1.0))
    assert torch.equal(q, torch.full((3,), 0.5))


@by_name
@engines
def test_gradients_of_another_dtype_step_in_plain_pytorch(name, fused):
    """``p.grad_dtype`` allows them. The gradient here is none of bfloat16."""
    p, q = parameter(300, torch.bfloat16, None), parameter(300, torch.float32, 1.0)
    grad = torch.linspace(-1, 1, 300) + 2**-12
    p.grad_dtype = torch.float32
    opt = getattr(dlfast.optim, name)([p, q], **OPTIONS[name], fused=fused, max_grad_norm=2.0)
    expected = [nn.Parameter(torch.ones(300)), parameter(300)]
    other = getattr(dlfast.optim, name)(
        expected, **OPTIONS[name], fused=False, max_grad_norm=2.0, state_dtype=torch.float32
    )
    for _ in range(2):
        p.grad, expected[0].grad = grad.clone(), grad.clone()
        opt.step()
        other.step()
    torch.testing.assert_close(opt.grad_norm, other.grad_norm)
    torch.testing.assert_close(q, expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p.float(), expected[0], rtol=2 * 2**-8, atol=0.01)
    p.grad = None
    p.grad_dtype = torch.bfloat16
    p.grad = grad.bfloat16()
    before = p.detach().clone()
    opt.step()
    assert not torch.equal(p, before)


def unfit():
    def shape(p):
        p.data = torch.ones(4)

    def of_complex_numbers(p):
        p.grad = None
        p.grad_dtype = torch.complex64
        p.grad = torch.ones(3, dtype=torch.complex64)

    return [
        (shape, r"gradient of parameter 'bad' has shape \(3,\).*must have shape \(4,\)"),
        (of_complex_numbers, "gradient of parameter 'bad' has dtype torch.complex64"),
    ]


@engines
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later"])
@pytest.mark.parametrize(("change", "message"), unfit(), ids=lambda c: getattr(c, "__name__", ""))
def test_gradients_that_do_not_fit_are_refused_before_anything_changes(change, message, first, fused):
    good, bad = parameter(), parameter()
    groups = [{"params": [("good", good)]}, {"params": [("bad", bad)], "fused": fused}]
    opt = dlfast.optim.SGD(groups, lr=1.0, momentum=0.9)
    if not first:
        opt.step()
    before = good.detach().clone()
    change(bad)
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert torch.equal(good, before)
    assert bool(opt.state) is not first


def test_states_on_another_device_are_refused_before_anything_changes():
    good, bad = parameter(), nn.Parameter(torch.ones(3, device="meta"))
    bad.grad = torch.ones_like(bad)
    opt = dlfast.optim.SGD([("good", good), ("bad", bad)], lr=1.0, momentum=0.9)
    opt.state[bad]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"momentum_buffer of parameter 'bad' .* is on cpu; it must .*on meta"):
        opt.step()
    assert torch.equal(good, torch.ones(3))


@engines
def test_what_the_user_writes_beside_a_master(fused):
    """bfloat16 keeps it, to half a unit; float16 has to be told."""
    for dtype, told, expected in (
        (torch.bfloat16, False, 7.0),
        (torch.float16, False, -1.0),
        (torch.float16, True, 7.0),
    ):
        p = parameter(dtype=dtype)
        opt = dlfast.optim.SGD([p], lr=1.0, master_weights=True, fused=fused)
        opt.step()
        with torch.no_grad():
            p.fill_(8.0)
        if told:
            del opt.state[p]["master_param"]
        opt.step()
        assert torch.equal(p.detach().float(), torch.full((3,), expected))
