"""The optimizers on CUDA: the numbers of torch.optim on the CPU, and no wait for the host."""

import copy

import pytest
import torch
from torch import nn

import dlfast.optim
from tests.optim.cases import CASE_IDS, CASES, NAMES, OPTIONS, SIZES, TORCH_NAMES, assert_same, set_grads, tolerance
from tests.support.native import CUDA_KERNELS

pytestmark = CUDA_KERNELS
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(37,), (5, 3), (), (0, 2), (4100,)]
by_name = pytest.mark.parametrize("name", TORCH_NAMES)


def start(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def runs(name, options, tensors):
    """On the CPU in plain PyTorch (torch.optim where it rounds as we do), and on CUDA."""
    cpu = [nn.Parameter(t.clone()) for t in tensors]
    gpu = [nn.Parameter(t.cuda()) for t in tensors]
    plain = tensors[0].dtype in (torch.bfloat16, torch.float16) or name not in TORCH_NAMES
    oracle = getattr(dlfast.optim if plain else torch.optim, name)
    cpu_opt = oracle(cpu, fused=False, **options) if plain else oracle(cpu, **options)
    return (cpu, cpu_opt), (gpu, getattr(dlfast.optim, name)(gpu, **options))


def bound(dtype, steps):
    low = dtype in (torch.bfloat16, torch.float16)
    return 2 * torch.finfo(dtype).eps if low else tolerance(dtype, steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_same_numbers_as_the_cpu(name, options, dtype):
    (cpu, cpu_opt), (gpu, opt) = runs(name, options, start(dtype))
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        set_grads(generator, cpu, gpu)
        cpu_opt.step()
        opt.step()
    assert_same(gpu, cpu, bound(dtype, 5))
    for a, b in zip(gpu, cpu, strict=True):
        for key, value in cpu_opt.state[b].items():
            assert_same([opt.state[a][key]], [value], bound(dtype, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "LAMB"])
def test_every_size_and_alignment(name, offset, dtype):
    whole = [t.cuda() for t in start(dtype, [(n + offset + 16,) for n in SIZES])]
    guarded = [w.clone() for w in whole]
    params = [g[offset : offset + n].requires_grad_() for g, n in zip(guarded, SIZES, strict=True)]
    cpu = [nn.Parameter(w[offset : offset + n].cpu()) for w, n in zip(whole, SIZES, strict=True)]
    opt = getattr(dlfast.optim, name)(params, **OPTIONS[name])
    cpu_opt = getattr(dlfast.optim, name)(cpu, fused=False, **OPTIONS[name])
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for p, q in zip(params, cpu, strict=True):
            grad = torch.randn(p.numel() + offset, generator=generator).to(dtype)
            p.grad, q.grad = grad.cuda()[offset:], grad[offset:]
        opt.step()
        cpu_opt.step()
    assert_same(params, cpu, bound(dtype, 2))
    for g, w, n in zip(guarded, whole, SIZES, strict=True):
        assert torch.equal(g[:offset], w[:offset])
        assert torch.equal(g[offset + n :], w[offset + n :])


@by_name
@pytest.mark.parametrize(("tensors", "groups"), [(44, 8), (45, 1), (20, 9), (130, 13)])
def test_any_number_of_tensors_and_groups(name, tensors, groups):
    """Around what kernel arguments hold; beyond it the table lies in device memory."""
    values = start(shapes=[(1 + 7 * i % 50,) for i in range(tensors)])
    built = []
    for lib, device in ((torch.optim, "cpu"), (dlfast.optim, "cuda")):
        params = [nn.Parameter(t.to(device)) for t in values]
        split = [{"params": params[g::groups], "lr": 0.01 * (g + 1)} for g in range(groups)]
        built.append((params, getattr(lib, name)(split, **OPTIONS[name])))
    (cpu, cpu_opt), (gpu, opt) = built
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        set_grads(generator, cpu, gpu)
        cpu_opt.step()
        opt.step()
    assert_same(gpu, cpu, tolerance(torch.float32, 3))


@by_name
@pytest.mark.parametrize("skipped", [{0}, {0, 1}, {2}], ids=str)
def test_skipped_step_changes_nothing(name, skipped):
    (clean, clean_opt), (gpu, opt) = runs(name, OPTIONS[name], start())
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        set_grads(generator, clean, gpu)
        opt.grad_scale = torch.tensor(4.0, device="cuda")
        opt.found_inf = torch.tensor(float(step in skipped), device="cuda")
        for p in gpu:
            p.grad.mul_(4)
        before = [p.detach().clone() for p in gpu], copy.deepcopy(opt.state_dict())
        if step in skipped:
            gpu[0].grad[3] = float("inf")
        opt.step()
        if step not in skipped:
            clean_opt.step()
            continue
        assert all(torch.equal(a, b) for a, b in zip(gpu, before[0], strict=True))
        after = opt.state_dict()["state"]
        for i, entry in before[1]["state"].items():
            assert all(torch.equal(after[i][key], value) for key, value in entry.items())
        if step == 0 and name != "Adagrad":  # as good as no state; torch makes Adagrad's at construction
            assert name != "SGD" or not after
            assert all(not value.any() for entry in after.values() for value in entry.values())
    assert_same(gpu, clean, tolerance(torch.float32, 5))
    if name not in ("SGD", "Lion"):
        assert all(s["step"] == 5 - len(skipped) for s in opt.state.values())


@by_name
def test_skipped_first_steps_without_a_look_at_the_state(name):
    """state_dict looks at the device; here nobody does between the skipped first steps and the others."""
    (clean, clean_opt), (gpu, opt) = runs(name, OPTIONS[name], start())
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        set_grads(generator, clean, gpu)
        opt.found_inf = torch.tensor(float(step < 2), device="cuda")
        opt.step()
        if step >= 2:
            clean_opt.step()
    assert_same(gpu, clean, tolerance(torch.float32, 3))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@by_name
def test_grad_scaler_and_scheduler(name):
    (cpu, cpu_opt), (gpu, opt) = runs(name, OPTIONS[name], start())
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)  # the first step overflows: schedulers warn
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (cpu_opt, opt)]
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        set_grads(generator, cpu, gpu)
        loss = sum((p * p.grad.clone()).sum() for p in gpu)
        if step in (0, 2):
            loss = loss * float("inf")
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        if step not in (0, 2):
            cpu_opt.step()
        for scheduler in schedulers:
            scheduler.step()
    assert scaler.get_scale() == 16
    assert_same(gpu, cpu, tolerance(torch.float32, 5))


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_lr_is_read_on_the_device(name, dtype):
    (cpu, cpu_opt), (gpu, opt) = runs(name, OPTIONS[name], start())
    opt.param_groups[0]["lr"] = lr = torch.tensor(0.1, dtype=dtype, device="cuda")
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3, device="cuda"))], "lr": 0.5})
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        set_grads(generator, cpu, gpu)
        lr.fill_(0.1 * (step + 1))
        cpu_opt.param_groups[0]["lr"] = 0.1 * (step + 1)
        cpu_opt.step()
        opt.step()
    assert_same(gpu, cpu, tolerance(torch.float32, 3))


