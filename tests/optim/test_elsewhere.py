"""What wrappers, schedulers and trainers put into an optimizer: kept, saved and loaded as by torch.optim."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import dlfast.optim
from dlfast._native import native
from tests.optim.cases import (
    OPTIONS,
    by_name,
    by_torch_name,
    engines,
    pair,
    ran_natively,
    set_grads,
)

WAYS = ["deepcopy", "pickle", "same", "fresh", "half", "file"]


def of_others():
    """Values under names that none of our options has; some begin or end like names that one has."""
    return {
        "slow_buffer": torch.arange(3.0),
        "wide": torch.arange(3, dtype=torch.float64) / 3,
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "half": torch.ones(2, dtype=torch.float16),
        "my_scale": torch.ones(2),
        "master_copy": torch.ones(3, dtype=torch.float64),
        "exp_avg_cubed": torch.zeros(3),
        "nested": OrderedDict(step=torch.tensor(2.0, dtype=torch.float64), t=torch.ones(1, dtype=torch.float64)),
        "list": [torch.ones(1, dtype=torch.float64), 1, 2.5],
        "tuple": (1, torch.ones(1)),
        "number": 7,
        "nothing": None,
        "flag": True,
        "size": torch.Size([1, 2]),
    }


OPTIONS_OF_OTHERS = {"initial_lr": 0.5, "lookahead_k": 3, "lr_scale": 0.5, "tags": ["a"], "swa_lr": 0.1, "none": None}


def shown(value):
    """Types and numbers, which can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return type(value), {k: shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [shown(v) for v in value]
    return type(value), value


def carried(make, how):
    """An optimizer with all that, after a way of carrying it on and a step; and how its last step was taken."""
    p = nn.Parameter(torch.ones(3))
    opt = make(p)
    p.grad = torch.ones(3)
    opt.step()
    own = set(opt.state[p])
    opt.state[p].update(of_others())
    opt.state["of_none"] = OrderedDict(t=torch.ones(2, dtype=torch.float64), note="kept")
    opt.state["number"] = 4
    opt.param_groups[0].update(OPTIONS_OF_OTHERS)
    opt.defaults["lookahead_k"] = 6
    opt.step()
    if how == "deepcopy":
        p, opt = copy.deepcopy((p, opt))
    elif how == "pickle":
        p, opt = pickle.loads(pickle.dumps((p, opt)))
    else:
        saved = copy.deepcopy(opt.state_dict())
        if how == "file":
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=False)
        if how != "same":
            p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16 if how == "half" else torch.float32))
            opt = make(p)
        opt.load_state_dict(saved)
    p.grad = torch.ones_like(p)
    opt.step()
    entry = {k: v for k, v in opt.state[p].items() if k not in own}
    group = {k: v for k, v in opt.param_groups[0].items() if k in OPTIONS_OF_OTHERS}
    return opt, [shown(v) for v in (entry, opt.state["of_none"], opt.state["number"], group)]


@by_name
@engines
@pytest.mark.parametrize("how", WAYS)
def test_what_others_keep_in_an_optimizer_survives(name, fused, how):
    """As in torch.optim.Adam, whichever the algorithm."""
    opt, mine = carried(lambda p: getattr(dlfast.optim, name)([p], **OPTIONS[name], fused=fused), how)
    _, theirs = carried(lambda p: torch.optim.Adam([p], lr=0.1), how)
    assert mine == theirs
    assert len(mine[0][1]) == len(of_others())
    assert len(mine[3][1]) == len(OPTIONS_OF_OTHERS)
    assert ran_natively(opt) is (fused is None and native.module is not None)


@by_name
def test_texts_survive(name):
    """torch.optim rebuilds them from what it takes for their elements, and loses them."""
    p = nn.Parameter(torch.ones(3))
    opt = getattr(dlfast.optim, name)([p], lr=0.1)
    p.grad = torch.ones(3)
    opt.step()
    opt.state[p]["name"] = "layer.weight"
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.state[p]["name"] == "layer.weight"


