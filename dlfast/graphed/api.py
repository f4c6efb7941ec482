"""`graphed_step`: a training step that is captured once and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dlfast.graphed.capture import Captured
from dlfast.graphed.plain import PlainStep, kind_of


class NotGraphedWarning(UserWarning):
    """A step ran without its graph; the message says why."""


class GraphedStep:
    """What :func:`graphed_step` returns: call it with the inputs of the model and the target."""

    def __init__(self, step: PlainStep, example_inputs: tuple[Tensor, ...], num_warmup_iters: int, pool: Any) -> None:
        self._step = step
        self._examples = [(t.shape, t.dtype) for t in example_inputs]
        self._warmup = num_warmup_iters
        self._pool = pool
        self._index = 0  # of the next call among those of one step of the optimizer
        self._warned = False
        self._captured: Captured | None = None
        self.output: Any = None
        """What the model returned at the last call, detached. The next call writes over its tensors."""
        self._checked(example_inputs)
        if self.is_graphed:
            self._captured = Captured(step, example_inputs, num_warmup_iters, pool)

    @property
    def is_graphed(self) -> bool:
        """Whether steps are captured: on CUDA. Elsewhere they run as they are."""
        return self._step.device.type == "cuda"

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Take the step; see :func:`graphed_step`."""
        fits = self._checked(inputs)
        kind = kind_of(self._index, self._step.accumulation_steps)
        if self.is_graphed and fits:
            if self._captured is None or not self._captured.holds():
                self._captured = self.output = None  # frees their memory for the next one
                self._captured = Captured(self._step, inputs, self._warmup, self._pool)
            loss, self.output = self._captured.replay(inputs, kind)
        else:
            if self.is_graphed:
                self._warn(inputs)
            device = self._step.device
            loss, self.output = self._step.run(tuple(t.to(device, non_blocking=True) for t in inputs), kind)
        self._index = (self._index + 1) % self._step.accumulation_steps
        return loss

    def _checked(self, inputs: tuple[Any, ...]) -> bool:
        """Whether `inputs` have the shapes that were captured; refuses what no step takes."""
        if len(inputs) != len(self._examples):
            raise TypeError(
                f"step takes {len(self._examples)} tensors as example_inputs does, those of the model and the target, "
                f"got {len(inputs)}"
            )
        fits = True
        for i, (t, (shape, dtype)) in enumerate(zip(inputs, self._examples, strict=True)):
            if not isinstance(t, Tensor):
                raise TypeError(f"inputs[{i}] must be a tensor, got {type(t).__name__}")
            if t.dtype is not dtype:
                raise RuntimeError(f"inputs[{i}] must be of {dtype} as in example_inputs, got {t.dtype}")
            if t.device != self._step.device and t.device.type != "cpu":
                or_cpu = " or on the CPU" if self.is_graphed else ""
                raise RuntimeError(f"inputs[{i}] must be on {self._step.device}{or_cpu}, got {t.device}")
            if t.requires_grad:
                raise RuntimeError(f"inputs[{i}] requires a gradient, which a step does not return: detach() it")
            fits = fits and t.shape == shape
        return fits

    def _warn(self, inputs: tuple[Tensor, ...]) -> None:
        if self._warned:
            return
        self._warned = True
        captured = ", ".join(str(tuple(shape)) for shape, _ in self._examples)
        came = ", ".join(str(tuple(t.shape)) for t in inputs)
        warnings.warn(
            f"the step was captured for inputs of {captured} and runs without its graph for {came}: if it is the last "
            "batch, pass drop_last=True to the DataLoader",
            NotGraphedWarning,
            stacklevel=3,
        )


