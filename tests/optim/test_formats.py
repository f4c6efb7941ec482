"""Number formats of the optimizers: random bits, stochastic rounding, masters in halves, int8 states."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dlfast.optim
from dlfast.optim import _formats
from tests.optim.cases import LOW
from tests.support.native import needs_native


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_numbers(counter, key, expected):
    """The known answers of the authors' Random123 library for philox4x32 with 10 rounds."""
    words = _formats.philox(tuple(torch.tensor([c]) for c in counter), key[1] << 32 | key[0])
    assert [w.item() for w in words] == expected


def test_random_bits_are_uniform_and_differ():
    bits = [_formats.random_bits(100_000, 1, step, stream, torch.device("cpu")) for step in (0, 1) for stream in (0, 1)]
    for b in bits:
        # Mean of n uniform numbers: standard deviation 65536 / sqrt(12 n). 5 of them: false alarm 6e-7.
        assert abs(b.double().mean() - 32767.5) < 5 * 65536 / math.sqrt(12 * b.numel())
        assert b.min() >= 0
        assert b.max() < 65536
    for i, a in enumerate(bits):
        for b in bits[:i]:
            assert (a == b).double().mean() < 1e-3  # chance: 1.5e-5
    assert torch.equal(_formats.random_bits(100, 1, 0, 0, torch.device("cpu")), bits[0][:100])


def rounded(values, dtype, repeats, fused=None):
    """`values` as the step of an SGD with stochastic rounding writes them, `repeats` times: [repeats, n]."""
    out = []
    p = nn.Parameter(torch.zeros(values.numel(), dtype=dtype))
    opt = dlfast.optim.SGD([p], lr=1.0, stochastic_rounding=True, fused=fused)
    # The update is the sum of two numbers of 16 bits: what they need in float32 lies between two of 16 bits.
    high = values.to(dtype)
    p.grad = (high.float() - values).to(dtype)
    for _ in range(repeats):
        with torch.no_grad():
            p.copy_(high)
        opt.step()
        out.append(p.detach().clone())
    return torch.stack(out), high.float() - p.grad.float()


@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_stochastic_rounding_is_unbiased(dtype, fused):
    """The mean of n roundings lies within 6 standard deviations, at most half a unit / sqrt(n) each, of the
    number: 100 numbers, false alarm below 100 * 2e-9."""
    torch.manual_seed(3)
    values = torch.cat([torch.randn(80), torch.randn(20) * 1e-5])  # subnormal in float16
    repeats = 1000
    results, exact = rounded(values, dtype, repeats, fused)
    info = torch.finfo(dtype)
    unit = info.eps * exact.abs().clamp(min=info.smallest_normal)
    assert ((results.float() - exact).abs() < unit * 1.001).all()
    assert ((results.double().mean(0) - exact).abs() <= 6 * 0.5 * unit / math.sqrt(repeats)).all()
    assert (results != results[0]).any(0).double().mean() > 0.5  # it does round both ways


def test_rounding_keeps_infinities_nan_and_exact_numbers():
    for dtype in LOW:
        info = torch.finfo(dtype)
        bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        draws = torch.full((bits.numel(),), 0xFFFF)
        out = _formats.round_stochastic(bits.float(), dtype, draws)
        assert torch.equal(out.isnan(), bits.isnan())
        finite = ~bits.isnan()
        assert torch.equal(out[finite], bits[finite])
        # The largest number is not rounded to infinity where rounding to nearest would not do it.
        near = torch.tensor([info.max * (1 + info.eps / 8)])
        assert near.to(dtype).isfinite()
        assert _formats.round_stochastic(near, dtype, torch.tensor([0xFFFF])).isfinite()


def test_halves_give_every_float_back():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4028235e38, 1e-45, 1.0 + 2**-8])
    x = torch.cat([bits.view(torch.float32), special])
    x = x[~x.isnan()]
    upper, lower = _formats.split_halves(x)
    assert torch.equal(_formats.join_halves(upper, lower).view(torch.int32), x.view(torch.int32))
    finite = x.abs() < 3e38
    error = (upper.float() - x).abs()[finite]
    assert (error <= (x.to(torch.bfloat16).float() - x).abs()[finite]).all()  # nearest
    assert _formats.join_halves(*_formats.split_halves(torch.tensor([float("nan")]))).isnan()


