"""Being the local optimizer of a ``ZeroRedundancyOptimizer``, which hands each process a part of the parameters.

Nothing in the call says so: the constructor looks for who called it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"
_DEPTH = 12  # frames from its method to the end of our constructor, with some to spare


class Shards:
    """The processes that hold the other parts of the parameters."""

    def __init__(self, owner: Any) -> None:
        self._group = owner.process_group
        # Where the parameters are, also for a process that was given none.
        self.device: torch.device = owner.param_groups[0]["params"][0].device

    def add(self, squares: Tensor) -> None:
        """Add to `squares`, a tensor of one number, that of all the other processes."""
        torch.distributed.all_reduce(squares, group=self._group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        return self  # a copy of the optimizer has the same part, beside the same processes

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "the optimizer holds one process's part of the parameters of a ZeroRedundancyOptimizer and cannot be "
            "pickled: save state_dict() instead"
        )


def shards() -> Shards | None:
    """Those of the ZeroRedundancyOptimizer that is constructing an optimizer; None where there is none."""
    module = sys.modules.get(_MODULE)
    if module is None:
        return None
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        owner = frame.f_locals.get("self")
        if isinstance(owner, module.ZeroRedundancyOptimizer):
            return Shards(owner)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def refuse_clearing() -> None:
    raise RuntimeError(
        "zero_grad_after_step would clear the gradients of this process's part of the parameters only, which "
        "ZeroRedundancyOptimizer has split: leave it out, and call zero_grad()"
    )
