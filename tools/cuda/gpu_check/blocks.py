"""The kernels of single blocks, without the host: each algorithm of ours against eager PyTorch in both formats."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from dlfast.app.bench.gpu import block_problem
from dlfast.app.bench.traffic import Layer
from tools.cuda.gpu_check.trial import Makers, Trial, of_problem, use_tf32

CAPTURED = 4  # calls in a graph
REPLAYS = 5  # of it between two looks at the clock
LAYERS = (
    Layer("vgg", "conv1_1", 32, 3, 64, 224, pool_size=0, needs_grad_input=False),
    Layer("vgg", "conv1_2", 32, 64, 64, 224),
    Layer("vgg", "conv2_1", 32, 64, 128, 112, pool_size=0),
    Layer("vgg", "conv3_3", 32, 256, 256, 56),
    Layer("vgg", "conv4_3", 32, 512, 512, 28),
    Layer("vgg", "conv5_3", 32, 512, 512, 14),
    Layer("resnet", "stem", 32, 3, 64, 224, 7, 2, 3, pool_size=3, pool_padding=1, needs_grad_input=False),
    Layer("three channels", "112", 64, 3, 64, 112, needs_grad_input=False),
    Layer("convpool", "conv1", 64, 1, 32, 289, needs_grad_input=False),
    Layer("convpool", "conv2", 64, 32, 64, 144),
    Layer("mnistnet", "conv1", 1024, 1, 32, 28, needs_grad_input=False),
    Layer("mnistnet", "conv2", 1024, 32, 64, 14),
    Layer("cifar", "conv2", 512, 64, 256, 32),
)
# Products: the dtype, and whether those of float32 are TF32's. The most used first.
PRODUCTS = {
    "float16": (torch.float16, True),
    "TF32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, True),
    "float32": (torch.float32, False),
}


def makers(device: str) -> Makers:
    return {
        f"{layer.network} {layer.name}, {products}": functools.partial(trials, layer, products, device)
        for products in PRODUCTS
        for layer in LAYERS
    }


def trials(layer: Layer, products: str, device: str) -> Iterator[Trial]:
    dtype, tf32 = PRODUCTS[products]
    use_tf32(tf32)
    problem = block_problem(layer, dtype, device, compile=False)
    problem.name = f"{layer.network} {layer.name}, batch {layer.n}, {products}"
    yield of_problem(problem, REPLAYS, CAPTURED if device == "cuda" else 0)