@pytest.mark.parametrize("signed", [True, False])
def test_int8_error_is_as_documented(signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) * torch.rand(100_000, generator=generator) ** 8
    x = x if signed else x.abs()
    draws = _formats.random_bits(x.numel(), 0, 0, 0, x.device)
    codes, scale = _formats.encode(x, signed, draws)
    assert codes.numel() + 4 * scale.numel() <= 1.02 * x.numel()
    back = _formats.decode(codes, scale, signed)
    largest = scale.repeat_interleave(256)[: x.numel()]
    least = largest / (57344 if signed else 61440)
    normal = x.abs() >= least
    error = (back - x).abs()
    assert (error[normal] <= x.abs()[normal] * (1 / 8 if signed else 1 / 16) * 1.0001).all()
    if signed:
        assert (error[~normal] <= least[~normal]).all()
    else:
        assert torch.equal(back[~normal], torch.where(x > 0, least, 0)[~normal])  # never 0: small steps
    # On average the error is nothing: 6 standard deviations of the mean, false alarm 2e-9.
    relative = ((back - x) / x.abs().clamp(min=1e-30))[normal].double()
    assert relative.mean().abs() < 6 * relative.std() / math.sqrt(relative.numel())
    again = _formats.encode(back, signed, draws)
    assert (again[0] == codes).double().mean() > 0.999  # what is a code stays one


def test_int8_nan_and_infinity_are_not_hidden():
    for bad in (float("nan"), float("inf")):
        x = torch.ones(600)
        x[300] = bad
        back = _formats.decode(*_formats.encode(x, True), True)
        assert not back[256:512].isfinite().all()
        assert back[:256].isfinite().all()


@needs_native
@pytest.mark.parametrize("name", ["Adam", "Lion", "SGD"])
def test_int8_nan_in_a_gradient_reaches_the_parameter(name):
    p = nn.Parameter(torch.ones(40))
    p.grad = torch.ones(40)
    p.grad[3] = float("nan")
    options = {"momentum": 0.9} if name == "SGD" else {}
    opt = getattr(dlfast.optim, name)([p], state_dtype="int8", **options)
    opt.step()
    p.grad = torch.ones(40)
    opt.step()
    assert name == "Lion" or p[3].isnan()  # the sign of NaN is 0


class SmallResNet(nn.Module):
    """Two residual blocks on 8x8 images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(16) for _ in range(4)])
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = self.stem(x)
        for i in (0, 2):
            y = self.norms[i](self.blocks[i](x)).relu()
            x = (x + self.norms[i + 1](self.blocks[i + 1](y))).relu()
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("network", "epochs"), [(lenet, 12), (SmallResNet, 4)], ids=["lenet", "resnet"])
def test_int8_states_train_to_the_same_accuracy(network, epochs):
    """Five seeds of AdamW each: the mean accuracies differ by less than the seeds do (3 standard errors)."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.as_tensor(digits.images).float().reshape(-1, 1, 8, 8) / 16, torch.as_tensor(digits.target).long()
    train, test = slice(0, 1400), slice(1400, None)
    accuracies = {None: [], "int8": []}
    for state_dtype, results in accuracies.items():
        for seed in range(5):
            torch.manual_seed(seed)
            model = network()
            opt = dlfast.optim.AdamW(model.parameters(), lr=3e-3, state_dtype=state_dtype)
            for _ in range(epochs):
                for batch in torch.randperm(1400).split(64):
                    opt.zero_grad()
                    nn.functional.cross_entropy(model(x[train][batch]), y[train][batch]).backward()
                    opt.step()
            model.eval()
            with torch.no_grad():
                results.append((model(x[test]).argmax(1) == y[test]).double().mean().item())
    full, small = (torch.tensor(accuracies[k]) for k in (None, "int8"))
    assert full.mean() > 0.85
    noise = ((full.var() + small.var()) / 5).sqrt()
    assert small.mean() > full.mean() - 3 * noise - 0.005


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_every_simd_level_gives_the_same_numbers(level):
    """Formats, tails and algorithms at each level this CPU has, in a process of its own."""
    selection = "every_size or formats_are_those or random_rounding or unbiased"
    tests = [str(Path(__file__).with_name(name)) for name in ("test_step.py", "test_state_formats.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"({selection}) and Adam", *tests],
        env={**os.environ, "DLFAST_CPU_CAPABILITY": level},
        capture_output=True,
        text=True,
    )
    if "this CPU supports up to" in done.stdout + done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
