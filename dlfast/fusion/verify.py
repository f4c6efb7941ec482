"""Whether a fused model computes what the original computes: both run, side by side."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dlfast.fusion.api import as_inputs, check_model, fuse, is_fused, unfuse
from dlfast.fusion.run import NotFusedWarning

# In float64 no maximum of a window is decided by rounding, and sums of any order agree far better than this.
DOUBLE_TOLERANCE = 1e-9
# Below this share of the largest number of its kind a quantity is compared with that share.
NO_SCALE = 1e-3
# In the model's own dtype either model is compared with the original in float64.
WORSE_THAN_ORIGINAL = 4.0
# A number that rounding carries over the edge of a ReLU or past a tie in a window takes its whole gradient with
# it, in the original as well as in the fused model. On inputs moved by a rounding error it is another number, or
# none; what is really wrong is wrong on all of them.
ATTEMPTS = 4


@dataclass(frozen=True)
class Difference:
    """The largest difference in one quantity, relative to the largest number in it.

    Attributes:
        dtype: in which both models ran.
        mode: "training" or "evaluation".
        quantity: "output", "grad of <parameter>", "grad of input <number>" or "buffer <name>".
        largest: between the fused model and the original in float64, over the largest number in that.
        allowed: what rounding explains.
    """

    dtype: torch.dtype
    mode: str
    quantity: str
    largest: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.largest <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found. ``print`` it for a table of the largest differences."""

    differences: tuple[Difference, ...]
    fused: bool  # False: nothing of the model fuses, so that there was nothing to compare

    @property
    def ok(self) -> bool:
        """Whether every difference is one that rounding explains."""
        return all(difference.ok for difference in self.differences)

    def worst(self, dtype: torch.dtype, mode: str) -> Difference:
        """The difference closest to, or furthest beyond, what is allowed."""
        mine = [d for d in self.differences if (d.dtype, d.mode) == (dtype, mode)]
        return max(mine, key=lambda d: (not d.ok, d.largest / d.allowed if d.largest == d.largest else 0.0))

    def __str__(self) -> str:
        lines = ["equal up to rounding" if self.ok else "NOT EQUAL"]
        if not self.fused:
            lines = ["nothing of this model is fused"]
        for dtype, mode in dict.fromkeys((d.dtype, d.mode) for d in self.differences):
            worst = self.worst(dtype, mode)
            lines.append(
                f"{str(dtype).removeprefix('torch.')}, {mode}: largest difference {worst.largest:.1e} "
                f"(allowed {worst.allowed:.1e}) in {worst.quantity}"
            )
        return "\n".join(lines)


def verify(model: nn.Module, *inputs: Any, seed: int = 0) -> Verification:
    """Run `model` fused and as it was, forward and backward, and compare everything.

    Copies of both run in float64 and in the model's dtype, in training and in evaluation, under the same
    random numbers; the model itself is not changed. In float64 the two must agree to 1e-9 of the largest
    number; in a lower dtype the fused model may be four times as far from float64 as the original is. Where
    it is not, both run again on inputs moved by rounding errors, up to three times: the farthest of the
    original's runs counts, and the nearest of the fused model's.

    Args:
        model: a model, fused or not; of one that is not, what :func:`dlfast.fuse` would make of it.
        inputs: what it is called with. Its output may be a tensor, or tuples, lists and dicts of them.
        seed: of the random numbers, for dropout.

    Raises:
        TypeError: `model` is not a module, or a compiled one.

    >>> import torch, dlfast
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> dlfast.verify(model, torch.randn(2, 3, 12, 12)).ok
    True
    """
    check_model("verify", model)
    arguments = as_inputs(inputs) or ()
    plain = unfuse(model)
    fused = model
    if not is_fused(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotFusedWarning)
            fused = fuse(model, arguments)
    found: list[Difference] = []
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    for training in (True, False):
        exact = _run(plain, arguments, torch.float64, training, seed)
        ours = _run(fused, arguments, torch.float64, training, seed)
        found += _differences(ours, exact, exact, torch.float64, training)
        if own != torch.float64:
            found += _lower(plain, fused, arguments, own, training, seed)
    return Verification(tuple(found), is_fused(fused))


