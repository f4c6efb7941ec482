"""Optimizers: the same numbers as torch.optim and as the reference, whatever the shape and layout."""

import pytest
import torch
from torch import nn

import dlfast.optim
from tests.optim.cases import (
    CASE_IDS,
    CASES,
    LOW,
    NAMES,
    OPTIONS,
    SIZES,
    STEPS,
    TORCH_CASES,
    TORCH_IDS,
    TORCH_NAMES,
    assert_same,
    forgive_signs,
    pair,
    set_grads,
    tolerance,
)
from tests.support.native import needs_native

FULL = [torch.float32, torch.float64]
SHAPES = [(3,), (17, 5), (4, 3, 3, 3), (), (0, 4), (1500,), (2, 1030)]


def tensors(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.float32, None), (torch.float64, None), (torch.float64, False)], ids=str
)
@pytest.mark.parametrize(("name", "options"), TORCH_CASES, ids=TORCH_IDS)
def test_same_numbers_as_torch(name, options, dtype, fused):
    start = tensors(dtype)
    (theirs, torch_opt), (mine, opt) = pair(name, options, start, fused=fused)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        set_grads(generator, theirs, mine)
        torch_opt.step()
        opt.step()
    assert_same(mine, theirs, tolerance(dtype))
    assert all((m != s).any() for m, s in zip(mine, start, strict=True) if m.numel())
    for a, b in zip(mine, theirs, strict=True):
        ours, other = opt.state[a], torch_opt.state[b]
        assert set(ours) == set(other)
        for key, value in other.items():
            assert_same([ours[key]], [value], tolerance(dtype))


# The reference rounds where the kernels do, so that only a value within float32 rounding of a tie can fall
# to the other neighbour: one unit in the last place, carried along by the following steps. A different
# rounding would leave hardly any value the same after so many steps.
@needs_native
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_16_bit_rounds_as_the_reference(name, options, dtype):
    start = tensors(dtype)
    plain = [nn.Parameter(t.clone()) for t in start]
    mine = [nn.Parameter(t.clone()) for t in start]
    plain_opt = getattr(dlfast.optim, name)(plain, fused=False, **options)
    opt = getattr(dlfast.optim, name)(mine, **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        set_grads(generator, plain, mine)
        plain_opt.step()
        opt.step()
    if name == "Lion":
        forgive_signs(mine, plain, options["lr"], 2 * torch.finfo(dtype).eps, at_most=20)
    assert_same(mine, plain, 2 * torch.finfo(dtype).eps)
    same = sum((a == b).sum().item() for a, b in zip(mine, plain, strict=True))
    assert same >= 0.9 * sum(p.numel() for p in mine)


# torch rounds after every operation, we once: eight roundings of half a unit each for ten steps.
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("name", "options"), TORCH_CASES, ids=TORCH_IDS)
def test_16_bit_stays_near_torch(name, options, dtype):
    (theirs, torch_opt), (mine, opt) = pair(name, options, tensors(dtype))
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        set_grads(generator, theirs, mine)
        torch_opt.step()
        opt.step()
    assert_same(mine, theirs, tolerance(dtype, 10) / 2)


@needs_native
@pytest.mark.parametrize("dtype", FULL + LOW, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_size_and_alignment(name, offset, dtype):
    """Each size alone in its step, so that it is first and last tensor; guards catch overruns."""
    options = OPTIONS[name]
    generator = torch.Generator().manual_seed(3)
    for size in SIZES:
        whole = torch.randn(size + offset + 16, generator=generator).to(dtype)
        guarded = whole.clone()
        p = guarded[offset : offset + size].requires_grad_()
        q = whole[offset : offset + size].clone().requires_grad_()
        grads = torch.randn(2, size + offset + 1, generator=generator).to(dtype)
        opt = getattr(dlfast.optim, name)([p], **options)
        plain = getattr(dlfast.optim, name)([q], fused=False, **options)
        for g in grads:
            p.grad, q.grad = g[offset : offset + size], g[offset : offset + size].clone()
            opt.step()
            plain.step()
        assert_same([p], [q], 4 * torch.finfo(dtype).eps)
        assert torch.equal(guarded[:offset], whole[:offset])
        assert torch.equal(guarded[offset + size :], whole[offset + size :])


@needs_native
def test_result_does_not_depend_on_threads_or_neighbours():
    def run(threads, split):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n)) for n in SIZES + [70_001]]
        for p in params:
            p.grad = torch.randn_like(p)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            opts = [dlfast.optim.AdamW([p]) for p in params] if split else [dlfast.optim.AdamW(params)]
            for _ in range(3):
                for opt in opts:
                    opt.step()
        finally:
            torch.set_num_threads(before)
        return params

    alone = run(1, True)
    for threads in (1, 2, 3):
        together = run(threads, False)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def layouts():
    torch.manual_seed(4)
    image = torch.randn(6, 5, 4, 4)
    return {
        "channels_last": image.to(memory_format=torch.channels_last),
        "transposed": torch.randn(20, 30).t(),
        "strided": torch.randn(40, 50)[::2, 1::3],
        "column": torch.randn(33, 2)[:, 0],
        "ones": torch.randn(1, 7, 1).as_strided((1, 7, 1), (9, 1, 5)),
    }


