"""What a training step costs: bytes kept between forward and backward, and time beside a rival."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

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


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that `step` has allocated at one time, on the GPU where there is one, else on the CPU.

    >>> peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000)) >= 8000
    True
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def alternate(steps: Sequence[Callable[[], object]], rounds: int, warmup: int = 3, calls: int = 1) -> list[list[float]]:
    """Seconds of each of `steps`, `rounds` times in turn, so that a busy machine slows them all alike.

    A round is `calls` calls, and ends when the GPU, if there is one, has done its work; seconds are those of one call.

    >>> [len(seconds) for seconds in alternate([list, dict], rounds=4)]
    [4, 4]
    """
    seconds: list[list[float]] = [[] for _ in steps]
    on_gpu = torch.cuda.is_available()
    for number in range(warmup + rounds):
        # Every second round backwards: what runs just after another may find its caches.
        order = range(len(steps)) if number % 2 == 0 else range(len(steps) - 1, -1, -1)
        for index in order:
            start = time.perf_counter()
            for _ in range(calls):
                steps[index]()
            if on_gpu:
                torch.cuda.synchronize()
            if number >= warmup:
                seconds[index].append((time.perf_counter() - start) / calls)
    return seconds
