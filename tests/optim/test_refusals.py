"""What the optimizers refuse, with its name and before anything has changed: options, tensors, states."""

import copy
import math

import pytest
import torch
from torch import nn

import dlfast.optim
from tests.optim.cases import (
    NAMES,
    OPTIONS,
    TORCH_NAMES,
    by_name,
    engines,
    parameters,
    set_grads,
    start,
)


@by_name
def test_bad_options_are_refused_by_name(name):
    make = getattr(dlfast.optim, name)
    p = nn.Parameter(torch.ones(3))
    nan = float("nan")
    bad = [("lr", nan), ("lr", -1.0), ("lr", torch.ones(2)), ("weight_decay", nan), ("weight_decay", -0.1)]
    bad += {
        "SGD": [("momentum", nan), ("momentum", -1), ("dampening", nan), ("dampening", torch.ones(2))],
        "RMSprop": [("alpha", nan), ("alpha", 1.0), ("momentum", -1), ("eps", nan)],
        "Adagrad": [("lr_decay", nan), ("eps", -1), ("initial_accumulator_value", -1)],
        "Lion": [],
    }.get(name, [("eps", nan), ("eps", -1)])
    for option, value in bad:
        with pytest.raises(ValueError, match=option):
            make([p], **{option: value})
        opt = make([p])
        with pytest.raises(ValueError, match=option):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], option: value})
        assert len(opt.param_groups) == 1
    with pytest.raises(TypeError, match="lr must be a number"):
        make([p], lr="fast")
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    if name in TORCH_NAMES:
        for option in ("foreach", "differentiable"):
            with pytest.raises(RuntimeError, match=f"{option}=True"):
                make([p], **{option: True})
    if name == "SGD":
        with pytest.raises(ValueError, match="nesterov needs a momentum"):
            make([p], nesterov=True)
    if name in ("Adam", "AdamW", "Lion", "LAMB"):
        for betas in [(1.0, 0.9), (0.9, -0.1), (nan, 0.9), (0.9, nan)]:
            with pytest.raises(ValueError, match=r"betas\[[01]\] must be in \[0, 1\)"):
                make([p], betas=betas)
    if name in ("Adam", "AdamW", "RMSprop"):
        opt = make([p], capturable=True)
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="capturable"):
            opt.step()


@by_name
def test_bad_tensors_are_refused_before_anything_changes(name):
    make = getattr(dlfast.optim, name)
    good = nn.Parameter(torch.ones(3))
    good.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="complex"):
        make([good, nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    for shape, strides in [((4, 3), (0, 1)), ((3, 3), (1, 1))]:
        expanded = torch.zeros(9).as_strided(shape, strides).requires_grad_()
        with pytest.raises(RuntimeError, match="overlaps itself"):
            make([good, expanded])
    bad = nn.Parameter(torch.ones(4, 2))
    opt = make([("good", good), ("embedding", bad)], lr=0.1)
    bad.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2))
    with pytest.raises(RuntimeError, match=r"'embedding'.*sparse"):
        opt.step()
    bad.grad = None
    bad.data = torch.zeros(2).expand(4, 2)
    bad.grad = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="overlaps itself"):
        opt.step()
    assert torch.equal(good.detach(), torch.ones(3))
    assert name == "Adagrad" or not opt.state
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [("again", good)]})


@by_name
@pytest.mark.parametrize("option", ["lr", "weight_decay", "betas", "eps", "momentum", "alpha"])
def test_option_that_turns_nan_is_refused_before_anything_changes(name, option):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad, q.grad = torch.ones(3), torch.ones(3, dtype=torch.float64)
    opt = getattr(dlfast.optim, name)([{"params": [p]}, {"params": [q]}])
    if option not in opt.param_groups[1]:
        pytest.skip("has no such option")
    if (name, option) == ("RMSprop", "momentum"):
        pytest.skip("is none in torch.optim either, which steps without it: see test_set_later.py")
    opt.step()
    before = p.detach().clone(), q.detach().clone()
    opt.param_groups[1][option] = (0.9, float("nan")) if option == "betas" else float("nan")
    with pytest.raises(ValueError, match=rf"param_groups\[1\]: {option}"):
        opt.step()
    assert torch.equal(p.detach(), before[0])
    assert torch.equal(q.detach(), before[1])


