"""Every algorithm with every option of a step, against a float64 tail of plain PyTorch."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast.optim import _formats
from tests.optim.cases import CASE_IDS, CASES, NAMES, OPTIONS, assert_same, forgive_signs, set_grads, tolerance
from tests.optim.oracle import Oracle
from tests.support.native import needs_native

SHAPES = [(3,), (17, 5), (4, 3, 3, 3), (), (0, 4), (1500,), (2, 2061)]
STEPS = 200
LOW = [torch.bfloat16, torch.float16]
EXTRAS = {
    "plain": {},
    "clip": {"max_grad_norm": 20.0, "max_grad_value": 1.5},
    "tail": {"max_grad_norm": 5.0, "ema_decay": 0.9, "zero_grad_after_step": True},
}

by_name = pytest.mark.parametrize("name", NAMES)
engines = pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])


def start(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def parameters(tensors):
    return [nn.Parameter(t.clone()) for t in tensors]


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


FORMATS = {
    "states32": {"state_dtype": torch.float32},
    "states16": {"state_dtype": torch.bfloat16},
    "int8": {"state_dtype": "int8"},
    "masters": {"master_weights": True},
    "masters-int8-tail": {"master_weights": True, "state_dtype": "int8", "ema_decay": 0.9, "max_grad_norm": 30.0},
    "stochastic": {"stochastic_rounding": True},
    "stochastic-16": {"stochastic_rounding": True, "state_dtype": torch.bfloat16, "ema_decay": 0.5},
}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_formats_are_those_of_the_reference(name, options, formats, dtype):
    """The same random numbers, codes and roundings as in PyTorch: a number may differ by a rounding of float32,
    which a coarse format makes a step of its own, but hardly any does."""
    extra = FORMATS[formats]
    if options.get("amsgrad") and extra.get("state_dtype") == "int8":
        pytest.skip("refused")
    torch.manual_seed(7)
    mine, plain = parameters(start(dtype)), parameters(start(dtype))
    opt = getattr(dlfast.optim, name)(mine, **options, **extra)
    other = getattr(dlfast.optim, name)(plain, **options, **extra, fused=False)
    generator = torch.Generator().manual_seed(2)
    differing = total = 0
    for _ in range(6):
        set_grads(generator, mine, plain)
        opt.step()
        other.step()
    for a, b in zip(mine, plain, strict=True):
        ours, theirs = opt.state[a], other.state[b]
        assert ours.keys() == theirs.keys()
        differing += (~torch.isclose(a, b, rtol=1e-5, atol=1e-6)).sum().item()
        total += a.numel()
        for key, value in theirs.items():
            assert value.dtype == ours[key].dtype
            if key != "step" and value.dtype in (torch.uint8, torch.bfloat16, torch.float16):
                differing += (ours[key] != value).sum().item()
                total += value.numel()
    assert differing <= 0.01 * total


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


@needs_native
@pytest.mark.parametrize(
    "extra", [{"state_dtype": "int8"}, {"state_dtype": torch.bfloat16, "max_grad_norm": 1.0}], ids=str
)
def test_random_rounding_depends_on_seed_but_not_on_threads(extra):
    def run(threads, seed):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (3, 70_001, 64, 90_007)]
        opt = dlfast.optim.AdamW(params, lr=0.01, stochastic_rounding=True, **extra)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                set_grads(generator, params)
                opt.step()
        finally:
            torch.set_num_threads(before)
        return params

    first = run(1, 5)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads, 5), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, run(1, 6), strict=True))


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


@pytest.mark.parametrize("formats", FORMATS)
@by_name
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_run_goes_on_from_its_checkpoint(name, formats, how):
    extra = FORMATS[formats]
    options = {k: v for k, v in OPTIONS[name].items() if k != "amsgrad"}
    params = parameters(start(torch.bfloat16))
    opt = getattr(dlfast.optim, name)(params, **options, **extra)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        set_grads(generator, params)
        opt.step()
    if how == "deepcopy":
        params2, opt2 = copy.deepcopy((params, opt))
    else:
        buffer = io.BytesIO()
        torch.save(opt.state_dict(), buffer)
        buffer.seek(0)
        params2 = parameters([p.detach() for p in params])
        torch.manual_seed(99)
        opt2 = getattr(dlfast.optim, name)(params2, **{**options, "lr": 9.0}, **extra)
        opt2.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        set_grads(generator, params, params2)
        opt.step()
        opt2.step()
    assert all(torch.equal(a, b) for a, b in zip(params, params2, strict=True))
    for a, b in zip(params, params2, strict=True):
        assert all(torch.equal(opt.state[a][k], opt2.state[b][k]) for k in opt.state[a])


@pytest.mark.parametrize("target", [None, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("source", [None, torch.bfloat16, "int8"], ids=str)
def test_states_are_converted_between_formats(source, target):
    tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in start()]
    params = parameters(start())
    opt = dlfast.optim.AdamW(params, state_dtype=source)
    set_grads(torch.Generator().manual_seed(1), params)
    opt.step()
    other = dlfast.optim.AdamW(parameters(tensors), state_dtype=target)
    other.load_state_dict(opt.state_dict())
    error = {None: 0, torch.bfloat16: 2**-8, "int8": 2**-3}
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            values = []
            for o, t in ((opt, p), (other, q)):
                value = o.state[t][name]
                assert value.stride() == t.stride() or not t.numel()
                if value.dtype is torch.uint8:
                    flat = _formats.decode(
                        _formats.in_memory_order(value), o.state[t][name + "_scale"], name == "exp_avg"
                    )
                    value = torch.empty_like(t)
                    _formats.in_memory_order(value).copy_(flat)
                values.append(value.float().contiguous())
            absolute = 0 if source == target else 1e-4  # what lies far below the largest of its block
            torch.testing.assert_close(values[1], values[0], rtol=error[source] + error[target], atol=absolute)
    set_grads(torch.Generator().manual_seed(2), other.param_groups[0]["params"])
    other.step()


def test_state_memory():
    p = nn.Parameter(torch.zeros(300, 1000))
    p.grad = torch.ones_like(p)
    for state_dtype, per_parameter in ((None, 8), (torch.bfloat16, 4), ("int8", 2.1)):
        opt = dlfast.optim.Adam([p], state_dtype=state_dtype)
        opt.step()
        held = sum(v.numel() * v.element_size() for v in opt.state[p].values())
        assert held <= per_parameter * p.numel() + 8
    half = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    opt = dlfast.optim.SGD([half], master_weights=True)
    opt.step()
    assert sum(v.numel() * v.element_size() for v in opt.state[half].values()) == 2000


def test_masters_keep_what_16_bits_lose():
    """1 + 2^-12 is 1 in bfloat16, 256 times of it is 1.0625."""
    for extra, expected in (({}, 1.0), ({"master_weights": True}, 1.0625)):
        p = nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
        p.grad = torch.full_like(p, -(2.0**-12))
        opt = dlfast.optim.SGD([p], lr=1.0, **extra)
        for _ in range(256):
            opt.step()
        assert (p == expected).all()


@engines
def test_shared_gradients_are_cleared_after_all_have_read_them(fused):
    params = parameters([torch.ones(5000), torch.ones(5000)])
    grad = torch.ones(5000)
    for p in params:
        p.grad = grad
    dlfast.optim.SGD(params, lr=1.0, zero_grad_after_step=True, fused=fused).step()
    assert not any(p.any() for p in params)
    assert not grad.any()


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


def test_what_a_format_cannot_hold_is_refused_before_anything_changes():
    double = nn.Parameter(torch.ones(3, dtype=torch.float64))
    gaps = nn.Parameter(torch.ones(3, 4)[:, ::2])
    good = nn.Parameter(torch.ones(3))
    for bad, message in ((double, "is float64"), (gaps, "has gaps in memory")):
        opt = dlfast.optim.Adam([good, bad], state_dtype="int8")
        for p in (good, bad):
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=message):
            opt.step()
        assert not opt.state
    assert torch.equal(good.detach(), torch.ones(3))
    with pytest.raises(ValueError, match="amsgrad"):
        dlfast.optim.Adam([good], amsgrad=True, state_dtype="int8")
    opt = dlfast.optim.Adam([good], state_dtype="int8")
    opt.step()
    opt.param_groups[0]["amsgrad"] = True
    before = good.detach().clone()
    with pytest.raises(ValueError, match="amsgrad"):
        opt.step()
    assert torch.equal(good.detach(), before)


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
