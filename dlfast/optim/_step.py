"""What all optimizers share: the step, with what its options ask for.

An algorithm derives from :class:`FusedStep` and, where it has one, from its ``torch.optim`` class, and says
which states it keeps, which numbers a group has, and how it steps in plain PyTorch; docs/optimizers.md adds
one as an example.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as optimizer_module

from dlfast._native import native
from dlfast.optim._device import Kept, OnDevice
from dlfast.optim._members import PlainOptions, move_averages, plain_step, sharded_over, unscaled
from dlfast.optim._options import FLAGS, PLAIN, Extras, extra_option
from dlfast.optim._prepare import Bucket, Made, Prepared
from dlfast.optim._traced import register, traced_step
from dlfast.optim._zero import refuse_clearing, shards

# Reads _step_supports_amp_scaling before every step.
_SCALER_STEP = torch.amp.GradScaler.step.__code__
CHANGED_MEANWHILE = "a parameter, gradient or state changed while the step was being taken"


class FusedStep(OnDevice):
    """The machinery of a fused step; see :mod:`dlfast.optim`.

    To ``torch.amp.GradScaler``, and to trainers that clip between unscaling and the step, this is an optimizer
    as any other, unless it is made with ``fused=True`` or with an option that needs the unscaled gradients:
    `max_grad_norm`, `max_grad_value`, `zero_grad_after_step`. Then they are unscaled inside the step, in
    registers: ``p.grad`` itself is only read, and keeps the scaled gradient. (torch's fused optimizers overwrite
    it; to look at unscaled gradients call ``scaler.unscale_(optimizer)`` first, as for every optimizer.) Where
    ``grad_scale`` is set and ``found_inf`` is not, the step looks for infinities itself and skips if there are any.

    A skipped step changes neither parameters nor states, counters or averages, from the first step on;
    ``step_was_skipped`` then is True.
    """

    def _set_extras(self, extra: dict[str, Any]) -> None:
        """Before the constructor of ``torch.optim``, which adds the groups."""
        self._extras = Extras(**extra)
        self._shards = shards()
        if self._shards is not None and self._extras.zero_grad_after_step:
            refuse_clearing()
        self._seed = torch.initial_seed() & (2**64 - 1)
        self._random_step = 0
        self._prepared: dict[Tensor | None, Prepared] = {}
        self._checked: list[tuple[Any, ...] | None] = []
        self._native_options: Any = None if native.module is None else native.module.StepOptions()
        self._swapped = False
        self._skipped = False
        self._kept: dict[torch.device, Kept] = {}
        self._handle = register(self)
        # For steps that torch.compile traces: what a graph takes as inputs.
        self._all_params: list[Tensor] = []
        self._all_states: list[Tensor] = []
        self._traceable = True
        self.grad_norm: Tensor | None = None
        """Norm of all gradients at the last step taken, unscaled and before clipping; None where not measured."""

    # ---- The extra options as attributes ------------------------------------------------------------------

    max_grad_norm = extra_option("max_grad_norm")
    max_grad_value = extra_option("max_grad_value")
    ema_decay = extra_option("ema_decay")
    state_dtype = extra_option("state_dtype")
    master_weights = extra_option("master_weights")
    stochastic_rounding = extra_option("stochastic_rounding")
    zero_grad_after_step = extra_option("zero_grad_after_step")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves unscaling and skipping to the step; torch's name for it."""
        handles: bool | None = vars(self).get("_handles_scale")
        if handles is None:
            extras = self._extras
            clips = extras.max_grad_norm is not None or extras.max_grad_value is not None
            is_fused = bool(self.defaults.get("fused", vars(self).get("_fused")))
            handles = is_fused or clips or extras.zero_grad_after_step
        if not handles and sys._getframe(1).f_code is _SCALER_STEP:
            # It takes no step where it finds infinities, and says so to nobody: until one follows, this was one. Only
            # the caller tells: what it found stays with it, it runs no hook, and trainers read this attribute too.
            self._skipped = True
        return handles

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._handles_scale = value

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last :meth:`step` was skipped for infinite gradients, so that a scheduler can hold still.

        On CUDA this waits for the device.
        """
        return bool(self._skipped)

    @contextmanager
    def swapped_ema(self) -> Iterator[None]:
        """Within the block the parameters hold their moving average; afterwards they are back.

        Gradients are on or off within as they were before.

        Raises:
            RuntimeError: the optimizer keeps no average, or they are swapped already; :meth:`step` within
                the block.

        Example:
            >>> import torch, dlfast.optim
            >>> weight = torch.nn.Parameter(torch.tensor([4.0]))
            >>> optimizer = dlfast.optim.SGD([weight], lr=1.0, ema_decay=0.5)
            >>> weight.grad = torch.tensor([2.0])
            >>> optimizer.step()
            >>> with optimizer.swapped_ema():
            ...     weight.item()
            3.0
            >>> weight.item()
            2.0
        """
        if self._extras.ema_decay is None:
            raise RuntimeError("swapped_ema needs an average: construct the optimizer with ema_decay=")
        if self._swapped:
            raise RuntimeError("the averages are swapped in already")
        entries = [(p, entry) for p, entry in self.state.items() if isinstance(p, Tensor)]
        kept = [(p, p.detach().clone(), entry["ema"]) for p, entry in entries if "ema" in entry]
        self._swapped = True
        try:
            with torch.no_grad():
                for p, _, average in kept:
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for p, weights, _ in kept:
                    p.copy_(weights)
            self._swapped = False

    # ---- One step -----------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: called first, with gradients enabled; reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: for a gradient that is sparse or of another shape or device than its parameter, and for
                a parameter that overlaps itself in memory; nothing has been changed then.
            ValueError: a number that has been set in a group is NaN, or a beta without a bias correction; nothing
                has been changed then.
            TypeError: what has been set in a group is no number; nothing has been changed then.
        """
        if torch.compiler.is_dynamo_compiling() and self._traceable and not self._has_hooks():
            return traced_step(self, closure)
        if self._is_observed():
            return self._observed_step() if closure is None else self._observed_step(closure)
        return self._unobserved_step(closure)

    # torch.optim would wrap step() so that hooks and the profiler see it, which takes longer than the step of a
    # small network: that wrapper is used only where there is something to see.
    step.hooked = True  # type: ignore[attr-defined]

    def _has_hooks(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer_module._global_optimizer_pre_hooks
            or optimizer_module._global_optimizer_post_hooks
        )

    def _is_observed(self) -> bool:
        return self._has_hooks() or torch._C._autograd._profiler_enabled()

    def _unobserved_step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(None)
        return loss

    _observed_step = torch.optim.Optimizer.profile_hook_step(_unobserved_step)

    @_disable_dynamo
    def _step(self, only: Tensor | None) -> None:
        """The step of all parameters, or of `only` one."""
        if self._swapped:
            raise RuntimeError("step() inside of swapped_ema(): the parameters hold their averages")
        values = vars(self)
        scale: Tensor | None = values.get("grad_scale")
        found_inf: Tensor | None = values.get("found_inf")
        prepared = self._prepared.get(only)
        if prepared is None or prepared.asked != self._asked() or (self._shards is not None and self._norm_is_shared()):
            done = False
        elif (bucket := prepared.alone()) is not None and bucket.device.type == "cpu":
            done = self._run_alone(bucket, only, scale, found_inf)
        else:
            done = not prepared.on_host() and self._run_on_device(prepared, scale, found_inf)
        if not done:
            prepared = self._step_slowly(only, scale, found_inf)
        assert prepared is not None
        if prepared.idle and self._skipped is not True:
            move_averages(prepared.idle, self.state, self._extras.ema_decay or 0.0, self._skipped)

    def _run_alone(self, bucket: Bucket, only: Tensor | None, scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """One native step on the CPU; False, before anything has changed, where it no longer holds."""
        hyper = self._hyper()
        if found_inf is not None and found_inf.item() != 0:
            self._skip(only)
            return True
        finds_inf = scale is not None and found_inf is None
        options = self._options_now(1.0 if scale is None else 1.0 / scale.item(), finds_inf)
        result = bucket.native_step.run(self.state, hyper, options, None)
        if result is None:
            return False
        self._took(*result)
        return True

    def _options_now(self, unscale: float, finds_inf: bool) -> Any:
        """The C++ StepOptions of this step."""
        options, extras = self._native_options, self._extras
        if options is None:
            return None
        options.grad_factor = unscale
        options.clip_factor = 1.0
        options.random_step = self._random_step
        options.measure_norm = finds_inf or extras.max_grad_norm is not None
        options.skip_if_not_finite = finds_inf
        if extras.changed:
            extras.changed = False
            options.max_grad_value = -1.0 if extras.max_grad_value is None else extras.max_grad_value
            options.max_grad_norm = -1.0 if extras.max_grad_norm is None else extras.max_grad_norm
            options.average_decay = extras.ema_decay or 0.0
            options.zero_grad = extras.zero_grad_after_step
            options.seed = self._seed
        return options

    def _took(self, norm: Tensor | None, skipped: bool) -> None:
        self._skipped = skipped
        if skipped:
            return
        self._random_step += 1
        if self._extras.max_grad_norm is not None:
            self.grad_norm = norm

    def _skip(self, only: Tensor | None) -> None:
        self._skipped = True
        if self._extras.zero_grad_after_step:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None and (only is None or p is only):
                            p.grad.zero_()

    @torch.no_grad()
    def _step_slowly(self, only: Tensor | None, scale: Tensor | None, found_inf: Tensor | None) -> Prepared:
        """The step of tensors that no native step knows, or that several engines share."""
        kept = prepared = self._prepared.pop(only, None)
        new: list[Made] = []
        skipped = True
        try:
            # All are asked before any is run: nothing is half done.
            if prepared is None or prepared.asked != self._asked() or not self._hold(prepared):
                prepared = self._prepare(only, new)
                self.state.update((made.key, made.entry) for made in new)
                self._all_states = self._list_states()
            if prepared is not kept and not self._hold(prepared):
                raise RuntimeError(CHANGED_MEANWHILE)
            skipped = self._run(prepared, scale, found_inf)
        finally:
            if skipped:  # or failed: as if the new states had never been
                for made in new:
                    made.undo(self.state)
        if skipped:
            self._skip(only)
        elif prepared.buckets and prepared.lasts and not prepared.plain:  # else none would notice new gradients
            self._prepared[only] = prepared
        return prepared

    def _hold(self, prepared: Prepared) -> bool:
        """Whether every native step still takes the parameters, gradients and states that are there."""
        return all(b.native_step.holds(self.state, b.grads()) for b in prepared.buckets)

    def _run(self, prepared: Prepared, scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Take the step; whether it was skipped, where the host knows."""
        finds_inf = scale is not None and found_inf is None
        shared = self._norm_is_shared()
        if not prepared.on_host() and (prepared.buckets or not shared):
            if not self._run_on_device(prepared, scale, found_inf):
                raise RuntimeError(CHANGED_MEANWHILE)
            return False
        hyper = self._hyper()
        if found_inf is not None and found_inf.item() != 0:
            return True
        unscale = 1.0 if scale is None else 1.0 / scale.item()
        options = self._options_now(unscale, finds_inf)
        alone = None if shared else prepared.alone()
        if alone is not None:
            norm, skipped = alone.native_step.run(self.state, hyper, options, None)
            if not skipped:
                self._took(norm, False)
            return bool(skipped)

        plain_options = self._plain_options(unscale)
        norm = None
        if finds_inf or self._extras.max_grad_norm is not None:
            norm = self._total_norm(prepared, plain_options)
            if finds_inf and not math.isfinite(norm.item()):
                return True
            if self._extras.max_grad_norm is not None:
                factor = self._extras.max_grad_norm / (norm.item() + 1e-6)
                plain_options.clip_factor = 1.0 if factor > 1 else factor
            if options is not None:
                options.clip_factor = plain_options.clip_factor
                options.measure_norm = options.skip_if_not_finite = False
        # Parameters may share a gradient: none is cleared before all have read it. The buckets keep to that among
        # their own.
        for m in prepared.plain:
            group = self.param_groups[m.group]
            plain_step(m, self._unsigned, plain_options, lambda *args, group=group: self._plain(group, *args))
        on_cuda = [bucket for bucket in prepared.buckets if bucket.device.type == "cuda"]
        if on_cuda and not self._launch(on_cuda, options, None, None):
            raise RuntimeError(CHANGED_MEANWHILE)
        for bucket in prepared.buckets:
            if (
                bucket.device.type == "cpu"
                and bucket.native_step.run(self.state, hyper, options, bucket.grads()) is None
            ):
                raise RuntimeError(CHANGED_MEANWHILE)
        if self._extras.zero_grad_after_step:
            for m in prepared.plain:
                m.grad.zero_()
        self._took(norm, False)
        return False

    def _plain_options(self, unscale: float) -> PlainOptions:
        extras = self._extras
        return PlainOptions(
            grad_factor=unscale,
            clip_factor=1.0,
            max_grad_value=extras.max_grad_value,
            ema_decay=extras.ema_decay,
            stochastic_param=extras.stochastic_rounding,
            stochastic_state=extras.rounds_states,
            seed=self._seed,
            random_step=self._random_step,
        )

    def _total_norm(self, prepared: Prepared, plain_options: PlainOptions) -> Tensor:
        """Of all gradients, over devices, dtypes and processes."""
        total = 0.0
        dtypes: set[torch.dtype] = set()
        for bucket in prepared.buckets:
            dtypes.update(m.param.dtype for m in bucket.members)
            if bucket.device.type == "cuda":
                squares = sum(_squares(unscaled(m, plain_options)) for m in bucket.members)
            else:
                squares = bucket.native_step.squares(self.state, self._native_options, bucket.grads())
            total += _reduced(squares, bucket.mesh, bucket.mesh_dims)
        for m in prepared.plain:
            dtypes.add(m.param.dtype)
            total += _reduced(_squares(unscaled(m, plain_options)), *sharded_over(m.key))
        if self._shards is not None:
            all_squares = torch.tensor(total, dtype=torch.float64, device=self._shards.device)
            self._shards.add(all_squares)
            total = all_squares.item()
        dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        return torch.tensor(math.sqrt(total) if total == total else math.nan, dtype=dtype)

    def _hyper(self) -> list[tuple[float, ...]]:
        """The numbers of all groups, checked where they have changed."""
        checked = self._checked
        groups = self.param_groups
        if len(checked) != len(groups):
            checked[:] = [None] * len(groups)
        for i, group in enumerate(groups):
            numbers = self._numbers(group)
            # NaN differs from itself, a tensor is looked at anew each time: neither passes unchecked.
            if numbers != checked[i]:
                checked[i] = None
                checked[i] = self._checked_numbers(i, group, numbers)
        return checked  # type: ignore[return-value]

    def _checked_numbers(self, index: int, group: dict[str, Any], numbers: tuple[Any, ...]) -> tuple[float, ...]:
        self._check_group(index, group)
        if PLAIN.issuperset(map(type, numbers)):
            return tuple(map(float, numbers))
        pairs = zip(self._number_names, numbers, strict=True)
        return tuple(float(bool(value) if name in FLAGS else value) for name, value in pairs)


def _squares(t: Tensor) -> float:
    return t.to(torch.float64).square().sum().item()


def _reduced(squares: float, mesh: Any, dims: tuple[int, ...]) -> float:
    """The sum over the processes that hold the other parts of the same tensors."""
    if not dims:
        return squares
    total = torch.tensor(squares, dtype=torch.float64, device=mesh.device_type)
    for dim in dims:
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total.item()
