"""Checkpoints with the extra options: refused whole or taken whole, copied and pickled."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dlfast.optim
from tests.optim.cases import NAMES, OPTIONS, by_name, set_grads

EXTRAS = {
    "average": {"ema_decay": 0.9, "max_grad_norm": 1.0, "zero_grad_after_step": True},
    "int8": {"state_dtype": "int8", "stochastic_rounding": True, "max_grad_value": 0.5},
    "masters": {"master_weights": True, "state_dtype": torch.bfloat16, "ema_decay": 0.5, "max_grad_norm": 3.0},
}


def parameters(dtype=torch.float32, shapes=((37,), (5, 3), (1100,))):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def make(name, params, **extra):
    options = {k: v for k, v in OPTIONS[name].items() if k != "amsgrad"}
    return getattr(dlfast.optim, name)(params, **options, **extra)


def same(mine, theirs):
    """Whether two optimizers, over parameters of their own, hold the same numbers."""
    pairs = zip(mine.param_groups, theirs.param_groups, strict=True)
    for p, q in ((p, q) for a, b in pairs for p, q in zip(a["params"], b["params"], strict=True)):
        assert torch.equal(p, q)
        assert mine.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(value, theirs.state[q][key]) for key, value in mine.state[p].items())


@by_name
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
def test_copies_go_on_with_the_same_numbers(name, extras, how, fused):
    torch.manual_seed(7)
    params = parameters(torch.bfloat16)
    opt = make(name, params, **EXTRAS[extras], fused=fused)
    opt.grad_scale = torch.tensor(64.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        set_grads(generator, params)
        opt.step()
    torch.manual_seed(8)
    pair = (params, opt)
    params2, opt2 = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    same(opt, opt2)
    for option in ("max_grad_norm", "max_grad_value", "ema_decay", "state_dtype", "zero_grad_after_step"):
        assert getattr(opt2, option) == getattr(opt, option)
    start = [p.detach().clone() for p in params]
    for _ in range(3):
        set_grads(generator, params, params2)
        opt.step()
        opt2.step()
    same(opt, opt2)
    assert not any(torch.equal(p, before) for p, before in zip(params, start, strict=True))
    if "max_grad_norm" in EXTRAS[extras]:
        assert torch.equal(opt.grad_norm, opt2.grad_norm)


def test_a_copy_keeps_the_fixed_scale():
    p = nn.Parameter(torch.ones(3))
    opt = dlfast.optim.SGD([p], lr=1.0)
    opt.grad_scale = torch.tensor(1024.0)
    q, copied = copy.deepcopy((p, opt))
    q.grad = torch.full((3,), 1024.0)
    copied.step()
    assert torch.equal(q, torch.zeros(3))
    opt.grad_scale.fill_(1.0)
    assert copied.grad_scale == 1024


def saved_and_fresh(dtype):
    """A state_dict with everything in it, and an optimizer with a history of its own that takes it."""
    extra = {"master_weights": True, "state_dtype": "int8", "ema_decay": 0.5}
    generator = torch.Generator().manual_seed(3)
    optimizers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        params = parameters(dtype)
        optimizers.append(dlfast.optim.Adam(params, lr=0.1 * seed, **extra))
        for _ in range(seed):
            set_grads(generator, params)
            optimizers[-1].step()
    return optimizers[0].state_dict(), optimizers[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(step=torch.ones(3)), r"step in the state_dict has shape \(3,\).*parameter 2"),
        (lambda e: e.update(step=torch.tensor(float("nan"))), "step in the state_dict must be at least 0.*got nan"),
        (lambda e: e.update(step=-1), "step in the state_dict must be at least 0.*got -1"),
        (lambda e: e.update(step=None), "lacks step of parameter 2"),
        (lambda e: e.update(ema=2.0), "ema in the state_dict must be a tensor for parameter 2.*got float"),
        (lambda e: e.update(exp_avg_scale=torch.ones(3)), "exp_avg_scale in the state_dict has shape"),
        (lambda e: e.update(master_low=torch.zeros(1100)), r"holds master_low of torch.float32 .* takes master_"),
        (lambda e: e.update(master_param=torch.zeros(1100).double()), "holds master_param of torch.float64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_changes_nothing(change, message, dtype):
    saved, opt = saved_and_fresh(dtype)
    change(saved["state"][2])
    before = copy.deepcopy(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert (opt._seed, opt._random_step) == (before._seed, before._random_step)
    assert opt.param_groups[0]["lr"] == 0.2
    same(opt, before)


def test_an_unreadable_seed_changes_nothing():
    saved, opt = saved_and_fresh(torch.bfloat16)
    before = copy.deepcopy(opt)
    saved["param_groups"][0]["dlfast_format"]["random_step"] = "many"
    with pytest.raises(ValueError, match="many"):
        opt.load_state_dict(saved)
    assert opt._seed == before._seed
    same(opt, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masters_of_another_dtype_are_refused(dtype):
    """A parameter of one 16-bit type has no use for the masters of the other."""
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    saved, _ = saved_and_fresh(other)
    opt = dlfast.optim.Adam(parameters(dtype), master_weights=True, ema_decay=0.5)
    name = "master_param" if other is torch.float16 else "master_low"
    with pytest.raises(ValueError, match=rf"holds {name} of .*which is {dtype} and takes"):
        opt.load_state_dict(saved)
    assert not opt.state


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0)], ids=repr)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("SGD", "Lion")])  # those count no steps
def test_steps_are_taken_as_old_checkpoints_have_them(name, step):
    params, again = parameters(), parameters()
    opt, other = make(name, params), make(name, again)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        set_grads(generator, params, again)
        opt.step()
        other.step()
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry["step"] = step
    other.load_state_dict(saved)
    set_grads(generator, params, again)
    opt.step()
    other.step()
    same(opt, other)


@by_name
def test_what_is_of_no_parameter_comes_back_as_it_was(name):
    """As torch.optim keeps it, also where it comes first."""
    params = parameters()
    opt = make(name, params, ema_decay=0.5)
    set_grads(torch.Generator().manual_seed(3), params)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"] = {"of_another": {"buffer": torch.arange(3), "note": "kept"}, "count": 3, **saved["state"]}
    opt.load_state_dict(saved)
    assert opt.state_dict()["state"]["count"] == 3
    kept = opt.state_dict()["state"]["of_another"]
    assert torch.equal(kept["buffer"], torch.arange(3))
    assert kept["note"] == "kept"
    opt.step()
    with opt.swapped_ema():
        pass
