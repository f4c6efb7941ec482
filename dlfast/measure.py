"""What a training step costs: bytes kept between forward and backward, and time beside a rival."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def saved_bytes(module: nn.Module, input: Tensor) -> int:
    """Bytes that one forward pass of `module` keeps for backward, beyond `input` and the parameters.

    Tensors that share a storage are counted once, and the whole storage counts: that is what stays allocated.

    >>> saved_bytes(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(16, 4))
    512
    """
    known = _storages([input, *module.parameters(), *module.buffers()])
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        alive.append(module(input))
    return sum(saved.values())


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def alternate(steps: Sequence[Callable[[], object]], rounds: int, warmup: int = 3) -> list[list[float]]:
    """Seconds of each of `steps`, `rounds` times in turn, so that a busy machine slows them all alike.

    For the CPU: nothing waits for a GPU here.

    >>> [len(seconds) for seconds in alternate([list, dict], rounds=4)]
    [4, 4]
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(warmup + rounds):
        # Every second round backwards: what runs just after another may find its caches.
        order = range(len(steps)) if number % 2 == 0 else range(len(steps) - 1, -1, -1)
        for index in order:
            start = time.perf_counter()
            steps[index]()
            if number >= warmup:
                seconds[index].append(time.perf_counter() - start)
    return seconds