@engines
def test_wrong_state_in_one_dtype_is_refused_before_another_is_written(fused):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad, q.grad = torch.ones(3), torch.ones(3, dtype=torch.float64)
    opt = dlfast.optim.Adam([p, q], fused=fused)
    opt.step()
    before = p.detach().clone()
    opt.state[q]["exp_avg"] = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"exp_avg of param_groups\[0\]\['params'\]\[1\] has shape \(4,\)"):
        opt.step()
    assert torch.equal(p.detach(), before)


def test_state_dict_of_another_algorithm_or_shape_is_refused_and_changes_nothing():
    p = nn.Parameter(torch.ones(3))
    opt = dlfast.optim.Adam([p])
    with pytest.raises(ValueError, match=r"lacks betas, eps.*not one of Adam"):
        opt.load_state_dict(torch.optim.SGD([nn.Parameter(torch.ones(3))]).state_dict())
    other = nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    torch_opt = torch.optim.Adam([other], lr=5.0)
    torch_opt.step()
    with pytest.raises(ValueError, match=r"exp_avg in the state_dict has shape \(4,\).*\(3,\)"):
        opt.load_state_dict(torch_opt.state_dict())
    assert opt.param_groups[0]["lr"] == 1e-3
    assert not opt.state


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be at least 0"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be at least 0"),
        ({"max_grad_value": "1"}, TypeError, "max_grad_value must be a number"),
        ({"max_grad_norm": torch.tensor(1.0)}, TypeError, "max_grad_norm must be a number, got a tensor"),
        ({"ema_decay": torch.tensor(0.5)}, TypeError, "ema_decay must be a number, got a tensor"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\)"),
        ({"ema_decay": math.nan}, ValueError, "ema_decay"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be"),
        ({"state_dtype": "int4"}, ValueError, "state_dtype must be"),
        ({"master_weights": True, "stochastic_rounding": True}, ValueError, "exclude each other"),
        ({"max_norm": 1.0}, TypeError, "max_norm"),
    ],
    ids=str,
)
@by_name
def test_bad_extras_are_refused_by_name(name, extra, error, message):
    with pytest.raises(error, match=message):
        getattr(dlfast.optim, name)(parameters(start()), **extra)


@by_name
def test_state_dicts_that_do_not_fit_are_refused_and_change_nothing(name):
    options = {k: v for k, v in OPTIONS[name].items() if k != "amsgrad"}
    params = parameters(start())
    opt = getattr(dlfast.optim, name)(params, **options, state_dtype="int8")
    set_grads(torch.Generator().manual_seed(1), params)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    key = opt._state_names[0]

    def refused(message, change):
        saved = copy.deepcopy(before)
        change(saved)
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(saved)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, entry in before["state"].items():
            assert all(torch.equal(after["state"][i][k], v) for k, v in entry.items())

    refused("format version 2", lambda s: s["param_groups"][0]["dlfast_format"].update(version=2))
    refused(f"lacks {key}_scale", lambda s: s["state"][0].pop(key + "_scale"))
    refused(f"{key} in the state_dict has shape", lambda s: s["state"][1].update({key: torch.zeros(3)}))
    refused("has exp_inf", lambda s: s["state"][1].update(exp_inf=torch.zeros(3)))
    refused(r"averages \(ema\)", lambda s: s["state"][1].update(ema=torch.zeros(17, 5)))
    refused("holds master weights", lambda s: s["state"][1].update(master_low=torch.zeros(17, 5)))
    if name != "SGD":
        refused(f"lacks {key} of", lambda s: s["state"][0].pop(key))


def test_state_dict_of_every_other_algorithm_is_refused():
    saved = {}
    for name in NAMES:
        params = parameters(start())
        opt = getattr(dlfast.optim, name)(params, **OPTIONS[name])
        set_grads(torch.Generator().manual_seed(1), params)
        opt.step()
        saved[name] = opt.state_dict()
    for name in NAMES:
        for other in NAMES:
            if {name, other} == {"Adam", "AdamW"} or name == other:
                continue
            with pytest.raises(ValueError, match=f"{name}"):
                getattr(dlfast.optim, name)(parameters(start())).load_state_dict(saved[other])