def _lower(
    plain: nn.Module, fused: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype, training: bool, seed: int
) -> list[Difference]:
    """What differs in a dtype lower than float64."""
    found: dict[str, Difference] = {}
    for attempt in range(ATTEMPTS):
        arguments = inputs if attempt == 0 else _nudged(inputs, dtype, attempt)
        original, ours = (_run(model, arguments, dtype, training, seed) for model in (plain, fused))
        exact = _run(plain, arguments, torch.float64, training, seed)
        for d in _differences(ours, original, exact, dtype, training):
            so_far = found.get(d.quantity, d)
            largest = d.largest if d.largest < so_far.largest else so_far.largest
            found[d.quantity] = replace(d, largest=largest, allowed=max(d.allowed, so_far.allowed))
        if all(d.ok for d in found.values()):
            break
    return list(found.values())


def _nudged(inputs: tuple[Any, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Floating-point inputs moved by up to four rounding errors of `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
        moved = value.detach().double() * (1 + 4 * torch.finfo(dtype).eps * noise.to(value.device))
        return torch.empty_like(value).copy_(moved.to(dtype))

    moved: tuple[Any, ...] = tree_map(nudge, inputs)
    return moved


def _run(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype, training: bool, seed: int) -> dict[str, Tensor]:
    """Everything that a step of a copy of `model` makes, by name."""
    model = copy.deepcopy(model).to(dtype)
    model.zero_grad()
    if not training:
        model.eval()
    arguments = tree_map(lambda value: _leaf(value, dtype), inputs)
    with torch.random.fork_rng([t.device.index for t in model.parameters() if t.is_cuda][:1]):
        torch.manual_seed(seed)
        with torch.enable_grad():
            results = model(*arguments)
    outputs = [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()]
    differentiable = [t for t in outputs if t.requires_grad]
    if differentiable:
        grads = [_fixed_like(t) for t in differentiable]
        torch.autograd.backward(differentiable, grads)
    return dict(_quantities(model, arguments, outputs))


def _quantities(model: nn.Module, arguments: Any, outputs: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    for number, output in enumerate(outputs):
        yield f"output {number}" if len(outputs) > 1 else "output", output.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield f"grad of {name}", parameter.grad
    for number, value in enumerate(tree_leaves(arguments)):
        if isinstance(value, Tensor) and value.grad is not None:
            yield f"grad of input {number}", value.grad
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield f"buffer {name}", buffer


def _leaf(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype, copy=True).requires_grad_()


def _fixed_like(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


def _differences(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, training: bool
) -> Iterator[Difference]:
    """Quantities of a kind (outputs, gradients, buffers) are judged by the largest number and the largest error
    among them: a gradient that is 0 but for rounding has no scale of its own, and errors grow from layer to layer.
    """
    mode = "training" if training else "evaluation"
    largest: dict[str, float] = {}
    for name, truth in exact.items():
        largest[_kind(name)] = max(largest.get(_kind(name), 0.0), _magnitude(truth))
    scales = {name: max(_magnitude(truth), NO_SCALE * largest[_kind(name)]) for name, truth in exact.items()}
    allowed = dict.fromkeys(largest, DOUBLE_TOLERANCE)
    if dtype != torch.float64:
        allowed = dict.fromkeys(largest, 64 * torch.finfo(dtype).eps)
        for name, have in theirs.items():
            error = WORSE_THAN_ORIGINAL * _relative(have, exact[name], scales[name])
            allowed[_kind(name)] = max(allowed[_kind(name)], error)
    for name, truth in exact.items():
        if name in ours:
            yield Difference(dtype, mode, name, _relative(ours[name], truth, scales[name]), allowed[_kind(name)])
        else:
            yield Difference(dtype, mode, f"{name} (missing)", float("inf"), allowed[_kind(name)])


def _kind(quantity: str) -> str:
    return quantity.partition(" ")[0]


def _magnitude(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _relative(have: Tensor, want: Tensor, scale: float) -> float:
    if want.numel() == 0:
        return 0.0
    same_nan = have.isnan() & want.isnan()
    distance = (have.double() - want.double()).abs().masked_fill(same_nan, 0.0)
    distance = distance.masked_fill(have.double() == want.double(), 0.0)  # infinities
    return distance.max().item() / (scale if scale > 0 else 1.0)
