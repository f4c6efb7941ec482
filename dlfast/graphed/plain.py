"""A training step as it is without a graph: what is captured, what runs on the CPU, and for batches of another size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree


class Kind(NamedTuple):
    """What one call does beside forward and backward."""

    clears: bool  # gradients, before
    steps: bool  # the optimizer, after


def kinds(accumulation_steps: int) -> list[Kind]:
    """Those that occur, in the order in which they do.

    >>> kinds(1)
    [Kind(clears=True, steps=True)]
    >>> len(kinds(2)), len(kinds(5))
    (2, 3)
    """
    return list(dict.fromkeys(kind_of(i, accumulation_steps) for i in range(accumulation_steps)))


def kind_of(index: int, accumulation_steps: int) -> Kind:
    return Kind(index == 0, index == accumulation_steps - 1)


class PlainStep:
    """Model, loss, optimizer and scaler, and one step of them."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        accumulation_steps: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.scaler = scaler
        self.accumulation_steps = accumulation_steps
        self.device = device
        self.stage = "forward"  # what a step was doing when it failed

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Of the model, and of a loss that is a module."""
        found = [*self.model.named_modules()]
        if isinstance(self.loss_fn, nn.Module):
            found += self.loss_fn.named_modules(prefix="loss_fn")
        return found

    def modules(self) -> list[nn.Module]:
        return [module for _, module in self.named_modules()]

    def params(self) -> list[Tensor]:
        """Of these and of the optimizer, each once: those whose gradients a step clears."""
        found = [p for module in self.modules() for p in module.parameters(recurse=False)]
        found += [p for group in self.optimizer.param_groups for p in group["params"]]
        return list({id(p): p for p in found}.values())

    def buffers(self) -> list[Tensor]:
        """Each once."""
        found = [b for module in self.modules() for b in module.buffers(recurse=False)]
        return list({id(b): b for b in found}.values())

    def loose(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """The tensors that modules hold as plain attributes, with the table of each and its name there."""
        tables = [vars(module) for module in self.modules()]
        return [(own, name, t) for own in tables for name, t in own.items() if isinstance(t, Tensor)]

    def run(self, inputs: tuple[Tensor, ...], kind: Kind, around: Any = nullcontext) -> tuple[Tensor, Any]:
        """The loss, and what the model returned, both detached; forward and backward are within ``around()``."""
        if kind.clears:
            for p in self.params():
                p.grad = None
        with around():
            self.stage = "forward"
            output = self.model(*inputs[:-1])
            self.stage = "the loss"
            loss = self.loss_fn(output, inputs[-1])
            casts = torch.is_autocast_enabled(self.device.type)
            if casts:
                torch.clear_autocast_cache()  # of weights that the step is about to change
            with torch.autocast(self.device.type, enabled=False) if casts else nullcontext():
                self.stage = "backward"
                scaled = loss if self.accumulation_steps == 1 else loss / self.accumulation_steps
                scaled = scaled if self.scaler is None else self.scaler.scale(scaled)
                scaled.backward()  # type: ignore[no-untyped-call]
        if kind.steps:
            self.stage = "the optimizer's step"
            with torch.autocast(self.device.type, enabled=False) if casts else nullcontext():
                self._take_step()
        return loss.detach(), _pytree.tree_map_only(Tensor, Tensor.detach, output)

    def _take_step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
