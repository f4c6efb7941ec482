"""Numbers that schedulers and users set in param_groups between steps: used as torch.optim uses them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast._native import native
from tests.optim.cases import NAMES, OPTIONS, TORCH_NAMES, engines, pair, ran_natively, set_grads
from tests.optim.oracle import Oracle
from tests.support.native import needs_native

INF, NAN = math.inf, math.nan


def wide(value):
    return torch.tensor(value, dtype=torch.float64)


# In the order in which they are set, one a step. Those of a constructor are narrower.
VALUES = {
    "lr": [-1.9e-18, 0, -0.05, 1, np.float64(0.07), wide(0.03), wide([0.5]), True],
    "weight_decay": [-0.1, 0, 0.3, np.float64(0.2), wide(0.25), 2],
    "momentum": [0.9, 0, 0.5, -0.3, 1, 1.2, 0.7],
    "dampening": [0.5, 2, -1, 0],
    "betas": [(0.0, 0.9), (1.5, 0.5), (-0.2, 0.9), [0.5, 0.99], (0.9, 0), (0.2, 1.0)],
    "eps": [0, 1e-3, -1e-9, np.float64(1e-8)],
    "alpha": [1.0, 0.5, 0.9],
    "lr_decay": [-0.01, 0.5, 0],
    "nesterov": [True, False, None, True],
    "maximize": [True, None, False, np.bool_(True)],
}
START = [torch.linspace(-1, 1, 37, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)]
SET = [
    (name, option)
    for name in NAMES
    for option in VALUES
    if option in getattr(dlfast.optim, name)([nn.Parameter(torch.ones(1))], lr=0.1).defaults
]


def close(mine, theirs, **bounds):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), equal_nan=True, **bounds)


@engines
@pytest.mark.parametrize(("name", "option"), SET)
def test_numbers_set_between_steps(name, option, fused):
    theirs = Oracle(name, OPTIONS[name], START)
    mine = [nn.Parameter(t.clone()) for t in START]
    opt = getattr(dlfast.optim, name)(mine, **OPTIONS[name], fused=fused)
    generator = torch.Generator().manual_seed(1)
    for value in ["as made", *VALUES[option], "as it was"]:
        for o in (theirs.optimizer, opt):
            if not isinstance(value, str):
                o.param_groups[0][option] = value
        set_grads(generator, mine)
        theirs.step([p.grad for p in mine])
        opt.step()
        assert ran_natively(opt) is (fused is None and native.module is not None)
        close(mine, theirs.params, rtol=1e-9, atol=1e-11)


@engines
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_an_infinite_learning_rate(name, weight_decay, fused):
    """Where the update is 0 it makes NaN of it; weight decay makes infinities of its own, or is none."""
    if (name, weight_decay) == ("Lion", 0):
        pytest.skip("the oracle decays by inf * 0")
    theirs = Oracle(name, {**OPTIONS[name], "weight_decay": weight_decay}, START)
    mine = [nn.Parameter(t.clone()) for t in START]
    opt = getattr(dlfast.optim, name)(mine, **{**OPTIONS[name], "weight_decay": weight_decay}, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for lr in (0.1, INF):
        theirs.optimizer.param_groups[0]["lr"] = opt.param_groups[0]["lr"] = lr
        set_grads(generator, mine)
        mine[1].grad[0] = 0
        theirs.step([p.grad for p in mine])
        opt.step()
    assert not any(p.isfinite().all() for p in mine)
    close(mine, theirs.params)


@needs_native
def test_an_infinite_learning_rate_of_lion_without_decay():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, -1.0])
    opt = dlfast.optim.Lion([p])
    opt.param_groups[0]["lr"] = INF
    opt.step()
    assert p.tolist() == [-INF, INF]


@engines
@pytest.mark.parametrize("name", TORCH_NAMES)
@pytest.mark.parametrize(
    "lr",
    [np.array(0.07), np.float32(0.07), np.float16(0.07), torch.tensor(0.07), torch.tensor([[0.07]])],
    ids=repr,
)
def test_numbers_of_few_digits(name, lr, fused):
    """torch.optim computes on in their own precision."""
    (theirs, torch_opt), (mine, opt) = pair(name, OPTIONS[name], START, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        set_grads(generator, theirs, mine)
        for o in (torch_opt, opt):
            o.param_groups[0]["lr"] = lr
            o.step()
    close(mine, theirs, rtol=0, atol=4 * (2**-10 if isinstance(lr, np.float16) else 2**-23))


def schedules():
    lrs = torch.optim.lr_scheduler

    def one_cycle(opt):
        return lrs.OneCycleLR(opt, 0.2, total_steps=9, cycle_momentum=can_cycle(opt))

    def cyclic(opt):
        return lrs.CyclicLR(opt, 0.01, 0.2, step_size_up=2, cycle_momentum=can_cycle(opt))

    def can_cycle(opt):
        return bool({"momentum", "betas"} & opt.defaults.keys())

    def linear(opt):
        return lrs.LinearLR(opt, 1 / 3, 0.0, total_iters=4)

    def cosine(opt):
        return lrs.CosineAnnealingLR(opt, T_max=3)

    def below_zero(opt):
        return lrs.LambdaLR(opt, lambda epoch: 1 - epoch / 4)

    def restarts(opt):
        return lrs.CosineAnnealingWarmRestarts(opt, T_0=3)

    def averaging(opt):
        return torch.optim.swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=3)

    return [one_cycle, cyclic, linear, cosine, below_zero, restarts, averaging]


@engines
@pytest.mark.parametrize("schedule", schedules(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_schedulers(name, schedule, fused):
    runs = pair(name, OPTIONS[name], START, fused=fused)
    schedulers = [schedule(opt) for _, opt in runs]
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        set_grads(generator, *(params for params, _ in runs))
        for (_, opt), scheduler in zip(runs, schedulers, strict=True):
            opt.step()
            scheduler.step()
    (theirs, torch_opt), (mine, opt) = runs
    close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert {k: v for k, v in opt.param_groups[0].items() if k not in ("params", "fused")} == {
        k: v for k, v in torch_opt.param_groups[0].items() if k not in ("params", "fused")
    }
    assert ran_natively(opt) is (fused is None and native.module is not None)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_set_between_compiled_steps(name):
    torch._dynamo.reset()
    theirs = Oracle(name, OPTIONS[name], START)
    mine = [nn.Parameter(t.clone()) for t in START]
    opt = getattr(dlfast.optim, name)(mine, **OPTIONS[name])
    step = torch.compile(lambda: opt.step(), backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    for lr in (0.1, -1.9e-18, 0, -0.05, 0.1):
        theirs.optimizer.param_groups[0]["lr"] = opt.param_groups[0]["lr"] = lr
        set_grads(generator, mine)
        theirs.step([p.grad for p in mine])
        step()
        close(mine, theirs.params, rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()


# Where NaN is no number of the step: a momentum that is not above 0, and the dampening of none.
@engines
@pytest.mark.parametrize(("name", "option"), [("RMSprop", "momentum"), ("SGD", "dampening")])
def test_nan_is_taken_where_torch_makes_nothing_of_it(name, option, fused):
    (theirs, torch_opt), (mine, opt) = pair(name, {"lr": 0.1}, START, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for value in (0.0, NAN, NAN, 0.0):
        set_grads(generator, theirs, mine)
        for o in (torch_opt, opt):
            o.param_groups[0][option] = value
            o.step()
    assert all(p.isfinite().all() for p in mine)
    close(mine, theirs, rtol=1e-9, atol=1e-11)


REFUSED = [(name, o) for name, o in SET if o in ("lr", "weight_decay", "betas", "eps", "alpha", "lr_decay")]


@pytest.mark.parametrize(("name", "option"), [*REFUSED, ("SGD", "momentum"), ("SGD", "dampening")])
def test_nan_is_refused_where_torch_makes_nan_of_the_parameters(name, option):
    """Of all numbers of a parameter, by the second step."""
    theirs = Oracle(name, OPTIONS[name], START)
    mine = [nn.Parameter(t.clone()) for t in START]
    opt = getattr(dlfast.optim, name)(mine, **OPTIONS[name])
    generator = torch.Generator().manual_seed(1)
    set_grads(generator, mine)
    opt.step()
    before = [p.detach().clone() for p in mine]
    value = (0.9, NAN) if option == "betas" else NAN
    opt.param_groups[0][option] = theirs.optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: {option}.* must be a number other than NaN, got nan"):
        opt.step()
    close(mine, before, rtol=0, atol=0)
    for _ in range(2):
        theirs.step([p.grad for p in mine])
    assert name == "Lion" or all(p.isnan().all() for p in theirs.params)  # whose steps are signs, for a while


@engines
@pytest.mark.parametrize("name", ["Adam", "AdamW", "LAMB"])
@pytest.mark.parametrize("betas", [(1, 0.9), (1.0, 0.9), (0.9, 1.5), (0.9, -1.5)])
def test_betas_without_a_bias_correction_are_refused_where_torch_fails(name, betas, fused):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = getattr(dlfast.optim, name)([p], fused=fused)
    other = torch.optim.Adam([q], foreach=False)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    opt.step()
    other.step()
    before = p.detach().clone()
    opt.param_groups[0]["betas"] = other.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match=r"param_groups\[0\]: betas\[[01]\] must"):
        opt.step()
    assert torch.equal(p, before)
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        other.step()


@engines
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["0.1", None, [0.1], 1j], ids=repr)
def test_what_is_no_number_is_a_type_error(name, value, fused):
    p = nn.Parameter(torch.ones(3))
    opt = getattr(dlfast.optim, name)([p], lr=0.1, fused=fused)
    p.grad = torch.ones(3)
    opt.step()
    before = p.detach().clone()
    opt.param_groups[0]["lr"] = value
    with pytest.raises(TypeError, match=r"param_groups\[0\]: lr must be a number"):
        opt.step()
    assert torch.equal(p, before)


@engines
def test_the_sum_of_an_added_group_starts_as_that_of_the_optimizer(fused):
    runs = []
    for lib, extra in ((torch.optim, {}), (dlfast.optim, {"fused": fused})):
        p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        opt = lib.Adagrad([p], lr=0.1, initial_accumulator_value=0.5, **extra)
        opt.add_param_group({"params": [q], "initial_accumulator_value": 4.0})
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        opt.step()
        runs.append([p, q])
    close(runs[1], runs[0])
