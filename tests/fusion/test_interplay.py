"""Fused models in the rest of PyTorch and around it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dlfast
from dlfast.app.measure import saved_bytes
from tests.fusion.helpers import recorded
from tests.fusion.models import Functional, Normalised, Residual, Rising
from tests.support.native import needs_native

pytestmark = needs_native


class Net(nn.Module):
    """Every kind of chain: across functions and layers, with and without normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.norm = Normalised()
        self.block = Residual()
        self.reduce = nn.Conv2d(8, 3, 1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block(self.reduce(self.stem(x)))
        x = torch.max_pool2d(self.last(x).relu(), 2)
        return self.fc(x.mean((2, 3)))


def pair(kind=Net):
    torch.manual_seed(0)
    plain = kind()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
    fused = dlfast.fuse(copy.deepcopy(plain), inplace=True)
    return fused, plain


def images(n=4):
    return torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(2))


def gradients(model, run, x):
    model.zero_grad()
    output = run(x)
    output.float().square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_all_close(have, want, **tolerance):
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 1e-3, "atol": 1e-3}))


@pytest.mark.parametrize("training", [True, False])
def test_compile_without_graph_breaks(training):
    fused, plain = pair()
    torch._dynamo.reset()
    fused.train(training), plain.train(training)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = images()
    assert_all_close(gradients(fused, compiled, x), gradients(plain, plain, x))
    with torch.no_grad():
        assert_all_close([compiled(x)], [plain(x)])
    # Weights that change afterwards count: folding must not be frozen into the graph.
    with torch.no_grad():
        for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
            one.mul_(1.1), other.mul_(1.1)
        assert_all_close([compiled(x)], [plain(x)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    fused, plain = pair()
    x = images()
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=dtype):
        have, want = fused(x), plain(x)
    assert have.dtype == want.dtype
    have.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.stem.parameters())
    error, own = ((y.double() - exact).abs().max() for y in (have, want))
    assert error <= 4 * own + 16 * torch.finfo(dtype).eps


def test_channels_last():
    fused, plain = pair()
    fused, plain = (m.to(memory_format=torch.channels_last) for m in (fused, plain))
    x = images().contiguous(memory_format=torch.channels_last)
    assert_all_close(gradients(fused, fused, x), gradients(plain, plain, x))
    stem = fused.stem(x)
    assert stem.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["default", "strict"])
def test_export(mode):
    fused, plain = pair()
    fused.eval(), plain.eval()
    program = torch.export.export(fused, (images(),), strict=mode == "strict")
    torch.testing.assert_close(program.module()(images()), plain(images()), rtol=1e-4, atol=1e-4)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(fused, (images(),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images(7)), plain(images(7)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Net, Normalised, Rising, Functional])
