"""What a model, an optimizer and a scaler must be for a CUDA graph to hold their step: refused by name where not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizer_module

from dlfast.graphed.plain import PlainStep
from dlfast.optim._step import FusedStep

PLAIN_TYPES = (nn.Parameter, Tensor)


def check(step: PlainStep) -> None:
    """Before anything runs.

    Raises:
        RuntimeError: the message names what cannot be captured, and what to pass instead.
    """
    _check_tensors(step)
    _check_optimizer(step.optimizer)
    if step.scaler is not None:
        _check_scaled(step.optimizer)


def _check_tensors(step: PlainStep) -> None:
    if isinstance(step.model, nn.parallel.DistributedDataParallel):
        raise RuntimeError("model is a DistributedDataParallel, whose step graphed_step does not capture")
    named = []
    for prefix, module in step.named_modules():
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
            named += [(kind, f"{prefix}.{name}".lstrip("."), t) for name, t in table.items() if t is not None]
    for index, group in enumerate(step.optimizer.param_groups):
        named += [("parameter", f"param_groups[{index}]['params'][{i}]", p) for i, p in enumerate(group["params"])]
    for kind, name, t in named:
        if t.device != step.device:
            raise RuntimeError(
                f"{kind} {name!r} is on {t.device}; a graph needs all of the model on one GPU, here {step.device}"
            )
        if type(t) not in PLAIN_TYPES and kind == "parameter":
            raise RuntimeError(f"{kind} {name!r} is a {type(t).__name__}, whose step graphed_step does not capture")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    of_all = (optimizer_module._global_optimizer_pre_hooks, optimizer_module._global_optimizer_post_hooks)
    if any((*own, *of_all)):
        raise RuntimeError(f"{name} has step hooks, which the replay of a graph does not call: remove them")
    for index, group in enumerate(optimizer.param_groups):
        if isinstance(optimizer, FusedStep):
            if group.get("fused") is False:
                raise RuntimeError(
                    f"param_groups[{index}] of {name} has fused=False, a step in plain PyTorch that waits for the "
                    "device: leave it out"
                )
        elif "capturable" in group:
            if not group["capturable"]:
                raise RuntimeError(
                    f"param_groups[{index}] of torch.optim.{name} has capturable=False, and counts its steps on the "
                    "CPU, where a graph does not: pass capturable=True"
                )
        elif not isinstance(optimizer, torch.optim.SGD):
            raise RuntimeError(
                f"{name} has no option capturable=True, without which an optimizer cannot be captured: take one of "
                "dlfast.optim, or one of torch.optim that has it"
            )
    for signal in ("grad_scale", "found_inf"):
        value = vars(optimizer).get(signal)
        if isinstance(value, Tensor) and not value.is_cuda:
            raise RuntimeError(
                f"optimizer.{signal} is on {value.device}, where a graph cannot read it: put it on the GPU"
            )


def _check_scaled(optimizer: torch.optim.Optimizer) -> None:
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise RuntimeError(
            f"GradScaler waits for the device before each step of this {type(optimizer).__name__}: construct the "
            "optimizer with fused=True, and its step unscales and skips on the device"
        )


def check_prepared(optimizer: torch.optim.Optimizer) -> None:
    """After a step: whether one of :mod:`dlfast.optim` was native, as it has to be."""
    if not isinstance(optimizer, FusedStep):
        return
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            f"no parameter of {type(optimizer).__name__} has a gradient after backward (step_in_backward frees them)"
        )
    if not optimizer._is_native():
        raise RuntimeError(
            f"the step of {type(optimizer).__name__} runs in plain PyTorch here, which waits for the device: it is "
            "native for float32, float64 and 16-bit parameters with gradients of the same dtype, in a build with CUDA "
            "code for this GPU (dlfast info)"
        )


def numbers_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """The options of every group by place, without the parameters; pairs of numbers one by one.

    A tensor on the GPU stands for itself, one on the CPU for the number that a graph takes from it.
    """
    found: dict[tuple[int, str], Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        for name in optimizer.defaults:
            value = group.get(name)
            parts = {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
            for part, number in parts.items():
                if isinstance(number, Tensor) and not number.is_cuda:
                    number = number.item()
                found[index, part] = number
    return found


def check_numbers(captured: dict[tuple[int, str], Any], now: dict[tuple[int, str], Any]) -> bool:
    """Whether the options are those that were captured.

    Raises:
        RuntimeError: a number has changed that could have been a tensor on the GPU.
    """
    if captured.keys() != now.keys():
        return False
    same = True
    for (index, name), before in captured.items():
        after = now[index, name]
        if before is after:
            continue
        if isinstance(before, Tensor) or isinstance(after, Tensor):
            same = False
        elif before != after:
            if not isinstance(before, float) and not isinstance(after, float):
                same = False
                continue
            raise RuntimeError(
                f"{name} of param_groups[{index}] was {before:g} when the step was captured and is {after:g}, which a "
                f"graph does not see: make the optimizer with a tensor, torch.tensor({before:g}, device='cuda'), as "
                f"its {name}, and schedules write to it in place"
            )
    return same
