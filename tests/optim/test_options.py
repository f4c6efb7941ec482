"""Every algorithm with every option of a step, against a float64 tail of plain PyTorch."""

import copy
import math

import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast.optim import _formats
from tests.optim.cases import (
    CASE_IDS,
    CASES,
    LOW,
    OPTIONS,
    assert_same,
    by_name,
    engines,
    forgive_signs,
    parameters,
    set_grads,
    start,
    tolerance,
)
from tests.optim.oracle import Oracle
from tests.support.native import needs_native

STEPS = 200
EXTRAS = {
    "plain": {},
    "clip": {"max_grad_norm": 20.0, "max_grad_value": 1.5},
    "tail": {"max_grad_norm": 5.0, "ema_decay": 0.9, "zero_grad_after_step": True},
}


def exact(opt, p):
    """The float32 master of a 16-bit parameter."""
    state = opt.state[p]
    if p.dtype is torch.bfloat16:
        return _formats.join_halves(p.detach(), state["master_low"])
    return state["master_param"] if p.dtype is torch.float16 else p.detach()


@needs_native
@pytest.mark.parametrize(
    ("dtype", "extras"),
    [
        *((torch.float32, extras) for extras in EXTRAS),
        (torch.float64, "clip"),
        (torch.bfloat16, "tail"),
        (torch.float16, "tail"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_200_steps_against_float64(name, options, dtype, extras):
    """16-bit parameters with masters and float32 states, so that float32's tolerance holds for them."""
    extra = EXTRAS[extras]
    formats = {"master_weights": True, "state_dtype": torch.float32} if dtype in LOW else {}
    tensors = start(dtype)
    mine = parameters(tensors)
    opt = getattr(dlfast.optim, name)(mine, **options, **extra, **formats)
    oracle = Oracle(name, options, tensors, **{k: v for k, v in extra.items() if k != "zero_grad_after_step"})
    generator = torch.Generator().manual_seed(2)
    scale = 8.0 if extras == "tail" else 1.0
    if scale != 1:
        opt.grad_scale = torch.tensor(scale)
    for _ in range(STEPS):
        set_grads(generator, mine)
        oracle.step([p.grad for p in mine], scale)
        opt.step()
        if extra.get("zero_grad_after_step"):
            assert not any(p.grad.any() for p in mine)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    bound = tolerance(compute, STEPS)
    results = [exact(opt, p).double() for p in mine]
    if name == "Lion":
        forgive_signs(results, oracle.params, options["lr"], bound)
    assert_same(results, oracle.params, bound)
    assert all((p != t).any() for p, t in zip(mine, tensors, strict=True) if p.numel())
    for p in mine:
        if dtype in LOW:
            assert torch.equal(p.detach().float(), exact(opt, p).to(dtype).float()) or dtype is torch.bfloat16
            assert ((p.detach().float() - exact(opt, p)).abs() <= exact(opt, p).abs() * 2**-8).all()
    if "ema_decay" in extra:
        averages = [opt.state[p]["ema"].double() for p in mine]
        if name == "Lion":
            forgive_signs(averages, oracle.ema, options["lr"], bound)
        assert_same(averages, oracle.ema, bound)
    if "max_grad_norm" in extra:
        torch.testing.assert_close(opt.grad_norm.double(), oracle.grad_norm, rtol=1e-6, atol=0)
        assert oracle.grad_norm > extra["max_grad_norm"]  # it did clip


@by_name
@engines
@pytest.mark.parametrize("skipped", [{0}, {0, 1}, {2}], ids=str)
@pytest.mark.parametrize("how", ["found_inf", "itself", "itself-clip"])
def test_skipped_steps_change_nothing_but_clear_gradients(name, fused, skipped, how):
    extra = {"ema_decay": 0.9, "zero_grad_after_step": True}
    if how == "itself-clip":
        extra["max_grad_norm"] = 5.0
    tensors = start()
    mine, clean = parameters(tensors), parameters(tensors)
    opt = getattr(dlfast.optim, name)(mine, **OPTIONS[name], **extra, fused=fused)
    clean_opt = getattr(dlfast.optim, name)(clean, **OPTIONS[name], **extra, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        set_grads(generator, clean, mine)
        opt.grad_scale = torch.tensor(4.0)
        if how == "found_inf":
            opt.found_inf = torch.tensor(float(step in skipped))
        for p in mine:
            p.grad.mul_(4)
        if step in skipped:
            mine[5].grad[1400] = float("inf") if step else float("nan")
        before = [p.detach().clone() for p in mine], copy.deepcopy(opt.state_dict())
        opt.step()
        assert opt.step_was_skipped is (step in skipped)
        assert not any(p.grad.any() for p in mine)
        if step not in skipped:
            clean_opt.step()
            continue
        assert all(torch.equal(a, b) for a, b in zip(mine, before[0], strict=True))
        after = opt.state_dict()["state"]
        assert after.keys() == before[1]["state"].keys()
        for i, entry in before[1]["state"].items():
            assert all(torch.equal(after[i][key], value) for key, value in entry.items())
    assert_same(mine, clean, 1e-5)
    assert_same([opt.state[p]["ema"] for p in mine], [clean_opt.state[p]["ema"] for p in clean], 1e-5)


def test_scheduler_holds_still_after_a_skipped_step():
    p = nn.Parameter(torch.ones(5))
    opt = dlfast.optim.Adam([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for factor in (float("inf"), 1.0):
        opt.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
        if not opt.step_was_skipped:
            scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.5


@by_name
def test_hyper_parameters_as_tensors_that_change(name):
    """Every number of a group as a tensor that is written in place, without a new preparation."""
    tensors = start()
    mine, theirs = parameters(tensors), parameters(tensors)
    opt = getattr(dlfast.optim, name)(mine, **OPTIONS[name])
    other = getattr(dlfast.optim, name)(theirs, **OPTIONS[name])
    group, plain = opt.param_groups[0], other.param_groups[0]
    names = [k for k in ("lr", "weight_decay", "momentum", "alpha", "eps", "lr_decay") if k in group]
    for k in names:
        group[k] = torch.tensor(float(group[k]), dtype=torch.float64)
    if "betas" in group:
        group["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in group["betas"])
    generator = torch.Generator().manual_seed(2)
    for step in range(1, 6):
        for k in names:
            value = float(plain[k]) * (0.9 if k != "momentum" else 0.99)
            plain[k] = value
            group[k].fill_(value)
        if "betas" in group:
            plain["betas"] = (0.9 - step / 100, 0.99 - step / 100)
            for tensor, value in zip(group["betas"], plain["betas"], strict=True):
                tensor.fill_(value)
        set_grads(generator, mine, theirs)
        opt.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    group["lr"].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr must be"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_grad_norm_is_over_all_groups_dtypes_and_layouts():
    tensors = [*start(), *start(torch.float64), *start(torch.bfloat16)]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    mine = parameters(tensors)
    opt = dlfast.optim.SGD([{"params": mine[:4]}, {"params": mine[4:], "lr": 0.5}], lr=0.1, max_grad_norm=1.0)
    set_grads(torch.Generator().manual_seed(1), mine)
    mine[1].grad = None
    copies = [nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in mine]
    for c, p in zip(copies, mine, strict=True):
        c.grad = None if p.grad is None else p.grad.to(torch.float64, copy=True)
    expected = nn.utils.clip_grad_norm_(copies, 1.0)
    opt.step()
    assert opt.grad_norm.dtype is torch.float32
    torch.testing.assert_close(opt.grad_norm.double(), expected, rtol=1e-6, atol=0)
    for i, (p, c, t) in enumerate(zip(mine, copies, tensors, strict=True)):
        if c.grad is not None and p.dtype is not torch.bfloat16:
            lr = 0.1 if i < 4 else 0.5
            torch.testing.assert_close(p.detach().double(), t.double() - lr * c.grad, rtol=1e-5, atol=1e-6)
    first = opt.grad_norm
    opt.max_grad_norm = float("inf")
    mine[0].grad = mine[0].grad * 100
    opt.step()
    assert opt.grad_norm > first  # a tensor of its own each step


def test_infinite_norm_acts_as_clip_grad_norm_():
    for value in (float("inf"), float("nan")):
        p = nn.Parameter(torch.ones(20))
        p.grad = torch.ones(20)
        p.grad[3] = value
        opt = dlfast.optim.SGD([p], lr=1.0, max_grad_norm=1.0)
        q = nn.Parameter(torch.ones(20))
        q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_([q], 1.0)
        torch.optim.SGD([q], lr=1.0).step()
        opt.step()
        torch.testing.assert_close(p.detach(), q.detach(), equal_nan=True)
        assert not opt.grad_norm.isfinite()


@by_name
def test_swapped_ema(name):
    params = parameters(start())
    opt = getattr(dlfast.optim, name)(params, **OPTIONS[name], ema_decay=0.5)
    with opt.swapped_ema():
        pass  # nothing was averaged yet
    set_grads(torch.Generator().manual_seed(1), params)
    before = [p.detach().clone() for p in params]
    opt.step()
    after = [p.detach().clone() for p in params]

    def look():
        with opt.swapped_ema():
            for p, a, b in zip(params, before, after, strict=True):
                torch.testing.assert_close(p.detach(), 0.5 * a + 0.5 * b)
            with pytest.raises(RuntimeError, match=r"inside of swapped_ema"):
                opt.step()
            with pytest.raises(RuntimeError, match="already"), opt.swapped_ema():
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look()
    assert all(torch.equal(p, a) for p, a in zip(params, after, strict=True))
    opt.step()
    with pytest.raises(RuntimeError, match="ema_decay="), dlfast.optim.SGD(params).swapped_ema():
        pass


@engines
def test_shared_gradients_are_cleared_after_all_have_read_them(fused):
    params = parameters([torch.ones(5000), torch.ones(5000)])
    grad = torch.ones(5000)
    for p in params:
        p.grad = grad
    dlfast.optim.SGD(params, lr=1.0, zero_grad_after_step=True, fused=fused).step()
    assert not any(p.any() for p in params)
    assert not grad.any()


def test_extras_can_be_read_and_some_be_set():
    p = nn.Parameter(torch.ones(4))
    opt = dlfast.optim.SGD([p], lr=1.0, max_grad_norm=0.5)
    assert opt.max_grad_norm == 0.5
    assert opt.grad_norm is None
    assert opt.step_was_skipped is False
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        opt.max_grad_norm = math.nan
    with pytest.raises(TypeError, match=r"max_grad_value must be a number, got a tensor.*set optimizer\.max"):
        opt.max_grad_value = torch.tensor(1.0)
    with pytest.raises(AttributeError, match="state_dtype is chosen"):
        opt.state_dtype = "int8"
    with pytest.raises(AttributeError, match="switched on or off"):
        opt.ema_decay = 0.5
    opt.max_grad_norm, opt.max_grad_value = None, 0.25
    p.grad = torch.full((4,), 8.0)
    opt.step()
    assert torch.equal(p.detach(), torch.full((4,), 0.75))
