"""Whether a fused chain is faster than what it replaces, and what it saves: by itself, and beside all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dlfast._native import native, runs_on
from dlfast.choice import BlockChoice, choose
from dlfast.fusion.chain import Chain
from dlfast.fusion.sizes import convolved, ordinary
from dlfast.nn.batch_norm import CONVOLUTION
from dlfast.nn.conv import ConvReLUPool2d

# The input of a layer (shape, dtype), by the id of the layer.
Shapes = Mapping[int, tuple[torch.Size, torch.dtype]]

# Seconds that the host of a GPU takes longer for a chain in a training step than for its layers, by what is in it. None
# takes longer: `dlfast bench overhead` has the chains beside their layers.
HOST_SECONDS = {"conv": 0.0, "bn": 0.0, "relu": 0.0}
# And what it takes for a layer of PyTorch: 26.5 ms of a step of ResNet-50 beside an H100, under autocast, over its 126
# layers (benchmarks/results/h100/networks.json).
LAYER_HOST_SECONDS = 2.1e-4
# Kernels of that step in times that it takes to move the input of the layer once at the full bandwidth of the memory:
# normalisation by PyTorch and by us with all that follows it, PyTorch's ReLU, and the backward of its max pooling.
NORM_PASSES, OWN_NORM_PASSES, RELU_PASSES, POOL_PASSES = 17, 13, 5, 15


def weigh(chain: Chain, shapes: Shapes | None) -> str:
    """Why fusing `chain` would gain nothing; empty where it gains. Fills in its choice, gain and bytes saved."""
    tensor = _some_tensor(chain)
    if tensor is not None and not runs_on(tensor.device):
        return f"no compiled operators for {tensor.device}: PyTorch would run it as it is"
    if tensor is not None and tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"{tensor.dtype} is not supported"
    known = (shapes or {}).get(id(chain.head.module)) if chain.head.module is not None else None
    if chain.adaptive is not None and known is None:
        return "what an adaptive pooling does is known only with example inputs"
    if known is not None and len(known[0]) not in (3, 4):
        return f"its input has {len(known[0])} dimensions"
    if known is not None:
        reason = _measure(chain, *known)
        if reason:
            return reason
    if chain.bn is not None:
        return ""
    if chain.window.pool is None and (chain.choice is None or chain.choice.predicted_gain <= 1.0):
        return chain.stop or "without pooling PyTorch's own kernels run: nothing to gain"
    if chain.choice is not None and chain.choice.predicted_gain < 1.0:
        return f"predicted to be slower ({chain.choice.predicted_gain:.2f}x): {chain.choice.reason}"
    return ""


def _measure(chain: Chain, shape: torch.Size, dtype: torch.dtype) -> str:
    """Fill in what follows from the shape of the input; why it does not fit, if so."""
    if chain.kind == "conv":
        conv = chain.head.module
        assert isinstance(conv, nn.Conv2d)
        with torch.device("meta"):
            z = torch.empty(convolved(conv, shape), dtype=dtype)
        if chain.adaptive is not None and ordinary(chain.adaptive, z.shape[-2:]) is None:
            return f"the adaptive pooling is no ordinary one at {tuple(z.shape[-2:])}"
        chain.choice = _choice(conv, chain, shape, dtype)
        chain.seconds_saved = chain.choice.seconds_saved
    else:
        z = torch.empty(shape, dtype=dtype, device="meta")
    if chain.window.pool is not None:
        chain.bytes_saved = _bytes_saved(chain, z)
    tensor = _some_tensor(chain)
    if tensor is not None and tensor.device.type == "cuda":
        _count_host(chain, z, tensor.device)
    return ""


def _count_host(chain: Chain, z: Tensor, device: torch.device) -> None:
    """Fill in what a chain costs the host of a GPU; for a normalisation also what it saves of kernels."""
    chain.host_seconds = HOST_SECONDS["bn" if chain.bn is not None else chain.kind]
    if chain.bn is not None and native.module is not None:
        with torch.cuda.device(device):
            bandwidth = native.module.cuda_bandwidth()
        one_pass = z.numel() * z.element_size() / bandwidth
        relu, pool = chain.window.activation is not None, chain.window.pool is not None
        chain.eager_seconds = (NORM_PASSES + RELU_PASSES * relu + POOL_PASSES * pool) * one_pass
        chain.seconds_saved = (chain.seconds_saved or 0.0) + chain.eager_seconds - OWN_NORM_PASSES * one_pass


def spare_the_host(chains: Sequence[Chain], model: nn.Module) -> None:
    """Leave alone the chains that would make a training step on CUDA wait longer for the host than they save.

    The host and the GPU work side by side, and a step takes as long as the slower of them. In evaluation a
    normalisation is folded into the convolution, which spares the host too: such a model is fused whole.
    """
    costly = [chain for chain in chains if chain.host_seconds > 0 and chain.seconds_saved is not None]
    if not model.training or not costly:
        return
    others = [chain for chain in chains if chain not in costly]
    host = LAYER_HOST_SECONDS * sum(not list(module.children()) for module in model.modules())
    kernels = sum(_eager_seconds(chain) for chain in chains) - sum(chain.seconds_saved or 0.0 for chain in others)
    taken = worth_their_host(kernels, host, [(c.seconds_saved or 0.0, c.host_seconds) for c in costly])
    for chain, is_taken in zip(costly, taken, strict=True):
        if not is_taken:
            chain.why_not = (
                f"a training step waits for the host, which would take {chain.host_seconds * 1e3:.2g} ms longer, "
                f"and kernels {(chain.seconds_saved or 0.0) * 1e3:.2g} ms less (estimated)"
            )


def worth_their_host(kernels: float, host: float, chains: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of `chains`, each with the seconds of kernels it saves and those of the host it takes, shorten a step.

    Args:
        kernels, host: seconds of a step without any of them.

    >>> worth_their_host(10e-3, 1e-3, [(1e-3, 2e-4), (1e-5, 2e-4)])  # the GPU is the slower one
    [True, True]
    >>> worth_their_host(1e-3, 10e-3, [(1e-3, 2e-4), (1e-5, 2e-4)])  # the host is
    [False, False]
    >>> worth_their_host(10e-3, 9.5e-3, [(1e-5, 2e-4), (1e-3, 2e-4)])  # there is time for one
    [False, True]
    """
    taken = [False] * len(chains)
    for index, (saved, cost) in sorted(enumerate(chains), key=lambda item: item[1][1] - item[1][0]):
        if max(kernels - saved, host + cost) < max(kernels, host):
            taken[index] = True
            kernels, host = kernels - saved, host + cost
    return taken


