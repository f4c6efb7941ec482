"""The fused block inside the rest of PyTorch: compile, export, autocast, DDP, copying; what it saves."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from torch import nn

import dlfast
from dlfast import reference
from tests.functional import cases
from tests.functional.cases import Case
from tests.support.autograd import saved_bytes
from tests.support.native import needs_native


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ["direct", "pytorch"])
def test_bytes_saved_for_backward(plan, dtype, monkeypatch):
    monkeypatch.setenv("DLFAST_ALGORITHM", plan)
    case = Case(n=4, c=3, k=16, h=34, w=34, conv={"padding": 1})
    tensors = [t.requires_grad_() for t in cases.integers(case, dtype)]

    def kept(**options):
        return saved_bytes(lambda *t: dlfast.conv_relu_pool2d(*t, padding=1, **options), *tensors)

    for window, stride in [(2, 2), (3, 2), (15, 4)]:
        bytes_kept, output = kept(pool_size=window, pool_stride=stride)
        assert bytes_kept == output.numel()
    convolved = 4 * 16 * 34 * 34
    assert kept(pool="avg")[0] == convolved // 8
    assert kept(pool="avg", activation=None)[0] == 0
    bytes_kept, output = kept(pool=None)
    assert bytes_kept == output.untyped_storage().nbytes()


@needs_native
def test_nothing_is_saved_without_gradients():
    case = Case(conv={"padding": 1})
    input, weight, bias = cases.integers(case, torch.float32)
    output, winner_mask = torch.ops.dlfast._conv_relu_pool2d(
        input, weight, bias, [1, 1], [1, 1], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False, False
    )
    assert winner_mask.numel() == 0
    with torch.no_grad():
        assert torch.equal(output, dlfast.conv_relu_pool2d(input, weight, bias, padding=1))


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.SAMPLE, ids=str)
def test_opcheck(case, dtype, layout):
    input, weight, bias = cases.integers(case, dtype)
    tensors = [t.requires_grad_() for t in (cases.in_layout(input, layout), weight, bias)]
    torch.library.opcheck(torch.ops.dlfast.conv_relu_pool2d.default, tensors, case.options)


@needs_native
@pytest.mark.parametrize("options", [{}, {"pool": "avg"}, {"pool": None}], ids=str)
def test_opcheck_of_the_pass_after(options):
    z = torch.randn(2, 5, 8, 9, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    pool = options.get("pool", "max")
    window = ["relu", pool, [3, 3], [2, 2], [1, 1], True]
    forward = torch.ops.dlfast._relu_pool2d.default
    torch.library.opcheck(forward, (z, bias, *window, True))
    output, winner_mask = forward(z.detach(), bias.detach(), *window, True)
    winner_mask = output if pool is None else winner_mask
    grad = torch.randn_like(output, requires_grad=True)
    torch.library.opcheck(torch.ops.dlfast._relu_pool2d_backward.default, (grad, winner_mask, [8, 9], *window))
    torch.library.opcheck(
        torch.ops.dlfast._relu_pool2d_transpose.default,
        (torch.randn_like(z, requires_grad=True), winner_mask, *window),
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = dlfast.nn.ConvReLUPool2d(3, 8, 3, padding=1)
        self.second = dlfast.nn.ConvReLU2d(8, 8, 3)
        self.third = dlfast.nn.ConvPool2d(8, 4, 3, padding="same", pool="avg")

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 16, 16)
    expected = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for grad, wanted in zip(gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.slow
def test_compile_inductor():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 3, 16, 16)
    expected = gradients(model, x)
    for grad, wanted in zip(gradients(torch.compile(model, fullgraph=True), x), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_export():
    model, x = Net().eval(), torch.randn(2, 3, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    larger = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(larger), model(larger))


def test_deepcopy_and_pickle():
    model, x = Net(), torch.randn(2, 3, 16, 16)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), model(x))
        assert str(other) == str(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer = dlfast.nn.ConvReLUPool2d(3, 8, 3, padding=1)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    plain[0].load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=dtype):
        output, expected = layer(x), plain(x)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


def test_double_backward_matches_reference():
    case = Case(conv={"padding": 1})
    results = []
    for function in (dlfast.conv_relu_pool2d, reference.conv_relu_pool2d):
        input, weight, bias = (t.requires_grad_() for t in cases.normals(case, torch.float64))
        output = function(input, weight, bias, padding=1)
        (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
        grad.square().sum().backward()
        results.append([input.grad, weight.grad])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_functional_transforms():
    model, x = Net(), torch.randn(2, 3, 16, 16)
    expected = gradients(model, x)
    parameters = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    for grad, wanted in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_checkpointing():
    model, x = Net(), torch.randn(2, 3, 16, 16)
    expected = gradients(model, x)
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, wanted)


def _ddp_worker(rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = dlfast.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    # By value: a tensor in a queue is shared memory that dies with this process.
    results.put((rank, [p.detach().numpy().copy() for p in model.parameters()]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel():
    """Two processes with different data stay on the same parameters, which have moved."""
    with __import__("socket").socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_ddp_worker, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    by_rank = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    torch.manual_seed(0)
    for first, second, start in zip(by_rank[0], by_rank[1], Net().parameters(), strict=True):
        assert (first == second).all()
        assert (first != start.detach().numpy()).any()


def test_import_is_light():
    """`import dlfast` computes for at most 0.3 s beside `import torch`, and brings in nothing of the program."""
    code = (
        "import time, torch, sys; start = time.process_time(); import dlfast; "
        "print(time.process_time() - start); "
        "print([m for m in ('torchvision', 'pytorch_lightning', 'matplotlib', 'sklearn', 'rich') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout.split()[0]) for run in runs) <= 0.3
    assert {run.stdout.splitlines()[1] for run in runs} == {"[]"}