@by_torch_name
@engines
def test_lookahead_goes_on_as_over_torch(name, fused):
    timm = pytest.importorskip("timm.optim")
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(5, 3, dtype=torch.float64), torch.randn(40, dtype=torch.float64)]
    runs = [(params, timm.Lookahead(opt, k=2)) for params, opt in pair(name, OPTIONS[name], start, fused=fused)]
    for step in range(9):
        if step == 5:
            for i, (params, opt) in enumerate(runs):
                again = [nn.Parameter(p.detach().clone()) for p in params]
                base = type(opt._base_optimizer)(again, lr=9.0, **({"fused": fused} if i else {}))
                fresh = timm.Lookahead(base, k=7)
                fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
                runs[i] = again, fresh
        set_grads(generator, *(params for params, _ in runs))
        for _, opt in runs:
            opt.step()
    (theirs, _), (mine, opt) = runs
    assert opt.param_groups[0]["lookahead_step"] == 9
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert ran_natively(opt._base_optimizer) is (fused is None and native.module is not None)


@by_name
@engines
@pytest.mark.parametrize("how", WAYS)
def test_entries_of_others_before_the_first_step_and_without_one(name, fused, how):
    """A wrapper may look after parameters that have taken no step, or never will."""

    def build(dtype=torch.float32):
        params = [nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(3)]
        return params, getattr(dlfast.optim, name)(params, **OPTIONS[name], fused=fused)

    params, opt = build()
    opt.state.clear()  # Adagrad has made its sums
    for p in params[:2]:
        opt.state[p]["slow_buffer"] = torch.full((3,), 2.0)
    theirs = opt.state[params[0]]
    params[0].grad = torch.ones(3)
    for skipped in (1.0, 0.0):
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(skipped)
        opt.step()
        assert opt.state[params[0]] is theirs  # which the wrapper may hold
        assert (list(theirs) == ["slow_buffer"]) is bool(skipped)
    del opt.grad_scale, opt.found_inf
    if how in ("deepcopy", "pickle"):
        params, opt = copy.deepcopy((params, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((params, opt)))
    else:
        saved = copy.deepcopy(opt.state_dict())
        if how != "same":
            params, opt = build(torch.bfloat16 if how == "half" else torch.float32)
        opt.load_state_dict(saved)
    assert list(opt.state[params[1]]) == ["slow_buffer"]
    assert opt.state[params[0]].keys() == theirs.keys()
    assert params[2] not in opt.state or name == "Adagrad"
    before = params[1].detach().clone()
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(opt.state[params[1]]["slow_buffer"], torch.full_like(params[1], 2.0))
    assert len(opt.state[params[1]]) > 1
    assert not torch.equal(params[1], before)


def test_another_algorithm_is_known_among_entries_of_others():
    p = nn.Parameter(torch.ones(3))
    opt = dlfast.optim.LAMB([p])
    for other in (torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adam, torch.optim.Adamax):
        source = other([p])
        p.grad = torch.ones(3)
        source.step()
        source.state[p]["slow_buffer"] = torch.ones(3)
        with pytest.raises(ValueError, match="the state_dict"):
            opt.load_state_dict(source.state_dict())
    saved = torch.optim.SGD([p], momentum=0.9).state_dict()
    saved["state"][0] = {"exp_avg": torch.ones(3), "slow_buffer": torch.ones(3)}
    with pytest.raises(ValueError, match=r"has exp_avg of parameter 0.*which SGD does not keep"):
        dlfast.optim.SGD([p]).load_state_dict(saved)
    saved["state"][0] = {"slow_buffer": torch.ones(3), "square_avg": torch.ones(3)}
    saved["param_groups"] = torch.optim.Adam([p]).state_dict()["param_groups"]
    with pytest.raises(ValueError, match="lacks step, exp_avg, exp_avg_sq of parameter 0"):
        dlfast.optim.Adam([p]).load_state_dict(saved)
    assert not opt.state


@pytest.mark.parametrize(("name", "option"), [("Lion", "eps"), ("LAMB", "amsgrad"), ("SGD", "wd_ratio")])
def test_an_option_that_tells_algorithms_apart_may_be_the_groups_own(name, option):
    def build():
        return getattr(dlfast.optim, name)([{"params": [nn.Parameter(torch.ones(3))], option: 0.5}], lr=0.1)

    fresh = build()
    fresh.load_state_dict(build().state_dict())
    assert fresh.param_groups[0][option] == 0.5
    with pytest.raises(ValueError, match=f"has {option}: it is not one of {name}"):
        getattr(dlfast.optim, name)([nn.Parameter(torch.ones(3))]).load_state_dict(build().state_dict())


@pytest.mark.parametrize("name", ["Lion", "LAMB"])
def test_groups_saved_without_maximize(name):
    """As other implementations of the papers save them."""
    p = nn.Parameter(torch.ones(3))
    opt = getattr(dlfast.optim, name)([p], lr=0.1)
    saved = opt.state_dict()
    for option in ("maximize", "fused"):
        del saved["param_groups"][0][option]
    opt.load_state_dict(saved)
    p.grad = torch.ones(3)
    opt.step()
    assert (p < 1).all()


@by_torch_name
def test_hooks_of_state_dicts_see_and_change_what_torchs_do(name):
    runs = pair(name, OPTIONS[name], [torch.ones(3, dtype=torch.float64)])
    seen = []
    for params, opt in runs:
        params[0].grad = torch.ones_like(params[0])
        opt.step()
        calls = []
        opt.register_state_dict_pre_hook(lambda o: o.state.update(before=1))
        opt.register_state_dict_post_hook(lambda o, d: {"inner": d})
        opt.register_load_state_dict_pre_hook(lambda o, d: d["inner"])
        opt.register_load_state_dict_post_hook(lambda o, calls=calls: calls.append(len(o.state)))
        saved = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(saved)
        seen.append([opt.state["before"], list(saved), list(saved["inner"]), saved["inner"]["state"]["before"], calls])
    assert seen[0] == seen[1]


@by_torch_name
@engines
def test_distributed_checkpoints(name, fused):
    """Which take a step of their own, with a learning rate of 0, where there are no states yet."""
    torch.manual_seed(0)
    models = [nn.Linear(5, 3).double() for _ in range(4)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    make = [torch.optim, torch.optim, dlfast.optim, dlfast.optim]
    opts = [
        getattr(lib, name)(m.parameters(), **OPTIONS[name], **({"fused": fused} if lib is dlfast.optim else {}))
        for lib, m in zip(make, models, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    for i in range(4):
        set_grads(generator, *(list(m.parameters()) for m in models))
        for opt in (opts[0], opts[2]) if i < 2 else opts:
            opt.step()
        if i == 1:
            for j in (0, 2):
                opts[j].param_groups[0]["initial_lr"] = 0.5
                saved = copy.deepcopy(get_optimizer_state_dict(models[j], opts[j]))
                models[j + 1].load_state_dict(models[j].state_dict())
                set_optimizer_state_dict(models[j + 1], opts[j + 1], saved)
                assert opts[j + 1].param_groups[0]["initial_lr"] == 0.5
    for model in models[1:]:
        for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def surgeries():
    def clear(opt, p):
        opt.state.clear()

    def another_state(opt, p):
        opt.state = type(opt.state)(dict, {k: dict(v) for k, v in opt.state.items()})

    def append_group(opt, p):
        group = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
        opt.param_groups.append({**group, "params": [p], "lr": 0.01})

    def append_parameter(opt, p):
        opt.param_groups[0]["params"].append(p)

    def another_list(opt, p):
        opt.param_groups[0]["params"] = [*opt.param_groups[0]["params"], p]

    def tuple_(opt, p):
        opt.param_groups[0]["params"] = (*opt.param_groups[0]["params"], p)

    def parameter_list(opt, p):
        opt.param_groups[0]["params"] = nn.ParameterList(opt.param_groups[0]["params"])

    def remove(opt, p):
        del opt.param_groups[0]["params"][0]

    def other_groups(opt, p):
        opt.param_groups = [{**g} for g in opt.param_groups]

    def zero(opt, p):
        opt.zero_grad(set_to_none=False)

    return list(locals().values())


@by_torch_name
@engines
@pytest.mark.parametrize("change", surgeries(), ids=lambda f: f.__name__)
def test_surgery_between_steps(name, change, fused):
    runs = pair(name, OPTIONS[name], [torch.randn(n, dtype=torch.float64) for n in (7, 40, 3)], fused=fused)
    late = [nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in runs]
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        set_grads(generator, *([*params, p] for (params, _), p in zip(runs, late, strict=True)))
        for (_, opt), p in zip(runs, late, strict=True):
            if step == 2:
                change(opt, p)
            if step == 4 and change.__name__ == "parameter_list":
                opt.param_groups[0]["params"].append(p)
            opt.step()
    (theirs, _), (mine, opt) = runs
    for p, q in zip([*mine, late[1]], [*theirs, late[0]], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert opt.state.keys() <= {*mine, late[1]}