def graphed_step(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    example_inputs: tuple[Tensor, ...],
    *,
    scaler: torch.amp.GradScaler | None = None,
    accumulation_steps: int = 1,
    num_warmup_iters: int = 3,
    pool: Any = None,
) -> GraphedStep:
    """A training step that the host launches as one CUDA graph: clearing of gradients, forward, loss, backward, step.

    The result is called with a batch and returns its loss. Each call does what these lines do, and comes to the same
    numbers::

        optimizer.zero_grad()
        loss = loss_fn(model(*inputs), target)
        loss.backward()                             # scaler.scale(loss).backward()
        optimizer.step()                            # scaler.step(optimizer); scaler.update()

    On other devices than CUDA it runs these lines, with the same checks of its inputs. On CUDA, gradients, statistics,
    states and random numbers advance as without a graph. A batch of another shape runs without the graph, and says so
    once with a `NotGraphedWarning`. Where parameters, buffers, states, modes, hooks or options are others than those
    captured, after ``load_state_dict`` of the optimizer for instance, the step is captured anew. docs/graphs.md says
    more.

    Args:
        model: any module, all of it on one device. Its parameters and buffers must stay where they are during a step.
        loss_fn: called with what `model` returned and the target; returns a loss of one element.
        optimizer: one of :mod:`dlfast.optim`, or of ``torch.optim`` with ``capturable=True`` (SGD has no such option
            and needs none). Numbers that change later, as learning rates of a schedule do, must be tensors on the GPU.
        example_inputs: what a call will be given: the inputs of `model`, and the target last. Any values; shapes and
            dtypes are those of the graph, as is the layout in memory. On the model's device or on the CPU, from where
            they are copied without waiting if pinned.
        scaler: scales the loss, and steps and updates itself. The optimizer must be made with ``fused=True``, or, of
            :mod:`dlfast.optim`, with an option that has it unscale in its step.
        accumulation_steps: calls of which each adds its gradients, of its loss divided by their number, and the last
            takes the step.
        num_warmup_iters: steps before the capture, in which algorithms are chosen and libraries make what they need.
            Everything is put back afterwards.
        pool: memory to capture in, as ``torch.cuda.graph`` takes it.

    Returns:
        A callable; ``step(*inputs, target)`` returns the loss, detached, and ``step.output`` then is what the model
        returned.

    Raises:
        TypeError: an argument, or an input of a call, is of another type.
        ValueError: `accumulation_steps` or `num_warmup_iters` is below 1, or `example_inputs` has no input and target.
        RuntimeError: the step cannot be captured, with the file and line that cannot, or what to pass instead; an
            input is of another dtype or device than in `example_inputs`; in a call, a number of the optimizer has
            changed that is no tensor. Model, optimizer, gradients, scaler and random numbers are then as before.

    Example:
        >>> import torch, dlfast
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = dlfast.optim.SGD(model.parameters(), lr=0.5)
        >>> images, target = torch.ones(4, 2), torch.zeros(4, 1)
        >>> step = dlfast.graphed_step(model, torch.nn.functional.mse_loss, optimizer, (images, target))
        >>> step(images, target)
        tensor(4.)
        >>> model.weight.data
        tensor([[-1., -1.]])

    Source: "Whole-network capture" in PyTorch's notes on CUDA graphs, and ``torch.cuda.make_graphed_callables``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
    if not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs must be a tuple of tensors, got {type(example_inputs).__name__}")
    if len(example_inputs) < 2:
        raise ValueError(f"example_inputs must be inputs and a target, got {len(example_inputs)} tensor(s)")
    for i, t in enumerate(example_inputs):
        if not isinstance(t, Tensor):
            raise TypeError(f"example_inputs[{i}] must be a tensor, got {type(t).__name__}")
    for name, count in {"accumulation_steps": accumulation_steps, "num_warmup_iters": num_warmup_iters}.items():
        if not isinstance(count, int):
            raise TypeError(f"{name} must be an int, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    device = _device_of(model, optimizer)
    used = scaler if scaler is not None and scaler.is_enabled() else None
    step = PlainStep(model, loss_fn, optimizer, used, accumulation_steps, device)
    return GraphedStep(step, example_inputs, num_warmup_iters, pool)


def _device_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.device:
    """Where steps run: on a GPU if a parameter is there, so that one that is not is refused."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    devices: list[torch.device] = [p.device for p in (*model.parameters(), *own)]
    return next((device for device in devices if device.type == "cuda"), devices[0])