@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "like", "expanded", "reversed"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_layouts_of_parameter_and_gradient(name, layout, grad_layout, fused):
    base = layouts()[layout]
    options = OPTIONS[name]
    mine = base.detach().requires_grad_()
    theirs = base.clone().contiguous().requires_grad_()
    opt = getattr(dlfast.optim, name)([mine], fused=fused, **options)
    torch_opt = getattr(torch.optim, name)([theirs], **options)
    for step in range(3):
        g = torch.randn(base.shape, generator=torch.Generator().manual_seed(step))
        if grad_layout == "expanded":
            g = g.flatten()[:1].view((1,) * base.dim()).expand(base.shape)
        theirs.grad = g.contiguous()
        if grad_layout == "like":
            g = torch.empty_strided(base.shape, base.stride()).copy_(g)
        elif grad_layout == "reversed":
            g = g.permute(*reversed(range(g.dim()))).contiguous().permute(*reversed(range(g.dim())))
        mine.grad = g
        opt.step()
        torch_opt.step()
    assert mine.stride() == base.stride()
    assert_same([mine], [theirs], tolerance(torch.float32, 3))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_groups_dtypes_and_missing_gradients(name):
    """Groups with their own options, several dtypes, and parameters that get their first gradient late."""
    start = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (5, 40, 1030, 7)]
    start += [t.double() for t in start]

    def build(lib):
        params = [nn.Parameter(t.clone()) for t in start]
        extra = [{"momentum": 0.9}, {}, {"momentum": 0.5, "maximize": True}]
        if name == "AdamW":
            extra = [{"amsgrad": True}, {"betas": (0.7, 0.8)}, {"weight_decay": 0.3, "maximize": True}]
        groups = [dict(params=params[i::3], lr=0.05 * (i + 1), **options) for i, options in enumerate(extra)]
        return params, getattr(lib, name)(groups, lr=0.1)

    theirs, torch_opt = build(torch.optim)
    mine, opt = build(dlfast.optim)
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        set_grads(generator, theirs, mine)
        for params in (theirs, mine):
            params[step % 8].grad = None
            if step < 7:
                params[3].grad = params[6].grad = None
        torch_opt.step()
        opt.step()
    assert_same(mine, theirs, tolerance(torch.float32))
    for a, b in zip(mine, theirs, strict=True):
        if name == "AdamW":
            assert opt.state[a]["step"] == torch_opt.state[b]["step"]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_parameters_that_share_memory_step_one_after_the_other(name):
    options = OPTIONS[name]
    results = []
    for lib in (torch.optim, dlfast.optim):
        memory = torch.linspace(-1, 1, 5000)
        params = [memory[:4000].requires_grad_(), memory[1000:].requires_grad_()]
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        opt = getattr(lib, name)(params, **options)
        opt.step()
        opt.step()
        results.append(memory)
    assert_same([results[1]], [results[0]], tolerance(torch.float32, 4))


@needs_native
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_infinities_and_nan_pass_as_in_torch(name):
    options = OPTIONS[name]
    start = torch.tensor([1.0, float("inf"), -float("inf"), float("nan"), 2.0, 0.0, -0.0, 1e-42, 3.0])
    grad = torch.tensor([float("nan"), 1.0, 1.0, 1.0, float("inf"), -float("inf"), 0.0, 1e-42, 1e30])
    (theirs, torch_opt), (mine, opt) = pair(name, options, [start])
    for _ in range(3):
        for params in (theirs, mine):
            params[0].grad = grad.clone()
        torch_opt.step()
        opt.step()
    torch.testing.assert_close(mine[0].detach(), theirs[0].detach(), equal_nan=True)


@needs_native
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_16_bit_number_is_read_and_rounded_right(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    p = bits.clone().requires_grad_()
    p.grad = torch.zeros_like(p)
    dlfast.optim.SGD([p], lr=1.0).step()
    torch.testing.assert_close(p.detach(), bits, rtol=0, atol=0, equal_nan=True)
    # Sums of two neighbours lie half way: ties and overflow.
    p = bits.clone().requires_grad_()
    p.grad = -(bits.roll(1))
    dlfast.optim.SGD([p], lr=0.5).step()
    expected = (bits.float() + 0.5 * bits.roll(1).float()).to(dtype)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0, equal_nan=True)