def _eager_seconds(chain: Chain) -> float:
    """Of the kernels of PyTorch that `chain` replaces."""
    of_choice = 0.0 if chain.choice is None else chain.choice.eager_seconds
    return of_choice + chain.eager_seconds


def _bytes_saved(chain: Chain, z: Tensor) -> int:
    """What backward no longer keeps: the ReLU's output and the 8-byte indices, for one byte of the winner mask.

    An average keeps one bit for each element in place of the ReLU's output.
    """
    window = chain.window
    if window.pool == "avg":
        return z.numel() * z.element_size() - z.numel() // 8 if window.activation else 0
    size = [
        (have + 2 * padding - size) // stride + 1
        for have, size, stride, padding in zip(
            z.shape[-2:], window.pool_size, window.pool_stride, window.pool_padding, strict=True
        )
    ]
    pooled = z[..., 0, 0].numel() * size[0] * size[1]
    return z.numel() * z.element_size() + 7 * pooled


def _choice(conv: nn.Conv2d, chain: Chain, shape: torch.Size, dtype: torch.dtype) -> BlockChoice:
    block = ConvReLUPool2d.__new__(ConvReLUPool2d)
    block.__dict__.update(conv.__dict__)
    # Under a normalisation the convolution is an operator of its own, but for evaluation.
    options = (chain.window if chain.bn is None else CONVOLUTION).options()
    if chain.adaptive is not None:
        size = ordinary(chain.adaptive, tuple(convolved(conv, shape)[-2:]))
        options.update(pool_size=size, pool_stride=size)
    for name, value in options.items():
        block.__dict__[name] = value
    # The gradient of images is seldom asked for.
    like = torch.empty(shape, dtype=dtype, device=conv.weight.device, requires_grad=conv.in_channels > 4)
    with torch.enable_grad():
        return choose(block, like)


def _some_tensor(chain: Chain) -> Tensor | None:
    for module in (chain.head.module, chain.bn, chain.head.level.module):
        if module is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    return tensor
    return None


@contextmanager
def _watching(model: nn.Module, seen: dict[int, tuple[torch.Size, torch.dtype]]) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(id(module), (args[0].shape, args[0].dtype))

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shapes_of(model: nn.Module, example_inputs: tuple[Any, ...]) -> Shapes:
    """The input of every layer when `model` runs on `example_inputs`, in evaluation and without gradients.

    The model is left as it was: modes, buffers and the random number generator.

    Raises:
        ValueError: the model does not run on `example_inputs`.
    """
    seen: dict[int, tuple[torch.Size, torch.dtype]] = {}
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: (buffer, buffer.clone()) for buffer in model.buffers()}
    devices = [t.device.index for t in model.parameters() if t.device.type == "cuda"][:1]
    try:
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad(), _watching(model, seen):
            model(*example_inputs)
    except Exception as error:
        raise ValueError(
            f"example_inputs do not fit the model: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers.values():
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    return seen
