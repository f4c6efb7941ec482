"""Training steps under torch.compile: the optimizer's step is one operator of the graph."""

import copy

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import nn

import dlfast.optim
from tests.optim.cases import OPTIONS, assert_same, by_name, set_grads


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 70), nn.ReLU(), nn.Linear(70, 3))


def twins(name, **extra):
    """The same model and optimizer twice: for a compiled and for an eager run."""
    models = [network() for _ in range(2)]
    return [(m, getattr(dlfast.optim, name)(m.parameters(), **OPTIONS[name], **extra)) for m in models]


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, generator=generator) for _ in range(count)]


def assert_same_states(mine, other):
    assert mine.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    for a, b in zip(mine.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(value, b[key])


@by_name
@pytest.mark.parametrize(
    "extra", [{}, {"max_grad_norm": 0.5, "ema_decay": 0.9, "zero_grad_after_step": True}], ids=["plain", "tail"]
)
def test_the_step_does_not_break_the_graph_nor_do_changed_options_recompile(name, extra):
    (mine, opt), (other, other_opt) = twins(name, **extra)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda: opt.step(), backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(2)
    for i in range(6):
        set_grads(generator, list(mine.parameters()), list(other.parameters()))
        for o in (opt, other_opt):
            o.param_groups[0]["lr"] = 0.1 / (i + 1)
        step()
        other_opt.step()
        if extra:
            assert not any(p.grad.any() for p in mine.parameters())
            torch.testing.assert_close(opt.grad_norm, other_opt.grad_norm)
    # Once without and once with the states, which the first step makes.
    assert counter.frame_count <= 2
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert_same_states(opt, other_opt)


def training_step(model, opt, x):
    loss = model(x).square().mean()
    loss.backward()
    opt.step()
    opt.zero_grad(set_to_none=True)
    return loss.detach()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
def test_a_compiled_training_step(name):
    """Forward, backward and step in one function: what breaks the graph is PyTorch's own backward() and
    zero_grad(), not the step."""
    (mine, opt), (other, other_opt) = twins(name)
    compiled = torch.compile(lambda x: training_step(mine, opt, x), backend="aot_eager")
    for x in batches():
        torch.testing.assert_close(compiled(x), training_step(other, other_opt, x))
    assert_same(list(mine.parameters()), list(other.parameters()), 1e-5)
    assert_same_states(opt, other_opt)
    explained = torch._dynamo.explain(lambda: training_step(mine, opt, batches(1)[0]))()
    reasons = [str(reason.reason) for reason in explained.break_reasons]
    assert reasons
    assert all("backward" in reason or "zero_grad" in reason for reason in reasons)


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch cannot trace backward()")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
def test_a_training_step_in_one_graph(name):
    (mine, opt), (other, other_opt) = twins(name, max_grad_norm=0.5, zero_grad_after_step=True)

    def step(model, opt, x):
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        return loss.detach()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(lambda x: step(mine, opt, x), backend="aot_eager", fullgraph=True)
        for x in batches():
            for p in mine.parameters():
                p.grad = None
            torch.testing.assert_close(compiled(x), step(other, other_opt, x))
    assert_same(list(mine.parameters()), list(other.parameters()), 1e-5)
    assert_same_states(opt, other_opt)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_values_from_before_and_after_the_step_in_one_graph(backend):
    (mine, opt), (other, other_opt) = twins("Adam", ema_decay=0.5)
    generator = torch.Generator().manual_seed(2)

    def step(model, opt):
        weight = model[0].weight
        before, doubled = weight.detach() + 0, weight.detach() * 2
        opt.step()
        return before, doubled.sum() + weight.detach().sum(), weight.detach() * 3

    compiled = torch.compile(lambda: step(mine, opt), backend=backend, fullgraph=True)
    for _ in range(3):
        set_grads(generator, list(mine.parameters()), list(other.parameters()))
        for ours, theirs in zip(compiled(), step(other, other_opt), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert_same(list(mine.parameters()), list(other.parameters()), 1e-6)


def test_skipped_steps_and_parameters_without_gradients():
    (mine, opt), (other, other_opt) = twins("AdamW")
    step = torch.compile(lambda: opt.step(), backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(2)
    for i in range(4):
        set_grads(generator, list(mine.parameters()), list(other.parameters()))
        for m, o in ((mine, opt), (other, other_opt)):
            o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(float(i in (0, 2)))
            if i == 1:
                m[0].bias.grad = None
        before = [p.detach().clone() for p in mine.parameters()]
        step()
        other_opt.step()
        assert opt.step_was_skipped is (i in (0, 2))
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), before, strict=True)) is (i in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert_same_states(opt, other_opt)


def test_a_closure_and_a_group_added_later():
    (mine, opt), (other, other_opt) = twins("SGD")
    late = [nn.Parameter(torch.ones(9)) for _ in range(2)]
    x = batches(1)[0]

    def closure(model, opt, p):
        def run():
            opt.zero_grad()
            loss = model(x).square().mean() + p.square().sum()
            loss.backward()
            return loss.detach()

        return run

    step = torch.compile(lambda: opt.step(closure(mine, opt, late[0])), backend="aot_eager")
    for i in range(4):
        if i == 2:
            opt.add_param_group({"params": [late[0]], "lr": 0.01})
            other_opt.add_param_group({"params": [late[1]], "lr": 0.01})
        torch.testing.assert_close(step(), other_opt.step(closure(other, other_opt, late[1])))
    assert_same([*mine.parameters(), late[0]], [*other.parameters(), late[1]], 1e-5)
    assert not torch.equal(late[0].detach(), torch.ones(9))


def test_hooks_are_called_and_copies_are_optimizers_of_their_own():
    (mine, opt), _ = twins("Adam")
    called = []
    handle = opt.register_step_post_hook(lambda *_: called.append(1))
    set_grads(torch.Generator().manual_seed(2), list(mine.parameters()))
    step = torch.compile(lambda: opt.step(), backend="aot_eager")
    step()
    assert called == [1]
    handle.remove()
    step()
    assert called == [1]
    model, other = copy.deepcopy((mine, opt))
    before = [p.detach().clone() for p in mine.parameters()]
    set_grads(torch.Generator().manual_seed(2), list(model.parameters()))
    torch.compile(lambda: other.step(), backend="aot_eager", fullgraph=True)()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
