"""``dlfast bench peers``: optimizer steps beside those of other libraries, of which the installed ones take part.

Apex (its CUDA extensions), bitsandbytes, DeepSpeed (its optimizer for the CPU) and torchao; none of them is needed
by dlfast. States are float32, or of eight bits where a library has them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dlfast
from dlfast.app.bench import optim
from dlfast.app.bench.problems import Problem, Variant

SGD, ADAMW, ADAMW_8BIT = "SGD", "AdamW", "AdamW, states of 8 bits"
OPTIONS: dict[str, dict[str, Any]] = {
    SGD: {"lr": 1e-3, "momentum": 0.9},
    ADAMW: {"lr": 1e-3, "weight_decay": 1e-2},
    ADAMW_8BIT: {"lr": 1e-3, "weight_decay": 1e-2},
}


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library: where it is, and what it is called with beside the options above."""

    label: str
    algorithm: str
    module: str
    name: str
    options: dict[str, Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str = ""  # a compiled part that an installation may lack

    def is_installed(self) -> bool:
        names = [self.module.split(".")[0], *([self.needs] if self.needs else [])]
        return all(importlib.util.find_spec(name) is not None for name in names)

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = getattr(importlib.import_module(self.module), self.name)
        return optimizer(parameters, **OPTIONS[self.algorithm], **self.options)  # type: ignore[no-any-return]


PEERS = [
    Peer("Apex", SGD, "apex.optimizers", "FusedSGD", {}, ("cuda",), "amp_C"),
    Peer("Apex", ADAMW, "apex.optimizers", "FusedAdam", {"adam_w_mode": True}, ("cuda",), "amp_C"),
    Peer("bitsandbytes", SGD, "bitsandbytes.optim", "SGD", {}),
    Peer("bitsandbytes", ADAMW, "bitsandbytes.optim", "AdamW", {}),
    Peer("bitsandbytes", ADAMW_8BIT, "bitsandbytes.optim", "AdamW8bit", {}),
    Peer("DeepSpeed", ADAMW, "deepspeed.ops.adam", "DeepSpeedCPUAdam", {"adamw_mode": True}, ("cpu",)),
    Peer("torchao", ADAMW_8BIT, "torchao.optim", "AdamW8bit", {}),
]


def installed(device: str) -> list[Peer]:
    """Those that can be compared on `device`."""
    return [peer for peer in PEERS if device in peer.devices and peer.is_installed()]


def problems(lists: Iterable[str], device: str) -> Iterator[Problem]:
    """Plain steps over lists of parameters, for each algorithm that an installed library has."""
    for name in lists:
        for algorithm in OPTIONS:
            peers = [peer for peer in installed(device) if peer.algorithm == algorithm]
            if peers:
                yield _problem(name, algorithm, peers, device)


def _problem(name: str, algorithm: str, peers: list[Peer], device: str) -> Problem:
    before = [torch.randn(shape, device=device) for shape in optim.shapes_of(name)]
    grads = [torch.randn_like(p) for p in before]
    problem = Problem(f"{algorithm}, {name}", [])

    def add(label: str, ours: bool, build: Any) -> None:
        parameters = _parameters(before, grads)
        try:
            optimizer = build(parameters)
            optimizer.step()
        except Exception as error:
            if ours or label.startswith("PyTorch"):
                raise
            problem.notes.append(f"{label} does not run here: {str(error).strip().splitlines()[0]}")
            return
        _check(label, parameters, expected)
        problem.variants.append(Variant(label, ours, {"plain step": optimizer.step}))

    options, kind = OPTIONS[algorithm], algorithm.split(",")[0]
    expected = _parameters(before, grads)
    getattr(torch.optim, kind)(expected, **options).step()
    eight = {"state_dtype": "int8"} if algorithm == ADAMW_8BIT else {}
    add("dlfast", True, lambda p: getattr(dlfast.optim, kind)(p, **options, **eight))
    fused = "PyTorch fused, float32" if eight else "PyTorch fused"
    add(fused, False, lambda p: getattr(torch.optim, kind)(p, fused=True, **options))
    for peer in peers:
        add(peer.label, False, peer.build)
    return problem


def _parameters(values: list[Tensor], grads: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(value.clone()) for value in values]
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    return parameters


def _check(label: str, parameters: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    """Nothing is timed that takes another step; the first one needs no state of before, so that 8 bits suffice."""
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=1e-5, atol=1e-5, msg=lambda text: f"the step of {label}: {text}")
