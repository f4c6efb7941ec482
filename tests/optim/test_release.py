"""Updating parameters during backward."""

import weakref

import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast.optim import step_in_backward
from tests.optim.cases import NAMES, OPTIONS


def network():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(50, 50) for _ in range(6)])


@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_as_a_step_after_backward(name, fused):
    extra = {"max_grad_value": 0.01, "ema_decay": 0.9}
    models = network(), network()
    optimizers = [getattr(dlfast.optim, name)(m.parameters(), **OPTIONS[name], **extra, fused=fused) for m in models]
    handle = step_in_backward(optimizers[0])
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 50, generator=generator)
        for model, opt in zip(models, optimizers, strict=True):
            opt.zero_grad()
            model(x).square().mean().backward()
        assert all(p.grad is None for p in models[0].parameters())
        for opt in optimizers:
            opt.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizers[0].state[a]["ema"], optimizers[1].state[b]["ema"])
    handle.remove()
    models[0](x).sum().backward()
    assert all(p.grad is not None for p in models[0].parameters())


@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
def test_at_most_one_layer_of_gradients_is_held(fused):
    """The gradients that are alive at once, by anyone: seen by a hook before each update."""
    model = network()
    opt = dlfast.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    gradients, held = [], []

    def look(p):
        gradients.append(weakref.ref(p.grad))
        held.append(sum(g().numel() for g in gradients if g() is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    with step_in_backward(opt):
        for _ in range(2):
            model(torch.ones(2, 50)).sum().backward()
    assert max(held) <= 50 * 50 + 50
    model(torch.ones(2, 50)).sum().backward()
    assert max(held) == 6 * (50 * 50 + 50)
    opt.step()
    opt.zero_grad()
    assert all(g() is None for g in gradients)


def test_what_needs_all_gradients_is_refused_by_name():
    model = network()
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        step_in_backward(dlfast.optim.SGD(model.parameters(), max_grad_norm=1.0))
    with pytest.raises(TypeError, match=r"one of dlfast\.optim"):
        step_in_backward(torch.optim.SGD(model.parameters()))
    opt = dlfast.optim.SGD(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with step_in_backward(opt):
        opt.grad_scale = torch.tensor(2.0)
        with pytest.raises(RuntimeError, match="grad_scale"):
            model(torch.ones(2, 50)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
