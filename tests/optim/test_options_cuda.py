"""Every option of a step on CUDA, in one pass: against float64, against the CPU, and when it is skipped."""

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
    SIZES,
    assert_same,
    by_name,
    forgive_signs,
    set_grads,
    tolerance,
)
from tests.optim.oracle import Oracle
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS
# An odd tail, a block of int8 states and a bit, more than a unit (4096) of the kernel, nothing at all.
SHAPES = [(37,), (17, 5), (), (0, 2), (259,), (3, 1400)]
STEPS = 4
EXTRAS = {
    "clip": {"max_grad_norm": 20.0, "max_grad_value": 1.5},
    "tail": {"max_grad_norm": 5.0, "ema_decay": 0.9, "zero_grad_after_step": True},
}
FORMATS = {
    "states32": {"state_dtype": torch.float32},
    "states16": {"state_dtype": torch.bfloat16},
    "int8": {"state_dtype": "int8"},
    "masters": {"master_weights": True},
    "masters-int8-tail": {"master_weights": True, "state_dtype": "int8", "ema_decay": 0.9, "max_grad_norm": 30.0},
    "stochastic": {"stochastic_rounding": True},
    "stochastic-16-tail": {"stochastic_rounding": True, "state_dtype": torch.bfloat16, "ema_decay": 0.5},
}


