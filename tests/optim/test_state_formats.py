"""Steps in every number format: against the reference, over checkpoints, and what they take of memory."""

import copy
import io

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
    by_name,
    parameters,
    set_grads,
    start,
)
from tests.support.native import needs_native

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
