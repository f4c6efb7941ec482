"""Optimizers, options and shapes that the optimizer tests share."""

import pytest
import torch
from torch import nn

import dlfast.optim

STEPS = 100

# Algorithm and options; learning rates large enough that a wrong term shows.
TORCH_CASES = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": -0.5, "maximize": True}),
    ("Adam", {"lr": 0.05}),
    ("Adam", {"lr": 0.05, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "amsgrad": True, "maximize": True}),
    ("Adam", {"lr": 0.05, "betas": (0.0, 0.9), "amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"lr": 0.05}),
    ("AdamW", {"lr": 0.05, "weight_decay": 0.3, "amsgrad": True}),
    ("AdamW", {"lr": 0.05, "betas": (0.8, 0.95), "maximize": True}),
    ("RMSprop", {"lr": 0.02}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"lr": 0.02, "momentum": 0.7}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.8, "centered": True}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.8, "centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("Adagrad", {"lr": 0.1, "eps": 1e-2, "maximize": True}),
]
PAPER_CASES = [
    ("Lion", {"lr": 0.02}),
    ("Lion", {"lr": 0.02, "betas": (0.7, 0.8), "weight_decay": 0.3, "maximize": True}),
    ("LAMB", {"lr": 0.02}),
    ("LAMB", {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.3, "maximize": True}),
]
CASES = TORCH_CASES + PAPER_CASES
TORCH_IDS = [f"{name}-{'-'.join(options)}" for name, options in TORCH_CASES]
CASE_IDS = [f"{name}-{'-'.join(options)}" for name, options in CASES]

TORCH_NAMES = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]
NAMES = [*TORCH_NAMES, "Lion", "LAMB"]
by_name = pytest.mark.parametrize("name", NAMES)
by_torch_name = pytest.mark.parametrize("name", TORCH_NAMES)
engines = pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
LOW = [torch.bfloat16, torch.float16]
# For tests of anything but the arithmetic.
OPTIONS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1, "weight_decay": 0.2},
    "RMSprop": {"lr": 0.02, "momentum": 0.5, "centered": True, "alpha": 0.8},
    "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.1},
    "Lion": {"lr": 0.05, "weight_decay": 0.2},
    "LAMB": {"lr": 0.05},
}

# Sizes around every vector width (2 to 16 elements), the CPU's chunk (1024) and unit (4096), the blocks of int8
# states (256) and the GPU's unit (4096).
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 255, 257, 1023, 1024, 1025, 4095, 4096, 4097]


SHAPES = [(3,), (17, 5), (4, 3, 3, 3), (), (0, 4), (1500,), (2, 2061)]


def start(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def parameters(tensors):
    return [nn.Parameter(t.clone()) for t in tensors]


def make(lib, name, options, params):
    return getattr(lib, name)(params, **options)


def pair(name, options, tensors, **ours):
    """The same problem for torch.optim and for dlfast.optim."""
    theirs = [nn.Parameter(t.clone()) for t in tensors]
    mine = [nn.Parameter(t.clone()) for t in tensors]
    return (
        (theirs, make(torch.optim, name, options, theirs)),
        (mine, make(dlfast.optim, name, {**options, **ours}, mine)),
    )


def set_grads(generator, *param_lists):
    """The same non-zero gradients for parameters of the same shapes."""
    for params in zip(*param_lists, strict=True):
        grad = torch.randn(params[0].shape, generator=generator, dtype=torch.float64)
        grad = grad + 0.1 * grad.sign()
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def tolerance(dtype, steps=STEPS):
    """Bound on how far two correct runs may drift apart, absolute for values of about 1.

    A step is some eight roundings of values of the parameter's size, or of an update of the size of lr. Their
    errors add up over the steps, and never grow, because the gradients here do not depend on the parameters.
    """
    return 8 * steps * torch.finfo(dtype).eps


def assert_same(mine, theirs, bound):
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.isfinite().all()
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(
            a.detach().cpu(),
            b.detach().cpu(),
            rtol=0,
            atol=bound * scale,
            msg=lambda m, i=i: f"tensor {i}: {m}",
        )


def forgive_signs(mine, theirs, lr, bound, at_most=2):
    """Lion's direction may lie within rounding of 0, which makes a step the other way: some one of a million,
    and more where numbers are as coarse as in 16 bits."""
    flips = 0
    with torch.no_grad():
        for a, b in zip(mine, theirs, strict=True):
            if b.numel() == 0:
                continue
            scale = max(1.0, b.abs().max().item())
            flipped = (a - b).abs() > bound * scale
            flips += flipped.sum().item()
            # Two steps, and what the rounding of the parameter makes of them.
            assert ((a - b).abs()[flipped] < 4 * lr + 2 * bound * scale).all()
            a[flipped] = b[flipped]
    assert flips <= at_most


def ran_natively(opt):
    """Whether the last step was native, and of all parameters that have a gradient."""
    prepared = opt._prepared.get(None)
    return prepared is not None and bool(prepared.buckets) and not prepared.plain