@by_name
def test_no_wait_for_the_device(name):
    params = [nn.Parameter(t.cuda()) for t in start()]
    lr = torch.tensor(0.1, device="cuda")
    opt = getattr(dlfast.optim, name)(params, **{**OPTIONS[name], "lr": lr})
    for p in params:
        p.grad = torch.ones_like(p)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0, device="cuda"), torch.tensor(0.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all((p.cpu() != t).all() for p, t in zip(params, start(), strict=True))


@by_name
def test_run_continues_in_torch_on_the_cpu_and_back(name):
    (cpu, cpu_opt), (gpu, opt) = runs(name, OPTIONS[name], start())
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        set_grads(generator, cpu, gpu)
        cpu_opt.step()
        opt.step()
    saved, expected = opt.state_dict(), cpu_opt.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    for i, entry in expected["state"].items():
        assert entry.keys() == saved["state"][i].keys()
        if name != "SGD":
            assert saved["state"][i]["step"].device.type == "cpu"
    cpu_opt.load_state_dict(saved)
    opt.load_state_dict(expected)
    for _ in range(2):
        set_grads(generator, cpu, gpu)
        cpu_opt.step()
        opt.step()
    assert_same(gpu, cpu, tolerance(torch.float32, 4))


@by_name
def test_layouts_devices_and_streams(name):
    image = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    mine = [
        image.cuda().to(memory_format=torch.channels_last).requires_grad_(),
        matrix.cuda()[::2, 1::3].requires_grad_(),
        nn.Parameter(matrix.clone()),
    ]
    theirs = [nn.Parameter(t.clone()) for t in (image, matrix[::2, 1::3], matrix)]
    opt = getattr(dlfast.optim, name)(mine, **OPTIONS[name])
    torch_opt = getattr(torch.optim, name)(theirs, **OPTIONS[name])
    generator = torch.Generator().manual_seed(3)
    stream = torch.cuda.Stream()
    for _ in range(3):
        set_grads(generator, theirs, mine)
        torch_opt.step()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            opt.step()
        stream.synchronize()
    assert_same(mine, theirs, tolerance(torch.float32, 3))


@pytest.mark.gpu_only
@by_name
@pytest.mark.parametrize("tensors", [5, 100])
def test_graph_capture(name, tensors):
    values = start(shapes=[(11 + i,) for i in range(tensors)])
    (cpu, cpu_opt), (gpu, opt) = runs(name, OPTIONS[name], values)
    generator = torch.Generator().manual_seed(2)
    set_grads(generator, cpu, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    cpu_opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for _ in range(3):
        graph.replay()
        cpu_opt.step()
    assert_same(gpu, cpu, tolerance(torch.float32, 4))