def start(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def parameters(tensors, device="cuda"):
    return [nn.Parameter(t.to(device, copy=True)) for t in tensors]


def make(name, params, options=None, **extra):
    options = dict(OPTIONS[name] if options is None else options)
    if extra.get("state_dtype") == "int8":
        options.pop("amsgrad", None)
    return getattr(dlfast.optim, name)(params, **options, **extra)


def exact(opt, p):
    """The float32 master of a 16-bit parameter."""
    state = opt.state[p]
    if p.dtype is torch.bfloat16:
        return _formats.join_halves(p.detach().cpu(), state["master_low"].cpu())
    return state["master_param"].cpu() if p.dtype is torch.float16 else p.detach().cpu()


def count_differing(opt, params, other_opt, others):
    """How many numbers are not the same, and of how many: a rounding of float32 that falls the other way makes a
    step of its own in a coarse format."""
    differing = total = 0
    for a, b in zip(params, others, strict=True):
        differing += (~torch.isclose(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)).sum().item()
        total += a.numel()
        ours, theirs = opt.state[a], other_opt.state[b]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert value.dtype == ours[key].dtype
            if key == "step":
                assert ours[key].item() == value.item()
            elif key == "master_low":
                masters = [_formats.join_halves(t.detach().cpu(), v.cpu()) for t, v in ((a, ours[key]), (b, value))]
                differing += (~torch.isclose(*masters, rtol=1e-4, atol=1e-5)).sum().item()
                total += value.numel()
            elif value.dtype in (torch.uint8, *LOW):
                differing += (ours[key].cpu() != value.cpu()).sum().item()
                total += value.numel()
            else:
                differing += (~torch.isclose(ours[key].cpu(), value.cpu(), rtol=1e-4, atol=1e-5)).sum().item()
                total += value.numel()
    return differing, total


@pytest.mark.parametrize(
    ("dtype", "extras"),
    [
        *((torch.float32, extras) for extras in EXTRAS),
        (torch.float64, "tail"),
        (torch.bfloat16, "clip"),
        (torch.bfloat16, "tail"),
        (torch.float16, "clip"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_steps_against_float64(name, options, dtype, extras):
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
        opt.grad_scale = torch.tensor(scale, device="cuda")
    for _ in range(STEPS):
        set_grads(generator, mine)
        oracle.step([p.grad.cpu() for p in mine], scale)
        opt.step()
        assert opt.step_was_skipped is False
        if extra.get("zero_grad_after_step"):
            assert not any(p.grad.any() for p in mine)
    bound = tolerance(torch.float64 if dtype is torch.float64 else torch.float32, STEPS)
    results = [exact(opt, p).double() for p in mine]
    if name == "Lion":
        forgive_signs(results, oracle.params, options["lr"], bound)
    assert_same(results, oracle.params, bound)
    assert all((p.cpu() != t).any() for p, t in zip(mine, tensors, strict=True) if p.numel())
    for p in mine:
        if dtype in LOW:
            assert ((p.detach().cpu().float() - exact(opt, p)).abs() <= exact(opt, p).abs() * 2**-8).all()
    if "ema_decay" in extra:
        averages = [opt.state[p]["ema"].cpu().double() for p in mine]
        if name == "Lion":
            forgive_signs(averages, oracle.ema, options["lr"], bound)
        assert_same(averages, oracle.ema, bound)
    if "max_grad_norm" in extra:
        assert opt.grad_norm.is_cuda
        torch.testing.assert_close(opt.grad_norm.cpu().double(), oracle.grad_norm, rtol=1e-6, atol=0)
        assert oracle.grad_norm > extra["max_grad_norm"]  # it did clip


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("formats", FORMATS)
@by_name
def test_formats_are_those_of_the_reference(name, formats, dtype):
    """The same random numbers, codes and roundings as in plain PyTorch on the CPU."""
    torch.manual_seed(7)
    mine, plain = parameters(start(dtype)), parameters(start(dtype), "cpu")
    opt, other = make(name, mine, **FORMATS[formats]), make(name, plain, **FORMATS[formats], fused=False)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        set_grads(generator, mine, plain)
        opt.step()
        other.step()
    differing, total = count_differing(opt, mine, other, plain)
    assert differing <= 0.01 * total


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_size_and_alignment(name, offset, dtype):
    """With all that one pass does; what lies around the tensors is left as it is."""
    extra = {"ema_decay": 0.5, "max_grad_norm": 5.0, "max_grad_value": 1.2, "zero_grad_after_step": True}
    if dtype in LOW:
        extra |= {"master_weights": True, "state_dtype": "int8"}
    elif dtype is torch.float32:
        extra |= {"state_dtype": torch.bfloat16}
    torch.manual_seed(7)
    whole = [t.cuda() for t in start(dtype, [(n + offset + 16,) for n in SIZES])]
    guarded = [w.clone() for w in whole]
    params = [g[offset : offset + n].requires_grad_() for g, n in zip(guarded, SIZES, strict=True)]
    plain = [nn.Parameter(w[offset : offset + n].cpu()) for w, n in zip(whole, SIZES, strict=True)]
    opt, other = make(name, params, **extra), make(name, plain, **extra, fused=False)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        gradients = []
        for p, q in zip(params, plain, strict=True):
            grad = torch.randn(p.numel() + offset + 3, generator=generator).to(dtype)
            gradients.append(grad.cuda())
            p.grad, q.grad = gradients[-1][offset : offset + p.numel()], grad[offset : offset + p.numel()].clone()
            grads_around = gradients[-1].clone()
            grads_around[offset : offset + p.numel()] = 0
            gradients[-1] = (gradients[-1], grads_around)
        opt.step()
        other.step()
        assert all(torch.equal(after, around) for after, around in gradients)
    differing, total = count_differing(opt, params, other, plain)
    assert differing <= (0 if dtype is torch.float64 else 0.01) * total
    for g, w, n in zip(guarded, whole, SIZES, strict=True):
        assert torch.equal(g[:offset], w[:offset])
        assert torch.equal(g[offset + n :], w[offset + n :])


@by_name
@pytest.mark.parametrize("skipped", [{0}, {0, 1}, {2}], ids=str)
@pytest.mark.parametrize("how", ["found_inf", "itself", "itself-clip"])
def test_skipped_steps_change_nothing_but_clear_gradients(name, skipped, how):
    extra = {"ema_decay": 0.9, "zero_grad_after_step": True}
    if how == "itself-clip":
        extra |= {"max_grad_norm": 5.0, "state_dtype": torch.bfloat16}
    tensors = start()
    torch.manual_seed(3)
    mine, clean = parameters(tensors), parameters(tensors)
    opt, clean_opt = make(name, mine, **extra), make(name, clean, **extra)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        set_grads(generator, clean, mine)
        opt.grad_scale = torch.tensor(4.0, device="cuda")
        if how == "found_inf":
            opt.found_inf = torch.tensor(float(step in skipped), device="cuda")
        for p in mine:
            p.grad.mul_(4)
        if step in skipped:
            mine[5].grad[1, 1300] = float("inf") if step else float("nan")
        norm = opt.grad_norm
        before = [p.detach().clone() for p in mine], [copy.deepcopy(opt.state.get(p, {})) for p in mine]
        opt.step()
        assert opt.step_was_skipped is (step in skipped)
        assert not any(p.grad.any() for p in mine)
        if step not in skipped:
            clean_opt.step()
            continue
        if how == "itself-clip":  # of the last step taken
            assert opt.grad_norm.isnan() if norm is None or norm.isnan() else torch.equal(opt.grad_norm, norm)
        assert all(torch.equal(a, b) for a, b in zip(mine, before[0], strict=True))
        for p, entry in zip(mine, before[1], strict=True):
            assert all(torch.equal(opt.state[p][key], value) for key, value in entry.items())
    # Rounding at random, with the same numbers: a skipped step draws none.
    differing, total = count_differing(opt, mine, clean_opt, clean)
    assert differing <= 0.005 * total
    if how != "itself-clip":
        assert_same(mine, clean, 1e-5)
    assert opt._random_steps_taken() == (4 - len(skipped) if how == "itself-clip" else 0)


@by_name
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("way", ["to-cuda", "to-cpu"])
def test_a_run_goes_on_on_the_other_device(name, formats, way):
    torch.manual_seed(7)
    tensors = start(torch.bfloat16)
    whole, first = parameters(tensors, "cpu"), parameters(tensors, "cpu" if way == "to-cuda" else "cuda")
    opt, first_opt = make(name, whole, **FORMATS[formats]), make(name, first, **FORMATS[formats])
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        set_grads(generator, whole, first)
        opt.step()
        first_opt.step()
    saved = io.BytesIO()
    torch.save(first_opt.state_dict(), saved)
    saved.seek(0)
    torch.manual_seed(99)
    second = parameters(first, "cuda" if way == "to-cuda" else "cpu")
    second_opt = make(name, second, **FORMATS[formats])
    second_opt.load_state_dict(torch.load(saved, weights_only=True))
    for _ in range(2):
        set_grads(generator, whole, second)
        opt.step()
        second_opt.step()
    differing, total = count_differing(second_opt, second, opt, whole)
    assert differing <= 0.02 * total


@by_name
@pytest.mark.parametrize("tensors", [28, 29, 70])
def test_norm_is_over_all_tensors_groups_and_dtypes(name, tensors):
    """In arguments and, beyond what they hold, in device memory; two dtypes take two launches each."""
    values = [t.to(torch.float64 if i % 2 else torch.float32)
              for i, t in enumerate(start(shapes=[(1 + 97 * i % 450,) for i in range(tensors)]))]  # fmt: skip
    mine = parameters(values)
    groups = [{"params": mine[g::3], "lr": 0.01 * (g + 1)} for g in range(3)]
    opt = make(name, groups, max_grad_norm=2.0, ema_decay=0.5)
    plain = parameters(values, "cpu")
    other = make(name, [{"params": plain[g::3], "lr": 0.01 * (g + 1)} for g in range(3)],
                 max_grad_norm=2.0, ema_decay=0.5, fused=False)  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        set_grads(generator, mine, plain)
        opt.step()
        other.step()
        torch.testing.assert_close(opt.grad_norm.cpu(), other.grad_norm, rtol=1e-6, atol=0)
    assert opt.grad_norm.dtype is torch.float32
    assert_same(mine, plain, tolerance(torch.float32, 2))
    assert_same([opt.state[p]["ema"] for p in mine], [other.state[p]["ema"] for p in plain], 1e-5)


def test_norm_of_float64_is_float64_and_holds_large_and_small_numbers():
    for dtype, value in ((torch.float64, 1e200), (torch.float32, 1e30), (torch.float32, 1e-30), (torch.bfloat16, 1e30)):
        p = nn.Parameter(torch.zeros(300, dtype=dtype, device="cuda"))
        p.grad = torch.full_like(p, value)
        opt = dlfast.optim.SGD([p], lr=0.0, max_grad_norm=float("inf"))
        opt.step()
        expected = torch.linalg.vector_norm(p.grad.double().cpu() / value) * value
        if dtype is torch.float64:
            assert opt.grad_norm.dtype is torch.float64
            expected = torch.tensor(float("inf"), dtype=torch.float64)  # its square overflows
        torch.testing.assert_close(opt.grad_norm.cpu().double(), expected, rtol=1e-6, atol=0)


def test_infinite_norm_acts_as_clip_grad_norm_():
    for value in (float("inf"), float("nan")):
        p, q = parameters([torch.ones(20)] * 2)
        p.grad = torch.ones(20, device="cuda")
        p.grad[3] = value
        q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_([q], 1.0)
        torch.optim.SGD([q], lr=1.0).step()
        opt = dlfast.optim.SGD([p], lr=1.0, max_grad_norm=1.0)
        opt.step()
        torch.testing.assert_close(p.detach(), q.detach(), equal_nan=True)
        assert not opt.grad_norm.isfinite()
        assert opt.step_was_skipped is False


@by_name
def test_no_wait_for_the_device(name):
    params = parameters(start(torch.bfloat16))
    lr = torch.tensor(0.1, device="cuda")
    opt = make(name, params, {**OPTIONS[name], "lr": lr}, max_grad_norm=1.0, ema_decay=0.5, max_grad_value=3.0,
               state_dtype="int8", master_weights=True, zero_grad_after_step=True)  # fmt: skip
    opt.grad_scale = torch.tensor(2.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.step_was_skipped is False
    assert all((p.cpu() != t).any() for p, t in zip(params, start(torch.bfloat16), strict=True) if p.numel())


def test_shared_gradients_are_cleared_after_all_have_read_them():
    params = parameters([torch.ones(5000), torch.ones(5000)])
    grad = torch.ones(5000, device="cuda")
    for p in params:
        p.grad = grad
    dlfast.optim.SGD(params, lr=1.0, zero_grad_after_step=True).step()
    assert not any(p.any() for p in params)
    assert not grad.any()


@by_name
def test_parameters_that_share_memory_and_layouts_with_gaps(name):
    extra = {"ema_decay": 0.5, "max_grad_norm": 1.0, "zero_grad_after_step": True}
    image = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    built = []
    for device, fused in (("cuda", None), ("cpu", False)):
        storage = torch.arange(80.0, device=device) / 80
        params = [
            storage[:40].requires_grad_(),
            storage[20:].requires_grad_(),
            image.to(device, copy=True).to(memory_format=torch.channels_last).requires_grad_(),
            image.to(device, copy=True)[:, ::2, :, 1:].requires_grad_(),
        ]
        built.append((params, make(name, params, **extra, fused=fused)))
    (mine, opt), (plain, other) = built
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        set_grads(generator, mine, plain)
        opt.step()
        other.step()
        assert not any(p.grad.any() for p in mine)
    assert_same(mine, plain, tolerance(torch.float32, 2))
    assert_same([opt.state[p]["ema"] for p in mine], [other.state[p]["ema"] for p in plain], 1e-5)
    torch.testing.assert_close(opt.grad_norm.cpu(), other.grad_norm, rtol=1e-6, atol=0)


@by_name
def test_parameters_on_both_devices(name):
    extra = {"ema_decay": 0.5, "max_grad_norm": 1.0, "state_dtype": torch.bfloat16}
    tensors = start()
    torch.manual_seed(3)
    mine = [nn.Parameter(t.to("cuda" if i % 2 else "cpu", copy=True)) for i, t in enumerate(tensors)]
    plain = parameters(tensors, "cpu")
    opt, other = make(name, mine, **extra), make(name, plain, **extra, fused=False)
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        set_grads(generator, mine, plain)
        opt.grad_scale = other.grad_scale = torch.tensor(1.0)
        if step == 1:
            mine[1].grad[0, 0] = plain[1].grad[0, 0] = float("inf")
        opt.step()
        other.step()
        assert opt.step_was_skipped is (step == 1)
    differing, total = count_differing(opt, mine, other, plain)
    assert differing <= 0.01 * total


def test_step_in_backward():
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2))
    gpu = copy.deepcopy(model).cuda()
    opt, other = (
        dlfast.optim.AdamW(m.parameters(), lr=0.01, ema_decay=0.5, state_dtype=torch.float32) for m in (gpu, model)
    )
    with dlfast.optim.step_in_backward(opt), dlfast.optim.step_in_backward(other):
        for _ in range(2):
            x = torch.randn(8, 4, generator=generator)
            gpu(x.cuda()).square().sum().backward()
            model(x).square().sum().backward()
    assert_same(list(gpu.parameters()), list(model.parameters()), 1e-4)


@pytest.mark.gpu_only
@by_name
@pytest.mark.parametrize("tensors", [5, 100])
def test_graph_capture(name, tensors):
    """Replays draw new random numbers, find infinities and tell the norm on their own."""
    extra = {"max_grad_norm": 1.0, "ema_decay": 0.5, "state_dtype": torch.bfloat16, "max_grad_value": 2.0}
    torch.manual_seed(5)
    values = start(shapes=[(11 + 97 * i % 700,) for i in range(tensors)])
    mine, plain = parameters(values), parameters(values, "cpu")
    opt, other = make(name, mine, **extra), make(name, plain, **extra, fused=False)
    opt.grad_scale = torch.tensor(2.0, device="cuda")
    other.grad_scale = torch.tensor(2.0)
    set_grads(torch.Generator().manual_seed(2), mine, plain)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for step in range(3):
        kept = mine[0].grad.clone()
        if step == 1:
            mine[0].grad[2] = float("inf")
        graph.replay()
        mine[0].grad.copy_(kept)
        assert opt.step_was_skipped is (step == 1)
        if step != 1:
            other.step()
    differing, total = count_differing(opt, mine, other, plain)
    assert differing <= 0.02 * total
    torch.testing.assert_close(opt.grad_norm.cpu(), other.grad_norm, rtol=1e-6, atol=0)