def test_onnx_of_plain_operators(kind, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fused, plain = pair(kind)
    fused.eval(), plain.eval()
    x = images() if kind is not Functional else torch.randn(2, 3, 40, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(fused, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    operators = {node.op_type for node in program.model.graph}
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib"}
    assert "Conv" in operators
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (have,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(have), plain(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(training):
    fused, plain = pair()
    fused.train(training), plain.train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fused, (images(),), check_trace=False)
    fused.load_state_dict(plain.state_dict())  # tracing in training moved the statistics
    torch.testing.assert_close(traced(images()), plain(images()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    fused, plain = pair()
    x = images().requires_grad_()
    run = lambda model: lambda t: checkpoint(model, t, use_reentrant=reentrant)  # noqa: E731
    assert_all_close(gradients(fused, run(fused), x), gradients(plain, run(plain), x))


def test_torch_func():
    fused, plain = pair()
    fused.eval(), plain.eval()

    def loss(model):
        return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()

    x = images()
    have = torch.func.grad(loss(fused))(dict(fused.named_parameters()), x)
    want = torch.func.grad(loss(plain))(dict(plain.named_parameters()), x)
    assert list(have) == list(want)
    assert_all_close(have.values(), want.values())


def test_inference_mode_saves_nothing_and_training_goes_on():
    fused, plain = pair()
    fused.eval(), plain.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fused(images()), plain(images()), rtol=1e-4, atol=1e-4)
    fused.train(), plain.train()
    assert_all_close(gradients(fused, fused, images()), gradients(plain, plain, images()))


def test_keeps_less_for_backward():
    fused, plain = pair()
    x = images(8)
    assert saved_bytes(fused, x) < 0.75 * saved_bytes(plain, x)


def test_hooks_on_what_stays():
    fused, plain = pair()
    seen = {}
    for name, model in (("fused", fused), ("plain", plain)):
        model.block.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output))
        model(images())
    torch.testing.assert_close(seen["fused"], seen["plain"], rtol=1e-4, atol=1e-4)


def test_quantised_models_are_left_alone():
    from torch.ao.nn import intrinsic, quantized

    torch.manual_seed(0)
    layers = [
        intrinsic.ConvReLU2d(nn.Conv2d(3, 4, 3), nn.ReLU()),
        nn.MaxPool2d(2),
        quantized.Quantize(0.1, 0, torch.quint8),
    ]
    model = nn.Sequential(*layers)
    with pytest.warns(dlfast.NotFusedWarning, match="quantised"):
        assert dlfast.fuse(model) is model


PROCESS = """
import copy, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import dlfast
from dlfast.fusion.run import ChainRun

def work(rank, port, how):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 4),
    ).double()
    fused = dlfast.fuse(copy.deepcopy(plain), inplace=True)
    assert [run.name for run in fused.forward.chains] == ["0", "3"]
    ran = []
    whole = ChainRun._fused
    ChainRun._fused = lambda run, x: ran.append(run.name) or whole(run, x)
    x = torch.randn(2, 4, 3, 22, 22, dtype=torch.float64)[rank]
    losses = []
    for model in (fused, plain):
        if how == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        mine = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            mine.append(loss.item())
        losses.append(mine)
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0][0] != losses[0][2]
    assert ran == ["0", "3"] * 3
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (int(sys.argv[1]), sys.argv[2]), nprocs=2)
    print("equal")
"""


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "work.py"
    script.write_text(PROCESS)
    here = Path(dlfast.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, script, str(port), how], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout


def test_lightning_module_keeps_its_class_and_methods(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
            self.fc = nn.Linear(8 * 81, 2)
            self.losses = []

        def forward(self, x):
            return self.fc(self.net(x))

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    torch.manual_seed(0)
    plain = Lit()
    fused = dlfast.fuse(copy.deepcopy(plain), inplace=True)
    assert type(fused) is Lit
    data = torch.utils.data.TensorDataset(torch.randn(12, 3, 20, 20), torch.arange(12) % 2)
    for model in (fused, plain):
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        with recorded() as ran:
            trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
        assert len(ran) == (6 if model is fused else 0)
    assert len(fused.losses) == 6
    assert fused.losses == pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.parametrize("layers", [[nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()], [nn.BatchNorm2d(3), nn.ReLU()]])
def test_sync_batch_norm_after_fusing(layers):
    """The normalisation is another layer then, which runs by itself."""
    plain = nn.Sequential(*copy.deepcopy(layers))
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(dlfast.fuse(plain)).eval()
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain).eval()
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(dlfast.NotFusedWarning, match="SyncBatchNorm"):
        torch.testing.assert_close(fused(x), plain(x))


def test_our_layer_does_not_become_a_sync_batch_norm():
    """Its ReLU and pooling would be lost."""
    model = nn.Sequential(dlfast.nn.BNReLUPool2d(3))
    with pytest.raises(RuntimeError, match="BNReLUPool2d cannot become a SyncBatchNorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    fused, plain = pair(Functional)
    x = torch.randn(4, 3, 40, 40)
    results = []
    for model in (fused, plain):
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
        results.append(loss.item())
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    assert dlfast.verify(model, torch.randn(2, 3, 64, 64)).ok
