"""A captured step: what it holds alive, whether it is still true, and its replay.

A graph reads and writes addresses. So all tensors that it was captured with are kept here, and looked for in model
and optimizer before each replay: where one is another by now, or what was fixed by the capture has changed, the
graph no longer holds.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from dlfast.graphed import needs
from dlfast.graphed.plain import Kind, PlainStep, kinds
from dlfast.graphed.rehearsal import looking, refusal, waiting_raises
from dlfast.graphed.snapshot import TOLD, Snapshot
from dlfast.optim._options import CHANGEABLE
from dlfast.optim._step import FusedStep

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Captured:
    """The graphs of one step, one of each kind that gradient accumulation needs.

    Raises:
        RuntimeError: a graph cannot hold the step; the message says where and why. Parameters, buffers, states,
            gradients, scaler and random numbers are as they were, as they are after a capture.
    """

    def __init__(self, step: PlainStep, inputs: tuple[Tensor, ...], warmup: int, pool: Any) -> None:
        needs.check(step)
        self._step = step
        self._inputs = tuple(_copied(t, step.device) for t in inputs)
        self._pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self._graphs: dict[Kind, tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}
        loose = step.loose()
        with torch.cuda.device(step.device):
            before = Snapshot(step)
            try:
                with torch.random.fork_rng([step.device], device_type="cuda"):
                    self._capture(before, warmup)
            except BaseException:
                before.undo()
                torch.cuda.synchronize()  # before memory goes that was used on two streams
                raise
            self._told = {name: vars(step.optimizer)[name] for name in TOLD if name in vars(step.optimizer)}
            self._grads = [(p, p.grad) for p in step.params()]
            before.put_back()
            torch.cuda.synchronize()
        self._modules = step.modules()
        # Not those that a forward computes and only leaves there, as pruning does.
        self._loose = [(own, name) for own, name, t in loose if own.get(name) is t]
        self._tensors, self._facts = self._seen()
        self._places = _places(self._tensors)
        self._numbers = needs.numbers_of(step.optimizer)
        self._written = [*step.params(), *step.buffers()]

    def _capture(self, before: Snapshot, warmup: int) -> None:
        step, order = self._step, kinds(self._step.accumulation_steps)
        stream = _side_stream(step.device)
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._warm_up(before, warmup)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
        for p in step.params():
            p.grad = None  # backward is to make those of the graph in its own memory
        for kind in order:
            self._graphs[kind] = self._graph_of(kind, stream)

    def _graph_of(self, kind: Kind, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        step, graph = self._step, torch.cuda.CUDAGraph()
        failed: RuntimeError | None = None
        try:
            # Another thread may pin memory for the next batch meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    loss, output = step.run(self._inputs, kind)
                except RuntimeError as error:
                    failed = error  # the end of the capture may fail for it, and say less
                    raise
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise refusal(failed or error, step.stage) from error
        return graph, loss, output

    def _warm_up(self, before: Snapshot, warmup: int) -> None:
        step, order = self._step, kinds(self._step.accumulation_steps)
        for kind in order:
            step.run(self._inputs, Kind(kind.clears, False))
        before.make_states()
        for _ in range(warmup):
            for kind in order:
                step.run(self._inputs, kind)
        needs.check_prepared(step.optimizer)
        if (name := before.replaced()) is not None:
            raise RuntimeError(
                f"the step cannot be captured in a CUDA graph: forward puts another tensor in the place of {name!r}, "
                "and every replay would begin with the same one; write to it in place"
            )
        try:
            with waiting_raises():
                for kind in order:
                    step.run(self._inputs, kind, looking)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise refusal(error, step.stage) from error

    def holds(self) -> bool:
        """Whether model and optimizer are what was captured.

        Raises:
            RuntimeError: a number of the optimizer has changed that a graph could only see as a tensor.
        """
        tensors, facts = self._seen()
        return (
            facts == self._facts
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and _places(tensors) == self._places
            # Last: a checkpoint that was loaded may bring other numbers with its states.
            and needs.check_numbers(self._numbers, needs.numbers_of(self._step.optimizer))
        )

    def replay(self, inputs: tuple[Tensor, ...], kind: Kind) -> tuple[Tensor, Any]:
        """The step with `inputs`: its loss, and what the model returned, which the next replay writes over."""
        for own, t in zip(self._inputs, inputs, strict=True):
            own.copy_(t, non_blocking=True)
        if not kind.clears:
            self._take_gradients()
        graph, loss, output = self._graphs[kind]
        graph.replay()
        for p, grad in self._grads:
            if p.grad is not grad:
                p.grad = grad
        # No version of a tensor has counted, and others go by them: autograd, and folded weights.
        torch.autograd.graph.increment_version(self._written)
        if kind.steps:
            # A schedule that was made after the capture asks whether a step was taken, too.
            vars(self._step.optimizer).update(self._told, _opt_called=True)
        return loss.clone(), output

    def _take_gradients(self) -> None:
        """What a step without a graph, or somebody, has made of the gradients so far."""
        for p, grad in self._grads:
            if grad is None or p.grad is grad:
                continue
            if p.grad is None:
                grad.zero_()
            else:
                grad.copy_(p.grad)

    def _seen(self) -> tuple[list[Tensor | None], list[Any]]:
        """The tensors that a graph holds by address, and what a capture fixes beside them and the numbers."""
        step, optimizer = self._step, self._step.optimizer
        tensors: list[Tensor | None] = []
        facts: list[Any] = [torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")]
        for module in self._modules:
            own = vars(module)
            facts += (module.training, own.get("forward"), *own["_modules"].values())
            facts += (len(own[name]) for name in HOOKS)
            tensors += own["_parameters"].values()
            tensors += own["_buffers"].values()
        tensors += (own.get(name) for own, name in self._loose)
        for group in optimizer.param_groups:
            facts.append(len(group["params"]))
            for p in group["params"]:
                tensors.append(p)
                tensors += (value for value in optimizer.state.get(p, {}).values() if isinstance(value, Tensor))
        facts += (t.requires_grad for t in tensors if t is not None)
        facts.append(len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks))
        if isinstance(optimizer, FusedStep):
            facts += (getattr(optimizer, name) for name in CHANGEABLE)
            tensors += optimizer._beside_states().values()
            tensors += (vars(optimizer).get("grad_scale"), vars(optimizer).get("found_inf"))
        if step.scaler is not None:
            scaler = step.scaler
            facts += (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())
        return tensors, facts


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are tried out and captured, all of them: what libraries prepare for a stream, and where autograd
    accumulates gradients as long as a result of an earlier step lives, must be the same under capture."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _copied(t: Tensor, device: torch.device) -> Tensor:
    """A copy in the layout of `t`, which a graph may keep."""
    return torch.empty_like(t, device=device).copy_(t)


def _places(tensors: list[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
