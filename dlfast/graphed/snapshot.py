"""What training has come to, kept while a step is tried out, and put back in place."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from dlfast.graphed.plain import PlainStep
from dlfast.optim._step import FusedStep

# What torch.optim's optimizers make at their first step, and begin with.
FIRST = dict.fromkeys(
    ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg")
    + ("acc_delta",),
    0.0,
) | {"mu_product": 1.0}
# Of an optimizer, beside its states: what its last step said, and what learning-rate schedules ask for.
TOLD = ("_skipped", "grad_norm", "_opt_called")
# What a GradScaler sets for a step, and leaves there if the step fails.
SIGNALS = ("grad_scale", "found_inf")


class Snapshot:
    """The values of all that a step writes, as they were when this was made; random numbers are kept elsewhere."""

    def __init__(self, step: PlainStep) -> None:
        optimizer = step.optimizer
        self._step = step
        self._values = {key: t.detach().clone() for key, t in self._written().items()}
        self._entries = {p: dict(entry) for p, entry in _entries(optimizer).items()}
        # The tables of the modules, where a forward may put another tensor.
        self._held: list[tuple[str, dict[str, Any], str, Tensor | None]] = [
            (name, table, key, t)
            for name, module in step.named_modules()
            for table in (cast("dict[str, Any]", module._parameters), cast("dict[str, Any]", module._buffers))
            for key, t in table.items()
        ]
        self._loose = step.loose()
        self._grads = [(p, p.grad) for p in step.params()]
        self._told = {name: vars(optimizer)[name] for name in TOLD + SIGNALS if name in vars(optimizer)}
        self._scaler: dict[str, Any] = {} if step.scaler is None else step.scaler.state_dict()
        self._scaled = {} if step.scaler is None else dict(step.scaler._per_optimizer_states)

    def replaced(self) -> str | None:
        """The name of a tensor of a module in whose place there is another one since."""
        others = (f"{name}.{key}".lstrip(".") for name, table, key, t in self._held if table.get(key) is not t)
        return next(others, None)

    def make_states(self) -> None:
        """Let the optimizer make what it lacks for the gradients that are there, and note its first values.

        Raises:
            RuntimeError: an optimizer of ``torch.optim`` begins with what is not known here.
        """
        optimizer, device = self._step.optimizer, self._step.device
        if isinstance(optimizer, FusedStep):
            optimizer._make_states(device)
        else:
            optimizer.step()
        for key, t in self._written().items():
            if key not in self._values:
                own = isinstance(optimizer, FusedStep)
                self._values[key] = t.detach().clone() if own else self._first(key, t)
        self._put_back_values()

    def _first(self, key: tuple[Any, ...], t: Tensor) -> Tensor:
        optimizer = self._step.optimizer
        name = key[-1]
        damped = name == "momentum_buffer" and any(group.get("dampening") for group in optimizer.param_groups)
        if name not in FIRST or damped:
            raise RuntimeError(
                f"torch.optim.{type(optimizer).__name__} makes its state {name!r} at its first step, and a captured "
                "step could not begin as that one does: take one step before graphed_step"
            )
        return torch.full_like(t, FIRST[name])

    def put_back(self) -> None:
        """All values, in place; the states that were made are there, as before a first step."""
        self._put_back_values()
        for t in self._written().values():
            if t.is_cuda:
                t.record_stream(torch.cuda.current_stream())  # states were made on another one
        self._put_back_the_rest()

    def undo(self) -> None:
        """As if nothing had been tried: states that were made are gone."""
        state = self._step.optimizer.state
        for _, table, key, t in self._held:
            table[key] = t
        for own, name, t in self._loose:
            own[name] = t
        for p in [*_entries(self._step.optimizer)]:
            if p in self._entries:
                state[p].clear()
                state[p].update(self._entries[p])
            else:
                del state[p]
        self.put_back()

    def _put_back_values(self) -> None:
        for key, t in self._written().items():
            if key in self._values:
                t.detach().copy_(self._values[key])

    def _put_back_the_rest(self) -> None:
        optimizer, scaler = self._step.optimizer, self._step.scaler
        for p, grad in self._grads:
            p.grad = grad
        for name in TOLD + SIGNALS:
            vars(optimizer).pop(name, None)
        vars(optimizer).update(self._told)
        if scaler is not None:
            scaler.load_state_dict(self._scaler)
            scaler._per_optimizer_states.clear()
            scaler._per_optimizer_states.update(self._scaled)

    def _written(self) -> dict[Any, Tensor]:
        """By keys that stay the same where an optimizer brings a state to another device or dtype."""
        step = self._step
        tensors = (*step.params(), *step.buffers(), *(t for _, _, t in step.loose()))
        found: dict[Any, Tensor] = {("tensor", id(t)): t for t in tensors}
        for p, entry in _entries(step.optimizer).items():
            found |= {("state", p, name): t for name, t in entry.items() if isinstance(t, Tensor)}
        if isinstance(step.optimizer, FusedStep):
            found |= step.optimizer._beside_states()
        return found


def _entries(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {p: entry for p, entry in optimizer.state.items() if isinstance(p, Tensor) and isinstance(entry, dict)}
